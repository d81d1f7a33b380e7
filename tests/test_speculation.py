"""Speculation: drafts of several tokens are checked over the pages and taken back; the tokens are those without it."""

from __future__ import annotations

import inspect
from typing import Any

import families
import pytest
import torch
from helpers import prompt, tiny_llama
from test_cache import sliding_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Cache,
    Gemma4AssistantConfig,
    Gemma4AssistantForCausalLM,
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    modeling_layers,
)

from hf_kvquant import PrefixCache, QuantizedPagedCache
from hf_kvquant.hosts.conventions import with_cache

NUM_NEW = 24


def generate(model: PreTrainedModel, ids: torch.Tensor, **options: Any) -> Any:
    options = {"max_new_tokens": NUM_NEW, "do_sample": False, "return_dict_in_generate": True, **options}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)


def drafter(model: PreTrainedModel, attention: str) -> PreTrainedModel:
    """A model that is often right and often wrong: the first layers of `model`."""
    options = model.config.to_dict()
    options["num_hidden_layers"] = 1
    if options.get("layer_types"):
        options["layer_types"] = options["layer_types"][:1]
    config = type(model.config).from_dict(options)
    small = type(model)(config).eval()
    small.load_state_dict(model.state_dict(), strict=False)
    small.set_attn_implementation(attention)
    small.generation_config.num_assistant_tokens = 5
    small.generation_config.assistant_confidence_threshold = 0.0
    return small


