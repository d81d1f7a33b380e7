"""Where overhead decides: one short sequence on the device, and what a layer's step costs the host."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig
from transformers.cache_utils import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_kvquant import KVQuantConfig, QuantizedPagedCache
from hf_kvquant.attention import kvquant_attention
from hf_kvquant.ops import paged_attention, write_kv

from . import peers
from .decode import DTYPE, LLAMA, MAIN, peer_seconds
from .pages import Shape, make_pages, make_query
from .results import Results
from .timing import host_seconds, replay_seconds, rotation
from .write import new_tokens


def measure(results: Results, quick: bool = False, tiny: bool = False) -> None:
    """Latency of small calls, then host time."""
    device = results.device
    shape = Shape(4, 2, 64) if tiny else LLAMA
    results.part("small", "one sequence: microseconds of a call on the device, and of a layer's step on the host")
    for context in (63, 100) if tiny else (1024, 4096) if quick else (1024, 2048, 4096, 8192):

        def sdpa(context: int = context) -> dict[str, Any]:
            return {"attention_us": peer_seconds(results, shape, 1, context, peers.sdpa_decode) * 1e6}

        results.row({"what": "device", "context": context, "format": "sdpa enable_gqa"}, sdpa)
        for format_name, scales in MAIN:

            def ours(context: int = context, format_name: str = format_name, scales: str = scales) -> dict[str, Any]:
                return _device(results, shape, context, format_name, scales)

            results.row({"what": "device", "context": context, "format": f"{format_name} {scales}".strip()}, ours)
    _host(results, shape, steps=3 if tiny else 40, device=device)


def _device(results: Results, shape: Shape, context: int, format_name: str, scales: str) -> dict[str, Any]:
    device = results.device
    query = make_query(shape, 1, 1, device, DTYPE)
    attend, write, both = [], [], []
    first = make_pages(shape, 1, context, format_name, scales, device, DTYPE)
    for index in range(rotation(first.nbytes, device)):
        p = make_pages(shape, 1, context, format_name, scales, device, DTYPE) if index else first
        k, v = new_tokens(shape, 1, 1, device)

        def attend_one(p: Any = p) -> torch.Tensor:
            return paged_attention(query, p.k, p.v, p.page_table, p.seq_lens, softmax_scale=shape.head_dim**-0.5)

        def write_one(p: Any = p, k: Any = k, v: Any = v) -> None:
            write_kv(k, v, p.k, p.v, p.page_table, p.seq_lens)

        def do_both(attend_one: Any = attend_one, write_one: Any = write_one) -> None:
            write_one()
            attend_one()

        attend.append(attend_one)
        write.append(write_one)
        both.append(do_both)
    return {
        "attention_us": replay_seconds(attend, device) * 1e6,
        "write_us": replay_seconds(write, device) * 1e6,
        "both_us": replay_seconds(both, device) * 1e6,
        "attention_in_cache_us": replay_seconds(attend[:1], device) * 1e6,
    }


class _Attention(torch.nn.Module):
    """What attention functions ask of a layer."""

    is_causal = True

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.num_key_value_groups = shape.num_q_heads // shape.num_kv_heads
        self.training = False


def _host(results: Results, shape: Shape, steps: int, device: torch.device) -> None:
    """Update and attention of 32 layers, one token, while the device keeps up."""
    layers, context = (2, 16) if steps < 10 else (32, 128)
    config = LlamaConfig(
        hidden_size=shape.num_q_heads * shape.head_dim, num_attention_heads=shape.num_q_heads,
        num_key_value_heads=shape.num_kv_heads, head_dim=shape.head_dim, num_hidden_layers=layers,
    )  # fmt: skip
    config._attn_implementation = "kvquant"
    module = _Attention(shape)
    query = make_query(shape, 1, 1, device, DTYPE)
    new = new_tokens(shape, 1, 1, device)
    base: list[float] = []
    capacity = 2 * context + steps

    def ours(kind: str, fixed: bool) -> Any:
        cache = QuantizedPagedCache(
            config, KVQuantConfig(kv_cache_dtype=kind, max_cache_len=capacity if fixed else None)
        )
        return cache, kvquant_attention

    ways = {
        "DynamicCache + sdpa": lambda: (DynamicCache(config=config), sdpa_attention_forward),
        **{
            f"{kind} {'fixed' if fixed else 'growing'}": (lambda kind=kind, fixed=fixed: ours(kind, fixed))
            for kind in ("fp8", "int8", "model")
            for fixed in (False, True)
        },
    }
    for name, make in ways.items():

        def measured(make: Any = make) -> dict[str, Any]:
            cache, attention = make()

            def step(query: torch.Tensor = query, new: Any = new) -> None:
                for index in range(layers):
                    keys, values = cache.update(*new, index)
                    attention(module, query, keys, values, None)

            step(make_query(shape, 1, context, device, DTYPE), new_tokens(shape, 1, context, device))  # the prompt
            seconds = host_seconds(step, device, steps) / layers
            base.append(seconds)
            return {"host_us": seconds * 1e6, "vs_dynamic": base[0] / seconds}

        results.row({"what": "host, a layer's step", "context": context, "format": name}, measured)
