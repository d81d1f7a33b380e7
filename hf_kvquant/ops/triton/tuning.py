"""Which tiles a kernel uses: a table, not a search at run time.

The table was measured on an H200 (docs/log.md), but for what its comments call predicted: that follows from compiled
code and the estimate of `benchmarks/estimate.py`, which explains what was measured. What the table goes by holds for
other devices too: how many programs the registers of a multiprocessor hold, and how many bytes are then under way.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass, replace

import torch
import triton
from packaging.version import Version
from triton.runtime import driver

# Before, a matrix product has at least 16 rows, and a kernel waits for the end of the one before it.
_IS_3_5 = Version(triton.__version__) >= Version("3.5")

# Of an H200: bytes of tiles that the programs of a multiprocessor have to hold for the memory to be busy; how long it
# takes to merge a split more, in the time of a tile, beside reading and writing it.
_BUSY = 60_000
_MERGE = 0.06
_MOST_SPLITS = 128


@dataclass(frozen=True)
class Tiles:
    """Tile sizes of the attention kernel.

    Attributes:
        block_m: rows (new tokens times query heads of a group).
        block_n: tokens of the past.
        programs: how many of them run on a multiprocessor at once, where the compiled kernel does not say it.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    programs: int


def attention_tiles(
    num_rows: int,
    head_dim: int,
    element_size: int,
    bias_size: int,
    least_rows: int,
    tensor_memory: bool,
    shared_memory: int,
) -> Tiles:
    """The table's tiles, or where these do not fit into shared memory fewer stages, then fewer tokens.

    Args:
        num_rows: new tokens times query heads of a group.
        element_size: bytes of a number of the pages.
        bias_size: bytes of a number of a mask that is added; 0 without one.
        least_rows, tensor_memory, shared_memory: of the device, as the functions below say.
    """
    tiles = _table(num_rows, head_dim, element_size, least_rows, tensor_memory)
    while shared_bytes(tiles, head_dim, element_size, bias_size) > shared_memory and tiles.block_n > 16:
        if tiles.num_stages > 2:
            tiles = replace(tiles, num_stages=tiles.num_stages - 1)
        else:
            tiles = replace(tiles, block_n=tiles.block_n // 2)
    return tiles


def shared_bytes(tiles: Tiles, head_dim: int, element_size: int, bias_size: int) -> int:
    """Shared memory of a program, at most: tiles of K, V and mask under way, query and weights, and small things.

    Warp groups (compute capability 9.0) hold one tile more, but there is room for it wherever that is.
    """
    channels = 1 << (head_dim - 1).bit_length()
    tile = tiles.block_n * (2 * channels * element_size + tiles.block_m * bias_size)
    operands = tiles.block_m * (channels + tiles.block_n) * max(2, element_size)
    return (tiles.num_stages - 1) * tile + operands + 1024


def _table(num_rows: int, head_dim: int, element_size: int, least_rows: int, tensor_memory: bool) -> Tiles:
    """What is fastest where it fits. `least_rows` and `tensor_memory` are as the device has them.

    Two warps multiply in fewer instructions than a group of four, and what Triton makes of them is the same in all its
    versions (3.9 turns four warps and 8 rows into other products, with fewer programs at once).
    """
    if element_size == 4:  # fp32 is multiplied as such, without tensor cores
        # By four warps Triton rounds it to tf32 before 3.8, for products in tensor memory.
        return Tiles(16, 16, 2, 2, 4) if tensor_memory else Tiles(16, 32, 4, 2, 2)
    num_rows, is_wide = max(num_rows, least_rows), head_dim > 128
    if num_rows <= 8 and not is_wide:
        # As fast as (8, 128, 4, 2) at 128 channels of 8 bits, where both were measured; predicted for others.
        return Tiles(8, 64, 2, 3, 5 if element_size == 1 else 3)
    if tensor_memory:
        return _in_registers(num_rows, is_wide, element_size)
    if num_rows <= 8:
        return Tiles(8, 64, 4, 3, 2)
    if num_rows <= 16:
        return Tiles(16, 64, 4, 2, 1) if is_wide else Tiles(16, 64, 2, 3, 3)
    if is_wide:
        return Tiles(32, 32, 4, 2, 1)
    if num_rows <= 64 and element_size == 1:
        # Predicted: 0.7 of the time of four warps, and for 64 rows 0.8, even where both halves read the same past.
        return Tiles(32, 64, 2, 3, 4)
    if num_rows <= 32:
        return Tiles(32, 64, 4, 2, 2)
    if num_rows <= 64:
        return Tiles(64, 32, 4, 3, 2)
    return Tiles(64, 64, 4, 3 if element_size == 1 else 2, 2)


def _in_registers(num_rows: int, is_wide: bool, element_size: int) -> Tiles:
    """Tiles that are multiplied in registers on a device whose tensor cores have a memory (compiled, not measured).

    Products of four and eight warps go through that memory: what is converted in registers is stored there first, in
    several times the instructions (Triton 3.5, 3.6), or the compiler fails (3.5, 3.9).
    """
    block_n = 32 if is_wide and element_size == 2 else 64
    num_stages = 2 if is_wide or element_size == 2 else 3
    if num_rows <= 16:
        return Tiles(8 if num_rows <= 8 else 16, block_n, 2, num_stages, 4)
    return Tiles(32, 32 if is_wide or element_size == 2 else 64, 2, num_stages, 4)


def num_splits(
    num_programs: int, max_tiles: int, tile_bytes: int, partial_bytes: int, programs: int, num_cores: int
) -> int:
    """Into how many parts every sequence is split.

    Args:
        num_programs: there would be without splits.
        max_tiles: of the longest sequence.
        tile_bytes: what a program reads for a tile.
        partial_bytes: what all rows leave to be merged, for each split.
        programs: how many a multiprocessor runs at once.
        num_cores: how many multiprocessors there are.

    Programs go through their tiles one after the other, and wait for each about as long whatever runs beside them,
    until the memory is busy. So the time is the number of tiles in a row, over as many rounds as the programs need, but
    not less than reading takes; and merging takes longer the more parts there are.
    """
    busy = num_cores * min(programs, _BUSY / tile_bytes)
    merge = _MERGE + 2 * partial_bytes / (num_cores * _BUSY)

    def tiles_in_a_row(splits: int) -> float:
        tiles = -(-max_tiles // splits)
        rounds = -(-num_programs * splits // (num_cores * programs))
        return max(rounds * tiles, num_programs * splits * tiles / busy) + splits * merge

    return min(range(1, min(max_tiles, _MOST_SPLITS) + 1), key=tiles_in_a_row)


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """How many multiprocessors the device has (1 for the interpreter)."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def can_chain(device: torch.device) -> bool:
    """Whether a kernel can be launched while the one before it runs (NVIDIA, compute capability 9.0 and later)."""
    if device.type != "cuda" or torch.version.hip is not None or not _IS_3_5:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def least_rows(device: torch.device) -> int:
    """How many rows a matrix product has at least."""
    # AMD multiplies 8 rows as well, but in twice the instructions that it takes for 16 (found by compiling).
    return 16 if torch.version.hip is not None or not _IS_3_5 else 8


@functools.cache
def shared_memory(device: torch.device) -> int:
    """How many bytes of shared memory a program may have: what Triton holds every kernel to."""
    if device.type != "cuda":  # the interpreter
        return sys.maxsize
    properties: dict[str, int] = driver.active.utils.get_device_properties(device.index)
    return properties["max_shared_mem"]


@functools.cache
def has_tensor_memory(device: torch.device) -> bool:
    """Whether tensor cores have a memory of their own (NVIDIA, compute capability 10 and 11)."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] in (10, 11)


@functools.cache
def instruction_set(device: torch.device) -> int:
    """How codes are converted on the device: a constant of `codes.py`."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0
    return 2 if torch.cuda.get_device_capability(device) >= (8, 9) else 1
