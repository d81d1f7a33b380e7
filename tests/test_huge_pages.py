"""Pools on a CPU lie in huge pages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from helpers import tiny_llama

from hf_kvquant import QuantizedPagedCache
from hf_kvquant.huge_pages import prefer_huge_pages

SMAPS = Path("/proc/self/smaps")


def huge_bytes(tensor: torch.Tensor) -> int:
    """How much of the mapping that `tensor` lies in is in huge pages."""
    middle, here = tensor.data_ptr() + tensor.nbytes // 2, False
    for line in SMAPS.read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            here = int(bounds[1], 16) <= middle < int(bounds[2], 16)
        elif here and (size := re.match(r"AnonHugePages: +(\d+) kB", line)):
            return int(size[1]) * 1024
    return 0


@pytest.mark.skipif(not SMAPS.exists(), reason="no /proc/self/smaps")
@pytest.mark.parametrize("max_cache_len", [None, 200_001])
def test_a_large_pool_gets_them(max_cache_len: int | None) -> None:
    if not huge_bytes(prefer_huge_pages(torch.empty(1 << 26, dtype=torch.uint8)).fill_(1)):
        pytest.skip("this system has no huge pages to give")
    model = tiny_llama(num_key_value_heads=4, head_dim=64, num_hidden_layers=1)
    cache = QuantizedPagedCache.from_model(model, kv_cache_dtype="fp8", max_cache_len=max_cache_len)
    tokens = torch.randn(1, 4, 200_000, 64)
    cache.update(tokens, tokens, 0)
    pages = cache.layers[0].k.paged.pages
    assert pages.nbytes > 50e6
    assert huge_bytes(pages)


def test_small_and_odd_tensors_are_left_alone() -> None:
    for tensor in (torch.zeros(0), torch.zeros(63), torch.zeros(1000, 1000)[1:, 1:]):
        assert prefer_huge_pages(tensor) is tensor
        assert not tensor.any()
