"""The gpu-marked tests within a time box: what matters most first, in several processes, and no plugin."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from .results import Results

ROOT = Path(__file__).parents[1]
# Others follow in their own order.
FIRST = ("test_gpu_attention", "test_gpu_models", "test_gpu_write", "test_gpu_read", "test_gpu_pages")
_OUTCOME = re.compile(r"^(tests/\S+::.+?) (PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS)", re.MULTILINE)


def measure(results: Results, workers: int, seconds: float, tiny: bool = False) -> None:
    """Run them; what had no time is counted as `not run`."""
    results.part("tests", "pytest -m gpu")
    results.row({"command": "pytest -m gpu"}, lambda: run(workers, seconds, most=40 if tiny else None))


def run(
    workers: int, seconds: float, most: int | None = None, mark: str = "gpu", where: str = "tests"
) -> dict[str, Any]:
    """How many of the first `most` tests with `mark` passed, failed and so on, and which did not."""
    start = time.monotonic()
    collected = _pytest("--collect-only", "-q", "-m", mark, where).communicate(timeout=seconds)[0]
    names = [line for line in collected.splitlines() if line.startswith("tests/") and "::" in line]
    if not names:
        raise RuntimeError(f"no tests were collected: {collected[-500:]}")
    names.sort(key=lambda name: next((i for i, first in enumerate(FIRST) if f"/{first}." in name), len(FIRST)))
    names = names[:most]
    workers = min(workers, len(names))
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for worker in range(workers):
            chosen = Path(folder, f"names-{worker}")
            chosen.write_text("\n".join(names[worker::workers]), encoding="utf-8")
            with Path(folder, f"output-{worker}").open("w", encoding="utf-8") as output:
                processes.append(_pytest("-v", "--tb=short", "-m", mark, f"@{chosen}", stdout=output))
        _end(processes, start + seconds)
        outputs = [
            Path(folder, f"output-{worker}").read_text(encoding="utf-8", errors="replace") for worker in range(workers)
        ]
    outcomes = {name: outcome for text in outputs for name, outcome in _OUTCOME.findall(text)}
    failures = [name for name, outcome in outcomes.items() if outcome in ("FAILED", "ERROR")]
    for process, text in zip(processes, outputs, strict=True):
        if process.returncode != 0:
            print(text[-4000:])
    counts = Counter(outcome.lower() for outcome in outcomes.values())
    not_run = len(names) - sum(name in outcomes for name in names)
    # A process that dies takes the rest of its tests with it: its code says so.
    died = [process.returncode for process in processes if process.returncode not in (0, 1, 2)]
    return {
        **counts, "not run": not_run, "seconds": round(time.monotonic() - start), **({"died": died} if died else {}),
        **({"failures": failures[:100]} if failures else {}),
    }  # fmt: skip


def _end(processes: list[subprocess.Popen[str]], deadline: float) -> None:
    """Wait until all have ended, or stop them at the deadline, all at once."""
    _wait(processes, deadline)
    for process in processes:
        process.send_signal(signal.SIGINT)  # it then still says what failed, and its code is 2
    _wait(processes, time.monotonic() + 10)
    for process in processes:
        process.kill()
        process.wait()


def _wait(processes: list[subprocess.Popen[str]], deadline: float) -> None:
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))


def _pytest(*arguments: str, stdout: Any = subprocess.PIPE) -> subprocess.Popen[str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # No settings of the caller's: other options could change what is printed. torch.compile would start a pool of
    # processes as large as the machine for every worker.
    environment = {**os.environ, "PYTHONPATH": path, "PYTEST_ADDOPTS": "", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=stdout, stderr=subprocess.STDOUT, text=True, encoding="utf-8"
    )
