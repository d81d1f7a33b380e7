"""`read_pages` on a CPU: every instruction set of this machine gives the bits of the reference."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from helpers import QUANTIZED
from test_ops import KINDS, empty_side, random_scales
from test_ops_cpu import KERNELS

from hf_kvquant.ops import PagedTensor, cpu, read_pages, reference

NUMBERS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _back_to_the_fastest() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    cpu.use()


def expected_of(side: PagedTensor, page_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return reference.read_pages(page_ids, side.pages, side.format, side.scale, side.zero, side.token_scale, dtype)


def assert_same_bits(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.dtype == expected.dtype
    nan, bits = expected.isnan(), {2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    assert torch.equal(got.isnan(), nan)
    assert torch.equal(got.view(bits)[~nan], expected.view(bits)[~nan])


@pytest.mark.parametrize("head_dim", [1, 64, 80, 256])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("path", KERNELS)
def test_every_code_under_every_scale(path: str, name: str, kind: str, head_dim: int) -> None:
    """NaN and infinities among them, in scales of tokens too; pages in any order and more than once."""
    cpu.use(path)
    rng, num_heads, page_size = np.random.default_rng(0), 3, 15
    dynamic = kind in ("dynamic", "equalized")
    side = empty_side(
        name, 11, num_heads, page_size, head_dim, dynamic=dynamic, **random_scales(rng, kind, num_heads, head_dim, 0.05)
    )
    side.pages.copy_(torch.from_numpy(rng.integers(0, 256, side.pages.shape, dtype=np.uint8)))
    if side.token_scale is not None:
        scales = rng.lognormal(0, 3, side.token_scale.shape)
        scales.flat[:3] = np.inf, np.nan, 1e38
        side.token_scale.copy_(torch.from_numpy(scales))
    page_ids = torch.from_numpy(rng.integers(0, 11, (2, 7)))
    for dtype, ids in zip(NUMBERS, (page_ids, page_ids.int(), page_ids.t().contiguous().t()), strict=True):
        assert_same_bits(read_pages(side, ids, dtype), expected_of(side, page_ids, dtype))


@pytest.mark.parametrize("dtype", NUMBERS, ids=str)
@pytest.mark.parametrize("stored", NUMBERS, ids=str)
@pytest.mark.parametrize("path", KERNELS)
def test_unquantized_pages(path: str, stored: torch.dtype, dtype: torch.dtype) -> None:
    """Denormals, ties, what overflows the other dtype, and no numbers."""
    cpu.use(path)
    bits = torch.arange(65_536).to(torch.uint16)
    numbers = torch.cat([bits.view(torch.bfloat16).float(), bits.view(torch.float16).float()])
    beside = (numbers.view(torch.int32) + torch.tensor([[-1], [0], [1], [0x8000], [0x1000]])).int().view(torch.float32)
    pages = beside.to(stored).reshape(-1, 2, 16, 32)
    page_ids = torch.arange(len(pages)).flip(0).reshape(4, -1)
    side = PagedTensor(pages, "model")
    assert_same_bits(read_pages(side, page_ids, dtype), expected_of(side, page_ids, dtype))


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("shape", [(1, 1000, 3, 16, 64), (7, 17, 1, 16, 128), (2, 3, 5, 1000, 80)], ids=str)
def test_threads_leave_nothing_out(shape: tuple[int, ...], num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    batch_size, num_columns, num_heads, page_size, head_dim = shape
    pages = torch.randint(0, 256, (batch_size * num_columns, num_heads, page_size, head_dim), dtype=torch.uint8)
    side = PagedTensor(pages, "int8", scale=torch.rand(num_heads, 1), zero=torch.randn(num_heads, head_dim))
    page_ids = torch.randperm(len(pages)).reshape(batch_size, num_columns)
    assert_same_bits(read_pages(side, page_ids, torch.bfloat16), expected_of(side, page_ids, torch.bfloat16))


@pytest.mark.parametrize("path", cpu.paths())
def test_nothing_to_read(path: str) -> None:
    cpu.use(path)
    side = PagedTensor(torch.zeros(2, 3, 16, 64, dtype=torch.uint8), "int8")
    for shape in ((0, 4), (2, 0)):
        got = read_pages(side, torch.zeros(shape, dtype=torch.int32), torch.float16)
        assert got.shape == (shape[0], 3, shape[1] * 16, 64)


@pytest.mark.parametrize("page", [-1, 2, 2**32])
@pytest.mark.parametrize("path", cpu.paths())
def test_a_page_outside_the_pool_is_refused(path: str, page: int) -> None:
    cpu.use(path)
    side = PagedTensor(torch.zeros(2, 3, 16, 64, dtype=torch.uint8), "int8")
    with pytest.raises(ValueError, match=re.escape(f"page_ids names a page outside 0 ... 1: [[0, 1], [1, {page}]]")):
        read_pages(side, torch.tensor([[0, 1], [1, page]]), torch.float32)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "dimensions": ({"page_ids": torch.tensor([0, 1])}, "page_ids is torch.int64 [2]; expected int32 or int64 [B, N]"),
    "dtype": ({"page_ids": torch.zeros(1, 2)}, "page_ids is torch.float32 [1, 2]; expected int32 or int64 [B, N]"),
    "device": ({"page_ids": torch.zeros(1, 2, dtype=torch.int32, device="meta")}, "page_ids is on meta"),
    "pages": ({"pages": torch.zeros(2, 16, 64, dtype=torch.uint8)}, "side.pages is [2, 16, 64]"),
    "storage": ({"pages": torch.zeros(2, 3, 16, 64)}, "side.pages is torch.float32; int8 is stored as torch.uint8"),
    "channels": ({"scale": torch.ones(1, 32)}, "side.scale is [1, 32]; expected [1 or 3, 1 or 64]"),
    "heads": ({"zero": torch.ones(2, 64)}, "side.zero is [2, 64]; expected [1 or 3, 1 or 64]"),
    "scale_dtype": ({"scale": torch.ones(1, 1).half()}, "side.scale is torch.float16; expected torch.float32"),
    "slots": ({"token_scale": torch.ones(2, 3, 8).bfloat16()}, "side.token_scale is [2, 3, 8]; expected [2, 3, 16]"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], message: str) -> None:
    """Also behind a call that was right."""
    side = PagedTensor(torch.zeros(2, 3, 16, 64, dtype=torch.uint8), "int8")
    page_ids = torch.tensor([[0, 1]])
    read_pages(side, page_ids, torch.float32)
    for name, value in changes.items():
        if name == "page_ids":
            page_ids = value
        else:
            setattr(side, name, value)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_pages(side, page_ids, torch.float32)


def test_other_layouts_and_dtypes_are_served() -> None:
    side = PagedTensor(torch.randint(0, 256, (4, 16, 3, 64), dtype=torch.uint8).transpose(1, 2), "fp8_e5m2")
    page_ids = torch.tensor([[3, 0, 2]])
    for dtype in (torch.float32, torch.float64):
        assert_same_bits(read_pages(side, page_ids, dtype), expected_of(side, page_ids, dtype))
