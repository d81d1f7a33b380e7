"""What the equalizer of dynamic int8 is worth, by the error of the scores that queries get from stored keys."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny_llama

from hf_kvquant import QuantizedPagedCache

HEAD_DIM, NUM_TOKENS, FIRST = 64, 500, 8
PAIR = [5, 37]  # channels that the model's rotary embedding turns into each other


def score_error(equalize: bool, in_keys: float, in_queries: float, first: int = FIRST) -> float:
    """RMS error of scores, with so much added to one pair of channels; the equalizer sees the first tokens."""
    generator = torch.Generator().manual_seed(0)
    model = tiny_llama(head_dim=HEAD_DIM)
    num_heads = model.config.num_key_value_heads

    def drawn(num_tokens: int) -> torch.Tensor:
        return torch.randn(1, num_heads, num_tokens, HEAD_DIM, generator=generator)

    key, value, query = drawn(NUM_TOKENS), drawn(NUM_TOKENS), drawn(63)
    key[..., PAIR] += in_keys
    query[..., PAIR] += in_queries
    cache = QuantizedPagedCache.from_model(model, kv_cache_dtype="int8", scales="dynamic", equalize=equalize)
    cache.update(key[:, :, :first], value[:, :, :first], 0)
    stored, _ = cache.update(key[:, :, first:], value[:, :, first:], 0)
    return (query @ (stored - key).mT).square().mean().sqrt().item()


@pytest.mark.parametrize("large", [3.0, 12.0])
def test_no_harm_where_queries_read_the_large_channels(large: float) -> None:
    """Keys and queries of pretrained models are often large in the same channels, which must not become coarser."""
    assert score_error(True, large, large) < score_error(False, large, large)


@pytest.mark.parametrize("large", [12.0, 48.0, 200.0])
def test_large_channels_leave_the_others_their_bits(large: float) -> None:
    assert score_error(True, large, 0.0) < 0.4 * score_error(False, large, 0.0)


def test_no_large_channels_no_harm() -> None:
    """Eight tokens tell channels apart by chance; that costs less than a tenth."""
    assert score_error(True, 0.0, 0.0) < 1.1 * score_error(False, 0.0, 0.0)


def test_one_token_is_not_taken_for_all() -> None:
    """A prompt may be the start token alone, whose keys are large in channels of their own."""
    generator = torch.Generator().manual_seed(0)
    model = tiny_llama(head_dim=HEAD_DIM)
    key = torch.randn(2, model.config.num_key_value_heads, NUM_TOKENS, HEAD_DIM, generator=generator)
    key[:, :, 0, PAIR] = 300.0
    error = {}
    for equalize in (True, False):
        cache = QuantizedPagedCache.from_model(model, kv_cache_dtype="int8", scales="dynamic", equalize=equalize)
        cache.update(key[:, :, :1], key[:, :, :1], 0)
        stored, _ = cache.update(key[:, :, 1:], key[:, :, 1:], 0)
        error[equalize] = (stored - key)[:, :, 1:].square().mean().sqrt()
    assert error[True] < 4 * error[False]
