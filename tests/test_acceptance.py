"""How many drafted tokens are accepted: against assistants of which that is known, and by counting forward passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import prompt, tiny_llama
from test_speculation import drafter
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from hf_kvquant import QuantizedPagedCache
from hf_kvquant.evaluation.acceptance import PLACES, Acceptance, AcceptanceRun

NEW_TOKENS = 17
PROMPTS = [prompt(1, 6)[0].repeat(4), prompt(1, 15)[0]]


def maker(model: PreTrainedModel, made: list[Cache] | None = None, **options: Any) -> Any:
    def make(length: int) -> Cache:
        cache = QuantizedPagedCache.from_model(model, **options) if options else DynamicCache(config=model.config)
        if made is not None:
            made.append(cache)
        return cache

    return make


def measured(model: PreTrainedModel, assistant: PreTrainedModel, **options: Any) -> list[Acceptance]:
    run = AcceptanceRun(model, assistant, PROMPTS, NEW_TOKENS)
    return run.measure(maker(model, **options), maker(assistant, **options), PLACES)


@pytest.mark.parametrize("options", [{}, {"kv_cache_dtype": "model", "page_size": 4}], ids=["dense", "pages"])
def test_a_model_that_drafts_for_itself_is_always_right(options: dict[str, Any]) -> None:
    lookup, *assisted = measured(tiny_llama("sdpa"), tiny_llama("sdpa"), **options)
    assert (lookup.drafts, lookup.place) == ("prompt lookup", "target")
    assert [each.place for each in assisted] == list(PLACES)
    for each in assisted:
        assert each.drafts == "assistant"
        assert each.accepted == each.proposed > NEW_TOKENS / 2
        assert each.same_tokens == 1


def test_an_assistant_that_is_always_wrong() -> None:
    assistant = tiny_llama("kvquant")
    with torch.no_grad():
        assistant.lm_head.weight.neg_()
    for each in measured(tiny_llama("kvquant"), assistant, kv_cache_dtype="int8")[1:]:
        assert each.accepted == 0 < each.proposed
        assert each.same_tokens == 1


def test_accepted_tokens_are_forward_passes_saved() -> None:
    model = tiny_llama("kvquant")
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    hook = model.register_forward_hook(count)
    found = measured(model, drafter(model, "kvquant"), kv_cache_dtype="int8")
    hook.remove()
    # Without drafts over either cache, looked up, and with the assistant: a pass gives one token more than it accepts.
    runs = 2 + len(found)
    assert passes == runs * len(PROMPTS) * NEW_TOKENS - sum(each.accepted for each in found)
    assert all(0 < each.accepted < each.proposed for each in found[1:])


@pytest.mark.parametrize("place", PLACES)
def test_the_cache_is_where_it_is_said_to_be(place: str) -> None:
    model = tiny_llama("kvquant")
    assistant = drafter(model, "kvquant")
    of_model: list[Cache] = []
    of_assistant: list[Cache] = []
    options = {"kv_cache_dtype": "fp8", "page_size": 4}
    AcceptanceRun(model, assistant, PROMPTS, NEW_TOKENS).measure(
        maker(model, of_model, **options), maker(assistant, of_assistant, **options), [place]
    )
    # For each prompt: without drafts, looked up, and in its place.
    assert len(of_model) == len(PROMPTS) * (2 if place == "assistant" else 3)
    assert len(of_assistant) == len(PROMPTS) * (0 if place == "target" else 1)
    for cache, start in zip(of_model, PROMPTS * 3, strict=False):
        assert cache.get_seq_length() == len(start) + NEW_TOKENS - 1
    assert all(cache.get_seq_length() > len(start) for cache, start in zip(of_assistant, PROMPTS, strict=False))


def test_tokens_that_speculation_changes_are_seen() -> None:
    class Drifting(DynamicCache):
        """What it gives back depends on how many tokens came at once."""

        def update(self, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return super().update(key, value * key.shape[2], *args, **kwargs)

    model = tiny_llama("sdpa")
    run = AcceptanceRun(model, None, PROMPTS, NEW_TOKENS)
    (found,) = run.measure(lambda length: Drifting(config=model.config), None, PLACES)
    assert found.same_tokens < 1


def test_models_are_left_as_they_were() -> None:
    model = tiny_llama("kvquant")
    assistant = drafter(model, "kvquant")
    assistant.generation_config.num_assistant_tokens_schedule = "heuristic"
    first = measured(model, assistant)
    assert assistant.generation_config.num_assistant_tokens == 5
    assert measured(model, assistant) == first
    assert "_get_candidate_generator" not in vars(model)


def test_another_vocabulary() -> None:
    with pytest.raises(ValueError, match="the assistant has a vocabulary of 90 tokens and the model one of 99"):
        AcceptanceRun(tiny_llama(), tiny_llama(vocab_size=90), PROMPTS, NEW_TOKENS)
