"""Numbers that not every device has: 8-bit floats and float64, which MPS lacks."""

from __future__ import annotations

import torch

_known: dict[tuple[str, torch.dtype], bool] = {}  # by type of device


def has_dtype(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether tensors on devices of that type can be converted to `dtype` and back, by trying."""
    key = (device.type, dtype)
    if key not in _known:
        _known[key] = _converts(device, dtype)
    return _known[key]


def _converts(device: torch.device, dtype: torch.dtype) -> bool:
    # On this very device: another of its type may not be this process's to use.
    try:
        torch.ones(1, dtype=torch.float32, device=device).to(dtype).to(torch.float32)
    except (TypeError, RuntimeError):  # NotImplementedError is one
        return False
    return True


def to_float64(x: torch.Tensor) -> torch.Tensor:
    """`x` in float64: where it is, or on the CPU if there is no float64 there."""
    return (x if has_dtype(x.device, torch.float64) else x.cpu()).to(torch.float64)
