"""The operators on a CPU: every instruction set of this machine, and torch, against the reference and float64."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import QMAX, QUANTIZED
from test_import import PACKAGE_PARENT
from test_ops import CASES, KINDS, Case, Problem, build, difficult_numbers, empty_side, random_scales
from test_ops import test_attention as check_attention
from test_ops import test_nan_in_a_live_token_is_not_hidden as check_nan
from test_ops import test_parts_merge_to_the_whole as check_merging
from test_ops import test_written_bytes as check_written_bytes
from test_ops import test_written_bytes_beside_ties as check_ties

from hf_kvquant.ops import PagedTensor, channel_absmax, cpu, paged_attention, reference, write_kv
from hf_kvquant.ops.cpu import build as builds
from hf_kvquant.ops.cpu.chunked import digits

PATHS = cpu.paths()
HAS_COMPILER = cpu.use() != "torch"
KERNELS = [path for path in PATHS if path != "torch"] if HAS_COMPILER else []
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler")


@pytest.fixture(autouse=True)
def _back_to_the_fastest() -> Iterator[None]:
    threads = torch.get_num_threads()
    digits._are_exact.cache_clear()
    yield
    digits._are_exact.cache_clear()
    torch.set_num_threads(threads)
    cpu.use()


def flat(side: PagedTensor) -> tuple[Any, ...]:
    return side.pages, side.format, side.scale, side.zero, side.token_scale


# -- right on every path; the fastest is what test_ops.py runs on ------------------------------------------------------


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("path", [*KERNELS[1:], "torch"])
def test_attention_on_every_path(path: str, case: Case) -> None:
    cpu.use(path)
    check_attention(case)


@pytest.mark.parametrize("path", [*KERNELS[1:], "torch"])
def test_parts_merge_on_every_path(path: str) -> None:
    cpu.use(path)
    for shift, window in ((1, None), (16, 20), (70, None)):
        check_merging(shift, window)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("name", [*QUANTIZED, "model"])
@pytest.mark.parametrize("path", [*KERNELS[:1], "torch"])
def test_the_default_device_does_not_matter(path: str, name: str, tokens: int, window: int | None) -> None:
    cpu.use(path)
    kind = "unit" if name == "model" else "dynamic"
    case = Case(
        lengths=(100, 63), num_tokens=tokens, formats=(name, name), kinds=(kind, kind), window=window,
        dtype=torch.bfloat16,
    )  # fmt: skip
    key = torch.randn(2, 2, tokens, 64)
    results = []
    for default in ("cpu", "meta"):
        problem = build(case, poisoned=True)
        digits._places.cache_clear()
        with torch.device(default):
            write_kv(key, key, problem.k, problem.v, problem.page_table, problem.seq_lens)
            results.append(problem.run())
    assert torch.equal(*results)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("path", [*KERNELS, "torch"])
def test_log_sum_exp_equals_the_reference(path: str, sinks: bool, causal: bool) -> None:
    """Many spans, and sequences that are shorter than the queries, empty, and of negative length."""
    cpu.use(path)
    for tokens in (1, 15):
        case = Case(
            lengths=(9001, 63, 17, 17, 17), num_tokens=tokens, groups=4, sinks=sinks, causal=causal,
            formats=("int8", "int8"), kinds=("equalized", "zero_channel"),
        )  # fmt: skip
        problem = build(case, poisoned=True)
        problem.seq_lens[2:] = torch.tensor([3, 0, -5])
        got, expected = (torch.full(problem.query.shape[:3], torch.nan) for _ in range(2))
        output = problem.run(lse=got)
        options = problem.options
        expected_output = reference.paged_attention(
            problem.query, problem.page_table, problem.seq_lens, *flat(problem.k), *flat(problem.v),
            None, 0, options.get("sinks"), options["softmax_scale"], None, None, causal, expected,
        )  # fmt: skip
        assert (output - expected_output).abs().max() <= 1e-5 * expected_output.abs().max()
        assert sinks or (got[3:] == -torch.inf).all()
        # As near to the reference as outputs are to be; logits are of the order of 1, and one token moves it by 1e-4.
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(problem.run(), output)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("path", KERNELS[1:])
def test_bytes_on_every_path(path: str, name: str, kind: str) -> None:
    cpu.use(path)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check_written_bytes(name, kind, dtype, "cpu")
    if kind in ("channel", "equalized"):
        check_ties(name, kind, "cpu")


SHAPES = {  # head_dim, heads of K and V, queries a head, length, new tokens
    "one": (64, 3, 3, 1, 1),
    "split": (128, 2, 4, 9001, 1),
    "odd": (80, 1, 7, 1000, 1),
    "wide": (256, 2, 1, 4097, 2),
    "few": (96, 2, 5, 1000, 4),
    "many": (64, 1, 4, 1000, 63),
    "more": (128, 1, 1, 5000, 400),
    "tiny": (6, 2, 2, 63, 3),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("name", [*QUANTIZED, "model"])
@pytest.mark.parametrize("path", [*KERNELS, "torch"])
def test_attention_equals_the_reference(path: str, name: str, shape: tuple[int, int, int, int, int]) -> None:
    head_dim, heads, groups, length, tokens = shape
    kind = {"int8": "equalized", "fp8_e4m3": "channel", "fp8_e5m2": "dynamic", "model": "unit"}[name]
    case = Case(
        lengths=(length, tokens + 5), num_tokens=tokens, num_kv_heads=heads, groups=groups, head_dim=head_dim,
        formats=(name, name), kinds=(kind, kind),
    )  # fmt: skip
    problem = build(case, poisoned=True)
    options = problem.options
    rest = (None, 0, None, options["softmax_scale"], None, None, True)
    tables = (problem.page_table, problem.seq_lens)
    expected = reference.paged_attention(problem.query, *tables, *flat(problem.k), *flat(problem.v), *rest)
    cpu.use(path)
    error = (problem.run() - expected).abs().max() / expected.abs().max()
    assert error <= 1e-5


DTYPES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])
@pytest.mark.parametrize("path", [*KERNELS[:1], "torch"])
def test_queries_of_16_bits_may_be_split_into_bytes(
    path: str, dtype: torch.dtype, shape: tuple[int, int, int, int, int]
) -> None:
    check_split_query(path, shape, dtype=dtype)


@pytest.mark.parametrize("shape", ["split", "odd", "wide", "few"])
@pytest.mark.parametrize(
    "changes",
    [
        {"window": 37},
        {"window": 37, "ring": True},
        {"window": 32, "page_size": 8, "ring": True},
        {"page_size": 4},
        {"page_size": 48},
        {"page_size": 1 << 15, "num_kv_heads": 1},  # of which a span is a small part
        {"v_head_dim": 48},
        {"v_head_dim": 176},
        {"head_dim": 16},
        {"groups": 1, "num_tokens": 1},
        {"groups": 13, "num_tokens": 1},
        {"formats": ("int8", "fp8_e4m3"), "window": 37},
        {"formats": ("fp8_e4m3", "int8"), "window": 37},
    ],
    ids=str,
)
@pytest.mark.parametrize("path", KERNELS[:1])
def test_bytes_in_blocks(path: str, changes: dict[str, Any], shape: str) -> None:
    """Pages of other sizes, K and V of different ones; of the block in which a window begins only what it shows."""
    check_split_query(path, SHAPES[shape], dtype=torch.bfloat16, **changes)


def check_split_query(path: str, shape: tuple[int, int, int, int, int], **changes: Any) -> None:
    """Over int8, query and weights may be rounded to 16 bits of the row's largest; and no further."""
    case, problem, (got, lse), (expected, expected_lse) = beside_reference(
        path, shape, **{"formats": ("int8", "int8"), "kinds": ("equalized", "dynamic"), **changes}
    )
    query, scale, window = problem.query.to(torch.float32), problem.options["softmax_scale"], case.window
    fp32_error = 1e-5  # what every path is held to
    assert problem.k.scale is not None
    unit = problem.k.scale.repeat_interleave(case.groups, 0)[:, None]
    seen = slice(None if window is None else -(window + case.num_tokens - 1), None)
    for b, (k, v) in enumerate(zip(*problem.numbers, strict=True)):
        keys = torch.tensor(k[:, seen], dtype=torch.float32).repeat_interleave(case.groups, 0)
        # Half a step in every channel of the query, of which there are 127 * 256 up to its largest (torch: 127 * 254).
        step = scale * (query[b] * unit).abs().amax(-1) / (127 * 254)
        logit_error = step / 2 * (keys / unit).abs().sum(-1).amax(-1)[:, None] + fp32_error * (
            1 + expected_lse[b].abs()
        )
        assert ((lse[b] - expected_lse[b]).abs() <= logit_error).all()
        # A weight is off by twice that factor (its sum moves as well), and by half a step of the largest of 65,535.
        largest_weight = (scale * query[b] @ keys.transpose(1, 2)).amax(-1).sub(expected_lse[b]).exp()
        weight_error = 2 * logit_error + keys.shape[1] * largest_weight / (2 * 65535)
        error = weight_error[..., None] * float(np.abs(v[:, seen]).max())
        assert ((got[b] - expected[b]).abs() <= error + torch.finfo(case.dtype).eps * expected[b].abs()).all()


