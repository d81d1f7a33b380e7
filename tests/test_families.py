"""Over the model types that transformers has: unquantized pages give the tokens that its own cache gives."""

from __future__ import annotations

import functools
from typing import Any

import families
import pytest
import torch
from families import EXPECTED_DENSE, FAMILIES, KEPT_BY_HOST, MORE_FAMILIES, NOT_TRIED, available, build
from transformers import (
    AttentionInterface,
    AutoModel,
    BlipTextConfig,
    BlipTextLMHeadModel,
    DynamicCache,
    EncoderDecoderCache,
    PreTrainedModel,
    StaticCache,
    WhisperForConditionalGeneration,
)
from transformers.cache_utils import Cache
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from hf_kvquant import QuantizedPagedCache
from hf_kvquant.attention import kvquant_attention
from hf_kvquant.handle import PagedKV
from hf_kvquant.hosts.conventions import with_cache
from hf_kvquant.interface import uses_attention_interface
from hf_kvquant.layers import PagedLayer
from hf_kvquant.ops import reference

LENGTH, PADDING = 13, (0, 5, 10)  # beyond the windows; rows with 13, 8 and 3 tokens
PAGE_SIZE = 4


TYPES = [
    *available(FAMILIES),
    *(pytest.param(model_type, marks=pytest.mark.slow) for model_type in available(MORE_FAMILIES)),
]


def _prompt(num_rows: int, length: int = LENGTH, seed: int = 1) -> torch.Tensor:
    return torch.randint(4, 99, (num_rows, length), generator=torch.Generator().manual_seed(seed))


def _generate(
    model: PreTrainedModel, input_ids: torch.Tensor, num_padding: tuple[int, ...] = (), **options: Any
) -> Any:
    mask = torch.ones_like(input_ids)
    for row, number in enumerate(num_padding):
        mask[row, :number] = 0
    return model.generate(
        input_ids=input_ids * mask,
        attention_mask=mask,
        do_sample=False,
        no_repeat_ngram_size=2,  # small random models soon repeat one token, which would hide what they attend to
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )


def _runs(model: PreTrainedModel, **cache: Any) -> dict[str, Any]:
    """Outputs of `generate` in the ways that a cache has to serve."""
    first = _generate(model, _prompt(1), max_new_tokens=8, **cache)
    outputs = {"greedy": first}
    if not model.config.is_encoder_decoder and model.config.model_type not in KEPT_BY_HOST:
        # More tokens at once than a window holds, to a cache that has some.
        longer = torch.cat([first.sequences, _prompt(1, length=9, seed=2)], dim=1)
        outputs["continued"] = _generate(model, longer, max_new_tokens=4, past_key_values=first.past_key_values)
    outputs["padded"] = _generate(model, _prompt(3), PADDING, max_new_tokens=20, **cache)
    options = {"num_beams": 3, "num_return_sequences": 3}
    outputs["beams"] = _generate(model, _prompt(2), PADDING[:2], max_new_tokens=10, **options, **cache)
    return outputs


@functools.lru_cache(maxsize=2)
def _expected(model_type: str) -> dict[str, Any]:
    return _runs(build(model_type), cache_implementation="dynamic")


def _fused(model_type: str) -> PreTrainedModel:
    if model_type not in families.ATTENTION_BY_NAME:
        return build(model_type, attn_implementation="kvquant")
    model = build(model_type)
    model.set_attn_implementation("kvquant")
    return model


# How far float32 sums in another order may move a logit, of their spread: 2^-24 a sum, over a few hundred terms and
# some layers. Rounding K and V to 8 bits moves them further, as is held below; tokens are compared exactly.
_ROUNDING = 1e-4


def _parts(cache: Any) -> list[Any]:
    """The caches of self-attention and of cross-attention, if there is such."""
    if isinstance(cache, EncoderDecoderCache):
        return [cache.self_attention_cache, cache.cross_attention_cache]
    return [cache]


def _scale(output: Any) -> float:
    return float(torch.stack(output.logits).std())


