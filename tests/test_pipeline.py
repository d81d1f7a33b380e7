"""Models whose layers are spread over processes (pipeline parallelism): in the later ones the first layers of a cache
never get a token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import llama_config, prompt, tiny_llama
from test_cache import add, keys_and_values, make_cache, sliding_model
from test_compile import compile_config
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, MllamaForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.models.mllama.configuration_mllama import MllamaTextConfig
from two_processes import in_two_processes

from hf_kvquant import PrefixCache, QuantizedPagedCache, calibrate

LOSSLESS: dict[str, Any] = {"kv_cache_dtype": "model", "page_size": 4}
FIXED = {**LOSSLESS, "max_cache_len": 64}


class Elsewhere(torch.nn.Module):
    """In the place of a layer that another process computes."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states


def later_stage(model: Any) -> PreTrainedModel:
    for index in range(len(model.model.layers) // 2):
        model.model.layers[index] = Elsewhere()
    return model


def long_sliding_model() -> PreTrainedModel:
    config = sliding_model().config
    config.num_hidden_layers, config.layer_types = 4, config.layer_types * 2
    model = Gemma3ForCausalLM(config).eval()
    model.set_attn_implementation("kvquant")
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "llama": tiny_llama,
    "only-full-layers-here": sliding_model,
    "both-kinds-here": long_sliding_model,
}


