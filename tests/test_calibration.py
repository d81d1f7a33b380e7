"""Calibration against scales that are worked out here, from keys and values that are gathered here."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
from helpers import QMAX, code_value, nearest_code, prompt, tiny_llama
from transformers import AttentionInterface, AutoTokenizer, DynamicCache, PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from benchmarks.twins import TWINS
from hf_kvquant import QuantizedPagedCache, calibrate
from hf_kvquant.attention import kvquant_attention

TOKENIZER = Path(__file__).parents[1] / "examples" / "tiny-python-lm"
FP8, INT8 = "fp8_e4m3", "int8"
LENGTHS = (63, 1, 17, 15, 40)

# Batches and padding change in which order a model adds up, by a few roundings a layer.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def ragged(lengths: Iterable[int] = LENGTHS, vocab_size: int = 99) -> list[torch.Tensor]:
    """Sequences of token ids of these lengths."""
    return [prompt(1, length, vocab_size, seed=length)[0] for length in lengths]


@torch.no_grad()
def cached(model: PreTrainedModel, sequences: Iterable[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """For each layer all keys and values `[N, H, D]` of sequences that are read one by one."""
    layers: list[dict[str, list[torch.Tensor]]] = []
    for sequence in sequences:
        cache = DynamicCache(config=model.config)
        model(sequence[None], past_key_values=cache)
        for index, layer in enumerate(cache.layers):
            if index == len(layers):
                layers.append({"k": [], "v": []})
            for side, x in (("k", layer.keys), ("v", layer.values)):
                layers[index][side].append(x[0].transpose(0, 1))
    return [{side: torch.cat(parts) for side, parts in layer.items()} for layer in layers]


def grouped(x: torch.Tensor, granularity: str) -> torch.Tensor:
    """`[N, H, D]` as the numbers of each group, `[groups, numbers]`."""
    num_tokens, num_heads, head_dim = x.shape
    if granularity == "tensor":
        return x.reshape(1, -1)
    by_head = x.permute(1, 2, 0).reshape(num_heads, -1)
    return by_head if granularity == "head" else by_head.reshape(num_heads * head_dim, num_tokens)


def shaped(groups: torch.Tensor, granularity: str, num_heads: int = 2) -> torch.Tensor:
    return groups.reshape(num_heads, -1) if granularity == "channel" else groups


def with_partner(largest: torch.Tensor) -> torch.Tensor:
    """A key's channel i turns with i + D/2: both get what is larger."""
    return torch.maximum(largest, largest.roll(largest.shape[1] // 2, dims=1))


# -- estimators --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("granularity", ["tensor", "head", "channel"])
@pytest.mark.parametrize("name", [FP8, INT8])
def test_absmax(name: str, granularity: str, batch_size: int) -> None:
    model = tiny_llama("sdpa")
    found = calibrate(
        model, ragged(), kv_cache_dtype=name, granularity=granularity, batch_size=batch_size, progress=False
    )
    assert found.kv_cache_dtype == name
    assert found.num_tokens == sum(LENGTHS)
    assert found.notes == []
    assert len(found) == 2
    for scales, layer in zip(found, cached(model, ragged()), strict=True):
        assert scales.k_zero is scales.v_zero is scales.q_scale is None
        for side in "kv":
            largest = shaped(grouped(layer[side], granularity).abs().amax(dim=1), granularity)
            if granularity == "channel" and side == "k":
                largest = with_partner(largest)
            torch.testing.assert_close(getattr(scales, f"{side}_scale"), largest / QMAX[name], **CLOSE)


@pytest.mark.parametrize("granularity", ["tensor", "head", "channel"])
@pytest.mark.parametrize("name", [FP8, INT8])
def test_asymmetric_covers_the_range(name: str, granularity: str) -> None:
    model = tiny_llama("sdpa")
    # A shift of some channels, which symmetric scales would pay for.
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.bias = torch.nn.Parameter(torch.linspace(-6, 9, 32))
    found = calibrate(model, ragged(), kv_cache_dtype=name, granularity=granularity, symmetric=False, progress=False)
    for scales, layer in zip(found, cached(model, ragged()), strict=True):
        for side in "kv":
            scale, zero = (getattr(scales, f"{side}_{part}") for part in ("scale", "zero"))
            groups = grouped(layer[side], granularity)
            low, high = (shaped(bound, granularity) for bound in groups.aminmax(dim=1))
            if side == "k":  # these turn with the position, and stay symmetric
                assert (zero == 0).all()
                high = torch.maximum(-low, high)
                high = with_partner(high) if granularity == "channel" else high
                low = -high
            # The range is covered, and nothing of it wasted but half a step (int8: zeros are whole steps).
            slack = scale * (1 if name == INT8 else 1e-3)
            assert (zero + QMAX[name] * scale >= high - 1e-5).all()
            assert (zero - QMAX[name] * scale <= low + 1e-5).all()
            assert (2 * QMAX[name] * scale <= high - low + 2 * slack).all()
            if name == INT8:
                steps = zero / scale
                # A product and a quotient, each rounded, of at most 2 * QMAX steps.
                atol = 2 * (2 * QMAX[name]) * torch.finfo(torch.float32).eps
                torch.testing.assert_close(steps, steps.round(), rtol=0, atol=atol)
    shifted = calibrate(model, ragged(), kv_cache_dtype=name, granularity=granularity, progress=False)
    assert granularity != "channel" or (found[0].v_scale < 0.9 * shifted[0].v_scale).float().mean() > 0.5


@pytest.mark.parametrize(("model_type", "turning"), [("gpt2", 0), ("gpt_neox", 4), ("deepseek_v3", 16)])
def test_keys_that_do_not_turn_have_zeros(model_type: str, turning: int) -> None:
    """No channel of GPT-2 does, the first 4 of GPT-NeoX, and those of MLA are not known: all may."""
    found = calibrate(families.build(model_type), prompt(), granularity="channel", symmetric=False, progress=False)
    for scales in found:
        assert (scales.k_zero[:, :turning] == 0).all()
        assert (scales.k_zero[:, turning:] != 0).all()
        assert (scales.v_zero != 0).any()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", ["tensor", "head", "channel"])
def test_percentile(granularity: str, symmetric: bool) -> None:
    """With fewer tokens than the sample has room for, the sample is everything."""
    model = tiny_llama("sdpa")
    found = calibrate(
        model, ragged(), granularity=granularity, estimator="percentile", percentile=95, symmetric=symmetric,
        progress=False,
    )  # fmt: skip
    for scales, layer in zip(found, cached(model, ragged()), strict=True):
        groups = grouped(layer["v"], granularity)
        if symmetric:
            bound = groups.abs().sort(dim=1).values[:, math.ceil(0.95 * groups.shape[1]) - 1]
            expected, middle = bound, None
        else:
            ordered = groups.sort(dim=1).values
            last = math.ceil(0.975 * groups.shape[1])
            low, high = ordered[:, groups.shape[1] - last], ordered[:, last - 1]
            expected, middle = (high - low) / 2, (high + low) / 2
        torch.testing.assert_close(scales.v_scale, shaped(expected, granularity) / 448, **CLOSE)
        if middle is not None:
            torch.testing.assert_close(scales.v_zero, shaped(middle, granularity), **CLOSE)


def test_percentile_of_a_long_stream_is_that_of_a_uniform_sample() -> None:
    model = tiny_llama("sdpa", num_hidden_layers=1)
    sequences = [prompt(1, 100, seed=seed)[0] for seed in range(40)]
    found = calibrate(model, sequences, granularity="channel", estimator="percentile", percentile=90, progress=False)
    values = grouped(cached(model, sequences)[0]["v"], "channel").abs()
    assert found.num_tokens == 4000
    shares = (values <= found[0].v_scale.reshape(-1, 1) * 448 * (1 + 1e-5)).float().mean(dim=1)
    # The 90th percentile of 1024 drawn tokens: its rank among all scatters by sqrt(0.9 * 0.1 / 1024), 32 channels.
    assert (shares - 0.9).abs().max() < 5 * math.sqrt(0.9 * 0.1 / 1024)
    assert not torch.equal(shares, shares[:1].expand_as(shares))


def squared_error(x: torch.Tensor, scale: float, name: str) -> float:
    """Of rounding numbers to the nearest code, by the model of the bytes."""
    return sum((code_value(name, nearest_code(name, number / scale)) * scale - number) ** 2 for number in x.tolist())


@pytest.mark.parametrize("name", [FP8, INT8])
def test_mse_is_no_worse_than_any_share_of_the_range(name: str) -> None:
    model = tiny_llama("sdpa", num_hidden_layers=1)
    sequences = ragged((17, 15))
    values = cached(model, sequences)[0]["v"].flatten()
    scale = calibrate(model, sequences, kv_cache_dtype=name, estimator="mse", progress=False)[0].v_scale.item()
    error = squared_error(values, scale, name)
    full = values.abs().max().item() / QMAX[name]
    tried = [squared_error(values, full * share, name) for share in torch.linspace(0.3, 1, 15).tolist()]
    # Between the shares that are searched the error changes little.
    assert error <= min(tried) * 1.02
    assert scale <= full * (1 + 1e-6)


def test_mse_clips_a_lonely_outlier() -> None:
    model = tiny_llama("sdpa", num_hidden_layers=1)
    with torch.no_grad():
        loud = model.model.embed_tokens.weight[98]
        model.model.layers[0].self_attn.v_proj.weight[0] += 2 * loud / loud.norm()
    sequences = [prompt(1, 100, vocab_size=98, seed=seed)[0] for seed in range(10)]
    sequences[0][7] = 98
    values = cached(model, sequences)[0]["v"].flatten()
    largest, second = values.abs().topk(2).values.tolist()
    assert second < 0.75 * largest
    absmax, best = (
        calibrate(model, sequences, kv_cache_dtype=INT8, estimator=name, progress=False)[0].v_scale.item()
        for name in ("absmax", "mse")
    )
    # Of N numbers within the range A, all but one well within it, the best end is A less about N / 127^2 / 12 of it.
    assert absmax * 0.6 < best < absmax * (1 - 0.5 * len(values) / 127**2 / 12)


@pytest.mark.parametrize("name", [FP8, INT8])
@pytest.mark.parametrize("estimator", ["absmax", "percentile", "mse"])
def test_a_quiet_channel_has_room_for_what_its_partner_holds(name: str, estimator: str) -> None:
    """At positions that calibration did not see the two have turned into each other."""
    model = tiny_llama("sdpa", num_hidden_layers=1)
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight[7] *= 20  # the slowest pair is 7 and 15
    tokens = prompt(4, 63)
    found = calibrate(model, tokens, kv_cache_dtype=name, granularity="channel", estimator=estimator, progress=False)
    bound = found[0].k_scale * QMAX[name]
    assert torch.equal(bound, with_partner(bound))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():  # a quarter of a turn later, at 10000 ** -(7 / 8) a position
        model(tokens, position_ids=4967 + torch.arange(63)[None], past_key_values=cache)
    far = cache.layers[0].keys[:, 0, :, 15].abs()
    assert far.amax() > 5 * bound[0, :7].median()
    assert (far > bound[0, 15]).float().mean() < 0.01


# -- what is seen ------------------------------------------------------------------------------------------------------


def left_padded(sequences: list[torch.Tensor], pad: int) -> dict[str, torch.Tensor]:
    length = max(map(len, sequences))
    ids = torch.stack([torch.cat([torch.full((length - len(s),), pad), s]) for s in sequences])
    mask = torch.stack([torch.arange(length) >= length - len(s) for s in sequences])
    return {"input_ids": ids, "attention_mask": mask.long()}


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_padding_does_not_count(granularity: str) -> None:
    model = tiny_llama("sdpa")
    with torch.no_grad():  # whatever a padding token puts into the cache, it would show
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight += model.model.embed_tokens.weight[98].repeat(32, 1)
    sequences = ragged((63, 17, 1))
    alone = calibrate(model, sequences, granularity=granularity, progress=False)
    padded = left_padded(sequences, pad=98)
    together = calibrate(model, [padded], granularity=granularity, progress=False)
    assert together.num_tokens == alone.num_tokens == 81
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one.k_scale, other.k_scale, **CLOSE)
        torch.testing.assert_close(one.v_scale, other.v_scale, **CLOSE)
    counted = calibrate(model, [{"input_ids": padded["input_ids"]}], granularity=granularity, progress=False)
    assert (counted[0].v_scale > alone[0].v_scale * 1.2).any()


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_padding_by_a_mask_of_pairs_does_not_count(dtype: torch.dtype) -> None:
    model = tiny_llama("sdpa")
    padded = left_padded(ragged((63, 17)), pad=98)
    sees = padded["attention_mask"].bool()[:, None, None] & torch.ones(63, 63, dtype=torch.bool).tril()
    mask = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(dtype).min) if dtype.is_floating_point else sees
    pairs = {"input_ids": padded["input_ids"], "attention_mask": mask.to(dtype)}
    expected, found = (calibrate(model, [batch], progress=False) for batch in (padded, pairs))
    assert found.num_tokens == expected.num_tokens == 80
    torch.testing.assert_close(found[0].v_scale, expected[0].v_scale, **CLOSE)
    torch.testing.assert_close(found[0].k_scale, expected[0].k_scale, **CLOSE)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "kvquant"])
