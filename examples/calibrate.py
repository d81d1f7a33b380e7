"""Calibrate scales on text in several ways, and compare them with dynamic ones on text that was not seen.

    python examples/calibrate.py [MODEL] [--output DIRECTORY]

MODEL is a hub id or a directory, by default the tiny model beside this file. With --output the scales per tensor for
fp8, which other programs read as well, are written with the model into a new checkpoint.
"""

from __future__ import annotations

import argparse

from measuring import TINY_MODEL, load, print_table, read_text, windows
from stdlib_text import calibration_text, held_out_text
from transformers import DynamicCache

from hf_kvquant import QuantizedPagedCache, calibrate, write_scales

WAYS = {
    "fp8": {
        "per tensor": {},
        "per head": {"granularity": "head"},
        "per channel": {"granularity": "channel"},
    },
    "int8": {
        "per tensor": {},
        "per tensor, mse": {"estimator": "mse"},
        "per head": {"granularity": "head"},
        "per channel": {"granularity": "channel"},
        "per channel, with zeros": {"granularity": "channel", "symmetric": False},
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=TINY_MODEL, help="hub id or directory")
    parser.add_argument("--output", help="new directory for a checkpoint with the scales per tensor for fp8")
    parser.add_argument("--quick", action="store_true", help="less text: numbers are rough")
    args = parser.parse_args()
    calibration_windows, held_out_windows = (3, 1) if args.quick else (16, 8)

    model, tokenizer = load(args.model)
    tokens = windows(tokenizer, calibration_text(), calibration_windows, model.device)
    texts = windows(tokenizer, held_out_text(), held_out_windows, model.device)
    QuantizedPagedCache.from_model(model)  # compressed-tensors stops rounding keys and values inside the model
    exact = read_text(model, texts, lambda: DynamicCache(config=model.config))
    rows = [("DynamicCache", "-", f"{exact.perplexity:.4f}", f"{1:.2%}", "-")]
    for name, ways in WAYS.items():
        sources = {"dynamic": "dynamic"}
        for way, options in ways.items():
            sources[way] = calibrate(model, tokens, kv_cache_dtype=name, batch_size=4, progress=False, **options)
        for way, scales in sources.items():
            reading = read_text(
                model,
                texts,
                lambda name=name, scales=scales: QuantizedPagedCache.from_model(
                    model, kv_cache_dtype=name, scales=scales
                ),
            )
            clipped = sum(sum(layer.clipped) for layer in reading.cache.report().layers)
            rows.append((name, way, f"{reading.perplexity:.4f}", f"{reading.agreement(exact):.2%}", f"{clipped:,}"))
        if name == "fp8" and args.output:
            written = write_scales(sources["per tensor"], args.model, args.output)
            print(f"{written.path}: {', '.join(written.files)}")
    print_table(("cache", "scales", "perplexity", "top-1", "clipped"), rows)
    numbers = sum(layer.keys.numel() + layer.values.numel() for layer in exact.cache.layers)
    print(
        f"{texts.numel():,} held-out tokens, {tokens.numel():,} of calibration; top-1: share of tokens whose "
        "most likely successor is DynamicCache's; clipped: keys and values beyond "
        f"the calibrated range in the last window, of {numbers:,}"
    )


if __name__ == "__main__":
    main()
