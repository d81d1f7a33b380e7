"""ONNX Runtime GenAI's scale file, whatever it is called: `--kv-cache-scale-file`.

`{"scales": {"k_scales": [...], "v_scales": [...]}, "layer_ids": [...], "qmax": 128.0}`: an entry per layer with full
attention, a number (per tensor) or one per channel, head by head. Source: the onnxruntime-genai project.
"""

from __future__ import annotations

from .files import CheckpointFiles
from .found import Declared, Found, NoUsableScalesError, Wanted
from .parse import list_at, number, numbers, numbers_at, object_at
from .spellings import LARGEST
from .vllm import FILE


def read(files: CheckpointFiles, wanted: Wanted) -> Found | None:
    """The scales of the file, or None if there is none of this format."""
    for file, content in files.documents(FILE):
        scales = content.get("scales")
        if not isinstance(scales, dict) or "k_scales" not in scales:
            continue
        where = f"{files.path}/{file}"
        qmax = number(content.get("qmax"), f"qmax in {where}")
        if qmax not in LARGEST:
            raise NoUsableScalesError(
                f"{where}: qmax {qmax:g} is not supported; supported are 448 (fp8), 127 and 128 (int8); "
                "scales='dynamic' works with any model"
            )
        rows = {side: list_at(object_at(content, "scales", where), f"{side}_scales", where) for side in "kv"}
        layers = list_at(content, "layer_ids", where) if "layer_ids" in content else list(range(len(rows["k"])))
        whole = all(isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0 for layer in layers)
        if not whole or not len(rows["k"]) == len(rows["v"]) == len(set(layers)) == len(layers):
            raise ValueError(
                f"{where} has {len(rows['k'])} k_scales and {len(rows['v'])} v_scales for layer_ids {layers[:8]}; "
                "each layer needs one of both"
            )
        by_number = {}
        for row, layer in enumerate(layers):
            keys = {side: f"{side}_scales[{row}]" for side in "kv"}
            by_number[layer] = {
                f"{side}_scale": numbers_at(file, key, numbers(rows[side][row], f"{key} in {where}"))
                for side, key in keys.items()
            }
        return Found(Declared("onnxruntime-genai", file, LARGEST[qmax]), by_number=by_number)
    return None
