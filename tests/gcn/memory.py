"""The memory that the waves of a program share."""

from __future__ import annotations

from typing import Any

import numpy as np
from ptx.memory import Fault

Array = np.ndarray[Any, Any]


class LocalMemory:
    """Of every byte it remembers which waves have read and which have written it since the last barrier."""

    def __init__(self, size: int) -> None:
        self.bytes = np.full(size, 0xFF, dtype=np.uint8)  # NaN, until something is written
        self.readers = np.zeros(size, dtype=np.uint16)  # a bit for each wave
        self.writers = np.zeros(size, dtype=np.uint16)

    def barrier(self) -> None:
        self.readers[:] = 0
        self.writers[:] = 0

    def _places(self, addresses: Array, size: int) -> Array:
        start = addresses.astype(np.int64)
        if (start + size > len(self.bytes)).any():
            raise Fault(f"{size} bytes at {addresses}, outside of {len(self.bytes)} that are shared")
        return start[:, None] + np.arange(size)

    def read(self, addresses: Array, size: int, wave: int) -> Array:
        """`[N, size]` bytes."""
        places = self._places(addresses, size)
        if (self.writers[places] & np.uint16(0xFFFF ^ 1 << wave)).any():
            raise Fault("a wave reads shared memory that another has written since the last barrier")
        self.readers[places] |= np.uint16(1 << wave)
        return self.bytes[places]

    def write(self, addresses: Array, values: Array, wave: int) -> None:
        places = self._places(addresses, values.shape[1])
        others = np.uint16(0xFFFF ^ 1 << wave)
        if (self.readers[places] & others).any():
            raise Fault("a wave writes shared memory that another has read since the last barrier")
        before = self.bytes[places]
        self.bytes[places] = values  # of several lanes the last, as those of a sum may differ by its rounding
        if ((self.writers[places] & others > 0) & (self.bytes[places] != before)).any():
            raise Fault("two waves write different numbers to the same shared memory without a barrier between")
        self.writers[places] |= np.uint16(1 << wave)
