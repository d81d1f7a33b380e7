"""`read_scales`: the KV scales of files, for the layers of a model."""

from __future__ import annotations

import os

from transformers import PreTrainedModel

from .checkpoints import CheckpointScales, ModelLayers, Wanted, read_checkpoint
from .hosts import checkpoint_of, model_layers


def read_scales(
    source: str | os.PathLike[str] | PreTrainedModel,
    model: PreTrainedModel | ModelLayers | None = None,
    *,
    revision: str | None = None,
    fetch: bool = True,
    kv_cache_dtype: str = "int8",
    granularity: str = "channel",
) -> CheckpointScales | None:
    """The KV scales in a checkpoint, or None if it neither declares nor holds any.

    Args:
        source: a directory, a file, a hub id (its snapshot is used; if it is not on this machine, only the files that
            matter are fetched), or a loaded model: the checkpoint that it came from.
        model: the model whose layers the scales are wanted for, loaded or on the meta device. Without it layers are
            ordered by the number in their path.
        revision: of a hub id.
        fetch: whether a hub id that is not on this machine may be fetched; if not, it is a FileNotFoundError.
        kv_cache_dtype, granularity: what to make of statistics that leave it open (LMDeploy's `key_stats.pth`).

    Raises ValueError naming file and key for scales that are NaN or infinite, for a declared format without a usable
    scale, for layers that cannot be matched and for formats that are not 8-bit.
    """
    if isinstance(source, PreTrainedModel):
        model = model if model is not None else source
        path, revision = checkpoint_of(source)
        if path is None:
            return None
        source = path
    layers = model_layers(model) if isinstance(model, PreTrainedModel) else model
    wanted = Wanted(layers, kv_cache_dtype, granularity)
    return read_checkpoint(source, wanted, revision=revision, fetch=fetch)