@pytest.mark.parametrize("shape", ["split", "odd", "wide", "few"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": torch.float16},
        {"window": 37},
        {"window": 37, "ring": True},
        {"window": 37, "kinds": ("dynamic", "dynamic")},
        {"window": 9, "page_size": 4, "ring": True},
        {"page_size": 48},
        {"v_head_dim": 48},
        {"v_head_dim": 20, "window": 37},
        {"head_dim": 16},
        {"kinds": ("channel", "channel")},
        {"groups": 13, "num_tokens": 1},
        {"formats": ("fp8_e4m3", "fp8_e5m2"), "window": 37},
        {"formats": ("model", "fp8_e4m3"), "kinds": ("unit", "tensor"), "window": 37},
    ],
    ids=str,
)
@pytest.mark.parametrize("path", KERNELS[:1])
def test_e4m3_may_be_multiplied_as_bfloat16(path: str, changes: dict[str, Any], shape: str) -> None:
    """Logits are those of fp32, weights may be rounded to 17 bits; what no query sees is no number."""
    case, problem, (got, lse), (expected, expected_lse) = beside_reference(
        path, SHAPES[shape], **{"kinds": ("head", "tensor"), "dtype": torch.bfloat16, **changes}
    )
    logit_error = 1e-5 * (1 + expected_lse.abs())
    assert ((lse - expected_lse).abs() <= logit_error).all()
    largest = max(float(np.abs(v).max()) for v in problem.numbers[1])
    error = (2 * logit_error + 2**-17)[..., None] * largest
    assert ((got - expected).abs() <= error + torch.finfo(case.dtype).eps * expected.abs()).all()


