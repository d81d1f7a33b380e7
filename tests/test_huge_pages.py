"""Pools on a CPU lie in huge pages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from helpers import tiny_llama

from hf_kvquant import QuantizedPagedCache, huge_pages

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
    if not huge_bytes(huge_pages.empty((1 << 26,), torch.uint8, torch.device("cpu")).fill_(1)):
        pytest.skip("this system has no huge pages to give")
    model = tiny_llama(num_key_value_heads=4, head_dim=64, num_hidden_layers=1)
    cache = QuantizedPagedCache.from_model(model, kv_cache_dtype="fp8", max_cache_len=max_cache_len)
    tokens = torch.randn(1, 4, 200_000, 64)
    cache.update(tokens, tokens, 0)
    pages = cache.layers[0].k.paged.pages
    assert pages.nbytes > 50e6
    assert huge_bytes(pages)


@pytest.mark.skipif(not SMAPS.exists(), reason="no /proc/self/smaps")
@pytest.mark.parametrize(("nbytes", "huge"), [(2 << 20, 1), ((4 << 20) - 4096, 2), ((3 << 20) + 2, 1), (63 << 20, 32)])
def test_they_hold_most_of_a_tensor_and_little_more(nbytes: int, huge: int) -> None:
    if not huge_bytes(huge_pages.empty((1 << 26,), torch.uint8, torch.device("cpu")).fill_(1)):
        pytest.skip("this system has no huge pages to give")
    tensor = huge_pages.empty((nbytes // 2,), torch.bfloat16, torch.device("cpu"))
    tensor.fill_(1)
    assert tensor.data_ptr() % (2 << 20) == 0
    assert huge_bytes(tensor) == huge << 21


@pytest.mark.parametrize("shape", [(0, 3), (63,), (1000, 1001), (3, 1 << 20)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16])
def test_tensors_are_as_asked_for(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for device in ("cpu", "meta"):
        tensor = huge_pages.empty(shape, dtype, torch.device(device))
        assert (tensor.shape, tensor.dtype, tensor.device.type) == (shape, dtype, device)
        assert tensor.is_contiguous()
    assert (huge_pages.empty(shape, dtype, torch.device("cpu")).fill_(3) == 3).all()
