"""Numbers that not every device has: 8-bit floats and float64, which MPS lacks."""

from __future__ import annotations

import functools

import torch


@functools.cache
def has_dtype(device_type: str, dtype: torch.dtype) -> bool:
    """Whether tensors on devices of that type can be converted to `dtype` and back, by trying."""
    try:
        torch.ones(1, dtype=torch.float32, device=device_type).to(dtype).to(torch.float32)
    except (TypeError, RuntimeError):  # NotImplementedError is one
        return False
    return True


def to_float64(x: torch.Tensor) -> torch.Tensor:
    """`x` in float64: where it is, or on the CPU if there is no float64 there."""
    return (x if has_dtype(x.device.type, torch.float64) else x.cpu()).to(torch.float64)
