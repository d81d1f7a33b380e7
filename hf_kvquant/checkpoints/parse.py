"""Pieces of JSON that must be what a format says they are; ValueError names the file and the entry otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoint_scales import ScaleSource
from .found import ModelLayers, Value

if TYPE_CHECKING:
    from .files import CheckpointFiles


def object_at(content: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    """The object called `key`."""
    value = content.get(key)
    if not isinstance(value, dict):
        raise ValueError(f"{where}: {key} is {_short(value)}, not an object")
    return value


def list_at(content: Mapping[str, Any], key: str, where: str) -> list[Any]:
    """The list called `key`."""
    value = content.get(key)
    if not isinstance(value, list):
        raise ValueError(f"{where}: {key} is {_short(value)}, not a list")
    return value


def integer_at(content: Mapping[str, Any], key: str, where: str) -> int:
    """The number of things called `key`."""
    value = content.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{where}: {key} is {_short(value)}, not a count")
    return value


def indexed(value: Any, where: str) -> dict[int, Any]:
    """An object whose keys are 0, 1, 2, ... in any order."""
    if not isinstance(value, dict) or not value:
        raise ValueError(f"{where} is {_short(value)}, not an object with an entry for each of 0, 1, 2, ...")
    by_index = {str(index): index for index in range(len(value))}
    if value.keys() != by_index.keys():
        odd = next(key for key in value if key not in by_index)
        raise ValueError(f"{where} has an entry {odd!r}, but {len(value)} entries; they must be 0, 1, 2, ...")
    return {index: value[key] for key, index in by_index.items()}


def number(value: Any, where: str) -> float:
    """A number; whether it is a good one is seen later."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{where} is {_short(value)}, not a number")
    try:
        return float(value)
    except OverflowError:
        return float("inf")


def numbers(value: Any, where: str) -> list[float]:
    """A number, or a list of them, as a list."""
    return [number(entry, where) for entry in (value if isinstance(value, list) else [value])]


def numbers_at(file: str, key: str, values: Sequence[float]) -> Value:
    """`values`, read from the entry `key` of `file`."""
    return ScaleSource(file, key), torch.tensor(values, dtype=torch.float32, device="cpu")


def check_model_type(model_type: Any, model: ModelLayers | None, files: CheckpointFiles, where: str) -> None:
    """Raises ValueError if the file says that it is for another kind of model.

    The text model of the checkpoint that it lies in, which may be loaded alone, is none.
    """
    of_checkpoint = (files.config.get("model_type"), files.text_config.get("model_type"))
    if model_type is None or model is None or model.model_type in (None, model_type):
        return
    if model_type not in of_checkpoint or model.model_type not in of_checkpoint:
        raise ValueError(f"{where} is for a model of type {model_type!r}, this one is {model.model_type!r}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
