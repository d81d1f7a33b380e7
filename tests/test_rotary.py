"""Which channels of a key turn into each other, against what models really do."""

from __future__ import annotations

import families
import pytest
import torch
from helpers import tiny_llama
from transformers import DynamicCache

from hf_kvquant import QuantizedPagedCache

HALF = ["llama", "qwen3", "gemma3_text", "phi", "gpt_neox", "stablelm", "nanochat"]
INTERLEAVED = ["cohere", "glm4", "gptj"]
UNKNOWN = ["deepseek_v3", "llama4_text"]
NONE = ["gpt2", "opt", "bloom"]


def layouts(model_type: str) -> tuple[torch.nn.Module, list]:
    model = families.build(model_type)
    return model, list(QuantizedPagedCache.from_model(model).shared.rotary)


@pytest.mark.parametrize("model_type", HALF + INTERLEAVED)
def test_partners_share_what_a_rotation_moves(model_type: str) -> None:
    """The same token at every position has keys in the first layer that differ by rotation only."""
    model, rotary = layouts(model_type)
    assert {layout.kind for layout in rotary} == {"half" if model_type in HALF else "interleaved"}
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.full((1, 7), 11), past_key_values=cache)
    energy = cache.layers[0].keys.double() ** 2  # [1, H, T, D]
    partners = rotary[0].partners(energy.shape[-1])
    of_pairs = energy + energy[..., partners]
    together, alone = ((x.amax(dim=2) - x.amin(dim=2)).amax() / x.amax() for x in (of_pairs, energy))
    assert together < 1e-4
    assert alone > 1e-2


@pytest.mark.parametrize("model_type", UNKNOWN)
def test_what_is_not_known_is_not_guessed(model_type: str) -> None:
    _, rotary = layouts(model_type)
    assert {layout.kind for layout in rotary} == {"unknown"}
    assert rotary[0].partners(16) is None


@pytest.mark.parametrize("model_type", NONE)
def test_models_without_rotation(model_type: str) -> None:
    _, rotary = layouts(model_type)
    assert {layout.kind for layout in rotary} == {"none"}


def test_layers_of_one_kind_are_searched_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call of `generate` pays for it: with a search a layer it took 50 ms for 30 of them."""
    searches, modules = [], torch.nn.Module.modules
    monkeypatch.setattr(torch.nn.Module, "modules", lambda self: searches.append(self) or modules(self))
    counts = []
    for num_layers in (1, 7):
        model = tiny_llama(num_hidden_layers=num_layers)
        searches.clear()
        assert len(QuantizedPagedCache.from_model(model).shared.rotary) == num_layers
        counts.append(len(searches))
    assert counts[0] == counts[1] > 0
