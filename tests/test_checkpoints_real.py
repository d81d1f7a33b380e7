"""Checkpoints that real tools wrote (tests/checkpoints/make.py), held to what these tools compute with them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import prompt, tiny_llama
from safetensors.torch import load_file

from hf_kvquant import LayerScales, read_scales
from hf_kvquant.checkpoints import CheckpointScales
from hf_kvquant.ops import reference
from hf_kvquant.scales import as_head_channel, granularity_of

ROOT = Path(__file__).parent / "checkpoints"
OTHERS = ("modelopt_nvfp4", "llm_compressor_fp8_dynamic")
STATIC = sorted(path.parent.name for path in ROOT.glob("*/config.json") if path.parent.name not in OTHERS)
PRODUCERS = {
    "llm_compressor": "compressed-tensors",
    "auto_round": "compressed-tensors",
    "modelopt": "modelopt",
    "quark_native": "quark",
    "quark_for_vllm": "autofp8",
}
# K and V after positions, of the two layers of a model with two heads of 16 channels.
H, D = 2, 16


@pytest.fixture(autouse=True)
def _query_scales_are_memory_that_was_never_written() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*q_scale is no finite, positive and plausible number")
        yield


def read(name: str) -> CheckpointScales:
    found = read_scales(ROOT / name, tiny_llama())
    assert found is not None
    return found


def test_every_checkpoint_is_here() -> None:
    assert len(STATIC) == 13


@pytest.mark.parametrize("name", STATIC)
def test_static_scales(name: str) -> None:
    found = read(name)
    assert found.producer == next(producer for start, producer in PRODUCERS.items() if name.startswith(start))
    assert found.kv_cache_dtype == ("int8" if "int8" in name else "fp8_e4m3")
    assert not found.dynamic
    assert all(layer is not None for layer in found.layers)
    granularity = "head" if "head" in name else "tensor"
    assert {granularity_of(layer.k_scale) for layer in found.layers if layer is not None} == {granularity}
    in_file = load_file(ROOT / name / "model.safetensors")
    for layer, sources in zip(found.layers, found.sources, strict=True):
        for part, source in sources.items():
            if part.endswith("scale"):
                assert torch.equal(getattr(layer, part), in_file[source.key].float().flatten())
    by_number = read_scales(ROOT / name)
    assert by_number is not None
    assert by_number.sources == found.sources


@pytest.mark.parametrize("name", STATIC)
def test_what_is_noted(name: str) -> None:
    found = read(name)
    of_queries = [note for note in found.notes if "q_scale" in note]
    before_rotation = [note for note in found.notes if "before their rotary embedding" in note]
    assert len(of_queries) == (2 if name.startswith("llm_compressor_fp8_attention") else 0)
    assert len(before_rotation) == (1 if name.startswith("quark") else 0)
    assert len(found.notes) == len(of_queries) + len(before_rotation)
    with_queries = [layer is not None and layer.q_scale is not None for layer in found.layers]
    assert with_queries == [name == "auto_round_fp8_attention"] * 2
    assert found.ignored == []  # what is left out, zero points of the query among them, belongs to nothing that is read


def numbers_between_codes(kind: str) -> torch.Tensor:
    """Quotients x / scale `[N]` that no format rounds to a tie: a rounding error of fp32 changes no code."""
    if kind == "int8":
        return torch.arange(-126.0, 126.0) + 0.25
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    return values[values.isfinite() & (values != 0)] * (1 + 1 / 64)


def stored(x: torch.Tensor, layer: LayerScales, side: str, kind: str) -> torch.Tensor:
    """What pages make of `x` `[1, H, N, D]`."""
    scale = as_head_channel(getattr(layer, f"{side}_scale"), H, D, side)
    zero = getattr(layer, f"{side}_zero")
    zero = None if zero is None else as_head_channel(zero, H, D, side)
    codes, _, _ = reference.quantize(x, kind, scale, zero, dynamic=False)
    return reference.dequantize(codes, kind, scale, zero, token_scale=None)


@pytest.mark.parametrize("name", [name for name in STATIC if name.startswith(("llm", "auto_round"))])
def test_the_tools_own_quantization(name: str) -> None:
    """compressed-tensors' fake quantization with the scales in the file gives what our pages hold."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    fake_quantize = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward").fake_quantize
    config = json.loads((ROOT / name / "config.json").read_text())
    arguments = quantization.QuantizationArgs(**config["quantization_config"]["kv_cache_scheme"])
    in_file = load_file(ROOT / name / "model.safetensors")
    found = read(name)
    kind = found.kv_cache_dtype
    assert kind is not None
    for index, layer in enumerate(found.layers):
        assert layer is not None
        for side in "kv":
            prefix = f"model.layers.{index}.self_attn.{side}"
            scale, steps = in_file[f"{prefix}_scale"].float(), in_file.get(f"{prefix}_zero_point")
            offset = torch.zeros(1) if steps is None else steps.float()
            x = (numbers_between_codes(kind)[:, None].expand(-1, D) - offset) * scale
            x = x.expand(1, H, -1, D).contiguous()
            theirs = fake_quantize(x, scale, steps, arguments)
            ours = stored(x, layer, side, kind)
            # The same codes; what is left is the rounding of (q - zero_point) * scale against q * scale + zero.
            size = theirs.abs() + 2 * (offset * scale).abs().max()
            assert bool(((ours - theirs).abs() <= 2 * torch.finfo(torch.float32).eps * size).all())
            assert not torch.equal(theirs, x)


def test_modelopt_affine() -> None:
    """`x - bias` is quantized, and the bias is one per head and channel."""
    found, plain = read("modelopt_fp8_affine"), read("modelopt_fp8")
    in_file = load_file(ROOT / "modelopt_fp8_affine" / "model.safetensors")
    for index, layer in enumerate(found.layers):
        assert layer is not None
        for side in "kv":
            zero = getattr(layer, f"{side}_zero")
            assert torch.equal(
                zero, in_file[f"model.layers.{index}.self_attn.{side}_proj.{side}_bias"].float().view(H, D)
            )
            scale = as_head_channel(getattr(layer, f"{side}_scale"), H, D, side)
            x = (numbers_between_codes("fp8_e4m3")[:, None] * scale[:, None] + zero[:, None])[None]
            expected = ((x - zero[:, None]) / scale[:, None]).to(torch.float8_e4m3fn).float() * scale[:, None] + zero[
                :, None
            ]
            assert torch.equal(stored(x, layer, side, "fp8_e4m3"), expected)
    assert all(layer is not None and layer.k_zero is layer.v_zero is None for layer in plain.layers)


def test_dynamic() -> None:
    found = read("llm_compressor_fp8_dynamic")
    assert (found.dynamic, found.kv_cache_dtype, found.layers, found.notes) == (True, "fp8_e4m3", [None, None], [])


def test_nvfp4() -> None:
    with pytest.raises(ValueError, match="'NVFP4', which is not supported"):
        read("modelopt_nvfp4")


@pytest.mark.parametrize("name", [*STATIC, "llm_compressor_fp8_dynamic"])
def test_generate(name: str) -> None:
    options: dict[str, Any] = {"scales": ROOT / name}
    output = tiny_llama().generate(
        prompt(), max_new_tokens=4, do_sample=False, return_dict_in_generate=True, cache_config=options
    )
    rows = output.past_key_values.report().layers
    assert {row.kv_cache_dtype[0] for row in rows} == {"int8" if "int8" in name else "fp8_e4m3"}
    assert all(("dynamic" in source) == ("dynamic" in name) for row in rows for source in row.scales)
