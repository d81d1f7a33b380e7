"""On a GPU: whole models, eager and compiled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import families
import pytest
import torch
from helpers import llama_config, prompt, tiny_llama
from test_cache import sliding_model
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedModel

from hf_kvquant import QuantizedPagedCache

pytestmark = pytest.mark.gpu

# Grouped heads, windows, softcap, sinks, latent attention, shared keys and values, linear attention, ALiBi, an
# attention of its own, encoder-decoders.
FAMILIES = ["llama", "qwen3", "mistral", "gemma2", "gemma3_text", "gpt_oss", "deepseek_v3", "qwen3_next",
            "gemma3n_text", "mpt", "falcon_h1", "phi3", "bart", "t5"]  # fmt: skip
FORMATS = ["fp8", "int8", "model"]


def generate(model: PreTrainedModel, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    return model.generate(ids, attention_mask=mask, do_sample=False, no_repeat_ngram_size=2, **options)


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("model_type", families.available(FAMILIES))
def test_lossless_twin(model_type: str, num_beams: int) -> None:
    """With unquantized pages in fp32, the tokens of DynamicCache."""
    ids = prompt(3, 13, vocab_size=90).cuda()
    options = {"max_new_tokens": 20, "num_beams": num_beams, "disable_compile": True}
    expected = generate(families.build(model_type).cuda(), ids, cache_implementation="dynamic", **options)
    model = families.build(model_type, attn_implementation="kvquant").cuda()
    config = {"kv_cache_dtype": "model", "page_size": 4}
    assert torch.equal(generate(model, ids, cache_config=config, **options), expected)
    config["max_cache_len"] = 64
    assert torch.equal(generate(model, ids, cache_config=config, **options), expected)


def model_of(head_dim: int) -> LlamaForCausalLM:
    """Two layers with heads of a usual size, four queries each."""
    torch.manual_seed(0)
    config = llama_config(hidden_size=256, head_dim=head_dim, num_attention_heads=8, num_key_value_heads=2)
    model = LlamaForCausalLM(config).eval()
    model.set_attn_implementation("kvquant")
    return model


MODELS = {
    "head_dim_16": lambda: tiny_llama("kvquant"),
    "head_dim_64": lambda: model_of(64),
    "head_dim_128": lambda: model_of(128),
    "sliding": lambda: sliding_model(window=12),
}


@pytest.mark.parametrize("kv_cache_dtype", FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_the_gpu_gives_the_tokens_of_the_cpu(name: str, kv_cache_dtype: str) -> None:
    """Kernels against the reference, in fp32."""
    model, ids = MODELS[name](), prompt(2, 21)
    options = {"max_new_tokens": 24, "disable_compile": True, "cache_config": {"kv_cache_dtype": kv_cache_dtype}}
    expected = generate(model, ids, **options)
    assert torch.equal(generate(model.cuda(), ids.cuda(), **options).cpu(), expected)


@pytest.mark.parametrize("kv_cache_dtype", FORMATS)
@pytest.mark.parametrize("name", ["head_dim_64", "sliding"])
def test_compiled_equals_eager(name: str, kv_cache_dtype: str) -> None:
    """`generate` as it runs on a GPU, compiled into CUDA graphs, and as it runs without."""
    model = MODELS[name]().cuda()
    options = {"max_new_tokens": 24, "cache_config": {"kv_cache_dtype": kv_cache_dtype}}
    for ids in (prompt(2, 21).cuda(), prompt(2, 21, seed=2).cuda()):
        expected = generate(model, ids, disable_compile=True, **options)
        assert torch.equal(generate(model, ids, **options), expected)
    assert model.__dict__.get("_compiled_call") is not None, "generate did not compile"


@pytest.mark.parametrize("name", ["head_dim_64", "sliding"])
def test_tokens_in_the_models_dtype(name: str) -> None:
    """Attention in two parts: eager as on a CPU, and compiled as eager."""
    model, ids = MODELS[name](), prompt(2, 21)
    config = {"kv_cache_dtype": "fp8", "scales": "unit", "sink_tokens": 3, "recent_tokens": 6, "page_size": 4}
    options = {"max_new_tokens": 24, "cache_config": config}
    expected = generate(model, ids, disable_compile=True, **options)
    model, ids = model.cuda(), ids.cuda()
    assert torch.equal(generate(model, ids, disable_compile=True, **options).cpu(), expected)
    assert torch.equal(generate(model, ids, **options).cpu(), expected)


@contextmanager
def no_synchronization() -> Iterator[None]:
    """The host may not wait for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("fixed", [False, True], ids=["growing", "fixed"])
@pytest.mark.parametrize("kv_cache_dtype", FORMATS)
def test_a_decode_step_does_not_wait(kv_cache_dtype: str, fixed: bool) -> None:
    model = model_of(64).to("cuda", torch.bfloat16)
    cache = QuantizedPagedCache.from_model(model, kv_cache_dtype=kv_cache_dtype, max_cache_len=64 if fixed else None)
    ids = prompt(2, 40).cuda()
    with torch.no_grad():
        model(ids[:, :15], past_key_values=cache)
        model(ids[:, 15:16], past_key_values=cache)  # compiles
        with no_synchronization():
            for index in range(16, 40):
                model(ids[:, index : index + 1], past_key_values=cache)
        with pytest.raises(RuntimeError, match="synchroniz"), no_synchronization():
            ids.sum().item()  # the mode sees it


def test_chat_turns() -> None:
    """Turns over a stored past: the tokens of DynamicCache."""
    model = model_of(128).cuda()
    tokens = []
    for cache in (
        QuantizedPagedCache.from_model(model, kv_cache_dtype="model"),
        QuantizedPagedCache.from_model(model, kv_cache_dtype="model", max_cache_len=400),
        DynamicCache(config=model.config),
    ):
        model.set_attn_implementation("sdpa" if type(cache) is DynamicCache else "kvquant")
        conversation = prompt(2, 33).cuda()
        for turn in range(3):
            conversation = torch.cat([conversation, prompt(2, 70, seed=turn).cuda()], dim=1)
            conversation = model.generate(
                conversation, past_key_values=cache, max_new_tokens=12, do_sample=False, disable_compile=True
            )
        tokens.append(conversation)
    assert torch.equal(tokens[0], tokens[2])
    assert torch.equal(tokens[1], tokens[2])
