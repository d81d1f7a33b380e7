"""`write_scales`: scales of a calibration, or of another checkpoint, into the files of a model."""

from __future__ import annotations

import os

from transformers import PreTrainedModel

from .checkpoints import ModelLayers
from .checkpoints.writing import HasScales, WrittenScales, write_checkpoint
from .hosts import model_layers
from .skeleton import model_skeleton


def write_scales(
    scales: HasScales,
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    layout: str = "auto",
    model: PreTrainedModel | ModelLayers | None = None,
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

    Warns, before anything is written, if readers of this layout cannot read these scales. Raises ValueError, also
    before, if the layout cannot hold them or the checkpoint cannot be added to. Every file appears at once, the
    declaration last: a crash leaves a checkpoint with all its weights.
    """
    if model is None:
        model = getattr(scales, "model_layers", None) or model_skeleton(checkpoint)
    layers = model_layers(model) if isinstance(model, PreTrainedModel) else model
    return write_checkpoint(scales, layers, checkpoint, output, layout, getattr(scales, "settings", None))
