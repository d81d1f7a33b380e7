"""How matrices lie in the registers of a warp and in shared memory, and what their product is.

A matrix of 8 x 8 numbers of 16 bits takes one register: lane l has two numbers of row l // 4. Larger ones are made of
these.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .numbers import from_bfloat16

Array = np.ndarray[Any, Any]


def from_rows(rows: Array, transposed: bool) -> Array:
    """Registers `[warps, 32]` of matrices `[warps, 8, 8]`."""
    matrix = rows.swapaxes(1, 2) if transposed else rows
    return np.ascontiguousarray(matrix).reshape(-1, 32, 2).view(np.uint32)[..., 0]


def to_rows(registers: Array, transposed: bool) -> Array:
    matrix = np.ascontiguousarray(registers).view(np.uint16).reshape(-1, 8, 8)
    return matrix.swapaxes(1, 2) if transposed else matrix


def numbers_of(bits: Array, dtype: str) -> Array:
    return (from_bfloat16(bits) if dtype == "bf16" else bits.view(np.float16)).astype(np.float64)


def left_operand(registers: list[Array], dtype: str) -> Array:
    """`[warps, 16, 16]` of four registers."""
    parts = [numbers_of(to_rows(register.reshape(-1, 32), False), dtype) for register in registers]
    return np.concatenate([np.concatenate(parts[0::2], axis=2), np.concatenate(parts[1::2], axis=2)], axis=1)


def right_operand(registers: list[Array], dtype: str) -> Array:
    """`[warps, 16, 8]` of two registers."""
    return np.concatenate([numbers_of(to_rows(r.reshape(-1, 32), True), dtype) for r in registers], axis=1)


def sums(registers: list[Array]) -> Array:
    """`[warps, 16, 2 * N]` of N registers of fp32: four for each eight columns, two of them for the upper half."""
    numbers = [register.reshape(-1, 8, 4) for register in registers]
    pairs = [np.stack(numbers[i : i + 2], axis=-1) for i in range(0, len(numbers), 2)]
    halves = [pair.reshape(-1, 8, 8) for pair in pairs]
    return np.concatenate([np.concatenate(halves[0::2], axis=2), np.concatenate(halves[1::2], axis=2)], axis=1)


def in_registers(matrix: Array) -> list[Array]:
    """What `sums` was made of."""
    result = []
    for i in range(0, matrix.shape[2], 8):
        for half in (0, 8):
            pairs = matrix[:, half : half + 8, i : i + 8].reshape(-1, 8, 4, 2)
            result += [pairs[..., j].reshape(-1) for j in (0, 1)]
    return result


def product(a: Array, b: Array, c: Array) -> Array:
    """`a @ b + c` in fp32, summed without loss."""
    return (a @ b + c.astype(np.float64)).astype(np.float32)


class Described:
    """A matrix in shared memory as an asynchronous product is told of it: `bits` of a descriptor."""

    _ROW = {0: 16, 1: 128, 2: 64, 3: 32}  # bytes that a swizzle keeps together, by its number

    def __init__(self, bits: int) -> None:
        self.start = (bits & 0x3FFF) << 4
        self.leading, self.stride = (bits >> 16 & 0x3FFF) << 4, (bits >> 32 & 0x3FFF) << 4
        self.row = self._ROW[bits >> 62 & 3]
        if bits >> 49 & 7 and self.row > 16:
            raise NotImplementedError("a matrix that does not begin where its swizzle does")

    def addresses(self, size: int, transposed: bool) -> Array:
        """Of the elements `[size, 16]` of 16 bits: rows of A or columns of B, by the direction of the sum.

        Neighbours in memory are so in the direction of the sum, or in the other one if `transposed`.
        """
        outer, k = np.meshgrid(np.arange(size), np.arange(16), indexing="ij")
        row, leading, stride = self.row, self.leading, self.stride
        if row == 16 and transposed:
            places = outer % 8 * 2 + outer // 8 * stride + k % 8 * row + k // 8 * leading
        elif transposed:
            places = outer % (row // 2) * 2 + outer // (row // 2) * leading + k % 8 * row + k // 8 * stride
        elif row == 16:
            places = outer % 8 * row + outer // 8 * stride + k % 8 * 2 + k // 8 * leading
        else:
            places = outer % 8 * row + outer // 8 * stride + k * 2
        at = self.start + places
        return at ^ (at >> 7 & row // 16 - 1) << 4