@pytest.mark.parametrize("granularity", ["tensor", "head"])
def test_queries(granularity: str, attention: str) -> None:
    model = tiny_llama(attention)
    tokens = prompt(2, 17)
    before = model(tokens).logits
    found = calibrate(model, tokens, granularity=granularity, q_scale=True, progress=False)
    layer = model.model.layers[0]
    with torch.no_grad():
        hidden = layer.input_layernorm(model.model.embed_tokens(tokens))
        query = layer.self_attn.q_proj(hidden).unflatten(2, (4, 16)).transpose(1, 2)
        cos, sin = model.model.rotary_emb(hidden, torch.arange(17)[None])
        query, _ = apply_rotary_pos_emb(query, query, cos, sin)
    largest = query.abs().amax(dim=(0, 2, 3)) if granularity == "head" else query.abs().amax().reshape(1)
    torch.testing.assert_close(found[0].q_scale, largest / 448, **CLOSE)
    assert all(scales.q_scale is not None for scales in found)
    assert model.config._attn_implementation == attention
    assert torch.equal(model(tokens).logits, before)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma3n_text", "gemma4_text", "bart"])
def test_watching_queries_changes_nothing_else(model_type: str) -> None:
    """Windows and padding hide what they hide."""
    model = families.build(model_type)
    tokens = prompt(2, 40, vocab_size=90)
    mask = torch.ones_like(tokens)
    mask[0, :15] = 0
    batch = {"input_ids": tokens, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = prompt(2, 20, vocab_size=90)
    plain, watched = (calibrate(model, [batch], q_scale=q_scale, progress=False) for q_scale in (False, True))
    for one, other in zip(plain, watched, strict=True):
        if one is not None:
            torch.testing.assert_close((one.k_scale, one.v_scale), (other.k_scale, other.v_scale), **CLOSE)


@pytest.mark.parametrize("model_type", ["gemma3n_text", "gemma4_text"])
def test_queries_of_layers_that_use_the_keys_of_others(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They meet the scale of the layer whose keys they meet, and there are more of them than have logits."""
    model = families.build(model_type, attn_implementation="kvquant")
    tokens = prompt(2, 40, vocab_size=90)
    largest: dict[int, float] = {}

    def watched(module: Any, query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        layer = (0, 1, 0, 1)[module.layer_idx]  # of a sliding and a full one, whose keys the other two use
        largest[layer] = max(largest.get(layer, 0.0), query.abs().max().item())
        return kvquant_attention(module, query, key, *args, **kwargs)

    for name, parameter in model.named_parameters():
        if "layers.2.self_attn.q_norm" in name or "layers.3.self_attn.q_norm" in name:
            parameter.data.fill_(4.0)
    monkeypatch.setitem(AttentionInterface._global_mapping, "kvquant", watched)
    model(tokens)
    scales = calibrate(model, tokens, q_scale=True, progress=False)
    assert largest[0] > 8
    for layer in (0, 1):
        torch.testing.assert_close(scales[layer].q_scale.item() * 448, largest[layer], **CLOSE)


def test_queries_of_a_model_that_computes_attention_itself() -> None:
    with pytest.raises(ValueError, match="q_scale=True: this model computes its attention itself"):
        calibrate(families.build("bloom"), prompt(), q_scale=True, progress=False)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"q_scale": True}, {"granularity": "channel", "symmetric": False}])
def test_on_a_gpu(options: dict[str, Any]) -> None:
    model = tiny_llama("sdpa").double()  # so that only the scales themselves are rounded to float32
    eps = torch.finfo(torch.float32).eps
    for estimator in ("absmax", "percentile"):
        expected = calibrate(model.cpu(), ragged(), batch_size=3, estimator=estimator, progress=False, **options)
        found = calibrate(model.cuda(), ragged(), batch_size=3, estimator=estimator, progress=False, **options)
        for one, other in zip(found, expected, strict=True):
            for name in ("k_scale", "v_scale", "q_scale", "v_zero"):
                if getattr(other, name) is not None:
                    # A zero is a middle: it is rounded as its ends are, some 127 steps away.
                    atol = 512 * eps * float(other.v_scale.max()) if name == "v_zero" else 0.0
                    torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=4 * eps, atol=atol)


@pytest.mark.parametrize("what", ["interrupt", "end"])
def test_interrupting_keeps_what_was_seen(what: str, recwarn: pytest.WarningsRecorder) -> None:
    model = tiny_llama("sdpa", attention_dropout=0.5).train()
    frozen = model.model.norm.eval()
    sequences = ragged()

    def stream() -> Iterator[torch.Tensor]:
        yield from sequences[:3]
        if what == "interrupt":
            raise KeyboardInterrupt

    found = calibrate(model, stream(), progress=False)
    expected = calibrate(model, sequences[:3], progress=False)
    assert torch.equal(found[1].k_scale, expected[1].k_scale)
    assert found.num_tokens == 81
    assert any("interrupted after 81 tokens" in note for note in found.notes) == (what == "interrupt")
    assert model.training
    assert [module for module in model.modules() if not module.training] == [frozen]

    def at_once() -> Iterator[torch.Tensor]:
        raise KeyboardInterrupt
        yield

    with pytest.raises((ValueError, KeyboardInterrupt)):
        calibrate(model, at_once(), progress=False)


def test_numbers_that_are_none_are_left_out() -> None:
    model = tiny_llama("sdpa", num_hidden_layers=1)
    sequences = [torch.arange(3, 20), torch.arange(20, 61)]
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = float("nan")  # only in the first, only one token's
    with pytest.warns(UserWarning, match="were NaN or infinite"):
        found = calibrate(model, sequences, progress=False)
    assert found[0].k_scale.isfinite().all()
    assert any("64 numbers" in note for note in found.notes)  # K and V of one token: 2 heads of 16 channels each


def test_a_silent_layer_and_a_silent_head() -> None:
    model = tiny_llama("sdpa")
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.zero_()
        model.model.layers[1].self_attn.v_proj.weight[16:].zero_()
    found = calibrate(model, prompt(), granularity="head", progress=False)
    assert torch.equal(found[0].v_scale, torch.ones(2))
    assert found[1].v_scale[0] == found[1].v_scale[1] > 0
    per_channel = calibrate(model, prompt(), granularity="channel", progress=False)
    assert torch.equal(per_channel[0].v_scale, torch.ones(2, 16))
    # A channel that hardly moved still counts for a 64th of its head's largest.
    spread = per_channel[1].k_scale.amax(dim=1) / per_channel[1].k_scale.amin(dim=1)
    assert (spread <= 64.001).all()


@pytest.mark.parametrize(
    ("twin", "granularity", "crowded"),
    [
        ("plain", "tensor", False),
        ("value_channel", "tensor", True),
        ("value_channel", "head", True),
        ("value_channel", "channel", False),
        ("key_head", "tensor", True),
        ("key_head", "head", False),
    ],
)
def test_a_crowded_scale_is_pointed_out(twin: str, granularity: str, crowded: bool) -> None:
    model = TWINS[twin](tiny_llama("sdpa"))
    expected = pytest.warns(UserWarning, match=r"layers \[0, 1\] have channels or heads more than 16 times as large")
    with expected if crowded else contextlib.nullcontext():
        found = calibrate(model, prompt(), kv_cache_dtype=INT8, granularity=granularity, progress=False)
    assert [note.startswith("layers [0, 1]") for note in found.notes] == [True] * crowded
    # A float keeps its relative precision.
    assert calibrate(model, prompt(), kv_cache_dtype=FP8, granularity=granularity, progress=False).notes == []


# -- using it ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [FP8, INT8])
@pytest.mark.parametrize("options", [{}, {"granularity": "head"}, {"granularity": "channel", "symmetric": False}])
def test_a_calibration_is_what_the_cache_takes(name: str, options: dict[str, Any]) -> None:
    model = tiny_llama()
    tokens = prompt(2, 40)
    found = calibrate(model, tokens, kv_cache_dtype=name, progress=False, **options)
    output = model.generate(
        tokens, max_new_tokens=5, do_sample=False, cache_config={"scales": found}, return_dict_in_generate=True
    )
    report = output.past_key_values.report()
    assert {row.kv_cache_dtype for row in report.layers} == {(name, name)}
    assert {row.scales for row in report.layers} == {("given", "given")}
    other = INT8 if name == FP8 else FP8
    with pytest.raises(ValueError, match=f"calibrated for {name}, not for kv_cache_dtype='{other}'"):
        QuantizedPagedCache.from_model(model, scales=found, kv_cache_dtype=other)
    with pytest.raises(ValueError, match=f"kv_cache_dtype='{other}'.*the name of an attention"):
        QuantizedPagedCache.from_model(tiny_llama(f"kvquant_{other}"), scales=found)


@pytest.mark.parametrize("name", [FP8, INT8])
def test_a_calibration_serves_either_side(name: str) -> None:
    """Of a pair of formats each is its own, or the model's."""
    model = tiny_llama()
    found = calibrate(model, prompt(2, 40), kv_cache_dtype=name, progress=False)
    for formats in ((name, name), (name, "model"), ("model", name)):
        for row in QuantizedPagedCache.from_model(model, scales=found, kv_cache_dtype=formats).report().layers:
            assert row.kv_cache_dtype == formats
            assert row.scales == tuple("given" if each == name else "not quantized" for each in formats)
    for formats in ("model", ("model", "model"), (name, "fp8_e5m2"), ("fp8_e5m2", "model")):
        with pytest.raises(ValueError, match=f"calibrated for {name}, not for"):
            QuantizedPagedCache.from_model(model, scales=found, kv_cache_dtype=formats)


def test_a_calibration_is_of_self_attention() -> None:
    """What the encoder says was not measured, so cross-attention has scales of its own."""
    model = families.build("t5")
    tokens = prompt()
    found = calibrate(model, [{"input_ids": tokens, "decoder_input_ids": tokens}], kv_cache_dtype=INT8, progress=False)
    options = {"cache_implementation": "kvquant", "return_dict_in_generate": True, "max_new_tokens": 4}
    for scales in (found, list(found), found.to_dict(), dict(enumerate(found))):
        given = {"scales": scales, "kv_cache_dtype": INT8}
        report = model.generate(tokens, cache_config=given, **options).past_key_values.report()
        sources = {(row.layer_type, row.scales[0].split(",")[0]) for row in report.layers}
        assert sources == {("full_attention", "given"), ("cross_attention", "dynamic")}


# What differs: windows, softcap, sinks, MLA, layers without keys, position bias, an encoder, vision beside it, layers
# that run several times.
TYPES = (
    "gemma2", "gpt_oss", "deepseek_v3", "bamba", "falcon_h1", "bloom", "gemma4_text", "t5", "qwen2_5_vl", "llama4_text",
    "inkling2_loop_text",
)  # fmt: skip


@pytest.mark.parametrize("model_type", families.available(TYPES))
def test_nothing_that_was_seen_clips(model_type: str) -> None:
    model = families.build(model_type)
    tokens = prompt(2, 21)
    if model.config.is_encoder_decoder:
        batch = {"input_ids": tokens, "decoder_input_ids": prompt(2, 15, seed=3)}
        data: Any = [batch]
    else:
        batch, data = {"input_ids": tokens}, tokens
    found = calibrate(model, data, kv_cache_dtype="int8", progress=False)
    cache = QuantizedPagedCache.from_model(model, scales=found)
    attention = [row.layer for row in cache.report().layers]
    assert found.notes == []
    assert [index for index, scales in enumerate(found) if scales is not None] == attention
    if model.config.is_encoder_decoder:
        return
    with torch.no_grad():
        model(**batch, past_key_values=cache)
    assert {row.clipped for row in cache.report().layers} == {(0, 0)}
    if len(cache.layers) > cache.num_model_layers:  # some share their scales with others
        return
    for layer in cache.layers:  # ... and nothing is much too coarse: some number is near the end of the codes
        for store in (getattr(layer, "k", None), getattr(layer, "v", None)):
            if store is not None and layer.window is None:
                assert (store.paged.pages.int() - 128)[store.paged.pages != 0].abs().max() >= 126


# -- data --------------------------------------------------------------------------------------------------------------

TEXTS = ["def f(x):\n    return x\n", "import os\nprint(os.sep)\n", "class A:\n    pass\n"]
CHATS = [
    [{"role": "user", "content": "import os\n"}, {"role": "assistant", "content": "print(1)\n"}],
    [{"role": "user", "content": "x = 3\n"}, {"role": "assistant", "content": "y = 4\n"}],
]
TEMPLATE = "{% for turn in messages %}{{ '# ' + turn['role'] + '\n' + turn['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_llama("sdpa", vocab_size=1024, num_hidden_layers=1)


@pytest.fixture
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TOKENIZER)


def ids_of(tokenizer: Any, texts: Iterable[str], special: bool = True) -> list[torch.Tensor]:
    return [torch.tensor(tokenizer(text, add_special_tokens=special).input_ids) for text in texts]


def seen(model: PreTrainedModel, data: Any, **options: Any) -> tuple[int, float, float]:
    """What tells one set of tokens from another."""
    found = calibrate(model, data, progress=False, **options)
    return found.num_tokens, found[0].k_scale.item(), found[0].v_scale.item()


def written(directory: Path, name: str, rows: list[Any]) -> Path:
    path = directory / name
    if name.endswith(".jsonl"):
        path.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n")
    else:
        path.write_text(json.dumps(rows) if name.endswith(".json") else "".join(rows))
    return path


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("data.json", lambda text: text),
        ("data.jsonl", lambda text: {"text": text, "id": 7}),
        ("data.jsonl", lambda text: text),
        (None, lambda text: text),
        (None, lambda text: {"prompt": text}),
    ],
)
def test_texts(tmp_path: Path, model: PreTrainedModel, tokenizer: Any, name: str | None, make: Any) -> None:
    expected = seen(model, ids_of(tokenizer, TEXTS))
    rows = [make(text) for text in TEXTS]
    assert seen(model, rows if name is None else written(tmp_path, name, rows), tokenizer=tokenizer) == expected


