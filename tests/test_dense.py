"""Attention over keys and values as the model made them; on a CPU by the kernels for pages where they are faster."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad

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
        (1, 1250, 1, 7, 64),
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
    dropped = attend(query, key, value, dropout=0.9, module=module(2, training=True))
    assert not calls
    assert not dropped.eq(attend(query, key, value)).all()


@pytest.mark.parametrize("name", ["query", "key", "value", "mask", "position_bias", "s_aux"])
def test_gradients_reach_whatever_takes_part(name: str, calls: list[int]) -> None:
    query, key, value = tensors(1, 20, 2, 2, 64)
    given = {"query": query, "key": key, "value": value}
    given |= {"mask": torch.zeros(1, 4, 20, 20), "position_bias": torch.zeros(1, 4, 20, 20), "s_aux": torch.zeros(4)}
    given = {each: x for each, x in given.items() if each in ("query", "key", "value", name)}
    given[name].requires_grad_()
    attend(**given).square().sum().backward()
    grad = given[name].grad
    assert grad is not None
    assert grad.abs().max() > 0
    assert not calls
    with torch.no_grad():
        attend(**given)
    assert bool(calls) == cpu.outruns_torch(torch.float32)


def test_masks_for_all_queries_or_all_keys_are_left_to_torch(calls: list[int]) -> None:
    given = tensors(2, 20, 2, 2, 64)
    mask = torch.ones(2, 1, 1, 20, dtype=torch.bool)
    mask[0, :, :, :7] = False
    check(attend(*given, mask=mask, module=module(2, is_causal=False)), expected(*given, visible=mask))
    bias = torch.randn(1, 4, 20, 1)  # the same for all keys: nothing changes
    check(attend(*given, position_bias=bias), expected(*given))
    assert not calls


def test_what_is_true_in_a_mask_may_be_any_byte() -> None:
    given = tensors(1, 400, 2, 4, 64)
    ones = torch.ones(1, 1, 400, 400, dtype=torch.bool).tril()
    for byte in (2, 128, 255):
        mask = (ones.to(torch.uint8) * byte).view(torch.bool)
        check(attend(*given, mask=mask), expected(*given))


@pytest.mark.parametrize("change", ["query", "keys", "values", "heads of values", "heads of query"])
def test_what_torch_repeats_is_left_to_torch(change: str, calls: list[int]) -> None:
    """Learned queries, and the like; sdpa takes them."""
    query, key, value = tensors(2, 20, 4, 1, 64)
    given = {
        "query": (query[:1], key, value),
        "keys": (query, key[:1], value[:1]),
        "values": (query, key, value[:1]),
        "heads of values": (query, key, value[:, :1]),
        "heads of query": (query[:, :1], key, value),
    }[change]
    whole = [x.expand(2, 4, 20, 64) for x in given]
    check(attend(*given, module=SimpleNamespace(training=False)), expected(*whole))
    assert not calls


def test_graphs_for_others_hold_torchs_own_operators(calls: list[int]) -> None:
    query, key, value = tensors(2, 8, 4, 1, 16)

    class Attention(torch.nn.Module):
        num_key_value_groups = 1
        is_causal = False

        def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            return attend(query, key, value, module=self)

    layer = Attention().eval()
    everything = torch.ones(8, 8, dtype=torch.bool)
    traced = torch.jit.trace(layer, (query, key, value), check_trace=False)
    for given in ((query, key, value), (key, value, query)):
        check(traced(*given), expected(*given, visible=everything))
    dynamic = {name: {2: torch.export.Dim(name)} for name in ("query", "key")} | {"value": {2: torch.export.Dim("key")}}
    exported = torch.export.export(layer, (query, key, value), dynamic_shapes=dynamic)
    assert "hf_kvquant" not in str(exported.graph)
    check(
        exported.module()(query, key[:, :, :5], value[:, :, :5]),
        expected(query, key[:, :, :5], value[:, :, :5], visible=everything[:, :5]),
    )
    assert not calls


def test_transforms_and_autocast_are_torchs(calls: list[int]) -> None:
    query, key, value = tensors(2, 8, 4, 1, 16)
    several = torch.stack([query, -query, key])
    mapped = torch.vmap(lambda x: attend(x, key, value))(several)
    for got, x in zip(mapped, several, strict=True):
        check(got.contiguous(), expected(x, key, value))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attend(query, key, value).dtype == torch.bfloat16
    with forward_ad.dual_level(), contextlib.suppress(NotImplementedError):  # of torch's fast attention
        got = attend(forward_ad.make_dual(query, key), key, value)
        assert forward_ad.unpack_dual(got).tangent is not None
    assert not calls


def test_fewer_queries_than_keys_are_the_last(calls: list[int]) -> None:
    """Without a mask; the triangle of torch begins with the first key. With softcap and sinks as well."""
    query, key, value = tensors(1, 20, 2, 2, 64)
    query = query[:, :, :5].contiguous()
    causal = torch.ones(5, 20, dtype=torch.bool).tril(15)
    check(attend(query, key, value), expected(query, key, value, visible=causal))
    check(attend(query, key, value, softcap=2.0), expected(query, key, value, visible=causal, softcap=2.0))
    assert not calls


def test_chosen_keys() -> None:
    """Beside causality, which a mask says or its absence; blocks that nobody can tell are refused."""
    query, key, value = tensors(2, 9, 2, 2, 64)
    indices = torch.randint(9, (2, 9, 3), generator=torch.Generator().manual_seed(0))
    indices[..., 0] = 0
    visible = torch.zeros(2, 9, 9, dtype=torch.bool).scatter(-1, indices, True)[:, None].tril()
    for mask in (None, torch.ones(9, 9, dtype=torch.bool).tril().expand(2, 1, 9, 9)):
        check(attend(query, key, value, mask=mask, indices=indices), expected(query, key, value, visible=visible))
    with pytest.raises(ValueError, match="chooses blocks of keys"):
        attend(query, key, value, block_indices=indices)


def test_only_kernels_for_wide_vectors_are_taken_to_be_faster() -> None:
    for path in cpu.paths():
        try:
            cpu.use(path)
        except BuildError:
            continue
        assert cpu.outruns_torch(torch.float32) == path.startswith("avx")
        assert path.startswith("avx") or not (cpu.outruns_torch(torch.bfloat16) or cpu.outruns_torch(torch.float16))
        assert not cpu.outruns_torch(torch.float64)


def test_mixed_dtypes_are_refused_as_torch_does() -> None:
    query, key, value = tensors(1, 20, 2, 2, 64)
    with pytest.raises(RuntimeError, match="dtype"):
        attend(query, key.bfloat16(), value.bfloat16())


def test_another_default_device_changes_nothing() -> None:
    given = tensors(2, 33, 2, 2, 64)
    with torch.device("meta"):
        got = attend(*given)
    check(got, expected(*given))


@pytest.mark.parametrize("num_tokens", [255, 256, 257, 600])
def test_weights_in_blocks_are_the_weights(num_tokens: int) -> None:
    """Softcap and sinks over a long prompt, in plain torch: queries come block by block, and none is left out."""
    query, key, value = tensors(1, num_tokens, 2, 2, 16, torch.float64)
    mask = torch.rand(1, 1, num_tokens, num_tokens) < 0.7
    mask |= torch.eye(num_tokens, dtype=torch.bool)
    causal = torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril()[None, None]
    for sinks in (torch.randn(4), torch.randn(1, 4, num_tokens, 1, dtype=torch.float64)):
        for shown in (mask, mask.expand(1, 4, -1, -1), None):
            output = attend(query, key, value, mask=shown, scaling=0.25, softcap=3.0, s_aux=sinks)
            whole = reference.attend(query, key, value, 0.25, 3.0, None, causal if shown is None else shown, sinks)
            torch.testing.assert_close(output, whole.transpose(1, 2), rtol=1e-12, atol=1e-12)
