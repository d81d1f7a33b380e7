"""A prompt into an empty cache, and a chunk over a quantized past, against SDPA over contiguous bf16."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.nn.attention.bias import causal_lower_right

from hf_kvquant.ops import paged_attention, read_pages, write_kv

from . import peers
from .decode import DTYPE, LLAMA, MAIN
from .pages import Shape, make_pages, make_query
from .results import NotInstalled, Results
from .timing import replay_seconds
from .write import new_tokens

# Batch, new tokens, past.
CHUNKS = [(1, 8192, 32768), (1, 512, 4096), (8, 512, 4096), (1, 2048, 131072)]


def measure(results: Results, quick: bool = False, tiny: bool = False) -> None:
    """Fresh prompts and chunks."""
    device = results.device
    results.part("prefill", "TFLOP/s of causal attention; ratios to the fastest SDPA over contiguous bf16")
    shape = Shape(4, 2, 64) if tiny else LLAMA
    for batch, length in [(2, 65)] if tiny else [(1, 8192)] if quick else [(1, 8192), (1, 32768), (8, 2048)]:
        _fresh(results, shape, batch, length)
    for batch, num_tokens, past in [(2, 17, 64)] if tiny else CHUNKS[:2] if quick else CHUNKS:
        key = {"batch": batch, "tokens": num_tokens, "past": past}
        context = past + num_tokens
        flops = 4 * batch * shape.num_q_heads * shape.head_dim * num_tokens * (past + num_tokens / 2)
        best = _fastest_sdpa(results, shape, key, flops)

        def flex(batch: int = batch, num_tokens: int = num_tokens, context: int = context) -> Any:
            query, dense = _dense(shape, batch, num_tokens, context, device)
            return peers.flex_prefill(query, *dense)

        _timed(results, key, "flex", flex, flops, best)
        for format_name, scales in MAIN:

            def ours(
                batch: int = batch,
                num_tokens: int = num_tokens,
                context: int = context,
                format_name: str = format_name,
                scales: str = scales,
            ) -> Any:
                pages = make_pages(shape, batch, context, format_name, scales, device, DTYPE)
                query = make_query(shape, batch, num_tokens, device, DTYPE)
                return functools.partial(
                    paged_attention, query, pages.k, pages.v, pages.page_table, pages.seq_lens,
                    softmax_scale=shape.head_dim**-0.5,
                )  # fmt: skip

            _timed(results, key, f"{format_name} {scales}".strip(), ours, flops, best)

            def long_turn(
                batch: int = batch,
                num_tokens: int = num_tokens,
                context: int = context,
                format_name: str = format_name,
                scales: str = scales,
            ) -> Any:
                pages = make_pages(shape, batch, context, format_name, scales, device, DTYPE)
                query = make_query(shape, batch, num_tokens, device, DTYPE)
                mask = causal_lower_right(num_tokens, context)

                def call() -> torch.Tensor:
                    key, value = (read_pages(side, pages.page_table, DTYPE) for side in (pages.k, pages.v))
                    return peers.sdpa(
                        query, key[:, :, :context], value[:, :, :context], attn_mask=mask, enable_gqa=True
                    )

                return call

            if device.type == "cuda":  # what attention does with many new tokens
                _timed(results, key, f"read {format_name} {scales}".strip() + " + sdpa", long_turn, flops, best)


def _dense(shape: Shape, batch: int, num_tokens: int, context: int, device: torch.device) -> tuple[Any, Any]:
    sizes = (batch, shape.num_kv_heads, context, shape.head_dim)
    dense = [torch.randn(sizes, device=device, dtype=DTYPE) for _ in range(2)]
    return make_query(shape, batch, num_tokens, device, DTYPE), dense


def _timed(
    results: Results, key: dict[str, Any], name: str, make_call: Any, flops: float, best: list[float]
) -> dict[str, Any]:
    def measured() -> dict[str, Any]:
        seconds = replay_seconds([make_call()], results.device, repeats=5)
        return {"ms": seconds * 1e3, "TFLOP_s": flops / seconds / 1e12, "vs_sdpa": best[0] / seconds if best else None}

    return results.row({**key, "what": name}, measured)


def _fastest_sdpa(results: Results, shape: Shape, key: dict[str, int], flops: float) -> list[float]:
    """Seconds of the fastest right way, as a list of one; empty if there is none."""
    batch, num_tokens, context = key["batch"], key["tokens"], key["past"] + key["tokens"]
    query, dense = _dense(shape, batch, num_tokens, context, results.device)
    best: list[float] = []
    for name, call in peers.sdpa_prefill(query, *dense).items():

        def checked(call: Any = call) -> Any:
            if not peers.attends_to_all(call, query, *dense):
                raise NotInstalled("aligned otherwise, or wrong")
            return call

        row = _timed(results, key, f"sdpa {name}", checked, flops, best)
        if "ms" in row:
            best[:] = [min([row["ms"] / 1e3, *best])]
    return best


def _fresh(results: Results, shape: Shape, batch: int, length: int) -> None:
    """What a fresh prompt costs: SDPA over its own K and V, and writing them."""
    device = results.device
    key = {"batch": batch, "tokens": length, "past": 0}
    flops = 2 * batch * shape.num_q_heads * shape.head_dim * length * length
    best = _fastest_sdpa(results, shape, key, flops)
    for format_name, scales in MAIN:

        def both(format_name: str = format_name, scales: str = scales) -> Any:
            pages = make_pages(shape, batch, length, format_name, scales, device, DTYPE)
            k, v = new_tokens(shape, batch, length, device)
            query = make_query(shape, batch, length, device, DTYPE)

            def call() -> torch.Tensor:
                write_kv(k, v, pages.k, pages.v, pages.page_table, pages.seq_lens)
                return peers.sdpa(query, k, v, is_causal=True, enable_gqa=True)

            return call

        _timed(results, key, f"write {format_name} {scales}".strip() + " + sdpa", both, flops, best)