def test_a_text_file(tmp_path: Path, model: PreTrainedModel, tokenizer: Any) -> None:
    path = written(tmp_path, "data.txt", TEXTS)
    ids = ids_of(tokenizer, ["".join(TEXTS)])
    for source in (path, str(path)):
        assert seen(model, source, tokenizer=tokenizer) == seen(model, ids)
    assert seen(model, path, tokenizer=tokenizer, max_length=5, num_samples=2)[0] == 10
    large = tmp_path / "large.txt"
    large.write_text("x = 1\n" * 30_000)
    assert seen(model, large, tokenizer=tokenizer, max_length=64, num_samples=3)[0] == 192


@pytest.mark.parametrize("field", ["messages", "conversations", None])
def test_conversations(tmp_path: Path, model: PreTrainedModel, tokenizer: Any, field: str | None) -> None:
    tokenizer.chat_template = TEMPLATE
    texts = ["".join(f"# {turn['role']}\n{turn['content']}" for turn in chat) for chat in CHATS]
    expected = seen(model, ids_of(tokenizer, texts, special=False))
    chats: list[Any] = CHATS
    if field == "conversations":  # as data sets of the ShareGPT kind have them
        names = {"user": "human", "assistant": "gpt"}
        chats = [[{"from": names[t["role"]], "value": t["content"]} for t in chat] for chat in CHATS]
    if field is not None:
        path = written(tmp_path, "chats.jsonl", [{field: chat} for chat in chats])
        assert seen(model, path, tokenizer=tokenizer) == expected
    else:
        assert seen(model, chats, tokenizer=tokenizer) == expected
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="conversations need a tokenizer with a chat template"):
        seen(model, CHATS, tokenizer=tokenizer)


