"""Conversions between the numbers of PTX that numpy does not have."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def to_bfloat16(x: Array) -> Array:
    """The bits of fp32 numbers as bfloat16, to nearest even."""
    bits = x.view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + (bits >> 16 & 1)) >> np.uint64(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def from_bfloat16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def flushed(x: Array) -> Array:
    """fp32 numbers with zeros for subnormal ones."""
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


class Float8:
    """An fp8 format by its fields: all its numbers, and the nearest of them."""

    def __init__(self, mantissa: int, bias: int, largest: float) -> None:
        codes = np.arange(128)
        exponent, fraction = codes >> mantissa, codes & ((1 << mantissa) - 1)
        steps = np.where(exponent > 0, fraction + (1 << mantissa), fraction)
        values = np.ldexp(steps.astype(np.float64), np.maximum(exponent, 1) - bias - mantissa)
        self.finite = values[values <= largest]
        self.values = np.where(values <= largest, values, np.nan)
        if len(self.finite) < 127:  # e5m2 has an infinity behind its largest number
            self.values[len(self.finite)] = np.inf
        self.middles = (self.finite[1:] + self.finite[:-1]) / 2

    def decode(self, codes: Array) -> Array:
        magnitude = self.values[codes & 0x7F]
        return np.where(codes & 0x80, -magnitude, magnitude).astype(np.float32)

    def encode(self, x: Array) -> Array:
        """The nearest code, of two the even one; the largest for what is larger; 0x7F for NaN."""
        magnitude = np.abs(x.astype(np.float64))
        below = np.searchsorted(self.middles, magnitude, side="left")
        code = below + ((below < len(self.middles)) & (self._middle(below) == magnitude) & (below % 2 == 1))
        return np.where(np.isnan(x), 0x7F, code | np.where(np.signbit(x), 0x80, 0)).astype(np.uint16)

    def _middle(self, below: Array) -> Array:
        return self.middles[np.minimum(below, len(self.middles) - 1)]


FLOAT8 = {"e4m3x2": Float8(3, 7, 448.0), "e5m2x2": Float8(2, 15, 57344.0)}
