"""NVIDIA ModelOpt: `<attention>.k_proj.k_scale`, `<attention>.v_proj.v_scale`, fp32 numbers.

Declared by `kv_cache_quant_algo` in hf_quant_config.json, and in config.json's `quantization_config` by
`kv_cache_scheme`, a dictionary for fp8 and the bare name for any other format. The affine presets add
`k_proj.k_bias` and `v_proj.v_bias`, [1, num_kv_heads, 1, head_dim], which is added after scaling. Up to 0.42 scales
below 1.0 are written as 1.0; since 0.43 the usual recipe writes none at all and means 1.0.
Source: the TensorRT-Model-Optimizer project, `torch/export`; checkpoints written by 0.47.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from .compressed_tensors import read_scheme
from .files import CheckpointFiles
from .found import Declared, NoUsableScalesError
from .names import Producer
from .spellings import ALGORITHMS, names_a_format


def declared(files: CheckpointFiles) -> Declared | None:
    """What config.json says of the KV cache."""
    return _first(files, _in_config(files))


def declared_beside(files: CheckpointFiles) -> Declared | None:
    """What hf_quant_config.json says of it."""
    contents = files.settings("hf_quant_config.json")
    return _first(files, ((file, scheme) for file, content in contents for scheme in _of(content.get("quantization"))))


def _first(files: CheckpointFiles, schemes: Iterable[tuple[str, Any]]) -> Declared | None:
    for file, scheme in schemes:
        if isinstance(scheme, dict):
            name, dynamic = read_scheme(scheme, files.path)
            return Declared("modelopt", file, name, dynamic, means_one=True)
        if str(scheme).upper() not in ALGORITHMS:
            raise NoUsableScalesError(
                f"{files.path}: {file} declares a KV cache of format {scheme!r}, which is not supported; supported are "
                "FP8 and INT8; scales='dynamic' with kv_cache_dtype='fp8' or 'int8' works with any model"
            )
        return Declared("modelopt", file, ALGORITHMS[str(scheme).upper()], means_one=True)
    return None


def _in_config(files: CheckpointFiles) -> Iterator[tuple[str, Any]]:
    for quantization in files.quantizations():
        if str(quantization.get("quant_method")).lower().startswith("modelopt"):
            yield from (("config.json", scheme) for scheme in _of(quantization))
            yield from (("config.json", scheme) for scheme in _of(quantization.get("quantization")))
    yield from (("config.json", scheme) for scheme in _of(files.config.get("quantization")))


def _of(quantization: Any) -> list[Any]:
    if not isinstance(quantization, dict):
        return []
    values = (quantization.get("kv_cache_scheme"), quantization.get("kv_cache_quant_algo"))
    return [value for value in values if names_a_format(value)]


PRODUCER = Producer(
    "modelopt",
    {
        # Further levels between the projection and its scale come from wrapped linear layers.
        r"(?P<module>.+)\.(?P<side>[kv])_proj\.(?:.+\.)?(?P=side)_scale": "{side}_scale",
        r"(?P<module>.+)\.(?P<side>[kv])_proj\.(?P=side)_bias": "{side}_zero",
        r"(?P<module>.+)\.(?:qkv|qkqkv)_proj\.(?P<side>[kv])_scale": "{side}_scale",
    },
    declared,
)
BESIDE = Producer("modelopt", {}, declared_beside)
