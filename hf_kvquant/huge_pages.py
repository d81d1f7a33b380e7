"""Huge pages for large tensors on a CPU, where looking up small ones takes a tenth of attention's time."""

from __future__ import annotations

import ctypes
import mmap

import torch

_SIZE = 2 << 20  # bytes of a huge page
_ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux has it


def prefer_huge_pages(tensor: torch.Tensor) -> torch.Tensor:
    """Ask the operating system to back a new tensor with huge pages; returns `tensor`.

    What has been touched already does not get them at once. Small tensors, other devices and systems are left alone.
    """
    if _ADVICE is None or tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return tensor
    start = -(-tensor.data_ptr() // _SIZE) * _SIZE
    length = (tensor.data_ptr() + tensor.nbytes - start) // _SIZE * _SIZE
    if length > 0:  # a hint; nothing depends on whether it is taken
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), ctypes.c_int(_ADVICE))
    return tensor
