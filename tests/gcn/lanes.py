"""Instructions that take numbers from other lanes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .program import SCALARS, Instruction, registers
from .wave import LANES, Wave, reader, scalar_reader

Array = np.ndarray[Any, Any]
_LANES = np.arange(LANES)


def _sources(instruction: Instruction) -> Array:
    """The lane that each takes from, negative for none."""
    row, place = _LANES // 16 * 16, _LANES % 16
    given = instruction.modifiers
    if "quad_perm" in given:
        return _LANES // 4 * 4 + np.array(instruction.numbers("quad_perm", ()))[_LANES % 4]
    if "row_half_mirror" in given:
        return _LANES // 8 * 8 + 7 - _LANES % 8
    if "row_mirror" in given:
        return row + 15 - place
    if "row_ror" in given:
        return row + (place - instruction.number("row_ror")) % 16
    if "row_shr" in given:
        source = place - instruction.number("row_shr")
        return np.where(source >= 0, row + source, -1)
    if "row_shl" in given:
        source = place + instruction.number("row_shl")
        return np.where(source < 16, row + source, -1)
    if "row_bcast" in given:
        width = {15: 16, 31: 32}[instruction.number("row_bcast")]
        return np.where(width <= _LANES, _LANES // width * width - 1, -1)
    raise NotImplementedError(instruction.text)


def moved_lanes(instruction: Instruction) -> Callable[[Wave], tuple[Array, Array, Array]]:
    """Of DPP: from where each lane takes its first operand, which lanes are written, and which take a zero."""
    sources = _sources(instruction)
    rows, banks = (instruction.number(name, 0xF) for name in ("row_mask", "bank_mask"))
    enabled = (rows >> _LANES // 16 & 1).astype(bool) & (banks >> _LANES % 16 // 4 & 1).astype(bool)
    fills = instruction.number("bound_ctrl") == 1
    everywhere, nowhere = sources >= 0, sources < 0

    def find(wave: Wave) -> tuple[Array, Array, Array]:
        there = everywhere if wave.all_active else everywhere & wave.active[sources]
        return sources, enabled if fills else enabled & there, ~there if fills else nowhere

    return find


def compile_lanes(instruction: Instruction) -> Callable[[Wave], None]:
    """`v_readlane`, `v_readfirstlane` and `v_writelane`, whether lanes are active or not."""
    instruction.only()
    target, source, *lane = instruction.operands
    first, _ = registers(target)  # type: ignore[misc]
    number = scalar_reader(lane[0], 1) if lane else lambda wave: int(wave.active.argmax())
    if instruction.base == "v_writelane_b32":
        value = scalar_reader(source, 1)

        def write(wave: Wave) -> None:
            wave.vectors[first, number(wave) % LANES] = value(wave)

        return write
    read = reader(source, "u4")

    def do(wave: Wave) -> None:
        wave.scalars[first - SCALARS] = int(np.broadcast_to(read(wave), LANES)[number(wave) % LANES])

    return do


def compile_swizzle(instruction: Instruction) -> Callable[[Wave], None]:
    """`ds_swizzle` by SWAP: neighbours of so many lanes change places."""
    instruction.only("offset")
    target, source = instruction.operands
    first, _ = registers(target)  # type: ignore[misc]
    match = re.match(r"swizzle\(SWAP,(\d+)\)$", instruction.modifiers.get("offset", ""))
    if match is None:
        raise NotImplementedError(instruction.text)
    lane, value = _LANES ^ int(match[1]), reader(source, "u4")

    def do(wave: Wave) -> None:
        wave.put(first, np.where(wave.active[lane], value(wave)[lane], np.uint32(0)))
        wave.begin("lgkmcnt", frozenset([first]))

    return do


def compile_exchange(instruction: Instruction) -> Callable[[Wave], None]:
    """`ds_bpermute`: what another lane has, by four times its number; 0 of a lane that is not active."""
    instruction.only("offset")
    target, places, source = instruction.operands
    first, _ = registers(target)  # type: ignore[misc]
    place, value = reader(places, "u4"), reader(source, "u4")
    offset = np.uint32(instruction.number("offset"))

    def do(wave: Wave) -> None:
        lane = (place(wave) + offset >> np.uint32(2)) % np.uint32(LANES)
        wave.put(first, np.where(wave.active[lane], value(wave)[lane], np.uint32(0)))
        wave.begin("lgkmcnt", frozenset([first]))

    return do
