"""`write_scales`: scales of a calibration, or of another checkpoint, into the files of a model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from .checkpoints import ModelLayers
from .checkpoints.writing import HasScales, PreparedScales, prepare_checkpoint
from .hosts.files import model_layers
from .scales import LayerScales
from .skeleton import model_skeleton


@dataclass(frozen=True)
class WrittenScales:
    """What `write_scales` wrote.

    Attributes:
        path: the directory with the scales.
        layout: how they are laid out.
        files: the files in it that are new or changed.
        notes: which readers of this layout cannot read these scales, and what did not survive.
    """

    path: str
    layout: str
    files: list[str]
    notes: list[str]


def write_scales(
    scales: HasScales,
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    layout: str = "auto",
    model: PreTrainedModel | ModelLayers | None = None,
    revision: str | None = None,
) -> WrittenScales:
    """Write KV scales into a checkpoint, a copy of it, or a file beside it.

    Args:
        scales: from `calibrate` or `read_scales`.
        checkpoint: the model's directory, or its hub id if `output` is given.
        output: a new directory for the whole checkpoint with the scales; None to add them to `checkpoint` itself, as
            one small file. For the layouts of one JSON file: the directory to put it into, by default the
            checkpoint's.
        layout: `compressed-tensors` (of llm-compressor; transformers, vLLM, SGLang and TGI read it); `modelopt` and
            `fp8` for checkpoints whose weights are quantized that way; `sidecar` (this package's own JSON file, which
            holds everything and leaves config.json alone); `vllm-json` (`kv_cache_scales.json`); or `auto`: one of the
            first three, as the checkpoint's own quantization asks for.
        model: the model whose layers these are, if it is not what the checkpoint's configuration describes.
        revision: of a hub id.

    Warns, before anything is written, if readers of this layout cannot read these scales. Raises ValueError, also
    before, if the layout cannot hold them or the checkpoint cannot be added to, and TypeError for `scales` of another
    kind and what is no model or names no files. Every file appears at once, the declaration last: a crash leaves a
    checkpoint with all its weights.
    """
    if not hasattr(scales, "kv_cache_dtype") or not hasattr(scales, "layers"):
        nothing = " (read_scales gives None for files without scales)" if scales is None else ""
        raise TypeError(
            f"scales of type {type(scales).__name__}{nothing} do not say which format they are for; give what "
            "calibrate or read_scales returned"
        )
    if model is None:
        model = getattr(scales, "model_layers", None) or model_skeleton(checkpoint, revision)
    layers = model_layers(model)
    settings = getattr(scales, "settings", None)
    prepared = _prepared(scales, layers, checkpoint, output, layout, settings, revision)
    return WrittenScales(prepared.path, prepared.layout, prepared.write(), prepared.notes)


def check_export(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    layout: str = "auto",
    kv_cache_dtype: str = "fp8_e4m3",
    granularity: str = "tensor",
    symmetric: bool = True,
    q_scale: bool = False,
    revision: str | None = None,
) -> None:
    """Whether scales of this kind could be written, before they are measured.

    Warns and raises ValueError as `write_scales` would.
    """
    layers = model_layers(model_skeleton(checkpoint, revision))
    ones = torch.ones({"tensor": (1,), "head": (2,), "channel": (2, 2)}[granularity], device="cpu")
    zeros = None if symmetric else torch.zeros_like(ones)
    one = LayerScales(ones, ones, ones.flatten()[:1] if q_scale else None, zeros, zeros)
    ones_of_layers = _Ones(kv_cache_dtype, [one if paths else None for paths in layers.paths])
    _prepared(ones_of_layers, layers, checkpoint, output, layout, None, revision)


@dataclass(frozen=True)
class _Ones:
    kv_cache_dtype: str | None
    layers: Sequence[LayerScales | None]


def _prepared(scales: HasScales, layers: ModelLayers, *arguments: Any) -> PreparedScales:
    prepared = prepare_checkpoint(scales, layers, *arguments)
    for note in prepared.notes:
        warnings.warn(f"layout {prepared.layout!r}: {note}", stacklevel=3)
    return prepared
