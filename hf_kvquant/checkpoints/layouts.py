"""What written scales look like: the layouts, what each can hold, and who reads it.

The facts follow the readers: vLLM and SGLang want fp32 tensors and a declared scheme, TGI a scheme whose `ignore`
leaves no linear layer unaccounted for, transformers with compressed-tensors the shapes `[1]` and `[H, 1, 1]`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..scales import LayerScales, granularity_of
from .files import quantization_places, text_config_of

LAYOUTS = ("compressed-tensors", "modelopt", "fp8", "sidecar", "vllm-json")
# Layouts of one JSON file, which leave the checkpoint as it is.
JSON_LAYOUTS = ("sidecar", "vllm-json")
# quant_method of a checkpoint's weights -> how KV scales are added to it.
_OF_METHOD = {
    None: "compressed-tensors",
    "compressed-tensors": "compressed-tensors",
    "modelopt": "modelopt",
    "fp8": "fp8",
}
_ELSE_SIDECAR = "layout='sidecar' puts them into a file of their own"

# Scales by the path of their attention module.
ByPrefix = Mapping[str, LayerScales]


def quantization_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says about quantization, {} if nothing."""
    holder, key = _place(config)
    found = holder.get(key)
    return found if isinstance(found, dict) else {}


def _place(config: Mapping[str, Any]) -> tuple[Any, str]:
    """The object in which config.json says it, and under which name; where it would, if it does not."""
    said = ((holder, key) for holder, key in quantization_places(config) if holder[key])
    return next(said, (config, "quantization_config"))


def choose_layout(layout: str, config: Mapping[str, Any], where: str) -> str:
    """`layout`, or for `auto` the one of the checkpoint's own quantization.

    Raises ValueError if there is no such layout, or if it would contradict what the checkpoint declares.
    """
    if layout not in ("auto", *LAYOUTS):
        raise ValueError(f"layout={layout!r}; choose auto or one of {', '.join(LAYOUTS)}")
    if layout in JSON_LAYOUTS:
        return layout
    method = quantization_of(config).get("quant_method")
    fitting = _OF_METHOD.get(method)
    if fitting is None:
        raise ValueError(
            f"{where} has weights of quant_method {method!r}, whose readers know no KV scales; {_ELSE_SIDECAR}"
        )
    if layout not in ("auto", fitting):
        raise ValueError(
            f"{where} has weights of quant_method {method!r}, to which KV scales are added as {fitting!r}, not "
            f"{layout!r}; use layout='auto', or {_ELSE_SIDECAR}"
        )
    return fitting


def check_holds(layout: str, kv_cache_dtype: str, by_prefix: ByPrefix) -> None:
    """Raise ValueError for scales that the layout cannot hold."""
    if layout == "sidecar":
        return
    granularities = granularities_of(by_prefix)
    problem = None
    if any(len(layer.of_sides) < 2 for layer in by_prefix.values()):  # readers expect both
        problem = "scales of K or of V alone"
    elif "channel" in granularities:
        problem = "scales per channel"
    elif kv_cache_dtype not in (("fp8_e4m3", "int8") if layout == "compressed-tensors" else ("fp8_e4m3",)):
        problem = f"scales for {kv_cache_dtype}"
    elif layout != "compressed-tensors" and granularities != {"tensor"}:
        problem = "scales per head"
    elif len(granularities) > 1:
        problem = "scales per tensor beside scales per head"
    elif has(by_prefix, "k_zero", "v_zero"):
        if (layout, kv_cache_dtype) != ("compressed-tensors", "int8"):
            problem = "zeros"
        elif any((zero_point(layer, side).abs() > 127).any() for layer in by_prefix.values() for side in "kv"):
            problem = "zeros of more than 127 steps"
    if problem:
        raise ValueError(f"layout {layout!r} cannot hold {problem}; {_ELSE_SIDECAR}")


def limits(
    layout: str, kv_cache_dtype: str, by_prefix: ByPrefix, config: Mapping[str, Any], tensors: Iterable[str]
) -> list[str]:
    """Which readers of the layout cannot read these scales of a checkpoint, and what does not survive."""
    notes = []
    tensors = list(tensors)
    unknown = (prefix for prefix in by_prefix if not any(name.startswith(f"{prefix}.") for name in tensors))
    if layout not in JSON_LAYOUTS and (prefix := next(unknown, None)):
        notes.append(
            f"there are no weights of {prefix}: this is what transformers calls the module, which other readers may "
            "not know"
        )
    if layout == "compressed-tensors" and not quantization_of(config).get("config_groups"):
        # Checkpoints with quantized weights have met both already.
        obstacle = None
        if any(".experts." in name for name in tensors):
            obstacle = "the experts of a checkpoint whose weights are not quantized"
        elif not any("num_key_value_heads" in part for part in (config, text_config_of(config))):
            obstacle = "a model without num_key_value_heads in config.json"
        if obstacle:
            notes.append(
                f"transformers with compressed-tensors may be unable to load {obstacle}; without quantization_config "
                "it does, and this package still finds the scales"
            )
    has_q_scale = has(by_prefix, "q_scale")
    if layout == "compressed-tensors":
        if kv_cache_dtype == "int8":
            notes.append("int8 is read by this package and by transformers; vLLM refuses it, SGLang ignores it")
        if by_head(by_prefix):
            notes.append("scales per head are read by vLLM with FlashAttention only; SGLang ignores them, TGI fails")
        if has(by_prefix, "k_zero", "v_zero"):
            notes.append("zero points are read by this package and by transformers only")
        if has_q_scale:
            notes.append("transformers reports q_scale as unexpected and leaves it out; vLLM reads it")
    elif layout != "sidecar" and has_q_scale:
        notes.append("there is no place for q_scale; it is left out")
    if layout == "vllm-json" and any(not torch.equal(*layer.of_sides) for layer in by_prefix.values()):
        notes.append("K and V share one scale; the larger one is written")
    return notes


