"""`generate` with the two arguments, alone and together, and everything a user passes through it."""

from __future__ import annotations

import copy
from typing import Any

import families
import pytest
import torch
from helpers import llama_config, prompt, tiny_llama
from test_cache import sliding_model
from transformers import DynamicCache, GenerationConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM
from transformers.utils import logging

from hf_kvquant import KVQuantConfig, LayerScales, QuantizedPagedCache
from hf_kvquant.attention import NAMES

NUM_NEW = 20


def generate(model: LlamaForCausalLM, ids: torch.Tensor, **options: Any) -> Any:
    options = {"max_new_tokens": NUM_NEW, "do_sample": False, "return_dict_in_generate": True, **options}
    return model.generate(ids, attention_mask=options.pop("attention_mask", torch.ones_like(ids)), **options)


def formats(cache: QuantizedPagedCache) -> set[tuple[str, str]]:
    return {layer.kv_cache_dtype for layer in cache.report().layers}


@pytest.mark.parametrize(
    ("name", "expected"), list(zip(NAMES, ("int8", "fp8_e4m3", "fp8_e4m3", "fp8_e5m2", "int8"), strict=True)), ids=NAMES
)
def test_attention_alone_makes_the_cache(name: str, expected: str) -> None:
    cache = generate(tiny_llama(name), prompt()).past_key_values
    assert isinstance(cache, QuantizedPagedCache)
    assert formats(cache) == {(expected, expected)}
    assert all(layer.k.paged.pages.element_size() == 1 for layer in cache.layers)
    assert all(layer.dense == () for layer in cache.report().layers)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "kvquant"])
def test_cache_implementation_under_any_attention(attention: str) -> None:
    model = tiny_llama(attention)
    expected = generate(model, prompt(), cache_implementation="dynamic").sequences
    out = generate(model, prompt(), cache_implementation="kvquant", cache_config={"kv_cache_dtype": "model"})
    assert isinstance(out.past_key_values, QuantizedPagedCache)
    assert torch.equal(out.sequences, expected)
    dense = out.past_key_values.report().layers[0].dense
    assert (dense == ()) == (attention == "kvquant")
    assert all(attention in reason for reason in dense)


def test_attention_name_is_the_default_and_the_option_wins() -> None:
    out = generate(tiny_llama("kvquant_int8"), prompt(), cache_config={"kv_cache_dtype": ("fp8", "model")})
    assert formats(out.past_key_values) == {("fp8_e4m3", "model")}


def test_from_pretrained_and_saved_generation_config(tmp_path: Any) -> None:
    model = tiny_llama("sdpa")
    model.generation_config.cache_implementation = "kvquant"
    model.generation_config.cache_config = {"kv_cache_dtype": "fp8", "page_size": 4}
    model.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).cache_implementation == "kvquant"
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="kvquant_int8")
    assert loaded.config._attn_implementation == "kvquant_int8"
    cache = generate(loaded, prompt()).past_key_values
    assert formats(cache) == {("fp8_e4m3", "fp8_e4m3")}
    assert cache.kvquant.page_size == 4


@pytest.mark.parametrize("as_dict", [False, True], ids=["config", "dict"])
def test_scales_in_memory_survive_a_saved_generation_config(as_dict: bool, tmp_path: Any) -> None:
    scales = LayerScales(torch.tensor([0.125, 0.25]), torch.rand(2, 16) + 0.01)
    options: Any = {"kv_cache_dtype": "fp8", "scales": scales}
    model = tiny_llama("kvquant")
    model.generation_config.cache_config = options if as_dict else KVQuantConfig(**options)
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="kvquant")
    one, other = (generate(each, prompt()).past_key_values.report() for each in (model, loaded))
    assert one.layers == other.layers
    assert one.layers[0].scales == ("given", "given")


def test_another_cache_stays_the_hosts() -> None:
    model = tiny_llama("kvquant")
    expected = generate(tiny_llama("sdpa"), prompt()).sequences
    for name in ("dynamic", "static"):
        out = generate(model, prompt(), cache_implementation=name)
        assert not isinstance(out.past_key_values, QuantizedPagedCache)
        assert torch.equal(out.sequences, expected)
    given = DynamicCache(config=model.config)
    assert generate(model, prompt(), past_key_values=given).past_key_values is given
    assert torch.equal(generate(model, prompt(), use_cache=False).sequences, expected)