@pytest.mark.parametrize("attention", ["kvquant", "own-attention"])
@pytest.mark.parametrize("model_type", TYPES)
def test_unquantized_pages_give_the_same_text(model_type: str, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _expected(model_type)
    tokens = expected["padded"].sequences[:, -20:]
    assert len(set(tokens.flatten().tolist())) > 10, "this model says too little to see a difference"

    model = _fused(model_type) if attention == "kvquant" else build(model_type)
    options = {"kv_cache_dtype": "model", "page_size": PAGE_SIZE}
    over_pages = []

    def watched(module: Any, query: torch.Tensor, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        over_pages.append(isinstance(key, PagedKV) or isinstance(value, PagedKV))
        return kvquant_attention(module, query, key, value, *args, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "kvquant", watched)
    outputs = _runs(model, cache_implementation="kvquant", cache_config=options)

    for way, output in outputs.items():
        assert output.sequences.tolist() == expected[way].sequences.tolist(), way
        for ours, theirs in zip(output.logits, expected[way].logits, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=_ROUNDING * _scale(expected[way]), msg=way)
        caches = _parts(output.past_key_values)
        assert all(isinstance(cache, QuantizedPagedCache) for cache in caches), way
        paged = [layer for cache in caches for layer in cache.layers if isinstance(layer, PagedLayer)]
        assert any(layer.is_initialized for layer in paged) == (model_type not in KEPT_BY_HOST)
        assert all(layer.plan.k.format == layer.plan.v.format == "model" for layer in paged)
        dense = {reason for cache in caches for layer in cache.report().layers for reason in layer.dense}
        if attention == "kvquant" and model_type not in EXPECTED_DENSE:
            assert not dense, way
    could_be_seen = EXPECTED_DENSE.get(model_type) in (None, families.OWN_CODE, families.TAKES_NO_OTHER)
    if attention == "kvquant" and could_be_seen and model_type not in KEPT_BY_HOST:
        assert any(over_pages) == uses_attention_interface(model.config.get_text_config(decoder=True))


@pytest.mark.parametrize(
    "model_type",
    [name for name in ("t5", "gpt_oss", "gemma3n_text", "bamba", "deepseek_v3") if name in available(FAMILIES)],
)
def test_tokens_that_are_all_kept_exactly_give_the_same_text(model_type: str) -> None:
    """Over 8-bit pages, of which then nothing is seen: position biases, sinks, shared keys, states, latents and all."""
    options = {"kv_cache_dtype": "int8", "page_size": PAGE_SIZE, "sink_tokens": 3, "recent_tokens": 200}
    outputs = _runs(_fused(model_type), cache_implementation="kvquant", cache_config=options)
    for way, expected in _expected(model_type).items():
        assert outputs[way].sequences.tolist() == expected.sequences.tolist(), way
        for ours, theirs in zip(outputs[way].logits, expected.logits, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=_ROUNDING * _scale(expected), msg=way)


def _has_prompts_of_ours(given: Any) -> bool:
    """Whether one of `TYPES` is a decoder alone whose attention is ours."""
    model_type = given if isinstance(given, str) else given.values[0]
    others = {*EXPECTED_DENSE, *KEPT_BY_HOST}
    return model_type not in others and not families.config_of(model_type).is_encoder_decoder


@pytest.mark.parametrize("model_type", filter(_has_prompts_of_ours, TYPES))
def test_a_prompt_attends_to_itself_unrounded(model_type: str) -> None:
    """Whatever the format, over pages that grow and over fixed ones."""
    model = _fused(model_type)
    expected = build(model_type)(_prompt(2), **with_cache(DynamicCache(config=model.config))).logits
    for max_cache_len in (None, 32) if model._can_compile_fullgraph else (None,):
        cache = QuantizedPagedCache.from_model(model, kv_cache_dtype="fp8", max_cache_len=max_cache_len)
        got = model(_prompt(2), **with_cache(cache)).logits
        torch.testing.assert_close(got, expected, rtol=0, atol=_ROUNDING * float(expected.std()))


# Where a prompt puts a number on the edge between two codes, the last bit of attention decides and the prompt says
# nothing; one in a hundred does. Another one is asked then.
_SEEDS = (1, 2, 3)


@pytest.mark.parametrize("kv_cache_dtype", ["int8", "fp8"])
@pytest.mark.parametrize("model_type", TYPES)
def test_quantized_pages_lose_what_rounding_loses(
    model_type: str, kv_cache_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the host's cache and attention with K and V rounded through the format on their way into the cache."""
    options = {"kv_cache_dtype": kv_cache_dtype, "page_size": PAGE_SIZE}
    errors = []
    for seed in _SEEDS:
        generate = functools.partial(_generate, input_ids=_prompt(3, seed=seed), num_padding=PADDING, max_new_tokens=3)
        output = generate(_fused(model_type), cache_implementation="kvquant", cache_config=options)
        model = build(model_type)
        exact = generate(model, cache_implementation="dynamic")
        with monkeypatch.context() as patch:
            _round_what_is_stored(patch, _parts(output.past_key_values))
            rounded = generate(model, cache_implementation="dynamic")

        ours, theirs, unrounded = (torch.stack(each.logits) for each in (output, rounded, exact))
        assert ours.isfinite().all()
        # The first token does not see the cache; for the others rounding is to be the only difference.
        torch.testing.assert_close(ours[0], unrounded[0], rtol=0, atol=_ROUNDING * _scale(exact))
        of_rounding = _rms(unrounded[1] - theirs[1])
        assert (of_rounding > _ROUNDING * _scale(exact)) == (model_type not in KEPT_BY_HOST)
        errors.append((_rms(ours[1] - theirs[1]), 0.05 * of_rounding + 1e-5 * _scale(exact)))
        if errors[-1][0] <= errors[-1][1]:
            return
    pytest.fail(f"more than rounding, each with its bound: {errors}")


def _rms(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt())


def _round_what_is_stored(monkeypatch: pytest.MonkeyPatch, ours: list[QuantizedPagedCache]) -> None:
    """Have the host's dynamic caches keep K and V as `ours` would, and return them as they came the first time."""
    update = Cache.update
    seen: list[Cache] = []  # a layer's own attention comes before that over the encoder

    def rounded(x: torch.Tensor, store: Any) -> torch.Tensor:
        paged = store.paged
        dynamic = paged.token_scale is not None
        codes, token_scale, _ = reference.quantize(x, paged.format, paged.scale, paged.zero, dynamic)
        return reference.dequantize(codes, paged.format, paged.scale, paged.zero, token_scale).to(x.dtype)

    def update_rounded(
        self: Cache, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        if not any(cache is self for cache in seen):
            seen.append(self)
        layer = ours[next(index for index, cache in enumerate(seen) if cache is self)].layers[layer_idx]
        if not isinstance(layer, PagedLayer):
            return update(self, key, value, layer_idx, *args, **kwargs)
        is_first = len(self.layers) <= layer_idx or not self.layers[layer_idx].get_seq_length()
        stored = update(self, rounded(key, layer.k), rounded(value, layer.v), layer_idx, *args, **kwargs)
        return (key, value) if is_first else stored

    monkeypatch.setattr(DynamicCache, "update", update_rounded)


@pytest.mark.parametrize("model_type", available(["gemma2", "gpt_oss", "llama"]))
def test_a_prompt_in_a_static_cache_of_transformers(model_type: str) -> None:
    """Behind it is room for later tokens, for which no mask is needed by `sdpa`."""
    expected = build(model_type)(_prompt(2)).logits
    model = _fused(model_type)
    cache = StaticCache(config=model.config, max_cache_len=32)
    got = model(_prompt(2), **with_cache(cache)).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=_ROUNDING * float(expected.std()))


_INDEX = {"index_topk": 4, "index_head_dim": 16, "index_n_heads": 2}
_BLOCKS = {"index_topk_blocks": 1, "index_block_size": 4, "index_local_blocks": 1, "index_head_dim": 16}
_SPARSE: dict[str, dict[str, Any]] = {
    **dict.fromkeys(["axk2", "deepseek_v32", "glm_moe_dsa"], FAMILIES["deepseek_v32"] | _INDEX),
    "hy_v4": _INDEX,
    "minimax_m3_vl_text": _BLOCKS | {"index_n_heads": 2, "layer_types": ["minimax_m3_sparse", "full_attention"]},
}


@pytest.mark.parametrize("model_type", available(_SPARSE))
def test_only_keys_that_an_index_chooses_are_seen(model_type: str) -> None:
    """The model leaves that to all attention but transformers' own."""
    options = {"max_new_tokens": 8, "num_padding": PADDING}
    expected = _generate(build(model_type, _SPARSE[model_type]), _prompt(3), cache_implementation="dynamic", **options)
    model = build(model_type, _SPARSE[model_type], attn_implementation="kvquant")
    for cache in ({"cache_config": {"kv_cache_dtype": "model"}}, {"cache_implementation": "dynamic"}):
        output = _generate(model, _prompt(3), **options, **cache)
        assert output.sequences.tolist() == expected.sequences.tolist()
        for ours, theirs in zip(output.logits, expected.logits, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=_ROUNDING * _scale(expected))


def test_every_model_type_is_tried_or_says_why_not() -> None:
    known = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES}
    tried = FAMILIES.keys() | MORE_FAMILIES.keys()
    assert not known - tried - NOT_TRIED.keys()
    assert not tried & NOT_TRIED.keys()
    assert all(NOT_TRIED.values())
    assert EXPECTED_DENSE.keys() <= tried
    assert tried >= KEPT_BY_HOST


def test_enough_families_are_tried_by_default() -> None:
    assert len(available(FAMILIES)) >= 45


@pytest.mark.parametrize("model_type", available(["gemma4_audio"]))
def test_an_audio_tower_that_computes_attention_itself(model_type: str) -> None:
    """It wants the mask of `eager`, in a family that takes every attention."""
    sizes = {"num_hidden_layers": 1, "attention_chunk_size": 4, "attention_context_left": 5, "output_proj_dims": 64}
    model = AutoModel.from_config(families.config_of(model_type, sizes)).eval()
    features, valid = torch.randn(2, 64, 128), torch.ones(2, 64, dtype=torch.bool)
    valid[0, 40:] = False
    expected = model(features, valid)[0]
    model.set_attn_implementation("kvquant")
    torch.testing.assert_close(model(features, valid)[0], expected)


def test_a_part_that_no_mapping_has() -> None:
    """Its model adds masks, whatever the configuration says."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BlipTextConfig(vocab_size=99, encoder_hidden_size=64, bos_token_id=1, sep_token_id=2, **sizes)
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    mask[0, -5:] = 0

    def logits(attention: str) -> torch.Tensor:
        torch.manual_seed(0)
        model = BlipTextLMHeadModel._from_config(config, attn_implementation=attention).eval()
        assert model.config._attn_implementation == attention
        return model(_prompt(3), attention_mask=mask).logits

    torch.testing.assert_close(logits("kvquant"), logits("eager"))


@pytest.mark.parametrize("attention", ["kvquant", "own-attention"])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_speech_gives_the_same_text(num_beams: int, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whisper has a `generate` of its own, which hands out the cache in pieces of another kind."""
    config = families.config_of("whisper")
    features = torch.randn(2, config.num_mel_bins, 2 * config.max_source_positions)
    updates = []
    update = PagedLayer.update

    def counted(layer: PagedLayer, *args: Any, **kwargs: Any) -> Any:
        updates.append(layer)
        return update(layer, *args, **kwargs)

    monkeypatch.setattr(PagedLayer, "update", counted)

    def text(attn_implementation: str | None = None, **cache: Any) -> list[list[int]]:
        torch.manual_seed(0)
        model = WhisperForConditionalGeneration._from_config(config, attn_implementation=attn_implementation).eval()
        model.generation_config.update(eos_token_id=None, no_timestamps_token_id=98, is_multilingual=False)
        options = {"max_new_tokens": 12, "num_beams": num_beams, "no_repeat_ngram_size": 2, "do_sample": False}
        return model.generate(input_features=features, **options, **cache).tolist()

    expected = text(cache_implementation="dynamic")
    assert len(set(expected[0])) > 4
    assert not updates
    options = {"kv_cache_dtype": "model", "page_size": PAGE_SIZE}
    ours = text("kvquant" if attention == "kvquant" else None, cache_implementation="kvquant", cache_config=options)
    assert ours == expected
    assert updates
    if attention == "kvquant":
        assert not any(layer.dense_reasons for layer in updates)
