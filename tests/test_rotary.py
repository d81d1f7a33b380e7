"""Which channels of a key turn into each other, against what models really do."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from helpers import tiny_llama
from transformers import DynamicCache
from transformers.models.glm.modeling_glm import GlmAttention
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as turned_by_neighbours
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

from hf_kvquant import QuantizedPagedCache

HALF = ["llama", "qwen3", "gemma3_text", "gemma4", "phi", "gpt_neox", "stablelm", "nanochat", "gpt_oss", "glm4v_moe"]
HALF += ["modernbert-decoder"]  # what it calls its decoder is its head
# Those with images have a vision tower in the same file that turns the other way.
INTERLEAVED = ["cohere", "glm4", "gptj", "llama4_text", "roformer", "glm4v", "glm_ocr", "ernie4_5_vl_moe"]
UNKNOWN = ["deepseek_v3", "deepseek_v4"]
NONE = ["gpt2", "opt", "bloom", "kimi_linear"]

MROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
GLM = {
    "text_config": {"rope_parameters": MROPE},
    "vision_config": {"depth": 1, "num_heads": 4, "out_hidden_size": 64, "hidden_size": 64},
}
ERNIE = {
    "text_config": {
        "rope_parameters": MROPE | {"partial_rotary_factor": 1.0, "mrope_section": [3, 3, 2]},
        "moe_intermediate_size": [32, 32],
    },
    "vision_config": {"depth": 1, "num_heads": 4, "hidden_size": 64},
}
WITH_IMAGES = {"glm4v": GLM, "glm_ocr": GLM, "glm4v_moe": GLM, "ernie4_5_vl_moe": ERNIE}


def layouts(model_type: str) -> tuple[torch.nn.Module, list]:
    model = families.build(model_type, WITH_IMAGES.get(model_type))
    return model, list(QuantizedPagedCache.from_model(model).shared.rotary)


@pytest.mark.parametrize("model_type", families.available(HALF + INTERLEAVED))
def test_partners_share_what_a_rotation_moves(model_type: str) -> None:
    """The same token at every position has keys in the first layer that differ by rotation only."""
    model, rotary = layouts(model_type)
    assert {layout.kind for layout in rotary} == {"half" if model_type in HALF else "interleaved"}
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    with torch.no_grad():
        model(torch.full((1, 7), 11), past_key_values=cache)
    energy = cache.layers[0].keys.double() ** 2  # [1, H, T, D]
    partners = rotary[0].partners(energy.shape[-1])
    of_pairs = energy + energy[..., partners]
    together, alone = ((x.amax(dim=2) - x.amin(dim=2)).amax() / x.amax() for x in (of_pairs, energy))
    assert together < 1e-4
    assert alone > 1e-2


@pytest.mark.parametrize("model_type", families.available(UNKNOWN))
def test_what_is_not_known_is_not_guessed(model_type: str) -> None:
    _, rotary = layouts(model_type)
    assert {layout.kind for layout in rotary} == {"unknown"}
    assert rotary[0].partners(16) is None


def turned_ahead(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """No pairs: every channel comes to hold something of the one before."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return tuple(x * cos + x.roll(1, dims=-1) * sin for x in (q, k))


def turned_at_the_end(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Pairs, but not among the first channels."""
    first, last = x[..., : -cos.shape[-1]], x[..., -cos.shape[-1] :]
    return torch.cat([first, apply_rotary_pos_emb(last, last, cos, sin)[0]], dim=-1)


class AheadAttention(LlamaAttention):
    def forward(self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        return turned_ahead(q, k, cos, sin)


class AtTheEndAttention(LlamaAttention):
    def forward(self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        return turned_at_the_end(q, cos, sin), turned_at_the_end(k, cos, sin)


class EitherAttention(LlamaAttention):
    def forward(self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        turn = apply_rotary_pos_emb if self.layer_idx else turned_by_neighbours
        return turn(q, k, cos, sin)


class OpaqueAttention(LlamaAttention):
    def forward(self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        return self.turn(q, k, cos, sin)


@pytest.mark.parametrize("attention", [AheadAttention, AtTheEndAttention, EitherAttention, OpaqueAttention])
def test_other_ways_are_not_taken_for_one_that_is_known(attention: type) -> None:
    model = tiny_llama()
    for layer in model.model.layers:
        layer.self_attn.__class__ = attention
    assert {layout.kind for layout in QuantizedPagedCache.from_model(model).shared.rotary} == {"unknown"}


def test_what_is_beside_the_decoder_has_no_say() -> None:
    model = tiny_llama()
    model.tower = GlmAttention(model.config, layer_idx=0)
    assert {layout.kind for layout in QuantizedPagedCache.from_model(model).shared.rotary} == {"half"}


@pytest.mark.parametrize("model_type", families.available(NONE))
def test_models_without_rotation(model_type: str) -> None:
    _, rotary = layouts(model_type)
    assert {layout.kind for layout in rotary} == {"none"}


def test_layers_of_one_kind_are_searched_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call of `generate` pays for it: with a search per layer it took 50 ms for 30 of them."""
    searches, modules = [], torch.nn.Module.modules
    monkeypatch.setattr(torch.nn.Module, "modules", lambda self: searches.append(self) or modules(self))
    counts = []
    for num_layers in (1, 7):
        model = tiny_llama(num_hidden_layers=num_layers)
        searches.clear()
        assert len(QuantizedPagedCache.from_model(model).shared.rotary) == num_layers
        counts.append(len(searches))
    assert counts[0] == counts[1] > 0
