"""Pools on a CPU lie in huge pages."""

from __future__ import annotations

import copy
import mmap
import re
import sys
from pathlib import Path

import pytest
import torch
from helpers import tiny_llama

from hf_kvquant import QuantizedPagedCache, huge_pages

SMAPS = Path("/proc/self/smaps")


def is_advised(tensor: torch.Tensor) -> bool:
    """Whether the system was asked for huge pages in the mapping that `tensor` lies in; what it has to give varies."""
    middle, here = tensor.data_ptr() + tensor.nbytes // 2, False
    for line in SMAPS.read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            here = int(bounds[1], 16) <= middle < int(bounds[2], 16)
        elif here and line.startswith("VmFlags:"):
            return "hg" in line.split()
    return False


@pytest.mark.skipif(not SMAPS.exists(), reason="no /proc/self/smaps")
@pytest.mark.parametrize("max_cache_len", [None, 200_001])
def test_a_large_pool_asks_for_them(max_cache_len: int | None) -> None:
    memory = mmap.mmap(-1, 4 << 20)  # not torch's, which may be a part of one that was advised and freed
    fresh = torch.frombuffer(memory, dtype=torch.uint8)
    assert not is_advised(fresh)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        pytest.skip("this system knows no huge pages")
    assert is_advised(fresh)
    model = tiny_llama(num_key_value_heads=4, head_dim=64, num_hidden_layers=1)
    cache = QuantizedPagedCache.from_model(model, kv_cache_dtype="fp8", max_cache_len=max_cache_len)
    tokens = torch.randn(1, 4, 200_000, 64)
    cache.update(tokens, tokens, 0)
    pages = cache.layers[0].k.paged.pages
    assert pages.nbytes > 50e6
    assert is_advised(pages)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux is asked for huge pages")
@pytest.mark.parametrize("nbytes", [2 << 20, (4 << 20) - 4096, (3 << 20) + 2, 63 << 20])
def test_a_tensor_starts_with_one_and_takes_little_more(nbytes: int) -> None:
    tensor = huge_pages.empty((nbytes // 2,), torch.bfloat16, torch.device("cpu"))
    assert tensor.data_ptr() % (2 << 20) == 0
    assert tensor.untyped_storage().nbytes() <= nbytes * 17 / 16 + (2 << 20)


@pytest.mark.parametrize("shape", [(0, 3), (63,), (1000, 1001), (3, 1 << 20)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16])
def test_tensors_are_as_asked_for(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for device in ("cpu", "meta"):
        tensor = huge_pages.empty(shape, dtype, torch.device(device))
        assert (tensor.shape, tensor.dtype, tensor.device.type) == (shape, dtype, device)
        assert tensor.is_contiguous()
    assert (huge_pages.empty(shape, dtype, torch.device("cpu")).fill_(3) == 3).all()
    with torch.device("meta"):  # what the program's default device is does not matter
        assert huge_pages.empty(shape, dtype, torch.device("cpu")).device.type == "cpu"


@pytest.mark.parametrize("max_cache_len", [None, 10_001])
def test_a_copied_cache_is_no_larger(max_cache_len: int | None) -> None:
    model = tiny_llama(num_key_value_heads=4, head_dim=64, num_hidden_layers=1)
    cache = QuantizedPagedCache.from_model(model, kv_cache_dtype="fp8", max_cache_len=max_cache_len)
    tokens = torch.randn(1, 4, 10_000, 64)
    cache.update(tokens, tokens, 0)
    other = copy.deepcopy(cache)
    for side in ("k", "v"):
        pages, copied = (getattr(c.layers[0], side).paged.pages for c in (cache, other))
        used = cache.layers[0].table.pages_in_use
        assert torch.equal(copied[:used], pages[:used])
        assert copied.data_ptr() not in (0, pages.data_ptr())
        if sys.platform == "linux":
            assert copied.data_ptr() % (2 << 20) == 0
        assert copied.untyped_storage().nbytes() <= pages.untyped_storage().nbytes()
