"""What is done with K and with V of every layer, decided before the first token: format, kind of scales, and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from .checkpoint_scales import CheckpointScales, ScaleSource
from .config import KVQuantConfig
from .formats import get_format
from .scales import LayerScales, granularity_of


@dataclass(frozen=True, eq=False)
class SidePlan:
    """How K or V of one layer is stored.

    Attributes:
        format: name of the storage format.
        kind: `none` (unquantized), `dynamic`, `first_batch`, or `static`.
        source: where the scales come from, in words, for the report.
        scale, zero: static ones as given (`[1]`, `[H]`, `[H, D]`), else None.
        equalize, granularity, margin: as in `KVQuantConfig`.
        risk: why this may not suit the layer, in words; None if nothing speaks against it.
    """

    format: str
    kind: Literal["none", "dynamic", "first_batch", "static"]
    source: str
    scale: torch.Tensor | None = None
    zero: torch.Tensor | None = None
    equalize: bool = False
    granularity: str = "tensor"
    margin: float = 1.0
    risk: str | None = None

    def of_heads(self, cut: Callable[[torch.Tensor], torch.Tensor]) -> SidePlan:
        """The same for some of the heads, whose part of a static scale or zero `cut` gives."""
        scale, zero = (None if tensor is None else cut(tensor) for tensor in (self.scale, self.zero))
        return replace(self, scale=scale, zero=zero)

    def bytes_per_token(self, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Bytes that a token takes: its numbers, in the model's `dtype` if unquantized, and its dynamic scales."""
        number = (get_format(self.format).storage_dtype or dtype).itemsize
        scale = torch.bfloat16.itemsize if self.kind == "dynamic" else 0
        return num_kv_heads * (head_dim * number + scale)


@dataclass(frozen=True, eq=False)
class QueryPlan:
    """How the query of one layer is rounded before it meets the keys in pages.

    Attributes:
        format: name of the format.
        source: where the scale comes from, in words, for the report.
        scale: `[1]` or `[Hq]`; None for one per token and head, computed as tokens arrive.
    """

    format: str
    source: str
    scale: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """What is done with one layer.

    Attributes:
        k, v: how K and V are stored.
        q: how the query is rounded, if it is.
        sink_tokens, recent_tokens: as in `KVQuantConfig`; 0 where nothing is quantized.
    """

    k: SidePlan
    v: SidePlan
    q: QueryPlan | None = None
    sink_tokens: int = 0
    recent_tokens: int = 0


UNQUANTIZED = SidePlan("model", "none", "not quantized")
_SKIPPED_SIDE = replace(UNQUANTIZED, source="not quantized (skip_layers)")
SKIPPED = LayerPlan(_SKIPPED_SIDE, _SKIPPED_SIDE)


ROUNDED_QUERIES = (
    "q_dtype='fp8': queries are rounded to 3 bits of mantissa before they meet the keys in pages, as fp8 attention of "
    "serving engines does; that costs accuracy and is not faster here, so leave it out unless you compare with them or "
    "the model was trained with it"
)
# Said of a layer that is stored as was asked, against better knowledge.
SAFER = "kv_cache_dtype='auto' with scales='auto' would store it as int8 with dynamic scales"
# A scale of fp8 that stands for numbers beyond 224: they come from outlier channels.
_LARGE_FP8_SCALE = 0.5


def plan_layers(
    config: KVQuantConfig,
    layer_types: Sequence[str],
    checkpoint: CheckpointScales | None,
    key_biases: Mapping[int, float] | None = None,
) -> tuple[list[LayerPlan], list[str]]:
    """One plan a layer, and notes for the report.

    Args:
        config: what the user asked.
        layer_types: transformers' name of each cache layer's type.
        checkpoint: scales that were found in the files asked for, or None.
        key_biases: layers whose keys have a bias too large for fp8 or a shared static scale, and how large.

    Where neither the format nor the source of scales was chosen, a layer that does not suit the checkpoint's choice
    gets dynamic int8 instead; a choice stays, and a note says what it meets. Raises ValueError if `config` asks for
    scales that are not there, or for layers that do not exist.
    """
    formats = _choose_formats(config, checkpoint)
    skipped = _skipped_layers(config, layer_types)
    notes: list[str] = []
    given = _given_scales(config, checkpoint, formats, len(layer_types), notes)
    plans = []
    for index in range(len(layer_types)):
        if index in skipped:
            plans.append(SKIPPED)
            continue
        scales, *sources, q_source = given[index]
        sides = []
        for side, name, source in zip("kv", formats, sources, strict=True):
            declared = checkpoint.kv_cache_dtype if checkpoint is not None else None
            scale = None if scales is None else getattr(scales, f"{side}_scale")
            if scale is not None and declared in (None, name):
                plan = _static_plan(name, source, scale, getattr(scales, f"{side}_zero"))
            else:
                plan = _plan_without_scales(config, name)
            bias = (key_biases or {}).get(index) if side == "k" else None
            if (checkpoint is not None or bias is not None) and (risk := _risk(plan, bias)):
                plan = _safer(config, plan, risk, f"layer {index}: {side.upper()} in {name}", notes)
            sides.append(plan)
        k, v = sides
        q = _query_plan(config, index, k, scales, q_source)
        is_quantized = k.kind != "none" or v.kind != "none"
        exact = (config.sink_tokens, config.recent_tokens) if is_quantized else (0, 0)
        plans.append(LayerPlan(k, v, q, *exact))
    if any(plan.q is not None for plan in plans):
        notes.append(ROUNDED_QUERIES)
    return plans, notes


