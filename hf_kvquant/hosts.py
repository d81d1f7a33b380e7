"""What has to be known of transformers and of a loaded model: conventions, layers, files, fake quantization."""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from .checkpoints import ModelLayers

# What models and `generate` have called their cache, the newest name first; from 5.24 on there is only that.
CACHE_NAMES = ("cache", "past_key_values", "cache_params")
CACHE_NAME = "cache" if Version(transformers.__version__) >= Version("5.24.dev0") else "past_key_values"


def with_cache(cache: Any) -> dict[str, Any]:
    """Arguments of a model's call that let it go on from `cache`."""
    return {CACHE_NAME: cache, "use_cache": True}


def layer_type_names(config: PreTrainedConfig, layers: Sequence[Any]) -> list[str]:
    """The host's name of each cache layer's type, from the configuration or, without one, from the layer's class."""
    names = list(getattr(config, "layer_types", None) or ())[: len(layers)]
    if len(names) == len(layers):
        return [str(name) for name in names]
    return ["sliding_attention" if getattr(layer, "is_sliding", False) else "full_attention" for layer in layers]


def without_wrapper(model: Any) -> PreTrainedModel:
    """The transformers model, also where adapters (peft) have put one of their own around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def evaluating(*models: torch.nn.Module) -> Iterator[None]:
    """Models in evaluation mode, for a while."""
    were_training = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model, was_training in zip(models, were_training, strict=True):
            model.train(was_training)


def attention_paths(model: PreTrainedModel, num_layers: int) -> list[list[str]]:
    """For each cache layer the paths of the attention modules that carry its index."""
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        index = getattr(module, "layer_idx", getattr(module, "layer_id", None))
        name = type(module).__name__.lower()
        if isinstance(index, int) and ("attention" in name or name.endswith("mla")):
            paths.setdefault(index, []).append(path)
    return [paths.get(index, []) for index in range(num_layers)]


def layer_devices(model: PreTrainedModel, num_layers: int) -> list[torch.device]:
    """For each cache layer the device on which its attention runs, which need not be where its weights are kept."""
    modules = dict(model.named_modules())
    devices = []
    for paths in attention_paths(model, num_layers):
        device = model.device
        for module in (modules[path] for path in paths[:1]):
            runs_on = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
            weight = next(module.parameters(), None)
            if runs_on is not None:
                device = torch.device(runs_on)
            elif weight is not None:
                device = weight.device
        devices.append(device)
    return devices


def model_layers(model: PreTrainedModel) -> ModelLayers:
    """What reading scales needs to know of the layers of `model`."""
    config = model.config.get_text_config(decoder=True)
    layers = DynamicCache(config=config).layers
    paths = [
        # Layers that use the keys of another, or keep a state of another kind, have none to scale.
        of_layer if isinstance(layer, DynamicLayer) else []
        for layer, of_layer in zip(layers, attention_paths(model, len(layers)), strict=True)
    ]
    modules = dict(model.named_modules())
    return ModelLayers(paths, [_num_kv_heads(config, [modules[path] for path in of_layer]) for of_layer in paths],
                       model.config.model_type)  # fmt: skip


def _num_kv_heads(config: PreTrainedConfig, modules: Sequence[torch.nn.Module]) -> int | None:
    num_heads = getattr(config, "num_attention_heads", None)
    for module in modules:  # layers may differ
        groups = getattr(module, "num_key_value_groups", None)
        if isinstance(groups, int) and groups > 0 and isinstance(num_heads, int):
            return num_heads // groups
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    return num_kv_heads if isinstance(num_kv_heads, int) else None


def checkpoint_of(model: PreTrainedModel) -> tuple[str | None, str | None]:
    """Where the model was loaded from (directory or hub id) and which revision; (None, None) if from nowhere."""
    path = getattr(model.config, "_name_or_path", None) or getattr(model, "name_or_path", None)
    if not path:
        return None, None
    revision = getattr(model.config, "_commit_hash", None)
    return path, (None if os.path.isdir(path) else revision)


def disable_fake_quantization(model: PreTrainedModel) -> list[str]:
    """Stop compressed-tensors from rounding K and V on their way to the cache; returns a line for the report.

    Its integration quantizes and dequantizes keys and values inside the model and stores the result in the model's
    dtype. With 8-bit pages that would round twice.
    """
    modules = [
        module for module in model.modules() if hasattr(module, "quantization_scheme") and hasattr(module, "kv_cache")
    ]
    for module in modules:
        module.quantization_enabled = False
    if not modules:
        return []
    return [
        f"compressed-tensors rounded K and V of {len(modules)} layers to 8 bits but stored them in the model's dtype; "
        "that rounding is off now, and storage is really 8-bit"
    ]


def attention_name(config: PreTrainedConfig) -> str:
    """The attention implementation that runs in the end, also where compressed-tensors has put its own before it."""
    name = config._attn_implementation or ""
    wrapper = sys.modules.get("compressed_tensors.modeling.attention")
    if wrapper is not None and name == wrapper.HOOKED_ATTENTION_NAME:
        name = wrapper.QuantizedAttentionImpl._original_impl
    return str(name)


def attention_by_part(model: PreTrainedModel) -> dict[str, str | None]:
    """The attention implementations of the model and its parts, as `set_attn_implementation` takes them."""
    config = model.config
    parts = {"": config, **{part: getattr(config, part, None) for part in config.sub_configs}}
    return {part: own._attn_implementation for part, own in parts.items() if own is not None}


def is_fused(config: PreTrainedConfig) -> bool:
    """Whether the model's attention is this package's, so that it reads pages itself."""
    return attention_name(config).startswith("kvquant")


_uses_interface: dict[type, bool] = {}
_UPDATE = re.compile(r"(past_key_values|cache)\.update\(")


@torch.compiler.assume_constant_result
def uses_attention_interface(config: PreTrainedConfig) -> bool:
    """Whether models of this configuration call the attention function they are configured with.

    Some older ones compute their attention themselves and take no notice. It is the host's own test, which looks at the
    source of the model, and one for modules in which only another part, such as a vision tower, does call it; a model
    that the host cannot find (remote code) is taken to follow the configuration.
    """
    kind = type(config)
    if kind not in _uses_interface:
        classes = [mapping[kind] for mapping in (MODEL_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING) if kind in mapping]
        classes = [c for entry in classes for c in (entry if isinstance(entry, (tuple, list)) else (entry,))]
        _uses_interface[kind] = all(cls._can_set_attn_implementation() and not _attends_itself(cls) for cls in classes)
    return _uses_interface[kind]


def _attends_itself(model_class: type) -> bool:
    """Whether some class next to the model's puts keys into a cache but does not ask for the configured attention."""
    try:
        source = inspect.getsource(sys.modules[model_class.__module__])
    except (KeyError, OSError, TypeError):
        return False
    classes = re.split(r"^(?=class )", source, flags=re.MULTILINE)
    return any(_UPDATE.search(text) and ".get_interface(" not in text for text in classes)


def tokens_to_take_back(tokens_to_remove: int, get_seq_length: Callable[[], Any]) -> int:
    """What `crop`'s argument means to the installed host.

    Raises ValueError for a positive number from transformers 5.18 on, as the host's own caches do.
    """
    if tokens_to_remove <= 0:
        return -tokens_to_remove
    if Version(transformers.__version__) >= Version("5.18"):
        raise ValueError(f"crop({tokens_to_remove}): pass a negative number, the tokens to take back")
    return max(int(get_seq_length()) - tokens_to_remove, 0)
