"""The two operators: bytes against a slow model of one number at a time, attention against float64."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from helpers import FP8_LAYOUT, NAN_BYTE, QMAX, QUANTIZED, code_value, nearest_code

from hf_kvquant.formats import get_format
from hf_kvquant.ops import PagedTensor, check_page_table, others, paged_attention, read_pages, reference, write_kv

CLIP_LIMIT = {"fp8_e4m3": 464.0, "fp8_e5m2": 61440.0, "int8": 127.5}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

# How K or V is scaled: static per tensor, head, channel, with zeros, and dynamic with or without equalized channels.
KINDS = ("unit", "tensor", "head", "channel", "zero_tensor", "zero_channel", "dynamic", "equalized")


def random_scales(rng: np.random.Generator, kind: str, num_heads: int, head_dim: int, size: float) -> dict[str, Any]:
    """`scale` and `zero` of a PagedTensor; scales lie within a factor two of `size`."""
    shapes = {
        "tensor": (1, 1),
        "head": (num_heads, 1),
        "channel": (num_heads, head_dim),
        "equalized": (num_heads, head_dim),
    }
    if kind in ("unit", "dynamic"):
        return {}
    shape = shapes[kind.removeprefix("zero_")]
    sizes = size * 2.0 ** rng.uniform(-1, 1, shape)
    if kind == "equalized":
        sizes = 2.0 ** rng.uniform(-4, 0, shape)
    result = {"scale": torch.tensor(sizes, dtype=torch.float32)}
    if kind.startswith("zero_"):
        result["zero"] = torch.tensor(rng.normal(0, 0.3, shape), dtype=torch.float32)
    return result


# -- bytes ---------------------------------------------------------------------------------------------------------


def bf16_not_below(x: np.float32) -> np.float32:
    """The smallest bfloat16 >= x, by trying the neighbours."""
    if not np.isfinite(x):
        return x
    bits = int(np.array(x, dtype=np.float32).view(np.uint32)) >> 16
    for candidate in (bits, bits + 1):
        value = np.array(candidate << 16, dtype=np.uint32).view(np.float32)[()]
        if value >= x:
            return value
    raise AssertionError(x)


def model_of_bytes(
    x: torch.Tensor, name: str, scale: torch.Tensor | None, zero: torch.Tensor | None, dynamic: bool
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Codes, token scales and clipped numbers, one rounding an operation."""
    numbers = x.to(torch.float32).numpy()
    batch_size, num_heads, num_tokens, head_dim = numbers.shape
    one = np.float32(1)
    codes = np.zeros(numbers.shape, dtype=np.uint8)
    token_scales = np.ones(numbers.shape[:3], dtype=np.float32)
    num_clipped = 0
    scales = None if scale is None else scale.expand(num_heads, head_dim).numpy()
    zeros = None if zero is None else zero.expand(num_heads, head_dim).numpy()
    for b, h, t in itertools.product(range(batch_size), range(num_heads), range(num_tokens)):
        token = [numbers[b, h, t, d] for d in range(head_dim)]
        if zeros is not None:
            token = [np.float32(y - zeros[h, d]) for d, y in enumerate(token)]
        if scales is not None:
            token = [np.float32(y * np.float32(one / scales[h, d])) for d, y in enumerate(token)]
        if dynamic:
            largest = np.max(np.abs(np.array(token, dtype=np.float32)))  # NaN if there is one
            fitting = np.float32(largest * np.float32(1 / QMAX[name]))
            fitting = max(fitting, np.float32(2.0**-100)) if np.isfinite(largest) else np.float32(np.nan)
            token_scales[b, h, t] = bf16_not_below(fitting)
            token = [np.float32(y * np.float32(one / token_scales[b, h, t])) for y in token]
        codes[b, h, t] = [nearest_code(name, float(y)) for y in token]
        num_clipped += sum(not abs(float(y)) <= CLIP_LIMIT[name] for y in token)  # NaN counts
    return torch.from_numpy(codes), torch.from_numpy(token_scales), num_clipped


def difficult_numbers(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype, size: float
) -> torch.Tensor:
    """Normal numbers, and tokens with an outlier, zeros, a constant, NaN, infinity, and numbers near underflow."""
    x = torch.tensor(rng.normal(0, size, shape), dtype=torch.float32)
    x[0, :, 0] *= 1e-6
    x[0, 0, 0, 0], x[0, -1, 0, -1] = 900.0, -900.0  # outliers, clipped under static scales
    x[0, :, 1] = 0.0
    x[0, :, 1, ::2] = -0.0
    x[0, :, 2] = size / 3
    x[-1, 0, 0, 1] = math.nan
    x[-1, 0, 1, 2] = math.inf
    x[-1, -1, 1, 3] = -math.inf
    x[-1, :, 2] *= 1e-35 if dtype != torch.float16 else 1e-5
    return x.to(dtype)


def empty_side(name: str, pool_size: int, num_heads: int, page_size: int, head_dim: int, **fields: Any) -> PagedTensor:
    dtype = get_format(name).storage_dtype or fields.pop("dtype", torch.float32)
    fields.pop("dtype", None)
    dynamic = fields.pop("dynamic", False)
    return PagedTensor(
        pages=torch.zeros(pool_size, num_heads, page_size, head_dim, dtype=dtype),
        format=name,
        token_scale=torch.zeros(pool_size, num_heads, page_size, dtype=torch.bfloat16) if dynamic else None,
        **fields,
    )


def on(side: PagedTensor, device: str) -> PagedTensor:
    tensors = {name: tensor for name, tensor in vars(side).items() if isinstance(tensor, torch.Tensor)}
    return dataclasses.replace(side, **{name: tensor.to(device) for name, tensor in tensors.items()})


