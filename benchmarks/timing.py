"""Time calls on a device: by CUDA-graph replay and events on a GPU, with a clock on a CPU."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hf_kvquant.evaluation.memory import synchronize

# What a timed graph should take at least. Calls that the host needs longer for than the device are counted instead.
_GRAPH_SECONDS, _HOST_BOUND_SECONDS, _CALLS = 4e-3, 2e-4, 128
_WARMUP = 5  # steps of the host that do not count


def l2_bytes(device: torch.device) -> int:
    """Size of the last cache before memory."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 1 << 16


def rotation(nbytes: int, device: torch.device) -> int:
    """How many sets of `nbytes` a call has to go through so that none is found in the cache again: 4 times its size."""
    return max(2, min(-(-4 * l2_bytes(device) // nbytes), 64))


def replay_seconds(calls: Sequence[Callable[[], Any]], device: torch.device, repeats: int = 7) -> float:
    """Median seconds of a call, the given ones taken in turn; on a GPU without the host's share."""
    for call in calls[:2]:
        call()
    synchronize(device)
    if device.type != "cuda":
        times = []
        for _ in range(2):
            start = time.perf_counter()
            for call in calls:
                call()
            times.append((time.perf_counter() - start) / len(calls))
        return min(times)
    start = time.perf_counter()
    for call in calls:
        call()
    synchronize(device)
    estimate = (time.perf_counter() - start) / len(calls)
    wanted = _CALLS if estimate < _HOST_BOUND_SECONDS else _GRAPH_SECONDS / estimate
    rounds = math.ceil(wanted / len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    graph.replay()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        synchronize(device)
        times.append(begin.elapsed_time(end) / 1e3 / (rounds * len(calls)))
    del graph
    return statistics.median(times)


def host_seconds(step: Callable[[], Any], device: torch.device, steps: int) -> float:
    """Median seconds that the host spends in `step`, the device idle at its start."""
    times = []
    for index in range(_WARMUP + steps):
        synchronize(device)
        start = time.perf_counter()
        step()
        if index >= _WARMUP:
            times.append(time.perf_counter() - start)
    synchronize(device)
    return statistics.median(times)
