"""Compiled `generate`: the tokens of the eager run, one graph, no recompilation between steps or calls."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import transformers
from helpers import prompt, tiny_llama
from packaging.version import Version
from test_cache import sliding_model
from torch._dynamo.utils import counters
from transformers import AttentionInterface, AttentionMaskInterface, CompileConfig, PreTrainedModel

from hf_kvquant import OutOfPagesError, QuantizedPagedCache, generation
from hf_kvquant.evaluation.generating import generating_candidates
from hf_kvquant.hosts.conventions import with_cache

MODELS = {"llama": tiny_llama, "sliding": lambda attention: sliding_model(window=12)}


def compile_config(backend: str) -> CompileConfig:
    config = CompileConfig(fullgraph=True, backend=backend, mode="default")
    config._compile_all_devices = True  # the host's switch for compiling on a CPU
    return config


def run(model: PreTrainedModel, ids: torch.Tensor, **options: Any) -> Any:
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=14, do_sample=False, return_dict_in_generate=True, **options
    )


def compile_by_itself(monkeypatch: pytest.MonkeyPatch, has_triton: bool = True) -> None:
    """As `generate` does on a GPU, where Triton is what compiles."""
    monkeypatch.setattr(generation, "COMPILED_DEVICES", ("cpu",))
    monkeypatch.setattr(torch.utils._triton, "has_triton", lambda: has_triton)


def cache_of_generate(model: PreTrainedModel) -> Any:
    model.set_attn_implementation("kvquant")
    caches: list[Any] = []
    model.register_forward_hook(lambda *hooked: caches.append(hooked[2].past_key_values))
    model.generate(prompt(), max_new_tokens=2, do_sample=False)
    return caches[0]


def test_without_triton_a_gpu_compiles_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's compiler raises an error there; nor are fixed addresses what is measured."""
    model = tiny_llama()
    for has_triton in (False, True):
        compile_by_itself(monkeypatch, has_triton)
        assert cache_of_generate(model).is_compileable == has_triton
        names = [each.name for each in generating_candidates(model, ["int8"])]
        assert ("StaticCache" in names) == has_triton


