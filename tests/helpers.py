"""Tiny models, and what several test modules need to know about the package's bytes."""

from __future__ import annotations

import bisect
import functools
import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


def llama_config(**overrides: Any) -> LlamaConfig:
    """Two layers, four query heads, two key/value heads of 16 channels."""
    options: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 99,
        "max_position_embeddings": 512,
        # Attention has something to look at only when weights are not near zero.
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**{**options, **overrides})


def tiny_llama(
    attn_implementation: str = "kvquant", dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any
) -> LlamaForCausalLM:
    """A random Llama in evaluation mode; `overrides` are fields of its configuration (`num_key_value_heads`, ...)."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(llama_config(**overrides)).to(dtype).eval()
    model.set_attn_implementation(attn_implementation)
    return model


def prompt(batch_size: int = 2, length: int = 21, vocab_size: int = 99, seed: int = 1) -> torch.Tensor:
    """Token ids `[B, L]` without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab_size, (batch_size, length), generator=generator)


def pages_in_use(pool: Any) -> int:
    """Distinct pages that the sequences of all its tables refer to."""
    return int((pool.references() > 0).sum())


@functools.cache
def _rounds_inside_models() -> bool:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    scheme = quantization.QuantizationArgs(num_bits=8, type="float", strategy="tensor")
    model = tiny_llama("sdpa")
    quantization.apply_quantization_config(
        model, quantization.QuantizationConfig(config_groups={}, kv_cache_scheme=scheme)
    )
    return hasattr(model.model.layers[0].self_attn, "kv_cache")


def need_fake_quantization() -> None:
    """Skip where no compressed-tensors is installed that knows the installed transformers.

    It recognizes attention by the name of an argument, and 0.20.1 does not in transformers 5.24: it then neither reads
    scales into the model nor rounds K and V inside it.
    """
    if not _rounds_inside_models():
        pytest.skip("the installed compressed-tensors does not know the installed transformers' attention")


# -- formats, written down a second time ---------------------------------------------------------------------------

FP8_LAYOUT = {"fp8_e4m3": (4, 3, 7), "fp8_e5m2": (5, 2, 15)}  # exponent bits, mantissa bits, bias
QMAX = {"fp8_e4m3": 448.0, "fp8_e5m2": 57344.0, "int8": 127.0}
LARGEST_CODE = {"fp8_e4m3": 0x7E, "fp8_e5m2": 0x7B}
NAN_BYTE = {"fp8_e4m3": 0x7F, "fp8_e5m2": 0x7F, "int8": 0}
QUANTIZED = tuple(QMAX)


def code_value(name: str, code: int) -> float:
    """The number that a byte stands for, from the layout of its bits."""
    if name == "int8":
        return float(code - 128)
    exponent_bits, mantissa_bits, bias = FP8_LAYOUT[name]
    sign = -1.0 if code & 0x80 else 1.0
    exponent = (code & 0x7F) >> mantissa_bits
    mantissa = (code & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    if (code & 0x7F) > LARGEST_CODE[name]:
        # e4m3 has NaN only; e5m2 has infinity where the mantissa is zero.
        return sign * math.inf if name == "fp8_e5m2" and mantissa == 0 else math.nan
    if exponent == 0:
        return sign * math.ldexp(mantissa, 1 - bias)
    return sign * math.ldexp(1 + mantissa, exponent - bias)


@functools.cache
def positive_values(name: str) -> list[float]:
    """Values of the fp8 codes 0, 1, 2, ... up to the largest finite one; they increase."""
    return [code_value(name, code) for code in range(LARGEST_CODE[name] + 1)]


def nearest_code(name: str, x: float) -> int:
    """The byte for x in code units: saturated, then round to nearest with ties to the even code."""
    if math.isnan(x):
        return NAN_BYTE[name]
    if name == "int8":
        return round(max(-127.0, min(127.0, x))) + 128  # Python rounds ties to even
    magnitude = min(abs(x), QMAX[name])
    values = positive_values(name)
    above = bisect.bisect_left(values, magnitude)
    code = above
    if values[above] != magnitude:
        below = above - 1
        to_below, to_above = magnitude - values[below], values[above] - magnitude
        code = below if to_below < to_above or (to_below == to_above and below % 2 == 0) else above
    return code | (0x80 if math.copysign(1.0, x) < 0 else 0)
