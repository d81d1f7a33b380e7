"""Instructions that move numbers: between registers, from and to memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from .arithmetic import DTYPES
from .block import Block
from .program import Instruction

Array = np.ndarray[Any, Any]


def _list(operand: str | list[str]) -> list[str]:
    return operand if isinstance(operand, list) else [operand]


def move(block: Block, instruction: Instruction, active: Array) -> None:
    """`mov`: a register, several to one, or one to several."""
    target, source = instruction.operands
    dtype = DTYPES[instruction.parts[-1]]
    parts = max(len(_list(target)), len(_list(source)))
    if parts == 1:
        block.put(target, block.get(source, dtype), active)
        return
    each = f"u{dtype.itemsize // parts}"
    if isinstance(source, list):
        together = np.stack([block.get(register, each) for register in source], axis=1)
        block.put(target, np.ascontiguousarray(together).view(dtype)[:, 0], active)
    else:
        apart = block.get(source, dtype).view(each).reshape(-1, parts)
        for i, register in enumerate(target):
            if register != "_":
                block.put(register, apart[:, i], active)


def load(block: Block, instruction: Instruction, active: Array) -> None:
    target, source = instruction.operands
    if "param" in instruction.parts:
        value = block.parameters[str(source)[1:-1]]
        block.put(target, np.broadcast_to(value, (block.num_threads,)), active)
        return
    registers, size = _list(target), DTYPES[instruction.parts[-1]].itemsize
    data = np.zeros((block.num_threads, size * len(registers)), dtype=np.uint8)
    if active.any():
        if "shared" in instruction.parts:
            at = block.address(source, "u4")[active]
            data[active] = block.shared.read(at, data.shape[1], block.threads[active])
        else:
            data[active] = block.memory.read(block.address(source, "u8")[active], data.shape[1])
    for i, register in enumerate(registers):
        block.put(register, data.view(f"u{size}")[:, i], active)


def store(block: Block, instruction: Instruction, active: Array) -> None:
    target, source = instruction.operands
    size = DTYPES[instruction.parts[-1]].itemsize
    values = np.stack([block.get(register, f"u{size}") for register in _list(source)], axis=1)
    data = np.ascontiguousarray(values).view(np.uint8)[active]
    if not active.any():
        return
    if "shared" in instruction.parts:
        block.shared.write(block.address(target, "u4")[active], data, block.threads[active])
    else:
        block.memory.write(block.address(target, "u8")[active], data)


def add_to_memory(block: Block, instruction: Instruction, active: Array) -> None:
    """`red` and `atom`, which also returns what was there."""
    if not {"global", "add"} <= set(instruction.parts):
        raise NotImplementedError(".".join(instruction.parts))
    *result, target, source = instruction.operands
    values = block.get(source, DTYPES[instruction.parts[-1]])
    before = np.zeros_like(values)
    before[active] = block.memory.add(block.address(target, "u8")[active], values[active])
    for register in result:
        block.put(register, before, active)


def copy(block: Block, instruction: Instruction, active: Array) -> None:
    """`cp.async`: what is copied is there when it has been waited for, and NaN until then."""
    if "commit_group" in instruction.parts:
        block.copies.append([])
    elif "wait_group" in instruction.parts:
        while len(block.copies) - 1 > int(str(instruction.operands[0]), 0):
            for addresses, data, threads in block.copies.popleft():
                block.shared.write(addresses, data, threads)
    elif instruction.parts[1:] not in (["async", cached, "shared", "global"] for cached in ("ca", "cg")):
        raise NotImplementedError(".".join(instruction.parts))
    elif active.any():
        _begin_copy(block, instruction, active)


def _begin_copy(block: Block, instruction: Instruction, active: Array) -> None:
    target, source, size, *given = instruction.operands
    num_bytes = int(str(size), 0)
    wanted = block.get(given[0], "u4") if given else block.all(num_bytes)
    if not np.isin(wanted[active], (0, num_bytes)).all():
        raise NotImplementedError("a copy of a part")
    data = np.zeros((block.num_threads, num_bytes), dtype=np.uint8)
    copied = active & (wanted > 0)
    if copied.any():
        data[copied] = block.memory.read(block.address(source, "u8")[copied], num_bytes)
    addresses, threads = block.address(target, "u4")[active], block.threads[active]
    block.shared.write(addresses, np.full_like(data[active], 0xFF), threads)
    block.copies[-1].append((addresses, data[active], threads))
