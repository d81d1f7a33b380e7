"""The ceilings: how fast the device reads memory, and how fast it copies it."""

from __future__ import annotations

from typing import Any

import torch

from .results import Results
from .timing import replay_seconds

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

if triton is not None:

    @triton.jit
    def _sum_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):  # type: ignore[no-untyped-def]
        """A program adds up BLOCKS * BLOCK numbers that follow each other."""
        start = tl.program_id(0).to(tl.int64) * BLOCKS * BLOCK
        total = tl.zeros([BLOCK], tl.int32)
        for index in tl.static_range(BLOCKS):
            total += tl.load(x_ptr + start + index * BLOCK + tl.arange(0, BLOCK))
        tl.store(out_ptr + tl.program_id(0), tl.sum(total))

    @triton.jit
    def _copy_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):  # type: ignore[no-untyped-def]
        """A program copies BLOCKS * BLOCK numbers that follow each other."""
        start = tl.program_id(0).to(tl.int64) * BLOCKS * BLOCK
        for index in tl.static_range(BLOCKS):
            offsets = start + index * BLOCK + tl.arange(0, BLOCK)
            tl.store(y_ptr + offsets, tl.load(x_ptr + offsets))


# BLOCK, BLOCKS, warps: the fastest is the ceiling.
_READS = [(1024, 4, 4), (2048, 4, 4), (2048, 8, 4), (4096, 4, 8), (8192, 4, 8)]


def measure(results: Results, tiny: bool = False) -> None:
    """Streaming reads and copies, in bytes a second."""
    device = results.device
    results.part("bandwidth", "read and copy, GB/s")
    sizes = [1 << 20] if tiny else [1 << 30, 1 << 32]
    for nbytes in sizes:
        x = torch.randint(0, 100, (nbytes // 4,), dtype=torch.int32, device=device)

        def read(x: torch.Tensor = x, nbytes: int = nbytes) -> dict[str, Any]:
            if triton is None or device.type != "cuda":
                return {"GB_s": nbytes / replay_seconds([lambda: x.sum()], device) / 1e9, "how": "torch sum"}
            best = (0.0, "")
            for block, blocks, warps in _READS:
                programs = x.numel() // (block * blocks)
                out = torch.empty(programs, dtype=torch.int32, device=device)

                def call(block: int = block, blocks: int = blocks, warps: int = warps, out: Any = out) -> None:
                    _sum_kernel[(out.numel(),)](x, out, block, blocks, num_warps=warps)

                speed = nbytes / replay_seconds([call], device) / 1e9
                if int(out.sum()) != int(x.sum()):
                    raise RuntimeError(f"the reading kernel {block, blocks, warps} lost numbers")
                best = max(best, (speed, f"{block} x {blocks}, {warps} warps"))
            return {"GB_s": best[0], "how": best[1]}

        def copy(x: torch.Tensor = x, nbytes: int = nbytes) -> dict[str, Any]:
            y = torch.empty_like(x)
            best = (2 * nbytes / replay_seconds([lambda: y.copy_(x)], device) / 1e9, "copy_")
            if triton is not None and device.type == "cuda":
                for block, blocks, warps in _READS:
                    y.zero_()

                    def call(block: int = block, blocks: int = blocks, warps: int = warps) -> None:
                        _copy_kernel[(x.numel() // (block * blocks),)](x, y, block, blocks, num_warps=warps)

                    speed = 2 * nbytes / replay_seconds([call], device) / 1e9
                    if not torch.equal(x, y):
                        raise RuntimeError(f"the copying kernel {block, blocks, warps} lost numbers")
                    best = max(best, (speed, f"{block} x {blocks}, {warps} warps"))
            return {"GB_s": best[0], "how": f"{best[1]}; both ways"}

        results.row({"what": "read", "MiB": nbytes >> 20}, read)
        results.row({"what": "copy", "MiB": nbytes >> 20}, copy)
        del x


def ceilings(results: Results) -> tuple[float, float]:
    """Bytes a second of reading and of copying; measured now if they are not known yet."""
    if not results.rows("bandwidth"):
        measure(results, tiny=results.device.type != "cuda")
    best = {"read": 0.0, "copy": 0.0}
    for row in results.rows("bandwidth"):
        best[row["what"]] = max(best[row["what"]], row.get("GB_s", 0.0) * 1e9)
    if not all(best.values()):
        raise RuntimeError("the bandwidth could not be measured; shares of it cannot be given")
    return best["read"], best["copy"]
