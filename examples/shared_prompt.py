"""Many requests with one long beginning: it is computed once, and its pages are shared.

    python examples/shared_prompt.py [MODEL]

MODEL is a hub id or a directory, by default the tiny model beside this file.
"""

from __future__ import annotations

import argparse
import time

import torch
from measuring import TINY_MODEL, encode, load
from stdlib_text import held_out_text

from hf_kvquant import PrefixCache, QuantizedPagedCache

QUESTIONS = ("def read_lines(path):\n    ", "class Reader:\n    ", "for name in sorted(names):\n    ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=TINY_MODEL, help="hub id or directory")
    parser.add_argument("--tokens", type=int, default=768, help="length of the beginning")
    parser.add_argument("--new-tokens", type=int, default=16, help="tokens generated a request")
    args = parser.parse_args()

    model, tokenizer = load(args.model)
    system = encode(tokenizer, held_out_text()[: 8 * args.tokens], model.device)[:, : args.tokens]
    prefixes = PrefixCache(model, max_bytes=64 * 1024**2)
    prefixes.prefill(system)
    print(f"kept: {system.shape[1]} tokens, {prefixes.nbytes:,} bytes")

    caches = []
    for question in QUESTIONS:
        asked = tokenizer(question, return_tensors="pt", add_special_tokens=False).input_ids.to(model.device)
        tokens = torch.cat([system, asked], dim=1)
        seconds = []
        for cache in (QuantizedPagedCache.from_model(model), prefixes.cache_for(tokens)):
            to_compute = tokens.shape[1] - cache.get_seq_length()
            start = time.perf_counter()
            output = model.generate(
                input_ids=tokens, attention_mask=torch.ones_like(tokens), past_key_values=cache, do_sample=False,
                max_new_tokens=args.new_tokens,
            )  # fmt: skip
            seconds.append(time.perf_counter() - start)
        caches.append(cache)
        text = tokenizer.decode(output[0, system.shape[1] :], skip_special_tokens=True)
        print(f"\n== {to_compute} of {tokens.shape[1]} tokens to compute: {seconds[1]:.2f} s, alone {seconds[0]:.2f} s")
        print(text)
    # Every cache lies in the same pages, and has one or two of its own.
    print(f"\n{len(caches)} requests and what is kept hold {caches[0].nbytes_allocated:,} bytes together;", end=" ")
    print(f"each alone would use {max(cache.nbytes for cache in caches):,}")


if __name__ == "__main__":
    main()
