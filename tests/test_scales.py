"""`LayerScales`: what it accepts and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch

from hf_kvquant import LayerScales, QuantizedPagedCache
from hf_kvquant.scales import as_head_channel, granularity_of

FIELDS = ("k_scale", "v_scale", "q_scale", "k_zero", "v_zero")
SHAPES = {"tensor": (1,), "head": (4,), "channel": (4, 8)}


def _with(**values: object) -> LayerScales:
    return LayerScales(**{"k_scale": torch.ones(1), "v_scale": torch.ones(1), **values})  # type: ignore[arg-type]


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_not_finite(field: str, bad: float, shape: tuple[int, ...]) -> None:
    value = torch.ones(shape)
    value.view(-1)[-1] = bad
    with pytest.raises(ValueError, match=f"{field} holds NaN or infinite values"):
        _with(**{field: value})


@pytest.mark.parametrize("field", FIELDS[:3])
@pytest.mark.parametrize("bad", [0.0, -0.0, -1.5])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_not_positive(field: str, bad: float, shape: tuple[int, ...]) -> None:
    value = torch.ones(shape)
    value.view(-1)[0] = bad
    with pytest.raises(ValueError, match=f"{field} holds a value of .*must be positive"):
        _with(**{field: value})


@pytest.mark.parametrize("value", [0.0, -3.0])
def test_a_zero_point_may_be_any_finite_number(value: float) -> None:
    assert _with(k_zero=torch.tensor([value])).k_zero.item() == value  # type: ignore[union-attr]


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("shape", [(4, 1, 8), (1, 1, 1, 1), (0,), (4, 0)])
def test_wrong_rank(field: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=field) as error:
        _with(**{field: torch.ones(shape)})
    assert str(list(shape)) in str(error.value)
    assert "[num_kv_heads, head_dim]" in str(error.value)


def test_needs_one_side() -> None:
    with pytest.raises(ValueError, match="needs k_scale or v_scale"):
        LayerScales(None, None)


@pytest.mark.parametrize(("field", "needed"), [("k_zero", "k_scale"), ("v_zero", "v_scale"), ("q_scale", "k_scale")])
def test_what_means_nothing_without_a_scale(field: str, needed: str) -> None:
    with pytest.raises(ValueError, match=f"has {field}, but no {needed}"):
        _with(**{field: torch.ones(1), needed: None})


@pytest.mark.parametrize("missing", ["k", "v"])
@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_a_side_without_a_scale_is_dynamic(name: str, missing: str) -> None:
    """Bit for bit what a cache with dynamic scales stores, beside what one with both scales does."""
    from helpers import llama_config

    from hf_kvquant import KVQuantConfig

    one_side = _with(**{f"{missing}_scale": None})
    caches = [
        QuantizedPagedCache(llama_config(), KVQuantConfig(name, scales=scales))
        for scales in (one_side, _with(), "dynamic")
    ]
    for cache in caches:
        generator = torch.Generator().manual_seed(0)
        for length in (19, 1):
            for index in range(2):
                cache.update(*torch.randn(2, 2, 2, length, 16, generator=generator), index)
    for mixed, static, dynamic in zip(*(cache.layers for cache in caches), strict=True):
        for side, stored in (("k", "keys"), ("v", "values")):
            same, other = (dynamic, static) if side == missing else (static, dynamic)
            assert torch.equal(getattr(mixed, stored), getattr(same, stored))
            assert not torch.equal(getattr(mixed, stored), getattr(other, stored))


def test_numbers_and_other_dtypes_become_fp32() -> None:
    scales = LayerScales(0.5, torch.tensor(2.0, dtype=torch.bfloat16), k_zero=torch.ones(4, dtype=torch.float64))  # type: ignore[arg-type]
    assert scales.k_scale.tolist() == [0.5]
    assert scales.v_scale.tolist() == [2.0]
    assert {t.dtype for t in (scales.k_scale, scales.v_scale, scales.k_zero)} == {torch.float32}  # type: ignore[union-attr]


def test_a_number_that_fp32_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="k_scale"):
        _with(k_scale=torch.tensor([1e60], dtype=torch.float64))
    with pytest.raises(ValueError, match="k_scale"):
        _with(k_scale=torch.tensor([1e-60], dtype=torch.float64))


def test_holds_no_graph() -> None:
    parameter = torch.ones(4, requires_grad=True)
    assert not _with(k_scale=parameter * 2).k_scale.requires_grad


@pytest.mark.parametrize("shape", SHAPES)
def test_granularity(shape: str) -> None:
    assert granularity_of(torch.ones(SHAPES[shape])) == shape


def test_as_head_channel() -> None:
    assert as_head_channel(torch.ones(1), 4, 8, "k").shape == (1, 1)
    assert as_head_channel(torch.ones(4), 4, 8, "k").shape == (4, 1)
    assert as_head_channel(torch.ones(4, 8), 4, 8, "k").shape == (4, 8)


@pytest.mark.parametrize("shape", [(2,), (8,), (2, 8), (4, 4), (8, 4), (4, 1), (1, 8), (1, 1)])
def test_scales_of_another_shape_name_layer_and_field(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"layer 3: v_scale has shape .* made for another model") as error:
        as_head_channel(torch.ones(shape), 4, 8, "layer 3: v_scale")
    assert str(list(shape)) in str(error.value)
    assert "[4, 8]" in str(error.value)


@pytest.mark.parametrize("field", ["k_scale", "v_scale", "k_zero", "v_zero"])
def test_the_cache_refuses_scales_of_another_model_and_stays_usable(field: str) -> None:
    from helpers import llama_config

    from hf_kvquant import KVQuantConfig

    good, bad = _with(), _with(**{field: torch.ones(3)})
    cache = QuantizedPagedCache(llama_config(), KVQuantConfig("int8", scales=[good, bad]))
    key = torch.randn(1, 2, 5, 16)
    cache.update(key, key, 0)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"layer 1: {field} has shape"):
            cache.update(key, key, 1)