def stored_tokens(
    store: torch.Tensor, page_table: torch.Tensor, seq_lens: torch.Tensor, num_tokens: int
) -> torch.Tensor:
    """What lies where the newest tokens should be, `[B, H, T, ...]`."""
    page_size, num_columns = store.shape[2], page_table.shape[1]
    rows = []
    for row, length in zip(page_table.tolist(), seq_lens.tolist(), strict=True):
        positions = range(length - num_tokens, length)
        rows.append(
            torch.stack([store[row[(p // page_size) % num_columns], :, p % page_size] for p in positions], dim=1)
        )
    return torch.stack(rows)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # infinity times zero is NaN, as it should be
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", QUANTIZED)
def test_written_bytes(name: str, kind: str, dtype: torch.dtype, device: str) -> None:
    rng = np.random.default_rng([QUANTIZED.index(name), KINDS.index(kind)])
    num_tokens, page_size = 5, 4
    page_table = torch.tensor([[5, 0, 3], [1, 4, 2]], dtype=torch.int32)
    seq_lens = torch.tensor([11, 6], dtype=torch.int32)
    dynamic = kind in ("dynamic", "equalized")
    size = 3.0 / QMAX[name]
    sides, given = [], []
    for head_dim in (8, 6):
        fields = random_scales(rng, kind, 2, head_dim, size)
        sides.append(on(empty_side(name, 6, 2, page_size, head_dim, dynamic=dynamic, **fields), device))
        given.append(
            difficult_numbers(rng, (2, 2, num_tokens, head_dim), dtype, QMAX[name] / 3 if kind == "unit" else 1.0)
        )
    clipped = torch.tensor([100, 200], device=device)
    write_kv(given[0].to(device), given[1].to(device), *sides, page_table.to(device), seq_lens.to(device), clipped)

    num_clipped = []
    for side, x in zip((on(side, "cpu") for side in sides), given, strict=True):
        codes, token_scales, count = model_of_bytes(x, name, side.scale, side.zero, dynamic)
        assert torch.equal(stored_tokens(side.pages, page_table, seq_lens, num_tokens), codes)
        if dynamic:
            assert side.token_scale is not None
            written = stored_tokens(side.token_scale, page_table, seq_lens, num_tokens).to(torch.float32)
            torch.testing.assert_close(written, token_scales, rtol=0, atol=0, equal_nan=True)
        num_clipped.append(count)
        # Nothing else was touched.
        assert int((side.pages != 0).any(dim=(1, 3)).sum()) <= 2 * num_tokens
    assert dynamic or min(num_clipped) > 0
    # Dynamic scales fit whatever comes; only static ones clip.
    assert (clipped.cpu() - torch.tensor([100, 200])).tolist() == ([0, 0] if dynamic else num_clipped)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["channel", "equalized"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_written_bytes_beside_ties(name: str, kind: str, device: str) -> None:
    """Halfway between two codes the last bit of each operation decides, so every one has to be as specified."""
    rng = np.random.default_rng(0)
    dynamic, num_tokens = kind == "equalized", 8
    values = np.array([code_value(name, code) for code in range(256)])
    values = np.sort(values[np.isfinite(values)])
    ties = (values[1:] + values[:-1]) / 2
    codes = np.resize(ties[rng.permutation(len(ties))], (1, 2, num_tokens, 64))
    fields = random_scales(rng, kind, 2, 64, 3.0 / QMAX[name])
    unit = fields["scale"].numpy().astype(np.float64)[:, None]
    if dynamic:
        codes[..., 0] = QMAX[name]
        unit = unit * (1 + rng.integers(0, 128, (1, 2, num_tokens, 1)) / 128)  # the token scales that will be found
    x = torch.tensor(codes * unit, dtype=torch.float32)
    k, v = (on(empty_side(name, 2, 2, 4, 64, dynamic=dynamic, **fields), device) for _ in range(2))
    tables = torch.tensor([[1, 0]], dtype=torch.int32), torch.tensor([num_tokens], dtype=torch.int32)
    write_kv(x.to(device), x.to(device), k, v, *(table.to(device) for table in tables))
    expected, token_scales, _ = model_of_bytes(x, name, fields["scale"], None, dynamic)
    assert torch.equal(stored_tokens(k.pages.cpu(), *tables, num_tokens), expected)
    if k.token_scale is not None:
        assert torch.equal(stored_tokens(k.token_scale.cpu(), *tables, num_tokens).float(), token_scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_model_format_stores_the_numbers(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    key, value = (difficult_numbers(rng, (2, 2, 5, 8), dtype, 1.0) for _ in range(2))
    k, v = (empty_side("model", 6, 2, 4, 8, dtype=dtype) for _ in range(2))
    page_table = torch.tensor([[5, 0, 3], [1, 4, 2]], dtype=torch.int32)
    seq_lens = torch.tensor([11, 6], dtype=torch.int32)
    write_kv(key, value, k, v, page_table, seq_lens)
    for side, x in ((k, key), (v, value)):
        written = stored_tokens(side.pages, page_table, seq_lens, 5)
        torch.testing.assert_close(written, x, rtol=0, atol=0, equal_nan=True)


def test_a_write_touches_its_own_slots_only() -> None:
    pages = torch.arange(6 * 2 * 4 * 8, dtype=torch.int32).to(torch.uint8).view(6, 2, 4, 8)
    k, v = (PagedTensor(pages.clone(), "int8", torch.ones(1, 1)) for _ in range(2))
    page_table = torch.tensor([[5, 0, 3], [1, 4, 2]], dtype=torch.int32)
    write_kv(
        torch.zeros(2, 2, 1, 8), torch.ones(2, 2, 1, 8), k, v, page_table, torch.tensor([5, 12], dtype=torch.int32)
    )
    for side, code in ((k, 128), (v, 129)):
        expected = pages.clone()
        expected[0, :, 0] = code  # token 4 of the first sequence: second page, slot 0
        expected[2, :, 3] = code  # token 11 of the second: third page, slot 3
        assert torch.equal(side.pages, expected)


def test_a_ring_writes_over_its_oldest_page() -> None:
    k, v = (empty_side("int8", 3, 1, 2, 4, scale=torch.ones(1, 1)) for _ in range(2))
    page_table = torch.tensor([[2, 0]], dtype=torch.int32)
    for length in range(1, 8):
        token = torch.full((1, 1, 1, 4), float(length))
        write_kv(token, token, k, v, page_table, torch.tensor([length], dtype=torch.int32))
    # Tokens 1 ... 7 in a ring of four: page 2 held tokens 5 and 6, page 0 tokens 7 and, from a turn before, 4.
    assert k.pages[2, 0, :, 0].tolist() == [128 + 5, 128 + 6]
    assert k.pages[0, 0, :, 0].tolist() == [128 + 7, 128 + 4]
    assert not k.pages[1].any()


@pytest.mark.parametrize("kind", ["zero_channel", "equalized"])
@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "fused_qkv"])
def test_strides_do_not_matter(kind: str, layout: str) -> None:
    rng = np.random.default_rng(0)
    batch_size, num_heads, num_tokens, head_dim = 2, 3, 5, 8
    shape = (batch_size, num_heads, num_tokens, head_dim)
    x = torch.tensor(rng.normal(0, 1, shape), dtype=torch.float32)
    if layout == "transposed":  # [B, T, H, D], as projections give it
        given = x.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "strided":
        given = torch.zeros(batch_size, num_heads, num_tokens, 2 * head_dim)[..., ::2]
        given.copy_(x)
    elif layout == "expanded":
        x = x[:, :1].expand(shape).contiguous()
        given = x[:, :1].expand(shape)
    else:
        fused = torch.zeros(batch_size, num_tokens, 3 * num_heads * head_dim)
        given = fused[..., head_dim * num_heads : 2 * head_dim * num_heads]
        given = given.view(batch_size, num_tokens, num_heads, head_dim).transpose(1, 2)
        given.copy_(x)
    assert layout == "expanded" or torch.equal(given, x)
    assert not given.is_contiguous()
    fields = random_scales(rng, kind, num_heads, head_dim, 3 / 127)
    page_table = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    seq_lens = torch.tensor([8, 6], dtype=torch.int32)
    results = []
    for tensor in (x, given):
        k, v = (empty_side("int8", 4, num_heads, 4, head_dim, dynamic=kind == "equalized", **fields) for _ in range(2))
        write_kv(tensor, tensor, k, v, page_table, seq_lens)
        results.append((k, v))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first.pages, second.pages)
        assert first.token_scale is None or torch.equal(first.token_scale, second.token_scale)
    assert results[0][0].pages.any()


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1, 0x7F800001])
def test_nan_with_any_payload_reads_as_nan(name: str, bits: int) -> None:
    key = torch.ones(1, 1, 1, 8)
    key[..., 3] = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    k, v = (empty_side(name, 1, 1, 4, 8, dynamic=True) for _ in range(2))
    write_kv(key, key, k, v, torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32))
    assert k.token_scale is not None
    assert k.token_scale[0, 0, 0].isnan()
    assert k.pages[0, 0, 0].tolist() == [NAN_BYTE[name]] * 8


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        (0x3F800000, 0x3F80),
        (0x3F800001, 0x3F81),
        (0x3F80FFFF, 0x3F81),
        (0x3FFFFFFF, 0x4000),
        (0x7F7F0001, 0x7F80),
        (0x7F800000, 0x7F80),
    ],
    ids=hex,
)
def test_token_scales_round_up(bits: int, expected: int) -> None:
    x = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    assert reference.round_up_to_bf16(x).view(torch.int16).item() == expected


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, 0x7FFF0001, -1], ids=hex)
def test_token_scales_keep_nan(bits: int) -> None:
    """Devices differ in the NaN that they make; some set every bit, and rounding up then overflows."""
    assert reference.round_up_to_bf16(torch.tensor([bits], dtype=torch.int32).view(torch.float32)).isnan().all()