def beside_reference(
    path: str, shape: tuple[int, int, int, int, int], **fields: Any
) -> tuple[Case, Problem, tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Attention and its log-sum-exp on this path, where what no query sees is no number, and the reference's."""
    head_dim, heads, groups, length, tokens = shape
    sizes: dict[str, Any] = {
        "lengths": (length, tokens + 5), "num_tokens": tokens, "num_kv_heads": heads, "groups": groups,
        "head_dim": head_dim,
    }  # fmt: skip
    case = Case(**{**sizes, **fields})
    problem = build(case, poisoned=True)
    tables, scale, window = (problem.page_table, problem.seq_lens), problem.options["softmax_scale"], case.window
    lse, expected_lse = (torch.full(problem.query.shape[:3], torch.nan) for _ in range(2))
    query = problem.query.to(torch.float32)
    expected = reference.paged_attention(
        query, *tables, *flat(problem.k), *flat(problem.v), None, 0, None, scale, None, window, True, expected_lse
    )
    if window is not None:
        poison_before_windows(problem, case.num_tokens)
    cpu.use(path)
    return case, problem, (problem.run(lse=lse).to(torch.float32), lse), (expected, expected_lse)


def poison_before_windows(problem: Problem, num_tokens: int) -> None:
    """What no query sees any more has NaN for a scale, or is NaN itself."""
    page_size, num_columns = problem.k.pages.shape[2], problem.page_table.shape[1]
    for b, length in enumerate(problem.seq_lens.tolist()):
        for position in range(problem.first[b], length - num_tokens - problem.options["window"] + 1):
            page = problem.page_table[b, position // page_size % num_columns]
            for side in (problem.k, problem.v):
                if side.token_scale is not None:
                    side.token_scale[page, :, position % page_size] = torch.nan
                if side.pages.is_floating_point():
                    side.pages[page, :, position % page_size] = torch.tensor(torch.nan).to(side.pages.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_queries_that_are_no_numbers_stay_none(number: float, dtype: torch.dtype) -> None:
    problem = build(Case(lengths=(300,), head_dim=128, groups=4, formats=("int8", "int8"), dtype=dtype), False)
    clean = problem.run()
    problem.query[0, 1, 0, 7] = number
    got = problem.run()
    assert got[0, 1].isnan().all()
    assert torch.equal(got[0, [0, 2, 3]], clean[0, [0, 2, 3]])


# -- torch operators ---------------------------------------------------------------------------------------------------

# Enough int8 codes of a head that bytes are multiplied, where the processor can.
LONG = Case(
    lengths=(2063, 2101), num_kv_heads=2, groups=4, head_dim=256, formats=("int8", "int8"),
    kinds=("equalized", "dynamic"),
)  # fmt: skip


def run_reference(problem: Problem) -> torch.Tensor:
    options = problem.options
    return reference.paged_attention(
        problem.query, problem.page_table, problem.seq_lens, *flat(problem.k), *flat(problem.v),
        options.get("attn_mask"), options["mask_start"], options.get("sinks"), options["softmax_scale"],
        options["softcap"], options["window"], options["causal"],
    )  # fmt: skip


@pytest.mark.parametrize("exact", [True, False], ids=["bytes", "floats"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lengths": (2101, 2101)},
        {"lengths": (2101, 2101), "window": 2060},
        {"num_tokens": 3, "window": 2050, "sinks": True},
        {"softcap": 3.0, "q_size": 4.0},
        {"num_tokens": 4, "mask": ("float", "B", "1")},
        {"kinds": ("zero_channel", "zero_channel")},
        {"q_size": 30.0},
        {"dtype": torch.bfloat16},
    ],
    ids=str,
)
def test_long_int8_in_torch_operators(changes: dict[str, Any], exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of bytes are as near to the reference as those of floats; and are not used where they are not exact."""
    shapes, multiply = [], torch._int_mm

    def spy(x: torch.Tensor, y: torch.Tensor, **out: torch.Tensor) -> torch.Tensor:
        shapes.append((*x.shape, y.shape[1]))
        return multiply(x, y, **out) if exact else torch.zeros(x.shape[0], y.shape[1], dtype=torch.int32)

    monkeypatch.setattr(torch, "_int_mm", spy)
    problem = build(replace(LONG, **changes), poisoned=True)
    expected = run_reference(problem)
    cpu.use("torch")
    got = problem.run()
    rounding = torch.finfo(got.dtype).eps if got.dtype != torch.float32 else 1e-5
    assert (got.float() - expected.float()).abs().max() <= rounding * expected.float().abs().max()
    large = [shape for shape in shapes if max(shape) >= 2050]
    assert bool(large) == (exact and torch.cpu._is_vnni_supported() and torch.backends.mkldnn.is_available())


@pytest.mark.parametrize(
    ("num_places", "signed", "places_worth"), [(2, True, 2**15), (3, True, 2**22), (3, False, 2**23)]
)
@pytest.mark.parametrize("count", [1, 17, 1000, 70_000])
def test_digits_are_the_rows(num_places: int, signed: bool, places_worth: int, count: int) -> None:
    """To half a unit of the last place, and what fp32 rounds."""
    rows = torch.randn(2, 1, 3, count) * torch.tensor([2.0**-60, 1.0, 3e30])[:, None]
    rows[0, 0, 1] = 0.0
    rows = rows if signed else rows.abs()
    made = digits.Digits(rows.clone(), num_places, signed)
    error = (made.sums.double() @ made.digits.double() - rows.double()).abs().amax(dim=-1)
    unit = 1.02 / places_worth  # the largest number is a little less than the places hold
    assert (error <= (unit / 2 + 2**-23) * rows.abs().amax(dim=-1).double()).all()
    assert signed or made.digits[:, :, -3:].min() >= 0  # the highest digits, which come last


def test_rows_of_any_size_keep_their_digits() -> None:
    """A query a million times as large as the others of its head, a token of V a thousand times, take nothing away."""
    problem = build(replace(LONG, lengths=(2101, 2101)), poisoned=False)
    problem.query[:, 1] *= 2.0**20
    assert problem.v.token_scale is not None
    problem.v.token_scale[problem.page_table[:, 3].long(), :, 5] *= 1024
    expected = run_reference(problem)
    cpu.use("torch")
    got = problem.run()
    error = (got - expected).abs().amax(dim=-1) / expected.abs().amax(dim=-1)
    assert error.max() <= 2e-5


def test_what_is_no_number_stays_none_in_torch_operators() -> None:
    problem = build(replace(LONG, lengths=(2101, 2101)), poisoned=False)
    cpu.use("torch")
    clean = problem.run()
    problem.query[0, 1, 0, 7] = torch.nan
    assert problem.v.token_scale is not None
    problem.v.token_scale[int(problem.page_table[1, 3]), 1, 5] = torch.nan
    got = problem.run()
    assert got[0, 1].isnan().all()
    assert got[1, 4:].isnan().all()
    for sequence, heads in ((0, [0, 2, 3, 4, 5, 6, 7]), (1, [0, 1, 2, 3])):
        assert torch.equal(got[sequence, heads], clean[sequence, heads])


@pytest.mark.parametrize("lengths", [(1000, 950), (1003,)], ids=str)
@pytest.mark.parametrize("name", [*QUANTIZED, "model"])
def test_pages_in_one_piece_are_read_as_others(name: str, lengths: tuple[int, ...]) -> None:
    kind = "unit" if name == "model" else "equalized"
    case = Case(lengths=lengths, groups=4, head_dim=80, formats=(name, name), kinds=(kind, kind), window=990)
    problem = build(case, poisoned=True)
    cpu.use("torch")
    expected = problem.run()
    order = problem.page_table.flatten().long()
    for side in (problem.k, problem.v):
        pages = side.pages.clone()
        pages[: len(order)] = side.pages[order]
        side.pages = pages
        if side.token_scale is not None:
            scales = side.token_scale.clone()
            scales[: len(order)] = side.token_scale[order]
            side.token_scale = scales
    problem.page_table = torch.arange(len(order), dtype=torch.int32).view_as(problem.page_table)
    assert torch.equal(problem.run(), expected)


def test_pages_out_of_range_are_refused_in_torch_operators() -> None:
    problem = build(Case(lengths=(100,), formats=("int8", "int8"), kinds=("dynamic", "dynamic")), poisoned=False)
    cpu.use("torch")
    beyond = problem.k.pages.shape[0] - problem.page_table.shape[1] + 1
    problem.page_table = torch.arange(beyond, beyond + problem.page_table.shape[1], dtype=torch.int32)[None]
    with pytest.raises(ValueError, match=r"page_table names a page outside 0 \.\.\. \d+: \[\[\d"):
        problem.run()
    problem.page_table[0, 1] = -1
    with pytest.raises(ValueError, match="page_table names a page outside"):
        problem.run()


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("zero", [False, True], ids=["", "zero"])
@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("scaled", [(True, True), (False, True), (True, False), (False, False)], ids=str)
def test_bytes_of_k_and_v_at_once_equal_the_reference(name: str, zero: bool, scaled: tuple[bool, bool]) -> None:
    rng = np.random.default_rng(0)
    kind = "zero_channel" if zero else "equalized"
    page_table = torch.randperm(2 * 9).to(torch.int32).view(2, 9)
    seq_lens = torch.tensor([63, 70], dtype=torch.int32)
    x = [difficult_numbers(rng, (2, 2, 17, 80), torch.bfloat16, 1.0) for _ in range(2)]
    fields = [random_scales(rng, kind, 2, 80, 2 / QMAX[name]) if with_scale else {} for with_scale in scaled]
    written = []
    for path in ("torch", "reference"):
        sides = [empty_side(name, 18, 2, 8, 80, dynamic=True, **field) for field in fields]
        if path == "torch":
            cpu.use("torch")
            write_kv(*x, *sides, page_table, seq_lens)
        else:
            reference.write_kv(*x, page_table, seq_lens, *flat(sides[0]), *flat(sides[1]), None)
        written.append(sides)
    for got, expected in zip(*written, strict=True):
        assert torch.equal(got.pages, expected.pages)
        assert got.pages.any()
        torch.testing.assert_close(got.token_scale, expected.token_scale, rtol=0, atol=0, equal_nan=True)


# -- many tokens, threads ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["zero_channel", "equalized"])
@pytest.mark.parametrize("name", [*QUANTIZED, "model"])
@pytest.mark.parametrize("path", KERNELS)
def test_many_bytes_equal_the_reference(path: str, name: str, kind: str) -> None:
    """Enough tokens for several threads, in odd shapes."""
    rng = np.random.default_rng(0)
    cpu.use(path)
    torch.set_num_threads(3)
    num_tokens, heads = 1000, 3
    page_table = torch.randperm(2 * 63).to(torch.int32).view(2, 63)
    seq_lens = torch.tensor([1001, 1005], dtype=torch.int32)
    written = []
    x = [torch.randn(2, num_tokens, heads, dim).transpose(1, 2) for dim in (80, 33)]
    fields = [{} if name == "model" else random_scales(rng, kind, heads, dim, 2 / QMAX[name]) for dim in (80, 33)]
    for write in ("operator", "reference"):
        dynamic = kind == "equalized" and name != "model"
        k, v = (
            empty_side(name, 126, heads, 16, dim, dynamic=dynamic, **options)
            for dim, options in zip((80, 33), fields, strict=True)
        )
        clipped = torch.zeros(2, dtype=torch.int64)
        if write == "operator":
            write_kv(*x, k, v, page_table, seq_lens, clipped)
        else:
            reference.write_kv(*x, page_table, seq_lens, *flat(k), *flat(v), clipped)
        written.append([k.pages, v.pages, clipped] + [s.token_scale for s in (k, v) if s.token_scale is not None])
    assert written[0][0].any()
    for got, expected in zip(*written, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("path", [*KERNELS, "torch"])
def test_every_code_is_read_as_its_number(path: str, name: str) -> None:
    """With one visible token attention returns its value: all 256 codes, NaN and infinity among them."""
    codes = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 256)
    k, v = (PagedTensor(codes.clone(), name) for _ in range(2))
    k.pages.zero_()
    cpu.use(path)
    arguments = (k, v, torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32))
    got = paged_attention(torch.ones(1, 1, 1, 256), *arguments, softmax_scale=1.0)
    expected = reference.dequantize(codes, name, None, None, None)
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 17, 80), (1, 2, 1000, 64), (3, 1, 63, 13)])
def test_absolute_maxima_on_every_path(path: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    cpu.use(path)
    batch_size, num_heads, num_tokens, dim = shape
    x = torch.randn(batch_size, num_tokens, num_heads, dim, dtype=torch.float64).to(dtype).transpose(1, 2)
    x[torch.rand(shape) < 0.1] = torch.nan
    x[torch.rand(shape) < 0.1] = -torch.inf
    valid = torch.rand(batch_size, num_tokens) < 0.5
    for counts in (None, valid, valid[:1].expand(batch_size, -1), torch.zeros_like(valid)):
        sizes = np.abs(x.double().numpy())
        sizes[~np.isfinite(sizes)] = 0
        if counts is not None:
            sizes[~counts[:, None, :, None].expand(shape).numpy()] = 0
        assert torch.equal(channel_absmax(x, counts), torch.from_numpy(sizes.max(axis=(0, 2))).float())


def test_absolute_maxima_of_something_else_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x is torch.uint8 \[1, 1, 2, 3\]; expected floating point"):
        channel_absmax(torch.zeros(1, 1, 2, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"valid is torch.bool \[1, 3\]; expected bool \[1, 2\]"):
        channel_absmax(torch.zeros(1, 1, 2, 3), torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="valid is on meta; x is on cpu"):
        channel_absmax(torch.zeros(1, 1, 2, 3), torch.ones(1, 2, dtype=torch.bool, device="meta"))


@pytest.mark.parametrize("path", [*KERNELS[1:], "torch"])
def test_nan_on_every_path(path: str) -> None:
    cpu.use(path)
    check_nan()


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("path", KERNELS)
def test_denormals_are_kept_where_the_process_flushes_them(path: str, name: str) -> None:
    cpu.use(path)
    codes = torch.arange(1, 9, dtype=torch.uint8).view(1, 1, 1, 8)
    k, v = (PagedTensor(codes.clone(), name) for _ in range(2))
    expected = reference.dequantize(codes, name, None, None, None)
    tables = (torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32))
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot")
    try:
        got = paged_attention(torch.zeros(1, 1, 1, 8), k, v, *tables, softmax_scale=1.0)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("path", KERNELS)
def test_a_kernel_leaves_denormals_as_they_are(path: str) -> None:
    cpu.use(path)
    build(Case(), poisoned=False).run()
    assert torch.tensor(1e-40) * 1 != 0


# -- threads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", KERNELS)
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_threads_that_take_several_heads_leave_none_out(num_threads: int, path: str) -> None:
    case = Case(lengths=(13_001,), num_kv_heads=4, groups=2, head_dim=16, formats=("int8", "fp8_e4m3"))
    problem = build(case, poisoned=True)
    expected = run_reference(problem)
    cpu.use(path)
    torch.set_num_threads(num_threads)
    assert (problem.run() - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("path", KERNELS[:1])
def test_the_number_of_threads_changes_no_bit(path: str, tokens: int) -> None:
    cpu.use(path)
    problem = build(Case(lengths=(3000, 63), num_tokens=tokens, head_dim=128, formats=("int8", "int8")), poisoned=False)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(problem.run())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_goes_on() -> None:
    """OpenMP's threads do not survive a fork; waiting for them would never end."""
    code = """
    import os, sys, warnings
    import torch
    from test_ops import Case, build
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    problem = build(Case(lengths=(3000,), head_dim=128), poisoned=False)
    expected = problem.run()
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(problem.run(), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(problem.run(), expected)
    """
    path = os.pathsep.join([PACKAGE_PARENT, str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("path", PATHS)
def test_an_infinity_leaves_nothing_of_its_token(path: str, name: str) -> None:
    """NaN, which nobody overlooks; a logit of -inf would hide the token."""
    cpu.use(path)
    problem = build(Case(lengths=(33, 33), formats=(name, name), kinds=("dynamic", "dynamic")), poisoned=False)
    clean = problem.run()
    key, value = torch.randn(2, 2, 2, 1, 64)
    key[0, 0, 0, 3] = torch.inf
    value[1, 1, 0, 5] = -torch.inf
    write_kv(key, value, problem.k, problem.v, problem.page_table, problem.seq_lens)
    assert problem.k.token_scale is not None
    assert problem.k.token_scale.isnan().sum() == 1
    got, heads = problem.run(), clean.shape[1] // 2
    assert got[0, :heads].isnan().all()
    assert got[1, heads:].isnan().all()
    assert got[0, heads:].isfinite().all()
    assert got[1, :heads].isfinite().all()


@pytest.mark.parametrize("num_tokens", [1, 3])
@pytest.mark.parametrize("path", PATHS)
def test_a_window_of_nothing(path: str, num_tokens: int) -> None:
    cpu.use(path)
    problem = build(Case(lengths=(33, 33), num_tokens=num_tokens, window=1), poisoned=True)
    assert (problem.run() != 0).all()
    problem.options["window"] = 0
    assert (problem.run() == 0).all()


# -- what the kernels do not serve ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*KERNELS[:1], "torch"])
def test_unusual_layouts_are_served(path: str) -> None:
    cpu.use(path)
    problem = build(Case(num_tokens=3, mask=("float", "B", "1"), sinks=True), poisoned=False)
    expected = problem.run()
    wide = torch.zeros(*problem.query.shape[:3], 2 * problem.query.shape[3])[..., ::2]
    problem.query = wide.copy_(problem.query)
    for side in (problem.k, problem.v):
        side.pages = side.pages.transpose(1, 2).contiguous().transpose(1, 2)
    mask = problem.options["attn_mask"]
    problem.options["attn_mask"] = mask.transpose(2, 3).contiguous().transpose(2, 3).to(torch.float64)
    problem.options["sinks"] = problem.options["sinks"].to(torch.float64)
    problem.page_table = problem.page_table.t().contiguous().t()
    # The same numbers in other places may be added in another order: float32, sums of up to a few hundred terms.
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(problem.run(), expected, rtol=64 * eps, atol=64 * eps * float(expected.abs().max()))


@pytest.mark.parametrize("layout", ["gap", "token_scales", "channels"])
@pytest.mark.parametrize("path", [*KERNELS[:1], "torch"])
def test_pages_in_any_layout_are_served(path: str, layout: str) -> None:
    cpu.use(path)
    problem = build(Case(formats=("int8", "fp8_e5m2"), kinds=("dynamic", "dynamic")), poisoned=True)
    expected = problem.run()
    for side in (problem.k, problem.v):
        if layout == "token_scales":
            assert side.token_scale is not None
            side.token_scale = side.token_scale.transpose(1, 2).contiguous().transpose(1, 2)
            continue
        num_pages, *shape, head_dim = side.pages.shape
        wide = torch.zeros(num_pages, *shape, 2 * head_dim, dtype=torch.uint8)
        pages = wide[..., ::2]
        if layout == "gap":
            row = side.pages[0].numel()
            pages = torch.zeros(num_pages, row + 3, dtype=torch.uint8)[:, :row].view(side.pages.shape)
        side.pages = pages.copy_(side.pages)
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(problem.run(), expected, rtol=64 * eps, atol=64 * eps * float(expected.abs().max()))


@pytest.mark.parametrize("path", [*KERNELS[:1], "torch"])
def test_a_page_outside_the_pool_is_refused(path: str) -> None:
    cpu.use(path)
    for page in (-1, 99):
        problem = build(Case(kinds=("dynamic", "dynamic"), formats=("int8", "int8")), poisoned=False)
        problem.page_table[1, 0] = page
        with pytest.raises(ValueError, match="page_table names a page outside 0 ... "):
            problem.run()
        x = torch.zeros(2, 2, 17, 64)
        with pytest.raises(ValueError, match="page_table names a page outside 0 ... "):
            write_kv(x, x, problem.k, problem.v, problem.page_table, problem.seq_lens)


@pytest.mark.parametrize("formats", [("int8", "int8"), ("int8", "fp8_e4m3")], ids=str)
@pytest.mark.parametrize("kind", ["dynamic", "head"])
@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("path", [*KERNELS[:1], "torch"])
def test_nothing_is_written_to_a_page_outside_the_pool(
    path: str, batch_size: int, kind: str, formats: tuple[str, str]
) -> None:
    """A single token, to which page a ring has turned to, as well."""
    cpu.use(path)
    for page in (-1, 99):
        problem = build(Case(lengths=(17,) * batch_size, kinds=(kind, kind), formats=formats), poisoned=False)
        lens = torch.full((batch_size,), 17 + 16 * problem.page_table.shape[1], dtype=torch.int32)
        token = torch.ones(batch_size, problem.k.pages.shape[1], 1, problem.k.pages.shape[3])
        before = problem.k.pages.clone()
        problem.page_table[-1, 1] = page
        with pytest.raises(ValueError, match="page_table names a page outside 0 ... "):
            write_kv(token, token, problem.k, problem.v, problem.page_table[:, :2], lens)
        assert batch_size > 1 or torch.equal(problem.k.pages, before)


# -- building ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Puts a shell script in the compiler's place, and an empty cache; returns a log that the script may write to."""
    real = os.environ.get("CXX", "c++")

    def put(script: str) -> Path:
        program, log = tmp_path / "compiler", tmp_path / "log"
        program.write_text(f"#!/bin/sh\nreal={real}\nlog={log}\n{script}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setenv("CXX", str(program))
        return log

    return put


BROKEN = {
    "fails": "echo 'kernels.cpp:1: error: too old' >&2; exit 1",
    "crashes": "kill -9 $$",
    "makes something else": 'while [ "$1" != -o ]; do shift; done; echo nothing > "$2"',
}


@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
@pytest.mark.parametrize("script", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_compiler_is_said_once(
    script: str, compiler: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler(script)
    monkeypatch.setattr(cpu, "_libraries", {})
    monkeypatch.setattr(cpu, "_path", None)
    problem = build(Case(), poisoned=False)
    with pytest.warns(RuntimeWarning, match="could not be built") as caught:
        first = problem.run()
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(problem.run(), first)
    with pytest.raises(builds.BuildError):
        cpu.use(PATHS[0])


@needs_compiler
@pytest.mark.skipif(len(KERNELS) < 2, reason="needs two instruction sets")
def test_an_old_compiler_builds_what_it_knows(
    compiler: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    flag = builds._INSTRUCTIONS[KERNELS[0]][-1]
    compiler(f'for a; do if [ "$a" = {flag} ]; then exit 1; fi; done; exec $real "$@"')
    monkeypatch.setattr(cpu, "_libraries", {})
    monkeypatch.setattr(cpu, "_path", None)
    assert cpu.use() == KERNELS[1]
    assert not recwarn.list


@needs_compiler
def test_how_the_kernels_would_come_about_is_said(
    compiler: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler('exec $real "$@"')
    monkeypatch.setattr(builds, "_PREBUILT", tmp_path / "none")
    expected = f"C++ for {KERNELS[0]}, "
    assert cpu.outlook() == f"{expected}built on first use (compiler found: {tmp_path / 'compiler'})"
    assert not (tmp_path / "cache").exists()  # it only looks
    builds.load(KERNELS[0])
    assert cpu.outlook() == f"{expected}built before"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    monkeypatch.setenv("CXX", "/nowhere/c++")
    assert cpu.outlook().startswith("torch operators (no compiler: several times slower): install g++ or clang++")


def on(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What builds and chooses kernels takes this for `platform`, and has done nothing yet."""
    monkeypatch.setattr(builds, "sys", SimpleNamespace(platform=platform))
    monkeypatch.setattr(cpu, "_libraries", {})
    monkeypatch.setattr(cpu, "_path", None)


@pytest.mark.parametrize("chosen", ["", "clang++ -v"])
def test_a_mac_without_its_tools_has_no_compiler(
    chosen: str, compiler: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only programs that ask to install one, which nobody wants to be asked while a model generates."""
    compiler("")
    monkeypatch.setenv("CXX", chosen)
    on("darwin", monkeypatch)
    calls: list[list[str]] = []
    status = 2

    def call(command: list[str], **options: Any) -> SimpleNamespace:
        calls.append(command)
        return SimpleNamespace(returncode=status, stderr="")

    monkeypatch.setattr(builds.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(builds.subprocess, "run", call)
    builds._has_command_line_tools.cache_clear()
    try:
        remedy = "install the Command Line Tools (`xcode-select --install`)"
        assert cpu.outlook() == f"torch operators (no compiler: several times slower): {remedy}"
        with pytest.warns(
            RuntimeWarning, match=r"no C\+\+ compiler was found .*; install the Command Line Tools \(`xco"
        ):
            assert cpu.use() == "torch"
        assert calls == [["xcode-select", "-p"]]
        status = 0
        builds._has_command_line_tools.cache_clear()
        assert "compiler found" in cpu.outlook()
        monkeypatch.setattr(builds.shutil, "which", lambda name: f"/opt/homebrew/bin/{name}")
        status = 2
        builds._has_command_line_tools.cache_clear()
        assert "compiler found" in cpu.outlook()
    finally:
        builds._has_command_line_tools.cache_clear()


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_wheels_with_kernels_are_made_on_linux(
    platform: str, compiler: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A Mac built some before, under names that nobody looked for, and wheels elsewhere are not promised."""
    log = compiler("echo called > $log; exit 1")
    on(platform, monkeypatch)
    with pytest.raises(builds.BuildError, match=f"wheels with kernels are made on Linux, and this is {platform}"):
        builds.prebuild(tmp_path / "prebuilt")
    assert not log.exists()
    assert not (tmp_path / "prebuilt").exists()
    assert "wheel" not in builds.remedy()


def test_there_are_no_kernels_for_windows(
    compiler: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    log = compiler("echo called > $log; exit 1")
    on("win32", monkeypatch)
    assert cpu.outlook() == "torch operators (several times slower: there are no kernels for Windows)"
    with pytest.warns(RuntimeWarning, match="could not be built: there are no kernels for Windows$"):
        assert cpu.use() == "torch"
    with pytest.raises(builds.BuildError, match="there are no kernels for Windows"):
        cpu.use(PATHS[0])
    assert not log.exists()
    assert not (tmp_path / "cache").exists()


def test_no_compiler_is_said(compiler: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    compiler("")
    monkeypatch.setenv("CXX", " ")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(builds.BuildError, match="no C\\+\\+ compiler was found"):
        builds.load("default")
    assert cpu.outlook().startswith("torch operators (no compiler")


@needs_compiler
def test_one_of_many_builds_and_the_cache_serves_the_rest(compiler: Callable[[str], Path]) -> None:
    log = compiler('echo built >> $log; exec $real "$@"')
    threads = [threading.Thread(target=builds.load, args=("default",)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    builds.load("default")
    assert log.read_text().split() == ["built"]
    files = [path.name for path in (log.parent / "cache" / "hf_kvquant").iterdir()]
    assert sorted(name.split("-")[0] for name in files) == ["build.lock", "kernels"]  # nothing half done is left


@needs_compiler
@pytest.mark.parametrize("contents", [b"", b"\x7fELF and no more"])
def test_a_damaged_file_is_built_again(
    contents: bytes, compiler: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = compiler('echo built >> $log; exec $real "$@"')
    builds.load("default")
    (good,) = (tmp_path / "cache" / "hf_kvquant").glob("kernels-*")
    damaged = tmp_path / "other" / "hf_kvquant" / good.name
    damaged.parent.mkdir(parents=True, mode=0o700)
    damaged.write_bytes(contents)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    for _ in range(2):
        builds.load("default")
    assert log.read_text().split() == ["built"] * 2
    assert damaged.read_bytes() == good.read_bytes()


STRANGE: dict[str, Callable[[Path], object]] = {
    "of another user": lambda directory: os.chown(directory, 65534, -1),
    "in that of another user": lambda directory: os.chown(directory.parent, 65534, -1),
    "group writes": lambda directory: directory.chmod(0o770),
    "all write": lambda directory: directory.chmod(0o1777),
    "a link": lambda directory: directory.symlink_to(directory.rename(directory.with_name("elsewhere"))),
}


@needs_compiler
@pytest.mark.skipif(os.name != "posix", reason="needs users")
@pytest.mark.parametrize("change", STRANGE.values(), ids=STRANGE.keys())
def test_nothing_is_run_that_another_user_may_have_written(
    change: Callable[[Path], object], compiler: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.environ.get("CXX", "c++")
    compiler("exit 1")
    monkeypatch.setattr(builds, "_PREBUILT", tmp_path / "none")
    monkeypatch.setattr(builds, "instruction_sets", lambda: ["default"])
    directory = tmp_path / "cache" / "hf_kvquant"
    directory.mkdir(parents=True, mode=0o700)
    file = directory / builds._file_name(builds._flag_sets("default")[0])
    command = [real, "-shared", "-fPIC", "-x", "c++", os.devnull, "-o", str(file)]
    subprocess.run(command, check=True)
    assert cpu.outlook() == "C++ for default, built before"
    builds.load("default")
    try:
        change(directory)
    except PermissionError:  # only root gives files away: be somebody else instead
        monkeypatch.setattr(os, "getuid", lambda: 65534)
    assert cpu.outlook().startswith("C++ for default, built on first use")
    with pytest.raises(builds.BuildError, match="exit status 1"):
        builds.load("default")
    assert [path.name for path in directory.iterdir()] == [file.name]


@pytest.mark.skipif(os.name != "posix", reason="needs links")
def test_a_lock_that_is_a_link_is_not_followed(compiler: Callable[[str], Path], tmp_path: Path) -> None:
    log = compiler("echo called >> $log; exit 1")
    directory = tmp_path / "cache" / "hf_kvquant"
    directory.mkdir(parents=True, mode=0o700)
    (directory / "build.lock").symlink_to(tmp_path / "own")
    with pytest.raises(builds.BuildError):
        builds.load("default")
    assert log.exists()
    assert not (tmp_path / "own").exists()


@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
def test_the_cache_is_not_in_the_working_directory(
    compiler: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler("exit 1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(builds.BuildError):
        builds.load("default")
    assert not (tmp_path / "cache").exists()
    assert (tmp_path / "home" / ".cache" / "hf_kvquant").is_dir()


@needs_compiler
def test_built_without_openmp_and_without_a_cache(
    compiler: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = build(Case(), poisoned=False)
    cpu.use("default")
    expected = problem.run()
    compiler('for a; do if [ "$a" = -fopenmp ]; then exit 1; fi; done; exec $real "$@"')
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # no directory can be made below it
    monkeypatch.setattr(cpu, "_libraries", {})
    monkeypatch.setattr(cpu, "_path", None)
    torch.set_num_threads(2)
    with pytest.warns(RuntimeWarning, match="runs on one thread, because the compiler has found no OpenMP"):
        cpu.use("default")
    assert torch.equal(problem.run(), expected)


@needs_compiler
def test_openmp_is_used_once_it_is_there(compiler: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """What was built without is not for good; one warning says so, and the outlook, and no other build is tried."""
    without = 'for a; do if [ "$a" = -fopenmp ]; then echo refused >> $log; exit 1; fi; done; '
    # Whether the machine's own compiler has it does not matter.
    real = 'echo built >> $log; for a; do shift; [ "$a" = -fopenmp ] || set -- "$@" "$a"; done; exec $real "$@"'
    monkeypatch.setattr(builds, "instruction_sets", lambda: ["default"])

    def start(script: str) -> tuple[list[str], list[str]]:
        """What a new process warns of, and what it asks of the compiler."""
        log = compiler(script)
        log.unlink(missing_ok=True)
        on(sys.platform, monkeypatch)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            cpu.use()
            cpu.use()
        return [str(each.message) for each in caught], log.read_text().split() if log.exists() else []

    for asked in (["refused", "built"], ["refused"]):
        said, calls = start(without + real)
        assert calls == asked
        assert len(said) == 1
        assert "attention on the CPU runs on one thread, because the compiler has found no OpenMP" in said[0]
        assert cpu.outlook().startswith(
            "C++ for default, built before for one thread, because the compiler has found no"
        )
    assert start(real) == ([], ["built", "built"])  # an empty library first, which is quick
    assert cpu.outlook() == "C++ for default, built before"
    assert start(without + real) == ([], [])


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="wheels with kernels are made on Linux")
def test_kernels_that_came_with_the_package(
    compiler: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = build(Case(), poisoned=False)
    expected = {}
    for path in KERNELS:
        cpu.use(path)
        expected[path] = problem.run()
    files = builds.prebuild(tmp_path / "prebuilt")
    assert len(files) == len(set(files)) == (5 if "avx2" in KERNELS else 1)
    assert not any(b"libgomp" in file.read_bytes() for file in files)
    log = compiler("echo called > $log; exit 1")
    monkeypatch.setattr(builds, "_PREBUILT", tmp_path / "prebuilt")
    monkeypatch.setattr(cpu, "_libraries", {})
    torch.set_num_threads(2)
    assert cpu.outlook() == f"C++ for {KERNELS[0]}, prebuilt"
    for path in KERNELS:
        assert cpu.use(path) == path
        assert torch.equal(problem.run(), expected[path])
    assert not log.exists()
    (tmp_path / "other").mkdir()
    for file in files:
        (tmp_path / "other" / file.name).write_bytes(b"for another kind of machine")
    monkeypatch.setattr(builds, "_PREBUILT", tmp_path / "other")
    with pytest.raises(builds.BuildError):  # as if they were not there
        builds.load(KERNELS[0])
    assert log.exists()


def test_an_unknown_path_is_refused() -> None:
    with pytest.raises(ValueError, match="'avx' is not one of"):
        cpu.use("avx")


# -- measuring ---------------------------------------------------------------------------------------------------------


def test_the_benchmark_measures_everything(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    command = [sys.executable, "-m", "benchmarks.cpu", "--tiny", "--json", str(result)]
    subprocess.run(command, cwd=Path(__file__).parents[1], env=dict(os.environ), check=True)
    parts = json.loads(result.read_text())["parts"]
    assert list(parts) == ["attention", "prompt", "generate"]
    for part in parts.values():
        assert part["rows"]
        for row in part["rows"]:
            assert row.get("error") is None
            assert all(value > 0 for name, value in row.items() if name.endswith((", x", ", ms", ", tokens/s")))
