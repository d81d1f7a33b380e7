"""Tencent AngelSlim (HYV3): `<attention>.k_cache.scale`, `<attention>.v_cache.scale`, `<attention>.q.scale`.

Often in a file of their own, `kv_cache_scales.safetensors`; declared in the way of compressed-tensors or of AutoFP8.
Source: the AngelSlim project.
"""

from __future__ import annotations

from .names import Producer, undeclared

PRODUCER = Producer(
    "angelslim",
    {
        r"(?P<module>.+)\.(?P<side>[kv])_cache\.scale": "{side}_scale",
        r"(?P<module>.+attn|.+attention)\.q\.scale": "q_scale",
    },
    undeclared,
)
