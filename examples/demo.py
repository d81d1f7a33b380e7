"""Generate with the 8-bit cache, show what it stores, and compare it with the caches of transformers.

    python examples/demo.py [MODEL]

MODEL is a hub id or a directory, by default the tiny model beside this file.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from measuring import TINY_MODEL, Reading, encode, load, print_table, read_text, windows
from stdlib_text import held_out_text
from transformers import DynamicCache, PreTrainedModel, QuantizedCache, cache_utils
from transformers.cache_utils import Cache

from hf_kvquant import QuantizedPagedCache
from hf_kvquant.evaluation.caches import held_bytes
from hf_kvquant.evaluation.machine import device_name, git_commit
from hf_kvquant.hosts.conventions import CACHE_NAME, with_cache

PROMPT = 'def read_lines(path, encoding="utf-8"):\n    """'


@dataclass
class Peer:
    """A cache to measure: how `generate` is asked for it, how it is made by hand, and what was measured."""

    name: str
    attention: str
    options: dict[str, Any]
    make_cache: Callable[[], Cache]
    unavailable: str = ""
    seconds: list[float] = field(default_factory=list)
    cache_bytes: int = 0
    reading: Reading | None = None


def peers_of(model: PreTrainedModel) -> list[Peer]:
    """The caches of the table; the first one is what the others are compared with."""

    def paged(name: str, **config: Any) -> Peer:
        return Peer(name, "kvquant", {"cache_config": config}, lambda: QuantizedPagedCache.from_model(model, **config))

    def host_fp8() -> Cache:
        return QuantizedCache(backend="fp8", config=model.config)

    fp8_options = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    host = Peer("transformers fp8", "sdpa", fp8_options, host_fp8)
    if not hasattr(cache_utils, "Fp8QuantizedLayer"):
        host.unavailable = "not in this transformers"
    else:
        try:
            host_fp8()
        except ValueError as error:
            host.unavailable = f"not for this model: {error}".splitlines()[0]
    ours = paged("kvquant fp8", kv_cache_dtype="fp8")
    source = ours.make_cache().report().layers[0].scales[0].split(":")[0]
    ours.name += f" ({source} scales)"
    return [
        Peer("DynamicCache", "sdpa", {"cache_implementation": "dynamic"}, lambda: DynamicCache(config=model.config)),
        host,
        ours,
        paged("kvquant int8 (dynamic scales)", kv_cache_dtype="int8", scales="dynamic"),
    ]


def generate(model: PreTrainedModel, peer: Peer, prompt: torch.Tensor, new_tokens: int) -> None:
    """Generate once, and note how long it took and what the cache holds."""
    model.set_attn_implementation(peer.attention)
    start = time.perf_counter()
    output = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, return_dict_in_generate=True,
        min_new_tokens=new_tokens, max_new_tokens=new_tokens, **peer.options,
    )  # fmt: skip
    output.sequences.tolist()  # waits for a GPU
    peer.seconds.append(time.perf_counter() - start)
    peer.cache_bytes = held_bytes(output[CACHE_NAME])


def measure(model: PreTrainedModel, tokenizer: Any, peers: list[Peer], quick: bool) -> dict[str, int]:
    """Fill in the peers' numbers; returns how much text they come from."""
    prompt_tokens, new_tokens, rounds, num_windows = (64, 16, 1, 2) if quick else (384, 48, 5, 16)
    texts = windows(tokenizer, held_out_text(), num_windows, model.device)
    for _ in range(rounds + 1):
        for peer in peers:
            generate(model, peer, texts[:1, :prompt_tokens], new_tokens)
    for peer in peers:
        del peer.seconds[0]  # the first call warms up
        model.set_attn_implementation(peer.attention)
        peer.reading = read_text(model, texts, peer.make_cache)
    return {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "rounds": rounds, "text_tokens": texts.numel()}


def results_of(peers: list[Peer], amounts: dict[str, int]) -> list[dict[str, Any]]:
    """One record a cache."""
    records: list[dict[str, Any]] = []
    for peer in peers:
        if peer.reading is None:
            records.append({"cache": peer.name, "unavailable": peer.unavailable})
            continue
        records.append({
            "cache": peer.name,
            "bytes": peer.cache_bytes,
            "share_of_dynamic": peer.cache_bytes / peers[0].cache_bytes,
            "tokens_per_second": amounts["new_tokens"] / statistics.median(peer.seconds),
            "perplexity": peer.reading.perplexity,
            "same_greedy_token": peer.reading.agreement(peers[0].reading),
        })  # fmt: skip
    return records


def show(records: list[dict[str, Any]], amounts: dict[str, int]) -> None:
    """Print the table and what its columns mean."""
    rows = []
    for record in records:
        if "unavailable" in record:
            rows.append((record["cache"], record["unavailable"]))
            continue
        rows.append((
            record["cache"],
            f"{record['bytes']:,}",
            f"{record['share_of_dynamic']:.3f}",
            f"{record['tokens_per_second']:.1f}",
            f"{record['perplexity']:.4f}",
            f"{record['same_greedy_token']:.2%}",
        ))  # fmt: skip
    print_table(("cache", "bytes held", "share", "tokens/s", "perplexity", "top-1"), rows)
    print(
        f"bytes held, tokens/s: greedy, {amounts['prompt_tokens']} + {amounts['new_tokens']} tokens, "
        f"median of {amounts['rounds']}; transformers' caches with its sdpa attention\n"
        f"perplexity, top-1 (share of tokens whose most likely successor is DynamicCache's): "
        f"{amounts['text_tokens']:,} tokens of held-out text, read through the cache in chunks"
    )


def environment() -> dict[str, Any]:
    """What the numbers were measured with."""
    packages = ("hf-kvquant", "torch", "transformers", "compressed-tensors")
    versions: dict[str, str | None] = {}
    for name in packages:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {
        "versions": versions,
        "python": platform.python_version(),
        "cpu": device_name(torch.device("cpu")),
        "gpu": device_name(torch.device("cuda")) if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "git_commit": git_commit(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=TINY_MODEL, help="hub id or directory")
    parser.add_argument("--quick", action="store_true", help="fewer tokens: numbers are rough")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the numbers")
    args = parser.parse_args()

    model, tokenizer = load(args.model)
    prompt = encode(tokenizer, PROMPT, model.device)
    cache = QuantizedPagedCache.from_model(model)
    output = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), **with_cache(cache), do_sample=False,
        max_new_tokens=24 if args.quick else 96,
    )  # fmt: skip
    name = Path(args.model).name if Path(args.model).is_dir() else args.model
    print(f"== {name}, {str(model.dtype).removeprefix('torch.')}, on {model.device.type}: a prompt, continued")
    print(tokenizer.decode(output[0], skip_special_tokens=True))
    print("\n== cache.report()")
    print(cache.report())

    print("\n== compared")
    peers = peers_of(model)
    amounts = measure(model, tokenizer, [peer for peer in peers if not peer.unavailable], args.quick)
    records = results_of(peers, amounts)
    show(records, amounts)
    if args.json is not None:
        args.json.write_text(json.dumps({**environment(), **amounts, "results": records}, indent=2) + "\n")


if __name__ == "__main__":
    main()
