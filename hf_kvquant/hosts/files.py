"""The files that a model came from, and what its layers are called in them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter

from ..checkpoints import ModelLayers
from ..checkpoints.snapshots import loaded_commits
from .attention_modules import attention_paths, kv_heads_of
from .wrappers import without_wrapper


def checkpoint_of(model: PreTrainedModel) -> tuple[str | None, str | None]:
    """Where the model was loaded from (directory or hub id) and which revision; (None, None) if from nowhere.

    Where transformers does not say which revision, it is one whose weights are on this machine.
    """
    path = getattr(model.config, "_name_or_path", None) or getattr(model, "name_or_path", None)
    if not path:
        return None, None
    if os.path.isdir(path):
        return path, None
    return path, getattr(model.config, "_commit_hash", None) or next(iter(loaded_commits(path)), None)


def model_layers(model: Any) -> ModelLayers:
    """What reading scales needs to know of the layers of `model`, wrapped or not; if `model` is that, `model` itself.

    Raises TypeError for what is no transformers model.
    """
    if isinstance(model, ModelLayers):
        return model
    model = without_wrapper(model)
    config = model.config.get_text_config(decoder=True)
    layers = DynamicCache(config=config).layers
    paths = [
        # Layers that use the keys of another, or keep a state of another kind, have none to scale.
        path if isinstance(layer, DynamicLayer) else None
        for layer, path in zip(layers, attention_paths(model, len(layers)), strict=True)
    ]
    num_kv_heads = [kv_heads_of(config, None if path is None else model.get_submodule(path)) for path in paths]
    in_files = _paths_in_files(model, [path for path in paths if path is not None])
    names = [[] if path is None else list(dict.fromkeys([path, in_files[path]])) for path in paths]
    return ModelLayers(names, num_kv_heads, model.config.model_type)


def _paths_in_files(model: PreTrainedModel, paths: Sequence[str]) -> dict[str, str]:
    """What the modules at `paths` are called in checkpoints, whose names transformers changes while it loads some."""
    changes = get_model_conversion_mapping(model, add_legacy=False)
    # Prefixes are left to matching, which knows them all. Names in files are what saving makes: the changes backwards,
    # one that makes other tensors before those of names alone.
    back = [change.reverse_transform() for change in reversed(changes) if not isinstance(change, PrefixChange)]
    back.sort(key=lambda change: not isinstance(change, WeightConverter))

    def in_files(name: str) -> str:
        is_made = False
        for change in back:
            if not (isinstance(change, WeightConverter) and is_made):
                name, made_by = change.rename_source_key(name)
                is_made |= made_by is not None
        return name

    found = {}
    for path in paths:
        names = [name for name, _ in model.get_submodule(path).named_parameters() if name.count(".") == 1]
        # Some of these projections and norms may be elsewhere in files: most are in the module.
        parents = [in_files(f"{path}.{name}").rsplit(".", 2)[0] for name in names]
        found[path] = Counter(parents).most_common(1)[0][0] if parents else path
    return found