def repetitive(length: int = 24) -> torch.Tensor:
    """A prompt that looks up well in itself."""
    return prompt(1, 6).repeat(1, -(-length // 6))[:, :length]


@pytest.mark.parametrize("dtype", ["model", "int8", "fp8"])
@pytest.mark.parametrize("where", ["target", "assistant", "both"])
@pytest.mark.parametrize("make_model", [tiny_llama, sliding_model], ids=["full", "sliding"])
def test_an_assistant(make_model: Any, where: str, dtype: str) -> None:
    """Our cache on the target, on the assistant, or on both."""
    if where == "target" and make_model is sliding_model and not hasattr(Cache, "is_recording_past"):
        pytest.skip("this transformers' own cache cannot draft with a sliding window")
    model = make_model()
    model.set_attn_implementation("sdpa" if where == "assistant" else "kvquant")
    assistant = drafter(model, "sdpa" if where == "target" else "kvquant")
    config = {"cache_config": {"kv_cache_dtype": dtype, "page_size": 4}}
    ours = {} if where == "assistant" else config
    if where != "target":
        assistant.generation_config.cache_config = config["cache_config"]
    expected = generate(model, repetitive(), **ours)
    out = generate(model, repetitive(), assistant_model=assistant, **ours)
    assert torch.equal(out.sequences, expected.sequences)
    assert isinstance(out.past_key_values, QuantizedPagedCache) == (where != "assistant")
    if where != "assistant":
        cache = out.past_key_values
        assert cache.get_seq_length() == out.sequences.shape[1] - 1
        assert all(layer.dense == () for layer in cache.report().layers)


@pytest.mark.parametrize("dtype", ["model", "int8", "fp8"])
@pytest.mark.parametrize("attention", ["kvquant", "sdpa"])
@pytest.mark.parametrize("make_model", [tiny_llama, sliding_model], ids=["full", "sliding"])
def test_prompt_lookup(make_model: Any, attention: str, dtype: str) -> None:
    model = make_model()
    model.set_attn_implementation(attention)
    options = {"cache_implementation": "kvquant", "cache_config": {"kv_cache_dtype": dtype, "page_size": 4}}
    expected = generate(model, repetitive(), **options)
    out = generate(model, repetitive(), prompt_lookup_num_tokens=4, **options)
    assert torch.equal(out.sequences, expected.sequences)


@pytest.mark.parametrize("way", ["lookup", "assistant"])
@pytest.mark.parametrize("kind", ["turns", "prefix", "fixed"])
def test_over_a_cache_that_holds_tokens(kind: str, way: str) -> None:
    """A second turn, and a beginning that is kept: what the cache holds is not given to the model again."""
    model = tiny_llama("kvquant")
    drafts = {"assistant_model": drafter(model, "kvquant")} if way == "assistant" else {"prompt_lookup_num_tokens": 3}
    first, ids = repetitive(18), torch.cat([repetitive(18), prompt(1, 6, seed=9)], dim=1)
    options = {"scales": "unit", "kv_cache_dtype": "fp8", "page_size": 4}
    prefixes = PrefixCache(model, 1 << 30, **options)
    prefixes.prefill(first)

    def with_first_turn() -> QuantizedPagedCache:
        if kind == "prefix":
            return prefixes.cache_for(ids)
        cache = QuantizedPagedCache.from_model(model, **options, max_cache_len=99 if kind == "fixed" else None)
        with torch.no_grad():
            model(first, past_key_values=cache)
        return cache

    expected = generate(model, ids, past_key_values=with_first_turn()).sequences
    cache = with_first_turn()
    assert torch.equal(generate(model, ids, past_key_values=cache, **drafts).sequences, expected)
    assert cache.get_seq_length() == expected.shape[1] - 1
    assert torch.equal(generate(model, first, **drafts).sequences, generate(model, first).sequences)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("model_type", families.available(["gemma3n_text", "gemma4_text"]))
def test_layers_that_see_only_the_last_tokens(model_type: str, cached: bool) -> None:
    """Layers that use the keys of others may leave out what becomes no logits."""
    overrides = families.FAMILIES[model_type] | {"sliding_window": 64}
    model = families.build(model_type, overrides, attn_implementation="kvquant")

    def logits(num_logits: int) -> torch.Tensor:
        cache = with_cache(QuantizedPagedCache.from_model(model, kv_cache_dtype="fp8")) if cached else {}
        return model(repetitive(), **cache, logits_to_keep=num_logits).logits

    with torch.no_grad():
        torch.testing.assert_close(logits(9), logits(0)[:, -9:], rtol=0, atol=1e-4 * float(logits(0).std()))
    options = {"cache_config": {"kv_cache_dtype": "model"}} if cached else {"cache_implementation": "dynamic"}
    expected = generate(model, repetitive(), **options).sequences
    assert torch.equal(generate(model, repetitive(), prompt_lookup_num_tokens=3, **options).sequences, expected)


@pytest.mark.skipif(
    "_mask_length" not in inspect.getsource(GenerationMixin.generate),
    reason="this transformers cuts a mask that is longer than what comes, over its own caches too",
)
@pytest.mark.parametrize("way", ["lookup", "assistant"])
@pytest.mark.parametrize("model_type", ["llama", "bloom"])
@pytest.mark.parametrize("num_held", [8, 24])
def test_only_what_is_new_over_a_cache(num_held: int, model_type: str, way: str) -> None:
    """Its mask says that there is more, whether more or less comes than is held; Bloom has no positions."""
    model = tiny_llama("kvquant") if model_type == "llama" else families.build(model_type)
    drafts = {"assistant_model": drafter(model, "sdpa")} if way == "assistant" else {"prompt_lookup_num_tokens": 12}
    new = prompt(1, 7, seed=9, vocab_size=90).repeat(1, 2)
    ids = torch.cat([prompt(1, num_held, vocab_size=90), new], dim=1)
    options = {"max_new_tokens": NUM_NEW, "min_new_tokens": NUM_NEW, "do_sample": False}
    cache = QuantizedPagedCache.from_model(model, kv_cache_dtype="model", page_size=4)
    with torch.no_grad():
        model(ids[:, :num_held], **with_cache(cache))
    mask = torch.ones_like(ids)
    made = model.generate(new, attention_mask=mask, past_key_values=cache, **options, **drafts)
    expected = model.generate(ids, attention_mask=mask, cache_implementation="dynamic", **options)
    assert torch.equal(made[:, -NUM_NEW:], expected[:, -NUM_NEW:])
    assert cache.get_seq_length() == num_held + 14 + NUM_NEW - 1


@pytest.mark.parametrize("page_size", [2, 16])
def test_an_assistant_that_reads_what_the_model_has_stored(page_size: int) -> None:
    """It drafts from keys and values of the model's last step, drafts that were taken back since among them."""
    shared = {"layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 2, "global_head_dim": 32}
    text = {**shared, "vocab_size_per_layer_input": 0, "hidden_size_per_layer_input": 0}
    config = Gemma4AssistantConfig(text_config=families.config_of("gemma4_text", text), backbone_hidden_size=64)
    torch.manual_seed(3)
    assistant = Gemma4AssistantForCausalLM(config).eval()
    assistant.generation_config.num_assistant_tokens = 3
    drafts: list[torch.Tensor] = []
    assistant.register_forward_hook(lambda *hooked: drafts.append(hooked[2].logits))
    model = families.build("gemma4_text")
    expected = generate(model, prompt(1, 24), assistant_model=assistant).sequences
    of_host = torch.cat(drafts)
    drafts.clear()
    model.set_attn_implementation("kvquant")
    options = {"cache_config": {"kv_cache_dtype": "model", "page_size": page_size}}
    assert torch.equal(generate(model, prompt(1, 24), assistant_model=assistant, **options).sequences, expected)
    torch.testing.assert_close(torch.cat(drafts), of_host)


def test_an_assistant_is_no_reason_to_warn(caplog: pytest.LogCaptureFixture) -> None:
    """It sees the options without the name that they belong to."""
    model = tiny_llama()
    options: dict[str, Any] = {"cache_implementation": "kvquant", "cache_config": {"kv_cache_dtype": "fp8"}}
    with caplog.at_level("WARNING", logger="transformers"):
        generate(model, repetitive(), assistant_model=drafter(model, "sdpa"), **options)
    assert "`cache_config` is ignored" not in caplog.text


def test_verify_steps_read_the_pages() -> None:
    """Several drafted tokens at once take the paged operator, not a dense copy; what is rejected leaves no pages."""
    model = tiny_llama("kvquant")
    queries = []
    from hf_kvquant import ops

    paged_attention = ops.paged_attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "paged_attention", lambda query, *a, **k: (
            queries.append(query.shape[2]), paged_attention(query, *a, **k))[1])  # fmt: skip
        out = generate(
            model,
            repetitive(),
            assistant_model=drafter(model, "sdpa"),
            cache_config={"kv_cache_dtype": "int8", "page_size": 4},
        )
    assert max(queries) > 3
    cache = out.past_key_values
    assert cache.layers[0].table.pages_in_use == -(-cache.get_seq_length() // 4)
    assert all(layer.dense == () for layer in cache.report().layers)


@pytest.mark.parametrize("attention", ["kvquant", "sdpa"])
def test_early_exit(attention: str) -> None:
    """The model drafts with its own first layers."""
    model = tiny_llama(attention, num_hidden_layers=3)
    options = {"cache_implementation": "kvquant", "cache_config": {"kv_cache_dtype": "model", "page_size": 4}}
    expected = generate(model, prompt(1, 20), **options).sequences
    assert torch.equal(generate(model, prompt(1, 20), assistant_early_exit=1, **options).sequences, expected)


def tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    vocab = {word: index for index, word in enumerate(words)}
    core = Tokenizer(models.WordLevel(vocab, unk_token=words[0]))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token=words[0], pad_token=words[0], eos_token=words[1])


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampling"])
def test_an_assistant_with_another_tokenizer(do_sample: bool) -> None:
    words = ["<unk>", "</s>", *(f"w{i}" for i in range(97))]
    model, assistant = tiny_llama("kvquant"), tiny_llama("kvquant", seed=5, vocab_size=90)
    others = [*words[:2], "only-here", *reversed(words[12:])]
    tokenizers = {"tokenizer": tokenizer(words), "assistant_tokenizer": tokenizer(others)}
    options = {"cache_config": {"kv_cache_dtype": "model", "page_size": 4}, "do_sample": do_sample}
    out = generate(model, repetitive(), assistant_model=assistant, **tokenizers, **options)
    if do_sample:
        assert out.sequences.shape[1] == 24 + NUM_NEW
    else:
        assert torch.equal(out.sequences, generate(model, repetitive(), **options).sequences)
    assert out.past_key_values.get_seq_length() == out.sequences.shape[1] - 1


@pytest.mark.parametrize("model_type", ["t5", "bart"])
def test_encoder_decoders(model_type: str) -> None:
    model = families.build(model_type)
    ids = prompt(1, 20, vocab_size=90)
    options = {"cache_implementation": "kvquant", "min_new_tokens": NUM_NEW}
    options["cache_config"] = {"kv_cache_dtype": "int8", "page_size": 4}
    expected = generate(model, ids, **options).sequences
    out = generate(model, ids, assistant_model=families.build(model_type), **options)
    assert torch.equal(out.sequences, expected)


@pytest.mark.skipif(not hasattr(modeling_layers, "MtpModel"), reason="this transformers has no multi-token prediction")
@pytest.mark.parametrize("dtype", ["model", "int8", "fp8"])
def test_multi_token_prediction(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of the model's own draft (random ones here, so that most drafts are rejected)."""
    model = tiny_llama("kvquant")
    model.config.num_mtp_layers = 2
    drafters = modeling_layers.MtpModel
    monkeypatch.setattr(drafters, "from_pretrained", lambda main, **options: drafters(main, 2).eval())
    options = {"cache_config": {"kv_cache_dtype": dtype, "page_size": 4}}
    expected = generate(model, prompt(1, 20), **options).sequences
    out = generate(model, prompt(1, 20), use_mtp=True, **options)
    assert torch.equal(out.sequences, expected)
    assert isinstance(out.past_key_values, QuantizedPagedCache)
