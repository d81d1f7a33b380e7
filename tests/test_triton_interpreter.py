"""The Triton kernels, interpreted, against the reference and float64: what can be proved of them without a GPU.

The interpreter computes wrongly in bfloat16, so queries, keys and values are fp16 and fp32 here.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import QMAX, QUANTIZED
from test_gpu_attention import ALL_CASES, SHORTENED, SHORTENED_CASE, SHORTENED_LENGTHS
from test_gpu_write import LAYOUTS, laid_out
from test_ops import CLIP_LIMIT, KINDS, Case, difficult_numbers, empty_side, random_scales

from hf_kvquant.formats import get_format

pytest.importorskip("triton")
interpreted = pytest.importorskip("interpreted")

Run = Callable[..., Any]


@pytest.fixture(scope="session")
def run() -> Iterator[Run]:
    """Calls a function of `interpreted` in a process that interprets kernels."""
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        assert pool.submit(interpreted.runs_interpreted).result()
    yield lambda function, *arguments: pool.submit(function, *arguments).result()
    pool.shutdown()


# -- attention -----------------------------------------------------------------------------------------------------

E4M3, E5M2, INT8, MODEL = (("fp8_e4m3",) * 2, ("fp8_e5m2",) * 2, ("int8",) * 2, ("model",) * 2)
DYNAMIC, EQUALIZED, ZEROS = (("dynamic",) * 2, ("equalized",) * 2, ("zero_channel",) * 2)

# Small tiles reach the loop without masks and its edges with few tokens.
SMALL_TILES = (16, 32)

# In short: every format, way of scaling, mask and option; sizes that do not fit pages and tiles.
QUICK: dict[str, Case] = {
    "fp8": Case(lengths=(130, 17), groups=4, extra_columns=2),
    "fp8_channel": Case(lengths=(33,), num_tokens=15, num_kv_heads=1, groups=7, head_dim=80,
                        kinds=("channel", "channel")),
    "fp8_zeros": Case(lengths=(70,), num_tokens=3, kinds=ZEROS, softcap=5.0, sinks=True),
    "fp8_dynamic": Case(lengths=(130, 1), kinds=DYNAMIC, groups=4, head_dim=128, extra_columns=1),
    "e5m2_dynamic": Case(lengths=(63, 17), formats=E5M2, kinds=DYNAMIC, num_tokens=17, groups=1),
    "int8_equalized": Case(lengths=(130, 63), formats=INT8, kinds=EQUALIZED, groups=4, extra_columns=2),
    "int8_zeros": Case(lengths=(63,), formats=INT8, kinds=ZEROS, num_tokens=2, head_dim=96, causal=False, sinks=True),
    "int8_pages_of_10": Case(lengths=(93, 21), formats=INT8, kinds=DYNAMIC, num_tokens=2, page_size=10),
    "model": Case(lengths=(130, 17), formats=MODEL, kinds=("unit", "unit"), groups=4, extra_columns=2),
    "mixed": Case(lengths=(63, 17), formats=("int8", "fp8_e4m3"), kinds=("equalized", "zero_channel"), num_tokens=5,
                  page_size=64, head_dim=64, v_head_dim=80),
    "mixed_model": Case(lengths=(70,), formats=("fp8_e5m2", "model"), kinds=("dynamic", "unit"), num_kv_heads=1),
    "ring": Case(lengths=(300, 9), num_tokens=3, window=100, ring=True, kinds=("equalized", "dynamic")),
    "ring_pages_of_10": Case(lengths=(300,), window=70, ring=True, page_size=10, formats=INT8, kinds=DYNAMIC),
    "ring_masked": Case(lengths=(300, 290), window=100, ring=True, mask=("bool", "B", "1"), mask_start=230),
    "window": Case(lengths=(130,), num_tokens=17, window=40, softcap=2.0, q_size=2.0),
    "mask_by_key": Case(lengths=(130, 63), mask=("bool", "B", "1"), kinds=DYNAMIC, groups=4, mask_start=7),
    "mask_bool": Case(lengths=(70, 63), mask=("bool", "1", "H"), num_tokens=3),
    "mask_float": Case(lengths=(70, 63), mask=("float", "B", "H"), num_tokens=3, sinks=True, mask_columns=50),
    "head_dim_256": Case(lengths=(40,), head_dim=256, num_kv_heads=1, formats=INT8, kinds=EQUALIZED),
    "192_128": Case(lengths=(40,), head_dim=192, v_head_dim=128, num_kv_heads=1, kinds=("dynamic", "channel")),
}  # fmt: skip


def _token_cases() -> dict[str, Case]:
    """Every format and way of scaling over odd sizes, with a mask by key in turn."""
    cases, turn = {}, 0
    for formats in (E4M3, E5M2, INT8, MODEL):
        for kind in KINDS if formats != MODEL else ("unit",):
            for num_tokens, head_dim in ((1, 64), (15, 80), (17, 96), (63, 128), (1, 256)):
                turn += 1
                groups = 1 if num_tokens > 17 else (1, 4, 7)[turn % 3]
                cases[f"{formats[0]}_{kind}_{num_tokens}_{head_dim}"] = Case(
                    lengths=(num_tokens + 100, num_tokens + turn % 7), num_tokens=num_tokens, head_dim=head_dim,
                    groups=groups, page_size=(16, 64, 10)[turn % 3], num_kv_heads=1, formats=formats,
                    kinds=(kind, kind), sinks=turn % 4 == 0, softcap=6.0 if turn % 5 == 0 else None, extra_columns=1,
                )  # fmt: skip
    return cases


# What the interpreter takes longer than a second for is left to a GPU.
_SHORT = {
    name: case
    for name, case in ALL_CASES.items()
    if case.num_tokens * case.groups * max(case.lengths) <= 20_000 and case.dtype == torch.float32
}
FULL = QUICK | _SHORT | _token_cases()


def check(
    run: Run, case: Case, dtype: torch.dtype, tiles: tuple[int, int] | None, splits: int | None, has_lse: bool = False
) -> None:
    share = run(interpreted.check_attention, case, dtype, tiles, splits, has_lse)
    print(f"error / bound: {share:.3f}")


@pytest.mark.parametrize("name", QUICK)
def test_attention(name: str, run: Run) -> None:
    """Small tiles in three parts, and the table's own tiles; fp16 and fp32, log-sum-exp and none, in turn."""
    turn = list(QUICK).index(name)
    tiles, splits = (SMALL_TILES, 3) if turn % 3 else (None, None)
    check(run, QUICK[name], (torch.float16, torch.float32)[turn % 2], tiles, splits, turn % 4 < 2)


