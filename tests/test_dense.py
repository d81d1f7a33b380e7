"""Attention over keys and values as the model made them; on a CPU by the kernels for pages where they are faster."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import hf_kvquant.dense
from hf_kvquant.attention import kvquant_attention
from hf_kvquant.ops import cpu, reference
from hf_kvquant.ops.cpu.build import BuildError

LOWEST = torch.finfo(torch.float32).min


@pytest.fixture(autouse=True)
def _back_to_the_fastest() -> Iterator[None]:
    yield
    cpu.use()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens the kernels attended from, call by call."""
    seen: list[int] = []
    attend = hf_kvquant.dense.paged_attention

    def spy(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(query.shape[2])
        return attend(query, *args, **kwargs)

    monkeypatch.setattr(hf_kvquant.dense, "paged_attention", spy)
    return seen


def tensors(
    batch: int, tokens: int, heads: int, group: int, dim: int, dtype: torch.dtype = torch.float32, v_dim: int = 0
) -> list[torch.Tensor]:
    """Query, key and value as projections give them: tokens before heads in memory."""
    generator = torch.Generator().manual_seed(tokens + dim)
    shapes = ((heads * group, dim), (heads, dim), (heads, v_dim or dim))
    return [torch.randn(batch, tokens, *shape, generator=generator).to(dtype).transpose(1, 2) for shape in shapes]


def module(group: int, *, is_causal: bool = True, training: bool = False) -> Any:
    return SimpleNamespace(num_key_value_groups=group, is_causal=is_causal, training=training)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
    owner = options.pop("module", None) or module(query.shape[1] // key.shape[1])
    return kvquant_attention(owner, query, key, value, options.pop("mask", None), **options)[0]


def expected(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, visible: torch.Tensor | None = None, **options: Any
) -> torch.Tensor:
    """In float64, `[B, T, Hq, D]`; causal without `visible`."""
    if visible is None:
        visible = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
    scale = query.shape[3] ** -0.5
    output = reference.attend(query.double(), key.double(), value.double(), scale, visible=visible, **options)
    return output.transpose(1, 2)


def check(got: torch.Tensor, wanted: torch.Tensor) -> None:
    # fp32 sums of some hundred terms; 16 bits: the output is rounded to them once.
    rounding = 1e-5 if got.dtype == torch.float32 else torch.finfo(got.dtype).eps
    assert got.is_contiguous()
    assert (got.double() - wanted).abs().max() <= rounding * wanted.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "group", "dim"),
    [
        (1, 1, 2, 4, 64),
        (2, 15, 2, 1, 80),
        (1, 17, 3, 7, 96),
        (3, 63, 1, 4, 128),
        (1, 1000, 1, 4, 64),
        (1, 300, 2, 1, 256),
    ],
)
def test_a_prompt(
    batch: int, tokens: int, heads: int, group: int, dim: int, dtype: torch.dtype, calls: list[int]
) -> None:
    given = tensors(batch, tokens, heads, group, dim, dtype)
    if dtype != torch.float32 and not cpu.outruns_torch(dtype):
        pytest.skip("torch attends in 16 bits here")
    check(attend(*given), expected(*given))
    assert calls == ([tokens] if cpu.outruns_torch(dtype) and tokens > 1 else [])


