"""Scales that lie in checkpoints: one reader a family of formats, one result for all.

Scales are read straight from the safetensors files, never from the loaded model: transformers drops them, casts them to
the model's dtype, or leaves uninitialised memory where a checkpoint has none.
"""

from __future__ import annotations

import os

from ..scales import LayerScales
from . import compressed_tensors
from .files import CheckpointFiles, FoundScales
from .found import CheckpointScales, ModelLayers, ScaleSource
from .matching import match_layers

READERS = (compressed_tensors.read,)


def read_checkpoint(
    source: str | os.PathLike[str],
    model: ModelLayers | None = None,
    *,
    revision: str | None = None,
    fetch: bool = True,
) -> CheckpointScales | None:
    """The KV scales of a checkpoint, or None if it neither declares nor holds any.

    Args:
        source: a directory, or a hub id (its snapshot is used, and fetched if it is not there yet).
        model: the layers that scales are wanted for; without it they are ordered by the number in their path.
        revision: of a hub id.
        fetch: whether a hub id that is not on this machine may be fetched; if not, it is a FileNotFoundError.

    Raises ValueError naming file and key for scales that are NaN or infinite, for a declared scheme without a usable
    scale, for layers that cannot be matched and for schemes that are not 8-bit.
    """
    files = CheckpointFiles.find(source, revision, fetch)
    for read in READERS:
        found = read(files)
        if found is not None:
            return _assemble(files, found, model)
    return None


def _assemble(files: CheckpointFiles, found: FoundScales, model: ModelLayers | None) -> CheckpointScales:
    matched = match_layers(list(found.by_prefix), model.paths if model else None, files.path)
    notes = list(found.notes)
    layers: list[LayerScales | None] = []
    sources: list[dict[str, ScaleSource]] = []
    for index, prefix in enumerate(matched):
        entry = found.by_prefix.get(prefix) if prefix is not None else None
        layers.append(None if entry is None else entry.scales)
        keys = {} if entry is None else {"k_scale": entry.k_key, "v_scale": entry.v_key}
        sources.append({part: ScaleSource(files.tensors[key], key) for part, key in keys.items()})
        if entry is None and not found.dynamic:
            notes.append(f"layer {index} has no scales in {files.path}; it is quantized dynamically")
    return CheckpointScales(
        files.path, "compressed-tensors", found.kv_cache_dtype, found.dynamic, layers, sources, notes
    )


__all__ = ["CheckpointScales", "ModelLayers", "ScaleSource", "read_checkpoint"]
