"""`q_dtype`: queries rounded to fp8, by whose scales, and where that is not possible."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from helpers import code_value, llama_config, nearest_code, prompt, tiny_llama
from safetensors.torch import save_file
from test_compile import compile_config

from hf_kvquant import KVQuantConfig, LayerScales, QuantizedPagedCache
from hf_kvquant.attention import kvquant_attention
from hf_kvquant.query import round_query

FP8 = {"kv_cache_dtype": "fp8", "q_dtype": "fp8"}


def rounded(x: float, scale: float) -> float:
    """x through the nearest e4m3 number of its scale."""
    return code_value("fp8_e4m3", nearest_code("fp8_e4m3", x / scale)) * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [None, [0.5], [0.25, 1.0, 2.0**-6, 2.0**-3]], ids=["dynamic", "tensor", "head"])
def test_every_number_becomes_the_nearest(scale: list[float] | None, dtype: torch.dtype) -> None:
    """Scales are powers of two here, so that x / scale is exact in any order of operations."""
    query = torch.randn(2, 4, 5, 17).to(dtype)
    query[..., 0] = 7 * 2.0 ** torch.arange(5)  # the largest number of a token: 448 of its scale
    query[..., 1:] = query[..., 1:].clamp(-6, 6)
    query[0, 1, 2, 3] = -1000.0 if scale else 0.0  # does not fit
    query[0, 0, 0, 5] = 0.0
    got = round_query(query, "fp8_e4m3", None if scale is None else torch.tensor(scale), "layer 0")
    assert got.dtype == dtype
    for head in range(4):
        for token in range(5):
            step = 7 * 2.0**token / 448 if scale is None else scale[head % len(scale)]
            expected = [rounded(x, step) for x in query[0, head, token].tolist()]
            assert got[0, head, token].tolist() == expected
    assert not torch.equal(got, query)


@pytest.mark.parametrize("scale", [None, torch.tensor([0.37])], ids=["dynamic", "tensor"])
def test_numbers_that_are_none(scale: torch.Tensor | None) -> None:
    query = torch.randn(1, 3, 4, 15)
    query[0, 0, 0, 3], query[0, 1] = math.nan, 0.0
    got = round_query(query, "fp8_e4m3", scale, "layer 0")
    assert got[0, 0, 0, 3].isnan()
    assert (got[0, 1] == 0).all()
    assert got[0, 0, 1:].isfinite().all()
    assert got[0, 2].isfinite().all()


def test_strides_are_kept_for_compilers() -> None:
    query = torch.randn(2, 5, 4, 16).transpose(1, 2)
    torch.library.opcheck(
        torch.ops.hf_kvquant.round_query.default, (query, "fp8_e4m3", torch.rand(4) + 0.1), test_utils="test_faketensor"
    )


# -- in attention ---------------------------------------------------------------------------------------------------


class Attention(torch.nn.Module):
    """What the host's function asks of a module."""

    is_causal = True

    def __init__(self, num_key_value_groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = num_key_value_groups


def attend(cache: QuantizedPagedCache, layer: int, query: torch.Tensor, num_new: int) -> torch.Tensor:
    """Attention of `query` `[B, Hq, num_new, D]` over what the cache holds and as many new tokens."""
    heads, head_dim = cache.layers[layer].num_heads, query.shape[-1]
    generator = torch.Generator().manual_seed(num_new)
    key, value = torch.randn(2, query.shape[0], heads, num_new, head_dim, generator=generator)
    handles = cache.update(key, value, layer)
    return kvquant_attention(Attention(query.shape[1] // heads), query, *handles, None)[0]


@pytest.mark.parametrize("fixed", [False, True], ids=["growing", "fixed"])
@pytest.mark.parametrize(("group", "head_dim"), [(1, 64), (4, 80), (7, 96)])
@pytest.mark.parametrize("per_head", [False, True], ids=["dynamic", "head"])
def test_attention_is_that_of_the_rounded_query(per_head: bool, group: int, head_dim: int, fixed: bool) -> None:
    """And query heads keep their order: head h has the h-th scale."""
    config = llama_config(hidden_size=32 * group, num_attention_heads=2 * group, head_dim=head_dim)
    config._attn_implementation = "kvquant"
    q_scale = torch.linspace(0.01, 0.2, 2 * group)
    scales: Any = LayerScales(0.02, 0.02, q_scale) if per_head else "dynamic"  # type: ignore[arg-type]
    options = {"scales": scales, "page_size": 5, "max_cache_len": 99 if fixed else None, "kv_cache_dtype": "fp8"}
    with_, without = (QuantizedPagedCache(config, KVQuantConfig(q_dtype=dtype, **options)) for dtype in ("fp8", None))
    past = torch.randn(2, 2, 2, 63, head_dim)
    for cache in (with_, without):
        cache.update(past[0], past[1], 0)
    for num_new in (1, 17):
        query = 3 * torch.randn(2, 2 * group, num_new, head_dim)
        by_hand = round_query(query, "fp8_e4m3", q_scale if per_head else None, "layer 0")
        fork = copy.deepcopy(without)
        got = attend(with_, 0, query, num_new)
        assert torch.equal(got, attend(without, 0, by_hand, num_new))
        assert not torch.equal(got, attend(fork, 0, query, num_new))


def test_a_fresh_prompt_is_attended_to_as_it_is() -> None:
    config = llama_config()
    config._attn_implementation = "kvquant"
    outputs = []
    for dtype in ("fp8", None):
        cache = QuantizedPagedCache(config, KVQuantConfig("fp8", q_dtype=dtype))
        query, key, value = (torch.randn(1, n, 9, 16, generator=torch.Generator().manual_seed(n)) for n in (4, 2, 2))
        outputs.append(kvquant_attention(Attention(2), query, *cache.update(key, value, 0), None)[0])
    assert torch.equal(*outputs)


def generate(model: Any, **options: Any) -> Any:
    return model.generate(
        prompt(), max_new_tokens=14, do_sample=False, return_dict_in_generate=True, output_logits=True, **options
    )


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_compiled_equals_eager(backend: str) -> None:
    model = tiny_llama()
    expected = generate(model, cache_config=FP8)
    plain = generate(model, cache_config={"kv_cache_dtype": "fp8"})
    assert torch.equal(plain.logits[0], expected.logits[0])
    assert not torch.equal(plain.logits[1], expected.logits[1])
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        got = generate(model, cache_config=FP8, compile_config=compile_config(backend))
    assert torch.equal(got.sequences, expected.sequences)
    assert got.past_key_values.is_compileable


# -- whose scales ---------------------------------------------------------------------------------------------------


def queries(cache: QuantizedPagedCache) -> list[tuple[str | None, str]]:
    return [(layer.q_dtype, layer.q_scale) for layer in cache.report().layers]


def checkpoint_of(model: Any, path: Path, q_scale: torch.Tensor | None) -> str:
    """A checkpoint of compressed-tensors with scales for the first layer, per tensor."""
    model.config.quantization_config = {
        "quant_method": "compressed-tensors",
        "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True},
    }
    model.config.save_pretrained(path)
    del model.config.quantization_config
    prefix = "model.layers.0.self_attn"
    tensors = {f"{prefix}.k_scale": torch.tensor([0.05]), f"{prefix}.v_scale": torch.tensor([0.02])}
    if q_scale is not None:
        tensors[f"{prefix}.q_scale"] = q_scale
    save_file(tensors, path / "model.safetensors")
    return str(path)


def test_the_report_names_the_source(tmp_path: Path) -> None:
    model = tiny_llama()
    from_model = QuantizedPagedCache.from_model
    given = LayerScales(torch.ones(1), torch.ones(1), torch.tensor([0.3]))
    assert queries(from_model(model, **FP8)) == [("fp8_e4m3", "dynamic")] * 2
    assert queries(from_model(model, **FP8, scales=given)) == [("fp8_e4m3", "given")] * 2
    assert queries(from_model(model, **FP8, scales={1: given})) == [("fp8_e4m3", "dynamic"), ("fp8_e4m3", "given")]
    values = LayerScales(None, torch.ones(1))
    assert queries(from_model(model, **FP8, scales=[given, values])) == [("fp8_e4m3", "given"), ("fp8_e4m3", "dynamic")]
    assert queries(from_model(model, **FP8, scales="unit")) == [("fp8_e4m3", "unit (1.0)")] * 2
    assert queries(from_model(model, **FP8, skip_layers=0)) == [(None, ""), ("fp8_e4m3", "dynamic")]
    assert queries(from_model(model, kv_cache_dtype="fp8")) == [(None, "")] * 2
    path = checkpoint_of(model, tmp_path, torch.full((4, 1, 1), 0.04))
    cache = from_model(model, q_dtype="fp8", scales=path)  # the format is the checkpoint's
    assert queries(cache) == [("fp8_e4m3", "checkpoint: model.layers.0.self_attn.q_scale"), ("fp8_e4m3", "dynamic")]
    assert "q_scale" in str(cache.report())
    assert any("q_dtype='fp8'" in note for note in cache.report().notes)
    assert "query" not in str(from_model(model, kv_cache_dtype="fp8").report())


def test_a_checkpoints_scales_are_used(tmp_path: Path) -> None:
    model = tiny_llama()
    path = checkpoint_of(model, tmp_path, torch.tensor([0.5]))
    given = {0: LayerScales(0.05, 0.02, 0.5)}  # type: ignore[arg-type]
    runs = [generate(model, cache_config={**FP8, "scales": scales}) for scales in (path, given, "dynamic")]
    assert torch.equal(runs[0].logits[3], runs[1].logits[3])
    assert not torch.equal(runs[0].logits[3], runs[2].logits[3])


def test_scales_without_a_querys_leave_it_dynamic(tmp_path: Path) -> None:
    model = tiny_llama()
    path = checkpoint_of(model, tmp_path, None)
    assert queries(QuantizedPagedCache.from_model(model, **FP8, scales=path)) == [("fp8_e4m3", "dynamic")] * 2


@pytest.mark.parametrize("shape", [(2,), (5,), (4, 16), (4, 1)])
def test_scales_of_another_shape(shape: tuple[int, ...]) -> None:
    scales = LayerScales(torch.ones(1), torch.ones(1), torch.ones(shape))
    with pytest.raises(ValueError, match=r"layer 0: q_scale has shape .*needs \[1\] or \[4\]"):
        generate(tiny_llama(), cache_config={**FP8, "scales": scales})


@pytest.mark.parametrize("fixed", [None, 64])
def test_a_saved_session_keeps_them(fixed: int | None, tmp_path: Path) -> None:
    model = tiny_llama()
    (tmp_path / "checkpoint").mkdir()
    path = checkpoint_of(model, tmp_path / "checkpoint", torch.tensor([0.04, 0.05, 0.06, 1 / 3]))
    options = {"kv_cache_dtype": "auto", "q_dtype": "fp8", "scales": path, "max_cache_len": fixed}
    cache = QuantizedPagedCache.from_model(model, **options)
    model(prompt(), past_key_values=cache)
    cache.save_pretrained(tmp_path)
    loaded = QuantizedPagedCache.from_pretrained(tmp_path, model)
    assert queries(loaded) == queries(cache)
    assert loaded.kvquant.q_dtype == "fp8_e4m3"
    turn = prompt(length=5, seed=3)
    assert torch.equal(*[model(turn, past_key_values=each).logits for each in (cache, loaded)])


# -- where it cannot be ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int8", "fp8_e5m2", "model", "auto", ("int8", "fp8")])
def test_keys_in_another_format(dtype: Any) -> None:
    with pytest.raises(ValueError, match="q_dtype='fp8_e4m3'.*layer 0 stores its keys as .*kv_cache_dtype='fp8'"):
        QuantizedPagedCache.from_model(tiny_llama(), kv_cache_dtype=dtype, q_dtype="fp8")
    pair = ("fp8", "int8")  # values may be in any
    assert QuantizedPagedCache.from_model(tiny_llama(), kv_cache_dtype=pair, q_dtype="fp8").kvquant.q_dtype


@pytest.mark.parametrize("name", ["sdpa", "bloom"])
def test_attention_that_is_not_ours_is_refused_before_anything_is_written(name: str) -> None:
    model = families.build("bloom") if name == "bloom" else tiny_llama()
    model.set_attn_implementation("kvquant" if name == "bloom" else "sdpa")
    cache = QuantizedPagedCache.from_model(model, **FP8)
    with pytest.raises(ValueError, match="layer 0: q_dtype rounds the query inside .*leave q_dtype out"):
        model(prompt(vocab_size=90), past_key_values=cache)
    assert cache.get_seq_length() == 0


def test_layers_that_are_read_dense_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients: attention then takes dense keys, and its query stays as it is."""
    warned: list[str] = []
    monkeypatch.setattr("hf_kvquant.layer_state.logger.warning_once", warned.append)
    model = tiny_llama()
    ids = prompt()
    logits = []
    for options in (FP8, {"kv_cache_dtype": "fp8"}):
        cache = QuantizedPagedCache.from_model(model, **options)
        with torch.no_grad():
            model(ids, past_key_values=cache)
        logits.append(model(ids[:, :3], past_key_values=cache).logits)
    assert torch.equal(*logits)
    assert warned
    assert all("q_dtype has no effect" in message and "gradients" in message for message in warned)


def test_who_asks_is_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    warned: list[str] = []
    monkeypatch.setattr("hf_kvquant.cache.logger.warning_once", warned.append)
    QuantizedPagedCache.from_model(tiny_llama(), kv_cache_dtype="fp8")
    assert not warned
    QuantizedPagedCache.from_model(tiny_llama(), **FP8)
    assert len(warned) == 1
    assert "accuracy" in warned[0]
