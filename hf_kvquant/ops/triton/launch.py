"""Launching kernels without the compiler's own lookup in every call, which costs more than a small kernel runs."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch


class Launcher:
    """A kernel that is compiled once for each key.

    Triton binds and specializes every argument in every call, 20 to 80 microseconds of Python. Here what was compiled
    is found by a key of the caller's, and launched as it is.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._compiled: dict[Hashable, Any] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        arguments: tuple[Any, ...],
        constants: tuple[Any, ...],
        options: tuple[tuple[str, int], ...],
        key: Hashable,
    ) -> None:
        """Launch over `grid`.

        Args:
            arguments, constants: the kernel's parameters, in its order.
            options: `num_warps` and such.
            key: everything beside constants and options that the compiled code depends on: dtypes, alignment; None if
                that is not known, and Triton is to find out itself.
        """
        device = arguments[0].device
        if device.type != "cuda":  # the interpreter
            self._kernel[grid](*arguments, *constants, **dict(options))
            return
        full_key = (key, constants, options, device.index)
        compiled = self._compiled.get(full_key) if key is not None else None
        if compiled is not None and torch.cuda.current_device() == device.index:
            compiled[grid](*arguments, *constants)
            return
        with torch.cuda.device(device):
            compiled = self._kernel[grid](*arguments, *constants, **dict(options))
        if key is not None:
            self._compiled[full_key] = compiled
