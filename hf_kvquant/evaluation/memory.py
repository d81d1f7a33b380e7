"""The memory of a device, or of the process on a CPU: giving it back, and its peak."""

from __future__ import annotations

import gc
from pathlib import Path

import torch

_RESIDENT = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


def synchronize(device: torch.device) -> None:
    """Wait for everything that was given to the device."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def free(device: torch.device) -> None:
    """Give back memory that nothing refers to."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def peak_kind(device: torch.device) -> str | None:
    """What `peak_bytes` counts; None where the system does not tell."""
    if device.type == "cuda":
        return "of the allocator, weights included"
    return "of the whole process, weights included" if reset_peak(device) else None


def reset_peak(device: torch.device) -> bool:
    """Let the peak begin anew with what is held now; False where that cannot be done."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    if device.type != "cpu":
        return False
    try:
        _RESET.write_text("5")  # Linux: the peak of the resident memory
    except OSError:
        return False
    return peak_bytes(device) is not None


def peak_bytes(device: torch.device) -> int | None:
    """The most bytes since `reset_peak`; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu" or not _RESIDENT.exists():
        return None
    for line in _RESIDENT.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None
