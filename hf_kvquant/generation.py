"""`cache_implementation="kvquant"`: the two places where `generate` has to know the name, where continuous batching
begins, and one that loses caches.

transformers has no registry for cache implementations. The first three hooks are made once, on import, the last on the
class of a model that a quantized cache is used with. They check what they change, and leave every other cache alone.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
import transformers
from transformers import GenerationMixin
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.generation import GenerationMode, configuration_utils
from transformers.utils import logging

from . import reservations
from .batching import hooks as batching
from .broken import take_back_broken_step
from .cache import QuantizedPagedCache
from .config import KVQuantConfig
from .encoder_decoder import QuantizedEncoderDecoderCache
from .hosts.configuration import fed_by_images
from .hosts.conventions import CACHE_NAME, CACHE_NAMES
from .interface import attention_name, is_flash, is_fused
from .options import missing_options, options_for
from .policy import asks_for_checkpoint, is_per_layer

CACHE_IMPLEMENTATION = "kvquant"
_COMPILED_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
COMPILED_DEVICES = ("cuda", "xpu")  # on which `generate` compiles without being asked, by Triton
_NAMES = "ALL_CACHE_IMPLEMENTATIONS"
_METHOD = "_prepare_cache_for_generation"
_CONTINUOUS = "init_continuous_batching"
_INPUTS = "prepare_inputs_for_generation"

logger = logging.get_logger(__name__)

# Models whose attention has made a quantized cache.
_quantized_by_attention: WeakSet[Any] = WeakSet()


class _Call(NamedTuple):
    """What `generate` gives the method that makes its cache."""

    generation_config: Any
    model_kwargs: dict[str, Any]
    generation_mode: Any
    batch_size: int
    max_cache_length: int


def register() -> None:
    """Teach `generate` the name. Calling it again does nothing.

    Raises RuntimeError if the installed transformers has other hooks than those this package knows.
    """
    names = getattr(configuration_utils, _NAMES, None)
    method = getattr(GenerationMixin, _METHOD, None)
    if getattr(method, "_is_kvquant", False):
        return
    parameters = list(inspect.signature(method).parameters) if method is not None else None
    if not isinstance(names, tuple) or parameters != ["self", *_Call._fields]:
        raise RuntimeError(
            f"transformers {transformers.__version__} is not a version that hf_kvquant knows: "
            f"generation.configuration_utils.{_NAMES} is {type(names).__name__}, GenerationMixin.{_METHOD} takes "
            f"{parameters}; install a version >= 5.17 that hf_kvquant was tested with, or a newer hf_kvquant"
        )
    setattr(configuration_utils, _NAMES, (*names, CACHE_IMPLEMENTATION))
    setattr(GenerationMixin, _METHOD, _extended(method))
    if hasattr(GenerationMixin, _CONTINUOUS):  # a version without it is as good
        setattr(GenerationMixin, _CONTINUOUS, _with_ours(getattr(GenerationMixin, _CONTINUOUS)))
        batching.register()


def _extended(prepare_cache: Any) -> Any:
    @functools.wraps(prepare_cache)
    def prepare(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = _Call(*args, **kwargs)
        config, model_kwargs = call.generation_config, call.model_kwargs
        chosen = config.cache_implementation
        asked = chosen == CACHE_IMPLEMENTATION
        if given := [model_kwargs[name] for name in CACHE_NAMES if model_kwargs.get(name) is not None]:
            for cache in given:
                if isinstance(cache, QuantizedPagedCache):
                    _go_on_with(self, cache, call)
            # An assistant is called again and again with the cache of its first call; the name was meant for that one.
            with _without_name(config) if asked and config.is_assistant else nullcontext():
                return prepare_cache(self, *call)
        fused = _is_fused(self)
        wanted = asked or (fused and chosen is None)
        if wanted and fused:
            _quantized_by_attention.add(self)
        if not wanted and chosen is None and self in _quantized_by_attention and _is_eager(self):
            logger.warning_once(
                "The cache is not quantized any more: this model's attention was 'kvquant' and is 'eager', which "
                "transformers makes it for good where timestamps of words are asked for. Switch back with "
                "model.set_attn_implementation('kvquant'), or give cache_implementation='kvquant'."
            )
        elif not wanted and chosen is None and config.cache_config and not config.is_assistant:
            logger.warning_once(
                "`cache_config` is ignored: the 8-bit cache is made by cache_implementation='kvquant', or by a kvquant "
                "attention, which this model does not have (not every model takes one)."
            )
        if not wanted or not self._supports_default_dynamic_cache():
            return prepare_cache(self, *call)
        KVQuantConfig.parse(config.cache_config)  # before anything is made
        if not fused:
            logger.info(
                "The cache is stored in 8 bits and dequantized for attention %r; with attn_implementation='kvquant' "
                "attention reads the 8-bit pages themselves, which is faster.",
                self.config._attn_implementation,
            )
        # transformers makes a DynamicCache, with all it knows about models; ours takes its place.
        with _without_name(config):
            result = prepare_cache(self, *call)
        for name in CACHE_NAMES:
            if name in model_kwargs:
                model_kwargs[name] = _replace(self, model_kwargs[name], call)
        return result

    prepare._is_kvquant = True  # type: ignore[attr-defined]
    return prepare


def _go_on_with(model: Any, cache: QuantizedPagedCache, call: _Call) -> None:
    """Make a cache that was passed ready for this call."""
    _warn_of_other_options(cache, call.generation_config)
    if not call.generation_config.is_assistant:  # which may go through some layers only
        take_back_broken_step(cache)
    cache.shared.speculates = call.generation_mode == GenerationMode.ASSISTED_GENERATION
    _describe_prompt(model, call, cache)
    _take_adapters_prefix(model)
    _keep_in_inputs(type(model))


def _with_ours(init_continuous_batching: Any) -> Any:
    """Continuous batching over 8-bit pages where attention is kvquant; a warning where they are asked for otherwise."""

    @functools.wraps(init_continuous_batching)
    def init(self: Any, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        config = self.generation_config if generation_config is None else generation_config
        chosen, options = (getattr(config, name, None) for name in ("cache_implementation", "cache_config"))
        fused = _is_fused(self)
        if not (fused and batching.is_known()) and (
            chosen == CACHE_IMPLEMENTATION or (chosen is None and (fused or options))
        ):
            logger.warning_once(
                "Continuous batching keeps a cache of its own, in the model's dtype: cache_implementation='kvquant' "
                "and `cache_config` have no effect on it. For 8-bit pages it takes a kvquant attention "
                "(model.set_attn_implementation('kvquant')) and transformers >= 5.24."
            )
        manager = init_continuous_batching(self, generation_config, *args, **kwargs)
        if batching.is_known():
            batching.prepare(manager, self, options)
        return manager

    return init


def _warn_of_other_options(cache: QuantizedPagedCache, generation_config: Any) -> None:
    """Say so if a cache that is passed was made with other options than those that come with it."""
    if missing := missing_options(generation_config.cache_config, cache.kvquant):
        logger.warning_once(
            f"`cache_config` is ignored: the cache that was passed was made without {missing}; make it with them, or "
            "pass none."
        )


@contextmanager
def _without_name(generation_config: Any) -> Iterator[None]:
    chosen = generation_config.cache_implementation
    generation_config.cache_implementation = None
    try:
        yield
    finally:
        generation_config.cache_implementation = chosen


def _replace(model: Any, made: Any, call: _Call) -> Any:
    """Ours for `made`, a cache of transformers; anything but a plain dynamic cache is left alone."""
    options, max_cache_length = call.generation_config.cache_config, call.max_cache_length
    if isinstance(made, EncoderDecoderCache):
        encoder_outputs = call.model_kwargs.get("encoder_outputs")
        encoder_length = encoder_outputs[0].shape[1] if encoder_outputs is not None else None
        decoder, encoder = _replace(model, made.self_attention_cache, call), made.cross_attention_cache
        if type(encoder) is DynamicCache and encoder_length is not None:
            encoder = _cross_attention_cache(model, options, encoder_length)
            _share_prompts(model, call, encoder)
        return QuantizedEncoderDecoderCache(decoder, encoder)
    if type(made) is not DynamicCache:
        return made
    static, num_sequences = None, call.batch_size * _copies(call.generation_config)
    if _will_compile(model, call):
        static = max_cache_length
        if _may_reserve_more(model, options):
            static = reservations.length_to_reserve(model, num_sequences, max_cache_length)
    cache = QuantizedPagedCache.for_generation(model, options, max_cache_length, static)
    if static is not None:
        reservations.remember(model, num_sequences, static, cache.shared.reservation, len(cache._paged_layers))
    _describe_prompt(model, call, cache)
    _share_prompts(model, call, cache)
    if call.generation_config.is_assistant:
        cache.activate_past_recording()
    _take_adapters_prefix(model)
    _keep_in_inputs(type(model))
    return cache


def _keep_in_inputs(model_class: Any) -> None:
    """Have models of a class keep a quantized cache where their inputs are prepared.

    Some begin anew in the middle of a text (where a long rotary embedding takes over), by leaving the cache out:
    transformers would go on with one of its own, so ours is emptied and stays. And where speculation begins over a
    cache that holds tokens, or any call over one that holds all, transformers gives the model all tokens again.
    """
    method = getattr(model_class, _INPUTS)
    if getattr(method, "_is_kvquant", False):
        return

    @functools.wraps(method)
    def prepare_inputs(self: Any, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        cache = next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)
        if not isinstance(cache, QuantizedPagedCache):
            return method(self, input_ids, *args, **kwargs)
        if kwargs.get("is_first_iteration"):
            described, asked = (kwargs.get(name) for name in ("position_ids", "next_sequence_length"))
            num_coming = _num_coming(cache, input_ids.shape[1], described, asked)
            if num_coming is not None:
                if num_coming == 0:  # as after a call that broke off behind the last layer: the last one comes again
                    num_coming = _take_last_back(cache)
                kwargs["next_sequence_length"] = num_coming
        inputs = method(self, input_ids, *args, **kwargs)
        if all(inputs.get(name) is None for name in CACHE_NAMES):
            if cache.batch_size > 0:
                cache.reset()
                # All tokens, which not every version asks for.
                inputs = method(self, input_ids, *args, **{**kwargs, "next_sequence_length": None})
            inputs[CACHE_NAME] = cache
        return inputs

    prepare_inputs._is_kvquant = True  # type: ignore[attr-defined]
    setattr(model_class, _INPUTS, prepare_inputs)


def _take_last_back(cache: QuantizedPagedCache) -> int | None:
    """How many tokens of a text that `cache` holds are to be computed after all: one, or all of them (None)."""
    try:
        cache.crop(-1)
    except RuntimeError:  # a window or a linear-attention state has moved on
        cache.reset()
        return None
    return 1


def _num_coming(cache: QuantizedPagedCache, num_tokens: int, positions: Any, asked: Any) -> Any:
    """How many tokens of a text are to be computed, None for all; transformers does not ask where it speculates."""
    if asked is not None or not cache.shared.speculates:
        return asked
    # Drafts are among the tokens and have positions, but are no part of the prompt.
    length = cache.shared.prompt_length if positions is None else positions.shape[-1]
    if num_tokens < length:  # only what is new was passed
        return None
    num_held = int(cache.get_seq_length())
    return num_tokens - num_held if 0 < num_held <= num_tokens else None


def _take_adapters_prefix(model: Any) -> None:
    """Keep our cache where an adapter (prefix tuning) wants its learned keys and values in place of an empty one.

    For the length of a `generate` such an adapter wraps the model's `prepare_inputs_for_generation`, and hands over a
    dynamic cache of its own in the first step. What it holds goes into ours.
    """
    wrapped = model.prepare_inputs_for_generation
    if getattr(wrapped, "__self__", model) is model:
        return

    @functools.wraps(wrapped)
    def prepare_inputs(*args: Any, **kwargs: Any) -> Any:
        inputs = wrapped(*args, **kwargs)
        # That of this call: other threads may come by here, and an interrupt leaves this in place.
        cache = next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)
        if not isinstance(cache, QuantizedPagedCache):
            return inputs
        for name in CACHE_NAMES:
            prefix = inputs.get(name)
            if type(prefix) is not DynamicCache:
                continue
            if cache.get_seq_length() == 0:
                cache.shared.padding_mask = None  # the first tokens are the adapter's
                for index, layer in enumerate(prefix.layers):
                    if layer.is_initialized:
                        cache.update(layer.keys, layer.values, index)
                cache.shared.num_virtual = int(cache.get_seq_length())
            del inputs[name]  # perhaps an old name of it
            inputs[CACHE_NAME] = cache
        return inputs

    model.prepare_inputs_for_generation = prepare_inputs


def _adds_virtual_tokens(model: Any) -> bool:
    """Whether an adapter puts tokens of its own before the text, which are not in the length that `generate` knows."""
    adapter = getattr(model.prepare_inputs_for_generation, "__self__", model)  # as in `_take_adapters_prefix`
    return bool(getattr(getattr(adapter, "active_peft_config", None), "is_prompt_learning", False))


def _describe_prompt(model: Any, call: _Call, cache: QuantizedPagedCache) -> None:
    """Tell `cache` what is padding, and how long the prompt is."""
    mask, positions = (call.model_kwargs.get(name) for name in ("attention_mask", "position_ids"))
    mask = mask.bool() if mask is not None and mask.ndim == 2 else None
    cache.shared.padding_mask = mask
    known = positions if positions is not None else mask
    # transformers drops a mask that hides nothing, and not every model takes positions.
    length = getattr(call.generation_config, "_mask_length", 0) if known is None else known.shape[-1]
    cache.shared.prompt_length = 0 if model.config.is_encoder_decoder else length
    if cache.batch_size > 0:
        cache.shared.copies = 1  # what comes now may differ between sequences that began with the same prompt


def _share_prompts(model: Any, call: _Call, cache: QuantizedPagedCache) -> None:
    """Tell a new cache that the beams of a prompt, or the several answers to it, all begin with that prompt.

    A `generate` of a model's own (RAG's) knows no mode, and counts its sequences in its own way.
    """
    copies = _copies(call.generation_config)
    if copies > 1 and call.generation_mode is not None and not _rows_differ(model):
        cache.shared.copies, cache.shared.num_prompts = copies, call.batch_size


def _copies(generation_config: Any) -> int:
    """How many sequences begin with the same prompt."""
    return max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)


def _rows_differ(model: Any) -> bool:
    """Whether sequences of the same tokens may have other keys and values: by dropout, or by own adapters."""
    return model.training or any(_is_random(module) or _has_own_adapters(module) for module in model.modules())


def _is_random(module: Any) -> bool:
    """Whether it is a dropout that is on, or does something like it by itself."""
    return module.training and any(
        isinstance(value, float) and value > 0 and (name == "p" or "drop" in name or "noise" in name)
        for name, value in vars(module).items()
    )


def _has_own_adapters(module: Any) -> bool:
    """Whether peft has told a layer which adapter each sequence has, which it does by a hook."""
    return any("adapter_names" in getattr(hook, "keywords", {}) for hook in module._forward_pre_hooks.values())


# Of each model the class of the last cross-attention cache, and the options of its instances.
_cross_attention_classes: WeakKeyDictionary[Any, tuple[dict[str, Any], Any]] = WeakKeyDictionary()


def _cross_attention_cache(model: Any, options: Any, encoder_length: int) -> QuantizedPagedCache:
    """The cache of what the encoder says: written once, never grown, with scales of its own."""
    kvquant = replace(options_for(model, options), max_cache_len=None)  # its length is the encoder's
    if asks_for_checkpoint(kvquant) or is_per_layer(kvquant):  # a checkpoint's and a calibration's: of self-attention
        kvquant = replace(kvquant, scales="dynamic")

    known = _cross_attention_classes.get(model)
    if known is None or known[0] != kvquant.to_dict():  # compiled graphs are guarded on the class

        class CrossAttentionCache(QuantizedPagedCache):
            """A model may make the cache anew from its class, with a configuration of its own; options must stay."""

            expected_length: int

            def __init__(self, config: Any, offloading: bool = False) -> None:
                super().__init__(config, kvquant, expected_length=self.expected_length)

        _cross_attention_classes[model] = known = (kvquant.to_dict(), CrossAttentionCache)
    known[1].expected_length = encoder_length
    return known[1](model.config)


def _will_compile(model: Any, call: _Call) -> bool:
    """Whether `generate` is to get a cache at fixed addresses, with which it compiles decoding.

    On an accelerator it would do so by itself. That suits a cache that is gone afterwards; one that is returned may
    have to grow, and one with a bound on its pages must not reserve more.
    """
    config = call.generation_config
    # transformers compiles neither beam search nor speculation; both are better off with pages that grow.
    if config.disable_compile or config.is_assistant or call.generation_mode not in _COMPILED_MODES:
        return False
    if _adds_virtual_tokens(model):
        return False
    options, text_config = options_for(model, config.cache_config), model.config.get_text_config(decoder=True)
    if options.offload or fed_by_images(text_config) or is_flash(text_config):
        return False
    compile_config = config.compile_config
    if compile_config is not None and compile_config._compile_all_devices:
        return True
    if compile_config is None and (config.return_dict_in_generate or options.num_pages):
        return False
    # Not every model works over such a cache, and transformers says of some that they do.
    return _is_fused(model) and model._can_compile_fullgraph and compiles_unasked(model.device)


def compiles_unasked(device: torch.device) -> bool:
    """Whether `generate` compiles its steps there over a cache that can be compiled."""
    if device.type not in COMPILED_DEVICES:
        return False
    # Asked late: it looks at the devices. Without Triton (Windows has none) the compiler raises an error.
    from torch.utils._triton import has_triton

    return has_triton()


def _may_reserve_more(model: Any, options: Any) -> bool:
    """Whether more than is needed costs no time, as it does where attention gets dense values, and is allowed."""
    return _is_fused(model) and options_for(model, options).num_pages is None


def _is_fused(model: Any) -> bool:
    return is_fused(model.config.get_text_config(decoder=True))


def _is_eager(model: Any) -> bool:
    """Whether its attention is that which transformers itself switches to."""
    return attention_name(model.config.get_text_config(decoder=True)) == "eager"
