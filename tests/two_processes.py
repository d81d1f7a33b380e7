"""A function in two processes that form a gloo group, as torchrun would start them on one machine.

This file is also the script that each of the processes runs. They meet in a file, so no port has to be free.
"""

from __future__ import annotations

import importlib
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NUM_PROCESSES = 2
TIMEOUT = 180.0  # seconds, many more than tiny models take


def in_two_processes(function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(*arguments)` returns in each process, by rank.

    Args:
        function: at the top of a module, which both processes import; the group is there when it is called. Starting
            takes seconds, so one function had better do all that a module tests.
        arguments: what can be pickled, as must be what is returned.

    Raises AssertionError with the output of a process that failed; the other one is stopped then.
    """
    with tempfile.TemporaryDirectory() as directory:
        task = pickle.dumps((function.__module__, function.__qualname__, arguments))
        Path(directory, "task").write_bytes(task)
        processes = [_start(directory, rank) for rank in range(NUM_PROCESSES)]
        try:
            _wait(processes)
            outputs = [Path(directory, f"output{rank}").read_text(errors="replace") for rank in range(NUM_PROCESSES)]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        codes = [process.returncode for process in processes]
        assert not any(codes), f"exit codes {codes}\n" + "\n".join(outputs)
        return [pickle.loads(Path(directory, f"result{rank}").read_bytes()) for rank in range(NUM_PROCESSES)]


def _start(directory: str, rank: int) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(NUM_PROCESSES),
        "LOCAL_WORLD_SIZE": str(NUM_PROCESSES),
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",  # gloo moves tensors of CPUs
    }
    with open(Path(directory, f"output{rank}"), "wb") as output:
        return subprocess.Popen(
            [sys.executable, __file__, directory], env=environment, stdout=output, stderr=subprocess.STDOUT
        )


def _wait(processes: list[subprocess.Popen[bytes]]) -> None:
    """Until all have ended well, one has failed (the other may wait for it forever), or time is up."""
    end = time.monotonic() + TIMEOUT
    while time.monotonic() < end:
        codes = [process.poll() for process in processes]
        if any(codes) or None not in codes:
            return
        time.sleep(0.05)


def _run(directory: str) -> None:
    import torch

    torch.set_num_threads(1)
    module, name, arguments = pickle.loads(Path(directory, "task").read_bytes())
    rank = int(os.environ["RANK"])
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{directory}/meeting", rank=rank, world_size=NUM_PROCESSES
    )
    result = getattr(importlib.import_module(module), name)(*arguments)
    Path(directory, f"result{rank}").write_bytes(pickle.dumps(result))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _run(sys.argv[1])
