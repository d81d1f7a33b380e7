"""Memory that is kept from call to call: much fresh memory costs more than the arithmetic in it."""

from __future__ import annotations

import math
import threading

import torch

# Fewer elements than these are as quick to allocate.
_FEW = 1 << 15


class _Memory(threading.local):
    def __init__(self) -> None:
        self.kept: dict[tuple[str, torch.dtype], torch.Tensor] = {}


_memory = _Memory()


def workspace(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Uninitialized memory of this thread, until it is asked for by that name again."""
    size = math.prod(shape)
    if size < _FEW:
        return torch.empty(shape, dtype=dtype, device="cpu")
    kept = _memory.kept
    if (name, dtype) not in kept or kept[name, dtype].numel() < size:
        with torch.inference_mode(False):
            kept[name, dtype] = torch.empty(size, dtype=dtype, device="cpu")
    return kept[name, dtype][:size].view(shape)
