"""Which of the two, keys or values."""

from __future__ import annotations

from typing import Literal

Side = Literal["k", "v"]
SIDES: tuple[Side, Side] = ("k", "v")
# As transformers calls its layers' tensors, but for the plural.
TENSOR_NAMES: dict[Side, str] = {"k": "key", "v": "value"}
