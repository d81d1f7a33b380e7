"""What the inline assembly of the kernels computes, by its own text: no interpreter runs it."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from helpers import code_value

codes = pytest.importorskip("hf_kvquant.ops.triton.codes", reason="triton is not installed")


def run_ptx(text: str, inputs: dict[str, int]) -> dict[str, int]:
    """The registers after straight-line PTX of 32-bit integers."""
    registers = dict(inputs)

    def value(operand: str) -> int:
        return registers[operand] if operand in registers else int(operand, 0)

    def byte(pair: int, selector: int) -> int:
        assert selector < 8
        return pair >> 8 * selector & 0xFF

    for line in re.findall(r"^\s*([a-z][^;]*);", text, flags=re.MULTILINE):
        name, operands = line.split(maxsplit=1)
        target, *sources = (part.strip() for part in operands.split(","))
        a, b, *more = map(value, sources)
        match name:
            case "and.b32":
                result = a & b
            case "shr.b32":
                result = a >> b
            case "add.u32":
                result = a + b
            case "prmt.b32":
                pair = a | b << 32
                result = sum(byte(pair, more[0] >> 4 * i & 0xF) << 8 * i for i in range(4))
            case "lop3.b32":
                c, table = more
                bits = (table >> (4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1)) & 1 for i in range(32))
                result = sum(bit << i for i, bit in enumerate(bits))
            case _:
                raise AssertionError(name)
        registers[target] = result & 0xFFFFFFFF
    return registers


def some_words() -> Iterator[tuple[int, int, int, int]]:
    """Bytes of a register: every code in every place, beside every code at least once."""
    order = np.random.default_rng(0).permutation(256)
    for code in range(256):
        others = [int(order[code]), int(order[255 - code]), int(order[(code + 77) % 256])]
        for place in range(4):
            yield tuple(others[:place] + [code] + others[place:])  # type: ignore[misc]


def test_e4m3_without_an_instruction_of_the_device() -> None:
    text = codes._DECODE_E4M3.value
    text = re.sub(r"\.reg [^;]*;", "", text)
    for word in some_words():
        registers = run_ptx(text, {"$2": sum(code << 8 * i for i, code in enumerate(word))})
        bits = np.array([registers[name] for name in ("$0", "$1")], dtype=np.uint32)
        # Even channels first: each register has two fp16 numbers.
        numbers = bits.view(np.float16).astype(np.float64) * 256
        expected = [code_value("fp8_e4m3", code) for code in (word[0], word[2], word[1], word[3])]
        torch.testing.assert_close(
            torch.from_numpy(numbers), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=0, equal_nan=True
        )
        assert np.array_equal(np.signbit(numbers)[~np.isnan(expected)], np.signbit(expected)[~np.isnan(expected)])


def test_a_wrong_constant_is_noticed() -> None:
    text = re.sub(r"\.reg [^;]*;", "", codes._DECODE_E4M3.value).replace("0xea", "0xe8")
    registers = run_ptx(text, {"$2": 0x7F})
    assert not np.isnan(np.array([registers["$0"]], dtype=np.uint32).view(np.float16)[0])
