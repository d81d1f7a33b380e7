"""Which channels of a key the model's position embedding turns into each other.

A rotary embedding moves what a key holds in one channel into its partner as positions go by. Whoever judges channels
by a few tokens has to judge such a pair together, or a channel that happens to be quiet at these positions looks small
and is large later.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Literal

import torch


@dataclass(frozen=True)
class RotaryLayout:
    """How keys are rotated.

    Attributes:
        kind: `half` (channel i with i + R/2), `interleaved` (2i with 2i + 1), `none` (no rotation), or `unknown`.
        share: the part of head_dim that is rotated, R / D; it comes first.
    """

    kind: Literal["half", "interleaved", "none", "unknown"] = "unknown"
    share: float = 1.0

    def partners(self, head_dim: int) -> list[int] | None:
        """For each channel its partner (itself where nothing turns); None if there is nothing to pair."""
        if self.kind not in ("half", "interleaved"):
            return None
        rotated = int(head_dim * self.share) // 2 * 2
        if self.kind == "half":
            first = [(channel + rotated // 2) % rotated for channel in range(rotated)]
        else:
            first = [channel ^ 1 for channel in range(rotated)]
        return first + list(range(rotated, head_dim))


def rotary_layout(model: Any) -> RotaryLayout:
    """The layout of `model`, found by trying the function with which its own code turns keys."""
    config = model.config.get_text_config(decoder=True)
    parameters = getattr(config, "rope_parameters", None)
    if parameters is None and getattr(config, "rope_theta", None) is None and not hasattr(config, "rotary_dim"):
        return RotaryLayout("none")
    if hasattr(config, "qk_rope_head_dim"):  # rotated and other channels are joined in ways of the model's own
        return RotaryLayout("unknown")
    for module in model.modules():
        if not isinstance(getattr(module, "layer_idx", None), int) or "attention" not in type(module).__name__.lower():
            continue
        code = sys.modules.get(type(module).__module__)
        rotate = getattr(code, "rotate_half", None) or getattr(code, "rotate_every_two", None)
        return RotaryLayout(_kind(rotate), _share(config, parameters))
    return RotaryLayout("unknown")


def _kind(rotate: Any) -> Literal["half", "interleaved", "unknown"]:
    if rotate is None:
        return "unknown"
    turned = rotate(torch.arange(1.0, 9.0).reshape(1, 1, 1, 8)).abs().flatten().tolist()
    if turned == [5, 6, 7, 8, 1, 2, 3, 4]:
        return "half"
    return "interleaved" if turned == [2, 1, 4, 3, 6, 5, 8, 7] else "unknown"


def _share(config: Any, parameters: Any) -> float:
    if (rotary_dim := getattr(config, "rotary_dim", None)) is not None:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return float(min(rotary_dim / head_dim, 1.0))
    nested = parameters.get("partial_rotary_factor") if isinstance(parameters, dict) else None
    return float(nested or getattr(config, "partial_rotary_factor", None) or 1.0)
