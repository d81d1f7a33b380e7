"""Kernels launched on the machine through the functions that would launch them on a GPU."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from kernel_compiler import CompiledOnly
from ptx.memory import GlobalMemory

from .machine import run
from .memory import LocalMemory
from .program import SCALARS, Program, parse
from .wave import LANES, Wave

_TYPES = {"fp32": np.float32, "i32": np.int32, "i64": np.int64, "u32": np.uint32}


@functools.lru_cache(maxsize=256)
def parsed(text: str) -> Program:
    return parse(text)


def _segment(program: Program, values: list[Any], grid: tuple[int, int, int], num_threads: int) -> torch.Tensor:
    """The memory that a kernel takes its arguments from."""
    segment = np.full(program.descriptor["kernarg_size"], 0xFF, dtype=np.uint8)
    hidden: dict[str, Any] = {}
    for axis, count, size in zip("xyz", grid, (num_threads, 1, 1), strict=True):
        hidden |= {f"hidden_block_count_{axis}": np.uint32(count), f"hidden_group_size_{axis}": np.uint16(size)}
        hidden[f"hidden_remainder_{axis}"] = np.uint16(0)  # of threads beyond whole programs
    given = iter(values)
    for kind, offset, size in program.arguments:
        # Behind those that are given is scratch that is not used.
        value = hidden.get(kind) if kind.startswith("hidden_") else next(given, np.uint64(0))
        if value is not None:
            segment[offset : offset + size] = np.frombuffer(value.tobytes(), dtype=np.uint8)
    return torch.from_numpy(segment)


def _begin(wave: Wave, program: Program, segment: torch.Tensor, place: tuple[int, int, int]) -> None:
    """What stands in registers at first."""
    descriptor = program.descriptor
    other = ("dispatch_ptr", "queue_ptr", "dispatch_id", "private_segment_size")
    if any(descriptor[f"user_sgpr_{name}"] for name in other) or descriptor["enable_private_segment"]:
        raise NotImplementedError("other user registers than the arguments")
    wave.set_scalar(SCALARS, 2, segment.data_ptr())
    length, start = (descriptor[f"user_sgpr_kernarg_preload_{name}"] for name in ("length", "offset"))
    for i, word in enumerate(segment.numpy().view(np.uint32)[start : start + length]):
        wave.set_scalar(SCALARS + 2 + i, 1, int(word))
    at = SCALARS + descriptor["user_sgpr_count"]
    for axis, index in zip("xyz", place, strict=True):
        if descriptor[f"system_sgpr_workgroup_id_{axis}"]:
            wave.set_scalar(at, 1, index)
            at += 1
    wave.vectors[0] = LANES * wave.index + np.arange(LANES)


def launch(
    compiled: Any, grid: tuple[int, int, int], names: list[str], arguments: tuple[Any, ...], backwards: bool
) -> None:
    """Run a compiled kernel with arguments for its parameters `names`; `backwards`: the last wave first."""
    program = parsed(compiled.asm["amdgcn"])
    given = dict(zip(names, arguments, strict=True))
    values: list[Any] = []
    for name, kind in compiled.src.signature.items():
        if kind == "constexpr":
            continue
        value = given[name]
        is_tensor = isinstance(value, torch.Tensor)
        values.append(np.uint64(value.data_ptr()) if is_tensor else _TYPES[kind](value))
    segment = _segment(program, values, grid, LANES * compiled.metadata.num_warps)
    memory = GlobalMemory([*(value for value in arguments if isinstance(value, torch.Tensor)), segment])
    with np.errstate(all="ignore"):
        for place in np.ndindex(*grid[::-1]):
            shared = LocalMemory(compiled.metadata.shared)
            waves = [Wave(index, memory, shared) for index in range(compiled.metadata.num_warps)]
            for wave in waves:
                _begin(wave, program, segment, place[::-1])
            run(program, waves[::-1] if backwards else waves)


class EmulatedKernel(CompiledOnly):
    """Runs on the machine what it compiles for the device that is said to be there."""

    backwards = False

    def run(self, compiled: Any, grid: tuple[int, int, int], arguments: tuple[Any, ...]) -> None:
        launch(compiled, grid, self.kernel.arg_names, arguments, self.backwards)


class BackwardsKernel(EmulatedKernel):
    """The last wave first."""

    backwards = True
