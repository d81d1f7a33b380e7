"""Everything that a GPU has to say about this package, in one command and from a bare checkout.

    python -m benchmarks.gpu --json benchmarks/results/h200.json
    python -m benchmarks.gpu --only decode,small --quick
    python -m benchmarks.gpu --device cpu --tiny          # try the programs themselves

With a GPU for minutes only, three calls do what matters most first, nine minutes each: `--only first`, `--only second`
and `--only third`.

Rows are printed and written as they are made; parts of the file that are not measured again stay, and those of another
file can be taken in (`--take`). Where the checkout has no .git, `--commit` or GIT_COMMIT says what was measured.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from hf_kvquant.evaluation.memory import free

from . import bandwidth, batching, calls, capacity, decode, generation, gpu_tests, prefill, small, tiles, write
from .results import Results

# Parts of a call, in the order of their worth. A name with `:quick` takes fewer rows.
GROUPS = {
    "first": "tests",
    "second": "bandwidth,tiles:quick,decode:quick,generate-1B:quick,generate:quick,calls:quick,prefill:quick,"
    "write:quick",
    "third": "tiles,decode,small,capacity,prefill,write,batching:quick",
}


def main() -> None:
    """Parse the command line and run the parts."""
    parts: dict[str, Callable[..., None]] = {
        "tests": lambda results, quick, tiny: gpu_tests.measure(results, arguments.workers, left(), tiny),
        "bandwidth": lambda results, quick, tiny: bandwidth.measure(results, tiny),
        "tiles": tiles.measure,
        "decode": decode.measure,
        "small": small.measure,
        "write": write.measure,
        "prefill": prefill.measure,
        "generate": lambda results, **how: generation.measure(results, "8B", **how),
        "generate-1B": lambda results, **how: generation.measure(results, "1B", **how),
        "calls": calls.measure,
        "capacity": capacity.measure,
        "batching": batching.measure_gpu,
    }
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path, help="file for the results")
    known = [*parts, *GROUPS]
    parser.add_argument("--only", default=",".join(parts), help=f"parts, of {','.join(known)}")
    parser.add_argument("--quick", action="store_true", help="fewer rows")
    parser.add_argument("--tiny", action="store_true", help="sizes that say nothing, to try the programs")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--budget", type=float, default=540, help="seconds after which a part starts no further row")
    parser.add_argument("--seconds", type=float, help="seconds for all parts; 540 for first, second and third")
    parser.add_argument("--commit", help="what is measured, for a checkout without .git")
    parser.add_argument("--take", type=Path, nargs="*", default=[], help="files whose parts are taken in as they are")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 14), help="processes of the tests")
    arguments = parser.parse_args()
    chosen = ",".join(GROUPS.get(name, name) for name in arguments.only.split(",") if name).split(",")
    if unknown := [name for name in chosen if name and name.removesuffix(":quick") not in parts]:
        parser.error(f"unknown part(s) {', '.join(unknown)}; choose of {', '.join(known)}")
    seconds = arguments.seconds or (540 if set(arguments.only.split(",")) & set(GROUPS) else float("inf"))
    end = time.monotonic() + seconds
    left = lambda: max(1.0, min(arguments.budget, end - time.monotonic()))  # noqa: E731
    if arguments.commit:
        os.environ["GIT_COMMIT"] = arguments.commit
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
    for file in arguments.take:
        results.take(file)
    about = results.data["about"]
    print(about["device"], about["driver"], about["versions"], about["git_commit"], sep=" | ")
    for name in filter(None, chosen):
        if time.monotonic() > end:  # what the file has of it stays
            print(f"-- {name}: no time left")
            continue
        start = time.perf_counter()
        results.budget = left()
        part = name.removesuffix(":quick")
        parts[part](results, quick=arguments.quick or part != name, tiny=arguments.tiny)
        free(device)
        print(f"-- {name}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
