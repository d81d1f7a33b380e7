"""Kernels run by Triton's interpreter, on tensors of the CPU.

Triton decides when a kernel is decorated whether it is interpreted, so these functions run in a process that has
`TRITON_INTERPRET=1` from its beginning. They raise AssertionError and return what is worth printing.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import torch
from helpers import QUANTIZED
from test_gpu_attention import check_results, in_dtype, shortened
from test_gpu_write import copied, flat
from test_ops import Case, Problem, build

from hf_kvquant.ops import PagedTensor, reference

warnings.filterwarnings("ignore", category=RuntimeWarning)  # numpy's, about the infinities and NaN that are asked for

# Where nothing is, any number may stand in a page table.
NO_PAGE = 2**31 - 1


def attend(
    problem: Problem, tiles: tuple[int, ...] | None, splits: int | None, lse: torch.Tensor | None = None
) -> torch.Tensor:
    """`paged_attention` by the kernel, in `tiles` (BLOCK_M, BLOCK_N) and splits of the table's or of another choice."""
    from hf_kvquant.ops import triton

    o = problem.options
    return triton.paged_attention(
        problem.query, problem.page_table, problem.seq_lens, *flat(problem.k), *flat(problem.v),
        o.get("attn_mask"), o["mask_start"], o.get("sinks"), o["softmax_scale"], o["softcap"], o["window"], o["causal"],
        lse, tiles=None if tiles is None else triton.tuning.Tiles(*tiles, num_warps=4, num_stages=2, programs=2),
        splits=splits,
    )  # fmt: skip


