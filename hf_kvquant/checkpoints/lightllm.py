"""LightLLM's and LightCompress' `kv_cache_calib.json`: one row per layer, K's scales and then V's.

`{"quant_type": "per_tensor" | "per_head", "num_layers": L, "num_head": H, "qmax": 448.0, "scales": [[...]]}`, rows of 2
or 2 * H numbers. Source: the LightLLM project.
"""

from __future__ import annotations

from .files import CheckpointFiles
from .found import Declared, Found, NoUsableScalesError, Wanted
from .parse import integer_at, list_at, number, numbers, numbers_at
from .spellings import LARGEST

FILE = "kv_cache_calib.json"


def read(files: CheckpointFiles, wanted: Wanted) -> Found | None:
    """The scales of the file, or None if there is none of this format."""
    for file, content in files.documents(FILE):
        if not {"quant_type", "scales", "qmax"} <= content.keys():
            continue
        where = f"{files.path}/{file}"
        rows, kind, qmax = list_at(content, "scales", where), content["quant_type"], number(content["qmax"], where)
        if qmax not in LARGEST or kind not in ("per_tensor", "per_head"):
            raise NoUsableScalesError(
                f"{where}: quant_type {kind!r} with qmax {qmax:g} is not supported; supported are per_tensor and "
                "per_head with 448 (fp8), 127 or 128 (int8); scales='dynamic' works with any model"
            )
        width = 1 if kind == "per_tensor" else integer_at(content, "num_head", where)
        if len(rows) != integer_at(content, "num_layers", where):
            raise ValueError(f"{where} has {len(rows)} rows for {content['num_layers']} layers; the file is broken")
        by_number = {}
        for layer, row in enumerate(rows):
            values = numbers(row, f"scales[{layer}] in {where}")
            if len(values) != 2 * width:
                raise ValueError(f"scales[{layer}] in {where} has {len(values)} numbers; {kind} needs {2 * width}")
            by_number[layer] = {
                "k_scale": numbers_at(file, f"scales[{layer}][:{width}]", values[:width]),
                "v_scale": numbers_at(file, f"scales[{layer}][{width}:]", values[width:]),
            }
        return Found(Declared("lightllm", file, LARGEST[qmax]), by_number=by_number)
    return None
