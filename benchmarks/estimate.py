"""How long a decode step should take by the code that was compiled for it: no GPU is needed.

    python -m benchmarks.estimate                       # the table's tiles beside others, and what was measured
    python -m benchmarks.estimate --json benchmarks/results/h200-2026-11-20.json

A program takes its tiles one after the other. For a tile it takes the instructions of one of its warps at a rate that
was found by measuring, and the wait for memory in addition where copies do not run ahead. Programs on a multiprocessor
overlap, so a call takes the longest of

- tiles: those that follow each other in a program, over as many rounds as the programs need;
- issue: all instructions, one a cycle and scheduler;
- bytes: what has to be read, at the rate of a streaming read;

and what launching, the first and last tiles and the merge take. The constants are those of an H200. Where an estimate
is off by more than a tenth, something else decides: it is a guide to what to measure first, and no measurement.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from hf_kvquant.ops.triton import tuning
from hf_kvquant.ops.triton.tuning import Tiles

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))
from kernel_compiler import DEVICES, Binary, Shape, buffers, compile_attention, disassemble  # noqa: E402

CORES, SCHEDULERS = 132, 4
CLOCK = 1.85e3  # cycles a microsecond
CYCLES = 4.3  # from one instruction of a warp to its next
WAIT = 0.75, 1.1  # microseconds for a tile that is not loaded ahead: memory at ease, and busy
READ = 4.7e6  # bytes a microsecond
AROUND = 10.6  # microseconds


@dataclass(frozen=True)
class Call:
    """A call as `benchmarks.decode` makes it."""

    format: str
    scales: str
    tokens: int = 1
    head_dim: int = 128
    kv_heads: int = 8
    batch: int = 8
    context: int = 32768
    q_heads: int = 32

    @property
    def is_dynamic(self) -> bool:
        return self.scales in ("dynamic", "equalized")


@dataclass(frozen=True)
class Estimate:
    """Microseconds, and what they follow from."""

    tiles: float
    issue: float
    bytes: float
    instructions: int
    programs: int
    splits: int

    @property
    def total(self) -> float:
        return AROUND + max(self.tiles, self.issue, self.bytes)

    @property
    def decided_by(self) -> str:
        return max(("tiles", "issue", "bytes"), key=lambda name: float(getattr(self, name)))


def estimate(call: Call, tiles: Tiles | None = None, splits: int | None = None) -> Estimate:
    """What `call` should take on an H200, with the table's tiles and splits or with others."""
    groups = call.q_heads // call.kv_heads
    shape = Shape("sm_90", call.format, call.is_dynamic, call.tokens, call.head_dim, groups)
    compiled, _, tiles = compile_attention(shape, tiles)
    binary = disassemble(compiled)
    loop = next(loop for loop in binary.loops if loop.count(r".*MMA"))
    programs = binary.programs(DEVICES["sm_90"])
    blocks = -(-call.tokens * groups // tiles.block_m)
    num_programs = call.batch * call.kv_heads * blocks
    num_tiles = -(-call.context // tiles.block_n)
    tile_bytes = tiles.block_n * 2 * call.head_dim * shape.element_size
    if splits is None:
        partial_bytes = 4 * call.batch * call.q_heads * call.tokens * (call.head_dim + 2)
        splits = tuning.num_splits(num_programs, num_tiles, tile_bytes, partial_bytes, programs, CORES)
    width = shape.padded_dim * shape.element_size // 2
    ahead = min(max(buffers(compiled, *tile, bits=16)) for tile in ((tiles.block_n, width), (width, tiles.block_n)))
    scale_bytes = tiles.block_n * 4 if call.is_dynamic else 0
    num_bytes = num_programs // blocks * num_tiles * (tile_bytes + scale_bytes)
    return of_code(len(loop.instructions), binary, num_programs, num_tiles, splits, num_bytes, ahead > 1)


def of_code(
    instructions: int, binary: Binary, num_programs: int, num_tiles: int, splits: int, num_bytes: float, ahead: bool
) -> Estimate:
    """What a kernel should take of which a tile is so many `instructions` of a warp, in `num_programs` times `splits`.

    `ahead`: copies of a tile run while the one before it is computed.
    """
    programs = binary.programs(DEVICES["sm_90"])
    tiles_a_program = -(-num_tiles // splits)
    rounds = -(-num_programs * splits // (CORES * programs))
    at_once = min(programs, -(-num_programs * splits // CORES))
    wait = 0.0 if ahead else WAIT[0] if at_once <= 2 else WAIT[1]
    return Estimate(
        tiles=rounds * tiles_a_program * (wait + instructions * CYCLES / CLOCK),
        issue=num_programs * num_tiles / CORES * instructions * binary.threads / 32 / SCHEDULERS / CLOCK,
        bytes=num_bytes / READ,
        instructions=instructions, programs=programs, splits=splits,
    )  # fmt: skip


# Tiles and splits that were measured on an H200 and are in its file.
_WIDE, _ROWS_16 = Tiles(8, 128, 4, 2, 4), Tiles(16, 64, 2, 3, 3)
_ROWS_32, _ROWS_64 = Tiles(32, 64, 4, 3, 2), Tiles(64, 32, 4, 3, 2)
FP8, INT8 = ("fp8_e4m3", "dynamic"), ("int8", "equalized")
MEASURED: list[tuple[Call, Tiles, int]] = [
    *((Call(*kind), _WIDE, 8) for kind in (FP8, INT8, ("fp8_e5m2", "dynamic"))),
    *((Call(*FP8, context=8192, batch=batch), _WIDE, splits) for batch, splits in ((8, 4), (12, 2), (32, 2))),
    *((Call(*kind), Tiles(8, 64, 2, 3, 6), 12) for kind in (("fp8_e4m3", "tensor"), ("int8", "head"))),
    *((Call(*kind, tokens=4), _ROWS_16, 6) for kind in (FP8, INT8)),
    *((Call(*kind, tokens=8), _ROWS_32, 4) for kind in (FP8, INT8)),
    *((Call(*kind, tokens=16), _ROWS_64, 4) for kind in (FP8, INT8)),
    *((Call(*kind, head_dim=64), _WIDE, 8) for kind in (FP8, INT8)),
    *((Call(*kind, head_dim=80, kv_heads=32, context=8192), _WIDE, 2) for kind in (FP8, INT8)),
    *((Call(*kind, head_dim=96, kv_heads=4), _WIDE, 16) for kind in (FP8, INT8)),
]


def measured_us(file: Path, call: Call) -> float | None:
    """What the file has for `call`."""
    names = ("tokens", "head_dim", "kv_heads", "q_heads", "format", "scales", "batch", "context")
    for row in json.loads(file.read_text(encoding="utf-8"))["parts"]["decode"]["rows"]:
        # Rows of a sweep over batches name no shape: it is the usual one.
        same = all(row.get(name, getattr(Call(*FP8), name)) == getattr(call, name) for name in names)
        same = same and row.get("page_size", 16) == 16
        if same and "order" not in row and "us" in row:
            return float(row["us"])
    return None


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.estimate", description=__doc__.split("\n\n")[0])
    default = ROOT / "benchmarks" / "results" / "h200-2026-11-20.json"
    parser.add_argument("--json", type=Path, default=default, help="file with what was measured")
    arguments = parser.parse_args()
    print("call, tiles (rows x tokens x warps x stages), splits: estimate, decided by; measured")
    for call, tiles, splits in MEASURED:
        us = measured_us(arguments.json, call)
        for used, parts in ((tiles, splits), (None, None)):
            found = estimate(call, used, parts)
            name = "x".join(map(str, (used.block_m, used.block_n, used.num_warps, used.num_stages))) if used else "now"
            words = f"{call.format} {call.scales} {call.batch} x {call.context}, {call.tokens} new, d{call.head_dim}"
            figures = f"{found.instructions} instructions, {found.programs} programs, {found.splits} splits"
            was = f"; measured {us:.0f}" if used and us else ""
            print(f"{words} {name:>10}: {found.total:4.0f} us by {found.decided_by} ({figures}){was}", flush=True)


if __name__ == "__main__":
    main()
