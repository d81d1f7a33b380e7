"""What tools that prune a cache do: they assign to `layer.keys` and to `layer.values`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .handle import PagedKV
from .sides import SIDES, TENSOR_NAMES, Side

if TYPE_CHECKING:
    from .layers import PagedLayer


class Assignment:
    """New keys and values of one layer, until both are there and can be stored.

    It does not refer to the layer, which would then not be gone, nor its memory, with its last user.
    """

    def __init__(self) -> None:
        self._new: dict[Side, torch.Tensor] = {}

    @property
    def is_pending(self) -> bool:
        """Whether one of both has been assigned to."""
        return bool(self._new)

    def read(self, layer: PagedLayer, side: Side) -> Any:
        """What was assigned, or else is stored; None before the first token."""
        if side in self._new:
            return self._new[side]
        if layer.is_empty:
            return None
        handle = PagedKV(layer, side)
        return handle if layer.shared.is_fused else handle.dense(f"layer.{TENSOR_NAMES[side]}s is read")

    def take(self, layer: PagedLayer, side: Side, new: Any) -> None:
        """Assign `new`. Raises ValueError for anything but a tensor, and before the first token."""
        if isinstance(new, PagedKV):
            if new.layer is layer and new.side == side and not self._new:
                return  # assigned to itself
            new = new.dense(f"layer.{TENSOR_NAMES[side]}s is assigned to")
        if not isinstance(new, torch.Tensor) or layer.is_empty and not self._new:
            raise ValueError(
                f"layer {layer.index}: keys and values can only be replaced, once there are any, by tensors [B, H, L, "
                "D]; call update() for the first ones and reset() to forget them"
            )
        if not self._new:
            layer.settle()
        self._new[side] = new
        if len(self._new) == 2:
            layer.settle()

    def finish(self, layer: PagedLayer) -> None:
        """Store what was assigned, if anything was; the other of both stays."""
        if self._new:
            new, self._new = self._new, {}
            key, value = (new[side] if side in new else layer.read_stored(side) for side in SIDES)
            layer.replace(key, value)

    def forget(self) -> None:
        """Store nothing of it."""
        self._new = {}
