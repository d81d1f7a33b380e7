"""This package's own file, `hf_kvquant_scales.json`: static scales of any kind, beside a model or apart from it.

`{"format": "hf_kvquant scales", "version": 1, "kv_cache_dtype": "int8", "layers": {"model.layers.0.self_attn":
{"k_scale": [...], "v_scale": [...], "k_zero": ...}}, "calibration": {...}}`; the fields of a layer are those of
`LayerScales`, zeros in the units of x.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..scales import LayerScales

FILE = "hf_kvquant_scales.json"
_FORMAT = "hf_kvquant scales"


def content(kv_cache_dtype: str, by_prefix: Mapping[str, LayerScales], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the file holds for scales by the path of their module; `settings` say how they were made."""
    return {
        "format": _FORMAT,
        "version": 1,
        "kv_cache_dtype": kv_cache_dtype,
        "calibration": dict(settings),
        "layers": {prefix: scales.to_dict() for prefix, scales in by_prefix.items()},
    }
