"""Pools on a CPU ask for huge pages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from helpers import tiny_llama

from hf_kvquant import QuantizedPagedCache
from hf_kvquant.huge_pages import prefer_huge_pages

SMAPS = Path("/proc/self/smaps")


def flags_at(address: int) -> set[str]:
    """What Linux notes of the memory at `address`; `hg`: huge pages are preferred."""
    here = False
    for line in SMAPS.read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            here = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif here and line.startswith("VmFlags:"):
            return set(line.split()[1:])
    pytest.skip("this system does not tell how it maps memory")


@pytest.mark.skipif(not SMAPS.exists(), reason="no /proc/self/smaps")
@pytest.mark.parametrize("max_cache_len", [None, 30_001])
def test_a_large_pool_asks_for_them(max_cache_len: int | None) -> None:
    model = tiny_llama(num_key_value_heads=4, head_dim=64, num_hidden_layers=1)
    cache = QuantizedPagedCache.from_model(model, kv_cache_dtype="fp8", max_cache_len=max_cache_len)
    tokens = torch.randn(1, 4, 30_000, 64)
    cache.update(tokens, tokens, 0)
    pages = cache.layers[0].k.paged.pages
    assert pages.nbytes > 7e6
    middle = flags_at(pages.data_ptr() + pages.nbytes // 2)
    if "hg" not in middle and "hg" not in flags_at(prefer_huge_pages(torch.empty(1 << 23)).data_ptr() + (1 << 24)):
        pytest.skip("this system has no huge pages")
    assert "hg" in middle


def test_small_and_odd_tensors_are_left_alone() -> None:
    for tensor in (torch.zeros(0), torch.zeros(63), torch.zeros(1000, 1000)[1:, 1:]):
        assert prefer_huge_pages(tensor) is tensor
        assert not tensor.any()
