"""The attention kernel in the table's tiles and in others: whether what was chosen by an estimate is the faster one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch

from hf_kvquant.ops import PagedTensor

from .bandwidth import ceilings
from .decode import attention_seconds
from .pages import Pages, Shape
from .results import NotInstalled, Results

FP8, INT8 = ("fp8_e4m3", "dynamic"), ("int8", "equalized")
# Rows, tokens, warps, stages; and how many splits, None for as many as the table takes. None: the table chooses all.
Choice = tuple[tuple[int, int, int, int], int | None] | None
WIDE, NARROW = (8, 128, 4, 2), (8, 64, 2, 3)


def calls(tiny: bool) -> Iterator[tuple[Shape, int, int, int, list[tuple[str, str]], list[Choice]]]:
    """Shape, batch, context, new tokens, formats and choices: what was measured before, the table's, others."""
    if tiny:
        yield Shape(4, 2, 64), 2, 100, 1, [INT8], [(WIDE, 2), None]
        return
    usual = Shape()
    yield usual, 8, 32768, 8, [FP8, INT8], [((32, 64, 4, 3), 4), None, ((16, 64, 2, 3), None)]
    yield usual, 8, 32768, 16, [FP8, INT8], [((64, 32, 4, 3), 4), None, ((64, 64, 4, 3), None)]
    yield Shape(head_dim=64), 8, 32768, 1, [FP8, INT8], [(WIDE, 8), None, ((8, 128, 4, 3), None), (WIDE, None)]
    yield Shape(32, 32, 80), 8, 8192, 1, [FP8, INT8], [(WIDE, 2), None, (WIDE, None)]
    yield Shape(num_kv_heads=4, head_dim=96), 8, 32768, 1, [FP8, INT8], [(WIDE, 16), None, (WIDE, None)]
    yield usual, 8, 32768, 1, [FP8, INT8, ("fp8_e5m2", "dynamic"), ("model", "")], [(WIDE, 8), None, (WIDE, None)]
    for batch, splits in ((8, 4), (12, 2), (40, 1)):
        yield usual, batch, 8192, 1, [FP8], [(WIDE, splits), None]
    yield usual, 1, 1024, 1, [FP8], [(WIDE, 8), None, (NARROW, 8)]
    yield usual, 1, 32768, 1, [FP8], [(WIDE, 33), None, (NARROW, 33), (NARROW, 132)]
    yield usual, 8, 32768, 4, [FP8, INT8], [((16, 64, 2, 3), 6), None]
    yield usual, 8, 32768, 8, [("model", "")], [None, ((32, 64, 2, 2), None), ((32, 32, 2, 3), None)]


def measure(results: Results, quick: bool = False, tiny: bool = False) -> None:
    """Each call in each choice."""
    read, _ = ceilings(results)
    results.part("tiles", f"paged_attention in other tiles and splits; share of {read / 1e9:.0f} GB/s")
    for shape, batch, context, num_tokens, formats, choices in calls(tiny):
        for format_name, scales in formats[:1] if quick else formats:
            first: list[float] = []
            for choice in choices[:2] if quick else choices:

                def measured(
                    shape: Shape = shape, batch: int = batch, context: int = context, num_tokens: int = num_tokens,
                    format_name: str = format_name, scales: str = scales, choice: Choice = choice,
                    first: list[float] = first,
                ) -> dict[str, Any]:  # fmt: skip
                    attend = _kernel(choice, shape.head_dim**-0.5, results.device)
                    size = (shape, batch, context, format_name, scales, num_tokens)
                    seconds, nbytes = attention_seconds(results, *size, attend=attend)
                    first.append(seconds)
                    return {"us": seconds * 1e6, "share": nbytes / seconds / read, "vs_first": first[0] / seconds}

                tiles, splits = choice or ("table", None)
                name = tiles if isinstance(tiles, str) else " x ".join(map(str, tiles))
                key = {"batch": batch, "context": context, "tokens": num_tokens, "format": format_name}
                results.row({**key, "scales": scales, **shape.key, "tiles": name, "splits": splits}, measured)


def _kernel(choice: Choice, softmax_scale: float, device: torch.device) -> Any:
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise NotInstalled("kernels need a GPU, or TRITON_INTERPRET=1")
    from hf_kvquant.ops import triton

    options: dict[str, Any] = {}
    if choice is not None:
        tiles, splits = choice
        # Splits are fixed by hand or follow from the compiled kernel; the number of programs then plays no part.
        options = {"tiles": triton.tuning.Tiles(*tiles, programs=4), "splits": splits}

    def attend(query: torch.Tensor, pages: Pages) -> torch.Tensor:
        sides = (*_flat(pages.k), *_flat(pages.v))
        rest = (None, 0, None, softmax_scale, None, None, True, None)
        return triton.paged_attention(query, pages.page_table, pages.seq_lens, *sides, *rest, **options)

    return attend


def _flat(side: PagedTensor) -> tuple[Any, ...]:
    return side.pages, side.format, side.scale, side.zero, side.token_scale
