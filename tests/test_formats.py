"""Storage formats, exhaustively: every byte, every 16-bit number."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import LARGEST_CODE, NAN_BYTE, QMAX, QUANTIZED, code_value, nearest_code, positive_values
from torch.utils._python_dispatch import TorchDispatchMode

from hf_kvquant import dtypes
from hf_kvquant.formats import ALIASES, FORMATS, get_format

FP8 = ("fp8_e4m3", "fp8_e5m2")
ALL_BYTES = torch.arange(256, dtype=torch.int32).to(torch.uint8)


class _NoFloat8(TorchDispatchMode):
    """Within it torch has no 8-bit floats, as on MPS."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(result, "dtype", None) in (torch.float8_e4m3fn, torch.float8_e5m2):
            raise TypeError("Trying to convert Float8 to the MPS backend but it does not have support for that dtype.")
        return result


@pytest.fixture(params=[False, True], ids=["", "no float8"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One that has torch's 8-bit floats, and one that has not."""
    if not request.param:
        yield
        return
    monkeypatch.setattr(dtypes, "_known", {})
    with _NoFloat8():
        yield


def _all_16_bit_numbers(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).to(torch.float32)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("name", QUANTIZED)
def test_decode_is_the_layout_of_the_bits(name: str) -> None:
    expected = torch.tensor([code_value(name, code) for code in range(256)], dtype=torch.float32)
    decoded = get_format(name).decode(ALL_BYTES)
    assert decoded.dtype == torch.float32
    torch.testing.assert_close(decoded, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(decoded.signbit()[~expected.isnan()], expected.signbit()[~expected.isnan()])  # -0.0


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("name", QUANTIZED)
def test_every_code_survives_decode_and_encode(name: str) -> None:
    row = get_format(name)
    again = row.encode(row.decode(ALL_BYTES))
    assert again.dtype == torch.uint8
    for code in range(256):
        value = code_value(name, code)
        if math.isnan(value):
            expected = 0x7F  # one NaN, whatever its payload or sign
        elif math.isinf(value):
            expected = LARGEST_CODE[name] | (code & 0x80)
        elif name == "int8" and code == 0:
            expected = 1  # -128 is not a number this package writes
        else:
            expected = code
        assert int(again[code]) == expected, f"byte {code:#04x}"


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_rounds_to_nearest_even(name: str, dtype: torch.dtype) -> None:
    """Every 16-bit number against the nearest value in float64."""
    numbers = _all_16_bit_numbers(dtype)
    encoded = get_format(name).encode(numbers)

    x = numbers.to(torch.float64)
    if name == "int8":
        low, offset = torch.arange(-127, 128, dtype=torch.float64), 1
        magnitude, negative = x, torch.zeros_like(x, dtype=torch.bool)
    else:
        low, offset = torch.tensor(positive_values(name), dtype=torch.float64), 0
        magnitude, negative = x.abs(), x.signbit()
    magnitude = magnitude.clamp(float(low[0]), float(low[-1])).nan_to_num(0.0)
    above = torch.searchsorted(low, magnitude)
    below = (above - 1).clamp(min=0)
    to_below, to_above = magnitude - low[below], low[above] - magnitude
    # int8 codes -127 ... 127 have index 0 ... 254: an even number has an odd index.
    below_is_even = (below + offset) % 2 == 0
    take_below = (to_below < to_above) | ((to_below == to_above) & below_is_even)
    index = torch.where(take_below & (to_above > 0), below, above)
    expected = index + offset + 128 * negative.long()
    expected = torch.where(x.isnan(), NAN_BYTE[name], expected)
    wrong = (encoded.long() != expected).nonzero().flatten()
    assert wrong.numel() == 0, f"{numbers[wrong[:5]].tolist()} -> {encoded[wrong[:5]].tolist()}"


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("name", QUANTIZED)
def test_rounds_fp32_once(name: str) -> None:
    """Numbers just beside a tie, which rounding by way of a 16-bit type would put on the wrong side."""
    values = positive_values(name) if name != "int8" else [float(v) for v in range(128)]
    ties = torch.tensor([(low + high) / 2 for low, high in zip(values, values[1:], strict=False)], dtype=torch.float32)
    beside = torch.cat([ties, torch.nextafter(ties, torch.zeros(1)), torch.nextafter(ties, torch.tensor(torch.inf))])
    numbers = torch.cat([beside, -beside])
    expected = [nearest_code(name, float(x)) for x in numbers]
    assert get_format(name).encode(numbers).tolist() == expected


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("x", [math.inf, 1e9, 3.4e38, -math.inf, -1e9])
def test_saturates(name: str, x: float) -> None:
    row = get_format(name)
    stored = row.encode(torch.tensor([x]))
    assert row.decode(stored).item() == math.copysign(QMAX[name], x)
    assert row.qmax == QMAX[name]


@pytest.mark.parametrize("name", QUANTIZED)
def test_clip_limit_is_where_saturation_costs_more_than_rounding(name: str) -> None:
    """Half a step beyond the largest value: up to there the largest value is also the nearest."""
    row = get_format(name)
    largest = positive_values(name)[-2:] if name != "int8" else [126.0, 127.0]
    assert row.clip_limit == largest[1] + (largest[1] - largest[0]) / 2


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("name", QUANTIZED)
def test_nan_is_kept(name: str) -> None:
    row = get_format(name)
    bits = torch.tensor([0x7FC00000, 0x7FFFFFFF, 0x7F800001, -1, -0x400000], dtype=torch.int32)
    stored = row.encode(bits.view(torch.float32))
    assert stored.tolist() == [NAN_BYTE[name]] * 5
    if name in FP8:
        assert row.decode(stored).isnan().all()


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("name", FP8)
def test_negative_zero_is_kept(name: str) -> None:
    row = get_format(name)
    stored = row.encode(torch.tensor([0.0, -0.0]))
    assert stored.tolist() == [0x00, 0x80]
    assert row.decode(stored).signbit().tolist() == [False, True]


def test_int8_byte_zero_stands_for_no_number() -> None:
    numbers = _all_16_bit_numbers(torch.float16)
    stored = get_format("int8").encode(numbers)
    assert torch.equal(stored == 0, numbers.isnan())


def test_model_format_changes_nothing() -> None:
    row = get_format("model")
    x = torch.tensor([1.0, -0.0, math.nan, math.inf], dtype=torch.bfloat16)
    assert not row.is_quantized
    assert row.storage_dtype is None
    assert row.decode(row.encode(x)) is x


def test_names() -> None:
    assert list(FORMATS) == ["fp8_e4m3", "fp8_e5m2", "int8", "model"]
    assert all(get_format(name).name == name for name in FORMATS)
    assert get_format("fp8") is get_format("fp8_e4m3fn") is get_format("fp8_e4m3")
    assert get_format(torch.float8_e4m3fn) is get_format("float8_e4m3fn") is get_format("fp8_e4m3")
    assert get_format(torch.float8_e5m2) is get_format("float8_e5m2") is get_format("fp8_e5m2")
    assert get_format(torch.int8) is get_format("int8")


@pytest.mark.parametrize("name", ["fp4", "", "FP8", "fp8_e4m3fnuz", None, 8, ["fp8"], torch.bfloat16])
def test_unknown_name_lists_the_known_ones(name: object) -> None:
    with pytest.raises(ValueError, match="unknown storage format") as error:
        get_format(name)  # type: ignore[arg-type]
    assert repr(name) in str(error.value)
    assert all(known in str(error.value) for known in (*FORMATS, *ALIASES))
    assert "nothing is stored in fewer than 8 bits" in str(error.value)