@pytest.mark.parametrize("name", QUANTIZED)
def test_clipped_counts_numbers_beyond_the_limit(name: str) -> None:
    limit = CLIP_LIMIT[name]
    above, below = np.nextafter(np.float32(limit), np.float32(np.inf)), np.nextafter(np.float32(limit), np.float32(0))
    key = torch.tensor([above, -above, limit, -limit, below, math.inf, math.nan, 0.0]).view(1, 1, 1, 8)
    value = torch.tensor([2 * limit] * 3 + [1.0] * 5).view(1, 1, 1, 8)
    sides = [empty_side(name, 1, 1, 4, 8, scale=torch.ones(1, 1)) for _ in range(2)]
    tables = (torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32))
    clipped = torch.zeros(2, dtype=torch.int64)
    for times in (1, 2):
        write_kv(key, value, *sides, *tables, clipped)
        assert clipped.tolist() == [4 * times, 3 * times]  # two beyond the limit, infinity, NaN; three
    write_kv(key, value, *sides, *tables, None)


def test_clipped_is_counted_side_by_side() -> None:
    """A dynamic side and an unquantized side next to a static one count nothing."""
    x = torch.full((1, 1, 1, 8), 1000.0)
    tables = (torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32))
    static = empty_side("int8", 1, 1, 4, 8, scale=torch.ones(1, 1))
    for other in (empty_side("int8", 1, 1, 4, 8, dynamic=True), empty_side("model", 1, 1, 4, 8)):
        clipped = torch.zeros(2, dtype=torch.int64)
        write_kv(x, x, static, other, *tables, clipped)
        assert clipped.tolist() == [8, 0]
        write_kv(x, x, other, static, *tables, clipped)
        assert clipped.tolist() == [8, 8]


# -- attention -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention problem; what is not said is ordinary."""

    lengths: tuple[int, ...] = (33, 17)
    num_tokens: int = 1
    num_kv_heads: int = 2
    groups: int = 2
    head_dim: int = 64
    v_head_dim: int | None = None
    page_size: int = 16
    formats: tuple[str, str] = ("fp8_e4m3", "fp8_e4m3")
    kinds: tuple[str, str] = ("head", "head")
    window: int | None = None
    ring: bool = False
    extra_columns: int = 0
    softcap: float | None = None
    sinks: bool = False
    mask: tuple[str, str, str] | None = None  # bool or float, batch 1 or B, heads 1 or H
    mask_start: int = 0
    mask_columns: int | None = None
    causal: bool = True
    dtype: torch.dtype = torch.float32
    q_size: float = 1.0


@dataclasses.dataclass
class Problem:
    """Pages with known contents."""

    k: PagedTensor
    v: PagedTensor
    page_table: torch.Tensor
    seq_lens: torch.Tensor
    query: torch.Tensor
    options: dict[str, Any]
    first: list[int]  # the oldest token that each sequence holds
    numbers: tuple[list[np.ndarray], list[np.ndarray]]  # K and V of each sequence, [H, L, D]
    sizes: tuple[list[np.ndarray], list[np.ndarray]]  # the same without cancellation of codes and zeros

    def run(self, **options: Any) -> torch.Tensor:
        options = {**self.options, **options}
        return paged_attention(self.query, self.k, self.v, self.page_table, self.seq_lens, **options)


