"""`write_kv`: of a prompt, as a share of the copy bandwidth; of a step, against two bf16 `index_copy_`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hf_kvquant.ops import write_kv

from .bandwidth import ceilings
from .decode import DTYPE, LLAMA
from .pages import Pages, Shape, make_pages
from .results import Results
from .timing import replay_seconds, rotation

FORMATS = [("fp8_e4m3", "dynamic"), ("int8", "equalized"), ("fp8_e4m3", "tensor"), ("int8", "channel"),
           ("fp8_e5m2", "dynamic"), ("model", "")]  # fmt: skip


def new_tokens(shape: Shape, batch: int, num_tokens: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V `[B, H, T, D]` as projections give them: heads side by side in a token."""
    sizes = (batch, num_tokens, shape.num_kv_heads, shape.head_dim)
    key, value = (torch.randn(sizes, device=device, dtype=DTYPE).transpose(1, 2) for _ in range(2))
    return key, value


def write_seconds(
    results: Results, shape: Shape, batch: int, num_tokens: int, context: int, format_name: str, scales: str
) -> tuple[float, int]:
    """Seconds to write the newest tokens, and the bytes that are read and written for it."""
    device = results.device
    elements = 2 * batch * shape.num_kv_heads * num_tokens * shape.head_dim
    code_bytes = 2 if format_name == "model" else 1
    nbytes = elements * (2 + code_bytes)
    if scales in ("dynamic", "equalized"):
        nbytes += elements // shape.head_dim * 2

    def call(pages: Pages, key: torch.Tensor, value: torch.Tensor) -> Callable[[], None]:
        clipped = None if format_name == "model" or pages.k.token_scale is not None else torch.zeros(2).long()
        clipped = None if clipped is None else clipped.to(device)
        return lambda: write_kv(key, value, pages.k, pages.v, pages.page_table, pages.seq_lens, clipped)

    calls = [
        call(make_pages(shape, batch, context, format_name, scales, device, DTYPE),
             *new_tokens(shape, batch, num_tokens, device))
        for _ in range(rotation(nbytes, device))
    ]  # fmt: skip
    return replay_seconds(calls, device), nbytes


def index_copy_seconds(results: Results, shape: Shape, batch: int, num_tokens: int, context: int) -> float:
    """Seconds of what a static bf16 cache does."""
    device = results.device
    where = torch.arange(context - num_tokens, context, device=device)

    def call() -> Callable[[], None]:
        new = new_tokens(shape, batch, num_tokens, device)
        sizes = (batch, shape.num_kv_heads, context, shape.head_dim)
        stores = [torch.zeros(sizes, device=device, dtype=DTYPE) for _ in range(2)]

        def copy() -> None:
            for store, x in zip(stores, new, strict=True):
                store.index_copy_(2, where, x)

        return copy

    nbytes = 8 * batch * shape.num_kv_heads * num_tokens * shape.head_dim
    return replay_seconds([call() for _ in range(rotation(nbytes, device))], device)


def measure(results: Results, quick: bool = False, tiny: bool = False) -> None:
    """Prompts and steps."""
    _, copy = ceilings(results)
    results.part("write", f"write_kv of bf16 K and V; share of {copy / 1e9:.0f} GB/s copied")
    shape = Shape(4, 2, 64) if tiny else LLAMA
    prompts = [(2, 17)] if tiny else [(1, 32768)] if quick else [(1, 32768), (1, 8192), (8, 4096), (1, 1024)]
    steps = [(3, 1, 64)] if tiny else [(1, 1, 1024), (8, 1, 1024), (64, 1, 1024), (8, 4, 1024)]
    cases = [(batch, num_tokens, num_tokens) for batch, num_tokens in prompts] + steps
    for batch, num_tokens, context in cases:
        copied: list[float] = []

        def index_copy(
            batch: int = batch, num_tokens: int = num_tokens, context: int = context, copied: list[float] = copied
        ) -> dict[str, Any]:
            copied.append(index_copy_seconds(results, shape, batch, num_tokens, context))
            nbytes = 8 * batch * shape.num_kv_heads * num_tokens * shape.head_dim
            return {"us": copied[0] * 1e6, "share": nbytes / copied[0] / copy, "vs_index_copy": None}

        results.row({"batch": batch, "tokens": num_tokens, "format": "bf16 index_copy_", "scales": ""}, index_copy)
        for format_name, scales in FORMATS:

            def measured(
                batch: int = batch,
                num_tokens: int = num_tokens,
                context: int = context,
                format_name: str = format_name,
                scales: str = scales,
                copied: list[float] = copied,
            ) -> dict[str, Any]:
                seconds, nbytes = write_seconds(results, shape, batch, num_tokens, context, format_name, scales)
                ratio = copied[0] / seconds if copied else None
                return {"us": seconds * 1e6, "share": nbytes / seconds / copy, "vs_index_copy": ratio}

            key = {"batch": batch, "tokens": num_tokens, "format": format_name, "scales": scales}
            results.row(key, measured)
