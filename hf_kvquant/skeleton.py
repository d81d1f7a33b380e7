"""A model without its weights: what a checkpoint's configuration says about layers, before anything is loaded."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import (
    DynamicCache,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
)

from .checkpoints.files import check_name
from .hosts.attention_modules import kv_heads_of
from .hosts.configuration import config_number, layer_type_names
from .hosts.conventions import with_cache
from .policy import SidePlan

# Numbers of layers in a configuration, and how many there may be: many times those of the deepest models.
_NUM_LAYERS = re.compile(r"(^|_)(layers?|depth)$")
_MAX_LAYERS = 2**12
_OBJECTS = ("quantization_config", "text_config")
# What no configuration is to blame for.
_OF_THE_MACHINE = (ImportError, MemoryError, torch.OutOfMemoryError)


@dataclass(frozen=True)
class LayerShape:
    """Keys and values of one cache layer.

    Attributes:
        layer_type: transformers' name for it.
        num_kv_heads, k_head_dim, v_head_dim: sizes; 0 where a layer stores no keys and values.
        window: tokens that a sliding layer looks back, itself included; None for all.
        index_dim: numbers that an index over the keys adds to a token; 0 without one.
        keeps_more: whether it keeps a state beside all these, or instead of them.
        cross_attention: what the layer stores of each token of an encoder; None without one, or if that is not known.
    """

    layer_type: str
    num_kv_heads: int
    k_head_dim: int
    v_head_dim: int
    window: int | None = None
    index_dim: int = 0
    keeps_more: bool = False
    cross_attention: LayerShape | None = None

    @property
    def numbers_per_token(self) -> int:
        """Of K and V together."""
        return self.num_kv_heads * (self.k_head_dim + self.v_head_dim)

    def bytes_per_token(self, k: SidePlan, v: SidePlan, dtype: torch.dtype) -> int:
        """Of keys and values that are stored by these plans, in a model of this dtype."""
        sides = ((k, self.k_head_dim), (v, self.v_head_dim))
        return sum(plan.bytes_per_token(self.num_kv_heads, head_dim, dtype) for plan, head_dim in sides)

    def num_tokens(self, context: int) -> int:
        """How many tokens of so long a context have to be kept."""
        return context if self.window is None else min(context, self.window)


def model_skeleton(
    source: str | os.PathLike[str], revision: str | None = None, attention: str = "eager"
) -> PreTrainedModel:
    """The model of a directory or hub id on the meta device: modules and shapes, no weights.

    Raises ValueError if there is no configuration, none that transformers knows, or none that makes a model.
    """
    config = read_configuration(source, revision)
    dtype = config.get_text_config(decoder=True).dtype or config.dtype or torch.float32
    model_class = _model_class(source, config)
    make = model_class.from_config if model_class is AutoModelForCausalLM else model_class._from_config
    with building(source), torch.device("meta"):
        # With the plainest attention and the usual dtype every model can be traced.
        model: PreTrainedModel = make(config, dtype=torch.bfloat16, attn_implementation=attention)
    model.config._name_or_path = str(source)
    model.config._commit_hash = getattr(config, "_commit_hash", None) or revision
    # What its weights are in. The text part may be a copy that is made whenever it is asked for.
    for part in (model.config, model.config.get_text_config(decoder=True)):
        part.dtype = dtype
    return model.eval()


def read_configuration(source: str | os.PathLike[str], revision: str | None = None) -> PreTrainedConfig:
    """The configuration of a directory or hub id, without what it says about quantized weights.

    Raises ValueError if there is none that transformers knows, and if it asks for more layers than any model has;
    TypeError for what is no name.
    """
    check_name(source)
    try:
        # As it is in the file: some kinds of configuration make lists as long as they have layers.
        content, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
        _check_content(content)
        config: PreTrainedConfig = AutoConfig.from_pretrained(source, revision=revision)
        if not isinstance(config.get_text_config(decoder=True), PreTrainedConfig):
            raise ValueError(f"it has a text_config, which a {config.model_type} does not take")
    except _OF_THE_MACHINE:
        raise
    except Exception as error:  # code of any configuration, some of which computes with what it finds
        raise ValueError(f"{source} has no configuration that transformers can read: {_reason(error)}") from error
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config  # it is about weights, which are not loaded
    return config


@contextmanager
def building(source: str | os.PathLike[str]) -> Iterator[None]:
    """Make what a model's code raises while it is built a ValueError that names where its configuration is.

    A package or memory that is not there stays what it is.
    """
    try:
        yield
    except _OF_THE_MACHINE:
        raise
    except Exception as error:  # code of any model, some of which divides by what it is told
        raise ValueError(f"no model can be built by the configuration of {source}: {_reason(error)}") from error


def _check_content(content: dict[str, Any]) -> None:
    """Raise ValueError for what (a part of) config.json cannot have, and for more layers than can be built."""
    for name, value in content.items():
        if isinstance(value, dict):
            _check_content(value)
        elif name in _OBJECTS and value is not None:
            raise ValueError(f"{name} is a {type(value).__name__}, not an object")
        elif isinstance(value, int) and _NUM_LAYERS.search(name) and value > _MAX_LAYERS:
            raise ValueError(f"{name} is {value:,}; more than {_MAX_LAYERS:,} are not built")


def _model_class(source: str | os.PathLike[str], config: PreTrainedConfig) -> Any:
    """The first of its architectures that transformers has; without one, whatever generates text.

    Raises ValueError if what transformers has of that name is no model.
    """
    for name in getattr(config, "architectures", None) or ():
        if not isinstance(name, str):
            raise ValueError(f"architectures in the configuration of {source} has {name!r}, which is no name")
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
        if found is not None:
            raise ValueError(f"architectures in the configuration of {source} has {name!r}, which is no model")
    return AutoModelForCausalLM


def _reason(error: Exception) -> str:
    """In a line, without the addresses in torch's own code that some of its messages end with."""
    message = " ".join(str(error).partition("\nException raised from")[0].split())
    return message if isinstance(error, (OSError, ValueError)) and message else f"{type(error).__name__}: {message}"


