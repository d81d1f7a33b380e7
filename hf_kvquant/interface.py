"""Which attention implementation runs, and whether a model takes notice of the one it is configured with."""

from __future__ import annotations

import ast
import inspect
import re
import sys
import threading
from collections.abc import Sequence
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, PreTrainedConfig, PreTrainedModel


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


def is_flash(config: PreTrainedConfig) -> bool:
    """Whether attention knows by a mask alone which keys are there, which are all without one (FlashAttention)."""
    return "flash" in attention_name(config)


# What models call their cache and its parts, with whatever before it (`curr_cache`, `self_attention_cache`); what pads
# convolutions is another kind.
_CACHE = re.compile(r"(past_key_values?|layer_past|(?<!padding_)cache)$")


def uses_attention_interface(config: PreTrainedConfig) -> bool:
    """Whether models of this configuration call the attention function they are configured with.

    Some older ones compute their attention themselves and take no notice. It is transformers' own test, which looks at
    the source of the model, and one for modules in which only another part, such as a vision tower, does call it; a
    model that transformers cannot find (remote code) is taken to follow the configuration.
    """
    return any(_asks_for_attention(type(config)))


def adds_masks(config: PreTrainedConfig) -> bool:
    """Whether some part of such models, be it an encoder, computes attention itself and adds its mask to the logits."""
    return not all(_asks_for_attention(type(config)))


_asking: dict[type, list[bool]] = {}
_lock = threading.Lock()


@torch.compiler.assume_constant_result  # which older compilers do not take for a function of a configuration itself
def _asks_for_attention(kind: type[PreTrainedConfig]) -> list[bool]:
    """Of the classes next to the model's that put keys into a cache, which ask for the configured attention."""
    if kind not in _asking:
        with _lock:  # sources are parsed, which CPython 3.11 cannot do in several threads
            _asking[kind] = _look_up(kind)
    return _asking[kind]


def _look_up(kind: type[PreTrainedConfig]) -> list[bool]:
    classes = [cls for mapping in (MODEL_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING) for cls in _classes(mapping, kind)]
    classes = classes or _classes_beside(kind)
    if not all(cls._can_set_attn_implementation() for cls in classes) or any(map(_takes_back_support, classes)):
        return [False]
    return [asks for module in {cls.__module__ for cls in classes} for asks in _asks_in(module)] or [True]


def _classes(mapping: Any, kind: type[PreTrainedConfig]) -> Sequence[Any]:
    """Of the models that a mapping of transformers has for a configuration; it names some that cannot be imported."""
    try:
        found = mapping.get(kind, ())
    except (ValueError, AttributeError):
        return ()
    return found if isinstance(found, (tuple, list)) else (found,)


def _classes_beside(kind: type[PreTrainedConfig]) -> list[Any]:
    """Of transformers' loaded models those for a configuration next to them: parts that no mapping has."""
    beside = kind.__module__.rpartition(".")[0] + ".modeling_"
    if not beside.startswith("transformers."):  # other authors' sources may ask for attention in other words
        return []
    modules = [module for name, module in list(sys.modules.items()) if name.startswith(beside)]
    found = [cls for module in modules for cls in vars(module).values() if isinstance(cls, type)]
    return [cls for cls in found if issubclass(cls, PreTrainedModel) and getattr(cls, "config_class", None) is kind]


def _takes_back_support(cls: type[PreTrainedModel]) -> bool:
    """Whether these models take `eager` alone, in a family that takes more: a part that computes attention itself."""
    bases: list[Any] = [base for base in cls.__mro__ if issubclass(base, PreTrainedModel)]
    takes_more = [base._supports_sdpa or base._supports_attention_backend for base in bases]
    return any(takes_more) and not takes_more[0]


def _asks_in(module: str) -> list[bool]:
    try:
        source = ast.parse(inspect.getsource(sys.modules[module]))
    except (KeyError, OSError, TypeError, SyntaxError):
        return []
    classes = [list(ast.walk(node)) for node in source.body if isinstance(node, ast.ClassDef)]
    return [
        any(getattr(node, "attr", None) == "get_interface" for node in nodes)
        for nodes in classes
        if any(_feeds_cache(node) for node in nodes)
    ]


def _feeds_cache(node: ast.AST) -> bool:
    """Whether this is `cache.update(...)`, whatever the cache is called."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "update"):
        return False
    owner = node.func.value
    return _CACHE.search(getattr(owner, "id", getattr(owner, "attr", ""))) is not None