def test_models_that_are_not_for_fixed_addresses_get_pages_that_grow(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nobody asks for fixed ones, as on a GPU; who does is told."""
    compile_by_itself(monkeypatch)
    models = [tiny_llama(), families.build("dbrx")]
    assert [cache_of_generate(model).is_compileable for model in models] == [True, False]
    model = models[1]
    options: dict[str, Any] = {"kv_cache_dtype": "model", "page_size": 4}
    with caplog.at_level("WARNING", logger="transformers"):
        cache = QuantizedPagedCache.from_model(model, **options, max_cache_len=64)
    message = "does not say that DbrxForCausalLM works over a cache at fixed addresses"
    assert message in caplog.text
    assert any(message in note for note in cache.report().notes)


@pytest.mark.parametrize("model_type", families.available(["deepseek_v4"]))
def test_layers_that_transformers_cannot_reserve(model_type: str) -> None:
    with pytest.raises(ValueError, match="max_cache_len=64: transformers .* has no layers at fixed addresses"):
        QuantizedPagedCache.from_model(families.build(model_type), max_cache_len=64)


@pytest.mark.parametrize("attention", ["kvquant", "sdpa"])
def test_layers_that_hold_images_are_not_reserved(attention: str) -> None:
    """They get more tokens than the text has."""
    vision = {
        **{"image_size": 16, "patch_size": 4, "num_hidden_layers": 1, "num_global_layers": 1, "max_num_tiles": 2},
        **{"intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]]},
        **{"vision_output_dim": 128, "hidden_size": 64, "attention_heads": 4},
    }
    text = {"num_hidden_layers": 3, "cross_attention_layers": [1], "vocab_size": 99}
    image_model = families.build("mllama", {"vision_config": vision, "text_config": text, "image_token_index": 98})
    for name, gate in image_model.named_parameters():
        if name.endswith(("cross_attn_attn_gate", "cross_attn_mlp_gate")):
            gate.data.fill_(1.5)
    ids = prompt(2, 9, vocab_size=90)
    ids[:, 1] = 98
    inputs = {
        **{"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(2, 1, 2, 3, 16, 16)},
        **{"aspect_ratio_ids": torch.tensor([[1], [2]]), "aspect_ratio_mask": torch.tensor([[[1, 0]], [[1, 1]]])},
        **{"cross_attention_mask": torch.ones(2, 9, 1, 2).long(), "max_new_tokens": 8, "do_sample": False},
    }
    expected = image_model.generate(**inputs, cache_implementation="dynamic")
    image_model.set_attn_implementation(attention)
    options: dict[str, Any] = {"cache_implementation": "kvquant", "cache_config": {"kv_cache_dtype": "model"}}
    assert torch.equal(image_model.generate(**inputs, **options, compile_config=compile_config("eager")), expected)
    options["cache_config"]["max_cache_len"] = 64
    with pytest.raises(ValueError, match="layer 1 holds images, and max_cache_len=64 is a length of text"):
        image_model.generate(**inputs, **options)


def test_flash_attention_is_not_given_what_is_reserved() -> None:
    """It goes by a mask, which `generate` leaves out; a stand-in here, since it is for GPUs."""
    name = "stand_in_for_flash"
    AttentionInterface.register(name, AttentionInterface()["sdpa"])
    AttentionMaskInterface.register(name, AttentionMaskInterface()["sdpa"])
    expected = tiny_llama("sdpa").generate(prompt(), max_new_tokens=4, do_sample=False)
    model = tiny_llama("sdpa")
    model.config._attn_implementation = name  # nobody looks for a package here
    options = {"cache_implementation": "kvquant", "max_new_tokens": 4, "do_sample": False}
    grows: dict[str, Any] = {"kv_cache_dtype": "model"}
    for given in ({}, {"compile_config": compile_config("eager")}):
        assert torch.equal(model.generate(prompt(), cache_config=grows, **options, **given), expected)
    with pytest.raises(ValueError, match="layer 0: attention 'stand_in_for_flash' .* leave max_cache_len out"):
        model.generate(prompt(), cache_config=grows | {"max_cache_len": 64}, **options)


@pytest.mark.parametrize("dtype", ["model", "int8", "fp8"])
@pytest.mark.parametrize("attention", ["kvquant", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_compiled_equals_eager(name: str, attention: str, dtype: str) -> None:
    model = MODELS[name]("kvquant")
    model.set_attn_implementation(attention)
    options = {"cache_implementation": "kvquant", "cache_config": {"kv_cache_dtype": dtype, "page_size": 4}}
    expected = run(model, prompt(), **options).sequences
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in (1, 1):
            out = run(model, prompt(seed=seed), compile_config=compile_config("eager"), **options)
            assert torch.equal(out.sequences, expected)
    assert counters["stats"]["unique_graphs"] == 1
    assert isinstance(out.past_key_values, QuantizedPagedCache)
    assert out.past_key_values.is_compileable


def test_one_graph_where_the_compiler_ties_graphs_to_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch 2.8 does, unless it is told not to: every cache has other ones."""
    mark = torch._dynamo.mark_static_address
    monkeypatch.setattr(torch._dynamo, "mark_static_address", lambda tensor, guard=True: mark(tensor, guard=guard))
    model = tiny_llama("kvquant")
    cache = {"kv_cache_dtype": "int8", "recent_tokens": 4}
    options = {"cache_config": cache, "compile_config": compile_config("eager")}
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(run(model, prompt(), **options).sequences, run(model, prompt(), **options).sequences)


@pytest.mark.parametrize("exact", [{"recent_tokens": 4}, {"sink_tokens": 3}, {"recent_tokens": 4, "sink_tokens": 3}])
@pytest.mark.parametrize("dtype", ["int8", "fp8"])
@pytest.mark.parametrize("name", MODELS)
def test_tokens_that_are_kept_exactly_are_in_the_graph(name: str, dtype: str, exact: dict[str, int]) -> None:
    model = MODELS[name]("kvquant")
    options = {"cache_config": {"kv_cache_dtype": dtype, "page_size": 4, **exact}}
    expected = run(model, prompt(), **options).sequences
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        got = run(model, prompt(), compile_config=compile_config("eager"), **options).sequences
    assert torch.equal(got, expected)
    assert counters["stats"]["unique_graphs"] == 1


# Before 5.18 Bloom prepares its mask for one class of fixed caches, the host's.
BLOOM_TAKES_FIXED = Version(transformers.__version__) >= Version("5.18")

# Latent attention, sinks, softcap, shared keys and values, linear-attention hybrids, an attention of its own,
# and encoder-decoders.
FAMILIES = [
    "deepseek_v3", "gpt_oss", "gemma2", "gemma3n_text", "qwen3_next", "falcon_h1", "bloom", "t5", "bart",
]  # fmt: skip


@pytest.mark.parametrize("attention", ["kvquant", "default"])
@pytest.mark.parametrize("model_type", [name for name in FAMILIES if name != "bloom" or BLOOM_TAKES_FIXED])
def test_families_compile(model_type: str, attention: str) -> None:
    model = families.build(model_type)
    ids = prompt(2, 11, vocab_size=90)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, cache_implementation="dynamic", **options)
    if attention == "kvquant":
        model.set_attn_implementation("kvquant")
    torch._dynamo.reset()
    counters.clear()
    for _ in range(2):
        with torch._dynamo.config.patch(error_on_recompile=True):
            got = model.generate(
                ids,
                cache_implementation="kvquant",
                cache_config={"kv_cache_dtype": "model", "page_size": 4},
                compile_config=compile_config("eager"),
                **options,
            )
        assert torch.equal(got, expected)
    assert counters["stats"]["unique_graphs"] >= 1


