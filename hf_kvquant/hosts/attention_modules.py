"""The modules that feed cache layers."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .configuration import config_number


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
