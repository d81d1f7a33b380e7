"""The header of a safetensors file, and single tensors out of it.

The safetensors library maps the whole file into memory, which fails where the file is larger than the machine's; for a
few scales among hundreds of gigabytes a header and a few bytes are enough.
Source: the format's description in the safetensors project.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

import torch

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# The library's own bound.
_MAX_HEADER = 100_000_000
# More numbers than the scales of any layer have.
_MAX_NUMBERS = 2**20
_MAX_DIMENSIONS = 8


@dataclass(frozen=True)
class _Entry:
    dtype: str
    shape: list[int]
    begin: int
    end: int


class SafetensorsFile:
    """Names of tensors, and small tensors, of the file at `path`. Raises ValueError naming it if it is broken."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._start, self._entries = _read_header(file)
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(
                f"{path} cannot be read as safetensors ({error}); fetch or save it again, or remove it if it is not "
                "needed"
            ) from error

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name`. Raises ValueError naming file and tensor if it is not there or is no scale."""
        where = f"{name} in {self.path}"
        if name not in self._entries:
            raise ValueError(f"{where} cannot be read: the file has no such tensor, although the index says so")
        entry = self._entries[name]
        dtype = _DTYPES.get(entry.dtype)
        if dtype is None:
            raise ValueError(f"{where} has dtype {entry.dtype}; a scale has one of {', '.join(_DTYPES)}")
        if len(entry.shape) > _MAX_DIMENSIONS:
            raise ValueError(f"{where} has {len(entry.shape)} dimensions; no KV scale has more than {_MAX_DIMENSIONS}")
        numel = math.prod(entry.shape)
        if max(numel, *entry.shape, 0) > _MAX_NUMBERS:
            raise ValueError(f"{where} has shape {entry.shape}; no KV scale is that large")
        if entry.end - entry.begin != numel * dtype.itemsize:
            raise ValueError(f"{where} has {entry.end - entry.begin} bytes for shape {entry.shape} of {entry.dtype}")
        if numel == 0:
            return torch.empty(entry.shape, dtype=dtype, device="cpu")
        try:
            with self.path.open("rb") as file:
                file.seek(self._start + entry.begin)
                raw = bytearray(file.read(entry.end - entry.begin))
        except OSError as error:
            raise ValueError(f"{where} cannot be read: {error}") from error
        return torch.frombuffer(raw, dtype=dtype).view(entry.shape)


def _read_header(file: BinaryIO) -> tuple[int, dict[str, _Entry]]:
    """Where the data start, and what there is."""
    size = file.seek(0, 2)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, _MAX_HEADER):
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("the header is no object")
    data_size = size - 8 - length
    entries = {name: _entry(name, entry, data_size) for name, entry in header.items() if name != "__metadata__"}
    _check_apart(entries)
    return 8 + length, entries


def _check_apart(entries: dict[str, _Entry]) -> None:
    """Raise ValueError if two tensors share bytes, so that all of them take no more memory than the file has bytes."""
    in_order = sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end))
    for (first, one), (second, other) in itertools.pairwise(in_order):
        if other.begin < one.end:
            raise ValueError(f"{second} begins at byte {other.begin}, before the end of {first} at {one.end}")


def _entry(name: str, entry: Any, data_size: int) -> _Entry:
    if isinstance(entry, dict):
        dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
        if isinstance(dtype, str) and _counts(shape) and _counts(offsets) and len(offsets) == 2:
            begin, end = offsets
            if begin <= end <= data_size:
                return _Entry(dtype, shape, begin, end)
            raise ValueError(f"{name} is at bytes {begin} to {end} of {data_size}")
    raise ValueError(f"the header's entry for {name} is not one of a tensor")


def _counts(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)
