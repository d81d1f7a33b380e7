"""On a GPU: `paged_attention` against float64, within what the rounding of its operands does."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
import torch
from test_ops import CASES, Case, Problem, build, float64_results, on

from hf_kvquant.ops import paged_attention

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Unit roundoff.
ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-9}

_LONG = {"lengths": (5000, 1, 17, 300), "num_kv_heads": 1}
MORE_CASES: dict[str, Case] = {
    **{f"gpu_tokens_{t}": Case(lengths=(t + 200, t, t + 17), num_tokens=t, groups=4, head_dim=128)
       for t in (1, 2, 4, 5, 16, 17, 64, 300)},
    **{f"gpu_groups_{g}": Case(lengths=(130, 63), groups=g, num_tokens=5, head_dim=128) for g in (1, 4, 7, 8, 16)},
    **{f"gpu_groups_{g}_one_token": Case(lengths=(130, 63), groups=g, head_dim=80) for g in (1, 4, 7, 8, 16)},
    **{f"gpu_head_dim_{d}_{name}": Case(head_dim=d, lengths=(130, 17), formats=(name, name), groups=4,
                                        kinds=(kind, kind), num_tokens=t)
       for d, t in ((16, 1), (64, 17), (80, 1), (96, 5), (112, 1), (128, 64), (256, 17))
       for name, kind in (("fp8_e4m3", "channel"), ("int8", "equalized"), ("fp8_e5m2", "dynamic"), ("model", "unit"))},
    "gpu_192_128": Case(head_dim=192, v_head_dim=128, lengths=(130, 17), kinds=("dynamic", "channel"), num_tokens=3),
    "gpu_long": Case(**_LONG, groups=4, head_dim=128, kinds=("dynamic", "dynamic")),
    "gpu_long_int8": Case(**_LONG, groups=8, head_dim=128, formats=("int8", "int8"), kinds=("equalized", "equalized")),
    "gpu_long_model": Case(**_LONG, groups=4, formats=("model", "model")),
    "gpu_long_sinks": Case(**_LONG, groups=4, sinks=True, softcap=4.0, q_size=2.0),
    "gpu_long_window": Case(**_LONG, window=1000, page_size=64),
    "gpu_long_ring": Case(lengths=(5000, 1100), window=1000, ring=True, num_tokens=4, num_kv_heads=1, page_size=64),
    "gpu_long_mask": Case(lengths=(3000, 40, 17), mask=("bool", "B", "1"), num_kv_heads=1),
    "gpu_long_float_mask": Case(lengths=(3000, 40, 17), mask=("float", "B", "H"), num_tokens=4, num_kv_heads=1),
    "gpu_chunk": Case(lengths=(1300, 300), num_tokens=300, groups=4, num_kv_heads=1, head_dim=128,
                      kinds=("dynamic", "equalized"), formats=("int8", "int8")),
    "gpu_chunk_zeros": Case(lengths=(1300, 300), num_tokens=300, num_kv_heads=1, kinds=("zero_channel",) * 2,
                            softcap=5.0, sinks=True, window=400),
    "gpu_not_causal": Case(lengths=(300, 63), num_tokens=17, causal=False, groups=7, head_dim=80),
    "gpu_int8_zeros": Case(lengths=(130, 63), formats=("int8", "int8"), kinds=("zero_channel",) * 2, sinks=True),
    **{f"gpu_page_size_{s}": Case(lengths=(1000, 63), page_size=s, groups=4) for s in (1, 8, 16, 32, 64, 128, 256)},
    **{f"gpu_page_a_sequence_{s}": Case(lengths=(s, 16), page_size=s, groups=4, num_tokens=t, kinds=("dynamic",) * 2)
       for s, t in ((17, 1), (144, 15), (1000, 1))},
}  # fmt: skip
ALL_CASES = CASES | MORE_CASES

# Fewer tokens than queries, none, and less than none.
SHORTENED_LENGTHS = [70, 3, 0, -1, -100]
SHORTENED_CASE = functools.partial(
    Case, lengths=(70, 40, 33, 17, 9), num_tokens=7, num_kv_heads=1, groups=4, kinds=("zero_channel", "dynamic")
)
SHORTENED: list[dict[str, Any]] = [
    {}, {"causal": False}, {"window": 6}, {"causal": False, "window": 6}, {"mask": ("bool", "B", "1")},
    {"mask": ("float", "B", "H"), "sinks": True},
]  # fmt: skip


def in_dtype(problem: Problem, dtype: torch.dtype) -> Problem:
    """The problem with a query, and unquantized pages, of `dtype`."""
    numbers = list(problem.numbers)
    for index, side in enumerate((problem.k, problem.v)):
        if side.format == "model":
            side.pages = side.pages.to(dtype)
            numbers[index] = [torch.tensor(x).to(dtype).double().numpy() for x in numbers[index]]
    return dataclasses.replace(problem, query=problem.query.to(dtype), numbers=(numbers[0], numbers[1]))


def shortened(case: Case, lengths: list[int], options: dict[str, Any]) -> Problem:
    """`case` in fp16 with other lengths, down to below zero; tables and lengths are parts of wider tensors."""
    problem = in_dtype(build(case, poisoned=False), torch.float16)

    def cut(sides: Any) -> Any:
        return tuple([x[:, : max(n, 0)] for x, n in zip(side, lengths, strict=True)] for side in sides)

    wide = torch.zeros(len(lengths), problem.page_table.shape[1] + 3, dtype=torch.int32)
    wide[:, 2:-1] = problem.page_table
    wide[:, 0] = torch.tensor(lengths)
    return dataclasses.replace(
        problem, page_table=wide[:, 2:-1], seq_lens=wide[:, 0], numbers=cut(problem.numbers), sizes=cut(problem.sizes),
        options=problem.options | options,
    )  # fmt: skip


def run(problem: Problem, device: str, **more: Any) -> torch.Tensor:
    """The operator on `device`."""
    tensors = (problem.page_table, problem.seq_lens)
    options = {
        name: option.to(device) if isinstance(option, torch.Tensor) else option
        for name, option in (problem.options | more).items()
    }
    sides = (on(problem.k, device), on(problem.v, device))
    # A copy to a device is contiguous; what is a part of a wider tensor stays one.
    tensors = tuple(t._base.to(device).as_strided(t.shape, t.stride(), t.storage_offset()) if t._base is not None else t
                    for t in tensors)  # fmt: skip
    return paged_attention(problem.query.to(device), *sides, *(t.to(device) for t in tensors), **options)


def allowed_errors(problem: Problem) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Output and log-sum-exp in float64, each with how far a row may be off, `[B, Hq, T]`; an output in the 2-norm.

    Products are taken of queries and probabilities rounded to 16 bits, with fp32 sums: fp16 over quantized pages, the
    pages' own dtype over others. What that does is found by moving both by their unit roundoff, up or down by chance; a
    rounding moves by less, so a few times the largest of some trials is allowed.
    """
    dtype = problem.query.dtype
    roundoffs = [0.0, ROUNDOFF[dtype]]
    if dtype != torch.float32:
        if problem.k.format != "model":
            roundoffs[0] = ROUNDOFF[torch.float16]
        if problem.v.format != "model":
            roundoffs[1] = ROUNDOFF[torch.float16]
    rng = np.random.default_rng(0)
    (expected, bound), (lse, lse_bound) = float64_results(problem)
    moved_by, lse_moved_by = np.zeros(lse.shape), np.zeros(lse.shape)
    blind = lse == -np.inf
    for _ in range(3):
        signs = torch.tensor(rng.choice([-1.0, 1.0], problem.query.shape))
        query = problem.query.double() * (1 + roundoffs[0] * signs)
        values = [v * (1 + roundoffs[1] * rng.choice([-1.0, 1.0], (*v.shape[:2], 1))) for v in problem.numbers[1]]
        moved = dataclasses.replace(problem, query=query, numbers=(problem.numbers[0], values))
        (moved_output, _), (moved_lse, _) = float64_results(moved)
        moved_by = np.maximum(moved_by, np.linalg.norm(moved_output - expected, axis=-1))
        lse_moved_by = np.maximum(lse_moved_by, np.abs(np.where(blind, 0, moved_lse) - np.where(blind, 0, lse)))
    # The logistic function leaves an absolute error of a capped logit; a logit's error moves a row by twice that.
    capped = 8 * 2.0**-24 * (problem.options["softcap"] or 0.0)
    largest = max((float(np.abs(v).max()) for v in problem.numbers[1] if v.size), default=0.0)
    allowed = 4 * moved_by + np.linalg.norm(bound, axis=-1) + 2 * capped * largest * expected.shape[3] ** 0.5
    # A single number may move little by chance, where a row of them does not: the sequence's largest counts.
    lse_moved_by = lse_moved_by.max(axis=(1, 2), keepdims=True)
    return (expected, allowed), (lse, 4 * lse_moved_by + lse_bound + capped)


