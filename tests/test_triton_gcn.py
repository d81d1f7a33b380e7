"""What Triton compiles for gfx942, run instruction by instruction on the CPU, against the reference and float64."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from helpers import QUANTIZED
from test_gpu_attention import ALL_CASES, SHORTENED, SHORTENED_CASE, SHORTENED_LENGTHS
from test_ops import KINDS

pytest.importorskip("triton")
interpreted = pytest.importorskip("interpreted")
kernel_compiler = pytest.importorskip("kernel_compiler")

from gcn import launching, memory  # noqa: E402
from ptx.memory import Fault  # noqa: E402
from test_triton_interpreter import QUICK, SIZES, check_numbers, check_reading, check_write  # noqa: E402
from test_triton_ptx import PROMPT, SHORT, attend_with, check, check_a_page_that_is_none, every_number, here  # noqa: E402
from triton.backends.amd.compiler import HIPBackend  # noqa: E402

if hasattr(HIPBackend, "path_to_rocm_lld"):  # Triton 3.4 brings no linker
    try:
        HIPBackend.path_to_rocm_lld()
    except Exception as error:
        pytest.skip(f"this Triton does not link for AMD: {error}", allow_module_level=True)

Compiled = dict[str, list[Any]]


@pytest.fixture
def machine(request: pytest.FixtureRequest) -> Iterator[Compiled]:
    """Kernels are compiled and run on the CPU, waves in the order that the test names; yields what was compiled."""
    kernel = getattr(request, "param", launching.EmulatedKernel)
    with kernel_compiler.compiling(kernel_compiler.DEVICES["gfx942"], kernel) as compiled:
        yield compiled


backwards = pytest.mark.parametrize("machine", [launching.BackwardsKernel], ids=["backwards"], indirect=True)


# -- attention -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(QUICK)[::4])
def test_attention(name: str, machine: Compiled) -> None:
    check(QUICK[name], list(QUICK).index(name))
    assert machine["attention"]


@pytest.mark.kernels
@pytest.mark.parametrize("name", QUICK)
def test_more_attention(name: str, machine: Compiled) -> None:
    check(QUICK[name], list(QUICK).index(name))
    assert machine["attention"]


@backwards
@pytest.mark.parametrize("name", ["fp8", "int8_zeros"])
def test_the_order_of_waves_does_not_matter(name: str, machine: Compiled) -> None:
    check(QUICK[name], 0)
    assert machine["attention"]


@pytest.mark.parametrize("name", ["int8", "model"])
def test_attention_of_a_prompt(name: str, machine: Compiled) -> None:
    """Tiles of more rows, by products of 32 x 32."""
    kinds = ("unit", "unit") if name == "model" else ("dynamic", "dynamic")
    check(dataclasses.replace(PROMPT, formats=(name, name), kinds=kinds), 0)
    (compiled,) = machine["attention"]
    assert "v_mfma_f32_32x32x8" in compiled.asm["amdgcn"]


@pytest.mark.parametrize("options", SHORTENED[1:2])
def test_lengths_below_the_number_of_tokens(options: dict[str, Any], machine: Compiled) -> None:
    interpreted.check_shortened(SHORTENED_CASE(**options), SHORTENED_LENGTHS, {}, None, 3)
    assert machine["merge"]


def test_every_code(machine: Compiled) -> None:
    interpreted.check_every_code(torch.bfloat16)
    assert machine["attention"]


@pytest.mark.kernels
@pytest.mark.parametrize("name", SHORT)
def test_attention_in_full(name: str, machine: Compiled) -> None:
    check(ALL_CASES[name], list(ALL_CASES).index(name))
    assert machine["attention"]


# -- writing and reading -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), [*itertools.product(QUANTIZED, KINDS)][::3])
def test_bytes(name: str, kind: str, machine: Compiled) -> None:
    check_write(name, kind, QUANTIZED.index(name) * len(KINDS) + KINDS.index(kind), here)
    assert machine["write"]


@pytest.mark.kernels
@pytest.mark.parametrize(("name", "kind", "turn"), [*itertools.product(QUANTIZED, KINDS, range(len(SIZES)))])
def test_bytes_in_full(name: str, kind: str, turn: int, machine: Compiled) -> None:
    check_write(name, kind, turn, here)
    assert machine["write"]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_every_number(name: str, dynamic: bool, machine: Compiled) -> None:
    """All 65,536 numbers of bfloat16, NaN and infinities among them."""
    check_numbers(name, every_number(torch.bfloat16), dynamic, here)
    assert machine["write"]


@pytest.mark.kernels
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_every_half(name: str, dynamic: bool, machine: Compiled) -> None:
    check_numbers(name, every_number(torch.float16), dynamic, here)
    assert machine["write"]


@pytest.mark.parametrize(("name", "kind"), [*itertools.product([*QUANTIZED, "model"], KINDS)][::3])
def test_pages_are_read(name: str, kind: str, machine: Compiled) -> None:
    check_reading(name, kind, here)
    assert machine["read"]


@pytest.mark.kernels
@pytest.mark.parametrize(("name", "kind"), [*itertools.product([*QUANTIZED, "model"], KINDS)])
def test_pages_are_read_in_full(name: str, kind: str, machine: Compiled) -> None:
    check_reading(name, kind, here)
    assert machine["read"]


# -- what the machine finds ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "replacement", "what"),
    [
        (r"\ts_barrier\n", "\n", "since the last barrier"),
        (r"vmcnt\(\d+\)", "", "before what is loaded into it was waited for"),
        (r"lgkmcnt\(\d+\)", "", "was waited for"),
        (r"(ds_write_b128 v\d+, v\[\d+:\d+\])", r"\1 offset:65520", "that are shared"),
        (r"(global_load_dwordx4 v\[\d+:\d+\], v\[\d+:\d+\], off)", r"\1 offset:0x100000", "outside of every tensor"),
    ],
    ids=["barriers", "global_waits", "shared_waits", "shared", "global"],
)
def test_faults(pattern: str, replacement: str, what: str, machine: Compiled) -> None:
    with pytest.raises(Fault, match=what):
        attend_with(pattern, replacement, launching)
    assert machine["attention"]


@pytest.mark.parametrize(
    ("pattern", "replacement"),
    [
        (r"v_exp_f32_e32 (v\d+), v\d+", r"v_exp_f32_e32 \1, \1"),
        (r"row_ror:8", "row_ror:4"),
        (r"(v_perm_b32 v\d+), (v\d+), (v\d+)", r"\1, \3, \2"),
        (r"s_(and|or)_saveexec_b64 (s\[\d+:\d+\]), \S+", r"s_\1_saveexec_b64 \2, -1"),
    ],
)
def test_wrong_results(pattern: str, replacement: str, machine: Compiled) -> None:
    with pytest.raises((AssertionError, Fault), match="output is off|outside of every tensor"):
        attend_with(pattern, replacement, launching)
    assert machine["attention"]


def test_an_unknown_instruction(machine: Compiled) -> None:
    with pytest.raises(NotImplementedError, match="v_cos_f32"):
        attend_with(r"v_exp_f32_e32", "v_cos_f32_e32", launching)
    assert machine["attention"]


def test_a_page_that_is_none(machine: Compiled) -> None:
    check_a_page_that_is_none()
    assert machine["attention"]


def test_races() -> None:
    """Of two waves, whichever comes first."""
    addresses, values = np.arange(0, 256, 4, dtype=np.uint32), np.zeros((64, 4), dtype=np.uint8)
    shared = memory.LocalMemory(256)
    shared.write(addresses, values, 0)
    with pytest.raises(Fault, match="another has written"):
        shared.read(addresses, 4, 1)
    shared.barrier()
    shared.read(addresses, 4, 1)
    with pytest.raises(Fault, match="another has read"):
        shared.write(addresses, values, 0)
