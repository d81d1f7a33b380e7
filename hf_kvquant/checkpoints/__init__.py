"""Scales that lie in checkpoints: one reader a family of formats, one result for all.

Scales are read straight from the safetensors files, never from the loaded model: transformers drops them, casts them to
the model's dtype, or leaves uninitialised memory where a checkpoint has none.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from ..scales import LayerScales
from . import compressed_tensors
from .files import CheckpointFiles, FoundScales
from .matching import match_layers

READERS = (compressed_tensors.read,)


@dataclass(frozen=True)
class CheckpointScales:
    """KV scales of a checkpoint.

    Attributes:
        path: the directory they were read from.
        kv_cache_dtype: the format they are made for, or None if the checkpoint does not say.
        dynamic: the checkpoint asks for scales that are computed at run time (`layers` is then empty of scales).
        layers: one entry a cache layer, None where there are none.
        keys: the tensor names of K's and V's scale of each layer.
        notes: what the reader had to decide, for the report.
    """

    path: str
    kv_cache_dtype: str | None
    dynamic: bool
    layers: list[LayerScales | None]
    keys: list[tuple[str, str]]
    notes: list[str]


def read_scales(
    source: str | os.PathLike[str],
    attention_paths: Sequence[Sequence[str]] | None = None,
    *,
    revision: str | None = None,
    fetch: bool = True,
) -> CheckpointScales | None:
    """The KV scales of a checkpoint, or None if it neither declares nor holds any.

    Args:
        source: a directory, or a hub id (its snapshot is used, and fetched if it is not there yet).
        attention_paths: for each cache layer of the model the module paths its attention may have
            (`model.layers.0.self_attn`); without it layers are ordered by the number in their path.
        revision: of a hub id.
        fetch: whether a hub id that is not on this machine may be fetched; if not, it is a FileNotFoundError.

    Raises ValueError naming file and key for scales that are NaN or infinite, for a declared scheme without a usable
    scale, for layers that cannot be matched and for schemes that are not 8-bit.
    """
    files = CheckpointFiles.find(source, revision, fetch)
    for read in READERS:
        found = read(files)
        if found is not None:
            return _assemble(files, found, attention_paths)
    return None


def _assemble(
    files: CheckpointFiles, found: FoundScales, attention_paths: Sequence[Sequence[str]] | None
) -> CheckpointScales:
    matched = match_layers(list(found.by_prefix), attention_paths, files.path)
    notes = list(found.notes)
    layers: list[LayerScales | None] = []
    keys = []
    for index, prefix in enumerate(matched):
        entry = found.by_prefix.get(prefix) if prefix is not None else None
        layers.append(None if entry is None else entry.scales)
        keys.append(("", "") if entry is None else (entry.k_key, entry.v_key))
        if entry is None and not found.dynamic:
            notes.append(f"layer {index} has no scales in {files.path}; it is quantized dynamically")
    return CheckpointScales(files.path, found.kv_cache_dtype, found.dynamic, layers, keys, notes)


__all__ = ["CheckpointScales", "read_scales"]