def has(by_prefix: ByPrefix, *names: str) -> bool:
    """Whether any layer has one of these fields of `LayerScales`."""
    return any(getattr(layer, name) is not None for layer in by_prefix.values() for name in names)


def granularities_of(by_prefix: ByPrefix) -> set[str]:
    """Those of K and V over all layers."""
    return {granularity_of(scale) for layer in by_prefix.values() for scale in layer.of_sides}


def by_head(by_prefix: ByPrefix) -> bool:
    """Whether compressed-tensors declares them per head: where a model has one KV head, only q_scale may tell."""
    q_scales = (layer.q_scale for layer in by_prefix.values() if layer.q_scale is not None)
    return granularities_of(by_prefix) == {"head"} or any(granularity_of(scale) == "head" for scale in q_scales)


def zero_point(layer: LayerScales, side: str) -> torch.Tensor:
    """The zero of `k` or `v` in integer steps, `x = (q - zero_point) * scale`."""
    scale, zero = getattr(layer, f"{side}_scale"), getattr(layer, f"{side}_zero")
    return torch.zeros_like(scale) if zero is None else (-zero / scale).round()


def tensors_of(layout: str, by_prefix: ByPrefix) -> dict[str, torch.Tensor]:
    """The tensors to add, fp32 (zero points int8)."""
    tensors: dict[str, torch.Tensor] = {}
    if layout != "compressed-tensors":
        name = "{}.{}_proj.{}_scale" if layout == "modelopt" else "{0}.{1}_scale"
        for prefix, layer in by_prefix.items():
            for side in "kv":  # without dimensions, as both families have them
                tensors[name.format(prefix, side, side)] = getattr(layer, f"{side}_scale").reshape(()).clone()
        return tensors
    shape = (-1, 1, 1) if by_head(by_prefix) else (1,)
    asymmetric = has(by_prefix, "k_zero", "v_zero")
    for prefix, layer in by_prefix.items():
        for side in "kv":
            tensors[f"{prefix}.{side}_scale"] = getattr(layer, f"{side}_scale").reshape(shape).clone()
            if asymmetric:
                tensors[f"{prefix}.{side}_zero_point"] = zero_point(layer, side).reshape(shape).to(torch.int8)
        if layer.q_scale is not None:
            tensors[f"{prefix}.q_scale"] = layer.q_scale.reshape(shape).clone()
    return tensors


def declared_in(layout: str, kv_cache_dtype: str, by_prefix: ByPrefix, config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` (config.json) with the declaration of the scales.

    Raises ValueError for a q_scale per head beside one scale for several KV heads, which cannot be declared.
    """
    declared = copy.deepcopy(dict(config))
    holder, key = _place(declared)
    quantization = holder[key] = holder.get(key) or {}
    scheme: Any = {"num_bits": 8, "type": "float" if kv_cache_dtype == "fp8_e4m3" else "int", "dynamic": False}
    if layout == "fp8":
        scheme = "static"
    elif layout == "compressed-tensors":
        num_kv_heads = text_config_of(config).get("num_key_value_heads", 1)
        if by_head(by_prefix) and granularities_of(by_prefix) == {"tensor"} and num_kv_heads != 1:
            problem = "q_scale per head beside scales per tensor"
            raise ValueError(f"layout {layout!r} cannot hold {problem}; {_ELSE_SIDECAR}")
        scheme["strategy"] = "attn_head" if by_head(by_prefix) else "tensor"
        scheme["symmetric"] = not has(by_prefix, "k_zero", "v_zero")
        if not quantization:
            quantization |= {
                "quant_method": "compressed-tensors",
                "format": "dense",
                "quantization_status": "compressed",
                "global_compression_ratio": None,
                "config_groups": {},
                "ignore": ["Linear"],
            }
    quantization["kv_cache_scheme"] = scheme
    return declared


def vllm_json(by_prefix: ByPrefix, config: Mapping[str, Any]) -> dict[str, Any]:
    """The content of vLLM's `kv_cache_scales.json` for one rank; `by_prefix` is in the order of layers.

    Raises ValueError if a layer of the model is without scales, which its readers do not take.
    """
    num_layers = text_config_of(config).get("num_hidden_layers", len(by_prefix))
    if num_layers != len(by_prefix):
        raise ValueError(
            f"layout 'vllm-json' needs scales of all {num_layers} layers, there are {len(by_prefix)}; {_ELSE_SIDECAR}"
        )
    factors = {str(i): max(scale.item() for scale in layer.of_sides) for i, layer in enumerate(by_prefix.values())}
    return {
        "model_type": config.get("model_type"),
        "kv_cache": {"dtype": "float8_e4m3fn", "scaling_factor": {"0": factors}},
    }
