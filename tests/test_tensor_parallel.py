"""Heads that two processes share (tensor parallelism): the logits, scales and notes of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import prompt
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM
from transformers.distributed import DistributedConfig
from two_processes import in_two_processes

from hf_kvquant import LayerScales, QuantizedPagedCache, calibrate, write_scales
from hf_kvquant.hosts.conventions import with_cache

KINDS = {
    "tensor": {"granularity": "tensor"},
    "head": {"granularity": "head", "q_scale": True},
    "channel": {"granularity": "channel"},
    "zeros": {"granularity": "channel", "symmetric": False, "kv_cache_dtype": "int8"},
    "mse": {"granularity": "head", "estimator": "mse"},
    "percentile": {"granularity": "head", "estimator": "percentile"},
}


def save_model(directory: Path) -> None:
    """Heads of different sizes, biases, and in one layer a key bias too large for fp8."""
    torch.manual_seed(0)
    sizes: dict[str, int] = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16, "num_hidden_layers": 2}
    model = Qwen2ForCausalLM(
        Qwen2Config(**sizes, vocab_size=100, hidden_size=128, intermediate_size=64, tie_word_embeddings=False)
    )
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            for side in (attention.q_proj, attention.k_proj, attention.v_proj):
                side.weight.normal_(std=0.2)
                side.weight.unflatten(0, (-1, 16)).mul_(torch.linspace(0.5, 2, len(side.weight) // 16)[:, None, None])
        model.model.layers[1].self_attn.k_proj.bias[-3] = 50.0
    model.save_pretrained(directory)


def calibrated(model: PreTrainedModel, kind: str) -> list[dict[str, Any]]:
    scales = calibrate(model, prompt(4, 30, seed=5), progress=False, **KINDS[kind])
    return [layer.to_dict() for layer in scales if layer is not None]


def everything(directory: Path, written: dict[str, list[dict[str, Any]]], **loading: Any) -> dict[str, Any]:
    """Scales of every kind, and logits and notes of caches over these and other ones.

    Args:
        written: scales of each kind to generate with.
    """
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="kvquant", **loading)
    given = {kind: [LayerScales.from_dict(layer) for layer in layers] for kind, layers in written.items()}
    caches: dict[str, dict[str, Any]] = {
        "checkpoint": {},
        "dynamic": {"scales": "dynamic", "kv_cache_dtype": "int8"},
        "rounded queries": {"kv_cache_dtype": "fp8", "q_dtype": "fp8", "scales": given["head"]},
        "fixed": {"max_cache_len": 64, "scales": given["head"], "kv_cache_dtype": "fp8"},
        **{kind: {"kv_cache_dtype": KINDS[kind].get("kv_cache_dtype", "fp8"), "scales": given[kind]} for kind in given},
    }
    found: dict[str, Any] = {kind: calibrated(model, kind) for kind in KINDS}
    for name, options in caches.items():
        cache = QuantizedPagedCache.from_model(model, **options)
        with torch.no_grad():
            parts = [model(part, **with_cache(cache)).logits for part in prompt(2, 30).split([26, 1, 1, 2], dim=1)]
        found[f"logits: {name}"] = torch.cat(parts[1:], dim=1)
        found[f"notes: {name}"] = cache.report().notes
    cache = QuantizedPagedCache.from_model(model, scales=LayerScales(torch.ones(3), torch.ones(3)))
    with torch.no_grad(), pytest.raises(ValueError, match="k_scale has shape") as refused:
        model(prompt(), **with_cache(cache))
    return {**found, "refused": str(refused.value)}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Of one process, and of each of two."""
    directory = tmp_path_factory.mktemp("model")
    save_model(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    write_scales(
        calibrate(model, prompt(4, 30, seed=5), granularity="head", progress=False), directory, layout="sidecar"
    )
    written = {kind: calibrated(model, kind) for kind in KINDS}
    return everything(directory, written), in_two_processes(_shared, directory, written)


def _shared(directory: Path, written: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    return everything(directory, written, distributed_config=DistributedConfig(tp_size=2))


@pytest.mark.parametrize("kind", KINDS)
def test_calibration_sees_all_heads(results: Any, kind: str) -> None:
    alone, shared = results
    for found in shared:
        for layer, expected in zip(found[kind], alone[kind], strict=True):
            assert layer.keys() == expected.keys()
            for name in layer:
                torch.testing.assert_close(torch.tensor(layer[name]), torch.tensor(expected[name]))


def test_caches_give_the_same_logits(results: Any) -> None:
    """But for sums in another order, by which single numbers may get the next code."""
    alone, shared = results
    names = [name for name in alone if name.startswith("logits")]
    assert len(names) == 4 + len(KINDS)
    for name in names:
        for found in shared:
            torch.testing.assert_close(found[name], alone[name], rtol=0, atol=0.02 * float(alone[name].std()))


def test_large_key_biases_are_seen_by_all(results: Any) -> None:
    alone, shared = results
    names = [name for name in alone if name.startswith("notes")]
    assert any("layer 1" in note for note in alone["notes: checkpoint"])
    assert [[found[name] for name in names] for found in shared] == [[alone[name] for name in names]] * 2


def test_scales_of_another_model_are_refused_with_whose_heads_they_do_not_fit(results: Any) -> None:
    alone, shared = results
    assert "layer 0: k_scale has shape [3], but this model needs [1] (per tensor), [4]" in alone["refused"]
    for rank, found in enumerate(shared):
        assert f"layer 0, the heads of process {rank} of 2: k_scale has shape [3]" in found["refused"]
