"""Beginnings that are kept: what a request gets of them, what is shared, and what goes first."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from helpers import prompt, tiny_llama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_cache import contents, sliding_model
from transformers import DynamicCache

from hf_kvquant import PrefixCache, QuantizedPagedCache

NUM_NEW = 12
PLENTY = 1 << 30
OPTIONS: dict[str, Any] = {"scales": "dynamic", "page_size": 4}


def hybrid_model() -> Any:
    model = families.build("qwen3_next")
    model.set_attn_implementation("kvquant")
    return model


MODELS = {"full": tiny_llama, "sliding": sliding_model, "hybrid": hybrid_model}


def generate(model: Any, ids: torch.Tensor, cache: Any, **options: Any) -> torch.Tensor:
    options = {"max_new_tokens": NUM_NEW, "do_sample": False, **options}
    mask = options.pop("attention_mask", torch.ones_like(ids))
    return model.generate(ids, attention_mask=mask, past_key_values=cache, **options)


def requests(system: torch.Tensor, num: int = 3) -> list[torch.Tensor]:
    return [torch.cat([system, prompt(1, 5 + 3 * seed, seed=20 + seed)], dim=1) for seed in range(num)]


def make(model: Any = None, max_bytes: int = PLENTY, **options: Any) -> PrefixCache:
    return PrefixCache(model or tiny_llama(), max_bytes, **{**OPTIONS, **options})


@pytest.mark.parametrize("offload", [False, True], ids=["", "offload"])
@pytest.mark.parametrize("dtype", ["model", "fp8", "int8"])
@pytest.mark.parametrize("name", MODELS)
def test_requests_continue_from_what_is_kept(name: str, dtype: str, offload: bool) -> None:
    """As if the beginning had been computed for each of them."""
    model = MODELS[name]()
    system = prompt(1, 37)
    prefixes = make(model, kv_cache_dtype=dtype, offload=offload)
    assert prefixes.prefill(system[0])
    for ids in requests(system):
        cache = prefixes.cache_for(ids)
        assert cache.get_seq_length() == 37
        output = generate(model, ids, cache)
        fresh = QuantizedPagedCache.from_model(model, kv_cache_dtype=dtype, **OPTIONS)
        with torch.no_grad():
            model(system, past_key_values=fresh)
        assert torch.equal(output, generate(model, ids, fresh))
        if dtype == "model":
            assert torch.equal(output, generate(model, ids, DynamicCache(config=model.config)))
    assert (prefixes.hits, prefixes.misses, len(prefixes)) == (3, 0, 1)


def test_nothing_is_stored_twice() -> None:
    model = tiny_llama()
    system = prompt(1, 64)
    prefixes = make(model)
    prefixes.prefill(system)
    cache = prefixes.cache_for(requests(system)[0])
    kept, allocated = prefixes.nbytes, cache.nbytes_allocated
    more = [prefixes.cache_for(ids) for ids in requests(system)]
    assert all(other.nbytes_allocated == allocated for other in more)
    assert prefixes.nbytes == kept
    for other in more:
        model(prompt(1, 4), past_key_values=other)  # one page per layer and request
    page = sum(store.page_nbytes for layer in cache.layers for store in (layer.k, layer.v))
    assert cache.nbytes_allocated <= (16 + 3) * 1.25 * page + cache.nbytes - 16 * page
    before = contents(cache)
    model(prompt(1, 9), past_key_values=more[0])
    assert all(torch.equal(*pair) for one, other in zip(before, contents(cache), strict=True)
               for pair in zip(one, other, strict=True))  # fmt: skip


@pytest.mark.parametrize(("num_same", "num_used"), [(0, 0), (3, 0), (4, 4), (15, 12), (36, 36), (37, 37)])
def test_part_of_a_beginning_is_used_up_to_its_last_full_page(num_same: int, num_used: int) -> None:
    model = tiny_llama()
    system = prompt(1, 37)
    prefixes = make(model, kv_cache_dtype="model")
    prefixes.prefill(system)
    ids = torch.cat([system[:, :num_same], (system[:, num_same:] + 1) % 99, prompt(1, 6, seed=5)], dim=1)
    cache = prefixes.cache_for(ids)
    assert cache.get_seq_length() == num_used
    assert torch.equal(generate(model, ids, cache), generate(model, ids, DynamicCache(config=model.config)))
    assert prefixes.cache_for(system).get_seq_length() == 36  # one token is left to compute
    assert prefixes.cache_for(system[:, :17]).get_seq_length() == 16
    assert prefixes.cache_for(system[:, :1]).get_seq_length() == 0


@pytest.mark.parametrize("name", ["sliding", "hybrid"])
def test_what_cannot_be_cropped_is_used_as_a_whole_or_not(name: str) -> None:
    model = MODELS[name]()
    system = prompt(1, 37)
    short = system[:, :20]
    prefixes = make(model, kv_cache_dtype="model")
    prefixes.prefill(system)
    prefixes.prefill(short)
    other = torch.cat([system[:, :30], prompt(1, 6, seed=5)], dim=1)
    for ids, num_used in ((requests(system)[0], 37), (other, 20), (system[:, :20], 0)):
        cache = prefixes.cache_for(ids)
        assert cache.get_seq_length() == num_used
        assert torch.equal(generate(model, ids, cache), generate(model, ids, DynamicCache(config=model.config)))


def test_rows_and_copies_share_a_beginning() -> None:
    """A batch with padding between the beginning and the rest, and beams of it."""
    model = tiny_llama()
    system, rest = prompt(1, 18), prompt(3, 9, seed=7)
    mask = torch.ones(3, 27, dtype=torch.int64)
    mask[0, 18:23], mask[2, 18:19] = 0, 0
    ids = torch.cat([system.expand(3, -1), rest], dim=1).masked_fill(mask == 0, 0)
    prefixes = make(model, kv_cache_dtype="model")
    prefixes.prefill(system)
    for options in ({}, {"num_beams": 2, "num_return_sequences": 2}):
        cache = prefixes.cache_for(ids, num_copies=options.get("num_beams", 1))
        assert cache.get_seq_length() == 18
        kept = prefixes.nbytes
        assert cache.nbytes - kept < 1024  # only tables are its own
        expected = model.generate(
            ids, attention_mask=mask, cache_implementation="dynamic", max_new_tokens=NUM_NEW, do_sample=False, **options
        )
        assert torch.equal(generate(model, ids, cache, attention_mask=mask, **options), expected)
        assert prefixes.nbytes == kept
    left = torch.cat([torch.zeros(3, 2, dtype=torch.int64), ids], dim=1)
    assert prefixes.cache_for(left).get_seq_length() == 0


def test_a_conversation_is_kept_and_forked() -> None:
    model = tiny_llama()
    prefixes = make(model, kv_cache_dtype="model")
    ids = prompt(1, 21)
    cache = prefixes.cache_for(ids)
    text = generate(model, ids, cache)
    assert prefixes.keep(text, cache)
    generate(model, torch.cat([text, prompt(1, 4, seed=3)], dim=1), cache)  # the caller's goes on
    for seed in (4, 5):
        turn = torch.cat([text, prompt(1, 4, seed=seed)], dim=1)
        fork = prefixes.cache_for(turn)
        assert fork.get_seq_length() == text.shape[1] - 1
        assert torch.equal(generate(model, turn, fork), generate(model, turn, DynamicCache(config=model.config)))
    assert prefixes.keep(text, prefixes.cache_for(torch.cat([text, text], dim=1)))
    assert len(prefixes) == 1
    prefixes.clear()
    assert (len(prefixes), prefixes.nbytes) == (0, 0)
    assert prefixes.cache_for(text).get_seq_length() == 0


def test_the_least_recently_used_goes_first() -> None:
    model = tiny_llama()
    texts = [prompt(1, 32, seed=seed) for seed in range(4)]
    one = make(model)
    one.prefill(texts[0])
    prefixes = make(model, max_bytes=int(3.5 * one.nbytes))
    for text in texts[:3]:
        prefixes.prefill(text)
    in_use = prefixes.cache_for(torch.cat([texts[1], texts[1]], dim=1))
    before = contents(in_use)
    prefixes.cache_for(torch.cat([texts[0], texts[0]], dim=1))
    prefixes.prefill(texts[3])
    lengths = [prefixes.cache_for(torch.cat([text, text], dim=1)).get_seq_length() for text in texts]
    assert lengths == [32, 32, 0, 32]
    prefixes.prefill(texts[2])
    lengths = [prefixes.cache_for(torch.cat([text, text], dim=1)).get_seq_length() for text in texts]
    assert lengths == [0, 32, 32, 32]
    assert prefixes.nbytes <= prefixes.max_bytes
    small = make(model, max_bytes=one.nbytes - 1)
    assert not small.prefill(texts[0])
    assert len(small) == 0
    prefixes.clear()
    after = contents(in_use)
    assert all(torch.equal(a, b) for x, y in zip(before, after, strict=True) for a, b in zip(x, y, strict=True))


def test_memory_goes_with_what_is_dropped() -> None:
    """Extensions of one beginning lie in one pool, which shrinks when they go."""
    model = tiny_llama()
    system = prompt(1, 16)
    prefixes = make(model, max_bytes=20_000)
    sizes = []
    for seed in range(8):
        prefixes.prefill(system)  # stays the most recently used
        prefixes.prefill(torch.cat([system, prompt(1, 40, seed=seed)], dim=1))
        sizes.append(prefixes.cache_for(torch.cat([system, system], dim=1)).nbytes_allocated)
        assert prefixes.nbytes <= 20_000
    assert 1 < len(prefixes) < 9
    assert max(sizes) < 1.5 * 20_000


def test_images_stand_for_more_than_their_tokens() -> None:
    model = tiny_llama("sdpa")
    model.config.image_token_id = 98
    prefixes = make(model)
    text = prompt(1, 33, vocab_size=98)
    text[0, 18:22] = 98
    with pytest.raises(ValueError, match="keep what is before them"):
        prefixes.prefill(text)
    cache = prefixes.cache_for(text)
    with torch.no_grad():
        model(text, past_key_values=cache)
    assert prefixes.keep(text, cache)
    assert prefixes.cache_for(torch.cat([text, text], dim=1)).get_seq_length() == 16


def test_tokens_of_media_may_be_named_by_a_part_of_the_configuration() -> None:
    model = families.build("gemma3")
    model.config.vision_config.image_token_id = 77
    text = prompt(1, 20, vocab_size=70)
    prefixes = make(model)
    assert prefixes.prefill(text)
    text[0, 5] = 77
    with pytest.raises(ValueError, match="keep what is before them"):
        prefixes.prefill(text)


def test_refusals() -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match="encoder"):
        PrefixCache(families.build("bart"), PLENTY)
    with pytest.raises(ValueError, match="max_cache_len"):
        make(model, max_cache_len=64)
    with pytest.raises(ValueError, match="max_bytes=0"):
        make(model, max_bytes=0)
    with pytest.raises(ValueError, match="unknown cache_config key"):
        make(model, kv_dtype="fp8")
    prefixes = make(model)
    with pytest.raises(ValueError, match="integers"):
        prefixes.cache_for(torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"shape \[1, 0\]"):
        prefixes.prefill(torch.zeros(1, 0, dtype=torch.int64))
    ids = prompt(2, 9)
    cache = prefixes.cache_for(ids)
    generate(model, ids, cache)
    with pytest.raises(ValueError, match=r"2 row\(s\).*2 sequence\(s\)"):
        prefixes.keep(ids, cache)
    with pytest.raises(ValueError, match="2 row"):
        prefixes.prefill(ids)
    single = prefixes.cache_for(ids[:1])
    with pytest.raises(ValueError, match="holds no tokens"):
        prefixes.keep(ids[:1], single)
    mask = torch.ones(1, 9, dtype=torch.int64)
    mask[0, :2] = 0
    text = generate(model, ids[:1], single, attention_mask=mask)
    with pytest.raises(ValueError, match="without padding"):
        prefixes.keep(text, single)
    with pytest.raises(ValueError, match="the cache holds 20 tokens, but 9"):
        prefixes.keep(ids[:1], single)
    other = tiny_llama()
    for owner, options in ((other, OPTIONS), (model, {**OPTIONS, "kv_cache_dtype": "fp8"})):
        cache = QuantizedPagedCache.from_model(owner, **options)
        text = generate(owner, ids[:1], cache)
        with pytest.raises(ValueError, match="another model's, or has other options"):
            prefixes.keep(text, cache)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.lists(st.integers(5, 6), min_size=1, max_size=14), min_size=2, max_size=6), st.data())
def test_a_wrong_beginning_is_never_served(texts: list[list[int]], data: Any) -> None:
    """Whatever is kept and dropped: what a request is given are the keys and values of its own first tokens."""
    model = tiny_llama()
    prefixes = PrefixCache(model, data.draw(st.sampled_from([1 << 15, 1 << 17])), kv_cache_dtype="model", page_size=3)
    for text in texts:
        ids = torch.tensor([text])
        cache = prefixes.cache_for(ids)
        length = cache.get_seq_length()
        assert length < len(text)
        expected = DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids, past_key_values=expected)
            model(ids[:, length:], past_key_values=cache)
        for pair, layer in zip(contents(cache), expected.layers, strict=True):
            for ours, dense in zip(pair, (layer.keys, layer.values), strict=True):
                assert (ours - dense).abs().max() <= 64 * torch.finfo(torch.float32).eps * dense.abs().max()
        prefixes.keep(ids, cache)
        assert prefixes.nbytes <= prefixes.max_bytes
