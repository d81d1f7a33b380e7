"""Instructions that the threads of a warp, or of several, do together."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import matrices
from .arithmetic import DTYPES
from .block import Block
from .memory import Fault
from .program import Instruction, Operand

Array = np.ndarray[Any, Any]


def barrier(block: Block, instruction: Instruction, active: Array) -> None:
    """`bar`, when all who have to be there are."""
    if instruction.parts[-1] != "sync":
        raise NotImplementedError(".".join(instruction.parts))
    if "warp" in instruction.parts:
        block.shared.warp_barrier(np.flatnonzero(block.whole_warps(active)))
    elif not active.all() or len(instruction.operands) != 1:
        raise Fault("a barrier of some threads")
    else:
        block.shared.barrier()


def exchange(block: Block, instruction: Instruction, active: Array) -> None:
    """`shfl`: what another lane has, or one's own where there is none."""
    block.whole_warps(active)
    target, *operands = instruction.operands
    value, by, clamp = (block.get(operand, "u4") for operand in operands[:3])
    lane = block.threads % 32
    segment, bound = clamp.astype(np.int64) >> 8 & 31, clamp.astype(np.int64) & 31
    step = by.astype(np.int64) & 31
    first, last = lane & segment, (lane & segment) | (bound & ~segment)
    mode = instruction.parts[2]
    source = {"bfly": lane ^ step, "idx": first | (step & ~segment), "up": lane - step, "down": lane + step}[mode]
    inside = source >= last if mode == "up" else source <= last
    block.put(target, np.where(inside, value[block.threads - lane + np.where(inside, source, lane)], value), active)


def reduce(block: Block, instruction: Instruction, active: Array) -> None:
    """`redux`: one number of a whole warp."""
    block.whole_warps(active)
    value = block.get(instruction.operands[1], DTYPES[instruction.parts[-1]])
    combine = {"add": np.add, "max": np.maximum, "min": np.minimum}[instruction.parts[2]]
    one = combine.reduce(value.reshape(-1, 32), axis=1).astype(value.dtype)
    block.put(instruction.operands[0], np.repeat(one, 32), active)


# -- matrices in shared memory -----------------------------------------------------------------------------------------


def _rows(block: Block, operand: Operand, count: int, active: Array) -> tuple[Array, Array, Array]:
    """Which warps are active; addresses of the rows of their `count` matrices, and the threads that name them."""
    whole = block.whole_warps(active)
    addresses = block.address(operand, "u4").reshape(-1, 32)[whole, : 8 * count]
    threads = block.threads.reshape(-1, 32)[whole, : 8 * count]
    return whole, addresses.ravel(), threads.ravel()


def load_matrix(block: Block, instruction: Instruction, active: Array) -> None:
    registers, source = instruction.operands
    registers = registers if isinstance(registers, list) else [registers]
    whole, addresses, threads = _rows(block, source, len(registers), active)
    rows = block.shared.read(addresses, 16, threads).view(np.uint16).reshape(-1, len(registers), 8, 8)
    for i, register in enumerate(registers):
        value = np.zeros((len(whole), 32), dtype=np.uint32)
        value[whole] = matrices.from_rows(rows[:, i], "trans" in instruction.parts)
        block.put(register, value.ravel(), active)


def store_matrix(block: Block, instruction: Instruction, active: Array) -> None:
    target, registers = instruction.operands
    registers = registers if isinstance(registers, list) else [registers]
    whole, addresses, threads = _rows(block, target, len(registers), active)
    values = [block.get(register, "u4").reshape(-1, 32)[whole] for register in registers]
    rows = np.stack([matrices.to_rows(value, "trans" in instruction.parts) for value in values], axis=1)
    block.shared.write(addresses, np.ascontiguousarray(rows).view(np.uint8).reshape(-1, 16), threads)


# -- products ----------------------------------------------------------------------------------------------------------


def multiply(block: Block, instruction: Instruction, active: Array) -> None:
    """`mma`: a product of 16 x 16 and 16 x 8 by every warp."""
    block.whole_warps(active)
    parts = instruction.parts
    dtype = parts[-2]
    if parts[3] != "m16n8k16" or dtype not in ("f16", "bf16") or parts[-1] != "f32":
        raise NotImplementedError(".".join(parts))
    to, of_a, of_b, of_c = instruction.operands
    a = matrices.left_operand([block.get(register, "u4") for register in of_a], dtype)
    b = matrices.right_operand([block.get(register, "u4") for register in of_b], dtype)
    c = matrices.sums([block.get(register, "f4") for register in of_c])
    for register, value in zip(to, matrices.in_registers(matrices.product(a, b, c)), strict=True):
        block.put(register, value, active)


def multiply_later(block: Block, instruction: Instruction, active: Array) -> None:
    """`wgmma`: products by four warps, which are there when they have been waited for, and NaN until then."""
    if not active.all():
        raise Fault("an asynchronous product of some threads")
    what = instruction.parts[1]
    if what == "commit_group":
        block.products.append([])
    elif what == "wait_group":
        while len(block.products) - 1 > int(str(instruction.operands[0]), 0):
            for finish in block.products.popleft():
                finish()
        if not any(block.products):
            block.sums.clear()
    elif what == "mma_async":
        _begin_product(block, instruction)
    elif what != "fence":
        raise NotImplementedError(".".join(instruction.parts))


def _begin_product(block: Block, instruction: Instruction) -> None:
    """A product of 64 x 16 and 16 x `width` for every four warps."""
    shape, to, dtype, _ = instruction.parts[-4:]
    width = int(shape.split("k")[0].split("n")[1])
    registers, of_a, of_b, adds, sign_a, sign_b, *transposed = instruction.operands
    if (to, sign_a, sign_b) != ("f32", "1", "1") or dtype not in ("f16", "bf16") or not shape.endswith("k16"):
        raise NotImplementedError(instruction.text)
    assert isinstance(registers, list)

    def addresses(operand: Operand, size: int, flag: Operand) -> Array:
        starts = block.get(operand, "u8")[::128]  # one for every four warps
        return np.stack([matrices.Described(int(start)).addresses(size, flag == "1") for start in starts])

    places = addresses(of_b, width, transposed[-1])
    b = block.shared.read_by_product(places)
    if isinstance(of_a, list):
        a = matrices.left_operand([block.get(register, "u4") for register in of_a], dtype).reshape(-1, 64, 16)
    else:
        a = matrices.numbers_of(block.shared.read_by_product(addresses(of_a, 64, transposed[0])), dtype)
    everywhere = np.ones(block.num_threads, dtype=bool)
    for register in registers:
        block.sums.setdefault(register, block.get(register, "f4"))
        block.put(register, np.full(block.num_threads, np.nan, dtype=np.float32), everywhere)
    is_added = block.get(adds, bool)[::128]

    def finish() -> None:
        if (block.shared.at(places) != b).any():
            raise Fault("shared memory of a product was written before it was waited for")
        before = matrices.sums([block.sums[register] for register in registers]).reshape(-1, 64, width)
        before = np.where(is_added[:, None, None], before, np.float32(0))
        result = matrices.product(a, matrices.numbers_of(b, dtype).swapaxes(1, 2), before)
        for register, value in zip(registers, matrices.in_registers(result.reshape(-1, 16, width)), strict=True):
            block.sums[register] = value
            block.put(register, value, everywhere)

    block.products[-1].append(finish)