def check_results(problem: Problem, output: torch.Tensor, lse: torch.Tensor | None) -> float:
    """Right to within what is allowed; returns the largest share of that."""
    (expected, allowed), (expected_lse, allowed_lse) = allowed_errors(problem)
    assert output.dtype == problem.query.dtype
    assert output.shape == expected.shape
    if output.dtype == torch.float16:
        allowed += 2.0**-25 * expected.shape[-1] ** 0.5  # half the distance of its smallest numbers
    error = np.linalg.norm(output.double().cpu().numpy() - expected, axis=-1)
    checks = [("output", error, allowed)]
    if lse is not None:
        blind, numbers = expected_lse == -np.inf, lse.double().cpu().numpy()
        assert (numbers[blind] == -np.inf).all(), "a row that sees nothing has another log-sum-exp than -inf"
        assert not lse.isnan().any()
        checks.append(("lse", np.abs(np.where(blind, 0, numbers) - np.where(blind, 0, expected_lse)), allowed_lse))
    for name, off, most in checks:
        worst = np.unravel_index(np.argmax(np.nan_to_num(off - most, nan=np.inf)), off.shape)
        assert (off <= most).all(), f"{name} is off by {off[worst]:.2e} at {worst}, allowed {most[worst]:.2e}"
    return max(float((off / np.maximum(most, np.finfo(float).tiny)).max()) for _, off, most in checks)


