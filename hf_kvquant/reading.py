"""`read_scales`: the KV scales of files, for the layers of a model."""

from __future__ import annotations

import os
from collections.abc import Hashable
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from .checkpoint_scales import CheckpointScales
from .checkpoints import ModelLayers, NoUsableScalesError, Wanted, read_checkpoint
from .checkpoints.snapshots import loaded_commits
from .hosts.files import checkpoint_of, model_layers
from .hosts.wrappers import without_wrapper

logger = logging.get_logger(__name__)

# What was read for a model's own checkpoint, or why it is of no use, and from which state of it: every `generate` asks,
# and the names of a hundred thousand tensors take seconds.
_own: WeakKeyDictionary[PreTrainedModel, tuple[Hashable, CheckpointScales | str | None]] = WeakKeyDictionary()


def read_scales(
    source: str | os.PathLike[str] | PreTrainedModel,
    model: PreTrainedModel | ModelLayers | None = None,
    *,
    revision: str | None = None,
    fetch: bool = True,
    kv_cache_dtype: str | torch.dtype = "int8",
    granularity: str = "channel",
) -> CheckpointScales | None:
    """The KV scales in a checkpoint, as `scales=` of a cache takes them; None if it neither declares nor holds any.

    Args:
        source: a directory, a file, a hub id (its snapshot is used; if it is not on this machine, only the files that
            matter are fetched), or a loaded model: the checkpoint that it came from.
        model: the model whose layers the scales are wanted for, loaded or on the meta device. Without it layers are
            ordered by the number in their path.
        revision: of a hub id.
        fetch: whether a hub id that is not on this machine may be fetched; if not, it is a FileNotFoundError, as is a
            loaded model's directory with neither scales nor config.json.
        kv_cache_dtype, granularity: what to make of statistics that leave it open (LMDeploy's `key_stats.pth`): `fp8`
            (= `fp8_e4m3`), `fp8_e5m2` or `int8`, per `tensor`, `head` or `channel`.

    Raises ValueError for a format or granularity that does not exist, whatever the files hold; and naming file and key
    for scales that are NaN or infinite, for a declared format without a usable scale, for layers that cannot be matched
    and for formats that are not 8-bit; TypeError for what names no files, and for what is no model.
    """
    if model is not None and not isinstance(model, ModelLayers):
        model = without_wrapper(model)
    wanted = Wanted(None, kv_cache_dtype, granularity)  # refuses what is wrong, whatever the files hold
    if isinstance(source, torch.nn.Module):
        source = without_wrapper(source)
        path, revision = checkpoint_of(source)
        if path is None:
            return None
        if model is None or model is source:
            return _read_own(source, path, revision, fetch, wanted)
        source = path
    layers = None if model is None else model_layers(model)
    return read_checkpoint(source, replace(wanted, model=layers), revision=revision, fetch=fetch)


def _read_own(
    model: PreTrainedModel, path: str, revision: str | None, fetch: bool, wanted: Wanted
) -> CheckpointScales | None:
    state = _state(path) or revision  # a hub's revision never changes
    known = _own.get(model)
    asked = (path, state, fetch, wanted.kv_cache_dtype, wanted.granularity)
    if known is None or state is None or known[0] != asked:
        wanted = replace(wanted, model=model_layers(model))
        try:
            found = read_checkpoint(path, wanted, revision=revision, fetch=fetch)
        except NoUsableScalesError as error:
            _own[model] = (asked, str(error))
            raise
        has_config = not os.path.isdir(path) or os.path.exists(os.path.join(path, "config.json"))
        if found is None and not fetch and not has_config:
            raise FileNotFoundError(f"{path} has no config.json, so the model may come from a folder in it")
        if found is not None and revision is not None and getattr(model.config, "_commit_hash", None) is None:
            _warn_of_others(found, path, revision, wanted)
        _own[model] = known = (asked, found)
    if isinstance(known[1], str):
        raise NoUsableScalesError(known[1])
    return known[1]


def _warn_of_others(found: CheckpointScales, path: str, revision: str, wanted: Wanted) -> None:
    """Say so if the model may as well be of another revision, with other scales."""
    for other in loaded_commits(path)[1:]:  # the first is `revision`
        try:
            scales = read_checkpoint(path, wanted, revision=other, fetch=False)
        except (ValueError, FileNotFoundError):
            scales = None
        if scales is None or (scales.kv_cache_dtype, _numbers(scales)) != (found.kv_cache_dtype, _numbers(found)):
            found.notes.append(
                f"scales are those of {path} at {revision}; {other} is on this machine as well and has others, and "
                "which one was loaded is not known: if it is that, name its directory with scales=..."
            )
            logger.warning_once(f"{found.notes[-1]}.")


def _numbers(scales: CheckpointScales) -> list[dict[str, Any] | None]:
    return [None if layer is None else layer.to_dict() for layer in scales.layers]


def _state(path: str) -> Hashable:
    """What changes when a file of the directory does; None if there is no such directory."""
    if not os.path.isdir(path):
        return None
    with os.scandir(path) as files:
        stats = {file.name: file.stat() for file in files if os.path.exists(file)}
    return tuple(sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()))
