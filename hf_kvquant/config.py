"""`KVQuantConfig`: what a user may ask of the cache, parsed and checked in one place."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any

import torch

from .checkpoint_scales import FIELDS as CHECKPOINT_FIELDS
from .checkpoint_scales import CheckpointScales
from .formats import ALIASES, FORMATS, get_format
from .scales import LayerScales, check_granularity

SCALE_SOURCES = ("auto", "checkpoint", "dynamic", "first_batch", "unit")
# vLLM's names for a format with dynamic scales.
_PER_TOKEN_HEAD = {"fp8_per_token_head": "fp8_e4m3", "int8_per_token_head": "int8"}
# What others call an option, or what does the same here.
_CALLED_HERE = {
    "backend": "kv_cache_dtype",
    "block_size": "page_size",
    "calculate_kv_scales": "scales='first_batch', or 'dynamic'",
    "kv_cache_dtype_skip_layers": "skip_layers",
    "nbits": "kv_cache_dtype",
    "quant_policy": "kv_cache_dtype",
    "quantization_param_path": "scales",
    "residual_length": "recent_tokens",
}


@dataclass(frozen=True)
class KVQuantConfig:
    """Options of the cache: the keys of `cache_config` and the keywords of `QuantizedPagedCache.from_model`.

    Attributes:
        kv_cache_dtype: `fp8` (= `fp8_e4m3`), `fp8_e5m2`, `int8`, `model` (pages in the model's dtype), a pair of them
            for (K, V), or `auto`: what the checkpoint declares, else int8. torch's dtypes count as names, and vLLM's
            `fp8_per_token_head` and `int8_per_token_head` stand for the format with `scales="dynamic"`.
        scales: where scales come from. `auto`: the checkpoint's if it has any, else `dynamic`. `checkpoint`: the
            model's own, an error if there are none. `dynamic`: one per token and head. `first_batch`: from the first
            real tokens, then frozen. `unit`: 1.0. A path or hub id: the scales of that checkpoint; what `read_scales`
            returned for it is the same, already read. In memory: `LayerScales` for all layers, or one per layer as a
            sequence (a calibration is one) or `{layer_idx: LayerScales}`. A checkpoint's and those of single layers are
            of self-attention; cross-attention is dynamic beside them.
        granularity: `tensor`, `head` or `channel`, for scales taken from the first batch.
        equalize: divide K and V by a per-channel vector before dynamic scales are taken, so that an outlier channel
            does not eat the 8 bits of its neighbours. `auto`: for int8 only. True, False, or names of formats.
        margin: factor between the largest value of the first batch and the largest storable one (`first_batch`).
        page_size: tokens per page.
        num_pages: upper bound of the pages of a layer, for all sequences together; None for no bound.
        max_cache_len: reserve this many tokens per sequence at the first update, at fixed addresses. Such a cache can
            be compiled, and cannot grow.
        offload: let the pages of layers without a window rest in host memory; a layer's come to the device, in 8 bits,
            while the layer before it computes.
        skip_layers: layers kept in the model's dtype, by index (negative counts from the end; also as a string) or by
            layer type (`sliding_attention`, ...; vLLM's `sliding_window` is the same).
        sink_tokens: keep this many tokens from the start of every sequence in the model's dtype (attention sinks, whose
            outliers cost most), rounded up to whole pages; padding on the left, where `generate` knows of it, is not
            counted. Not in layers with a window, which do not see them for long.
        recent_tokens: let every token attend to itself and to the ones before it, this many in all, as the model made
            them, and to older ones in 8 bits. Both are 0 by default, and part of the same attention.
        q_dtype: `fp8` (= `fp8_e4m3`) rounds the query of attention over pages too, as fp8 attention of serving engines
            does, by the checkpoint's or given `q_scale`, else by one scale per token and head. For keys in fp8_e4m3,
            and for comparing: it costs accuracy and is not faster here. None: the query stays as it is.

    Raises ValueError or TypeError that list what is accepted.
    """

    kv_cache_dtype: str | torch.dtype | Sequence[str | torch.dtype] = "auto"
    scales: Any = "auto"
    granularity: str = "tensor"
    equalize: bool | str | Sequence[str] = "auto"
    margin: float = 1.5
    page_size: int = 16
    num_pages: int | None = None
    max_cache_len: int | None = None
    offload: bool = False
    skip_layers: Sequence[int | str] = ()
    sink_tokens: int = 0
    recent_tokens: int = 0
    q_dtype: str | None = None

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        if isinstance(self.kv_cache_dtype, str) and self.kv_cache_dtype in _PER_TOKEN_HEAD:
            if not isinstance(self.scales, str) or self.scales not in ("auto", "dynamic"):
                raise ValueError(
                    f"kv_cache_dtype={self.kv_cache_dtype!r} has dynamic scales, but scales={self.scales!r}; leave one "
                    "of both out"
                )
            set_(self, "scales", "dynamic")
            set_(self, "kv_cache_dtype", _PER_TOKEN_HEAD[self.kv_cache_dtype])
        if self.kv_cache_dtype != "auto":
            set_(self, "kv_cache_dtype", _parse_dtype(self.kv_cache_dtype))
        set_(self, "q_dtype", _parse_q_dtype(self.q_dtype))
        set_(self, "equalize", _parse_equalize(self.equalize))
        set_(self, "skip_layers", _parse_skip_layers(self.skip_layers))
        made_for = _format_of(self.scales)
        set_(self, "scales", _parse_scales(self.scales))
        _check_scales(self.scales)
        if made_for is not None and self.kv_cache_dtype == "auto":
            set_(self, "kv_cache_dtype", made_for)
        elif made_for is not None and (made_for not in self.formats or set(self.formats) - {made_for, "model"}):
            raise ValueError(
                f"the scales were calibrated for {made_for}, not for kv_cache_dtype={self.kv_cache_dtype!r}; calibrate "
                "for that format, or leave kv_cache_dtype out (the name of an attention, such as kvquant_int8, is one)"
            )
        check_granularity(self.granularity)
        if not isinstance(self.margin, Real) or not 1.0 <= self.margin < float("inf"):
            raise ValueError(f"margin={self.margin!r}; it is a factor of at least 1.0 on the largest value seen")
        for name in ("granularity", "margin"):
            if self.scales != "first_batch" and getattr(self, name) != getattr(KVQuantConfig, name):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is for scales='first_batch'; dynamic scales are one per token and "
                    "head, and those of a checkpoint or a calibration are taken as they are"
                )
        for name in ("page_size", "num_pages", "max_cache_len"):
            value = getattr(self, name)
            if value is None and name != "page_size":
                continue
            if not is_integer(value) or value < 1:
                raise ValueError(f"{name}={value!r}; it must be a positive integer")
            set_(self, name, int(value))
        for name in ("sink_tokens", "recent_tokens"):
            value = getattr(self, name)
            if not is_integer(value) or value < 0:
                raise ValueError(f"{name}={value!r}; it must be a number of tokens, 0 for none")
            set_(self, name, int(value))
        set_(self, "margin", float(self.margin))
        if not isinstance(self.offload, bool):
            raise ValueError(f"offload={self.offload!r}; it is True or False")
        if self.offload and self.max_cache_len is not None:
            raise ValueError(
                "offload=True and max_cache_len: pages at fixed addresses stay on the device; give one of both"
            )

    @classmethod
    def parse(cls, options: KVQuantConfig | Mapping[str, Any] | None, **defaults: Any) -> KVQuantConfig:
        """A config from what a user gave (never changed), over `defaults`. Raises ValueError for unknown keys."""
        if isinstance(options, cls):
            # A field with its default says as little as a key that is missing.
            silent = [f.name for f in fields(cls) if f.name in defaults and getattr(options, f.name) == f.default]
            return replace(options, **{name: defaults[name] for name in silent}) if silent else options
        if options is not None and not isinstance(options, Mapping):
            raise TypeError(f"cache_config must be a dict or a KVQuantConfig, not {type(options).__name__}")
        given = {**defaults, **(options or {})}
        known = [f.name for f in fields(cls)]
        if unknown := sorted(str(key) for key in given if key not in known):
            named = [f"{key} (here: {_CALLED_HERE[key]})" if key in _CALLED_HERE else key for key in unknown]
            raise ValueError(f"unknown cache_config key(s) {', '.join(named)}; known: {', '.join(known)}")
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """The options that are not the default's, ready for JSON; `parse` takes them back."""
        values = {f.name: _plain(getattr(self, f.name)) for f in fields(self)}
        return {f.name: values[f.name] for f in fields(self) if values[f.name] != _plain(f.default)}

    @property
    def formats(self) -> tuple[str, str]:
        """Names of the formats of K and V, or `auto` for both."""
        choice: Any = self.kv_cache_dtype  # as parsed: a name, or a pair of them
        return (choice, choice) if isinstance(choice, str) else choice

    def equalizes(self, format_name: str) -> bool:
        """Whether dynamic scales of this format lie over equalized channels."""
        if self.equalize == "auto":
            return format_name == "int8"
        if isinstance(self.equalize, bool):
            return self.equalize
        return format_name in self.equalize


def _parse_dtype(value: Any) -> str | tuple[str, str]:
    if isinstance(value, (str, torch.dtype)):
        return get_format(value).name
    if isinstance(value, Sequence) and len(value) == 2:
        return (get_format(value[0]).name, get_format(value[1]).name)
    raise ValueError(f"kv_cache_dtype={value!r}; choose auto, fp8, {', '.join(FORMATS)}, or a pair of these for (K, V)")


def _parse_q_dtype(value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or ALIASES.get(value, value) != "fp8_e4m3":
        raise ValueError(f"q_dtype={value!r}; choose 'fp8' (= 'fp8_e4m3'), or None to leave queries as they are")
    return get_format(value).name


def _parse_equalize(value: Any) -> bool | str | tuple[str, ...]:
    if isinstance(value, bool) or value == "auto":
        return value
    if isinstance(value, str):
        return (get_format(value).name,)
    if isinstance(value, Sequence):
        return tuple(get_format(name).name for name in value)
    raise ValueError(f"equalize={value!r}; choose True, False, 'auto', or names of formats ({', '.join(FORMATS)})")


def _parse_skip_layers(value: Any) -> tuple[int | str, ...]:
    items = tuple(value) if isinstance(value, Collection) and not isinstance(value, str) else (value,)
    items = () if value is None else items
    if bad := [item for item in items if not is_integer(item) and not isinstance(item, str)]:
        raise ValueError(f"skip_layers holds {bad[0]!r}; give layer indices or layer types such as 'sliding_attention'")
    return tuple(item if isinstance(item, str) and not item.isdecimal() else int(item) for item in items)


def is_integer(value: Any) -> bool:
    """Python's, numpy's and others', which cannot all be written to JSON."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _format_of(scales: Any) -> str | None:
    """A calibration, and what its `to_dict` wrote, knows its format.

    So does a checkpoint, but whoever names one may want another format: `plan_layers` says what its scales are for.
    """
    if isinstance(scales, CheckpointScales):
        return None
    saved = _is_calibration(scales)
    found = scales["kv_cache_dtype"] if saved else getattr(scales, "kv_cache_dtype", None)
    return None if found is None else get_format(found).name


def _is_calibration(value: Any) -> bool:
    return isinstance(value, Mapping) and set(value) == {"kv_cache_dtype", "layers"}


def _parse_scales(value: Any) -> Any:
    """`value` with `LayerScales` where it holds what `to_dict` wrote, or JSON made of that."""
    if isinstance(value, Mapping) and set(value) == CHECKPOINT_FIELDS:
        return CheckpointScales.from_dict(value)
    if _is_calibration(value):
        return _parse_scales(value["layers"])
    if isinstance(value, Mapping) and ("k_scale" in value or "v_scale" in value):
        return LayerScales.from_dict(value)
    if isinstance(value, Mapping) and any(isinstance(entry, Mapping) for entry in value.values()):
        return {int(key) if str(key).isdecimal() else key: _parse_scales(entry) for key, entry in value.items()}
    if isinstance(value, Sequence) and any(isinstance(entry, Mapping) for entry in value):
        return [_parse_scales(entry) for entry in value]
    return value


def _plain(value: Any) -> Any:
    """`value` in the types of JSON."""
    if isinstance(value, LayerScales | CheckpointScales):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(entry) for entry in value]
    return os.fspath(value) if hasattr(value, "__fspath__") else value


def _check_scales(value: Any) -> None:
    if isinstance(value, str | LayerScales | CheckpointScales):
        return
    if isinstance(value, Mapping):
        entries, keys_right = list(value.values()), all(is_integer(key) for key in value)
    elif isinstance(value, Sequence):
        entries, keys_right = list(value), True
    elif hasattr(value, "__fspath__"):
        return
    else:
        entries, keys_right = [], False
    if not keys_right or not entries or not all(entry is None or isinstance(entry, LayerScales) for entry in entries):
        nothing = " (read_scales gives that for files without scales)" if value is None else ""
        raise TypeError(
            f"scales={reprlib.repr(value)}{nothing}; choose one of {', '.join(SCALE_SOURCES)}, a path or hub id, "
            "what read_scales or calibrate returned, LayerScales, a sequence of LayerScales (one a layer), or a dict "
            "{layer index: LayerScales}"
        )
