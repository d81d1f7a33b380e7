"""Scales that lie in checkpoints: one reader a family of formats, one result for all.

Scales are read straight from the files, never from the loaded model: transformers drops them, casts them to the model's
dtype, or leaves uninitialised memory where a checkpoint has none.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch

from ..checkpoint_scales import CheckpointScales, ScaleSource
from ..scales import LayerScales
from . import lightllm, lmdeploy, ort_genai, sidecar, tensorrt_llm, tensors, vllm
from .files import MAX_COUNT, CheckpointFiles
from .found import Declared, Found, ModelLayers, NoUsableScalesError, Parts, Wanted
from .matching import match_layers, number_layers
from .names import looks_like_kv_scale
from .values import LayerReader

# What was put beside a checkpoint on purpose comes before what is in it.
READERS = (
    sidecar.read,
    tensorrt_llm.read,
    tensors.read,
    vllm.read,
    lightllm.read,
    ort_genai.read,
    lmdeploy.read_parameters,
    lmdeploy.read_statistics,
)
# Files that hold nothing but scales.
_FILES = (sidecar.FILE, vllm.FILE, lightllm.FILE, *lmdeploy.STATISTICS.values())

# The scales of a cache layer and where they come from.
_Layer = tuple[LayerScales | None, dict[str, ScaleSource]]


def read_checkpoint(
    source: str | os.PathLike[str], wanted: Wanted, *, revision: str | None = None, fetch: bool = True
) -> CheckpointScales | None:
    """The KV scales of files, or None if they neither declare nor hold any.

    Args:
        source: a directory, a file, or a hub id.
        wanted: the layers they are wanted for, and what to make of statistics.
        revision, fetch: of a hub id; see `read_scales`.

    Raises ValueError naming file and key for whatever is broken, unusable or not supported.
    """
    files = CheckpointFiles.find(source, revision, fetch, only_scales=True)
    for read in READERS:
        found = read(files, wanted)
        if found is not None:
            return _assemble(files, found, wanted.model)
    return None


def names_like_scales(source: str | os.PathLike[str], *, revision: str | None = None) -> list[str]:
    """The names of tensors that look like KV scales, read or not."""
    files = CheckpointFiles.find(source, revision, only_scales=True)
    return [name for name in files.names if looks_like_kv_scale(name)]


def _assemble(files: CheckpointFiles, found: Found, model: ModelLayers | None) -> CheckpointScales | None:
    declared = found.declared
    dynamic = declared.dynamic
    modules = _modules_of_layers(files, found, model)
    notes = [*files.broken, *found.notes, *declared.unused.values()]
    ignored = [*found.ignored, *_surplus(found, modules), *_beside(files, found)]
    layers: list[_Layer] = [(None, {}) for _ in modules]
    if not declared.dynamic:
        layers = _read_layers(files, found, model, modules, notes)
        if all(scales is None for scales, _ in layers):
            if declared.file is None:
                return None
            if not declared.means_one:
                raise NoUsableScalesError(
                    f"{files.path} declares an 8-bit KV cache ({declared.file}, {declared.producer}) but holds no "
                    "usable k_scale / v_scale; use scales='dynamic', or scales='unit' if 1.0 is meant"
                )
            if declared.kv_cache_dtype == "int8":  # of which 1.0 leaves most numbers three codes
                dynamic = True
                notes.append(f"{declared.file} declares int8, but {files.path} holds no KV scales; they are dynamic")
            else:
                layers = _ones(files, declared, model, len(modules))
                notes.append(f"{files.path} holds no KV scales; {declared.producer} means 1.0 by that")
        for index, (scales, _) in enumerate(layers):
            if scales is None and not dynamic and (model is None or model.paths[index]):
                notes.append(f"layer {index} has no scales in {files.path}; it is quantized dynamically")
    if ignored:
        notes.append(
            f"{len(ignored)} names look like KV scales but are of no cache layer, of no known format, or beside what "
            f"is read, and are not used: {', '.join(ignored[:3])}{', ...' if len(ignored) > 3 else ''}"
        )
    return CheckpointScales(
        files.path, declared.producer, declared.kv_cache_dtype, dynamic, [scales for scales, _ in layers],
        [sources for _, sources in layers], notes, ignored,
    )  # fmt: skip


def _read_layers(
    files: CheckpointFiles,
    found: Found,
    model: ModelLayers | None,
    modules: list[tuple[str, Parts]],
    notes: list[str],
) -> list[_Layer]:
    """What was found of each layer, with a warning if some of it is suspicious."""
    declared = found.declared
    reader = LayerReader(files.path, found.ranks, found.shaped, found.one_sided, declared.unused.keys(), notes)
    layers: list[_Layer] = [
        reader.read(module, parts, _num_kv_heads(files, model, index)) or (None, {})
        for index, (module, parts) in enumerate(modules)
    ]
    if declared.before_rotation and any(scales is not None and scales.k_scale is not None for scales, _ in layers):
        notes.append(
            f"{declared.producer} measures keys before their rotary embedding, which can make a number 1.41 times "
            "as large; 'clipped' in the report says whether that happened"
        )
    if reader.suspicious:  # of which there may be hundreds
        more = f" (and {len(reader.suspicious) - 1} more such notes)" if len(reader.suspicious) > 1 else ""
        warnings.warn(f"{files.path}: {reader.suspicious[0]}{more}", stacklevel=3)
    return layers


def _modules_of_layers(files: CheckpointFiles, found: Found, model: ModelLayers | None) -> list[tuple[str, Parts]]:
    """For each cache layer its module (for messages) and what was found of it, {} for nothing."""
    num_layers = len(model) if model is not None else files.number("num_hidden_layers")
    if found.by_number:
        highest = max(found.by_number)
        if num_layers is None:
            num_layers = min(highest + 1, MAX_COUNT)
        if highest >= num_layers:
            raise ValueError(
                f"{files.path} holds scales for layer {highest}, but this model has {num_layers} cache layers; were "
                "the scales made for another model?"
            )
        return [(f"layer {index}", found.by_number.get(index, {})) for index in range(num_layers)]
    prefixes = sorted(found.by_path)
    if model is None:
        matched = number_layers(prefixes, num_layers, files.path)
    else:
        matched = match_layers(prefixes, model.paths, files.path)
    return [("", {}) if prefix is None else (prefix, found.by_path[prefix]) for prefix in matched]


def _surplus(found: Found, modules: list[tuple[str, Parts]]) -> list[str]:
    """The keys of what belongs to no cache layer: other towers, layers that predict further tokens, aliases."""
    used = {module for module, _ in modules if not found.declared.dynamic}
    return sorted(
        source.key for module, parts in found.by_path.items() if module not in used for source, _ in parts.values()
    )


def _beside(files: CheckpointFiles, found: Found) -> list[str]:
    """What another reader would have found in the same place."""
    if files.only is not None:
        return []
    modules = (*found.by_path.values(), *found.by_number.values())
    used = {source.file for parts in modules for source, _ in parts.values()}
    names = [name for name in _FILES if name not in used and (Path(files.path) / name).is_file()]
    if used and not any(file.endswith(".safetensors") for file in used):
        names += [name for name in files.names if looks_like_kv_scale(name)]
    return names


def _num_kv_heads(files: CheckpointFiles, model: ModelLayers | None, index: int) -> int | None:
    if model is not None:
        return model.num_kv_heads[index]
    return files.number("num_key_value_heads", "num_attention_heads")


def _ones(files: CheckpointFiles, declared: Declared, model: ModelLayers | None, num_layers: int) -> list[_Layer]:
    """The scales of a producer that leaves them out where it means 1.0."""
    if not num_layers:
        raise ValueError(f"{files.path} does not say how many layers it has; name the model")
    one = ScaleSource(declared.file or "", "1.0 (declared without a scale)")
    return [
        (LayerScales(torch.ones(1, device="cpu"), torch.ones(1, device="cpu")), {"k_scale": one, "v_scale": one})
        if model is None or model.paths[index]
        else (None, {})
        for index in range(num_layers)
    ]


__all__ = [
    "CheckpointScales", "ModelLayers", "NoUsableScalesError", "ScaleSource", "Wanted", "names_like_scales",
    "read_checkpoint",
]  # fmt: skip
