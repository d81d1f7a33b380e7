"""Storage formats: how a scaled number becomes the bits that lie in a page. A format is one row.

`encode` takes numbers in code units (already divided by their scale) and returns what is stored; `decode` is its
inverse. Both are plain torch and define the bytes: every kernel must produce exactly these.

* fp8 pages hold the bits of float8_e4m3fn or float8_e5m2 (OCP 8-bit floating point specification). A device whose torch
  has no such numbers gets the same bytes by integers.
* int8 pages hold `q + 128` (offset binary), q in [-127, 127]. Byte 0 is never written for a number: it marks slots that
  were never written. int8 cannot keep a NaN under a static scale; it becomes byte 0 and is counted as clipped.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .dtypes import has_dtype


@dataclass(frozen=True)
class StorageFormat:
    """One way to store K or V.

    Attributes:
        name: canonical name, the value of `kv_cache_dtype`.
        qmax: largest number the codes hold; inf for unquantized pages.
        clip_limit: numbers beyond it lose more than rounding does (they are counted as clipped).
        storage_dtype: dtype of the pages, None for the dtype of the model.
        encode: fp32 numbers in code units -> stored elements.
        decode: stored elements -> fp32 numbers in code units.
    """

    name: str
    qmax: float
    clip_limit: float
    storage_dtype: torch.dtype | None
    encode: Callable[[torch.Tensor], torch.Tensor]
    decode: Callable[[torch.Tensor], torch.Tensor]

    @property
    def is_quantized(self) -> bool:
        return self.storage_dtype is not None


def _encode_fp8(dtype: torch.dtype, qmax: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def encode(x: torch.Tensor) -> torch.Tensor:
        # Clamp first: what an overflowing cast gives differs between torch versions and devices.
        clamped = x.clamp(-qmax, qmax)
        bits = clamped.to(dtype).view(torch.uint8) if has_dtype(x.device, dtype) else _round_to_fp8(clamped, dtype)
        return torch.where(x.isnan(), 0x7F, bits)

    return encode


def _round_to_fp8(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What torch's conversion of fp32 gives, in operations that every device has. Numbers must fit."""
    info = torch.finfo(dtype)
    dropped = 23 + round(math.log2(info.eps))  # bits of the mantissa that fp8 has no room for
    bits = x.abs().view(torch.int32)
    # To nearest, ties to even; the exponents of the two count from different numbers.
    shift = (127 - 1 + round(math.log2(info.smallest_normal))) << 23
    rounded = (bits - shift + (1 << dropped - 1) - 1 + (bits >> dropped & 1)) >> dropped
    # Below the normal numbers a sum rounds: with one whose last bit is worth the smallest number of fp8.
    smallest = info.smallest_normal * info.eps
    magic = smallest * 2.0**23
    small = ((x.abs() + magic) - magic) * (1.0 / smallest)
    codes = torch.where(x.abs() < info.smallest_normal, small.to(torch.int32), rounded)
    return (codes | x.view(torch.int32) >> 24 & 0x80).to(torch.uint8)


def _decode_fp8(dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    values = torch.arange(256, dtype=torch.uint8, device="cpu").view(dtype).to(torch.float32)

    @functools.cache
    def table(device: torch.device) -> torch.Tensor:
        return values.to(device)

    def decode(stored: torch.Tensor) -> torch.Tensor:
        if has_dtype(stored.device, dtype):
            return stored.view(dtype).to(torch.float32)
        return table(stored.device).index_select(0, stored.reshape(-1).to(torch.int32)).view(stored.shape)

    return decode


def _encode_int8(x: torch.Tensor) -> torch.Tensor:
    return (x.clamp(-127, 127).round() + 128).nan_to_num(nan=0.0).to(torch.uint8)


def _decode_int8(stored: torch.Tensor) -> torch.Tensor:
    return stored.to(torch.float32) - 128


FORMATS: dict[str, StorageFormat] = {
    row.name: row
    for row in (
        StorageFormat(
            "fp8_e4m3", 448.0, 464.0, torch.uint8,
            _encode_fp8(torch.float8_e4m3fn, 448.0), _decode_fp8(torch.float8_e4m3fn),
        ),
        StorageFormat(
            "fp8_e5m2", 57344.0, 61440.0, torch.uint8,
            _encode_fp8(torch.float8_e5m2, 57344.0), _decode_fp8(torch.float8_e5m2),
        ),
        StorageFormat("int8", 127.0, 127.5, torch.uint8, _encode_int8, _decode_int8),
        StorageFormat("model", float("inf"), float("inf"), None, lambda x: x, lambda stored: stored),
    )
}  # fmt: skip

# The smallest dynamic scale: its reciprocal is finite and normal where a whole token is zero.
TINY_SCALE = 2.0**-100

# The last ones are what torch calls them.
ALIASES = {"fp8": "fp8_e4m3", "fp8_e4m3fn": "fp8_e4m3", "float8_e4m3fn": "fp8_e4m3", "float8_e5m2": "fp8_e5m2"}


def get_format(name: str | torch.dtype) -> StorageFormat:
    """The format called `name` (an alias counts), or of that dtype. Raises ValueError with the list of known names."""
    plain = str(name).removeprefix("torch.") if isinstance(name, torch.dtype) else name
    row = FORMATS.get(ALIASES.get(plain, plain)) if isinstance(plain, str) else None
    if row is None:
        raise ValueError(
            f"unknown storage format {name!r}; known: {', '.join(FORMATS)} (not quantized, in the model's dtype), and "
            + ", ".join(f"{alias} (= {target})" for alias, target in ALIASES.items())
            + "; nothing is stored in fewer than 8 bits"
        )
    return row


def get_quantized_format(name: str | torch.dtype) -> StorageFormat:
    """`get_format` where there are to be scales. Raises ValueError for pages in the model's dtype too."""
    row = get_format(name)
    if not row.is_quantized:
        quantized = ", ".join(other.name for other in FORMATS.values() if other.is_quantized)
        raise ValueError(f"kv_cache_dtype={name!r} has no scales; choose one of {quantized}")
    return row
