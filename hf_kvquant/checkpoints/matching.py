"""Which cache layer a scale belongs to: by the path of its attention module, never by a number alone."""

from __future__ import annotations

import re
from collections.abc import Sequence

# Wrappers that checkpoints and loaded models put in front of the decoder differently.
_WRAPPERS = {"model", "language_model"}


def match_layers(
    prefixes: Sequence[str], attention_paths: Sequence[Sequence[str]] | None, where: str
) -> list[str | None]:
    """For each cache layer the prefix of its scales, or None.

    Raises ValueError if two prefixes claim one layer, or if there are prefixes but none belongs to the model.
    """
    if attention_paths is None:
        return _by_number(prefixes, where)
    known = {bare(prefix): prefix for prefix in prefixes}
    if len(known) != len(prefixes):
        doubled = [prefix for prefix in prefixes if known[bare(prefix)] != prefix]
        raise ValueError(
            f"{where} holds two sets of scales for one module: {doubled[0]} and {known[bare(doubled[0])]}"
        )
    matched: list[str | None] = []
    for paths in attention_paths:
        hits = [known[bare(path)] for path in paths if bare(path) in known]
        matched.append(hits[0] if hits else None)
    if prefixes and not any(matched):
        example = next((paths[0] for paths in attention_paths if paths), "none")
        raise ValueError(
            f"{where} holds scales for modules such as {prefixes[0]}, but this model's attention is {example}; "
            "were the scales made for another model?"
        )
    return matched


def bare(path: str) -> str:
    """`path` without wrappers."""
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)


def _by_number(prefixes: Sequence[str], where: str) -> list[str | None]:
    numbered: dict[int, str] = {}
    for prefix in prefixes:
        numbers = re.findall(r"\.(\d+)(?=\.|$)", prefix)
        if not numbers:
            raise ValueError(f"{where}: no layer number in {prefix}")
        index = int(numbers[-1])
        if index in numbered:
            raise ValueError(f"{where}: {prefix} and {numbered[index]} both look like layer {index}; name the model")
        numbered[index] = prefix
    return [numbered.get(index) for index in range(max(numbered, default=-1) + 1)]