def masks(tokens: int) -> dict[str, torch.Tensor]:
    """bool `[B, 1, T, L]`; with much that no query of a block sees."""
    causal = torch.ones(2, 1, tokens, tokens, dtype=torch.bool).tril()
    padded = causal.clone()
    padded[0, :, :, : tokens // 2] = False  # the first queries see nothing at all
    window = causal & ~causal.tril(-tokens // 8)
    blocks = torch.arange(tokens) // 40
    return {"causal": causal, "padded": padded, "window": window, "blocks": (blocks[:, None] == blocks)[None, None]}


@pytest.mark.parametrize("path", cpu.paths())
@pytest.mark.parametrize("tokens", [17, 400])
@pytest.mark.parametrize("form", ["bool", "float", "lowest"])
@pytest.mark.parametrize("name", masks(1))
def test_masks(name: str, form: str, tokens: int, path: str, calls: list[int]) -> None:
    try:
        cpu.use(path)
    except BuildError as error:
        pytest.skip(str(error))
    given = tensors(2, tokens, 2, 4, 64)
    visible = masks(tokens)[name]
    mask = visible
    if form != "bool":
        mask = torch.zeros(visible.shape).masked_fill(~visible, -torch.inf if form == "float" else LOWEST)
    seen = visible.any(dim=-1)[:, 0].expand(2, -1)
    check(attend(*given, mask=mask)[seen].contiguous(), expected(*given, visible=visible)[seen])
    assert bool(calls) == cpu.outruns_torch(torch.float32)


@pytest.mark.parametrize("mask", [None, "padded"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_position_bias(is_causal: bool, mask: str | None, calls: list[int]) -> None:
    """It is no mask: causality stays what it was without it."""
    given = tensors(2, 33, 2, 2, 64)
    bias = torch.randn(1, 4, 33, 33)
    visible = torch.ones(1, 1, 33, 33, dtype=torch.bool)
    given_mask = None
    if mask is not None:
        given_mask = visible = masks(33)[mask]
    elif is_causal:
        visible = visible.tril()
    got = attend(*given, mask=given_mask, position_bias=bias, module=module(2, is_causal=is_causal))
    seen = visible.any(dim=-1)[:, 0].expand(2, -1)
    check(got[seen].contiguous(), expected(*given, visible=visible, mask=bias.double())[seen])
    assert bool(calls) == cpu.outruns_torch(torch.float32)


def test_softcap_sinks_and_values_of_another_size(calls: list[int]) -> None:
    given = tensors(2, 150, 2, 4, 96, v_dim=64)
    sinks = torch.randn(8)
    check(attend(*given, softcap=2.0, s_aux=sinks), expected(*given, softcap=2.0, sinks=sinks))
    assert bool(calls) == cpu.outruns_torch(torch.float32)


def test_all_queries_see_all_keys_of_an_encoder(calls: list[int]) -> None:
    given = tensors(1, 140, 2, 1, 64)
    everything = torch.ones(140, 140, dtype=torch.bool)
    check(attend(*given, module=module(1, is_causal=False)), expected(*given, visible=everything))
    assert bool(calls) == cpu.outruns_torch(torch.float32)


def test_what_the_kernels_cannot_do_is_left_to_torch(calls: list[int]) -> None:
    query, key, value = tensors(1, 20, 2, 2, 64)
    later = attend(query[:, :, -3:], key, value, mask=torch.ones(1, 1, 3, 20, dtype=torch.bool).tril(17))
    check(later, expected(query, key, value)[:, -3:])
    doubles = [x.double() for x in (query, key, value)]
    torch.testing.assert_close(attend(*doubles), expected(*doubles))
    by_token = torch.randn(1, 4, 20, 1)
    check(attend(query, key, value, sinks=by_token), expected(query, key, value, sinks=by_token.double()))
    assert (
        not attend(query, key, value, dropout=0.9, module=module(2, training=True)).eq(attend(query, key, value)).all()
    )
    assert calls == ([20] if cpu.outruns_torch(torch.float32) else [])  # the last one, without dropout

    calls.clear()
    attend(query, key.requires_grad_(), value).sum().backward()
    assert key.grad is not None
    assert not calls
    with torch.no_grad():
        attend(query, key, value)
    assert bool(calls) == cpu.outruns_torch(torch.float32)


def test_a_padding_mask_for_all_queries_is_left_to_torch(calls: list[int]) -> None:
    given = tensors(2, 20, 2, 2, 64)
    mask = torch.ones(2, 1, 1, 20, dtype=torch.bool)
    mask[0, :, :, :7] = False
    check(attend(*given, mask=mask, module=module(2, is_causal=False)), expected(*given, visible=mask))
    assert not calls
