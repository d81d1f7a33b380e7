"""What has to be known of transformers and of a loaded model: conventions, layers, files, fake quantization."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter

from .checkpoints import ModelLayers
from .checkpoints.snapshots import loaded_commits

# What models and `generate` have called their cache, the newest name first; from 5.24 on there is only that.
CACHE_NAMES = ("cache", "past_key_values", "cache_params")
CACHE_NAME = "cache" if Version(transformers.__version__) >= Version("5.24.dev0") else "past_key_values"


def with_cache(cache: Any) -> dict[str, Any]:
    """Arguments of a model's call that let it go on from `cache`."""
    return {CACHE_NAME: cache, "use_cache": True}


def layer_type_names(config: PreTrainedConfig, layers: Sequence[Any]) -> list[str]:
    """transformers' name of each cache layer's type, from the configuration or, without one, from the layer's class."""
    names = list(getattr(config, "layer_types", None) or ())[: len(layers)]
    if len(names) == len(layers):
        return [str(name) for name in names]
    return ["sliding_attention" if getattr(layer, "is_sliding", False) else "full_attention" for layer in layers]


def fed_by_images(config: PreTrainedConfig) -> Sequence[int]:
    """The layers whose keys and values are of images instead of text: as many as those have, however long the text."""
    return getattr(config, "cross_attention_layers", None) or ()


def without_wrapper(model: Any) -> PreTrainedModel:
    """The transformers model, also where adapters (peft), `torch.compile` or data parallelism have wrapped it.

    Raises TypeError for anything else.
    """
    inner: Any = model
    while isinstance(inner, torch.nn.Module) and not isinstance(inner, PreTrainedModel):
        get_base_model = getattr(inner, "get_base_model", None)
        if callable(get_base_model):
            inner = get_base_model()
        else:
            inner = getattr(inner, "_orig_mod", getattr(inner, "module", None))
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(f"{type(model).__name__} is no transformers model; give what from_pretrained has returned")
    return inner


def without_data_parallelism(model: Any) -> Any:
    """The model to call with a cache, which data parallelism would split or wait with for others; adapters stay.

    Raises TypeError for what is no transformers model.
    """
    without_wrapper(model)
    while isinstance(model, (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)):
        model = model.module
    return model


@contextmanager
def evaluating(*models: torch.nn.Module) -> Iterator[None]:
    """The models in evaluation mode; afterwards each of their modules is in the mode that it was in."""
    before = [(model, model.training) for model in models]
    of_modules = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model, was_training in before:
            model.train(was_training)  # which may do more than set this
        for module, was_training in of_modules:
            module.training = was_training


def attention_paths(model: PreTrainedModel, num_layers: int) -> list[str | None]:
    """For each cache layer the path of the module that feeds it, None where there is none.

    Of the modules with "attention" in their class's name and the layer's index it is the innermost and first below the
    decoder: others wrap it, attend to an encoder, or are of an encoder or a vision tower whose layers count from 0 too.
    """
    decoder = model.get_decoder()
    inside = next((path for path, module in model.named_modules() if module is decoder), "")
    # Some models call their output layer a decoder.
    paths = _attention_by_index(decoder, inside) or _attention_by_index(model, "")
    return [paths.get(index) for index in range(num_layers)]


def _attention_by_index(decoder: torch.nn.Module, inside: str) -> dict[int, str]:
    paths: dict[int, str] = {}
    for path, module in decoder.named_modules(prefix=inside):
        index = getattr(module, "layer_idx", getattr(module, "layer_id", None))
        name = type(module).__name__.lower()
        if isinstance(index, int) and ("attention" in name or name.endswith("mla")):
            first = paths.setdefault(index, path)
            if path.startswith(f"{first}."):
                paths[index] = path
    return paths


def layer_devices(model: PreTrainedModel, num_layers: int) -> list[torch.device]:
    """For each cache layer the device on which its attention runs, which need not be where its weights are kept."""
    modules = dict(model.named_modules())
    usual = input_device(model)
    paths = attention_paths(model, num_layers)
    return [usual if path is None else _runs_on(modules[path]) or usual for path in paths]


def input_device(model: Any) -> torch.device:
    """The device for token ids: the model's, or where its weights are offloaded, the one on which it runs."""
    model = without_wrapper(model)
    device = model.device
    return device if device.type != "meta" else _runs_on(model) or device


def _runs_on(module: torch.nn.Module) -> torch.device | None:
    """The device on which a module runs; None if neither accelerate's hooks nor weights tell."""
    for part in module.modules():
        for hook in _hooks(part):
            device = getattr(hook, "execution_device", None)
            if device is not None and torch.device(device).type != "meta":
                return torch.device(device)
    return next((weight.device for weight in module.parameters() if weight.device.type != "meta"), None)


def _hooks(module: torch.nn.Module) -> Sequence[Any]:
    """accelerate's, by which it runs modules on other devices than their weights are kept on."""
    hook = getattr(module, "_hf_hook", None)
    return getattr(hook, "hooks", (hook,))


def kept_weight(model: torch.nn.Module, name: str) -> torch.Tensor | None:
    """What accelerate keeps of an offloaded parameter, read from the disk where it lies there; None for any other."""
    parts = name.split(".")
    # The hook is of the module that has the parameter or of one around it.
    for length in range(len(parts) - 1, -1, -1):
        for hook in _hooks(model.get_submodule(".".join(parts[:length]))):
            if weights := getattr(hook, "weights_map", None):
                with suppress(KeyError):
                    return weights[".".join(parts[length:])]
    return None


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


def config_number(config: PreTrainedConfig, name: str) -> int | None:
    """A number of the configuration, None if it has none or if layers differ in it."""
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # transformers' where layers differ
        return None
    return value if isinstance(value, int) else None


def kv_heads_of(config: PreTrainedConfig, module: torch.nn.Module | None = None) -> int | None:
    """Heads of keys and values by a layer's module, since layers may differ, else by the configuration."""
    if getattr(module, "kv_lora_rank", None) is not None:
        return None  # whether latents or what they are expanded to is stored is the model's code's choice
    own, groups = getattr(module, "num_key_value_heads", None), getattr(module, "num_key_value_groups", None)
    if isinstance(own, int) and own > 0:
        return own
    num_heads = config_number(config, "num_attention_heads")
    if isinstance(groups, int) and groups > 0 and isinstance(num_heads, int):
        return num_heads // groups
    return config_number(config, "num_key_value_heads") or num_heads


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


def tokens_to_take_back(tokens_to_remove: int, get_seq_length: Callable[[], Any]) -> int:
    """What `crop`'s argument means to the installed transformers.

    Raises ValueError for a positive number from transformers 5.18 on, as transformers' own caches do.
    """
    if tokens_to_remove <= 0:
        return -tokens_to_remove
    if Version(transformers.__version__) >= Version("5.18"):
        raise ValueError(f"crop({tokens_to_remove}): pass a negative number, the tokens to take back")
    return max(int(get_seq_length()) - tokens_to_remove, 0)


def longest_sequence(config: PreTrainedConfig) -> int | None:
    """Tokens that a model of this configuration is made for; None if it does not say."""
    longest = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return longest if isinstance(longest, int) else None
