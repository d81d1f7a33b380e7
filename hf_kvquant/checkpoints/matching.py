"""Which cache layer a scale belongs to: by the path of its attention module, never by a number alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

# Wrappers that checkpoints and loaded models put in front of the decoder differently.
_WRAPPERS = {"model", "language_model", "text_model", "transformer", "backbone", "decoder"}
# What families call the attention of a layer; servers put an `attn` inside it.
_ATTENTION = {"self_attn", "attention", "self_attention", "attn", "mla_attn", "mixer"}


def match_layers(prefixes: Sequence[str], attention_paths: Sequence[Sequence[str]], where: str) -> list[str | None]:
    """For each cache layer the prefix of its scales, or None.

    A prefix that is the path itself comes first, then one without wrappers, then one with another word for attention.
    Raises ValueError if two prefixes claim one layer, or if there are prefixes but none belongs to the model.
    """
    found = find_layers(prefixes, attention_paths)
    if two := next((hits for hits in found if len(hits) > 1), None):
        raise ValueError(f"{where} holds two sets of scales for one module: {two[0]} and {two[1]}")
    matched = [hits[0] if hits else None for hits in found]
    if prefixes and not any(matched):
        example = next((paths[0] for paths in attention_paths if paths), "none")
        raise ValueError(
            f"{where} holds scales for modules such as {prefixes[0]}, but this model's attention is {example}; "
            "were the scales made for another model?"
        )
    return matched


def find_layers(prefixes: Iterable[str], attention_paths: Sequence[Sequence[str]]) -> list[list[str]]:
    """For each cache layer the prefixes that are nearest to a path of its module, in their order; [] for none."""
    prefixes = list(dict.fromkeys(prefixes))
    forms: tuple[Callable[[str], str], ...] = (str, bare, _plain)
    known = [_by_form(prefixes, form) for form in forms]
    found = []
    for paths in attention_paths:
        hits: list[str] = []
        for by_form, form in zip(known, forms, strict=True):
            hits = hits or next((by_form[form(path)] for path in paths if form(path) in by_form), [])
        found.append(hits)
    return found


def number_layers(prefixes: Sequence[str], num_layers: int | None, where: str) -> list[str | None]:
    """The same where only the files are known: by the number in the path, up to `num_layers` (None for all).

    Raises ValueError if that is not enough to tell the layers apart.
    """
    numbered: dict[int, str] = {}
    for prefix in prefixes:
        numbers = re.findall(r"(?:^|\.)(\d{1,5})(?=\.|$)", prefix)
        if not numbers:
            raise ValueError(f"{where}: no layer number in {prefix}; name the model")
        index = int(numbers[-1])
        if index in numbered:
            raise ValueError(f"{where}: {prefix} and {numbered[index]} both look like layer {index}; name the model")
        numbered[index] = prefix
    if num_layers is None:
        num_layers = max(numbered, default=-1) + 1
    return [numbered.get(index) for index in range(num_layers)]


def bare(path: str) -> str:
    """`path` without wrappers."""
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)


def _plain(path: str) -> str:
    """`path` without wrappers and with one word for attention."""
    parts = bare(path).split(".")
    while len(parts) > 1 and parts[-1] in _ATTENTION and parts[-2] in _ATTENTION:
        parts.pop()
    if parts[-1] in _ATTENTION:
        parts[-1] = "attn"
    return ".".join(parts)


def _by_form(prefixes: Sequence[str], form: Callable[[str], str]) -> dict[str, list[str]]:
    known: dict[str, list[str]] = {}
    for prefix in prefixes:
        known.setdefault(form(prefix), []).append(prefix)
    return known