def _random_codes(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Stored elements that are normally distributed, and the numbers they stand for."""
    if name == "model":
        numbers = rng.normal(0, 1, shape).astype(np.float32)
        return numbers, numbers.astype(np.float64)
    codes = np.array(
        [code for code in range(256) if math.isfinite(code_value(name, code)) and (name, code) != ("int8", 0)]
    )
    values = np.array([code_value(name, int(code)) for code in codes])
    order = np.argsort(values, kind="stable")
    codes, values = codes[order], values[order]
    index = np.searchsorted(values, rng.normal(0, QMAX[name] / 4, shape)).clip(0, len(values) - 1)
    return codes[index].astype(np.uint8), values[index]


def build(case: Case, poisoned: bool, seed: int = 0) -> Problem:
    """The pages of `case`; what belongs to no token is zero, or poison."""
    rng = np.random.default_rng(seed)
    page_size, num_heads, batch_size = case.page_size, case.num_kv_heads, len(case.lengths)
    num_columns = -(-max(case.lengths) // page_size) + case.extra_columns
    if case.ring:
        assert case.window is not None
        num_columns = -(-(case.window - 1 + case.num_tokens) // page_size) + 1
        assert num_columns * page_size < max(case.lengths), "the table does not wrap"
    pool_size = batch_size * num_columns + 3
    page_table = rng.permutation(pool_size)[: batch_size * num_columns].reshape(batch_size, num_columns)
    first = [max(-(-length // page_size) - num_columns, 0) * page_size for length in case.lengths]

    sides, numbers, sizes = [], [], []
    for name, kind, head_dim in zip(
        case.formats, case.kinds, (case.head_dim, case.v_head_dim or case.head_dim), strict=True
    ):
        dynamic = kind in ("dynamic", "equalized")
        fields = {} if name == "model" else random_scales(rng, kind, num_heads, head_dim, 4 / QMAX[name])
        side = empty_side(name, pool_size, num_heads, page_size, head_dim, dynamic=dynamic, **fields)
        if poisoned:
            side.pages.fill_(NAN_BYTE[name] if name != "model" else math.nan)
            if side.token_scale is not None:
                side.token_scale.fill_(math.nan)
        scale = np.ones((1, 1)) if side.scale is None else side.scale.numpy().astype(np.float64)
        zero = np.zeros((1, 1)) if side.zero is None else side.zero.numpy().astype(np.float64)
        side_numbers, side_sizes = [], []
        for b, length in enumerate(case.lengths):
            codes, values = _random_codes(rng, name, (num_heads, length - first[b], head_dim))
            token_scale = np.ones((num_heads, length - first[b], 1))
            if dynamic:
                exponents = rng.integers(-2, 2, token_scale.shape)
                token_scale = 2.0**exponents * (1 + rng.integers(0, 128, token_scale.shape) / 128) * 2.0**-7
                if name == "fp8_e5m2":
                    token_scale *= 2.0**-7
            for p in range(first[b], length):
                page, slot = page_table[b, (p // page_size) % num_columns], p % page_size
                side.pages[page, :, slot] = torch.from_numpy(codes[:, p - first[b]])
                if side.token_scale is not None:
                    side.token_scale[page, :, slot] = torch.tensor(
                        token_scale[:, p - first[b], 0], dtype=torch.bfloat16
                    )
            product = values * token_scale * scale[:, None]
            side_numbers.append(product + zero[:, None])
            side_sizes.append(np.abs(product) + np.abs(zero[:, None]))
        sides.append(side)
        numbers.append(side_numbers)
        sizes.append(side_sizes)

    num_q_heads = num_heads * case.groups
    query = rng.normal(0, case.q_size, (batch_size, num_q_heads, case.num_tokens, case.head_dim))
    options: dict[str, Any] = {"softmax_scale": case.head_dim**-0.5, "softcap": case.softcap, "window": case.window}
    options |= {"causal": case.causal, "mask_start": case.mask_start}
    if case.sinks:
        options["sinks"] = torch.tensor(rng.normal(0, 2, num_q_heads), dtype=torch.float32)
    if case.mask is not None:
        kind, batch, heads = case.mask
        columns = case.mask_columns or max(case.lengths) - case.mask_start
        shape = (1 if batch == "1" else batch_size, 1 if heads == "1" else num_q_heads, case.num_tokens, columns)
        seen = rng.random(shape) < 0.7
        bias = np.where(seen, rng.normal(0, 2, shape), -np.inf)
        options["attn_mask"] = torch.tensor(seen) if kind == "bool" else torch.tensor(bias, dtype=torch.float32)
    return Problem(
        *sides,
        torch.tensor(page_table, dtype=torch.int32),
        torch.tensor(case.lengths, dtype=torch.int32),
        torch.tensor(query).to(case.dtype),
        options,
        first,
        (numbers[0], numbers[1]),
        (sizes[0], sizes[1]),
    )


def float64_attention(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """The output, and how far fp32 arithmetic in any order may be from it."""
    return float64_results(problem)[0]


def float64_results(problem: Problem) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Output and log-sum-exp, each with how far fp32 arithmetic in any order may be from it, to first order."""
    query, options = problem.query.to(torch.float64).numpy(), problem.options
    batch_size, num_q_heads, num_tokens, head_dim = query.shape
    num_kv_heads = problem.k.pages.shape[1]
    scale, cap, window = options["softmax_scale"], options["softcap"], options["window"]
    mask, mask_start, sinks = options.get("attn_mask"), options["mask_start"], options.get("sinks")
    out = np.zeros((batch_size, num_q_heads, num_tokens, problem.v.pages.shape[3]))
    bound = np.zeros_like(out)
    lse, lse_bound = np.zeros(out.shape[:3]), np.zeros(out.shape[:3])
    u = 2.0**-24
    for b, h in itertools.product(range(batch_size), range(num_q_heads)):
        kv_head = h // (num_q_heads // num_kv_heads)
        key, key_size = (numbers[0][b][kv_head] for numbers in (problem.numbers, problem.sizes))
        value, value_size = (numbers[1][b][kv_head] for numbers in (problem.numbers, problem.sizes))
        length = int(problem.seq_lens[b])
        kv_positions = np.arange(problem.first[b], length)[None, :]
        q_positions = np.arange(length - num_tokens, length)[:, None]
        logits = scale * query[b, h] @ key.T
        # Dequantization rounds three times, the sum at most head_dim times, and the scale is rounded and multiplied.
        error = (head_dim + 8) * u * scale * np.abs(query[b, h]) @ key_size.T
        if cap is not None:
            logits = cap * np.tanh(logits / cap)
            error = error + 8 * u * np.abs(logits)
        visible = np.ones_like(logits, dtype=bool)
        if options["causal"]:
            visible &= kv_positions <= q_positions
        if window is not None:
            visible &= q_positions - kv_positions < window
        if mask is not None:
            columns = (kv_positions - mask_start)[0]
            covered = (columns >= 0) & (columns < mask.shape[3])
            part = mask[min(b, mask.shape[0] - 1), min(h, mask.shape[1] - 1)][:, torch.from_numpy(columns * covered)]
            visible &= covered
            if mask.dtype == torch.bool:
                visible &= part.numpy()
            else:
                bias = part.to(torch.float64).numpy()
                visible &= bias > -np.inf
                logits = logits + np.where(visible, bias, 0.0)
                error = error + u * np.abs(logits)
        logits = np.where(visible, logits, -np.inf)
        highest = logits.max(axis=1, keepdims=True, initial=-np.inf)
        if sinks is not None:
            highest = np.maximum(highest, float(sinks[h]))
        highest = np.where(highest == -np.inf, 0.0, highest)
        weights = np.exp(logits - highest)
        total = weights.sum(axis=1, keepdims=True)
        if sinks is not None:
            total = total + np.exp(float(sinks[h]) - highest)
        with np.errstate(divide="ignore"):
            lse[b, h] = (highest + np.log(total))[:, 0]
        weights = weights / np.where(total == 0, 1.0, total)
        result = weights @ value
        out[b, h] = result
        # An error e of a logit moves its weight by a factor 1 + e, and all others by the change of the sum.
        error = np.where(visible, error + u * np.abs(np.where(visible, logits - highest, 0.0)) + 4 * u, 0.0)
        from_logits = (weights * error) @ np.abs(value) + (weights * error).sum(axis=1, keepdims=True) * np.abs(result)
        from_sums = (2 * kv_positions.size + 16) * u * (weights @ value_size)
        bound[b, h] = 1.1 * (from_logits + from_sums)
        # The same errors of logits; then a sum, its logarithm, and the highest logit is added: all rounded.
        rest = (kv_positions.size + 16) * u + 4 * u * (
            np.abs(highest[:, 0]) + np.abs(np.log(np.maximum(total, 1e-300))[:, 0])
        )
        lse_bound[b, h] = 1.1 * ((weights * error).sum(axis=1) + rest)
    if problem.query.dtype != torch.float32:
        bound += torch.finfo(problem.query.dtype).eps * np.abs(out)
    return (out, bound), (lse, lse_bound)


CASES: dict[str, Case] = {
    **{f"length_{n}": Case(lengths=(n,)) for n in (1, 15, 17, 63, 1000)},
    **{f"head_dim_{d}": Case(head_dim=d) for d in (64, 80, 96, 128, 256)},
    "wide_keys": Case(head_dim=96, v_head_dim=64, kinds=("channel", "channel")),
    "wide_values": Case(head_dim=64, v_head_dim=80, kinds=("zero_channel", "dynamic"), num_tokens=3),
    **{f"groups_{g}": Case(groups=g, num_tokens=3) for g in (1, 4, 7)},
    "one_kv_head": Case(num_kv_heads=1, groups=8),
    "tokens_3": Case(num_tokens=3),
    "tokens_17": Case(num_tokens=17),
    "tokens_300": Case(lengths=(300, 317), num_tokens=300, groups=1),
    "tokens_300_masked": Case(
        lengths=(310, 300), num_tokens=300, groups=1, page_size=64, window=280, mask=("float", "B", "1"), softcap=5.0
    ),
    "tokens_300_of_1000": Case(lengths=(1000,), num_tokens=300, num_kv_heads=1, kinds=("dynamic", "dynamic")),
    **{f"page_size_{s}": Case(lengths=(63, 17, 9), num_tokens=3, page_size=s) for s in (1, 8, 16, 64)},
    "ragged": Case(lengths=(1, 63, 16, 17, 2), kinds=("equalized", "dynamic")),
    "spare_columns": Case(extra_columns=3, num_tokens=3),
    **{f"e4m3_{kind}": Case(kinds=(kind, kind), num_tokens=3) for kind in KINDS[1:]},
    **{f"e5m2_{kind}": Case(formats=("fp8_e5m2",) * 2, kinds=(kind, kind)) for kind in ("zero_tensor", "equalized")},
    **{f"int8_{kind}": Case(formats=("int8", "int8"), kinds=(kind, kind), num_tokens=3) for kind in KINDS[1:]},
    "model": Case(formats=("model", "model"), num_tokens=3),
    "mixed_int8_fp8": Case(formats=("int8", "fp8_e4m3"), kinds=("equalized", "channel"), num_tokens=3),
    "mixed_model_int8": Case(formats=("model", "int8"), kinds=("unit", "zero_channel")),
    "mixed_fp8_model": Case(formats=("fp8_e5m2", "model"), kinds=("dynamic", "unit")),
    **{f"window_{w}": Case(lengths=(63, 17), num_tokens=3, window=w) for w in (1, 2, 16, 17, 100)},
    **{f"ring_{w}_pages_{s}": Case(lengths=(100, 9), num_tokens=4, window=w, ring=True, page_size=s)
       for w, s in ((1, 8), (8, 1), (9, 8), (16, 16), (33, 16))},
    "ring_dynamic": Case(lengths=(1000, 70, 5), num_tokens=1, window=20, ring=True, kinds=("equalized", "dynamic")),
    "ring_masked": Case(lengths=(100, 90), num_tokens=4, window=17, ring=True, mask=("bool", "B", "1"), mask_start=80),
    "softcap": Case(softcap=3.0, num_tokens=3, q_size=4.0),
    "softcap_masked": Case(softcap=3.0, num_tokens=3, q_size=4.0, mask=("float", "1", "1")),
    "sinks": Case(sinks=True, num_tokens=3),
    "sinks_window_softcap": Case(sinks=True, num_tokens=17, window=5, softcap=2.0, q_size=2.0),
    **{f"{kind}_mask_{b}_{h}": Case(mask=(kind, b, h), num_tokens=3)
       for kind in ("bool", "float") for b in "1B" for h in "1H"},
    "mask_starts_late": Case(mask=("bool", "B", "H"), mask_start=7, num_tokens=3),
    "mask_ends_early": Case(mask=("float", "B", "1"), mask_start=2, mask_columns=10, num_tokens=3),
    "mask_beyond_the_end": Case(mask=("float", "1", "1"), mask_columns=50, num_tokens=3),
    "mask_with_sinks": Case(mask=("float", "B", "H"), sinks=True, num_tokens=3),
    "mask_not_causal": Case(mask=("bool", "1", "H"), causal=False, num_tokens=3),
    "not_causal": Case(causal=False, num_tokens=17),
    "not_causal_window": Case(causal=False, num_tokens=5, window=6),
    "peaked": Case(lengths=(63, 17), q_size=30.0, num_tokens=3),
    "bf16": Case(dtype=torch.bfloat16, num_tokens=3),
    "fp16": Case(dtype=torch.float16, num_tokens=3),
    "fp64": Case(dtype=torch.float64, num_tokens=3),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_attention(case: Case) -> None:
    """Right to within the rounding of fp32; and what lies in slots that hold no token changes no bit."""
    clean, poisoned = build(case, poisoned=False), build(case, poisoned=True)
    got = clean.run()
    assert got.shape == (*clean.query.shape[:3], clean.v.pages.shape[3])
    assert got.dtype == clean.query.dtype
    assert torch.equal(poisoned.run(), got)
    output, lse = float64_results(clean)
    check_within(got, *output)
    got_lse, got_lse_poisoned = (torch.full(clean.query.shape[:3], math.nan) for _ in range(2))
    check_within(clean.run(lse=got_lse), *output)
    check_within(got_lse, *lse)
    poisoned.run(lse=got_lse_poisoned)
    assert torch.equal(got_lse, got_lse_poisoned)


def check_within(got: torch.Tensor, expected: np.ndarray, bound: np.ndarray) -> None:
    """Each number within its bound; -inf is to be met exactly."""
    blind = expected == -np.inf
    numbers = got.to(torch.float64).numpy()
    assert (numbers[blind] == -np.inf).all()
    error = np.abs(np.where(blind, 0, numbers) - np.where(blind, 0, expected))
    worst = np.unravel_index(np.argmax(error - bound), error.shape)
    assert (error <= bound).all(), f"off by {error[worst]:.2e} at {worst}, allowed {bound[worst]:.2e}"


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("shift", [1, 16, 40, 70])
def test_parts_merge_to_the_whole(shift: int, window: int | None) -> None:
    """Tokens up to `shift` before the query, and the rest, put together by their log-sum-exp: what is seen at once.

    The shift makes lengths fall below the number of queries, and below zero.
    """
    whole = build(Case(lengths=(63, 17), num_tokens=5, groups=4, window=window, softcap=4.0, sinks=True), False)
    sinks = whole.options.pop("sinks")
    parts = []
    for seq_lens, options in (
        (whole.seq_lens - shift, {"window": None if window is None else max(window - shift, 0), "sinks": sinks}),
        (whole.seq_lens, {"window": shift if window is None else min(window, shift)}),
    ):
        part = dataclasses.replace(whole, seq_lens=seq_lens)
        lse = torch.full(whole.query.shape[:3], math.nan)
        parts.append((part.run(**options, lse=lse), lse))
    expected = float64_attention(dataclasses.replace(whole, options=whole.options | {"sinks": sinks}))
    total = torch.logaddexp(parts[0][1], parts[1][1])
    merged = sum(torch.exp(lse - total)[..., None] * output for output, lse in parts)
    # Each part, its weight (as far off as both log-sum-exps are) and the sum are rounded once more.
    check_within(merged, expected[0], 4 * expected[1] + 2.0**-20 * np.abs(expected[0]))


def test_the_bound_sees_one_token() -> None:
    """A bound that one token too many or too few would pass holds nothing."""
    for name in ("length_1000", "tokens_300_of_1000", "softcap", "sinks"):
        problem = build(CASES[name], poisoned=False)
        expected, bound = float64_attention(problem)
        fewer = dataclasses.replace(problem, options={**problem.options, "window": int(problem.seq_lens[0]) - 1})
        difference = np.abs(float64_attention(fewer)[0] - expected)[0, :, -1]
        assert (difference > bound[0, :, -1]).mean() > 0.2, name


@pytest.mark.parametrize("kind", ["channel", "zero_tensor", "equalized"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_what_is_written_is_read_back(name: str, kind: str) -> None:
    """Both operators together: numbers come back within half a step between codes."""
    rng = np.random.default_rng(0)
    num_heads, page_size, head_dim, num_tokens = 2, 4, 8, 12
    fields = random_scales(rng, kind, num_heads, head_dim, 16 / QMAX[name])
    k, v = (
        empty_side(name, 6, num_heads, page_size, head_dim, dynamic=kind == "equalized", **fields) for _ in range(2)
    )
    page_table = torch.tensor([[5, 0, 3], [1, 4, 2]], dtype=torch.int32)
    x = torch.tensor(rng.normal(0, 1, (2, num_heads, num_tokens, head_dim)), dtype=torch.float32)
    for length in range(1, num_tokens + 1):
        token = x[:, :, length - 1 : length]
        write_kv(token, token, k, v, page_table, torch.full((2,), length, dtype=torch.int32))
    seq_lens = torch.full((2,), num_tokens, dtype=torch.int32)
    # With one visible token attention returns its value.
    query = torch.zeros(2, num_heads, num_tokens, head_dim)
    got = paged_attention(query, k, v, page_table, seq_lens, softmax_scale=1.0, window=1)

    assert v.scale is not None
    unit = v.scale[:, None].expand_as(x)  # of one step of the codes
    if v.token_scale is not None:
        unit = unit * stored_tokens(v.token_scale, page_table, seq_lens, num_tokens).to(torch.float32)[..., None]
    if name == "int8":
        half_step = 0.5 * unit
    else:
        _, mantissa_bits, bias = FP8_LAYOUT[name]
        coded = x if v.zero is None else x - v.zero[:, None]
        half_step = torch.maximum(coded.abs() * 2.0 ** -(mantissa_bits + 1), unit * 2.0 ** -(bias + mantissa_bits))
    assert ((got - x).abs() <= half_step * (1 + 1e-5) + 1e-6 * x.abs()).all()
    assert not torch.equal(got, x)


@pytest.mark.parametrize("name", QUANTIZED)
def test_the_largest_halves_are_read_back_as_numbers(name: str) -> None:
    """Token scales are rounded up, but nothing finite becomes infinite by it; a NaN stays one."""
    numbers = torch.tensor([65504.0, -65504.0, 65376.0, 64896.0, 32752.0], dtype=torch.float16)
    x = numbers[:, None].expand(1, 2, 5, 4)
    x = torch.cat([x, torch.full_like(x[:, :, :2], torch.nan), torch.full_like(x[:, :, :1], torch.inf)], dim=2)
    k, v = (empty_side(name, 2, 2, 4, 4, dynamic=True) for _ in range(2))
    page_table = torch.tensor([[1, 0]], dtype=torch.int32)
    write_kv(x, x, k, v, page_table, torch.full((1,), 8, dtype=torch.int32))
    got = read_pages(v, page_table, torch.float16)
    assert got[:, :, 5:].isnan().all()  # nothing of a token is left beside an infinity
    torch.testing.assert_close(got[:, :, :5], x[:, :, :5], rtol=2**-7 if name == "int8" else 2**-3, atol=0)


@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("why", ["bool", "float", "columns", "window"])
def test_a_row_that_sees_nothing_gives_zeros(why: str, sinks: bool) -> None:
    problem = build(Case(num_tokens=3, sinks=sinks), poisoned=True)
    seen = torch.ones(1, 1, 3, 33, dtype=torch.bool)
    if why == "bool":
        seen[:, :, 1] = False
        problem.options["attn_mask"] = seen
    elif why == "float":
        seen[:, :, 1] = False
        problem.options["attn_mask"] = torch.zeros(1, 1, 3, 33).masked_fill(~seen, -torch.inf)
    elif why == "columns":
        problem.options |= {"attn_mask": seen, "mask_start": 40}
    else:
        problem.options["window"] = 0
    got = problem.run()
    assert got.isfinite().all()
    blind = got if why in ("columns", "window") else got[:, :, 1]
    assert (blind == 0).all()
    if why in ("bool", "float"):
        assert (got[:, :, [0, 2]] != 0).all()


def test_lowest_float_masks_like_infinity() -> None:
    """The host's eager masks hold the lowest float instead of -inf."""
    seen = torch.rand(1, 1, 3, 33) < 0.5
    seen[..., 0] = True
    results = []
    for hidden in (-torch.inf, torch.finfo(torch.float32).min):
        problem = build(Case(num_tokens=3), poisoned=False)
        problem.options["attn_mask"] = torch.zeros(1, 1, 3, 33).masked_fill(~seen, hidden)
        results.append(problem.run())
    assert torch.equal(*results)


def test_nan_in_a_live_token_is_not_hidden() -> None:
    problem = build(Case(lengths=(33,)), poisoned=False)
    before = problem.run()
    page, slot = int(problem.page_table[0, 1]), 3
    problem.v.pages[page, 0, slot, 5] = 0x7F
    after = problem.run()
    heads = after[0, :, 0]
    assert heads[:2, 5].isnan().all()
    heads = heads.clone()
    heads[:2, 5] = before[0, :2, 0, 5]
    assert torch.equal(heads, before[0, :, 0])


# -- as torch operators ------------------------------------------------------------------------------------------------


def _flat(side: PagedTensor) -> list[Any]:
    return [side.pages, side.format, side.scale, side.zero, side.token_scale]


@pytest.mark.parametrize("lse", [False, True], ids=["", "lse"])
@pytest.mark.parametrize("name", ["e4m3_head", "int8_equalized", "mask_with_sinks", "wide_values"])
def test_opcheck_paged_attention(name: str, lse: bool) -> None:
    p = build(CASES[name], poisoned=False)
    o = p.options
    arguments = (
        p.query, p.page_table, p.seq_lens, *_flat(p.k), *_flat(p.v),
        o.get("attn_mask"), o["mask_start"], o.get("sinks"), o["softmax_scale"], o["softcap"], o["window"], o["causal"],
    )  # fmt: skip
    operators = torch.ops.hf_kvquant
    torch.library.opcheck(operators.paged_attention_lse if lse else operators.paged_attention, arguments)


@pytest.mark.parametrize("kind", ["zero_channel", "equalized"])
def test_opcheck_write_kv(kind: str) -> None:
    p = build(Case(kinds=(kind, kind)), poisoned=False)
    x = torch.randn(2, 2, 3, 64)
    clipped = torch.zeros(2, dtype=torch.int64)
    arguments = (x, x, p.page_table, p.seq_lens, *_flat(p.k), *_flat(p.v), clipped)
    torch.library.opcheck(torch.ops.hf_kvquant.write_kv, arguments)


def test_a_device_without_kernels_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The CPU stands for one; its own kernels have keys of their own."""
    p = build(CASES["int8_equalized"], poisoned=False)
    o = p.options
    arguments = (
        p.query, p.page_table, p.seq_lens, *_flat(p.k), *_flat(p.v),
        None, 0, None, o["softmax_scale"], None, None, True,
    )  # fmt: skip
    read = (p.page_table, *_flat(p.k), torch.float32)
    others._warn.cache_clear()
    with caplog.at_level("WARNING", logger="hf_kvquant"):
        others.read_pages(*read)
        assert not caplog.records  # a CPU is told by its own
        monkeypatch.setattr(others, "_TOLD_ELSEWHERE", frozenset({"meta"}))
        for _ in range(2):
            assert torch.equal(others.read_pages(*read), reference.read_pages(*read))
            assert torch.equal(others.paged_attention(*arguments), reference.paged_attention(*arguments))
            x = torch.randn(2, 2, 3, 64)
            others.write_kv(x, x, p.page_table, p.seq_lens, *_flat(p.k), *_flat(p.v), None)
    others._warn.cache_clear()
    assert [record.getMessage() for record in caplog.records] == [
        "The KV cache uses plain torch on cpu, which is slow: there are no kernels for such devices."
    ]


# -- errors ------------------------------------------------------------------------------------------------------------


def _valid() -> dict[str, Any]:
    """Arguments of both operators that go together."""
    fields = {"scale": torch.ones(2, 1), "zero": torch.zeros(2, 8)}
    return {
        "key": torch.zeros(2, 2, 1, 8),
        "value": torch.zeros(2, 2, 1, 6),
        "query": torch.zeros(2, 4, 1, 8),
        "k": empty_side("fp8", 4, 2, 4, 8, dynamic=True, **fields),
        "v": empty_side("int8", 4, 2, 4, 6, dynamic=True, scale=torch.ones(1, 6)),
        "page_table": torch.tensor([[0, 1], [2, 3]], dtype=torch.int32),
        "seq_lens": torch.tensor([5, 3], dtype=torch.int32),
        "clipped": torch.zeros(2, dtype=torch.int64),
        "attn_mask": torch.ones(1, 1, 1, 5, dtype=torch.bool),
        "sinks": torch.zeros(4),
        "lse": torch.zeros(2, 4, 1),
    }


def _write(given: dict[str, Any]) -> None:
    write_kv(*(given[name] for name in ("key", "value", "k", "v", "page_table", "seq_lens", "clipped")))


def _attend(given: dict[str, Any]) -> None:
    arguments = (given[name] for name in ("query", "k", "v", "page_table", "seq_lens"))
    paged_attention(*arguments, softmax_scale=1.0, attn_mask=given["attn_mask"], sinks=given["sinks"], lse=given["lse"])


def _reshaped(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


BAD_SIDES: dict[str, tuple[str, Any]] = {
    "pages_rank": ("pages", _reshaped(4, 2, 4, dtype=torch.uint8)),
    "pages_dtype": ("pages", _reshaped(4, 2, 4, 8)),
    "scale_rank": ("scale", _reshaped(2)),
    "scale_heads": ("scale", _reshaped(3, 1)),
    "scale_channels": ("scale", _reshaped(2, 7)),
    "scale_dtype": ("scale", _reshaped(2, 1, dtype=torch.bfloat16)),
    "zero_rank": ("zero", _reshaped(1)),
    "zero_dtype": ("zero", _reshaped(1, 1, dtype=torch.float64)),
    "token_scale_shape": ("token_scale", _reshaped(4, 2, 8, dtype=torch.bfloat16)),
    "token_scale_dtype": ("token_scale", _reshaped(4, 2, 4)),
}
BAD_ARGUMENTS: dict[str, tuple[str, torch.Tensor, Sequence[Any]]] = {
    "key_rank": ("key", _reshaped(2, 2, 8), [_write]),
    "key_dtype": ("key", _reshaped(2, 2, 1, 8, dtype=torch.int64), [_write]),
    "value_dtype": ("value", _reshaped(2, 2, 1, 6, dtype=torch.float8_e4m3fn), [_write]),
    "query_dtype": ("query", _reshaped(2, 4, 1, 8, dtype=torch.bool), [_attend]),
    "key_tokens": ("key", _reshaped(2, 2, 2, 8), [_write]),
    "value_rank": ("value", _reshaped(2, 2, 1), [_write]),
    "value_heads": ("value", _reshaped(2, 1, 1, 6), [_write]),
    "query_rank": ("query", _reshaped(2, 4, 8), [_attend]),
    "query_heads": ("query", _reshaped(2, 3, 1, 8), [_attend]),
    "page_table_rank": ("page_table", _reshaped(4, dtype=torch.int32), [_write, _attend]),
    "page_table_columns": ("page_table", _reshaped(2, 0, dtype=torch.int32), [_write, _attend]),
    "page_table_batch": ("page_table", _reshaped(3, 2, dtype=torch.int32), [_write, _attend]),
    "page_table_dtype": ("page_table", _reshaped(2, 2, dtype=torch.int64), [_write, _attend]),
    "seq_lens_shape": ("seq_lens", _reshaped(3, dtype=torch.int32), [_write, _attend]),
    "seq_lens_rank": ("seq_lens", _reshaped(2, 1, dtype=torch.int32), [_write, _attend]),
    "seq_lens_dtype": ("seq_lens", _reshaped(2, dtype=torch.int64), [_write, _attend]),
    "clipped_shape": ("clipped", _reshaped(1, dtype=torch.int64), [_write]),
    "clipped_dtype": ("clipped", _reshaped(2), [_write]),
    "mask_rank": ("attn_mask", _reshaped(2, 1, 5), [_attend]),
    "mask_batch": ("attn_mask", _reshaped(3, 1, 1, 5), [_attend]),
    "mask_heads": ("attn_mask", _reshaped(2, 2, 1, 5), [_attend]),
    "mask_tokens": ("attn_mask", _reshaped(2, 1, 2, 5), [_attend]),
    "mask_columns": ("attn_mask", _reshaped(1, 1, 1, 0), [_attend]),
    "mask_dtype": ("attn_mask", _reshaped(1, 1, 1, 5, dtype=torch.int64), [_attend]),
    "sinks_shape": ("sinks", _reshaped(2), [_attend]),
    "lse_shape": ("lse", _reshaped(2, 4), [_attend]),
    "lse_dtype": ("lse", _reshaped(2, 4, 1, dtype=torch.float16), [_attend]),
}


def test_valid_arguments_are_valid() -> None:
    _write(_valid())
    _attend(_valid())


@pytest.mark.parametrize("call", [_write, _attend], ids=["write_kv", "paged_attention"])
@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize(("field", "bad"), BAD_SIDES.values(), ids=BAD_SIDES.keys())
def test_errors_name_the_field_of_the_side(field: str, bad: torch.Tensor, side: str, call: Any) -> None:
    given = _valid()
    call(given)  # what has passed is not looked at again, until it changes
    setattr(given[side], field, bad)
    with pytest.raises(ValueError, match=rf"{side}\.{field} is ") as error:
        call(given)
    assert str(list(bad.shape)) in str(error.value) or str(bad.dtype) in str(error.value)


@pytest.mark.parametrize(
    ("side", "shape", "calls"),
    [
        ("k", (4, 3, 4, 8), [_write]),
        ("k", (4, 2, 4, 9), [_write, _attend]),
        ("k", (4, 2, 2, 8), [_write, _attend]),
        ("k", (3, 2, 4, 8), [_write, _attend]),
        ("v", (4, 1, 4, 6), [_write, _attend]),
        ("v", (4, 2, 4, 9), [_write]),
        ("v", (4, 2, 8, 6), [_write, _attend]),
        ("k", (4, 2, 0, 8), [_write, _attend]),
        ("k", (4, 0, 4, 8), [_write, _attend]),
    ],
)
def test_errors_name_pages_of_another_shape(side: str, shape: tuple[int, ...], calls: Sequence[Any]) -> None:
    for call in calls:
        given = _valid()
        call(given)
        given[side] = empty_side(given[side].format, shape[0], *shape[1:])
        with pytest.raises(ValueError, match=rf"{side}\.pages is ") as error:
            call(given)
        assert str(list(shape)) in str(error.value)


@pytest.mark.parametrize(("name", "bad", "calls"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS.keys())
def test_errors_name_the_argument(name: str, bad: torch.Tensor, calls: Sequence[Any]) -> None:
    for call in calls:
        given = _valid()
        call(given)  # what is like the last call is not looked at again
        given[name] = bad
        with pytest.raises(ValueError, match=f"{name} is ") as error:
            call(given)
        assert str(list(bad.shape)) in str(error.value) or str(bad.dtype) in str(error.value)


def test_errors_say_what_does_not_go_together() -> None:
    given = _valid()
    _write(given)
    given["clipped"] = torch.zeros(4, dtype=torch.int64)[::2]
    with pytest.raises(ValueError, match=r"clipped has strides \(2,\)"):
        _write(given)
    given = _valid() | {"key": torch.zeros(2, 2, 9, 8), "value": torch.zeros(2, 2, 9, 6)}
    with pytest.raises(ValueError, match="key has 9 tokens, but 2 pages of 4 tokens have no room"):
        _write(given)
    given = _valid()
    given["k"] = PagedTensor(torch.zeros(4, 2, 4, 8), "model", scale=torch.ones(1, 1))
    with pytest.raises(ValueError, match=r"k\.scale is given, but unquantized pages have none"):
        _write(given)
    given = _valid()
    arguments = [given[name] for name in ("query", "k", "v", "page_table", "seq_lens")]
    paged_attention(*arguments, softmax_scale=1.0)
    with pytest.raises(ValueError, match="window is -1"):
        paged_attention(*arguments, softmax_scale=1.0, window=-1)


@pytest.mark.parametrize("call", [_write, _attend], ids=["write_kv", "paged_attention"])
def test_sides_that_have_passed_apart_are_not_taken_for_a_pair(call: Any) -> None:
    one, other = _valid(), _valid()
    for side, head_dim in (("k", 8), ("v", 6)):
        other[side] = empty_side("int8", 5, 2, 4, head_dim)
    call(one)
    call(other)
    for mixed in (one | {"v": other["v"]}, one | {"k": other["k"]}):
        with pytest.raises(ValueError, match=r"both must be \[P, H, S, D\]"):
            call(mixed)
    call(one)


def test_scales_are_stored_as_kernels_read_them() -> None:
    """By rows of channels, whatever strides they come with."""
    scale = torch.rand(8, 2) + 0.1
    side = empty_side("fp8", 4, 2, 4, 8, scale=scale.T)
    assert side.scale is not None
    assert side.scale.stride() == (8, 1)
    side.zero = scale.new_zeros(()).expand(2, 8)
    assert side.zero.stride() == (8, 1)
    assert torch.equal(side.scale, scale.T)


@pytest.mark.parametrize("call", [_write, _attend], ids=["write_kv", "paged_attention"])
def test_errors_name_an_unknown_format(call: Any) -> None:
    given = _valid()
    given["v"].format = "fp4"
    with pytest.raises(ValueError, match="unknown storage format 'fp4'"):
        call(given)


def test_page_tables_are_checked_on_request() -> None:
    table, lengths = torch.tensor([[1, 0, 99], [3, 2, 1]], dtype=torch.int32), torch.tensor([32, 48], dtype=torch.int32)
    check_page_table(table, lengths, num_pages=4, page_size=16)  # what lies behind the last token need not be a page
    with pytest.raises(ValueError, match=r"page_table\[0, 2\] is 99; there are 4 pages"):
        check_page_table(table, lengths + 1, num_pages=4, page_size=16, window=32)
    with pytest.raises(ValueError, match="sequence 1 has 49 tokens, but its 3 pages"):
        check_page_table(table.clamp(max=3), lengths + 1, num_pages=4, page_size=16)


def test_tensors_of_another_device_are_named() -> None:
    k = PagedTensor(torch.zeros(2, 1, 4, 8, dtype=torch.uint8), "fp8_e4m3")
    query = torch.zeros(1, 1, 1, 8, device="meta")
    table, lengths = torch.zeros(1, 2, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="query is on meta; the pages it belongs to are on cpu"):
        paged_attention(query, k, k, table, lengths, softmax_scale=1.0)
    scaled = PagedTensor(k.pages, "fp8_e4m3", scale=torch.ones(1, 1, device="meta"))
    with pytest.raises(ValueError, match=r"k\.scale is on meta"):
        paged_attention(query.to("meta"), scaled, k, table, lengths, softmax_scale=1.0)
    here = {"query": torch.zeros(1, 1, 1, 8), "attn_mask": torch.zeros(1, 1, 1, 1), "sinks": torch.zeros(1)}
    for name, tensor in here.items():
        given = dict(here)
        paged_attention(given.pop("query"), k, k, table, lengths, softmax_scale=1.0, **given)
        given = {**here, name: tensor.to("meta")}
        query = given.pop("query")
        with pytest.raises(ValueError, match=f"{name} is on meta; the pages"):
            paged_attention(query, k, k, table, lengths, softmax_scale=1.0, **given)
    new = torch.zeros(1, 1, 1, 8)
    with pytest.raises(ValueError, match="clipped is on meta; the pages"):
        write_kv(new, new, k, k, table, lengths, torch.zeros(2, dtype=torch.int64, device="meta"))