def layer_shapes(model: PreTrainedModel) -> tuple[list[LayerShape], list[str]]:
    """What each cache layer of a model on the meta device stores, and notes on what could only be guessed.

    Raises ValueError if that cannot be found out.
    """
    config = model.config.get_text_config(decoder=True)
    cache = DynamicCache(config=config)
    types = layer_type_names(config, cache.layers)
    cross: list[LayerShape | None] = [None] * len(cache.layers)
    notes: list[str] = []
    try:
        encoded = run_skeleton(model, cache)
    except Exception as error:  # code of any model, some of which looks at numbers, and there are none here
        sizes = [_configured(config) if isinstance(layer, DynamicLayer) else (0, 0, 0) for layer in cache.layers]
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        notes.append(
            f"sizes of keys and values are the configuration's: the model does not run without weights ({reason})"
        )
    else:
        sizes = [_cached(layer) for layer in cache.layers]
        for index, layer in enumerate(encoded.layers[: len(cross)]):
            cross[index] = LayerShape("cross_attention", *_cached(layer))
    # Some versions of transformers have layers that hold nothing, for those that use the keys of another.
    dummies = getattr(cache, "is_dummy", [False] * len(cache.layers))
    shapes = []
    for layer, name, size, of_encoder, is_dummy in zip(cache.layers, types, sizes, cross, dummies, strict=True):
        window = getattr(layer, "sliding_window", None)
        keeps_more = not is_dummy and _keeps_more(layer)
        shapes.append(LayerShape(name, *size, window, _index_dim(layer), keeps_more, of_encoder))
    return shapes, notes


def run_skeleton(model: PreTrainedModel, cache: DynamicCache, num_tokens: int = 2) -> DynamicCache:
    """One step over `cache`; returns what cross-attention keeps. May raise whatever the model's code raises."""
    encoded = DynamicCache()
    tokens = torch.zeros(2, num_tokens, dtype=torch.int64, device="meta")  # what is done for one text may be special
    with torch.device("meta"), torch.no_grad():
        if model.config.is_encoder_decoder:
            both = EncoderDecoderCache(cache, encoded)
            model(input_ids=tokens, decoder_input_ids=tokens, **with_cache(both))
        else:
            model(input_ids=tokens, **with_cache(cache))
    return encoded


def _cached(layer: object) -> tuple[int, int, int]:
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if not isinstance(keys, torch.Tensor) or keys.ndim != 4:
        return 0, 0, 0
    return keys.shape[1], keys.shape[3], values.shape[3] if isinstance(values, torch.Tensor) else 0


def _index_dim(layer: object) -> int:
    index = getattr(layer, "indexer_keys", None)
    return index.shape[-1] if isinstance(index, torch.Tensor) else 0


def _keeps_more(layer: object) -> bool:
    if type(layer) is DynamicIndexedLayer:
        return not _index_dim(layer) or getattr(layer, "indexer_position_ids", None) is not None
    return type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer)


def _configured(config: PreTrainedConfig) -> tuple[int, int, int]:
    num_heads, num_kv_heads = config_number(config, "num_attention_heads"), kv_heads_of(config)
    head_dim, hidden_size = config_number(config, "head_dim"), config_number(config, "hidden_size")
    if head_dim is None and num_heads and hidden_size:
        head_dim = hidden_size // num_heads
    if not num_kv_heads or not head_dim:
        raise ValueError(
            f"how keys and values of a {config.model_type} are shaped cannot be told from its configuration"
        )
    return num_kv_heads, head_dim, head_dim
