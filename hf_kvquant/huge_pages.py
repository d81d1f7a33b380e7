"""Huge pages for large tensors on a CPU, where looking up small ones takes a tenth of attention's time."""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Sequence

import torch

_SIZE = 2 << 20  # bytes of a huge page
_WASTE = 1 / 16  # how much larger than the tensor its huge pages may be
_ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux has it


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor with anything in it, which the operating system is asked to put into huge pages.

    It starts where one starts, so that as much as possible of it is in one. Small tensors, other devices and systems
    get an ordinary tensor.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if _ADVICE is None or device.type != "cpu" or nbytes < _SIZE or torch.compiler.is_compiling():
        return torch.empty(shape, dtype=dtype, device=device)
    length = -(-nbytes // _SIZE) * _SIZE
    if length > (1 + _WASTE) * nbytes:
        length -= _SIZE
    memory = torch.empty(max(nbytes, length) + _SIZE, dtype=torch.uint8, device=device)
    skipped = -memory.data_ptr() % _SIZE
    # A hint; nothing depends on whether it is taken.
    ctypes.CDLL(None).madvise(
        ctypes.c_void_p(memory.data_ptr() + skipped), ctypes.c_size_t(length), ctypes.c_int(_ADVICE)
    )
    strides = torch.empty(shape, device="meta").stride()
    tensor = torch.empty(0, dtype=dtype, device=device)
    return tensor.set_(memory.untyped_storage(), skipped // dtype.itemsize, shape, strides)


def copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of `tensor`, in memory as `empty` gives it."""
    return empty(tensor.shape, tensor.dtype, tensor.device).copy_(tensor)