@pytest.mark.kernels
@pytest.mark.parametrize("name", FULL)
def test_attention_in_full(name: str, run: Run) -> None:
    """Small tiles in three parts, and the table's own in two; dtypes, and the log-sum-exp, in turn."""
    turn = list(FULL).index(name) + 1
    tiles, splits = (SMALL_TILES, 3) if turn % 3 else (None, 2)
    check(run, FULL[name], (torch.float16, torch.float32)[turn // 2 % 2], tiles, splits, turn % 4 < 2)


def test_sinks_with_strides_and_names_of_formats(run: Run) -> None:
    e4m3 = ("fp8_e4m3", "fp8_e4m3")
    run(
        interpreted.check_what_comes_with_strides,
        Case(sinks=True, num_kv_heads=1, formats=e4m3, kinds=("head", "unit")),
    )


def test_the_lowest_number_as_a_bias(run: Run) -> None:
    run(interpreted.check_lowest_bias, Case(lengths=(33, 33), num_tokens=3, num_kv_heads=1))


@pytest.mark.parametrize("splits", [1, 2, 9])
def test_the_number_of_splits_does_not_matter(splits: int, run: Run) -> None:
    """One part, several, and more than there are tiles."""
    case = Case(lengths=(130, 5), num_kv_heads=1, kinds=("dynamic", "head"), extra_columns=1)
    check(run, case, torch.float16, SMALL_TILES, splits)


@pytest.mark.parametrize("options", SHORTENED, ids=lambda options: "-".join(options))
def test_lengths_below_the_number_of_tokens(options: dict[str, Any], run: Run) -> None:
    """No page is looked up but those of tokens that are there."""
    splits = 1 + 2 * (SHORTENED.index(options) % 2)
    run(interpreted.check_shortened, SHORTENED_CASE(**options), SHORTENED_LENGTHS, {}, SMALL_TILES, splits)


@pytest.mark.parametrize("mask_start", [-5, -64, -1000])
def test_a_mask_begins_before_the_first_token(mask_start: int, run: Run) -> None:
    """For keys alone, for keys and queries; with columns for the tokens, and only for what was before."""
    for kind, rows in (("bool", 1), ("bool", 5), ("float", 5)):
        case = Case(lengths=(70, 40), num_tokens=rows, num_kv_heads=1, mask=(kind, "B", "1"))
        mask = torch.rand(2, 1, rows, 70 + min(-mask_start, 100), generator=torch.Generator().manual_seed(0)) < 0.7
        given = mask if kind == "bool" else torch.where(mask, 0.5, -torch.inf)
        options = {"attn_mask": given, "mask_start": mask_start}
        run(interpreted.check_shortened, case, [70, 33], options, SMALL_TILES, 2)


@pytest.mark.parametrize("page_size", [17, 144, 1000])
def test_a_page_a_sequence(page_size: int, run: Run) -> None:
    """Tiles within one page of any size, in the loop and at its edges."""
    kinds = ("dynamic", "equalized")
    for num_tokens, splits in ((1, 2), (5, 1)):
        case = Case(lengths=(min(page_size, 200), 16), num_tokens=num_tokens, page_size=page_size, kinds=kinds)
        check(run, case, torch.float16, SMALL_TILES, splits, True)


@pytest.mark.parametrize(("splits", "sinks"), [(1, False), (1, True), (3, False), (3, True)])
def test_a_row_that_sees_nothing_gives_zeros(splits: int, sinks: bool, run: Run) -> None:
    case = Case(lengths=(40, 33), num_tokens=3, num_kv_heads=1, groups=1, sinks=sinks)
    for option in ({"window": 0}, {"mask_start": 80}, {}):
        run(interpreted.check_blind_rows, case, option, SMALL_TILES, splits)


def test_every_code(run: Run) -> None:
    run(interpreted.check_every_code, torch.float16, torch.float32)


# -- writing -------------------------------------------------------------------------------------------------------

# New tokens, head_dim of K and of V, page_size.
SIZES = [(1, 64, 64, 16), (15, 80, 80, 10), (17, 96, 64, 64), (63, 128, 128, 16), (3, 192, 128, 1), (2, 256, 256, 16)]


def check_write(name: str, kind: str, turn: int, run: Run) -> None:
    """K in `name` and V in another format; ragged lengths in a ring that wraps; sizes, dtypes and strides in turn."""
    num_tokens, *head_dims, page_size = SIZES[turn % len(SIZES)]
    dtype, layout = (torch.float16, torch.float32)[turn % 2], LAYOUTS[turn % 5]
    rng = np.random.default_rng(turn)
    names = (name, (*QUANTIZED, "model")[turn % 4])
    num_columns = -(-num_tokens // page_size) + 1
    pool_size = 3 * num_columns + 2
    capacity = num_columns * page_size
    page_table = torch.tensor(rng.permutation(pool_size)[: 3 * num_columns].reshape(3, -1), dtype=torch.int32)
    seq_lens = torch.tensor([num_tokens, num_tokens + 5, 3 * capacity + 7], dtype=torch.int32)
    sides, given = [], []
    for side_name, head_dim in zip(names, head_dims, strict=True):
        quantized = side_name != "model"
        fields = random_scales(rng, kind, 2, head_dim, 3.0 / QMAX[side_name]) if quantized else {"dtype": dtype}
        dynamic = quantized and kind in ("dynamic", "equalized")
        sides.append(empty_side(side_name, pool_size, 2, page_size, head_dim, dynamic=dynamic, **fields))
        size = QMAX[side_name] / 3 if kind == "unit" and quantized else 1.0
        x = difficult_numbers(rng, (3, 2, max(num_tokens, 3), head_dim), dtype, size)[:, :, :num_tokens]
        given.append(laid_out(x, layout))
    run(interpreted.check_bytes, *given, sides, [page_table, seq_lens], turn % 3 > 0)


def test_nothing_is_written_before_the_pages(run: Run) -> None:
    run(interpreted.check_nothing_before_the_pages, empty_side("int8", 4, 2, 16, 64, dynamic=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", QUANTIZED)
def test_bytes(name: str, kind: str, run: Run) -> None:
    check_write(name, kind, QUANTIZED.index(name) * len(KINDS) + KINDS.index(kind), run)


@pytest.mark.kernels
@pytest.mark.parametrize("turn", range(20))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", QUANTIZED)
def test_bytes_in_full(name: str, kind: str, turn: int, run: Run) -> None:
    check_write(name, kind, turn, run)


def _lines(x: torch.Tensor) -> torch.Tensor:
    """Numbers as tokens `[1, 1, T, 128]`, zeros at the end."""
    padded = torch.zeros(-(-x.numel() // 128) * 128, dtype=x.dtype)
    padded[: x.numel()] = x
    return padded.view(1, 1, -1, 128)


def check_numbers(name: str, x: torch.Tensor, dynamic: bool, run: Run) -> None:
    x = _lines(x)
    num_tokens = x.shape[2]
    num_pages = -(-num_tokens // 16)
    sides = [empty_side(name, num_pages, 1, 16, 128, dynamic=dynamic) for _ in range(2)]
    tables = [torch.arange(num_pages, dtype=torch.int32)[None], torch.tensor([num_tokens], dtype=torch.int32)]
    run(interpreted.check_bytes, x, -x, sides, tables)


@pytest.mark.parametrize("name", QUANTIZED)
def test_numbers_beside_every_code_and_tie(name: str, run: Run) -> None:
    """fp32 numbers at, between and next to all codes, subnormals, the limits of clipping, NaN and infinity."""
    codes = torch.arange(256, dtype=torch.uint8)
    row = get_format(name)
    values = row.decode(codes)
    values = values[values.isfinite()].sort().values
    middle = (values[1:] + values[:-1]) / 2
    limit = torch.tensor([CLIP_LIMIT[name], row.qmax, 2 * row.qmax, 1e30, 1e-30, 1e-42, 2.0**-126])
    at = torch.cat([values, middle, limit, -limit])
    around = [torch.nextafter(at, torch.full_like(at, to)) for to in (-torch.inf, torch.inf)]
    special = torch.tensor([torch.nan, -torch.nan, torch.inf, -torch.inf, 0.0, -0.0])
    check_numbers(name, torch.cat([at, *around, special]), False, run)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_every_half(name: str, dynamic: bool, run: Run) -> None:
    """All 65,536 numbers of fp16, in tokens of like numbers."""
    check_numbers(name, torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16), dynamic, run)


@pytest.mark.kernels
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("name", QUANTIZED)
def test_random_bits(name: str, seed: int, dynamic: bool, run: Run) -> None:
    bits = torch.randint(-(1 << 31), 1 << 31, (1 << 16,), generator=torch.Generator().manual_seed(seed))
    check_numbers(name, bits.to(torch.int32).view(torch.float32), dynamic, run)


# -- reading -------------------------------------------------------------------------------------------------------


def check_reading(name: str, kind: str, run: Run) -> None:
    """All codes; pages that are asked for twice; sizes in turn."""
    turn = [*QUANTIZED, "model"].index(name) + KINDS.index(kind)
    num_heads, page_size, head_dim = ((2, 16, 64), (1, 64, 80), (3, 10, 96), (2, 1, 256))[turn % 4]
    dtype = (torch.float32, torch.float16)[turn // 4 % 2]
    dynamic = name != "model" and kind in ("dynamic", "equalized")
    rng = np.random.default_rng(turn)
    fields = random_scales(rng, kind, num_heads, head_dim, 3.0 / QMAX[name]) if name != "model" else {"dtype": dtype}
    side = empty_side(name, 7, num_heads, page_size, head_dim, dynamic=dynamic, **fields)
    if name == "model":
        side.pages.normal_()
    else:
        side.pages.copy_(torch.arange(side.pages.numel()).view_as(side.pages) % 256)
    if side.token_scale is not None:
        side.token_scale.copy_(torch.rand(side.token_scale.shape) / QMAX[name])
    page_ids = torch.tensor([[3, 1, 0], [6, 2, 2]], dtype=(torch.int32, torch.int64)[turn % 2])
    run(interpreted.check_read, side, page_ids, dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*QUANTIZED, "model"])
def test_pages_are_read(name: str, kind: str, run: Run) -> None:
    check_reading(name, kind, run)