def test_options_are_never_changed() -> None:
    options = {"kv_cache_dtype": ["fp8", "int8"], "skip_layers": [0], "scales": "dynamic"}
    before = copy.deepcopy(options)
    for attention in ("sdpa", "kvquant"):
        generate(tiny_llama(attention), prompt(), cache_implementation="kvquant", cache_config=options)
        assert options == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_cache_type": "fp8"}, "kv_cache_type.*known: kv_cache_dtype, scales"),
        ({"kv_cache_dtype": "int4"}, "int4.*fp8_e4m3, fp8_e5m2, int8, model"),
        ({"scales": "checkpoint"}, "scales='checkpoint'.*has no KV scales.*dynamic"),
        ({"skip_layers": [7]}, "layer 7.*2 cache layers"),
        ({"skip_layers": "sliding_attention"}, "sliding_attention.*full_attention"),
        ({"scales": [LayerScales(torch.ones(1), torch.ones(1))]}, "1 layers.*2 cache layers"),
        ({"scales": LayerScales(torch.ones(3), torch.ones(3))}, r"layer 0: k_scale.*\[3\].*\[2\] \(per head\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(tiny_llama("kvquant"), prompt(), cache_config=options)
    model = tiny_llama("kvquant")
    with pytest.raises(ValueError, match=message):
        generate(model, prompt(), past_key_values=QuantizedPagedCache.from_model(model, **options))


def test_options_that_a_given_cache_was_not_made_with(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_llama("kvquant")
    cache = QuantizedPagedCache.from_model(model, kv_cache_dtype="fp8", recent_tokens=4)
    with caplog.at_level("WARNING", logger="transformers"):
        generate(model, prompt(), past_key_values=cache, cache_config={"kv_cache_dtype": "fp8"})
        assert "ignored" not in caplog.text
        cache.reset()
        generate(model, prompt(), past_key_values=cache, cache_config={"kv_cache_dtype": "int8", "recent_tokens": 4})
        assert (
            "`cache_config` is ignored: the cache that was passed was made without kv_cache_dtype='int8';"
            in caplog.text
        )
    cache.reset()
    with pytest.raises(ValueError, match="unknown cache_config key"):
        generate(model, prompt(), past_key_values=cache, cache_config={"nonsense": 1})


def test_continuous_batching_says_that_it_keeps_its_own_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where attention is not kvquant; the configuration comes with the call or from the model."""
    warned: list[str] = []
    monkeypatch.setattr("hf_kvquant.generation.logger.warning_once", warned.append)
    others: list[dict[str, Any]] = [{}, {"cache_implementation": "static", "cache_config": {}}]
    ours = [{"cache_implementation": "kvquant"}, {"cache_config": {"kv_cache_dtype": "fp8"}}]
    for options in others + ours:
        config, model = GenerationConfig(eos_token_id=-1, pad_token_id=0, **options), tiny_llama("sdpa")
        model.init_continuous_batching(config)
        model = tiny_llama("sdpa")
        model.generation_config = config
        model.init_continuous_batching()
        assert len(warned) == 2 * (ours.index(options) + 1 if options in ours else 0)
    assert "Continuous batching keeps a cache of its own" in warned[0]


def test_both_cache_and_implementation_are_refused() -> None:
    model = tiny_llama("kvquant")
    with pytest.raises(ValueError, match="cache_implementation"):
        generate(model, prompt(), past_key_values=QuantizedPagedCache.from_model(model), cache_implementation="kvquant")


@pytest.mark.parametrize("attention", ["sdpa", "kvquant"])
def test_chat_turns_over_one_cache(attention: str) -> None:
    """A second turn continues from what is stored, and equals DynamicCache's run token for token."""
    model = tiny_llama(attention)

    def chat(cache: Any) -> torch.Tensor:
        text = prompt(length=9)
        for seed in range(3):
            text = torch.cat([text, prompt(length=7, seed=10 + seed)], dim=1)
            text = generate(model, text, past_key_values=cache, max_new_tokens=6).sequences
            assert cache.get_seq_length() == text.shape[1] - 1
        return text

    expected = chat(DynamicCache(config=model.config))
    assert torch.equal(chat(QuantizedPagedCache.from_model(model, kv_cache_dtype="model", page_size=4)), expected)


@pytest.mark.parametrize("dtype", ["fp8", "fp8_e5m2", "int8"])
@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_half_precision_models(dtype: str, model_dtype: torch.dtype) -> None:
    """In one layer, whose keys and values are the same by both routes, so that their bytes are as well."""
    model = tiny_llama("kvquant", dtype=model_dtype, num_hidden_layers=1)
    fused = generate(model, prompt(), cache_config={"kv_cache_dtype": dtype}, output_logits=True)
    model.set_attn_implementation("eager")
    stored = generate(
        model, prompt(), cache_implementation="kvquant", cache_config={"kv_cache_dtype": dtype}, output_logits=True
    )
    # Read by two routes that round differently: as long as the tokens are the same, to the model's precision.
    same = (fused.sequences == stored.sequences).all(dim=0).cumprod(dim=0).sum().item() - prompt().shape[1] + 1
    assert same > 1
    for one, other in list(zip(fused.logits, stored.logits, strict=True))[:same]:
        bound = 32 * torch.finfo(model_dtype).eps * other.abs().amax().item()
        assert (one - other).abs().amax().item() <= bound


PAD = 98


def loud_when_padded(attention: str) -> LlamaForCausalLM:
    """What the token PAD puts into the cache would show."""
    model = tiny_llama(attention)
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                projection.weight += model.model.embed_tokens.weight[PAD].repeat(32, 1)
    return model


def test_left_padding_does_not_reach_first_batch_scales() -> None:
    model = loud_when_padded("kvquant")
    short = prompt(batch_size=1, length=13, vocab_size=PAD)
    padded = torch.cat([torch.full((1, 8), PAD), short], dim=1)
    mask = (padded != PAD).long()
    options = {"kv_cache_dtype": "int8", "scales": "first_batch", "granularity": "channel"}
    caches = []
    for attention in ("kvquant", "sdpa"):
        model.set_attn_implementation(attention)
        for ids, attention_mask in ((short, torch.ones_like(short)), (padded, mask)):
            out = generate(
                model, ids, attention_mask=attention_mask, cache_implementation="kvquant", cache_config=options
            )
            caches.append(out.past_key_values)
    source = caches[0].report().layers[0].scales
    assert "13 tokens" in source[0]
    for cache in caches[1:]:
        assert cache.report().layers[0].scales == source
        for layer, expected in zip(cache.layers, caches[0].layers, strict=True):
            # Values do not turn with position. The padded prompt's lie elsewhere but are the same.
            torch.testing.assert_close(layer.v.paged.scale, expected.v.paged.scale)


# What first comes of a prompt of 13 tokens behind 8 of padding, by the length of its pieces.
FIRST_TOKENS = {6: 4, 8: 8, 10: 2}


@pytest.mark.parametrize("fixed", [{}, {"max_cache_len": 40}], ids=["growing", "fixed"])
@pytest.mark.parametrize("attention", ["kvquant", "sdpa"])
@pytest.mark.parametrize(
    "scales", [{"scales": "first_batch", "granularity": "channel"}, {}], ids=["first", "equalized"]
)
@pytest.mark.parametrize("piece", FIRST_TOKENS)
def test_left_padding_does_not_reach_scales_of_a_prompt_in_pieces(
    piece: int, scales: dict[str, Any], attention: str, fixed: dict[str, Any]
) -> None:
    model = loud_when_padded(attention)
    options = {"kv_cache_dtype": "int8", **scales, **fixed}
    tokens = prompt(batch_size=2, length=13, vocab_size=PAD)
    padded = torch.cat([torch.full((2, 8), PAD), tokens], dim=1)
    mask = (padded != PAD).long()
    named = {"cache_implementation": "kvquant", "cache_config": options, "disable_compile": True}
    expected = generate(model, tokens, prefill_chunk_size=FIRST_TOKENS[piece], **named).past_key_values
    found = [generate(model, padded, attention_mask=mask, prefill_chunk_size=piece, **named).past_key_values]
    if attention == "kvquant":  # without `generate` only attention sees the mask
        cache = QuantizedPagedCache.from_model(model, **options)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        for start in range(0, 21, piece):
            rows, end = slice(start, start + piece), min(start + piece, 21)
            model(padded[:, rows], attention_mask=mask[:, :end], position_ids=positions[:, rows], past_key_values=cache)
        found.append(cache)
    for cache in found:
        for side in ("k", "v"):
            scale, right = (getattr(c.layers[0], side).paged.scale for c in (cache, expected))
            torch.testing.assert_close(scale, right)


def test_an_encoders_padding_is_not_a_decoders() -> None:
    model = families.build("bart")
    options = {"kv_cache_dtype": "int8", "scales": "first_batch"}
    source, start = prompt(1, 7), torch.tensor([[3, 11, 12, 13]])
    scales = []
    for padding in (0, 3):
        padded = torch.cat([torch.zeros(1, padding, dtype=torch.int64), source[:, padding:]], dim=1)
        out = generate(
            model, padded, attention_mask=(padded != 0).long(), decoder_input_ids=start,
            cache_implementation="kvquant", cache_config=options,
        )  # fmt: skip
        scales.append(out.past_key_values.self_attention_cache.layers[0].v.paged.scale)
    torch.testing.assert_close(*scales)


def test_what_comes_behind_a_padded_prompt_is_no_padding() -> None:
    model = tiny_llama("sdpa")
    options = {"kv_cache_dtype": "fp8", "scales": "first_batch"}
    # The embedding of token 0 is zero, so the prompt gives no scales.
    out = generate(
        model, torch.zeros(1, 4, dtype=torch.int64), attention_mask=torch.tensor([[1, 1, 1, 0]]),
        cache_implementation="kvquant", cache_config=options, suppress_tokens=[0],
    )  # fmt: skip
    assert "first batch (1 tokens" in out.past_key_values.report().layers[0].scales[0]


def test_first_batch_waits_for_real_tokens() -> None:
    model = tiny_llama("kvquant")
    cache = QuantizedPagedCache.from_model(model, kv_cache_dtype="fp8", scales="first_batch")
    zeros = torch.zeros(1, 2, 5, 16)
    for layer in range(2):
        cache.update(zeros, zeros, layer)[0].dense("test")
    assert "none seen yet" in cache.report().layers[0].scales[0]
    real = torch.randn(1, 2, 5, 16)
    dense = [cache.update(real, real, layer)[0].dense("test") for layer in range(2)]
    assert "per tensor, margin 1.5" in cache.report().layers[0].scales[0]
    assert torch.equal(dense[0][:, :, :5], zeros)
    torch.testing.assert_close(dense[0][:, :, 5:], real, rtol=2**-4, atol=real.abs().max().item() * 1.5 / 448)


@pytest.mark.parametrize("named", [False, True], ids=["attention", "cache_implementation"])
@pytest.mark.parametrize("make_model", [tiny_llama, sliding_model], ids=["full", "sliding"])
def test_every_way_of_generating(make_model: Any, named: bool) -> None:
    """Unquantized pages give DynamicCache's tokens however `generate` is asked."""
    model, assistant = make_model(), make_model()
    model.set_attn_implementation("kvquant")
    ids = prompt(1, 24).repeat(1, 2)
    dense = {"cache_implementation": "dynamic"}
    ours = {"cache_config": {"kv_cache_dtype": "model", "page_size": 4}}
    if named:
        ours["cache_implementation"] = "kvquant"
    greedy = generate(model, ids, **dense).sequences
    for way in (
        {"prompt_lookup_num_tokens": 3},
        {"assistant_model": assistant},
        {"prefill_chunk_size": 7},
    ):
        assert torch.equal(generate(model, ids, **ours, **way).sequences, greedy), way
    embedded = model.generate(inputs_embeds=model.get_input_embeddings()(ids), max_new_tokens=NUM_NEW, **ours)
    assert torch.equal(embedded, greedy[:, ids.shape[1] :])
    sampled = []
    for options in (dense, ours):
        torch.manual_seed(0)
        sampled.append(generate(model, ids, do_sample=True, num_return_sequences=3, **options).sequences)
    assert torch.equal(*sampled)


def test_right_padding() -> None:
    """Scoring a right-padded batch, then going on."""
    model = tiny_llama("kvquant")
    ids, mask = prompt(3, 20), torch.ones(3, 20, dtype=torch.int64)
    mask[0, 12:], mask[1, 17:] = 0, 0
    longer = torch.cat([mask, torch.ones(3, 5, dtype=torch.int64)], dim=1)
    outputs = []
    for cache in (DynamicCache(config=model.config), QuantizedPagedCache.from_model(model, kv_cache_dtype="model")):
        with torch.no_grad():
            scored = model(ids, attention_mask=mask, past_key_values=cache).logits[mask.bool()]
            positions = (longer.cumsum(-1) - 1)[:, -5:]
            new = prompt(3, 5, seed=3)
            went_on = model(new, attention_mask=longer, position_ids=positions, past_key_values=cache).logits
        outputs.append((scored, went_on))
    torch.testing.assert_close(outputs[1], outputs[0])


def test_gradients_flow_without_our_cache() -> None:
    grads = []
    for attention in ("sdpa", "kvquant"):
        model = tiny_llama(attention)
        model(prompt(), labels=prompt()).loss.backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


@pytest.mark.parametrize("attention", ["kvquant", "eager"])
@pytest.mark.parametrize("options", [{}, {"max_cache_len": 64}], ids=["growing", "fixed"])
def test_gradients_over_a_stored_past(attention: str, options: dict[str, Any]) -> None:
    """New tokens are differentiated through queries, keys and values; what is stored is constant."""
    model = tiny_llama(attention)
    results = []
    ours = QuantizedPagedCache.from_model(model, kv_cache_dtype="model", **options)
    for cache in (DynamicCache(config=model.config), ours):
        with torch.no_grad():
            model(prompt(), past_key_values=cache)
        model.zero_grad()
        logits = model(prompt(length=3, seed=5), past_key_values=cache).logits
        logits.square().sum().backward()
        results.append([logits.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    for one, other in zip(*results, strict=True):
        assert (one - other).abs().max() <= 64 * torch.finfo(torch.float32).eps * one.abs().max()


def test_custom_4d_mask() -> None:
    """An arbitrary mask over a stored past and several new tokens."""
    model = tiny_llama("kvquant")
    outputs = []
    for make in (
        lambda: DynamicCache(config=model.config),
        lambda: QuantizedPagedCache.from_model(model, kv_cache_dtype="model"),
    ):
        cache = make()
        with torch.no_grad():
            model(prompt(), past_key_values=cache)
            mask = torch.rand(2, 1, 5, 26, generator=torch.Generator().manual_seed(3)) > 0.4
            mask[..., -5:] &= torch.ones(5, 5, dtype=torch.bool).tril()
            mask[..., 0] = True
            additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
            outputs.append(
                [
                    model(prompt(length=5, seed=7), past_key_values=copy.deepcopy(cache), attention_mask=given).logits
                    for given in (mask, additive)
                ]
            )
    for one, other in zip(*outputs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("given", [False, True], ids=["", "given"])
@pytest.mark.parametrize("length", [10, 26, 40])
def test_a_model_that_begins_anew_keeps_the_cache(length: int, given: bool) -> None:
    """Beyond 32 tokens its rotary embedding is another: it leaves the cache out once, to compute all tokens again."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
    config = Phi3Config(
        **{name: getattr(llama_config(), name) for name in names},
        num_hidden_layers=2,
        max_position_embeddings=128,
        original_max_position_embeddings=32,
        rope_parameters={**rope, "original_max_position_embeddings": 32},
        pad_token_id=0,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = Phi3ForCausalLM(config).eval()
    expected = generate(model, prompt(length=length), use_cache=False).sequences
    model.set_attn_implementation("kvquant")
    options = {"kv_cache_dtype": "model", "page_size": 4}
    ours: dict[str, Any] = {"cache_config": options}
    if given:
        ours = {"past_key_values": QuantizedPagedCache.from_model(model, **options)}
    out = generate(model, prompt(length=length), **ours)
    assert torch.equal(out.sequences, expected)
    assert isinstance(out.past_key_values, QuantizedPagedCache)
    assert out.past_key_values.get_seq_length() == out.sequences.shape[1] - 1
    assert all(layer.dense == () for layer in out.past_key_values.report().layers)


def test_weights_are_not_there_with_a_word(caplog: pytest.LogCaptureFixture) -> None:
    logging.warning_once.cache_clear()
    model = tiny_llama("kvquant")
    with caplog.at_level("WARNING", logger="transformers"):
        model.generate(prompt(), max_new_tokens=3, do_sample=False)
        assert "output_attentions" not in caplog.text
        model.generate(prompt(), max_new_tokens=3, output_attentions=True, return_dict_in_generate=True)
    assert caplog.text.count("does not support output_attentions=True") == 1
