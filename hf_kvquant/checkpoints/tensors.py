"""Scales among the tensors of a checkpoint, whoever put them there.

How the scales are declared and what they are called are two questions: converted checkpoints have the names of one
producer and the declaration of another.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

from ..checkpoint_scales import ScaleSource
from . import angelslim, ascend, autofp8, compressed_tensors, mistral, modelopt, quark
from .files import CheckpointFiles
from .found import Declared, Found, NoUsableScalesError, Value, Wanted
from .names import looks_like_kv_scale, parse

# The most special names and declarations come first; what a file beside config.json declares comes last, as in vLLM.
PRODUCERS = (
    modelopt.PRODUCER,
    quark.PRODUCER,
    angelslim.PRODUCER,
    autofp8.PRODUCER,
    ascend.PRODUCER,
    mistral.PRODUCER,
    compressed_tensors.PRODUCER,
    modelopt.BESIDE,
)
# quant_method -> what is known of its scales under names of no producer.
_UNREAD = {"gemma": "a scale of Google's quantization-aware training, for 8 or for 4 bits, which nothing declares"}


def read(files: CheckpointFiles, wanted: Wanted) -> Found | None:
    """The scales among the tensors of `files`, or None if none are declared and none are there."""
    if files.only is not None and not files.only.endswith(".safetensors"):
        return None
    declared = next((found for producer in PRODUCERS if (found := producer.declared(files)) is not None), None)
    names: dict[str, dict[str, str]] = {}
    ignored = []
    for name in files.names:
        parsed = parse(name, PRODUCERS)
        if parsed is None:
            if looks_like_kv_scale(name):
                ignored.append(name)
            continue
        producer, module, part = parsed
        if part in names.setdefault(module, {}):
            ignored.append(name)
            continue
        names[module][part] = name
        implied = Declared(producer.name, None, producer.implied)
        declared = declared or implied
        if producer.after_rotation:
            declared = replace(declared, before_rotation=False)
    if declared is None:
        if ignored:
            methods = [str(quantization.get("quant_method")) for quantization in files.quantizations()]
            known = (_UNREAD[method] for method in methods if method in _UNREAD)
            what = next(known, "which looks like a KV scale of no known format")
            outcome = "it is not used, and scales are dynamic unless others are given"
            warnings.warn(f"{files.path} holds {ignored[0]}, {what}; {outcome}", stacklevel=2)
        return None
    if declared.kv_cache_dtype == "fp8_e5m2" and names:
        raise NoUsableScalesError(
            f"{files.path}: {declared.file} declares fp8_e5m2, which has no scales in checkpoints, but there are some; "
            "use scales='dynamic'"
        )
    values = files.read(name for parts in names.values() for name in parts.values())
    by_path: dict[str, dict[str, Value]] = {
        module: {part: (ScaleSource(files.file_of(name), name), values[name]) for part, name in parts.items()}
        for module, parts in names.items()
    }
    notes = _contradicted(files, declared)
    if declared.file is None:
        notes.append(
            f"{files.path} declares no KV cache format; its scales are taken to be for {declared.kv_cache_dtype}"
        )
    return Found(declared, by_path, notes=notes, ignored=ignored)


def _contradicted(files: CheckpointFiles, declared: Declared) -> list[str]:
    """A note if config.json declares one thing and a file beside it, perhaps of an earlier quantization, another."""
    try:
        other = modelopt.declared_beside(files) if declared.file == "config.json" else None
    except ValueError as error:
        return [f"{error}; config.json is followed, which declares {declared.kv_cache_dtype}"]
    if other is None or (other.kv_cache_dtype, other.dynamic) == (declared.kv_cache_dtype, declared.dynamic):
        return []
    ways = [f"{found.file} declares {_way(found)}" for found in (declared, other)]
    return [f"{files.path}: {', '.join(ways)}; {declared.file} is followed"]


def _way(declared: Declared) -> str:
    return f"{'dynamic' if declared.dynamic else 'static'} {declared.kv_cache_dtype}"
