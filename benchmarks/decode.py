"""`paged_attention` of the newest tokens over a long past: against the read bandwidth, bf16 pages and other kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from hf_kvquant.ops import paged_attention

from . import peers
from .bandwidth import ceilings
from .pages import Pages, Shape, make_pages, make_query
from .results import Results
from .timing import replay_seconds, rotation

DTYPE = torch.bfloat16
LLAMA = Shape()
# Format, kind of scales; unquantized first, since ratios are to it.
MAIN = [("model", ""), ("fp8_e4m3", "dynamic"), ("int8", "equalized")]
OTHERS = [("fp8_e4m3", "tensor"), ("fp8_e4m3", "channel"), ("fp8_e5m2", "dynamic"), ("int8", "head"),
          ("int8", "channel")]  # fmt: skip
# What matters most comes first.
CELLS = [(8, 32768), (32, 8192), (1, 32768), (1, 131072), (1, 8192), (1, 1024), (64, 8192), (8, 8192)]
SMALL_CELLS = [(8, 32768), (1, 8192), (1, 131072)]
SHAPES = [
    Shape(head_dim=64), Shape(32, 32, 80), Shape(num_kv_heads=4, head_dim=96), Shape(16, 16, 128),
    Shape(28, 4, 128), Shape(64, 8, 128), Shape(16, 8, 256), Shape(8, 4, 256),
]  # fmt: skip
MOST_TOKENS = 1 << 20  # of all sequences together


def grid(quick: bool, tiny: bool) -> Iterator[tuple[int, int]]:
    """(batch, context), the important ones first."""
    if tiny:
        yield from [(1, 100), (3, 64)]
        return
    yield from CELLS
    if quick:
        return
    for context in (1024, 4096, 8192, 32768, 131072):
        for batch in (1, 2, 4, 8, 16, 32, 64):
            if batch * context <= MOST_TOKENS and (batch, context) not in CELLS:
                yield batch, context


def attention_seconds(
    results: Results, shape: Shape, batch: int, context: int, format_name: str, scales: str, num_tokens: int = 1,
    shuffled: bool = True, attend: Callable[[torch.Tensor, Pages], torch.Tensor] | None = None,
) -> tuple[float, int]:  # fmt: skip
    """Seconds of a call (`attend`, or the operator) whose pages are not in the cache, and the bytes it has to read."""
    device = results.device
    make = functools.partial(
        make_pages, shape, batch, context, format_name, scales, device, DTYPE, shuffled=shuffled
    )  # fmt: skip
    sets = [make()]
    nbytes = sets[0].nbytes
    sets += [make() for _ in range(rotation(nbytes, device) - 1)]
    query = make_query(shape, batch, num_tokens, device, DTYPE)

    def operator(query: torch.Tensor, pages: Pages) -> torch.Tensor:
        tables = (pages.page_table, pages.seq_lens)
        return paged_attention(query, pages.k, pages.v, *tables, softmax_scale=shape.head_dim**-0.5)

    calls = [functools.partial(attend or operator, query, pages) for pages in sets]
    return replay_seconds(calls, device), nbytes


def peer_seconds(results: Results, shape: Shape, batch: int, context: int, make_call: Callable[..., Any]) -> float:
    """Seconds of a peer's call over contiguous bf16 keys and values that are not in the cache."""
    device = results.device
    nbytes = 4 * batch * shape.num_kv_heads * context * shape.head_dim
    query = make_query(shape, batch, 1, device, DTYPE)
    calls = []
    for _ in range(rotation(nbytes, device)):
        sizes = (batch, shape.num_kv_heads, context, shape.head_dim)
        key, value = (torch.randn(sizes, device=device, dtype=DTYPE) for _ in range(2))
        calls.append(make_call(query, key, value))
    return replay_seconds(calls, device)


