"""This package's own file, `hf_kvquant_scales.json`: static scales of any kind, beside a model or apart from it.

`{"format": "hf_kvquant scales", "version": 1, "kv_cache_dtype": "int8", "layers": {"model.layers.0.self_attn":
{"k_scale": [...], "v_scale": [...], "k_zero": ...}}, "calibration": {...}}`; the fields of a layer are those of
`LayerScales`, zeros in the units of x; a side without a scale is dynamic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch

from ..checkpoint_scales import ScaleSource
from ..formats import FORMATS
from ..scales import LayerScales
from .files import CheckpointFiles
from .found import Declared, Found, Value, Wanted
from .parse import numbers, object_at

FILE = "hf_kvquant_scales.json"
_FORMAT = "hf_kvquant scales"
_PARTS = tuple(field.name for field in fields(LayerScales))


def content(kv_cache_dtype: str, by_prefix: Mapping[str, LayerScales], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the file holds for scales by the path of their module; `settings` say how they were made."""
    return {
        "format": _FORMAT,
        "version": 1,
        "kv_cache_dtype": kv_cache_dtype,
        "calibration": dict(settings),
        "layers": {prefix: scales.to_dict() for prefix, scales in by_prefix.items()},
    }


def read(files: CheckpointFiles, wanted: Wanted) -> Found | None:
    """The scales of the file, or None if there is none."""
    for file, content in files.documents(FILE):
        if content.get("format") != _FORMAT:
            continue
        where = f"{files.path}/{file}"
        if content.get("version") != 1:
            raise ValueError(f"{where} is of version {content.get('version')!r}, only 1 is known; update hf_kvquant")
        kv_cache_dtype = str(content.get("kv_cache_dtype"))
        if kv_cache_dtype not in FORMATS:
            raise ValueError(f"{where}: kv_cache_dtype {kv_cache_dtype!r} is not known; known: {', '.join(FORMATS)}")
        layers = object_at(content, "layers", where)
        by_path: dict[str, dict[str, Value]] = {}
        for module in layers:
            parts = object_at(layers, module, where)
            by_path[module] = {
                part: (ScaleSource(file, f"{module}.{part}"), _tensor(values, f"{module}.{part} in {where}"))
                for part, values in parts.items()
                if part in _PARTS and values is not None
            }
        return Found(Declared("hf_kvquant", file, kv_cache_dtype), by_path, shaped=True, one_sided=True)
    return None


def _tensor(values: Any, where: str) -> torch.Tensor:
    """`[H, 1]` (`[1, 1]` for a tensor) or `[H, D]` from lists."""
    rows = values if isinstance(values, list) else [values]
    if not any(isinstance(row, list) for row in rows):
        rows = [[row] for row in rows]
    columns = [numbers(row, where) for row in rows]
    if len({len(row) for row in columns}) != 1:
        raise ValueError(f"{where} has rows of different length")
    return torch.tensor(columns, dtype=torch.float32, device="cpu")
