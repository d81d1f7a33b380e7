"""`diagnose`: what the cache will do with a model, from its files alone, before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from .cache import QuantizedPagedCache
from .config import KVQuantConfig
from .interface import uses_attention_interface
from .layers import PagedLayer
from .ops import cpu
from .skeleton import LayerShape, layer_shapes, model_skeleton, run_skeleton
from .tables import pair, printable, size, table


@dataclass(frozen=True)
class LayerDiagnosis:
    """One cache layer.

    Attributes:
        layer: index in the cache.
        layer_type: transformers' name for it.
        kv_cache_dtype: formats of K and V.
        scales: where the scales of K and V come from.
        bytes_per_token: stored for a token.
        model_dtype_bytes_per_token: the same in the model's dtype.
        risk: why its formats may not suit it, or None; with `auto` such a layer gets others, and a note says so.
    """

    layer: int
    layer_type: str
    kv_cache_dtype: tuple[str, str]
    scales: tuple[str, str]
    bytes_per_token: int
    model_dtype_bytes_per_token: int
    risk: str | None = None


@dataclass(frozen=True)
class Diagnosis:
    """What the cache will do with a model. `str()` is a table.

    Attributes:
        model: directory or hub id.
        model_type: transformers' name of its architecture.
        dtype: of its weights, and of a cache without quantization.
        device: what was asked about.
        kernels: what computes attention over the pages there.
        attention: whether the model's attention reads the pages itself.
        layers: those that are in pages.
        bytes_per_token, model_dtype_bytes_per_token: of all layers together, while no window is full.
        notes: decisions and what to know of them.
    """

    model: str
    model_type: str
    dtype: str
    device: str
    kernels: str
    attention: str
    layers: list[LayerDiagnosis]
    bytes_per_token: int
    model_dtype_bytes_per_token: int
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        rows = [("layer", "type", "format", "scales", "bytes/token", "model dtype", "risk")]
        for layer in self.layers:
            sizes = (str(layer.bytes_per_token), str(layer.model_dtype_bytes_per_token))
            names = (pair(layer.kv_cache_dtype), pair(layer.scales))
            rows.append((str(layer.layer), layer.layer_type, *names, *sizes, layer.risk or "-"))
        share = self.bytes_per_token / self.model_dtype_bytes_per_token if self.model_dtype_bytes_per_token else 1.0
        lines = [
            f"{self.model} ({self.model_type}, {self.dtype}) on {self.device}",
            table(rows),
            f"a token takes {size(self.bytes_per_token)}, {size(self.model_dtype_bytes_per_token)} in {self.dtype} "
            f"({share:.3f} of it)",
            f"attention: {self.attention}",
            f"kernels: {self.kernels}",
        ]
        return printable("\n".join(lines + [f"note: {note}" for note in self.notes]))


def diagnose(
    source: str | os.PathLike[str],
    options: Mapping[str, Any] | None = None,
    *,
    device: str | None = None,
    revision: str | None = None,
) -> Diagnosis:
    """What the cache does with the model of a directory or hub id: formats, scales, bytes, and layers at risk.

    Only the configuration, the headers of the weight files and the few tensors that matter are read.

    Args:
        source: directory or hub id.
        options: as in `cache_config`.
        device: what the model is to run on, such as `cpu` or `cuda`; by default the accelerator of this machine, else
            its CPU.
        revision: of a hub id.

    Raises ValueError for options that do not fit the model, and for a source without a configuration.
    """
    model = model_skeleton(source, revision)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    try:
        where = torch.device(device) if device else accelerator or torch.device("cpu")
    except RuntimeError as error:
        raise ValueError(f"device={device!r} is no device; give cpu, cuda, cuda:1, ...") from error
    cache = QuantizedPagedCache.for_generation(model, options)
    shapes, guesses = layer_shapes(model)
    dtype = model.config.get_text_config(decoder=True).dtype
    layers = []
    for layer, shape in zip(cache.layers, shapes, strict=True):
        if isinstance(layer, PagedLayer):
            layers.append(_diagnose(layer, shape, dtype))
    notes = [*cache.notes, *guesses]
    # Some versions of transformers have layers that hold nothing, for those that use the keys of another.
    if others := len(cache.layers) - len(layers) - sum(getattr(cache, "is_dummy", ())):
        notes.append(f"{others} layers keep a state of another kind, which stays as transformers has it")
    return Diagnosis(
        str(source),
        model.config.model_type,
        str(dtype).removeprefix("torch."),
        str(where),
        _kernels(where, dtype, shapes),
        _attention(source, revision, model),
        layers,
        sum(layer.bytes_per_token for layer in layers),
        sum(layer.model_dtype_bytes_per_token for layer in layers),
        notes,
    )


def _diagnose(layer: PagedLayer, shape: LayerShape, dtype: torch.dtype) -> LayerDiagnosis:
    plans = (layer.plan.k, layer.plan.v)
    risks = [f"{side}: {plan.risk}" for side, plan in zip("KV", plans, strict=True) if plan.risk]
    return LayerDiagnosis(
        layer.index,
        layer.layer_type,
        (plans[0].format, plans[1].format),
        (plans[0].source, plans[1].source),
        shape.bytes_per_token(*plans, dtype),
        shape.numbers_per_token * dtype.itemsize,
        "; ".join(risks) or None,
    )


def _attention(source: str | os.PathLike[str], revision: str | None, model: PreTrainedModel) -> str:
    if not uses_attention_interface(model.config.get_text_config(decoder=True)):
        return "the model computes it itself, from dense keys and values (storage only)"
    reasons, is_sure = _dense_reasons(source, revision)
    if reasons:
        return f"over dense keys and values, which are read from the pages: {'; '.join(reasons)} (storage only)"
    others = "any other gets dense keys and values"
    if is_sure:
        return f"attn_implementation='kvquant' reads the pages; {others}"
    return (
        "attn_implementation='kvquant' reads the pages, unless the model itself computes with keys or values on the "
        f"way, which does not show without weights (`cache.report()` says it); {others}"
    )


def _dense_reasons(source: str | os.PathLike[str], revision: str | None) -> tuple[list[str], bool]:
    """Why layers are read as dense tensors under our attention, and whether that is all: some models do not run."""
    model = model_skeleton(source, revision, "kvquant")  # where it is changed later, some models take no notice
    cache = QuantizedPagedCache(model.config, KVQuantConfig(kv_cache_dtype="model"))
    layers = [layer for layer in cache.layers if isinstance(layer, PagedLayer)]
    is_sure = True
    try:
        for num_tokens in (2, 1):  # a prompt's attention does not ask for pages
            run_skeleton(model, cache, num_tokens)
    except Exception:  # code of any model, some of which looks at numbers, and there are none here
        is_sure = False
    return list(dict.fromkeys(reason for layer in layers for reason in layer.dense_reasons)), is_sure


def _kernels(device: torch.device, dtype: torch.dtype, shapes: list[LayerShape]) -> str:
    if device.type == "cpu":
        return cpu.outlook()
    if device.type != "cuda":
        return "plain torch, which is slow: there are none for this device"
    if not torch.cuda.is_available():
        return "Triton kernels, from compute capability 8.0 on (there is no such device here)"
    try:
        from .ops import triton
    except ImportError as error:
        return f"plain torch, because Triton cannot be imported ({error})"
    reasons = [triton.why_not(device, dtype, shape.k_head_dim, shape.v_head_dim) for shape in set(shapes)]
    reason = next((reason for reason in reasons if reason is not None), None)
    return "Triton kernels" if reason is None else f"plain torch, because {reason}"
