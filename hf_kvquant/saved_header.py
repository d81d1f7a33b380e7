"""What the header of a saved cache holds, and checks of it: a file may be damaged, or somebody else's.

Raises ValueError with the path of what is wrong.
"""

from __future__ import annotations

from typing import Any

import torch

from .formats import FORMATS
from .scales import GRANULARITIES

# What the header holds, in the notation of `check`.
PLAN = {"format": str, "kind": str, "source": str, "equalize": bool, "granularity": str, "margin": float}
SIDE = {"plan": PLAN, "source": str, "needs_tokens": bool}
QUERY = {"format": str, "source": str, "scale": (list, type(None))}
PAGED_LAYER = {"table": int, "dtype": str, "clipped": [int], "k": SIDE, "v": SIDE, "q": (dict, type(None))}
WEIGHTS = {"weights": dict, "adapters": str, "quantization": str}
ENTRIES = {
    "transformers": str,
    "part": [int],
    "options": dict,
    "config": dict,
    "weights": (dict, type(None)),
    "notes": [str],
    "tables": [{"length": int, "first_page": int}],
    "layers": [{"kind": str, "state": dict}],
}


def check(entry: Any, shape: Any, where: str) -> None:
    """Raises ValueError with the path of what is not of this shape.

    A shape is a type, or several; `[shape]` for a list of any length; `{name: shape}` for a dict with these names.
    """
    types = (type(shape),) if isinstance(shape, (dict, list)) else shape if isinstance(shape, tuple) else (shape,)
    if type(entry) not in types:  # not isinstance: True is no number here
        raise ValueError(f"{where} is {_short(entry)}, not {' or '.join(each.__name__ for each in types)}")
    path = f"{where}." if where else ""
    if isinstance(shape, list):
        for number, each in enumerate(entry):
            check(each, shape[0], f"{path}{number}")
    elif isinstance(shape, dict):
        for name, of_name in shape.items():
            if name not in entry:
                raise ValueError(f"{path}{name} is missing")
            check(entry[name], of_name, f"{path}{name}")


def _short(entry: Any) -> str:
    return f"a {type(entry).__name__}" if isinstance(entry, (dict, list)) else f"{entry!r:.80}"


def check_plan(plan: dict[str, Any], where: str) -> None:
    if unknown := sorted(plan.keys() - PLAN.keys()):
        raise ValueError(f"{where} has {', '.join(unknown)}; known: {', '.join(PLAN)}")
    if plan["format"] not in FORMATS:
        raise ValueError(f"{where}.format is {plan['format']!r}; known: {', '.join(FORMATS)}")
    kinds = ("dynamic", "first_batch", "static") if FORMATS[plan["format"]].is_quantized else ("none",)
    if plan["kind"] not in kinds:
        raise ValueError(f"{where}.kind is {plan['kind']!r}, for {plan['format']} it is {', '.join(kinds)}")
    if plan["equalize"] and plan["kind"] != "dynamic":
        raise ValueError(f"{where}.equalize is for dynamic scales, not for {plan['kind']}")
    if plan["granularity"] not in GRANULARITIES:
        raise ValueError(f"{where}.granularity is {plan['granularity']!r}; known: {', '.join(GRANULARITIES)}")
    if not 1.0 <= plan["margin"] < float("inf"):
        raise ValueError(f"{where}.margin is {plan['margin']}; it must be a factor of at least 1.0")


def check_numbers(tensor: torch.Tensor, where: str, positive: bool) -> None:
    """The rule of given scales (`LayerScales`), with the words of a file."""
    if not tensor.numel() or not tensor.isfinite().all() or positive and not (tensor > 0).all():
        kind = "finite and positive" if positive else "finite"
        raise ValueError(f"{where} holds no numbers, or some that are not {kind}")


def dtype_of(name: str, where: str) -> torch.dtype:
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"{where} is {name!r}, not a dtype of a model")
    return dtype