def without_pages_behind_the_end(problem: Problem) -> Problem:
    """The problem with page ids that are none in columns that hold no token."""
    page_table, page_size = problem.page_table.clone(), problem.k.pages.shape[2]
    for row, length in enumerate(problem.seq_lens.tolist()):
        page_table[row, max(-(-length // page_size), 0) :] = NO_PAGE
    return dataclasses.replace(problem, page_table=page_table)


def check_attention(
    case: Case, dtype: torch.dtype, tiles: tuple[int, ...] | None, splits: int | None, has_lse: bool
) -> float:
    """Right to within the rounding of its operands, with poison where no token is; returns the share of the bound."""
    clean, poisoned = (in_dtype(build(case, poisoned=poison), dtype) for poison in (False, True))
    lse = torch.full(clean.query.shape[:3], torch.nan) if has_lse else None
    return check_results(clean, attend(without_pages_behind_the_end(poisoned), tiles, splits, lse), lse)


def check_shortened(
    case: Case, lengths: list[int], options: dict[str, Any], tiles: tuple[int, int] | None, splits: int
) -> None:
    """`shortened`, with page ids that are none wherever no token is."""
    problem = shortened(case, lengths, options)
    problem.page_table.copy_(without_pages_behind_the_end(problem).page_table)
    lse = torch.full(problem.query.shape[:3], torch.nan)
    check_results(problem, attend(problem, tiles, splits, lse), lse)


def check_blind_rows(case: Case, options: dict[str, Any], tiles: tuple[int, int], splits: int) -> None:
    """Rows from which `options` hide everything are zero; without any, a mask hides all from the second row."""
    problem = build(case, poisoned=True)
    seen = torch.ones(1, 1, case.num_tokens, max(case.lengths), dtype=torch.bool)
    seen[:, :, 1] = False
    blind = torch.tensor([bool(options) or row == 1 for row in range(case.num_tokens)])
    for mask in (seen, torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)):
        problem.options |= {"attn_mask": mask, **options}
        got = attend(problem, tiles, splits)
        assert (got[:, :, blind] == 0).all()
        assert (got[:, :, ~blind] != 0).all()


def check_what_comes_with_strides(case: Case) -> None:
    """Sinks of every second place, and a format by another of its names."""
    problem = build(case, poisoned=True)
    expected = attend(problem, None, 1)
    problem.options["sinks"] = problem.options["sinks"].repeat_interleave(2)[::2]
    for side in (problem.k, problem.v):
        assert side.format == "fp8_e4m3"
        side.format = "fp8"
    assert torch.equal(attend(problem, None, 1), expected)


def check_lowest_bias(case: Case) -> None:
    """A row in which all have the lowest float sees all of them alike; where others are, those are hidden."""
    problem = build(case, poisoned=True)
    bias = torch.full((1, 1, case.num_tokens, max(case.lengths)), torch.finfo(torch.float32).min)
    bias[:, :, 1, ::2] = 0.0
    problem.options |= {"attn_mask": bias}
    expected = problem.run()
    assert (expected[:, :, 0] != 0).any()
    torch.testing.assert_close(attend(problem, None, 1), expected, rtol=1e-4, atol=1e-4)


def check_bytes(
    key: torch.Tensor, value: torch.Tensor, sides: list[PagedTensor], tables: list[torch.Tensor], counted: bool = True
) -> None:
    """The kernel writes what the reference does, bit for bit, and counts the same."""
    from hf_kvquant.ops import triton

    results = []
    for write in (triton.write_kv, reference.write_kv):
        k, v = (copied(side, "cpu") for side in sides)
        clipped = torch.tensor([100, 200]) if counted else None
        write(key, value, *tables, *flat(k), *flat(v), clipped)
        results.append((k, v, None if clipped is None else clipped.tolist()))
    first, other = results
    for name, got, expected in zip("kv", first[:2], other[:2], strict=True):
        if got.token_scale is not None:
            scales = got.token_scale.float(), expected.token_scale.float()
            torch.testing.assert_close(*scales, rtol=0, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")
        torch.testing.assert_close(
            got.pages, expected.pages, rtol=0, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert first[2] == other[2]


def check_nothing_before_the_pages(side: PagedTensor) -> None:
    """Tokens of a negative length are written nowhere. Half of the pages of `side` lie before those that are given."""
    from hf_kvquant.ops import triton

    sides = [copied(side, "cpu") for _ in "kv"]
    _, num_heads, _, head_dim = side.pages.shape
    given = [
        dataclasses.replace(each, pages=each.pages[2:], token_scale=each.token_scale[2:])  # type: ignore[index]
        for each in sides
    ]
    x = torch.ones(1, num_heads, 3, head_dim)
    tables = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([-17], dtype=torch.int32)
    triton.write_kv(x, x, *tables, *flat(given[0]), *flat(given[1]), None)
    assert not any(each.pages.any() or each.token_scale.any() for each in sides)  # type: ignore[union-attr]


def check_read(side: PagedTensor, page_ids: torch.Tensor, dtype: torch.dtype) -> None:
    """The kernel reads the numbers that the reference does, bit for bit."""
    from hf_kvquant.ops import triton

    arguments = (page_ids, *flat(side), dtype)
    got, expected = triton.read_pages(*arguments), reference.read_pages(*arguments)
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def check_every_code(*dtypes: torch.dtype) -> None:
    """Attention to one token returns its value: all 256 codes of every format, as the reference has them."""
    from hf_kvquant.ops import triton

    head_dim = 64
    codes = torch.arange(256, dtype=torch.uint8).view(4, 1, 1, head_dim)
    pages = torch.full((4, 1, 16, head_dim), 0x7F, dtype=torch.uint8)
    pages[:, :, :1] = codes
    tables = torch.arange(4, dtype=torch.int32)[:, None], torch.ones(4, dtype=torch.int32)
    key = [torch.full_like(pages, 128), "int8", None, None, None]
    for name in QUANTIZED:
        for dtype in dtypes:
            options: list[Any] = [None, 0, None, 1.0, None, None, True, None]
            query = torch.ones(4, 1, 1, head_dim, dtype=dtype)
            got = triton.paged_attention(query, *tables, *key, pages, name, None, None, None, *options)
            expected = reference.dequantize(codes, name, None, None, None)
            torch.testing.assert_close(got, expected.to(dtype), rtol=0, atol=0, equal_nan=True)


def runs_interpreted() -> bool:
    from hf_kvquant.ops.triton.attention import attention_kernel

    return type(attention_kernel).__name__ == "InterpretedFunction"
