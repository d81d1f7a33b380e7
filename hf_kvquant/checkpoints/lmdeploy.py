"""LMDeploy's int8: what `lmdeploy lite calibrate` measures, and the parameters made from it (also of vLLM 1507).

`key_stats.pth` and `value_stats.pth`: `{"max": {layer: [H, D]}, "min": ..., "absmax": ...}`, layers by the path of the
decoder layer; scales of any format and granularity can be made from them.
`layers.N.past_kv_scale.R.weight`: raw little-endian fp32, `[k_scale, k_zero, v_scale, v_zero]` or `[k_scale, v_scale]`,
zeros in the units of x, one file per layer and tensor-parallel rank. Source: LMDeploy up to 0.5.1, `lite/apis`; vLLM
pull request 1507.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..checkpoint_scales import ScaleSource
from ..formats import get_format
from .files import CheckpointFiles, read_bytes
from .found import Declared, Found, Value, Wanted
from .parse import numbers_at

_PARAMETERS = re.compile(r"layers\.(\d{1,5})\.past_kv_scale\.(\d{1,5})\.weight")
STATISTICS = {"k": "key_stats.pth", "v": "value_stats.pth"}
# A channel that was silent in calibration gets at least this share of the largest scale.
_LEAST_SHARE = 1 / 256
# More numbers than the statistics of all layers have. Tensors may share their bytes, so a file's size is no bound.
_MAX_NUMBERS = 2**24
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def read_parameters(files: CheckpointFiles, wanted: Wanted) -> Found | None:
    """The scales in `layers.N.past_kv_scale.R.weight`, or None without such files."""
    if files.only is not None and _PARAMETERS.fullmatch(files.only) is None:
        return None
    by_layer: dict[int, dict[int, list[float]]] = {}
    for path in sorted(Path(files.path).glob("layers.*.past_kv_scale.*.weight")):
        match = _PARAMETERS.fullmatch(path.name)
        if match is not None:
            by_layer.setdefault(int(match[1]), {})[int(match[2])] = _floats(path)
    if not by_layer:
        return None
    ranks = by_layer[min(by_layer)].keys()
    lengths = {len(values) for of_layer in by_layer.values() for values in of_layer.values()}
    if sorted(ranks) != list(range(len(ranks))) or any(of_layer.keys() != ranks for of_layer in by_layer.values()):
        raise ValueError(f"{files.path}: its past_kv_scale files do not have the same ranks 0, 1, ... in every layer")
    if len(lengths) != 1:
        raise ValueError(f"{files.path}: its past_kv_scale files mix symmetric and asymmetric scales")
    parts = ("k_scale", "v_scale") if lengths == {2} else ("k_scale", "k_zero", "v_scale", "v_zero")
    by_number: dict[int, dict[str, Value]] = {}
    for layer, of_layer in by_layer.items():
        file = f"layers.{layer}.past_kv_scale.{'*' if len(ranks) > 1 else 0}.weight"
        by_number[layer] = {
            part: numbers_at(file, part, [of_layer[rank][index] for rank in range(len(ranks))])
            for index, part in enumerate(parts)
        }
    return Found(Declared("lmdeploy", file, "int8"), by_number=by_number, ranks=len(ranks) > 1)


def _floats(path: Path) -> list[float]:
    raw = read_bytes(path, limit=17)
    if len(raw) not in (8, 16):
        raise ValueError(f"{path} has {len(raw)} bytes; it must be 8 (symmetric) or 16 (asymmetric)")
    return torch.frombuffer(bytearray(raw), dtype=torch.float32).tolist()


def read_statistics(files: CheckpointFiles, wanted: Wanted) -> Found | None:
    """Scales made from `key_stats.pth` and `value_stats.pth`, or None without these files."""
    there = [name for name in STATISTICS.values() if (Path(files.path) / name).is_file()]
    if not there or files.only not in (None, *STATISTICS.values()):
        return None
    if len(there) == 1:
        raise ValueError(f"{files.path} has {there[0]} alone; both of {', '.join(STATISTICS.values())} are needed")
    by_path: dict[str, dict[str, Value]] = {}
    for side, file in STATISTICS.items():
        where = f"{files.path}/{file}"
        largest, smallest = (_layers(files.load(file), key, where) for key in ("max", "min"))
        for layer, maximum in largest.items():
            if layer not in smallest or smallest[layer].shape != maximum.shape:
                raise ValueError(f"{where} has no minimum of {layer} with the shape of its maximum; the file is broken")
            scale, zero = _scale_and_zero(maximum, smallest[layer], side, wanted, f"{layer} in {where}")
            # The path is the decoder layer's, not the attention's.
            parts = by_path.setdefault(f"{layer}.self_attn", {})
            parts[f"{side}_scale"] = (ScaleSource(file, layer), scale)
            if zero is not None:
                parts[f"{side}_zero"] = (ScaleSource(file, layer), zero)
    return Found(Declared("lmdeploy", STATISTICS["k"], get_format(wanted.kv_cache_dtype).name), by_path)


def _layers(content: Any, key: str, where: str) -> Mapping[str, torch.Tensor]:
    layers = content.get(key) if isinstance(content, dict) else None
    if not isinstance(layers, dict):
        raise ValueError(f"{where} holds no {key!r} of layers; the file is broken")
    for layer, tensor in layers.items():
        if not isinstance(layer, str) or not isinstance(tensor, torch.Tensor) or not _is_plain(tensor):
            raise ValueError(f"{layer} of {key!r} in {where} is not a tensor [num_kv_heads, head_dim] of floats")
    if sum(tensor.numel() for tensor in layers.values()) > _MAX_NUMBERS:
        raise ValueError(
            f"{key!r} in {where} holds more than {_MAX_NUMBERS} numbers; no such statistics are that large"
        )
    return layers


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether it has two dimensions and numbers in memory, and is neither sparse nor anything else of that kind."""
    is_dense = tensor.layout is torch.strided and not tensor.is_nested and tensor.device.type == "cpu"
    return is_dense and tensor.dtype in _DTYPES and tensor.ndim == 2 and tensor.numel() > 0


def _scale_and_zero(
    maximum: torch.Tensor, minimum: torch.Tensor, side: str, wanted: Wanted, where: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """LMDeploy's formulas, `[H, D]`, `[H, 1]` or `[1]`: asymmetric for values in int8, symmetric for all else.

    Keys turn with their position, so the middle of what calibration saw is not that of later positions.
    """
    row = get_format(wanted.kv_cache_dtype)
    maximum, minimum = maximum.to(torch.float32), minimum.to(torch.float32)
    if not bool((maximum.isfinite() & minimum.isfinite()).all()):
        raise ValueError(f"{where} holds NaN or infinite values; calibrate again")
    if wanted.granularity == "head":
        maximum, minimum = maximum.amax(1, keepdim=True), minimum.amin(1, keepdim=True)
    elif wanted.granularity == "tensor":
        maximum, minimum = maximum.amax().reshape(1), minimum.amin().reshape(1)
    if row.name == "int8" and side == "v":
        scale, zero = (maximum - minimum) / 255, (maximum + minimum) / 2
        return scale.clamp(min=scale.amax() * _LEAST_SHARE), zero
    scale = torch.maximum(maximum.abs(), minimum.abs()) / row.qmax
    return scale.clamp(min=scale.amax() * _LEAST_SHARE), None