def test_token_ids(model: PreTrainedModel) -> None:
    tokens = prompt(4, 15, 1024)
    expected = seen(model, tokens)
    assert expected[0] == 60
    loader = torch.utils.data.DataLoader([{"input_ids": row} for row in tokens], batch_size=3)
    for data in (list(tokens), tokens.tolist(), [{"input_ids": row} for row in tokens.tolist()], loader, [tokens]):
        num_tokens, *scales = seen(model, data)
        assert num_tokens == 60
        assert scales == pytest.approx(list(expected[1:]), rel=1e-4)
    assert seen(model, tokens[0])[0] == 15
    for data in ([{"input_ids": ids} for ids in ([], *tokens.tolist())], [[], *tokens.tolist()]):
        assert seen(model, data) == expected
    assert seen(model, tokens, num_samples=3)[0] == 45
    assert seen(model, loader, num_samples=2)[0] == 45  # batches are taken whole


def test_long_texts_in_pieces(model: PreTrainedModel) -> None:
    tokens = prompt(1, 63, 1024)[0]
    pieces = [tokens[start : start + 20] for start in range(0, 63, 20)]
    assert seen(model, [tokens], max_length=20) == seen(model, pieces)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("org/texts", (("org/texts",), "train")), ("texts:val", (("texts",), "val")), ("a:b:c", (("a", "b"), "c"))],
)
def test_data_sets(
    model: PreTrainedModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, name: str, expected: Any
) -> None:
    asked = []

    def load_dataset(*arguments: str, split: str, streaming: bool) -> list[dict[str, str]]:
        assert streaming
        asked.append((arguments, split))
        return [{"text": text} for text in TEXTS]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert seen(model, name, tokenizer=tokenizer) == seen(model, ids_of(tokenizer, TEXTS))
    assert asked == [expected]