def measure(results: Results, quick: bool = False, tiny: bool = False) -> None:
    """Everything about decoding."""
    read, _ = ceilings(results)
    results.part("decode", f"paged_attention, newest tokens; share of {read / 1e9:.0f} GB/s; bf16 queries")
    shape = Shape(4, 2, 64) if tiny else LLAMA
    known: dict[tuple[Any, ...], float] = {}

    def row(
        shape: Shape, batch: int, context: int, format_name: str, scales: str, num_tokens: int = 1, **more: Any
    ) -> None:
        def measured() -> dict[str, Any]:
            seconds, nbytes = attention_seconds(
                results, shape, batch, context, format_name, scales, num_tokens, more.get("order") != "in order"
            )
            cell = (shape, batch, context, num_tokens)
            known[(*cell, format_name, scales)] = seconds
            ratios = {"vs_bf16_pages": (*cell, "model", ""), "vs_sdpa": (*cell, "sdpa", "")}
            return {
                "us": seconds * 1e6,
                "share": nbytes / seconds / read,
                **{name: known[key] / seconds if key in known else None for name, key in ratios.items()},
            }

        key = {"batch": batch, "context": context, "tokens": num_tokens, "format": format_name, "scales": scales}
        results.row({**key, **shape.key, **more}, measured)

    def peer(shape: Shape, batch: int, context: int, name: str, make_call: Callable[..., Any]) -> None:
        def measured() -> dict[str, Any]:
            seconds = peer_seconds(results, shape, batch, context, make_call)
            cell = (shape, batch, context, 1)
            if name.startswith("sdpa"):  # the better of its ways is what we are compared with
                best = (*cell, "sdpa", "")
                known[best] = min(seconds, known.get(best, seconds))
            nbytes = 4 * batch * context * shape.num_kv_heads * shape.head_dim
            return {"us": seconds * 1e6, "share": nbytes / seconds / read, "vs_bf16_pages": None, "vs_sdpa": None}

        key = {"batch": batch, "context": context, "tokens": 1, "format": name, "scales": ""}
        results.row({**key, **shape.key, "page_size": None}, measured)

    important = 2 if tiny else len(CELLS)
    for index, (batch, context) in enumerate(grid(quick, tiny)):
        peer(shape, batch, context, "sdpa enable_gqa", peers.sdpa_decode)
        if index < important:
            peer(shape, batch, context, "sdpa packed", peers.sdpa_packed)
        for format_name, scales in MAIN:
            row(shape, batch, context, format_name, scales)

    small_cells = [(2, 100)] if tiny else SMALL_CELLS[:1] if quick else SMALL_CELLS
    for batch, context in small_cells:
        for format_name, scales in OTHERS:
            row(shape, batch, context, format_name, scales)
        wide = Shape(shape.num_q_heads, shape.num_kv_heads, shape.head_dim, 64)
        for format_name, scales in MAIN:
            row(wide, batch, context, format_name, scales)
        row(shape, batch, context, "fp8_e4m3", "dynamic", order="in order")
        for num_tokens in (4, 8, 16):  # speculative decoding verifies so many
            for format_name, scales in MAIN:
                row(shape, batch, context, format_name, scales, num_tokens)
        for name, dtype in (("bf16", torch.bfloat16), ("fp8", torch.float8_e4m3fn)):
            peer(shape, batch, context, f"flashinfer {name}", functools.partial(peers.flashinfer_decode, dtype=dtype))
            peer(shape, batch, context, f"vllm triton {name}", functools.partial(peers.vllm_decode, dtype=dtype))
        peer(shape, batch, context, "flex", peers.flex_decode)

    others = [Shape(7, 1, 80), Shape(2, 2, 96)] if tiny else SHAPES[:3] if quick else SHAPES
    for other in others:
        batch, context = (2, 63) if tiny else (8, 32768 * 8 // max(other.num_kv_heads, 8))
        for format_name, scales in MAIN:
            row(other, batch, context, format_name, scales)

    steps = (1, 2, 3) if tiny else (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64)
    for format_name, scales in [("fp8_e4m3", "dynamic")] if quick or tiny else MAIN[1:]:
        _batches(results, shape, steps, 64 if tiny else 8192, format_name, scales, read)


def _batches(
    results: Results, shape: Shape, batches: tuple[int, ...], context: int, format_name: str, scales: str, read: float
) -> None:
    """t(B)/B, which should only fall: a step upwards is a batch size that is served badly."""
    previous: list[float] = []
    for batch in batches:

        def measured(batch: int = batch) -> dict[str, Any]:
            seconds, nbytes = attention_seconds(results, shape, batch, context, format_name, scales)
            a_sequence = seconds / batch
            step = a_sequence / previous[-1] - 1 if previous else None
            previous.append(a_sequence)
            return {
                "us": seconds * 1e6, "share": nbytes / seconds / read, "us_a_sequence": a_sequence * 1e6, "step": step
            }  # fmt: skip

        results.row(
            {
                "sweep": "batch",
                "batch": batch,
                "context": context,
                "tokens": 1,
                "format": format_name,
                "scales": scales,
            },
            measured,
        )
