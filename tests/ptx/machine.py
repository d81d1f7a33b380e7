"""Runs a program: all threads of a block at once, instruction by instruction.

Threads that have gone different ways are run from the earliest instruction on, until they meet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from . import moving, together
from .arithmetic import DTYPES, compare, compute, input_types
from .block import Block
from .program import Instruction

Array = np.ndarray[Any, Any]


def run(block: Block) -> None:
    """Until all threads have returned. Raises Fault for what a kernel may not do."""
    code = block.program.code
    end = len(code)
    everyone = np.ones(block.num_threads, dtype=bool)
    together_at: int | None = 0  # where all threads are, if that is one place, else:
    at = np.zeros(block.num_threads, dtype=np.int64)
    waiting = np.zeros(block.num_threads, dtype=bool)  # at a barrier
    while True:
        if together_at is not None:
            here, active = together_at, everyone
        else:
            if waiting.any() and (waiting | (at == end)).all():
                waiting[:] = False
                block.shared.barrier()
                at[at < end] += 1
            here = int(at[~waiting].min())
            active = (at == here) & ~waiting
        if here == end:
            return
        instruction = code[here]
        taking_part = active
        if instruction.guard is not None:
            taking_part = active & (block.registers[instruction.guard] ^ instruction.negated)
        name = instruction.parts[0]
        if name in ("bra", "ret"):
            target = end if name == "ret" else block.program.labels[str(instruction.operands[0])]
            if together_at is not None:
                at[:] = here
            at = np.where(taking_part, target, np.where(active, at + 1, at))
        elif together_at is None and name == "bar" and "warp" not in instruction.parts:
            waiting |= active
            continue
        else:
            try:
                _execute(block, instruction, taking_part)
            except Exception as error:
                raise type(error)(f"{error}; instruction {here}: {instruction.text}") from error
            if together_at is not None:
                together_at += 1
                continue
            at[active] += 1
        together_at = int(at[0]) if not waiting.any() and (at == at[0]).all() else None


def _execute(block: Block, instruction: Instruction, active: Array) -> None:
    do = _INSTRUCTIONS.get(instruction.parts[0], _calculate)
    do(block, instruction, active)


def _calculate(block: Block, instruction: Instruction, active: Array) -> None:
    target, *operands = instruction.operands
    kinds = input_types(instruction.parts)
    inputs = [block.get(operand, kinds[min(i, len(kinds) - 1)]) for i, operand in enumerate(operands)]
    block.put(target, compute(instruction.parts, inputs), active)


def _compare(block: Block, instruction: Instruction, active: Array) -> None:
    """`setp`, of one or two results, which may be combined with a third operand."""
    targets, *operands = instruction.operands
    _, name, *how, kind = instruction.parts
    a, b = (block.get(operand, DTYPES[kind]) for operand in operands[:2])
    results = compare(name, a, b, kind)
    for register, result in zip(str(targets).split("|"), results, strict=False):
        if len(operands) > 2:
            combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[how[0]]
            result = combine(result, block.get(operands[2], bool))
        block.put(register, result, active)


def _fence(block: Block, instruction: Instruction, active: Array) -> None:
    if "proxy" in instruction.parts:
        block.shared.fence()


_INSTRUCTIONS: dict[str, Callable[[Block, Instruction, Array], None]] = {
    "setp": _compare,
    "mov": moving.move,
    "ld": moving.load,
    "st": moving.store,
    "red": moving.add_to_memory,
    "atom": moving.add_to_memory,
    "cp": moving.copy,
    "fence": _fence,
    "griddepcontrol": lambda *_: None,  # kernels are run one after the other
    "bar": together.barrier,
    "shfl": together.exchange,
    "redux": together.reduce,
    "ldmatrix": together.load_matrix,
    "stmatrix": together.store_matrix,
    "mma": together.multiply,
    "wgmma": together.multiply_later,
}
