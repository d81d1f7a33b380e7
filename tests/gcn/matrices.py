"""Products of matrices that lie in the registers of a wave."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from ptx.matrices import product
from ptx.memory import Fault
from ptx.numbers import from_bfloat16

from .program import Instruction, registers
from .wave import LANES, Wave, reader

Array = np.ndarray[Any, Any]
_LANES = np.arange(LANES)


def _numbers(wave: Wave, operand: str, dtype: str) -> Array:
    """`[lane, k]`: the numbers that each lane holds of an operand, fp64."""
    first, count = registers(operand)  # type: ignore[misc]
    bits = np.ascontiguousarray(wave.vectors[first : first + count].T)
    if dtype == "f32":
        return bits.view(np.float32).astype(np.float64)
    halves = bits.view(np.uint16)
    return (from_bfloat16(halves) if dtype == "bf16" else halves.view(np.float16)).astype(np.float64)


def _matrix(wave: Wave, operand: str, dtype: str, rows: int) -> Array:
    """`[row, k]`: a lane has a row, or a column of the second, and lanes of the same row have k one after the other."""
    numbers = _numbers(wave, operand, dtype)
    return np.ascontiguousarray(numbers.reshape(LANES // rows, rows, -1).swapaxes(0, 1)).reshape(rows, -1)


def compile_product(instruction: Instruction) -> Callable[[Wave], None]:
    """`v_mfma_f32_MxNxK`, of all lanes whether they are active or not."""
    instruction.only()
    match = re.match(r"v_mfma_f32_(16|32)x\1x(\d+)_(f16|bf16|f32)(_1k)?$", instruction.base)
    if match is None:
        raise NotImplementedError(instruction.text)
    rows, depth, dtype = int(match[1]), int(match[2]), match[3]
    target, of_a, of_b, of_c = instruction.operands
    first, count = registers(target)  # type: ignore[misc]
    registers_each = depth * rows // LANES * (4 if dtype == "f32" else 2) // 4
    if count != rows * rows // LANES or any(registers(each)[1] != registers_each for each in (of_a, of_b)):  # type: ignore[index]
        raise NotImplementedError(instruction.text)
    added = registers(of_c)
    start = None if added else reader(of_c, "f4")
    # Register r of a lane has this row of its column.
    numbers = np.arange(count)[:, None]
    places = 4 * (LANES // rows) * (numbers // 4) + 4 * (_LANES // rows) + numbers % 4
    columns = np.broadcast_to(_LANES % rows, places.shape)

    def do(wave: Wave) -> None:
        if not wave.all_active:
            raise Fault("a product of some lanes")
        a, b = (_matrix(wave, each, dtype, rows) for each in (of_a, of_b))
        c = np.zeros((rows, rows), dtype=np.float32)
        if added:
            c[places, columns] = wave.views["f4"][added[0] : added[0] + count]
        elif start is not None:
            c[:] = start(wave)
        wave.views["f4"][first : first + count] = product(a, b.T, c)[places, columns]

    return do
