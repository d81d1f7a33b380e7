"""Which tiles a kernel uses: a table, not a search at run time.

The table was measured on an H200 (docs/log.md), but for what its comments call predicted: that follows from compiled
code and the estimate of `benchmarks/estimate.py`, which explains what was measured. What the table goes by holds for
other devices too: how many programs the registers of a multiprocessor hold, and how many bytes are then under way.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
from packaging.version import Version

# Before, a matrix product has at least 16 rows, and a kernel waits for the end of the one before it.
_IS_3_5 = Version(triton.__version__) >= Version("3.5")

# Of an H200: bytes of tiles that the programs of a multiprocessor have to hold for the memory to be busy; how long it
# takes to merge a split more, in the time of a tile, beside reading and writing it.
_BUSY = 70_000
_MERGE = 0.04
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
    num_rows: int, head_dim: int, element_size: int, is_dynamic: bool, is_masked: bool, least_rows: int,
    tensor_memory: bool,
) -> Tiles:  # fmt: skip
    """Tiles for `num_rows` rows over pages of `element_size` bytes, with a scale per token or not, on a device of
    `least_rows` and `has_tensor_memory`."""
    if element_size == 4:  # fp32 is multiplied as such, without tensor cores
        return Tiles(16, 32, 4, 2, 2)
    if tensor_memory:
        return _two_warps(num_rows, head_dim, element_size)
    if num_rows <= 8 and least_rows <= 8:
        if head_dim > 128:
            return Tiles(8, 64, 4, 3, 2)
        if element_size == 2:
            return Tiles(8, 128, 4, 2, 2)
        # Scales of tokens and a mask need registers; with both, smaller programs leave room for more of them. So they
        # do where a tile has fewer bytes than at 128: waiting then takes longer than reading (predicted).
        if is_dynamic and not is_masked and head_dim == 128:
            return Tiles(8, 128, 4, 2, 4)
        return Tiles(8, 64, 2, 3, 5 if is_dynamic else 6)
    if num_rows <= 16:
        return Tiles(16, 64, 2, 3, 3) if head_dim <= 128 else Tiles(16, 64, 4, 2, 1)
    if head_dim > 128:
        return Tiles(32, 32, 4, 2, 1)
    # Two warps multiply in fewer instructions than a group of four, and twice as many programs find room; for 64 rows
    # even where both halves read the same past (predicted: 0.65 and 0.8 of the time).
    if num_rows <= 64 and element_size == 1:
        return Tiles(32, 64, 2, 3, 4)
    if num_rows <= 32:
        return Tiles(32, 64, 4, 2, 2)
    if num_rows <= 64:
        return Tiles(64, 32, 4, 3, 2)
    return Tiles(64, 64, 4, 3 if element_size == 1 else 2, 2)


def _two_warps(num_rows: int, head_dim: int, element_size: int) -> Tiles:
    """Tiles that Triton multiplies in registers on a device with memory for tensor cores (found by compiling, not
    measured).

    Products of four and eight warps go through that memory: what is converted in registers is stored there first, in
    several times the instructions (Triton 3.5, 3.6), or the compiler fails (3.5, 3.9).
    """
    num_stages = 2 if element_size == 2 or head_dim > 128 else 3
    if num_rows <= 8:
        return Tiles(8, 64 if element_size == 1 or head_dim <= 128 else 32, 2, num_stages, 5)
    if num_rows <= 16:
        return Tiles(16, 64 if element_size == 1 or head_dim <= 128 else 32, 2, num_stages, 4)
    return Tiles(32, 64 if element_size == 1 and head_dim <= 128 else 32, 2, num_stages, 4)


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
