"""Tencent AngelSlim (HYV3): `<attention>.k_cache.scale`, `<attention>.v_cache.scale`, `<attention>.q.scale`.

Often in a file of their own, `kv_cache_scales.safetensors`; none for a side that is dynamic. Declared by
`attn_quant_config.kv_cache_quant` in config.json, or in the way of compressed-tensors or of AutoFP8. Keys are measured
after their rotary embedding. Source: the AngelSlim project.
"""

from __future__ import annotations

from .files import CheckpointFiles
from .found import Declared, NoUsableScalesError
from .names import Producer


def declared(files: CheckpointFiles) -> Declared | None:
    """What config.json says of K and V, each. Raises NoUsableScalesError for other formats than fp8."""
    attention = files.config.get("attn_quant_config")
    cache = attention.get("kv_cache_quant") if isinstance(attention, dict) else None
    if not isinstance(cache, dict):
        return None
    dynamic = {}
    for side in "kv":
        entry = cache.get(f"{side}_quant")
        entry = entry if isinstance(entry, dict) else {}
        dtype, scheme = entry.get("dtype"), entry.get("scheme")
        if dtype != "fp8_e4m3" or scheme not in ("static", "dynamic"):
            raise NoUsableScalesError(
                f"{files.path}: config.json declares {side}_quant with dtype {dtype!r} and scheme {scheme!r}, which is "
                "not supported; supported is fp8_e4m3, static or dynamic; scales='dynamic' works with any model"
            )
        if scheme == "dynamic":
            dynamic[side] = f"config.json asks for dynamic scales of {side.upper()}"
    if len(dynamic) == 2:
        return Declared("angelslim", "config.json", "fp8_e4m3", dynamic=True)
    return Declared("angelslim", "config.json", "fp8_e4m3", unused=dynamic)


PRODUCER = Producer(
    "angelslim",
    {
        r"(?P<module>.+)\.(?P<side>[kv])_cache\.scale": "{side}_scale",
        r"(?P<module>.+attn|.+attention)\.q\.scale": "q_scale",
    },
    declared,
    after_rotation=True,
)
