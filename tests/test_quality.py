"""What 8-bit storage costs the trained model and its outlier twins, in perplexity on text it has not seen."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Cache, DynamicCache, LlamaForCausalLM

from benchmarks.twins import TWINS
from hf_kvquant import LayerScales, QuantizedPagedCache

EXAMPLES = Path(__file__).parents[1] / "examples"
WINDOW = 1024
# As a chat arrives: a few tokens first, then more and more over what is stored.
CHUNKS = (8, 24, 32, 64, 128, 256, 512)
NUM_WINDOWS = 12
# Perplexity may change by at most this much, in percent.
BOUNDS = {"int8 dynamic": 0.05, "fp8 dynamic": 0.2, "fp8 per tensor": 0.3, "int8 per channel": 0.1}


@cache
def tokens(source: str) -> torch.Tensor:
    sys.path.insert(0, str(EXAMPLES))
    import stdlib_text

    text = getattr(stdlib_text, source)()
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLES / "tiny-python-lm")
    tokenizer.model_max_length = sys.maxsize
    return tokenizer(text, return_tensors="pt").input_ids[0]


@cache
def trained_model() -> LlamaForCausalLM:
    path = EXAMPLES / "tiny-python-lm"
    config = AutoConfig.from_pretrained(path)
    del config.quantization_config  # full precision to compare with: nothing rounds K and V on their way
    return AutoModelForCausalLM.from_pretrained(
        path, config=config, dtype=torch.float32, attn_implementation="kvquant"
    ).eval()


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, make_cache: Callable[[], Cache]) -> float:
    windows = tokens("held_out_text")[: NUM_WINDOWS * WINDOW].view(-1, WINDOW)
    total = 0.0
    for batch in windows.split(4):
        cache_, logits, start = make_cache(), [], 0
        for size in CHUNKS:
            logits.append(model(batch[:, start : start + size], past_key_values=cache_).logits)
            start += size
        predicted = torch.cat(logits, dim=1)[:, :-1].flatten(0, 1)
        total += torch.nn.functional.cross_entropy(predicted, batch[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / (NUM_WINDOWS * (WINDOW - 1)))


@torch.no_grad()
def calibrated(model: LlamaForCausalLM, qmax: float, granularity: str) -> list[LayerScales]:
    """Scales from the absolute maxima over other text."""
    windows = tokens("calibration_text")[: 16 * WINDOW].view(-1, WINDOW)
    largest: list[list[torch.Tensor]] = []
    for batch in windows.split(4):
        dense = DynamicCache(config=model.config)
        model(batch, past_key_values=dense)
        seen = [[x.abs().amax(dim=(0, 2)) for x in (layer.keys, layer.values)] for layer in dense.layers]
        largest = seen if not largest else [
            [torch.maximum(*pair) for pair in zip(*layers, strict=True)] for layers in zip(largest, seen, strict=True)
        ]  # fmt: skip
    if granularity == "tensor":
        largest = [[x.amax().reshape(1) for x in layer] for layer in largest]
    return [LayerScales(k_scale=k / qmax, v_scale=v / qmax) for k, v in largest]


@pytest.mark.parametrize("twin", TWINS)
def test_perplexity_stays(twin: str) -> None:
    model = TWINS[twin](trained_model())
    dense = perplexity(model, lambda: DynamicCache(config=model.config))
    options = {
        "int8 dynamic": {"kv_cache_dtype": "int8", "scales": "dynamic"},
        "fp8 dynamic": {"kv_cache_dtype": "fp8", "scales": "dynamic"},
        "fp8 per tensor": {"kv_cache_dtype": "fp8", "scales": calibrated(model, 448, "tensor")},
        "int8 per channel": {"kv_cache_dtype": "int8", "scales": calibrated(model, 127, "channel")},
    }
    changes = {
        name: 100 * (perplexity(model, lambda given=given: QuantizedPagedCache.from_model(model, **given)) / dense - 1)
        for name, given in options.items()
    }
    print(f"{twin}: perplexity {dense:.3f};", ", ".join(f"{name} {change:+.4f} %" for name, change in changes.items()))
    assert {name: change for name, change in changes.items() if abs(change) > BOUNDS[name]} == {}


def test_unquantized_pages_change_nothing() -> None:
    model = trained_model()
    dense = perplexity(model, lambda: DynamicCache(config=model.config))
    paged = perplexity(model, lambda: QuantizedPagedCache.from_model(model, kv_cache_dtype="model"))
    assert paged == pytest.approx(dense, rel=1e-6)


def test_twins_compute_the_same_function() -> None:
    model = trained_model()
    dense = {name: perplexity(make(model), lambda: DynamicCache(config=model.config)) for name, make in TWINS.items()}
    assert all(value == pytest.approx(dense["plain"], rel=1e-5) for value in dense.values()), dense


def test_equalizing_is_what_saves_int8_from_outliers() -> None:
    """The key-pair twin breaks plain dynamic int8: the bounds above can fail."""
    model = TWINS["key_pair"](trained_model())
    dense = perplexity(model, lambda: DynamicCache(config=model.config))
    plain = perplexity(model, lambda: QuantizedPagedCache.from_model(model, kv_cache_dtype="int8", equalize=False))
    assert plain / dense - 1 > 10 * BOUNDS["int8 dynamic"] / 100
