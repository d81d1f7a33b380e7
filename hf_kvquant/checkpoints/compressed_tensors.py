"""compressed-tensors, as written by llm-compressor: `<attention>.k_scale`, `<attention>.v_scale`.

Declared by `quantization_config.kv_cache_scheme` in config.json. Strategy `tensor` has scales of shape [1], `attn_head`
[num_kv_heads, 1, 1]; zero points, if any, are in integer steps. The scales multiply the stored number.
Source: the compressed-tensors project, `quantization/quant_args.py` and `modeling/kvcache.py`.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from ..scales import LayerScales
from .files import CheckpointFiles, FoundEntry, FoundScales

_STATIC_STRATEGIES = (None, "tensor", "attn_head")
_DYNAMIC_STRATEGIES = (None, "tensor", "token", "attn_head")


def read(files: CheckpointFiles) -> FoundScales | None:
    """The scales of `files`, or None if they neither declare nor hold any of this family."""
    scheme = _scheme(files.config)
    prefixes = sorted(
        name.removesuffix(f".{side}_scale")
        for side in "kv"
        for name in files.tensors
        if name.endswith(f".{side}_scale")
    )
    prefixes = [prefix for prefix in dict.fromkeys(prefixes) if not prefix.endswith(("k_proj", "v_proj"))]
    if scheme is None and not prefixes:
        return None
    dtype, dynamic, notes = "fp8_e4m3", False, []
    if scheme is None:
        notes.append(f"{files.path} declares no kv_cache_scheme; its scales are taken to be for fp8_e4m3")
    else:
        dtype, dynamic = _read_scheme(scheme, files.path)
    if dynamic:
        return FoundScales(dtype, dynamic=True)
    by_prefix = {}
    for prefix in prefixes:
        entry = _read_layer(files, prefix, notes)
        if entry is not None:
            by_prefix[prefix] = entry
    if not by_prefix:
        if scheme is None:
            return None
        raise ValueError(
            f"{files.path} declares an 8-bit KV cache (kv_cache_scheme) but holds no usable k_scale / v_scale; "
            "use scales='dynamic', or scales='unit' if 1.0 is meant"
        )
    return FoundScales(dtype, by_prefix=by_prefix, notes=notes)


def _scheme(config: dict[str, Any]) -> dict[str, Any] | None:
    text_config = config.get("text_config")
    nested = text_config.get("quantization_config") if isinstance(text_config, dict) else None
    for quantization in (config.get("quantization_config"), config.get("compression_config"), nested):
        if isinstance(quantization, dict) and isinstance(quantization.get("kv_cache_scheme"), dict):
            scheme: dict[str, Any] = quantization["kv_cache_scheme"]
            return scheme
    return None


def _read_scheme(scheme: dict[str, Any], path: str) -> tuple[str, bool]:
    """Format and whether it is dynamic; the defaults are those of compressed-tensors' QuantizationArgs."""
    bits, kind, strategy = scheme.get("num_bits", 8), scheme.get("type", "int"), scheme.get("strategy")
    dynamic = bool(scheme.get("dynamic", False))
    if (
        bits != 8
        or kind not in ("float", "int")
        or strategy not in (_DYNAMIC_STRATEGIES if dynamic else _STATIC_STRATEGIES)
    ):
        raise ValueError(
            f"{path}: kv_cache_scheme with num_bits={bits}, type={kind!r}, strategy={strategy!r} is not supported; "
            "supported are 8 bits, float or int, static per tensor or attn_head, or dynamic per token; "
            "scales='dynamic' with kv_cache_dtype='fp8' or 'int8' works with any model"
        )
    return ("fp8_e4m3" if kind == "float" else "int8"), dynamic


def _read_layer(files: CheckpointFiles, prefix: str, notes: list[str]) -> FoundEntry | None:
    names = {part: f"{prefix}.{part}" for part in ("k_scale", "v_scale", "q_scale", "k_zero_point", "v_zero_point")}
    tensors = files.read(name for name in names.values() if name in files.tensors)
    scales = {side: _usable(files, names[f"{side}_scale"], tensors) for side in "kv"}
    for side, other in (("k", "v"), ("v", "k")):
        if scales[side] is None and scales[other] is not None:
            message = f"{prefix} has a usable {other}_scale but no {side}_scale; {other}_scale is used for both"
            warnings.warn(f"{files.path}: {message}", stacklevel=2)
            notes.append(message)
            scales[side] = scales[other]
            names[f"{side}_scale"] = names[f"{other}_scale"]
    if scales["k"] is None or scales["v"] is None:
        return None
    zeros = {side: _zero(files, names[f"{side}_zero_point"], tensors, scales[side]) for side in "kv"}
    q_scale = tensors.get(names["q_scale"])
    q_scale = None if q_scale is None else _flat(q_scale)
    if q_scale is not None and not (q_scale.isfinite() & (q_scale > 0)).all():
        notes.append(f"{names['q_scale']} is not finite and positive; it is ignored")
        q_scale = None
    return FoundEntry(
        LayerScales(scales["k"], scales["v"], q_scale, zeros["k"], zeros["v"]), names["k_scale"], names["v_scale"]
    )


def _usable(files: CheckpointFiles, name: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """fp32 `[1]` or `[H]`; None where the checkpoint has no scale (missing, zero or negative)."""
    if name not in tensors:
        return None
    scale = _finite(files, name, tensors[name])
    return scale if bool((scale > 0).all()) else None


def _zero(
    files: CheckpointFiles, name: str, tensors: dict[str, torch.Tensor], scale: torch.Tensor | None
) -> torch.Tensor | None:
    """A zero point in integer steps, `x = (q - zero_point) * scale`, as a zero in the units of x."""
    if name not in tensors or scale is None:
        return None
    zero = -_finite(files, name, tensors[name]) * scale
    return zero if bool((zero != 0).any()) else None


def _finite(files: CheckpointFiles, name: str, tensor: torch.Tensor) -> torch.Tensor:
    flat = _flat(tensor)
    if flat.numel() == 0:
        raise ValueError(f"{files.where(name)} is empty; the checkpoint is broken, recalibrate it")
    if not flat.isfinite().all():
        raise ValueError(f"{files.where(name)} holds NaN or infinite values; the checkpoint is broken, recalibrate it")
    return flat


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.float32).reshape(-1)