def new_tokens(model: Any, ids: torch.Tensor, **options: Any) -> list[list[int]]:
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False, **options}
    return model.generate(ids, **options)[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("options", [LOSSLESS, FIXED], ids=["growing", "fixed"])
@pytest.mark.parametrize("name", MODELS)
def test_the_tokens_are_those_without_a_cache(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """In every turn, after a crop and from disk, with padding and beams."""
    model = later_stage(MODELS[name]())
    ids, more = prompt(2, 17), prompt(2, 20)
    for attention in ("sdpa", "kvquant"):
        model.set_attn_implementation(attention)
        for mask in (torch.ones_like(ids), (torch.arange(17) >= torch.tensor([[5], [0]])).long()):
            expected = new_tokens(model, ids, attention_mask=mask, use_cache=False)
            given = {"cache_implementation": "kvquant", "cache_config": options}
            assert new_tokens(model, ids, attention_mask=mask, **given) == expected
    expected = new_tokens(model, ids, use_cache=False, num_beams=2)
    assert new_tokens(model, ids, cache_config=options, num_beams=2) == expected

    expected = new_tokens(model, more, use_cache=False)
    cache = QuantizedPagedCache.from_model(model, **options)
    assert cache.batch_size == -1
    new_tokens(model, more[:, :17], past_key_values=cache, max_new_tokens=1)
    assert (cache.get_seq_length(), cache.batch_size) == (17, 2)
    cache.save_pretrained(tmp_path)
    for held in (QuantizedPagedCache.from_pretrained(tmp_path, model), cache.fork(), cache):
        assert new_tokens(model, more, past_key_values=held) == expected
    cache.reset()
    assert cache.get_seq_length() == 0
    cache.activate_past_recording()
    new_tokens(model, torch.cat([more[:, :16], prompt(2, 3, seed=5)], dim=1), past_key_values=cache, max_new_tokens=1)
    cache.crop(-3)
    assert new_tokens(model, more, past_key_values=cache) == expected


def test_compiled() -> None:
    """As `generate` does it on a GPU, with one graph for all steps."""
    model = later_stage(tiny_llama())
    expected = new_tokens(model, prompt(), use_cache=False)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        options = {"cache_config": LOSSLESS, "compile_config": compile_config("eager")}
        assert new_tokens(model, prompt(), **options) == expected


@pytest.mark.parametrize("name", MODELS)
def test_beginnings_are_shared(name: str) -> None:
    model = later_stage(MODELS[name]())
    ids = prompt(1, 22)
    prefixes = PrefixCache(model, max_bytes=1 << 24, **LOSSLESS)
    assert prefixes.prefill(ids[:, :16])
    cache = prefixes.cache_for(ids)
    assert (prefixes.hits, cache.get_seq_length()) == (1, 16)
    assert new_tokens(model, ids, past_key_values=cache) == new_tokens(model, ids, use_cache=False)


@pytest.mark.parametrize("options", [LOSSLESS, FIXED], ids=["growing", "fixed"])
@pytest.mark.parametrize("slides", [False, True], ids=["full", "sliding"])
def test_lengths_and_masks_are_those_of_the_whole(slides: bool, options: dict[str, Any]) -> None:
    config = long_sliding_model().config if slides else llama_config(num_hidden_layers=4)
    whole, part = make_cache(config, **options), make_cache(config, **options)

    def same() -> bool:
        lengths = [[int(each.get_seq_length(index)) for index in range(4)] for each in (whole, part)]
        masks = [[each.get_mask_sizes(3, index) for index in range(4)] for each in (whole, part)]
        return lengths[0] == lengths[1] and masks[0] == masks[1] and whole.batch_size == part.batch_size

    assert same()
    for num_tokens in (9, 4, 1):
        add(whole, num_tokens, batch_size=2)
        for index in (2, 3):
            part.update(*keys_and_values(num_tokens, batch_size=2, seed=index), index)
        assert same()
    for each in (whole, part):
        each.crop(-1)
    assert same()
    for each in (whole, part):
        each.reorder_cache(torch.tensor([1, 1]))
    assert same()
    whole, part = whole.fork(), part.fork()
    assert same()
    whole.reset()
    part.reset()
    assert same()


def test_a_layer_in_the_middle_of_its_first_step_answers_for_itself() -> None:
    cache = make_cache(llama_config(num_hidden_layers=4), **LOSSLESS)
    for index in range(4):
        assert (cache.get_seq_length(index), cache.get_mask_sizes(3, index)) == (0, (3, 0))
        cache.update(*keys_and_values(3), index)


@pytest.mark.parametrize("options", [LOSSLESS, FIXED], ids=["growing", "fixed"])
def test_a_layer_that_attends_to_nothing_stays_empty(options: dict[str, Any]) -> None:
    """As those for images of a model that is given text alone, and asks whether they hold anything."""
    torch.manual_seed(0)
    config = MllamaTextConfig(
        vocab_size=99, hidden_size=64, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, cross_attention_layers=[1], initializer_range=0.2, pad_token_id=0, eos_token_id=98,
    )  # fmt: skip
    model = MllamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    expected = new_tokens(model, prompt(), cache_implementation="dynamic")
    for attention in ("sdpa", "kvquant"):
        model.set_attn_implementation(attention)
        cache = QuantizedPagedCache.from_model(model, **options)
        assert new_tokens(model, prompt(), past_key_values=cache) == expected
        assert [int(cache.get_seq_length(index)) > 0 for index in range(4)] == [True, False, True, True]


def tokens_of_a_stage(directory: str, **options: Any) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="kvquant", **options).eval()
    ids = prompt(2, 17)
    scales = calibrate(model, ids, progress=False)
    found: dict[str, Any] = {"scales": [layer and layer.to_dict() for layer in scales]}
    for name, given in (("growing", LOSSLESS), ("fixed", FIXED), ("int8", {"kv_cache_dtype": "int8"})):
        cache = QuantizedPagedCache.from_model(model, **given)
        first = model.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False)
        found[name] = new_tokens(model, torch.cat([first, ids[:, :3]], dim=1), past_key_values=cache)
        found[f"{name} length"] = int(cache.get_seq_length())
    return found


def in_a_stage(directory: str) -> dict[str, Any]:
    return tokens_of_a_stage(directory, distributed_config=DistributedConfig(pp_size=2))


def test_two_processes(tmp_path: Path) -> None:
    directory = str(tmp_path)
    sliding_model().save_pretrained(directory)
    expected = tokens_of_a_stage(directory)
    assert in_two_processes(in_a_stage, directory) == [expected, expected]
