"""On a GPU: `write_kv` gives the bytes of the reference, whatever comes in."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from helpers import QMAX, QUANTIZED
from test_ops import KINDS, difficult_numbers, empty_side, on, random_scales

from hf_kvquant.ops import PagedTensor, reference, write_kv

pytestmark = pytest.mark.gpu

# New tokens, head_dim of K and of V: every size in some combination, since each pair of sizes is a kernel to compile.
SIZES = [(1, 64, 64), (15, 80, 80), (17, 96, 96), (1000, 128, 128), (1, 112, 112), (17, 192, 128), (1000, 256, 256),
         (2, 128, 128), (63, 64, 80)]  # fmt: skip
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LAYOUTS = ["contiguous", "transposed", "fused_qkv", "strided", "expanded"]


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """`[B, H, T, D]` numbers in other places of memory."""
    batch_size, num_heads, num_tokens, head_dim = x.shape
    if layout == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "fused_qkv":
        fused = x.new_zeros(batch_size, num_tokens, 3, num_heads, head_dim)
        fused[:, :, 1] = x.transpose(1, 2)
        return fused[:, :, 1].transpose(1, 2)
    if layout == "strided":
        wide = x.new_zeros(batch_size, num_heads, num_tokens, 2 * head_dim)
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "expanded":
        return x[:, :1].expand(x.shape)
    return x


def flat(side: PagedTensor) -> list[Any]:
    return [side.pages, side.format, side.scale, side.zero, side.token_scale]


def copied(side: PagedTensor, device: str) -> PagedTensor:
    pages, name, scale, zero, token_scale = (t.clone() if isinstance(t, torch.Tensor) else t for t in flat(side))
    return on(PagedTensor(pages, name, scale, zero, token_scale), device)


def check_bytes(key: torch.Tensor, value: torch.Tensor, sides: list[PagedTensor], tables: list[torch.Tensor]) -> None:
    """Write on the GPU; the same again by the reference, on the GPU and on the CPU."""
    results = []
    for ours, device in ((True, "cuda"), (False, "cuda"), (False, "cpu")):
        k, v = (copied(side, device) for side in sides)
        clipped = torch.tensor([100, 200], device=device)
        key, value = key.to(device), value.to(device)
        page_table, seq_lens = (table.to(device) for table in tables)
        if ours:
            write_kv(key, value, k, v, page_table, seq_lens, clipped)
        else:
            reference.write_kv(key, value, page_table, seq_lens, *flat(k), *flat(v), clipped)
        results.append((on(k, "cpu"), on(v, "cpu"), clipped.tolist()))
    first = results[0]
    for other in results[1:]:
        for got, expected in zip(first[:2], other[:2], strict=True):
            if got.token_scale is not None:
                scales = got.token_scale.float(), expected.token_scale.float()
                torch.testing.assert_close(*scales, rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(got.pages, expected.pages, rtol=0, atol=0, equal_nan=True)
        assert first[2] == other[2]


@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "-".join(map(str, sizes)))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", QUANTIZED)
def test_bytes(name: str, kind: str, sizes: tuple[int, int, int]) -> None:
    """K in one format and V in another; ragged lengths in a ring that wraps; dtypes and strides in turn."""
    turn = QUANTIZED.index(name) + KINDS.index(kind) + SIZES.index(sizes)
    dtype, layout = DTYPES[turn % 3], LAYOUTS[turn % 5]
    page_size = (16, 64, 4)[turn % 3]
    num_tokens, *head_dims = sizes
    rng = np.random.default_rng(turn)
    names = (name, (*QUANTIZED, "model")[turn % 4])
    dynamic = kind in ("dynamic", "equalized")
    num_columns = -(-num_tokens // page_size) + 1
    pool_size = 3 * num_columns + 2
    capacity = num_columns * page_size
    page_table = torch.tensor(rng.permutation(pool_size)[: 3 * num_columns].reshape(3, -1), dtype=torch.int32)
    seq_lens = torch.tensor([num_tokens, num_tokens + 5, 3 * capacity + 7], dtype=torch.int32)
    sides, given = [], []
    for side_name, head_dim in zip(names, head_dims, strict=True):
        quantized = side_name != "model"
        fields = random_scales(rng, kind, 2, head_dim, 3.0 / QMAX[side_name]) if quantized else {"dtype": dtype}
        sides.append(empty_side(side_name, pool_size, 2, page_size, head_dim, dynamic=dynamic and quantized, **fields))
        shape = (3, 2, max(num_tokens, 3), head_dim)
        size = QMAX[side_name] / 3 if kind == "unit" and quantized else 1.0
        given.append(difficult_numbers(rng, shape, dtype, size)[:, :, :num_tokens].cuda())
    check_bytes(*(laid_out(x, layout) for x in given), sides, [page_table, seq_lens])


def every_pattern(dtype: torch.dtype) -> torch.Tensor:
    """All 65,536 numbers of a 16-bit dtype, `[1, 2, 256, 128]`."""
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    return bits.view(dtype).view(1, 2, 256, 128)


@pytest.mark.parametrize("kind", ["unit", "tensor", "dynamic", "shuffled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_every_bit_pattern(name: str, dtype: torch.dtype, kind: str) -> None:
    """The conversion of the device, against the reference's: all 16-bit numbers, and 65,536 of 32 bits."""
    generator = torch.Generator().manual_seed(QUANTIZED.index(name))
    if dtype == torch.float32:
        bits = torch.randint(-(1 << 31), 1 << 31, (1 << 16,), generator=generator)
        x = bits.to(torch.int32).view(dtype).view(1, 2, 256, 128)
    else:
        x = every_pattern(dtype)
    if kind == "shuffled":  # numbers of all sizes in a token
        x = x.flatten()[torch.randperm(1 << 16, generator=generator)].view_as(x)
    dynamic = kind in ("dynamic", "shuffled")
    fields = {"scale": torch.ones(1, 1)} if kind == "tensor" else {}
    sides = [empty_side(name, 16, 2, 16, 128, dynamic=dynamic, **fields) for _ in range(2)]
    tables = [torch.arange(16, dtype=torch.int32)[None], torch.tensor([256], dtype=torch.int32)]
    x = x.cuda()
    check_bytes(x, x.flip(-1), sides, tables)


