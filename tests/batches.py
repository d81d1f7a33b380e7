"""Requests for continuous batching: prompts, models, options, and the tokens that come of them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import families
import pytest
import torch
from helpers import prompt
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from hf_kvquant import LayerScales
from hf_kvquant.batching import hooks

known = pytest.mark.skipif(not hooks.is_known(), reason="transformers has no continuous batching of the known form")

LENGTHS = (1, 15, 17, 63, 150)
PROMPTS = [prompt(1, length, seed=length)[0].tolist() for length in LENGTHS]
NUM_NEW = 12

UNQUANTIZED: dict[str, Any] = {"kv_cache_dtype": "model"}
INT8: dict[str, Any] = {"kv_cache_dtype": "int8", "scales": "dynamic", "equalize": False}
STATIC: dict[str, Any] = {"kv_cache_dtype": "fp8", "scales": LayerScales(torch.tensor([0.05]), torch.tensor([0.04]))}
ROUNDED: dict[str, Any] = {**STATIC, "q_dtype": "fp8"}
OPTIONS: dict[str, dict[str, Any]] = {"int8": INT8, "fp8-static": STATIC, "fp8-query": ROUNDED}

_MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "num_hidden_layers": 3}
# Model type and fields of its configuration; two query heads to each of keys and values where nothing is said.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "one-query-head": ("llama", {"num_key_value_heads": 4}),
    "four-query-heads": ("llama", {"num_attention_heads": 8}),
    "seven-query-heads": ("llama", {"num_attention_heads": 7, "num_key_value_heads": 1, "hidden_size": 56}),
    "head_dim80": ("llama", {"head_dim": 80}),
    "window17": ("mistral", {"sliding_window": 17}),
    "window400": ("mistral", {"sliding_window": 400}),
    "gemma3": ("gemma3_text", {"sliding_window": 24, **_MIXED}),
    "softcap": ("gemma2", {"sliding_window": 24, "attn_logit_softcapping": 2.0, **_MIXED}),
    "sinks": ("gpt_oss", {"sliding_window": 24, **_MIXED}),
}
WITHOUT_SDPA = ("softcap", "sinks")


def build(kind: str, attention: str = "kvquant", **overrides: Any) -> PreTrainedModel:
    model_type, fields = KINDS[kind]
    fields = {"max_position_embeddings": 512, **fields, **overrides}
    return families.build(model_type, fields, attn_implementation=attention)


def sampling(options: Any = None, num_answers: int = 1, **generation: Any) -> GenerationConfig:
    defaults = {"max_new_tokens": NUM_NEW, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    config = GenerationConfig(**{**defaults, **generation}, cache_config=options)
    config.num_return_sequences = num_answers  # which may be greedy here
    return config


def sizes(**batching: Any) -> ContinuousBatchingConfig:
    return ContinuousBatchingConfig(**{"num_blocks": 64, "max_batch_tokens": 1024, "page_size": 16, **batching})


def tokens_of(outputs: Any) -> list[list[int]]:
    assert [output.error for output in outputs] == [None] * len(outputs)
    return [output.generated_tokens for output in outputs]


def batched(
    model: Any, options: Any = None, prompts: Any = PROMPTS, generation: Any = None, **batching: Any
) -> list[list[int]]:
    """The new tokens of every prompt."""
    config = sampling(options, **(generation or {}))
    outputs = model.generate_batch(prompts, generation_config=config, continuous_batching_config=sizes(**batching))
    return tokens_of(list(outputs.values()))


def alone(model: Any, text: Sequence[int], options: Any = None, **generation: Any) -> list[int]:
    """The new tokens of `generate` for one prompt."""
    ids = torch.tensor([text])
    generation = {"max_new_tokens": NUM_NEW, "do_sample": False, **generation}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), cache_config=options, **generation)
    return out[0, ids.shape[1] :].tolist()


def all_alone(model: Any, options: Any = None, prompts: Any = PROMPTS, **generation: Any) -> list[list[int]]:
    return [alone(model, text, options, **generation) for text in prompts]


@functools.cache
def lossless(kind: str) -> list[list[int]]:
    """What the model's own attention says over transformers' own cache."""
    return all_alone(build(kind, "eager" if kind in WITHOUT_SDPA else "sdpa"))


@contextlib.contextmanager
def running(
    model: Any,
    options: Any = None,
    before: Callable[[Any], object] = lambda cache: None,
    num_answers: int = 1,
    max_new_tokens: int = NUM_NEW,
    **batching: Any,
) -> Iterator[Any]:
    """A manager at work; `before` gets its cache first."""
    generation = sampling(options, num_answers, max_new_tokens=max_new_tokens)
    manager = model.init_continuous_batching(generation, sizes(**batching))
    manager.warmup()
    before(manager.batch_processor.cache)
    manager.start()
    try:
        yield manager
    finally:
        manager.stop(block=True)
        manager.destroy()


@contextlib.contextmanager
def kept(model: Any, options: Any, warmup: bool = True) -> Iterator[Callable[[Any], list[list[int]]]]:
    """Sessions of one manager: the new tokens of their prompts."""

    def session(prompts: Any) -> list[list[int]]:
        config = sizes(use_cuda_graph=True, max_requests_per_batch=8)
        outputs = model.generate_batch(prompts, sampling(options), config, persistent_manager=True, warmup=warmup)
        return tokens_of(list(outputs.values()))

    try:
        yield session
    finally:
        model.destroy_cached_continuous_batching_manager()


def collect(manager: Any, count: int) -> dict[str, Any]:
    """The results of so many requests."""
    results: dict[str, Any] = {}
    while len(results) < count:
        result = manager.get_result(timeout=5)
        assert result is not None or manager.is_running()
        if result is not None and result.is_finished():
            results[result.request_id] = result
    return results


def wait_for_tokens(manager: Any, request_id: str, count: int) -> None:
    """Until a request that streams has so many."""
    for output in manager.request_id_iter(request_id):
        assert output.error is None
        if len(output.generated_tokens) >= count:
            return
    raise AssertionError(f"{request_id} ended before")


def poison(cache: Any) -> None:
    """NaN in the model's dtype and in fp8, and NaN as the scale of every token."""
    cache.cache_tensor.fill_(0xFF)
    if cache._token_scales is not None:
        cache._token_scales.fill_(torch.nan)
