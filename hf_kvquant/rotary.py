"""Which channels of a key the model's position embedding turns into each other.

A rotary embedding moves what a key holds in one channel into its partner as positions go by. Whoever judges channels
by a few tokens has to judge such a pair together, or a channel that happens to be quiet at these positions looks small
and is large later.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any, Literal

import torch

Kind = Literal["half", "interleaved", "none", "unknown"]

_TURNING: tuple[Kind, ...] = ("half", "interleaved")
# Entries of a configuration that ask for rotary embeddings.
_SETTINGS = ("rope_parameters", "rope_theta", "rotary_dim")
# Channels of a head on trial, and how many of the first ones may turn.
_WIDTHS = (16, 8, 4)


@dataclass(frozen=True)
class RotaryLayout:
    """How the keys of a layer are rotated.

    Attributes:
        kind: `half` (channel i with i + R/2), `interleaved` (2i with 2i + 1), `none` (no rotation), or `unknown`.
        rotated: R, how many of the first channels are; None for all of them.
    """

    kind: Kind = "unknown"
    rotated: int | None = None

    def partners(self, head_dim: int) -> list[int] | None:
        """For each channel its partner (itself where nothing turns); None if there is nothing to pair."""
        if self.kind not in _TURNING:
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
            return torch.full((head_dim,), self.kind == "unknown", device="cpu")
        return torch.tensor(partners, device="cpu") != torch.arange(head_dim, device="cpu")


def rotary_layouts(model: Any, layer_types: Sequence[str]) -> list[RotaryLayout]:
    """The layout of each cache layer, found by trying the functions with which the model's attention turns keys."""
    config = model.config.get_text_config(decoder=True)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    kinds: set[Kind] = set()
    # Where they have a size of their own, rotated and other channels are joined in ways of the model's own.
    if not hasattr(config, "qk_rope_head_dim"):
        attention = _attention(decoder) or _attention(model)  # what a model calls its decoder need not have any
        kinds.update(*map(_kinds_of, attention))
    if not kinds:
        is_asked = any(getattr(config, name, None) is not None for name in _SETTINGS)
        return [RotaryLayout("unknown" if is_asked else "none")] * len(layer_types)
    kind = kinds.pop() if len(kinds) == 1 else "unknown"
    layouts = {name: RotaryLayout(kind, _rotated(decoder, config, name)) for name in set(layer_types)}
    return [layouts[name] for name in layer_types]


def _attention(model: Any) -> set[type]:
    return {
        type(module)
        for module in model.modules()
        if isinstance(getattr(module, "layer_idx", None), int) and "attention" in type(module).__name__.lower()
    }


@functools.cache
def _kinds_of(attention: type) -> frozenset[Kind]:
    """All that modules of this class do; none for those that turn nothing, such as cross-attention."""
    return frozenset(_kinds_called(attention.forward, attention, set()))  # type: ignore[attr-defined]


def _kinds_called(function: Callable[..., Any], attention: type, seen: set[Any]) -> set[Kind]:
    """How the functions turn that `function` calls; a file may have others, such as a vision tower's."""
    function = inspect.unwrap(function)
    kinds: set[Kind] = set()
    if not isinstance(function, FunctionType):
        return kinds
    for name in function.__code__.co_names:
        called = function.__globals__.get(name, getattr(attention, name, None))
        called = inspect.unwrap(called) if callable(called) else called
        if not isinstance(called, FunctionType) or called in seen:
            continue
        seen.add(called)
        if kind := _tried(called):
            kinds.add(kind)
        elif called.__globals__ is function.__globals__:
            kinds |= _kinds_called(called, attention, seen)
    return kinds


def _tried(function: FunctionType) -> Kind | None:
    """How `function` turns channels; None if it is not for that, or cannot be called."""
    found: set[Kind] = set()
    with torch.device("cpu"), torch.no_grad():
        for width in _WIDTHS:  # of the tables: as many channels turn, or twice as many
            arguments = _arguments(function, width)
            try:
                if arguments is not None:
                    found.add(_shown(function(**arguments)))
            except Exception:  # noqa: S112 - code of any model, which may take none of these shapes
                continue
    return None if not found else found.pop() if len(found) == 1 else "unknown"


def _arguments(function: FunctionType, width: int) -> dict[str, torch.Tensor] | None:
    """One channel per token for whatever is to be turned, the same angle everywhere; None if that is not its job."""
    x = torch.eye(_WIDTHS[0], dtype=torch.float32)[None, None]  # as [B, H, T, D] or [B, T, H, D]
    cos, sin = (torch.full((1, 1, width), number, dtype=torch.float32) for number in (0.6, 0.8))
    tables = {"cos": cos, "sin": sin, "freqs_cis": torch.complex(cos, sin)}
    tables["sinusoidal_pos"] = torch.cat([sin, cos], dim=-1)[None]
    parameters = inspect.signature(function).parameters
    required = {p.name: x for p in parameters.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    if "position_ids" in required:
        required["position_ids"] = torch.zeros(1, 1, dtype=torch.int64)
    given = {name: tables[name] for name in parameters if name in tables}
    turns_by_right_angle = "rotate" in function.__name__ and len(required) == 1
    return required | given if given or turns_by_right_angle else None


def _shown(turned: Any) -> Kind:
    """How this was turned: partners hold something of the same channel afterwards."""
    turned = turned[0] if isinstance(turned, tuple) else turned
    own = torch.eye(_WIDTHS[0], dtype=torch.float32)
    holds = (turned.reshape(own.shape).abs() > 0.1).to(own.dtype)
    if (holds.sum(dim=1) == 1).all():  # by a right angle
        holds = holds + own
    pairs = holds.T @ holds > 0
    for kind, rotated in itertools.product(_TURNING, _WIDTHS):
        partners = RotaryLayout(kind, rotated).partners(len(own))
        if torch.equal(pairs, own[partners] + own > 0):
            return kind
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
