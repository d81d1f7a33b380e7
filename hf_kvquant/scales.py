"""Static scales of one layer: `x ≈ q * scale + zero`, zero in the units of x.

Every checkpoint format is converted to this on reading. Three granularities, told apart by shape:
per tensor `[1]`, per head `[num_kv_heads]`, per channel `[num_kv_heads, head_dim]`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

GRANULARITIES = ("tensor", "head", "channel")


@dataclass(frozen=True, eq=False)
class LayerScales:
    """Scales and zeros of K and V of one layer, fp32.

    Attributes:
        k_scale, v_scale: `[1]`, `[H]` or `[H, D]`, finite and positive; a 0-d tensor or a number counts as `[1]`. One
            of them may be None: that side gets dynamic scales.
        q_scale: `[1]` or `[Hq]`, one per query head, for queries in fp8 (`q_dtype`); or None.
        k_zero, v_zero: finite, same shapes, or None for symmetric quantization.

    Raises ValueError naming the field for values that are NaN, infinite, zero or negative, or of another rank, for a
    zero without its scale, and for a q_scale without a k_scale, beside which alone it is used.
    """

    k_scale: torch.Tensor | None
    v_scale: torch.Tensor | None
    q_scale: torch.Tensor | None = None
    k_zero: torch.Tensor | None = None
    v_zero: torch.Tensor | None = None

    def __post_init__(self) -> None:
        for name, value in self._given():
            tensor = value if isinstance(value, torch.Tensor) else torch.as_tensor(value, device="cpu")
            tensor = tensor.detach().to(torch.float32)
            tensor = tensor.reshape(1) if tensor.ndim == 0 else tensor
            _check_values(name, tensor, positive=name.endswith("scale"))
            object.__setattr__(self, name, tensor)
        if self.k_scale is None and self.v_scale is None:
            raise ValueError("LayerScales needs k_scale or v_scale; a layer without either is None instead of it")
        for name, needed in (("k_zero", "k_scale"), ("v_zero", "v_scale"), ("q_scale", "k_scale")):
            if getattr(self, name) is not None and getattr(self, needed) is None:
                raise ValueError(f"LayerScales has {name}, but no {needed}, without which it means nothing; give both")

    def _given(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) is not None)

    @property
    def of_sides(self) -> list[torch.Tensor]:
        """The scales of K and of V, without one that is None."""
        return [scale for scale in (self.k_scale, self.v_scale) if scale is not None]

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> LayerScales:
        """What `to_dict` gave. Raises ValueError for names that are not fields."""
        known = [f.name for f in fields(cls)]
        if unknown := sorted(str(name) for name in entries if name not in known):
            raise ValueError(f"unknown entry {', '.join(unknown)} of LayerScales; known: {', '.join(known)}")
        return cls(**{"k_scale": None, "v_scale": None, **entries})

    def to_dict(self) -> dict[str, Any]:
        """As numbers in lists, for JSON; fp32 survives it exactly."""
        return {name: value.tolist() for name, value in self._given()}


def check_granularity(granularity: Any) -> None:
    """Raise ValueError with the list of right ones for what is no granularity."""
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity={granularity!r}; choose one of {', '.join(GRANULARITIES)}")


def granularity_of(scale: torch.Tensor) -> str:
    """`tensor`, `head` or `channel`, by the shape of `scale` (a single head's scale is a tensor's)."""
    if scale.ndim == 2:
        return "channel"
    return "tensor" if scale.shape[0] == 1 else "head"


def as_head_channel(scale: torch.Tensor, num_heads: int, head_dim: int, where: str) -> torch.Tensor:
    """`scale` as `[1 | H, 1 | D]`, ready to broadcast over `[H, D]`.

    Raises ValueError naming `where` (layer and field) if the shape fits neither of the three granularities.
    """
    expected = {"tensor": (1,), "head": (num_heads,), "channel": (num_heads, head_dim)}
    if tuple(scale.shape) not in expected.values():
        raise ValueError(
            f"{where} has shape {list(scale.shape)}, but this model needs [1] (per tensor), [{num_heads}] (per head) "
            f"or [{num_heads}, {head_dim}] (per channel); were the scales made for another model?"
        )
    return scale if scale.ndim == 2 else scale[:, None]


def _check_values(name: str, tensor: torch.Tensor, positive: bool) -> None:
    if tensor.ndim > 2 or tensor.numel() == 0:
        raise ValueError(
            f"{name} has shape {list(tensor.shape)}; expected [1], [num_kv_heads] or [num_kv_heads, head_dim]"
        )
    if not tensor.isfinite().all():
        raise ValueError(f"{name} holds NaN or infinite values; recalibrate, or leave this layer's scales out")
    if positive and not (tensor > 0).all():
        raise ValueError(
            f"{name} holds a value of {tensor.min().item():g}; a scale must be positive "
            "(zero or negative usually means that the calibration never reached this layer)"
        )
