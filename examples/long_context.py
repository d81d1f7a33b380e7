"""Memory as the context grows, and the bound that `num_pages` sets.

    python examples/long_context.py [--tokens 1024 4096 16384]

Four layers of the shape of a large model's (8 key/value heads of 128 channels) get random keys and values: what a cache
holds does not depend on them, and a model would spend minutes of a CPU on long contexts.
"""

from __future__ import annotations

import argparse

import torch
from measuring import print_table
from transformers import DynamicCache, LlamaConfig
from transformers.cache_utils import Cache

from hf_kvquant import KVQuantConfig, OutOfPagesError, QuantizedPagedCache
from hf_kvquant.evaluation.caches import held_bytes

CHUNK = 512
CONFIG = LlamaConfig(num_hidden_layers=4, num_key_value_heads=8, head_dim=128, attn_implementation="kvquant")


def fill(cache: Cache, num_tokens: int) -> None:
    """Write the same random keys and values until the cache holds `num_tokens`."""
    states = torch.randn(1, CONFIG.num_key_value_heads, CHUNK, CONFIG.head_dim, dtype=torch.bfloat16)
    while (length := cache.get_seq_length()) < num_tokens:
        new = states[:, :, : num_tokens - length]
        for layer in range(CONFIG.num_hidden_layers):
            cache.update(new, new, layer)


def mebibytes(cache: Cache) -> str:
    """What is in use, and what is held if that is more: pages come ahead of their use while the length is not known."""
    held = held_bytes(cache)
    used = cache.nbytes if isinstance(cache, QuantizedPagedCache) else held
    return f"{used / 2**20:.1f}" if used == held else f"{used / 2**20:.1f} ({held / 2**20:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384], help="context lengths to stop at")
    lengths = sorted(parser.parse_args().tokens)

    rows = []
    for name, cache in (
        ("DynamicCache", DynamicCache(config=CONFIG)),
        ("kvquant fp8", QuantizedPagedCache(CONFIG, KVQuantConfig(kv_cache_dtype="fp8"))),
        ("kvquant int8", QuantizedPagedCache(CONFIG, KVQuantConfig(kv_cache_dtype="int8"))),
    ):
        cells = []
        for length in lengths:
            fill(cache, length)
            cells.append(mebibytes(cache))
        rows.append((name, *cells))
    print("== MiB in use (MiB held)")
    print_table(("cache", *(f"{length:,} tokens" for length in lengths)), rows)

    bounded = KVQuantConfig(kv_cache_dtype="int8", num_pages=lengths[0] // 16, page_size=16)
    print(f"\n== num_pages={bounded.num_pages}, page_size={bounded.page_size}")
    cache = QuantizedPagedCache(CONFIG, bounded)
    try:
        fill(cache, lengths[0] + 1)
    except OutOfPagesError as error:
        print(f"OutOfPagesError: {error}")
    print(f"still held: {cache.get_seq_length():,} tokens, {cache.nbytes:,} bytes")
    cache.reset()
    print(f"after reset(): {cache.get_seq_length():,} tokens, {cache.nbytes:,} bytes")


if __name__ == "__main__":
    main()
