"""Everything that a GPU has to say about this package, in one command and from a bare checkout.

    python -m benchmarks.gpu --json benchmarks/results/h200.json
    python -m benchmarks.gpu --only decode,small --quick
    python -m benchmarks.gpu --device cpu --tiny          # try the programs themselves

Rows are printed and written as they are made; parts of the file that are not measured again stay. Where the checkout
has no .git, GIT_COMMIT in the environment says what was measured.
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import bandwidth, capacity, decode, generation, prefill, small, write
from .results import Results
from .timing import free

ROOT = Path(__file__).parents[1]


def run_tests(results: Results, workers: int, quick: bool = False, tiny: bool = False) -> None:
    """The gpu-marked tests, in a process of their own."""
    results.part("tests", "pytest -m gpu")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "-n", str(workers), "tests"]

    def measured() -> dict[str, Any]:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        run = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
        counts = {
            what: int(number) for number, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)", run.stdout)
        }
        if run.returncode not in (0, 5):
            print(run.stdout[-6000:], run.stderr[-2000:])
        failures = re.findall(r"^(?:FAILED|ERROR) (.*)$", run.stdout, re.MULTILINE)
        return {"exit": run.returncode, **counts, **({"failures": failures[:100]} if failures else {})}

    results.row({"command": "pytest -m gpu"}, measured)


def main() -> None:
    """Parse the command line and run the parts."""
    parts: dict[str, Callable[..., None]] = {
        "tests": lambda results, **how: run_tests(results, arguments.workers, **how),
        "bandwidth": lambda results, quick, tiny: bandwidth.measure(results, tiny),
        "decode": decode.measure,
        "small": small.measure,
        "write": write.measure,
        "prefill": prefill.measure,
        "generate": lambda results, **how: generation.measure(results, "8B", **how),
        "generate-1B": lambda results, **how: generation.measure(results, "1B", **how),
        "capacity": capacity.measure,
    }
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--only", default=",".join(parts), help=f"parts, of {','.join(parts)}")
    parser.add_argument("--quick", action="store_true", help="fewer rows")
    parser.add_argument("--tiny", action="store_true", help="sizes that say nothing, to try the programs")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--budget", type=float, default=540, help="seconds after which a part starts no further row")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 14), help="processes of the tests")
    arguments = parser.parse_args()
    chosen = arguments.only.split(",")
    if unknown := [name for name in chosen if name not in parts]:
        parser.error(f"unknown part(s) {', '.join(unknown)}; choose of {', '.join(parts)}")
    device = torch.device(arguments.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            parser.error("no CUDA device; --device cpu --tiny tries the programs without one")
        device = torch.device("cuda", torch.cuda.current_device())
    warnings.filterwarnings("ignore", category=UserWarning)
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    gc.freeze()  # what was imported stays; memory is collected after every row
    results = Results(arguments.json, device, arguments.budget)
    about = results.data["about"]
    print(about["device"], about["driver"], about["versions"], about["git_commit"], sep=" | ")
    for name in chosen:
        start = time.perf_counter()
        parts[name](results, quick=arguments.quick, tiny=arguments.tiny)
        free(device)
        print(f"-- {name}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
