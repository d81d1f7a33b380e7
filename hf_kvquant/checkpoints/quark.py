"""AMD Quark: `<attention>.k_proj.output_scale`, `<attention>.v_proj.output_scale`, numbers.

Declared by `export.kv_cache_group` in config.json's `quantization_config`; the format is that of `output_tensors` in
`kv_cache_quant_config` or in the entries of `layer_quant_config` that the group names. Fused projections
(`query_key_value`, `Wqkv`) have one scale for queries, keys and values. With `kv_cache_post_rope` keys are measured
after their rotary embedding, and after rotation R3 if `algo_config` has it. The other export, `quant_method: "fp8"`, is
in autofp8.py. Source: the amd-quark package, `torch/export` and `torch/algorithm/rotation`.
"""

from __future__ import annotations

from fnmatch import fnmatch
from typing import Any

from .files import CheckpointFiles
from .found import Declared, NoUsableScalesError, not_transformed
from .names import Producer


def declared(files: CheckpointFiles) -> Declared | None:
    """What config.json says of the outputs of the projections to K and V."""
    for quantization in files.quantizations():
        if quantization.get("quant_method") != "quark":
            continue
        export = quantization.get("export")
        group = export.get("kv_cache_group") if isinstance(export, dict) else None
        group = group if isinstance(group, list) else []
        specs = _specs(quantization.get("kv_cache_quant_config"), None)
        specs = specs or _specs(quantization.get("layer_quant_config"), group)
        if not group and not specs:
            continue
        for spec in specs:
            if spec.get("dtype") != "fp8_e4m3" or spec.get("qscheme") != "per_tensor" or spec.get("is_dynamic"):
                raise NoUsableScalesError(
                    f"{files.path}: config.json declares keys and values of dtype {spec.get('dtype')!r}, "
                    f"{spec.get('qscheme')!r}, dynamic {spec.get('is_dynamic')!r}, which is not supported; supported "
                    "is fp8_e4m3 per_tensor; scales='dynamic' with kv_cache_dtype='fp8' or 'int8' works with any model"
                )
        if not quantization.get("kv_cache_post_rope", False):
            return Declared("quark", "config.json", "fp8_e4m3", before_rotation=True)
        unused = {"k": not_transformed("k", "algo_config: r3")} if _has_r3(quantization.get("algo_config")) else {}
        return Declared("quark", "config.json", "fp8_e4m3", unused=unused)
    return None


def _has_r3(algorithms: Any) -> bool:
    """Whether queries and keys are rotated at run time; under the older name of these rotations they always are."""
    entries = algorithms if isinstance(algorithms, list) else [algorithms]
    return any(bool(entry.get("r3", entry.get("name") == "quarot")) for entry in entries if isinstance(entry, dict))


def _specs(layers: Any, group: list[Any] | None) -> list[dict[str, Any]]:
    """The `output_tensors` of the entries whose name is of `group` (of all for None)."""
    if not isinstance(layers, dict):
        return []
    entries = [
        entry
        for name, entry in layers.items()
        if group is None or any(fnmatch(name, str(pattern)) or fnmatch(str(pattern), name) for pattern in group)
    ]
    specs = [entry.get("output_tensors") for entry in entries if isinstance(entry, dict)]
    return [spec for spec in specs if isinstance(spec, dict)]


PRODUCER = Producer(
    "quark",
    {
        r"(?P<module>.+)\.(?P<side>[qkv])_proj\.output_scale": "{side}_scale",
        r"(?P<module>.+)\.(?P<side>[qkv])_proj\.output_zero_point": "{side}_zero_point",
        r"(?P<module>.+)\.(?:query_key_value|Wqkv|wkv|qkv_proj)\.output_scale": "kv_scale",
    },
    declared,
)