def _step_by_step(model: PreTrainedModel, call: Any, dtype: str, scales: str = "auto") -> torch.Tensor:
    """Logits of a prompt, single tokens, and several at once."""
    cache = QuantizedPagedCache.from_model(model, max_cache_len=64, kv_cache_dtype=dtype, scales=scales)
    ids = prompt(2, 30)
    parts = (ids[:, :20], *ids[:, 20:25].split(1, dim=1), ids[:, 25:])
    with torch.no_grad():
        return torch.cat([call(part, **with_cache(cache)).logits for part in parts], dim=1)


@pytest.mark.parametrize(("dtype", "fullgraph"), [("fp8", True), ("model", True), ("int8", True), ("fp8", False)])
@pytest.mark.parametrize("name", MODELS)
def test_a_forward_that_is_compiled_before_the_prompt(name: str, dtype: str, fullgraph: bool) -> None:
    model = MODELS[name]("kvquant")
    torch._dynamo.reset()
    expected = _step_by_step(model, model, dtype)
    got = _step_by_step(model, torch.compile(model, backend="eager", fullgraph=fullgraph), dtype)
    # The backend runs torch's own operators in the same order.
    assert torch.equal(got, expected)


def test_a_padded_prompt_that_is_compiled() -> None:
    """int8 takes its equalizer from the tokens that are none of the padding, in the graph."""
    model, ids = tiny_llama("kvquant"), prompt(2, 30)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    torch._dynamo.reset()
    logits = []
    for call in (model, torch.compile(model, backend="eager", fullgraph=True)):
        cache = QuantizedPagedCache.from_model(model, max_cache_len=64, kv_cache_dtype="int8")
        with torch.no_grad():
            call(ids[:, :20], attention_mask=mask[:, :20], **with_cache(cache))
            logits.append(call(ids[:, 20:], attention_mask=mask, **with_cache(cache)).logits)
    assert torch.equal(*logits)


def test_a_prompt_that_is_the_first_batch_of_scales_is_in_no_full_graph() -> None:
    """Whether it has numbers to take scales from decides what is done next."""
    model = tiny_llama("kvquant")
    torch._dynamo.reset()
    expected = _step_by_step(model, model, "int8", "first_batch")
    got = _step_by_step(model, torch.compile(model, backend="eager"), "int8", "first_batch")
    assert torch.equal(got, expected)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        _step_by_step(model, torch.compile(model, backend="eager", fullgraph=True), "int8", "first_batch")


def test_other_lengths_need_no_graph_each() -> None:
    """Calls of other lengths reserve other capacities; after a few calls they share one graph for all of them."""
    model = tiny_llama("kvquant")
    torch._dynamo.reset()
    counters.clear()
    for num_new in (5, 9, 13, 20, 26, 33):
        expected = model.generate(prompt(), max_new_tokens=num_new, do_sample=False)
        got = model.generate(prompt(), max_new_tokens=num_new, do_sample=False, compile_config=compile_config("eager"))
        assert torch.equal(got, expected)
    assert counters["stats"]["unique_graphs"] <= 3


def _capacity(model: PreTrainedModel, num_prompts: int, num_new: int, **options: Any) -> int:
    """Tokens that a compiled `generate` has reserved for a sequence; its tokens are those without compiling."""
    ids = prompt(length=21).repeat_interleave(num_prompts, 0)[:num_prompts]
    given = {"max_new_tokens": num_new, "do_sample": False, **options}
    got = model.generate(ids, compile_config=compile_config("eager"), return_dict_in_generate=True, **given)
    assert torch.equal(got.sequences, model.generate(ids, **given))
    return got.past_key_values.get_max_length()


@pytest.mark.parametrize("num_prompts", [1, 2])
def test_shorter_calls_use_the_graph_of_a_longer_one(num_prompts: int) -> None:
    """They reserve what it reserved."""
    model = tiny_llama("kvquant")
    torch._dynamo.reset()
    counters.clear()
    assert [_capacity(model, num_prompts, num_new) for num_new in (33, 12, 20)] == [53] * 3
    assert counters["stats"]["unique_graphs"] == 1


