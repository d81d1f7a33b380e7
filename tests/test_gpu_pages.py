"""On a GPU: pages in host memory, and those that several requests share."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import prompt, tiny_llama
from test_cache import both_contents_equal, sliding_model

from hf_kvquant import PrefixCache, QuantizedPagedCache

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", ["model", "int8", "fp8"])
def test_offloaded_pages(dtype: str) -> None:
    """Copies run beside the computation: the same tokens, and device memory for two layers."""
    model = tiny_llama("kvquant", dtype=torch.bfloat16, num_hidden_layers=8, max_position_embeddings=40000).cuda()
    ids = prompt(2, 30000).cuda()
    sequences, peaks = [], []
    for offload in (False, True):
        cache = QuantizedPagedCache.from_model(model, kv_cache_dtype=dtype, offload=offload)
        with torch.no_grad():
            for chunk in ids[:, :-1].split(2000, dim=1):
                model(chunk, past_key_values=cache, logits_to_keep=1)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        sequences.append(model.generate(ids, past_key_values=cache, max_new_tokens=40, do_sample=False))
        peaks.append(torch.cuda.max_memory_allocated())
        nbytes = cache.nbytes
        del cache
    assert torch.equal(*sequences)
    assert peaks[1] < peaks[0] - 0.5 * nbytes


@pytest.mark.parametrize("dtype", ["model", "int8", "fp8"])
def test_a_copy_of_offloaded_pages(dtype: str) -> None:
    """Made while the newest of them are on their way to host memory."""
    model = tiny_llama("kvquant", dtype=torch.bfloat16, max_position_embeddings=40000).cuda()
    cache = QuantizedPagedCache.from_model(model, kv_cache_dtype=dtype, offload=True)
    with torch.no_grad():
        model(prompt(2, 30000).cuda(), past_key_values=cache, logits_to_keep=1)
        other = copy.deepcopy(cache)
    torch.cuda.synchronize()
    assert both_contents_equal(cache, other)


@pytest.mark.parametrize("dtype", ["model", "int8", "fp8"])
@pytest.mark.parametrize("name", ["full", "sliding"])
def test_requests_that_share_a_prefix(name: str, dtype: str) -> None:
    model = {"full": tiny_llama, "sliding": sliding_model}[name]().cuda()
    options = {"kv_cache_dtype": dtype, "scales": "dynamic", "page_size": 4}
    system = prompt(1, 37).cuda()
    prefixes = PrefixCache(model, 1 << 30, **options)
    prefixes.prefill(system)
    for seed in range(3):
        ids = torch.cat([system, prompt(1, 5 + 3 * seed, seed=20 + seed).cuda()], dim=1)
        fresh = QuantizedPagedCache.from_model(model, **options)
        with torch.no_grad():
            model(system, past_key_values=fresh)
        generating = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        expected, got = (
            model.generate(ids, past_key_values=cache, **generating) for cache in (fresh, prefixes.cache_for(ids))
        )
        assert torch.equal(got, expected)
    assert prefixes.hits == 3
