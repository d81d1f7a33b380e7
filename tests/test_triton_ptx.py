"""What Triton compiles for NVIDIA GPUs, run instruction by instruction on the CPU, against the reference and float64.

Beyond the interpreter's tests: the inline assembly, the conversions and matrix products of each device, bfloat16, what
lies in shared memory and who waits for whom.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from helpers import QUANTIZED
from test_gpu_attention import ALL_CASES, SHORTENED, SHORTENED_CASE, SHORTENED_LENGTHS
from test_ops import KINDS, Case, build

pytest.importorskip("triton")
interpreted = pytest.importorskip("interpreted")
kernel_compiler = pytest.importorskip("kernel_compiler")

from ptx import launching  # noqa: E402
from ptx.memory import Fault  # noqa: E402
from test_triton_interpreter import QUICK, SIZES, check_numbers, check_reading, check_write  # noqa: E402

DEVICES = {name: device for name, device in kernel_compiler.DEVICES.items() if device.capability}
Compiled = dict[str, list[Any]]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

PROMPT = Case(lengths=(83,), num_tokens=33, groups=4, num_kv_heads=1, head_dim=128)


@pytest.fixture
def machine(request: pytest.FixtureRequest) -> Iterator[Compiled]:
    """Kernels are compiled for the device that the test names, and run on the CPU; yields what was compiled."""
    with kernel_compiler.compiling(DEVICES[request.param], launching.EmulatedKernel) as compiled:
        yield compiled


def here(function: Callable[..., Any], *arguments: Any) -> Any:
    """For tests that the interpreter runs in a process of its own."""
    return function(*arguments)


# -- attention -----------------------------------------------------------------------------------------------------


def check(case: Case, turn: int) -> None:
    """The table's tiles; dtypes, splits and the log-sum-exp in turn."""
    share = interpreted.check_attention(case, DTYPES[turn % 3], None, (None, 2, 1)[turn // 3 % 3], turn % 2 == 0)
    print(f"error / bound: {share:.3f}")


def on(*devices: str) -> Any:
    return pytest.mark.parametrize("machine", devices, indirect=True)


def in_turn(names: str, values: Iterable[Any], *devices: str) -> Any:
    """Each of the values, a name or a tuple of names, on one of the devices."""
    tuples = [value if isinstance(value, tuple) else (value,) for value in values]
    rows = [(*row, devices[turn % len(devices)]) for turn, row in enumerate(tuples)]
    return pytest.mark.parametrize((*names.split(), "machine"), rows, indirect=["machine"])


BOTH = ("sm_80", "sm_90")


@in_turn("name", QUICK, *BOTH)
def test_attention(name: str, machine: Compiled) -> None:
    check(QUICK[name], list(QUICK).index(name))
    assert machine["attention"]


@pytest.mark.kernels
@in_turn("name", QUICK, *reversed(BOTH))
def test_attention_on_the_other_device(name: str, machine: Compiled) -> None:
    check(QUICK[name], list(QUICK).index(name))
    assert machine["attention"]


@in_turn("name", ["fp8_zeros", "int8_equalized", "model"], "sm_89", "sm_100", "sm_120")
def test_attention_on_other_devices(name: str, machine: Compiled) -> None:
    check(QUICK[name], 0)
    assert machine["attention"]


@on("sm_90", "sm_100")
def test_float32_is_multiplied_as_such(machine: Compiled) -> None:
    """Not as tf32, which tensor cores would make of it."""
    check(Case(lengths=(40,), head_dim=128, num_kv_heads=1), DTYPES.index(torch.float32))
    assert machine["attention"]


@in_turn("name", ["fp8_e4m3", "int8", "model"], "sm_90", "sm_90", "sm_80")
def test_attention_of_a_prompt(name: str, machine: Compiled) -> None:
    """Tiles of 64 rows over a past, by asynchronous products where a device has them."""
    kinds = ("unit", "unit") if name == "model" else ("dynamic", "dynamic")
    check(dataclasses.replace(PROMPT, formats=(name, name), kinds=kinds), 0)
    (compiled,) = machine["attention"]
    assert ("wgmma.mma_async" in compiled.asm["ptx"]) == (name != "model")


@in_turn("options", [(options,) for options in SHORTENED[1::2]], *BOTH)
def test_lengths_below_the_number_of_tokens(options: dict[str, Any], machine: Compiled) -> None:
    """No page is looked up but those of tokens that are there."""
    interpreted.check_shortened(SHORTENED_CASE(**options), SHORTENED_LENGTHS, {}, None, 3)
    assert machine["merge"]


@on(*BOTH)
def test_every_code(machine: Compiled) -> None:
    interpreted.check_every_code(torch.bfloat16)
    assert machine["attention"]


# Longer ones take minutes each.
SHORT = [
    name for name, case in ALL_CASES.items()
    if case.dtype == torch.float32 and case.num_tokens * case.groups * max(case.lengths) <= 150_000
]  # fmt: skip


@pytest.mark.kernels
@in_turn("name", SHORT, *DEVICES)
def test_attention_in_full(name: str, machine: Compiled) -> None:
    check(ALL_CASES[name], list(ALL_CASES).index(name))
    assert machine["attention"]


# -- writing and reading -------------------------------------------------------------------------------------------


@in_turn("name kind", [*itertools.product(QUANTIZED, KINDS)][::3], *BOTH)
def test_bytes(name: str, kind: str, machine: Compiled) -> None:
    check_write(name, kind, QUANTIZED.index(name) * len(KINDS) + KINDS.index(kind), here)
    assert machine["write"]


@pytest.mark.kernels
@in_turn("name kind turn", itertools.product(QUANTIZED, KINDS, range(len(SIZES))), *DEVICES)
def test_bytes_in_full(name: str, kind: str, turn: int, machine: Compiled) -> None:
    check_write(name, kind, turn, here)
    assert machine["write"]


@on(*BOTH)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_every_number(name: str, dynamic: bool, machine: Compiled) -> None:
    """All 65,536 numbers of bfloat16, NaN and infinities among them, by each device's own conversion."""
    check_numbers(name, every_number(torch.bfloat16), dynamic, here)
    assert machine["write"]


@pytest.mark.kernels
@on(*DEVICES)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_every_half(name: str, dynamic: bool, machine: Compiled) -> None:
    check_numbers(name, every_number(torch.float16), dynamic, here)
    assert machine["write"]


def every_number(dtype: torch.dtype) -> torch.Tensor:
    """Of 16 bits."""
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)


@in_turn("name kind", [*itertools.product([*QUANTIZED, "model"], KINDS)][::3], *BOTH)
def test_pages_are_read(name: str, kind: str, machine: Compiled) -> None:
    check_reading(name, kind, here)
    assert machine["read"]


@pytest.mark.kernels
@in_turn("name kind", itertools.product([*QUANTIZED, "model"], KINDS), *DEVICES)
def test_pages_are_read_in_full(name: str, kind: str, machine: Compiled) -> None:
    check_reading(name, kind, here)
    assert machine["read"]


# -- what the machine finds ----------------------------------------------------------------------------------------


def attend_with(pattern: str, replacement: str, where: ModuleType = launching) -> None:
    """Attention by a kernel in whose code, which is parsed `where` it is launched, that is replaced."""
    parse = where.parse

    def parse_changed(text: str) -> Any:
        changed, count = re.subn(pattern, replacement, text)
        assert count
        return parse(changed)

    where.parsed.cache_clear()
    try:
        with mock.patch.object(where, "parse", parse_changed):
            interpreted.check_attention(PROMPT, torch.bfloat16, None, 1, False)
    finally:
        where.parsed.cache_clear()


@pytest.mark.parametrize(
    ("machine", "pattern", "replacement", "what"),
    [
        ("sm_80", r"bar\.sync\s+0;", "", "since the last barrier"),
        ("sm_90", r"bar\.sync\s+0;", "", "since the last barrier"),
        ("sm_90", r"fence\.proxy\.async\S*;", "", "without a proxy fence"),
        ("sm_80", r"(ldmatrix.*?\[%r\d+)", r"\1+8", "not a multiple of 16"),
        ("sm_80", r"(cp\.async\.cg\.shared\.global \[ %r\d+) \+ 0", r"\1 + 0x100000", "that are shared"),
        ("sm_80", r"(ld\.global\.b16 \{ %rs\d+ \}, \[ %rd\d+) \+ 0", r"\1 + 0x100000", "outside of every tensor"),
    ],
    indirect=["machine"],
)  # fmt: skip
def test_faults(machine: Compiled, pattern: str, replacement: str, what: str) -> None:
    with pytest.raises(Fault, match=what):
        attend_with(pattern, replacement)
    assert machine["attention"]


@pytest.mark.parametrize(
    ("machine", "pattern", "replacement"),
    [
        ("sm_80", r"cp\.async\.wait_group\s+\S+;", ""),
        ("sm_90", r"wgmma\.wait_group\.sync\.aligned\s+0;", ""),
        ("sm_90", r"cvt\.rn\.f16x2\.e4m3x2 (%r\d+), e;", r"cvt.rn.f16x2.e4m3x2 \1, o;"),
        ("sm_80", r"0x2404", "0x2414"),
    ],
    indirect=["machine"],
)
def test_wrong_results(machine: Compiled, pattern: str, replacement: str) -> None:
    """What is not waited for, or taken from the wrong place, is seen in the output, or ends in a page that is none."""
    with pytest.raises((AssertionError, Fault), match="output is off|outside of every tensor"):
        attend_with(pattern, replacement)
    assert machine["attention"]


@on("sm_80")
@pytest.mark.parametrize(
    ("pattern", "replacement"),
    [(r"%ctaid\.x", "%clusterid.x"), (r"ex2\.approx", "tanh.approx"), (r"cp\.async\.cg\.", "cp.async.bulk.")],
)
def test_what_is_not_known(pattern: str, replacement: str, machine: Compiled) -> None:
    with pytest.raises(NotImplementedError, match=replacement):
        attend_with(pattern, replacement)
    assert machine["attention"]


def check_a_page_that_is_none() -> None:
    problem = build(PROMPT, poisoned=False)
    table = torch.full_like(problem.page_table, interpreted.NO_PAGE)
    with pytest.raises(Fault, match="outside of every tensor"):
        interpreted.attend(dataclasses.replace(problem, page_table=table), None, 1)


@on("sm_90")
def test_a_page_that_is_none(machine: Compiled) -> None:
    check_a_page_that_is_none()
    assert machine["attention"]
