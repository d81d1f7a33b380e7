"""Layers that 8 bits may not suit, known before a token is seen."""

from __future__ import annotations

import os

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .checkpoints.files import CheckpointFiles
from .checkpoints.matching import bare
from .hosts.files import checkpoint_of, model_layers

# A bias of this size in a key's channel leaves fp8, with its three bits of mantissa, little of what differs between
# tokens there: models trained with such biases lose 7 to 9 % of perplexity to fp8 in any granularity, 0.2 % to int8.
LARGE_KEY_BIAS = 32.0
# Model type -> the projection that makes its keys, where the name does not begin with a k.
_KEY_PROJECTIONS = {
    "bloom": "query_key_value",
    "ctrl": "Wk",
    "falcon": "query_key_value",
    "gpt2": "c_attn",
    "gpt_bigcode": "c_attn",
    "gpt_neox": "query_key_value",
    "persimmon": "query_key_value",
}


def large_key_biases(model: PreTrainedModel) -> dict[int, float]:
    """The largest bias of the key projection of each cache layer that has one above `LARGE_KEY_BIAS`.

    Left out are layers that normalize their keys afterwards, and projections of keys and others together whose order is
    not known here. Of a model on the meta device the biases, and nothing else, are read from its checkpoint, if that is
    on this machine.
    """
    config = model.config.get_text_config(decoder=True)
    other_name = _KEY_PROJECTIONS.get(config.model_type)
    modules = dict(model.named_modules())
    names: dict[int, str] = {}
    biases: dict[int, torch.Tensor] = {}
    for index, paths in enumerate(model_layers(model).paths):
        for path in paths[:1]:  # then come other spellings of it
            children = dict(modules[path].named_children())
            if any("norm" in name and name.startswith(("k", "qk")) for name in children):
                continue
            for name, child in children.items():
                bias = getattr(child, "bias", None)  # a buffer with some quantized weights, elsewhere under adapters
                if (name.startswith("k") or name == other_name) and isinstance(bias, torch.Tensor):
                    names[index], biases[index] = f"{path}.{name}.bias", _whole(bias.detach())
    if any(bias.is_meta for bias in biases.values()):
        biases = _from_files(model, names)
    if not biases:
        return {}
    device = next(iter(biases.values())).device
    keys = [_of_keys(bias, names[index].split(".")[-2], config) for index, bias in biases.items()]
    largest = [bias.abs().amax().to(device, torch.float32) for bias in keys]
    numbers = torch.stack(largest).tolist()  # from the device at once
    return {index: number for index, number in zip(biases, numbers, strict=True) if number > LARGE_KEY_BIAS}


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    """Of a parameter that processes share, all of it: else they might choose different formats."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def _of_keys(bias: torch.Tensor, projection: str, config: PreTrainedConfig) -> torch.Tensor:
    """What of the bias of `projection` is for keys."""
    if projection not in ("query_key_value", "c_attn"):
        return bias
    if config.model_type == "gpt2":  # all queries, all keys, all values
        return bias.chunk(3)[1]
    num_heads = config.num_attention_heads
    queries_per_key = num_heads if getattr(config, "multi_query", False) else 1
    if getattr(config, "new_decoder_architecture", False):
        queries_per_key = num_heads // config.num_kv_heads
    # For each key head its queries, its key, its value.
    return bias.view(-1, queries_per_key + 2, config.hidden_size // num_heads)[:, -2]


def _from_files(model: PreTrainedModel, names: dict[int, str]) -> dict[int, torch.Tensor]:
    source, revision = checkpoint_of(model)
    if source is None:
        return {}
    try:
        files = CheckpointFiles.find(os.fspath(source), revision, fetch=False)
    except FileNotFoundError:
        return {}
    stored = {bare(name): name for name in files.tensors if name.endswith(".bias")}
    wanted = {index: stored[bare(name)] for index, name in names.items() if bare(name) in stored}
    values = files.read(wanted.values())
    return {index: values[name] for index, name in wanted.items()}
