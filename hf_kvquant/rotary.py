"""Which channels of a key the model's position embedding turns into each other.

A rotary embedding moves what a key holds in one channel into its partner as positions go by. Whoever judges channels
by a few tokens has to judge such a pair together, or a channel that happens to be quiet at these positions looks small
and is large later.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch


@dataclass(frozen=True)
class RotaryLayout:
    """How the keys of a layer are rotated.

    Attributes:
        kind: `half` (channel i with i + R/2), `interleaved` (2i with 2i + 1), `none` (no rotation), or `unknown`.
        rotated: R, how many of the first channels are; None for all of them.
    """

    kind: Literal["half", "interleaved", "none", "unknown"] = "unknown"
    rotated: int | None = None

    def partners(self, head_dim: int) -> list[int] | None:
        """For each channel its partner (itself where nothing turns); None if there is nothing to pair."""
        if self.kind not in ("half", "interleaved"):
            return None
        rotated = min(self.rotated or head_dim, head_dim) // 2 * 2
        if self.kind == "half":
            first = [(channel + rotated // 2) % rotated for channel in range(rotated)]
        else:
            first = [channel ^ 1 for channel in range(rotated)]
        return first + list(range(rotated, head_dim))

    def turning(self, head_dim: int) -> torch.Tensor:
        """`[D]`, True for the channels that turn, or may."""
        partners = self.partners(head_dim)
        if partners is None:
            return torch.full((head_dim,), self.kind == "unknown")
        return torch.tensor(partners) != torch.arange(head_dim)


def rotary_layouts(model: Any, layer_types: Sequence[str]) -> list[RotaryLayout]:
    """The layout of each cache layer, found by trying the function with which the model's own code turns keys."""
    config = model.config.get_text_config(decoder=True)
    if all(getattr(config, name, None) is None for name in ("rope_parameters", "rope_theta", "rotary_dim")):
        return [RotaryLayout("none")] * len(layer_types)
    if hasattr(config, "qk_rope_head_dim"):  # rotated and other channels are joined in ways of the model's own
        return [RotaryLayout("unknown")] * len(layer_types)
    kind = _kind(model)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    layouts = {name: RotaryLayout(kind, _rotated(decoder, config, name)) for name in set(layer_types)}
    return [layouts[name] for name in layer_types]


def _kind(model: Any) -> Literal["half", "interleaved", "unknown"]:
    for module in model.modules():
        if not isinstance(getattr(module, "layer_idx", None), int) or "attention" not in type(module).__name__.lower():
            continue
        code = sys.modules.get(type(module).__module__)
        rotate = getattr(code, "rotate_half", None) or getattr(code, "rotate_every_two", None)
        if rotate is None:
            return "unknown"
        turned = rotate(torch.arange(1.0, 9.0).reshape(1, 1, 1, 8)).abs().flatten().tolist()
        if turned == [5, 6, 7, 8, 1, 2, 3, 4]:
            return "half"
        return "interleaved" if turned == [2, 1, 4, 3, 6, 5, 8, 7] else "unknown"
    return "unknown"


def _rotated(decoder: Any, config: Any, layer_type: str) -> int | None:
    """How many channels turn: two for each frequency that the model has."""
    for module in decoder.modules():
        for name in (f"{layer_type}_inv_freq", "inv_freq"):
            # Most modules have neither, and getattr takes long to find that out.
            frequencies = module._buffers.get(name, module.__dict__.get(name))
            if isinstance(frequencies, torch.Tensor):
                return 2 * frequencies.numel()
    return getattr(config, "rotary_dim", None)