def _query_plan(
    config: KVQuantConfig, index: int, k: SidePlan, scales: LayerScales | None, source: str
) -> QueryPlan | None:
    if config.q_dtype is None:
        return None
    if k.format != config.q_dtype:
        raise ValueError(
            f"q_dtype={config.q_dtype!r} is for keys in {config.q_dtype}, but layer {index} stores its keys as "
            f"{k.format}; give kv_cache_dtype='fp8' as well, name the layer in skip_layers, or leave q_dtype out"
        )
    # Made for the same format as K's scale, so it serves where that does.
    if k.kind == "static" and scales is not None and scales.q_scale is not None:
        return QueryPlan(config.q_dtype, source, scales.q_scale)
    return QueryPlan(config.q_dtype, "dynamic")


def _risk(plan: SidePlan, bias: float | None) -> str | None:
    """Why what a checkpoint asks for may not suit this side, None if it may well."""
    is_fp8 = plan.format.startswith("fp8")
    granularity = plan.granularity if plan.scale is None else granularity_of(plan.scale)
    is_coarse = plan.kind in ("static", "first_batch") and granularity != "channel"
    if bias is not None and (is_fp8 or is_coarse):
        return f"the bias of its projection reaches {bias:.0f}"
    return None if plan.scale is None else large_scale(plan.format, plan.scale)


def large_scale(name: str | None, scale: torch.Tensor) -> str | None:
    """What a static scale for the format `name` says of outliers that this format does not suit; None if nothing."""
    largest = scale.max().item()
    # Exactly 1.0 is what tools write that do not measure, or that never go below it.
    if name != "fp8_e4m3" or granularity_of(scale) == "channel" or largest <= _LARGE_FP8_SCALE or largest == 1.0:
        return None
    return f"its scale is {largest:.3g}, for numbers up to {largest * get_format(name).qmax:.0f}"


def _safer(config: KVQuantConfig, plan: SidePlan, risk: str, where: str, notes: list[str]) -> SidePlan:
    if config.kv_cache_dtype != "auto" or config.scales != "auto":
        notes.append(f"{where}: {risk}; {SAFER}")
        return replace(plan, risk=risk)
    notes.append(f"{where}: {risk}; it is stored as int8 with dynamic scales instead")
    return _plan_without_scales(config, "int8")


def _choose_formats(config: KVQuantConfig, checkpoint: CheckpointScales | None) -> tuple[str, str]:
    if config.kv_cache_dtype != "auto":
        return config.formats
    # 1.0 is a scale of fp8; int8 would store whole numbers only.
    default = "fp8_e4m3" if config.scales == "unit" else "int8"
    choice = (checkpoint.kv_cache_dtype if checkpoint is not None else None) or default
    return choice, choice


def _skipped_layers(config: KVQuantConfig, layer_types: Sequence[str]) -> set[int]:
    skipped = set()
    for item in config.skip_layers:
        if isinstance(item, str):
            wanted = "sliding_attention" if item == "sliding_window" else item  # which is vLLM's name
            matches = {index for index, name in enumerate(layer_types) if name == wanted}
            if not matches:
                types = ", ".join(sorted(set(layer_types)))
                raise ValueError(f"skip_layers names {item!r}; this model's layer types: {types}")
            skipped |= matches
        else:
            if not -len(layer_types) <= item < len(layer_types):
                raise ValueError(f"skip_layers names layer {item}, but this model has {len(layer_types)} cache layers")
            skipped.add(item % len(layer_types))
    return skipped


