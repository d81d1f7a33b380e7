"""Whatever `torch.set_default_device` says, bookkeeping stays on the CPU and pages go where the model is.

`meta` stands for a device that nothing else is on: numbers that went there would be lost.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import prompt, tiny_llama
from transformers import AutoTokenizer, PreTrainedModel

import hf_kvquant
from hf_kvquant import LayerScales, PrefixCache, QuantizedPagedCache
from hf_kvquant.calibration import calibrate
from hf_kvquant.evaluation.benchmark import bench

TOKENIZER = Path(__file__).parents[1] / "examples" / "tiny-python-lm"


def _generated(**options: Any) -> Callable[[PreTrainedModel, torch.Tensor, Path], torch.Tensor]:
    def run(model: PreTrainedModel, ids: torch.Tensor, path: Path) -> torch.Tensor:
        return model.generate(ids, max_new_tokens=6, do_sample=False, **options)

    return run


def _sessions(model: PreTrainedModel, ids: torch.Tensor, path: Path) -> torch.Tensor:
    cache = QuantizedPagedCache.from_model(model, kv_cache_dtype="fp8", scales="unit")
    ids = model.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False)
    cache.save_pretrained(path)
    cache = QuantizedPagedCache.from_pretrained(path, model)
    cache.crop(-1)
    cache.batch_select_indices(torch.tensor([1, 0], device="cpu"))
    return model.generate(ids.flip(0), past_key_values=cache.fork(), max_new_tokens=6, do_sample=False)


def _prefixes(model: PreTrainedModel, ids: torch.Tensor, path: Path) -> torch.Tensor:
    prefixes = PrefixCache(model, max_bytes=2**26)
    prefixes.prefill(ids[:1])
    return model.generate(ids[:1], past_key_values=prefixes.cache_for(ids[:1]), max_new_tokens=6, do_sample=False)


def _scales_that_were_saved(model: PreTrainedModel, ids: torch.Tensor, path: Path) -> torch.Tensor:
    model.save_pretrained(path)
    layers = [LayerScales([0.02, 0.03], 0.01) for _ in range(model.config.num_hidden_layers)]
    hf_kvquant.write_scales(_Scales(layers), path, model=model, layout="sidecar")
    cache = QuantizedPagedCache.from_model(model, kv_cache_dtype="fp8", scales=path)
    return model.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False)


class _Scales:
    kv_cache_dtype = "fp8_e4m3"

    def __init__(self, layers: list[LayerScales]) -> None:
        self.layers = layers


USES = {
    "int8": _generated(),
    "fp8": _generated(cache_config={"kv_cache_dtype": "fp8", "recent_tokens": 4}),
    "fixed": _generated(cache_config={"max_cache_len": 40}),
    "lookup": _generated(prompt_lookup_num_tokens=3),
    "sessions": _sessions,
    "prefixes": _prefixes,
    "saved scales": _scales_that_were_saved,
}


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_generating(use: Callable[..., torch.Tensor], tmp_path: Path) -> None:
    ids, outputs = prompt(), []
    for device in ("cpu", "meta"):
        model = tiny_llama()
        model.generation_config.pad_token_id = model.generation_config.eos_token_id = None
        if use is USES["lookup"]:
            ids = ids[:1]
        with torch.device(device):
            outputs.append(use(model, ids, tmp_path / device))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("estimator", ["absmax", "percentile", "mse"])
def test_calibrating(estimator: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    model = tiny_llama(vocab_size=len(tokenizer))
    samples = ["import os\nimport sys\n\n\ndef main():\n", [5, 6, 7, 8, 9, 10]]
    results = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            scales = calibrate(model, samples, tokenizer=tokenizer, granularity="channel", estimator=estimator)
        results.append([layer.to_dict() for layer in scales.layers])
    assert results[0] == results[1]


def test_measuring() -> None:
    model = tiny_llama()
    with torch.device("meta"):
        rows = bench(model, contexts=[16], rounds=1, new_tokens=8, formats=["int8"]).rows
    assert [row.cache for row in rows if not row.failed][:2] == ["DynamicCache", "kvquant int8"]
