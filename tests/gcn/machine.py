"""Runs a program: its waves one after the other from barrier to barrier, each with all its lanes at once."""

from __future__ import annotations

from collections.abc import Callable

from ptx.memory import Fault

from . import moving
from .lanes import compile_exchange, compile_lanes, compile_swizzle
from .matrices import compile_product
from .packed import compile_mixed, compile_pack, compile_packed
from .program import Instruction, Program
from .scalar import CONDITIONS, compile_scalar
from .vector import compile_vector, compile_with_carry
from .wave import Wave

Do = Callable[[Wave], None]


def run(program: Program, waves: list[Wave]) -> None:
    """Until all waves have ended, in this order. Raises Fault for what a kernel may not do."""
    code = program.once(_compile)
    alive = waves
    while alive:
        alive = [wave for wave in alive if _run_to_barrier(program, code, wave)]
        waves[0].shared.barrier()


def _run_to_barrier(program: Program, code: list[Do], wave: Wave) -> bool:
    """Whether the wave has not ended."""
    instructions = program.code
    while True:
        at = wave.at
        instruction = instructions[at]
        wave.at = at + 1
        name = instruction.name
        if name == "s_endpgm":
            return False
        if name in CONDITIONS:
            if CONDITIONS[name](wave):
                wave.at = program.labels[instruction.operands[0]]
            continue
        try:
            if wave.awaited:
                wave.check(instruction.registers)
            code[at](wave)
        except Exception as error:
            raise type(error)(f"{error}; wave {wave.index}, instruction {at}: {instruction.text}") from error
        if name == "s_barrier":
            return True


def _wait(instruction: Instruction) -> Do:
    instruction.only("vmcnt", "lgkmcnt")
    most = {counter: int(value) for counter, value in instruction.modifiers.items()}

    def do(wave: Wave) -> None:
        for counter, number in most.items():
            wave.wait(counter, number)

    return do


def _barrier(wave: Wave) -> None:
    if wave.accesses_shared:
        raise Fault("a barrier before what a wave does with shared memory was waited for")


def _nothing(wave: Wave) -> None:
    pass


def _compile(instruction: Instruction) -> Do:
    name = instruction.name
    if name in ("s_endpgm", "s_nop", "s_setprio", *CONDITIONS):
        return _nothing
    if name == "s_barrier":
        return _barrier
    for start, compile_ in _BY_START.items():
        if name.startswith(start):
            return compile_(instruction)
    raise NotImplementedError(instruction.text)


# The first that fits.
_BY_START: dict[str, Callable[[Instruction], Do]] = {
    "s_waitcnt": _wait,
    "s_load_": moving.compile_scalar_load,
    "s_": compile_scalar,
    "buffer_load_": moving.compile_load,
    "global_load_": moving.compile_load,
    "buffer_store_": moving.compile_store,
    "global_store_": moving.compile_store,
    "global_atomic_": moving.compile_store,
    "ds_bpermute_b32": compile_exchange,
    "ds_swizzle_b32": compile_swizzle,
    "ds_read": moving.compile_shared_load,
    "ds_write": moving.compile_shared_store,
    "v_mfma_": compile_product,
    "v_pk_": compile_packed,
    "v_pack_b32_f16": compile_pack,
    "v_fma_mix": compile_mixed,
    "v_readlane_b32": compile_lanes,
    "v_readfirstlane_b32": compile_lanes,
    "v_writelane_b32": compile_lanes,
    "v_mad_u64_u32": compile_with_carry,
    "v_mad_i64_i32": compile_with_carry,
    "v_div_scale_f32": compile_with_carry,
    "v_add_co_u32": compile_with_carry,
    "v_addc_co_u32": compile_with_carry,
    "v_sub_co_u32": compile_with_carry,
    "v_subb_co_u32": compile_with_carry,
    "v_": compile_vector,
}
