"""Which module feeds each layer of a cache, and with how many heads: told from the modules, held to what a run does."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, KEPT_BY_HOST, MORE_FAMILIES, available, build
from helpers import prompt
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedModel,
    WhisperForConditionalGeneration,
)
from transformers.cache_utils import EncoderDecoderCache

from hf_kvquant import calibrate, read_scales
from hf_kvquant.doctor import diagnose
from hf_kvquant.hosts.conventions import with_cache
from hf_kvquant.hosts.files import model_layers
from hf_kvquant.interface import adds_masks, uses_attention_interface

# Models that run one module for several layers; it carries the number of one of them, or of none.
SHARED_MODULES = {"dory", "hrm_text", "inkling2_loop_text", "zamba", "zamba2"}
# Wrapped attention, encoders whose layers count from 0 too, cross-attention, vision towers, latents, an output layer
# called decoder, and heads that differ between layers come first; the rest is slow.
_TOLD_APART = [
    "bart", "dbrx", "deepseek_v3", "gemma3", "gemma4_text", "gpt_neo", "inkling_text", "led", "llama", "mllama",
    "modernbert-decoder", "qwen3_next", "t5", "t5gemma", "whisper", "gemma4", "jetmoe", "kimi_linear",
]  # fmt: skip
_ALL = {*FAMILIES, *MORE_FAMILIES} - SHARED_MODULES - KEPT_BY_HOST - {"switch_transformers"}
TYPES = [
    *available(_TOLD_APART),
    *(pytest.param(name, marks=pytest.mark.slow) for name in available(sorted(_ALL - {*_TOLD_APART}))),
]


class WatchingCache(DynamicCache):
    """Remembers which module updates each layer, and with how many heads."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.fed: dict[int, tuple[torch.nn.Module, int]] = {}

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        frame = sys._getframe(1)
        while not isinstance(frame.f_locals.get("self"), torch.nn.Module):
            assert frame.f_back is not None
            frame = frame.f_back
        self.fed.setdefault(layer_idx, (frame.f_locals["self"], keys.shape[1]))
        return super().update(keys, values, layer_idx, *args, **kwargs)


def _fed(model: PreTrainedModel) -> dict[int, tuple[torch.nn.Module, int]]:
    config = model.config.get_text_config(decoder=True)
    cache, tokens = WatchingCache(config), torch.full((1, 5), 11)
    inputs: dict[str, Any] = {"input_ids": tokens, **with_cache(cache)}
    if model.config.is_encoder_decoder:
        inputs = {"input_ids": tokens, "decoder_input_ids": tokens}
        inputs |= with_cache(EncoderDecoderCache(cache, DynamicCache(config=config)))
        if isinstance(model, WhisperForConditionalGeneration):
            inputs["input_features"] = torch.zeros(1, model.config.num_mel_bins, 256)
            del inputs["input_ids"]
    with torch.no_grad():
        model(**inputs)
    return cache.fed


@pytest.mark.parametrize("model_type", TYPES)
def test_each_layer_has_the_module_that_feeds_it(model_type: str) -> None:
    model = build(model_type)
    layers, fed = model_layers(model), _fed(model)
    assert fed
    names = {module: path for path, module in model.named_modules()}
    assert {index: paths[0] for index, paths in enumerate(layers.paths) if paths} == {
        index: names[module] for index, (module, _) in fed.items()
    }
    for index, (_, num_heads) in fed.items():
        assert layers.num_kv_heads[index] in (num_heads, None)
        is_latent = num_heads == 1 and model.config.get_text_config(decoder=True).num_key_value_heads != 1
        assert (layers.num_kv_heads[index] is None) == is_latent


@pytest.mark.parametrize("model_type", available(["gemma4_text"]))
def test_numbers_that_differ_between_layers(model_type: str, tmp_path: Path) -> None:
    """Configurations of such models refuse to be asked for one number."""
    overrides = FAMILIES[model_type] | {"num_global_key_value_heads": 1, "attention_k_eq_v": True}
    build(model_type, overrides).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="kvquant")
    options = {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(prompt(), cache_implementation="dynamic", **options)
    assert torch.equal(model.generate(prompt(), cache_config={"kv_cache_dtype": "model"}, **options), expected)
    assert list(model_layers(model).num_kv_heads[:2]) == [2, 1]
    scales = calibrate(model, prompt(), granularity="head", progress=False)
    assert [len(layer.k_scale) for layer in scales if layer is not None] == [2, 1]
    assert read_scales(model) is None
    assert len(diagnose(tmp_path).layers) == 2


@pytest.mark.parametrize(
    ("model_type", "takes_ours", "adds"),
    [
        ("llama", True, False),
        ("gemma4_text", True, False),  # speaks of another cache in a comment
        ("mimi", True, False),  # has a cache that pads convolutions
        ("t5", True, False),
        ("bigbird_pegasus", True, True),  # its encoder computes attention itself
        ("bloom", False, True),
        ("trocr", False, True),
    ],
)
def test_whose_attention_runs_is_in_the_source(model_type: str, takes_ours: bool, adds: bool) -> None:
    config = CONFIG_MAPPING[model_type]()
    assert (uses_attention_interface(config), adds_masks(config)) == (takes_ours, adds)


def test_a_model_that_transformers_names_and_does_not_export() -> None:
    """Its mapping raises then; the model is taken to follow its configuration, as remote code is."""
    assert uses_attention_interface(CONFIG_MAPPING["voxtral_realtime_text"]())