# Static scales of a layer, and where K's, V's and the query's come from.
_Given = tuple[LayerScales | None, str, str, str]
_NOT_GIVEN: _Given = (None, "", "", "")


def _given_scales(
    config: KVQuantConfig,
    checkpoint: CheckpointScales | None,
    formats: tuple[str, str],
    num_layers: int,
    notes: list[str],
) -> list[_Given]:
    scales = config.scales
    if checkpoint is not None:
        return _checkpoint_scales(config, checkpoint, formats, num_layers, notes)
    if isinstance(scales, str) and scales == "unit":
        one = torch.ones(1, device="cpu")
        ones = LayerScales(one, one, one)
        return [(ones, "unit (1.0)", "unit (1.0)", "unit (1.0)")] * num_layers
    if isinstance(scales, str) or hasattr(scales, "__fspath__"):
        return [_NOT_GIVEN] * num_layers
    if isinstance(scales, LayerScales):
        per_layer: list[LayerScales | None] = [scales] * num_layers
    elif isinstance(scales, Mapping):
        if wrong := [index for index in scales if not 0 <= index < num_layers]:
            raise ValueError(f"scales are given for layer {wrong[0]}, but this model has {num_layers} cache layers")
        per_layer = [scales.get(index) for index in range(num_layers)]
    else:
        if len(scales) != num_layers:
            raise ValueError(f"scales are given for {len(scales)} layers, but this model has {num_layers} cache layers")
        per_layer = list(scales)
    return [(entry, "given", "given", "given") for entry in per_layer]


def _checkpoint_scales(
    config: KVQuantConfig,
    checkpoint: CheckpointScales,
    formats: tuple[str, str],
    num_layers: int,
    notes: list[str],
) -> list[_Given]:
    if checkpoint.dynamic:
        return [_NOT_GIVEN] * num_layers
    if len(checkpoint.layers) != num_layers:
        raise ValueError(
            f"{checkpoint.path} holds scales for {len(checkpoint.layers)} layers, but this model has {num_layers} "
            "cache layers; were they read for another model? read_scales(path, model) names it"
        )
    declared = checkpoint.kv_cache_dtype
    if declared is not None and (unused := sorted({name for name in formats if name != declared and name != "model"})):
        message = f"the scales of {checkpoint.path} are for {declared}; they are not used for {', '.join(unused)}"
        if config.scales == "checkpoint" and declared not in formats:
            raise ValueError(f"scales='checkpoint', but {message}; use kv_cache_dtype={declared!r} or other scales")
        notes.append(message)

    def words(source: Mapping[str, ScaleSource], name: str) -> str:
        return f"checkpoint: {source[name].key}" if name in source else ""

    return [
        _NOT_GIVEN
        if scales is None
        else (scales, words(source, "k_scale"), words(source, "v_scale"), words(source, "q_scale"))
        for scales, source in zip(checkpoint.layers, checkpoint.sources, strict=True)
    ]


def _static_plan(name: str, source: str, scale: torch.Tensor, zero: torch.Tensor | None) -> SidePlan:
    return SidePlan(name, "static", source, scale, zero) if get_format(name).is_quantized else UNQUANTIZED


def _plan_without_scales(config: KVQuantConfig, name: str) -> SidePlan:
    if not get_format(name).is_quantized:
        return UNQUANTIZED
    if config.scales == "first_batch":
        return SidePlan(
            name, "first_batch", "first batch (none seen yet)", granularity=config.granularity, margin=config.margin
        )
    equalize = config.equalizes(name)
    return SidePlan(name, "dynamic", "dynamic, equalized channels" if equalize else "dynamic", equalize=equalize)


def minds_key_biases(config: KVQuantConfig) -> bool:
    """Whether what is asked without a checkpoint's scales may not suit large key biases, as dynamic int8 does."""
    name = config.formats[0]
    is_dynamic = isinstance(config.scales, str) and config.scales in ("auto", "dynamic")
    return name != "model" and not (is_dynamic and name in ("auto", "int8"))


def is_per_layer(config: KVQuantConfig) -> bool:
    """Whether there are scales in memory for single layers, as a calibration has them."""
    return isinstance(config.scales, Mapping | Sequence) and not isinstance(config.scales, str)


def asks_for_checkpoint(config: KVQuantConfig) -> bool:
    """Whether the source of scales is a checkpoint: the model's own, files by name, or what was read of them."""
    if isinstance(config.scales, CheckpointScales) or hasattr(config.scales, "__fspath__"):
        return True
    return isinstance(config.scales, str) and config.scales not in ("dynamic", "first_batch", "unit")
