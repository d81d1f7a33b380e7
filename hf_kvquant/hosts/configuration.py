"""What a configuration says of layers and lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig


def layer_type_names(config: PreTrainedConfig, layers: Sequence[Any]) -> list[str]:
    """transformers' name of each cache layer's type, from the configuration or, without one, from the layer's class."""
    names = list(getattr(config, "layer_types", None) or ())[: len(layers)]
    if len(names) == len(layers):
        return [str(name) for name in names]
    return ["sliding_attention" if getattr(layer, "is_sliding", False) else "full_attention" for layer in layers]


def fed_by_images(config: PreTrainedConfig) -> Sequence[int]:
    """The layers whose keys and values are of images instead of text: as many as those have, however long the text."""
    return getattr(config, "cross_attention_layers", None) or ()


def config_number(config: PreTrainedConfig, name: str) -> int | None:
    """A number of the configuration, None if it has none or if layers differ in it."""
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # transformers' where layers differ
        return None
    return value if isinstance(value, int) else None


def longest_sequence(config: PreTrainedConfig) -> int | None:
    """Tokens that a model of this configuration is made for; None if it does not say."""
    longest = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return longest if isinstance(longest, int) else None