def test_data_that_cannot_be_read(tmp_path: Path, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "x"}\n{"text"')
    deep = tmp_path / "deep.json"
    deep.write_text(100_000 * "[")
    cases: list[tuple[Any, type[Exception], str]] = [
        ("some/texts", ValueError, "pip install datasets"),
        (tmp_path / "none.txt", ValueError, r"none.txt is not a file"),
        (tmp_path, ValueError, "is not a file"),
        ("def f():\n    pass\n", ValueError, r"data is a text itself .18 characters."),
        ("word " * 400, ValueError, "data is a text itself"),
        (broken, ValueError, r"broken.jsonl, line 2: not JSON"),
        ([], ValueError, "data is empty"),
        ([torch.empty(0, dtype=torch.int64)], ValueError, "no token was seen"),
        ([{"question": "?"}], ValueError, "fields question has no text"),
        (
            [{"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.ones(2, 3, 3)}],
            ValueError,
            r"mask of shape \[2, 3, 3\] does not tell",
        ),
        ([[{"speaker": "x", "text": "y"}]], ValueError, "fields speaker, text; it needs role and content, or from and"),
        ([[{"from": "human", "content": "y"}]], ValueError, "fields from, content; it needs role and content"),
        ([{"input_ids": [[3, 4], [5, 6]]}], ValueError, r"input_ids .list. has no tensor of tokens"),
        ([{"input_ids": []}, {"input_ids": []}], ValueError, "no token was seen"),
        ([{"input_ids": [5]}, {"question": "?"}], ValueError, "fields question has no text"),
        (
            [[3, 1023], [3, 1024]],
            ValueError,
            "sample 2 of the data has the token id 1024, but the model's vocabulary has 1,024 tokens",
        ),
        ([{"input_ids": [3, -5, 7]}], ValueError, "sample 1 of the data has the token id -5"),
        (torch.tensor([99_999_999_999]), ValueError, "sample 1 of the data has the token id 99999999999"),
        (deep, ValueError, "deep.json: not JSON"),
        ([1.5, 2.5], TypeError, "type float is neither text"),
        (3, TypeError, "type int"),
        ({"input_ids": torch.ones(1, 2)}, TypeError, "type dict"),
    ]
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    for data, error, message in cases:
        with pytest.raises(error, match=message):
            calibrate(model, data, tokenizer=tokenizer, progress=False)
    with pytest.raises(ValueError, match="text needs a tokenizer, and none is found"):
        calibrate(model, ["text"], progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_cache_dtype": "fp8_e5m2"}, "no static scales; choose fp8 or int8"),
        ({"kv_cache_dtype": "int3"}, "unknown storage format"),
        ({"granularity": "row"}, "granularity='row'; choose one of tensor, head, channel"),
        ({"estimator": "max"}, "estimator='max'; choose one of absmax, percentile, mse"),
        ({"percentile": 99.9999e2}, "percentile="),
        ({"num_samples": 0}, "num_samples=0"),
        ({"max_length": -1}, "max_length=-1"),
        ({"batch_size": 1.5}, "batch_size=1.5"),
        ({"num_samples": True}, "num_samples=True"),
        ({"percentile": "99"}, "percentile='99'"),
        ({"percentile": 99.0}, "percentile=99.0 is for estimator='percentile', not for 'absmax'"),
        ({"symmetric": "no"}, "symmetric='no'; it is True or False"),
        ({"q_scale": 1}, "q_scale=1; it is True or False"),
    ],
)
def test_options_that_do_not_exist(model: PreTrainedModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibrate(model, prompt(), progress=False, **options)


def test_numbers_of_numpy_and_dtypes_of_torch(model: PreTrainedModel) -> None:
    """As the cache takes them."""
    few = {"num_samples": np.int64(1), "max_length": np.int32(7), "batch_size": np.int8(1)}
    found = calibrate(
        model,
        prompt(),
        kv_cache_dtype=torch.int8,
        estimator="percentile",
        percentile=np.float32(99),
        progress=False,
        **few,
    )
    assert found.kv_cache_dtype == INT8
    assert found.num_tokens == 7
    assert json.loads(json.dumps(found.settings))["percentile"] == 99


def test_an_encoder_decoder_needs_both_inputs() -> None:
    with pytest.raises(ValueError, match="decoder_input_ids"):
        calibrate(families.build("t5"), prompt(), progress=False)


def test_a_generation_configuration_keeps_a_calibration(tmp_path: Path) -> None:
    """With the format that it was made for."""
    model = tiny_llama("kvquant")
    calibration = calibrate(model, ragged(), kv_cache_dtype="fp8", granularity="head", progress=False)
    model.generation_config.cache_config = {"scales": calibration, "page_size": 4}
    expected = model.generate(prompt(), max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="kvquant")
    got = loaded.generate(prompt(), max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(got.sequences, expected.sequences)
    for one, other in zip(got.past_key_values.layers, expected.past_key_values.layers, strict=True):
        assert one.plan.k.format == other.plan.k.format == "fp8_e4m3"
        assert torch.equal(one.k.paged.scale, other.k.paged.scale)