def check(case: Case, dtype: torch.dtype, device: str, has_lse: bool = False) -> None:
    """Right, and what lies in slots that hold no token changes no bit."""
    clean, poisoned = (in_dtype(build(case, poisoned=poison), dtype) for poison in (False, True))
    results = []
    for problem in (clean, poisoned):
        lse = torch.full(clean.query.shape[:3], torch.nan, device=device) if has_lse else None
        results.append((run(problem, device, lse=lse), lse))
    (output, lse), (poisoned_output, poisoned_lse) = results
    check_results(clean, output, lse)
    assert torch.equal(poisoned_output, output)
    if lse is not None:
        assert torch.equal(poisoned_lse, lse)


def _cases() -> list[Any]:
    """Every case in fp32 and, in turn, in one of the others: each is a kernel to compile, which takes seconds."""
    names = [name for name, case in ALL_CASES.items() if case.dtype == torch.float32]
    pairs = [(name, dtype) for index, name in enumerate(names) for dtype in ("fp32", ("fp16", "bf16")[index % 2])]
    return [pytest.param(name, dtype, id=f"{name}-{dtype}") for name, dtype in pairs]


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "dtype"), _cases())
def test_attention(name: str, dtype: str) -> None:
    check(ALL_CASES[name], DTYPES[dtype], "cuda")


# Served by one program per sequence, by many, and with everything that a logit goes through.
LSE_CASES = ["tokens_3", "gpu_tokens_64", "gpu_long", "gpu_long_sinks", "gpu_long_float_mask", "gpu_int8_zeros",
             "e4m3_zero_channel", "softcap", "window_2"]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("name", LSE_CASES)
def test_log_sum_exp(name: str) -> None:
    check(ALL_CASES[name], torch.bfloat16, "cuda", has_lse=True)


@pytest.mark.gpu
@pytest.mark.parametrize("options", SHORTENED, ids=lambda options: "-".join(options))
def test_lengths_below_the_number_of_tokens(options: dict[str, Any]) -> None:
    problem = shortened(SHORTENED_CASE(**options), SHORTENED_LENGTHS, {})
    lse = torch.full(problem.query.shape[:3], torch.nan, device="cuda")
    check_results(problem, run(problem, "cuda", lse=lse), lse)


@pytest.mark.gpu
def test_float64_queries() -> None:
    check(dataclasses.replace(CASES["fp64"], dtype=torch.float32), torch.float32, "cuda")
    problem = build(CASES["fp64"], poisoned=True)
    assert run(problem, "cuda").dtype == torch.float64


