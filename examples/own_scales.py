"""Measure scales of one's own on calibration text, and use them instead of dynamic ones.

    python examples/own_scales.py [MODEL]

MODEL is a hub id or a directory, by default the tiny model beside this file.
"""

from __future__ import annotations

import argparse

import torch
from measuring import TINY_MODEL, load, print_table, read_text, windows
from stdlib_text import calibration_text, held_out_text
from transformers import DynamicCache, PreTrainedModel

from hf_kvquant import LayerScales, QuantizedPagedCache

FP8_MAX = 448.0  # the largest float8_e4m3fn
INT8_MAX = 127.0


@torch.no_grad()
def channel_ranges(model: PreTrainedModel, texts: torch.Tensor) -> list[torch.Tensor]:
    """A layer's smallest and largest keys and values: `[2 (key, value), 2 (min, max), heads, channels]` each."""
    ranges: list[torch.Tensor] = []
    for tokens in texts:
        cache = DynamicCache(config=model.config)
        model(input_ids=tokens[None], past_key_values=cache, logits_to_keep=1)
        for index, layer in enumerate(cache.layers):
            sides = [side.float() for side in (layer.keys, layer.values)]
            found = torch.stack([torch.stack([x.amin(dim=(0, 2)), x.amax(dim=(0, 2))]) for x in sides])
            if index == len(ranges):
                ranges.append(found)
            ranges[index][:, 0] = torch.minimum(ranges[index][:, 0], found[:, 0])
            ranges[index][:, 1] = torch.maximum(ranges[index][:, 1], found[:, 1])
    return ranges


def fp8_scales(low: torch.Tensor, high: torch.Tensor) -> LayerScales:
    """Symmetric: the largest magnitude of a channel becomes the largest number of the format."""
    k_scale, v_scale = torch.maximum(-low, high).clamp(min=1e-6) / FP8_MAX
    return LayerScales(k_scale=k_scale, v_scale=v_scale)


def int8_scales(low: torch.Tensor, high: torch.Tensor) -> LayerScales:
    """With a zero point in the middle of a channel's range, so that no code is wasted on numbers that do not occur."""
    k_scale, v_scale = ((high - low) / 2).clamp(min=1e-6) / INT8_MAX
    k_zero, v_zero = (low + high) / 2
    return LayerScales(k_scale=k_scale, v_scale=v_scale, k_zero=k_zero, v_zero=v_zero)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=TINY_MODEL, help="hub id or directory")
    parser.add_argument("--quick", action="store_true", help="less text: numbers are rough")
    args = parser.parse_args()
    calibration_windows, held_out_windows = (3, 1) if args.quick else (8, 4)

    model, tokenizer = load(args.model)
    model.set_attn_implementation("sdpa")
    QuantizedPagedCache.from_model(model)  # compressed-tensors stops rounding keys and values, so that ranges are exact
    ranges = channel_ranges(model, windows(tokenizer, calibration_text(), calibration_windows, model.device))
    texts = windows(tokenizer, held_out_text(), held_out_windows, model.device)
    exact = read_text(model, texts, lambda: DynamicCache(config=model.config))

    model.set_attn_implementation("kvquant")
    rows = [("DynamicCache", "-", f"{exact.perplexity:.4f}", f"{1:.2%}", "-")]
    for name, measured in (("fp8", fp8_scales), ("int8", int8_scales)):
        own = [measured(low=each[:, 0], high=each[:, 1]) for each in ranges]
        for source, scales in (("dynamic", "dynamic"), ("own, per channel", own)):
            reading = read_text(
                model,
                texts,
                lambda name=name, scales=scales: QuantizedPagedCache.from_model(
                    model, kv_cache_dtype=name, scales=scales
                ),
            )
            layers = reading.cache.report().layers
            clipped = sum(sum(layer.clipped) for layer in layers)
            agreement = f"{reading.agreement(exact):.2%}"
            rows.append((name, source, f"{reading.perplexity:.4f}", agreement, f"{clipped:,}"))
    print_table(("cache", "scales", "perplexity", "same greedy token", "clipped"), rows)
    numbers = sum(layer.keys.numel() + layer.values.numel() for layer in exact.cache.layers)
    print(
        f"{texts.numel():,} tokens of held-out text; clipped: keys and values beyond the calibrated range in the last "
        f"window, of {numbers:,}"
    )


if __name__ == "__main__":
    main()