@pytest.mark.parametrize("name", QUANTIZED)
def test_ties_of_every_code(name: str) -> None:
    """Numbers next to and in the middle of two codes, in fp32."""
    codes = torch.arange(256, dtype=torch.uint8)
    values = reference.dequantize(codes.view(1, 1, 1, -1), name, None, None, None).flatten()
    values = values[values.isfinite()].sort().values
    middle = (values[1:] + values[:-1]) / 2
    around = torch.cat([middle, *(torch.nextafter(middle, torch.full_like(middle, to)) for to in (-1e9, 1e9))])
    x = torch.zeros(1, 1, 16, 128)
    x.view(-1)[: len(around)] = around
    sides = [empty_side(name, 1, 1, 16, 128) for _ in range(2)]
    tables = [torch.zeros(1, 1, dtype=torch.int32), torch.tensor([16], dtype=torch.int32)]
    check_bytes(x.cuda(), -x.cuda(), sides, tables)


def test_pages_beyond_two_to_the_31_elements() -> None:
    """The last pages of a pool of 2.3 GB per side are written and read like those of a small pool."""
    from hf_kvquant.ops import paged_attention

    num_heads, page_size, head_dim, pool_size, length = 8, 16, 128, 140_000, 55
    assert pool_size * num_heads * page_size * head_dim > 2**31
    torch.manual_seed(0)
    key, value = (torch.randn(2, num_heads, length, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    query = torch.randn(2, 32, 1, head_dim, device="cuda", dtype=torch.bfloat16)
    seq_lens = torch.full((2,), length, dtype=torch.int32, device="cuda")
    results = []
    for pages in (list(range(8)), [pool_size - 1 - i for i in range(7)] + [0]):
        sides = []
        for name in ("fp8_e4m3", "int8"):
            size = (max(pages) + 1, num_heads, page_size)
            stored = torch.full((*size, head_dim), 0x7F, dtype=torch.uint8, device="cuda")
            scales = torch.full(size, float("nan"), dtype=torch.bfloat16, device="cuda")
            sides.append(PagedTensor(stored, name, token_scale=scales))
        table = torch.tensor(pages, dtype=torch.int32, device="cuda").view(2, 4)
        write_kv(key, value, *sides, table, seq_lens)
        results.append(
            [side.pages[table.flatten().long()] for side in sides]
            + [paged_attention(query, *sides, table, seq_lens, softmax_scale=head_dim**-0.5)]
        )
    for small, large in zip(*results, strict=True):
        assert torch.equal(small, large)
    assert results[0][2].isfinite().all()


@pytest.mark.parametrize(("name", "dynamic"), list(itertools.product(QUANTIZED, (False, True))))
def test_writes_in_a_graph_follow_the_lengths(name: str, dynamic: bool) -> None:
    """A captured step goes on from whatever lengths lie on the device."""
    side = [on(empty_side(name, 4, 2, 4, 64, dynamic=dynamic), "cuda") for _ in range(2)]
    table = torch.tensor([[3, 1], [0, 2]], dtype=torch.int32, device="cuda")
    seq_lens = torch.tensor([1, 3], dtype=torch.int32, device="cuda")
    x = torch.randn(2, 2, 1, 64, device="cuda")
    write_kv(x, x, *side, table, seq_lens)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        write_kv(x, x, *side, table, seq_lens)
        seq_lens += 1
    expected = [copied(s, "cpu") for s in side]
    lengths = seq_lens.cpu()
    for step in range(4):
        x.copy_(torch.randn(2, 2, 1, 64))
        graph.replay()
        k, v = expected
        reference.write_kv(x.cpu(), x.cpu(), table.cpu(), lengths + step, *flat(k), *flat(v), None)
    for got, other in zip(side, expected, strict=True):
        assert torch.equal(got.pages.cpu(), other.pages)


def test_one_compiled_kernel_serves_other_numbers() -> None:
    """Triton compiles 1 and multiples of 16 into a kernel unless told not to; what is kept must serve all numbers."""
    for num_tokens, num_columns in ((1, 1), (1, 3), (2, 2), (16, 2), (13, 3), (1, 16)):
        for heads in (2, 3):
            sides = [empty_side("fp8_e4m3", 40, heads, 16, 64, dynamic=True) for _ in range(2)]
            table = torch.randperm(40)[: 2 * num_columns].view(2, -1).to(torch.int32)
            seq_lens = torch.tensor([num_tokens, num_tokens + 1], dtype=torch.int32)
            x = torch.randn(2, heads, num_tokens, 64, device="cuda", dtype=torch.bfloat16)
            check_bytes(x, -x, sides, [table, seq_lens])
