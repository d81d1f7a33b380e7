"""Kernels launched on the machine through the functions that would launch them on a GPU."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from kernel_compiler import CompiledOnly

from .block import Block
from .machine import run
from .memory import GlobalMemory
from .program import Program, parse

_TYPES = {"fp32": np.float32, "i32": np.int32, "i64": np.int64, "u32": np.uint32}


@functools.lru_cache(maxsize=256)
def parsed(text: str) -> Program:
    return parse(text)


def launch(compiled: Any, grid: tuple[int, int, int], names: list[str], arguments: tuple[Any, ...]) -> None:
    """Run a compiled kernel with arguments for its parameters `names`."""
    program = parsed(compiled.asm["ptx"])
    given = dict(zip(names, arguments, strict=True))
    values = []
    for name, kind in compiled.src.signature.items():
        if kind == "constexpr":
            continue
        value = given[name]
        if isinstance(value, torch.Tensor):
            values.append(np.array(value.data_ptr(), dtype=np.uint64))
        else:
            values.append(np.array(value, dtype=_TYPES[kind]))
    values += [np.array(0, dtype=np.uint64)] * (len(program.parameters) - len(values))  # scratch that is not used
    parameters = dict(zip(program.parameters, values, strict=True))
    memory = GlobalMemory(value for value in arguments if isinstance(value, torch.Tensor))
    columns, rows, layers = whole = grid
    num_threads, shared = 32 * compiled.metadata.num_warps, compiled.metadata.shared
    with np.errstate(all="ignore"):
        for z in range(layers):
            for y in range(rows):
                for x in range(columns):
                    run(Block(program, parameters, memory, num_threads, shared, (x, y, z), whole))


class EmulatedKernel(CompiledOnly):
    """Runs on the machine what it compiles for the device that is said to be there."""

    def run(self, compiled: Any, grid: tuple[int, int, int], arguments: tuple[Any, ...]) -> None:
        launch(compiled, grid, self.kernel.arg_names, arguments)
