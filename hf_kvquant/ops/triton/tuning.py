"""Which tiles a kernel uses: a table, not a search at run time.

The table was measured on an H200 (docs/log.md). What it goes by holds for other devices too: how many programs the
registers of a multiprocessor hold, and how many bytes are then under way.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
from packaging.version import Version

# Before, a matrix product has at least 16 rows, and a kernel waits for the end of the one before it.
_IS_3_5 = Version(triton.__version__) >= Version("3.5")


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


def attention_tiles(num_rows: int, head_dim: int, element_size: int, is_dynamic: bool, is_masked: bool) -> Tiles:
    """Tiles for `num_rows` rows over pages of `element_size` bytes, with a scale per token or not."""
    if element_size == 4:  # fp32 is multiplied as such, without tensor cores
        return Tiles(16, 32, 4, 2, 2)
    if num_rows <= 8 and _IS_3_5:
        if head_dim > 128:
            return Tiles(8, 64, 4, 3, 2)
        if element_size == 2:
            return Tiles(8, 128, 4, 2, 2)
        # Scales of tokens and a mask need registers; with both, smaller programs leave room for more of them.
        if is_dynamic and not is_masked:
            return Tiles(8, 128, 4, 2, 4)
        return Tiles(8, 64, 2, 3, 5 if is_dynamic else 6)
    if num_rows <= 16:
        return Tiles(16, 64, 2, 3, 3) if head_dim <= 128 else Tiles(16, 64, 4, 2, 1)
    if head_dim > 128:
        return Tiles(32, 32, 4, 2, 1)
    if num_rows <= 32:
        return Tiles(32, 64, 4, 3 if element_size == 1 else 2, 2)
    if num_rows <= 64:
        return Tiles(64, 32, 4, 3, 2)
    return Tiles(64, 64, 4, 3 if element_size == 1 else 2, 2)


def num_splits(num_programs: int, max_tiles: int, programs: int, num_cores: int) -> int:
    """Into how many parts every sequence is split so that `num_programs` fill a device that runs `programs` on a core.

    Two programs a multiprocessor are worth a merge for any length; more of them only where each has much to read.
    """
    most = num_cores * programs // num_programs
    least = min(2 * num_cores // num_programs, most)
    return max(1, min(max(least, min(most, max_tiles // 32)), max_tiles))


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
def instruction_set(device: torch.device) -> int:
    """How codes are converted on the device: a constant of `codes.py`."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0
    return 2 if torch.cuda.get_device_capability(device) >= (8, 9) else 1