def test_what_is_not_reserved_for_shorter_calls() -> None:
    """More than twice what they need, what another number of sequences had, and what could not be had."""
    model = tiny_llama("kvquant")
    assert _capacity(model, 1, 33) == 53
    assert _capacity(model, 1, 2) == 22
    assert _capacity(model, 2, 20) == 40
    few = {"cache_config": {"num_pages": 3}}  # of 16 tokens
    assert _capacity(model, 1, 20, **few) == 40
    with pytest.raises(OutOfPagesError):
        _capacity(model, 1, 40, **few)
    assert _capacity(model, 1, 34) == 54


FIRST_FORWARD = """
import torch
import transformers
from helpers import prompt, tiny_llama
import hf_kvquant

model = tiny_llama("kvquant")
compiled = torch.compile(model, backend="eager", fullgraph=True)
torch.testing.assert_close(compiled(prompt(), use_cache=False).logits, tiny_llama("sdpa")(prompt()).logits)
"""


def test_the_first_forward_may_be_compiled() -> None:
    """In a process of its own: what the mask function has to find out of the model is not known yet."""
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
    subprocess.run([sys.executable, "-c", FIRST_FORWARD], check=True, env=environment)


@pytest.mark.skipif(not BLOOM_TAKES_FIXED, reason="this transformers knows Bloom with its own StaticCache only")
def test_attention_of_its_own_over_reserved_pages() -> None:
    """Bloom makes its mask for the whole capacity."""
    model = families.build("bloom")
    ids, mask = prompt(2, 30, vocab_size=90), torch.ones(2, 30, dtype=torch.int64)
    mask[0, :9] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    expected = model.generate(ids, cache_implementation="dynamic", **options)
    for fixed in ({"max_cache_len": 64}, {}):
        got = model.generate(
            ids,
            cache_implementation="kvquant",
            cache_config={"kv_cache_dtype": "model", **fixed},
            compile_config=None if fixed else compile_config("eager"),
            **options,
        )
        assert torch.equal(got, expected)


@pytest.mark.parametrize("model_type", ["bart", "t5", "mbart"])
def test_encoder_decoders_over_reserved_pages(model_type: str) -> None:
    model = families.build(model_type)
    ids, mask = prompt(2, 30, vocab_size=90), torch.ones(2, 30, dtype=torch.int64)
    mask[0, 20:] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    expected = model.generate(ids, cache_implementation="dynamic", **options)
    config = {"kv_cache_dtype": "model", "max_cache_len": 64}
    got = model.generate(ids, cache_implementation="kvquant", cache_config=config, **options)
    assert torch.equal(got, expected)


def test_inductor() -> None:
    model = tiny_llama("kvquant")
    expected = run(model, prompt()).sequences
    torch._dynamo.reset()
    out = run(model, prompt(), compile_config=compile_config("inductor"))
    assert torch.equal(out.sequences, expected)


@pytest.mark.parametrize("name", MODELS)
def test_a_cache_at_fixed_addresses_is_reused_over_turns(name: str) -> None:
    """Turns of several tokens over a stored past, more than a window has room for, then beams reordered."""
    model = MODELS[name]("kvquant")
    grown = QuantizedPagedCache.from_model(model, kv_cache_dtype="model", page_size=4)
    fixed = QuantizedPagedCache.from_model(model, kv_cache_dtype="model", page_size=4, max_cache_len=300)
    with torch.no_grad():
        for length, seed in ((21, 1), (1, 2), (150, 3), (5, 4), (1, 5)):
            expected, got = (model(prompt(2, length, seed=seed), past_key_values=c).logits for c in (grown, fixed))
            torch.testing.assert_close(got, expected)
        for cache in (grown, fixed):
            cache.reorder_cache(torch.tensor([1, 1]))
        expected, got = (model(prompt(2, 2, seed=6), past_key_values=c).logits for c in (grown, fixed))
        torch.testing.assert_close(got, expected)
    assert int(fixed.get_seq_length()) == grown.get_seq_length() == 180
    assert fixed.get_max_length() == 300


@pytest.mark.parametrize("options", [{"kv_cache_dtype": "int8"}, {"kv_cache_dtype": "fp8", "recent_tokens": 4}])
@pytest.mark.parametrize("name", MODELS)
def test_a_growing_cache_in_a_compiled_model_gives_the_same_logits(name: str, options: dict[str, Any]) -> None:
    """It is no cache to compile, but a model may be compiled as it is, graph breaks and all."""
    model = MODELS[name]("kvquant")
    caches = [QuantizedPagedCache.from_model(model, **options) for _ in range(2)]
    tokens = prompt()
    compiled = torch.compile(model, backend="eager")
    torch._dynamo.reset()
    with torch.no_grad():
        for step in range(14):
            new = tokens if step == 0 else tokens[:, step % 3 : step % 3 + 1]
            expected, got = (
                call(new, **with_cache(cache)).logits for call, cache in zip((model, compiled), caches, strict=True)
            )
            assert torch.equal(got, expected)