def test_the_allowed_error_sees_one_token() -> None:
    """A bound that one token too few would pass holds nothing."""
    case = Case(lengths=(1000,), num_kv_heads=4, q_size=0.3)
    for dtype in (torch.float16, torch.bfloat16):
        problem = in_dtype(build(case, poisoned=False), dtype)
        (expected, allowed), (expected_lse, allowed_lse) = allowed_errors(problem)
        fewer = dataclasses.replace(problem, options={**problem.options, "window": 999})
        (output, _), (lse, _) = float64_results(fewer)
        assert (np.linalg.norm(output - expected, axis=-1) > allowed).mean() > 0.5
        assert (np.abs(lse - expected_lse) > allowed_lse).mean() > 0.5


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 4])
@pytest.mark.parametrize("name", ["fp8_e4m3", "int8", "model"])
def test_neighbours_do_not_matter(name: str, num_tokens: int) -> None:
    """A short sequence among long ones, and alone, where the work is split in another way."""
    kind = "unit" if name == "model" else "dynamic"
    sizes = {"num_tokens": num_tokens, "num_kv_heads": 1, "groups": 4, "head_dim": 128}
    case = Case(lengths=(9000, 100, 17), formats=(name, name), kinds=(kind, kind), **sizes)
    problem = in_dtype(build(case, poisoned=True), torch.bfloat16)
    together = run(problem, "cuda")
    (_, allowed), _ = allowed_errors(problem)
    for row in range(3):
        alone = dataclasses.replace(
            problem, query=problem.query[row : row + 1], page_table=problem.page_table[row : row + 1],
            seq_lens=problem.seq_lens[row : row + 1],
        )  # fmt: skip
        difference = (run(alone, "cuda")[0] - together[row]).double().norm(dim=-1).cpu().numpy()
        assert (difference <= 2 * allowed[row]).all()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gpu_tokens_1", "gpu_long", "gpu_tokens_17"])
def test_runs_give_the_same_bits(name: str) -> None:
    """An error that comes and goes is a race."""
    problem = in_dtype(build(ALL_CASES[name], poisoned=True), torch.bfloat16)
    first = run(problem, "cuda")
    for _ in range(20):
        assert torch.equal(run(problem, "cuda"), first)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 4])
def test_a_graph_follows_the_lengths(num_tokens: int) -> None:
    """A captured call reads lengths and pages from the device."""
    case = Case(lengths=(1000, 700), num_tokens=num_tokens, groups=4, head_dim=128, kinds=("dynamic", "dynamic"))
    problem = in_dtype(build(case, poisoned=False), torch.bfloat16)
    k, v = on(problem.k, "cuda"), on(problem.v, "cuda")
    query, table, seq_lens = (t.cuda() for t in (problem.query, problem.page_table, problem.seq_lens))
    lse, eager_lse = (torch.full(query.shape[:3], torch.nan, device="cuda") for _ in range(2))
    paged_attention(query, k, v, table, seq_lens, softmax_scale=0.1, lse=lse)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = paged_attention(query, k, v, table, seq_lens, softmax_scale=0.1, lse=lse)
    for lengths in ((1000, 700), (17, 4), (63, 999), (500, 16), (0, -20)):
        seq_lens.copy_(torch.tensor(lengths))
        graph.replay()
        assert torch.equal(got, paged_attention(query, k, v, table, seq_lens, softmax_scale=0.1, lse=eager_lse))
        assert torch.equal(lse, eager_lse)
        if max(lengths) <= 0:
            assert (got == 0).all()
            assert (lse == -torch.inf).all()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["fp8_e4m3", "model"])
def test_one_compiled_kernel_serves_other_numbers(name: str) -> None:
    """Triton compiles 1 and multiples of 16 into a kernel unless told not to; what is kept must serve all numbers."""
    kind = "unit" if name == "model" else "head"
    sizes = {"formats": (name, name), "kinds": (kind, kind), "groups": 2}
    for num_tokens, lengths in ((1, (16,)), (2, (17, 33)), (5, (1000,)), (16, (160, 16)), (17, (40,)), (1, (15,))):
        check(Case(lengths=lengths, num_tokens=num_tokens, **sizes), torch.bfloat16, "cuda")
        for window in (16, 1, 17):
            check(Case(lengths=lengths, num_tokens=num_tokens, window=window, **sizes), torch.bfloat16, "cuda")
        for mask_start in (0, 16, 1, 7):
            case = Case(lengths=(60,), num_tokens=num_tokens, mask=("bool", "1", "1"), mask_start=mask_start, **sizes)
            check(case, torch.bfloat16, "cuda")
