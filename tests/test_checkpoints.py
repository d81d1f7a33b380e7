"""Scales in checkpoints: hand-made files of every kind, and a tiny model end to end."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoint_files import (
    FP8,
    INT8,
    PATHS,
    Hub,
    Tensors,
    layers_at,
    layers_of,
    scales_of_layers,
    with_hub,
    write,
    write_sharded,
)
from families import build
from helpers import llama_config, need_fake_quantization, prompt, tiny_llama
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from hf_kvquant import KVQuantConfig, LayerScales, QuantizedPagedCache, read_scales, write_scales
from hf_kvquant.checkpoints import ModelLayers, ScaleSource
from hf_kvquant.checkpoints.files import CheckpointFiles
from hf_kvquant.hosts.attention_modules import attention_paths
from hf_kvquant.hosts.conventions import CACHE_NAME
from hf_kvquant.hosts.files import model_layers
from hf_kvquant.scales import granularity_of


@pytest.fixture(autouse=True)
def _no_surprising_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*_scale")
        yield


# -- what is read ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("paths", [None, PATHS], ids=["by_number", "by_path"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("scheme", "name"), [(FP8, "fp8_e4m3"), (INT8, "int8")], ids=["fp8", "int8"])
def test_tensor_strategy(
    tmp_path: Path, scheme: dict[str, Any], name: str, dtype: torch.dtype, paths: ModelLayers | None
) -> None:
    given = {key: tensor.to(dtype) for key, tensor in scales_of_layers().items()}
    found = read_scales(write(tmp_path, given, scheme), paths)
    assert found is not None
    assert found.kv_cache_dtype == name
    assert not found.dynamic
    assert found.notes == []
    assert Path(found.path) == tmp_path
    for index, layer in enumerate(layers_of(found)):
        for side in "kv":
            key = f"model.layers.{index}.self_attn.{side}_scale"
            scale = getattr(layer, f"{side}_scale")
            assert scale.dtype == torch.float32
            assert torch.equal(scale, given[key].to(torch.float32))
        assert layer.k_zero is layer.v_zero is layer.q_scale is None
        assert granularity_of(layer.k_scale) == granularity_of(layer.v_scale) == "tensor"
    assert found.sources == [
        {
            f"{side}_scale": ScaleSource("model.safetensors", f"model.layers.{index}.self_attn.{side}_scale")
            for side in "kv"
        }
        for index in range(2)
    ]
    assert found.ignored == []


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_one_number_in_any_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    given = {key: tensor.reshape(shape) for key, tensor in scales_of_layers().items()}
    layers = layers_of(read_scales(write(tmp_path, given)))
    assert [tuple(layer.k_scale.shape) for layer in layers] == [(1,), (1,)]


def test_attn_head_strategy(tmp_path: Path) -> None:
    k_scale = torch.tensor([0.1, 0.2]).view(2, 1, 1)
    given = {key: k_scale * (1 + index) for index, key in enumerate(scales_of_layers())}
    layers = layers_of(read_scales(write(tmp_path, given, {**FP8, "strategy": "attn_head"})))
    assert [granularity_of(layer.k_scale) for layer in layers] == ["head", "head"]
    torch.testing.assert_close(layers[1].v_scale, torch.tensor([0.4, 0.8]))


def test_sharded(tmp_path: Path) -> None:
    tensors = scales_of_layers()
    names = list(tensors)
    shards = {f"model-0000{i + 1}-of-00004.safetensors": {name: tensors[name]} for i, name in enumerate(names)}
    layers = layers_of(read_scales(write_sharded(tmp_path, shards), PATHS))
    assert [layer.v_scale.item() for layer in layers] == [0.5, 1.0]


def test_files_beside_the_index_are_not_read(tmp_path: Path) -> None:
    write_sharded(tmp_path, {"model-00001-of-00001.safetensors": scales_of_layers()})
    (tmp_path / "consolidated.safetensors").write_bytes(b"not a checkpoint")
    assert len(layers_of(read_scales(tmp_path))) == 2


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_zero_points_become_numbers(tmp_path: Path, dtype: torch.dtype) -> None:
    """x = (q - zero_point) * scale."""
    given = scales_of_layers(1)
    given["model.layers.0.self_attn.k_zero_point"] = torch.tensor([-6.0]).to(dtype)
    given["model.layers.0.self_attn.v_zero_point"] = torch.tensor([3.0]).to(dtype)
    (layer,) = layers_of(read_scales(write(tmp_path, given, {**INT8, "symmetric": False})))
    assert layer.k_zero is not None
    assert layer.v_zero is not None
    torch.testing.assert_close(layer.k_zero, torch.tensor([0.06]))
    torch.testing.assert_close(layer.v_zero, torch.tensor([-1.5]))


def test_zero_points_of_zero_are_none(tmp_path: Path) -> None:
    given = scales_of_layers(1)
    given |= {f"model.layers.0.self_attn.{side}_zero_point": torch.zeros(1, dtype=torch.int8) for side in "kv"}
    (layer,) = layers_of(read_scales(write(tmp_path, given, INT8)))
    assert layer.k_zero is layer.v_zero is None


def test_zero_points_per_head(tmp_path: Path) -> None:
    given = {key: torch.tensor([0.1, 0.2]).view(2, 1, 1) for key in scales_of_layers(1)}
    given["model.layers.0.self_attn.k_zero_point"] = torch.tensor([1, -2], dtype=torch.int8).view(2, 1, 1)
    (layer,) = layers_of(read_scales(write(tmp_path, given, {**INT8, "strategy": "attn_head"})))
    assert layer.k_zero is not None
    torch.testing.assert_close(layer.k_zero, torch.tensor([-0.1, 0.4]))
    assert layer.v_zero is None


def test_q_scale(tmp_path: Path) -> None:
    given = scales_of_layers(1)
    given["model.layers.0.self_attn.q_scale"] = torch.tensor([0.25])
    found = read_scales(write(tmp_path, given))
    assert layers_of(found)[0].q_scale is not None
    assert layers_of(found)[0].q_scale.item() == 0.25  # type: ignore[union-attr]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0, -1.0, 2.5e-21, 9.5e29])
def test_garbage_in_q_scale_is_ignored(tmp_path: Path, bad: float) -> None:
    given = scales_of_layers(1)
    given["model.layers.0.self_attn.q_scale"] = torch.tensor([bad])
    with pytest.warns(UserWarning, match="q_scale is no finite, positive and plausible number; it is ignored"):
        found = read_scales(write(tmp_path, given))
    assert layers_of(found)[0].q_scale is None
    assert found is not None
    assert found.notes == [
        "model.layers.0.self_attn.q_scale is no finite, positive and plausible number; it is ignored"
    ]


@pytest.mark.parametrize("strategy", [None, "tensor", "token", "attn_head"])
@pytest.mark.parametrize("paths", [None, PATHS], ids=["by_number", "by_path"])
def test_dynamic(tmp_path: Path, strategy: str | None, paths: ModelLayers | None) -> None:
    found = read_scales(write(tmp_path, {}, {**FP8, "strategy": strategy, "dynamic": True}), paths)
    assert found is not None
    assert found.dynamic
    assert found.kv_cache_dtype == "fp8_e4m3"
    assert not any(found.layers)
    assert found.notes == []
    cache = QuantizedPagedCache(llama_config(), checkpoint=found)
    assert [row.kv_cache_dtype for row in cache.report().layers] == [("fp8_e4m3", "fp8_e4m3")] * 2
    assert [row.scales for row in cache.report().layers] == [("dynamic", "dynamic")] * 2


def test_a_dynamic_checkpoint_says_nothing_about_scales_of_another_format(tmp_path: Path) -> None:
    found = read_scales(write(tmp_path, {}, {**FP8, "dynamic": True}), PATHS)
    cache = QuantizedPagedCache(llama_config(), KVQuantConfig("int8"), checkpoint=found)
    assert cache.notes == []


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": {"kv_cache_scheme": INT8}},
        {"compression_config": {"kv_cache_scheme": INT8}},
        {"text_config": {"quantization_config": {"kv_cache_scheme": INT8}}},
        {"quantization_config": {"kv_cache_scheme": None}, "compression_config": {"kv_cache_scheme": INT8}},
    ],
    ids=["quantization_config", "compression_config", "text_config", "none_first"],
)
def test_where_the_scheme_is_declared(tmp_path: Path, config: dict[str, Any]) -> None:
    found = read_scales(write(tmp_path, config=config))
    assert found is not None
    assert found.kv_cache_dtype == "int8"


def test_defaults_of_the_scheme(tmp_path: Path) -> None:
    """What compressed-tensors leaves out of a config: 8 bits, int, static."""
    found = read_scales(write(tmp_path, config={"quantization_config": {"kv_cache_scheme": {}}}))
    assert found is not None
    assert (found.kv_cache_dtype, found.dynamic) == ("int8", False)


def test_undeclared_scales_are_taken_for_fp8(tmp_path: Path) -> None:
    found = read_scales(write(tmp_path, scheme=None))
    assert found is not None
    assert found.kv_cache_dtype == "fp8_e4m3"
    assert len(layers_of(found)) == 2
    assert found.notes == [f"{tmp_path} declares no KV cache format; its scales are taken to be for fp8_e4m3"]


def test_nothing_to_find(tmp_path: Path) -> None:
    assert read_scales(write(tmp_path / "plain", {}, scheme=None)) is None
    assert read_scales(write(tmp_path / "other", {}, config={"quantization_config": {"quant_method": "fp8"}})) is None
    (tmp_path / "empty").mkdir()
    assert read_scales(tmp_path / "empty") is None
    assert read_scales(str(tmp_path / "empty")) is None


def test_scales_of_weights_are_not_scales_of_the_cache(tmp_path: Path) -> None:
    names = ("weight_scale", "weight_scale_inv", "weight_scale_2", "input_scale", "qk_scale")
    weights = {f"model.layers.0.self_attn.{side}_proj.{name}": torch.ones(1) for side in "kv" for name in names}
    weights["model.layers.0.self_attn.o_proj.output_scale"] = torch.ones(1)
    assert read_scales(write(tmp_path, weights, scheme=None)) is None


# -- one side, or none -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["k", "v"])
@pytest.mark.parametrize("how", ["absent", "zero", "negative"])
def test_a_side_without_a_scale_is_dynamic(tmp_path: Path, missing: str, how: str) -> None:
    """Zero and negative are what some tools write for "not set"; what belongs to such a scale means nothing."""
    given = scales_of_layers()
    given |= {f"model.layers.1.self_attn.{name}": torch.ones(1) for name in (f"{missing}_zero_point", "q_scale")}
    key = f"model.layers.1.self_attn.{missing}_scale"
    other = "v" if missing == "k" else "k"
    if how == "absent":
        del given[key]
    else:
        given[key] = torch.tensor([0.0 if how == "zero" else -1.0])
    with pytest.warns(UserWarning, match=f"model.layers.1.self_attn has a usable {other}_scale but no {missing}_scale"):
        found = read_scales(write(tmp_path, given), PATHS)
    assert found is not None
    layer = layers_of(found)[1]
    assert set(layer.to_dict()) == ({"k_scale", "q_scale"} if missing == "v" else {"v_scale"})
    assert torch.equal(getattr(layer, f"{other}_scale"), given[f"model.layers.1.self_attn.{other}_scale"])
    assert set(found.sources[1]) == set(layer.to_dict())
    module = "model.layers.1.self_attn"
    assert found.notes == [
        f"{module} has a usable {other}_scale but no {missing}_scale; {missing.upper()} is dynamic there"
    ]
    row = QuantizedPagedCache(llama_config(), checkpoint=found).report().layers[1]
    assert row.kv_cache_dtype == ("fp8_e4m3", "fp8_e4m3")
    assert dict(zip("kv", row.scales, strict=True)) == {
        missing: "dynamic",
        other: f"checkpoint: {module}.{other}_scale",
    }


@pytest.mark.parametrize("names", [("k_scale", "kv_scale"), ("kv_scale",)], ids="+".join)
def test_a_scale_for_both_serves_both(tmp_path: Path, names: tuple[str, ...]) -> None:
    given = {f"model.layers.0.self_attn.{name}": torch.tensor([0.5 * len(name)]) for name in names}
    (layer,) = layers_of(read_scales(write(tmp_path, given)))
    assert (layer.k_scale.tolist(), layer.v_scale.tolist()) == ([0.5 * len(names[0])], [0.5 * len("kv_scale")])


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_layer_without_usable_scales_is_dynamic(tmp_path: Path, value: float) -> None:
    given = scales_of_layers()
    given |= {f"model.layers.0.self_attn.{side}_scale": torch.tensor([value]) for side in "kv"}
    found = read_scales(write(tmp_path, given), PATHS)
    assert found is not None
    assert found.layers[0] is None
    assert found.layers[1] is not None
    assert found.notes == [f"layer 0 has no scales in {tmp_path}; it is quantized dynamically"]
    cache = QuantizedPagedCache(llama_config(), checkpoint=found)
    assert [row.scales[0] for row in cache.report().layers] == [
        "dynamic",
        "checkpoint: model.layers.1.self_attn.k_scale",
    ]


def test_one_head_that_is_not_set_spoils_its_side(tmp_path: Path) -> None:
    given = {key: torch.tensor([0.1, 0.2]).view(2, 1, 1) for key in scales_of_layers(1)}
    given["model.layers.0.self_attn.k_scale"] = torch.tensor([0.1, 0.0]).view(2, 1, 1)
    with pytest.warns(UserWarning, match="no k_scale"):
        (layer,) = layers_of(read_scales(write(tmp_path, given, {**FP8, "strategy": "attn_head"})))
    assert layer.k_scale is None
    assert layer.v_scale.tolist() == given["model.layers.0.self_attn.v_scale"].flatten().tolist()


@pytest.mark.parametrize("value", [None, 0.0, -1.0])
def test_declared_without_scales(tmp_path: Path, value: float | None) -> None:
    given = {} if value is None else {key: torch.full((1,), value) for key in scales_of_layers()}
    with pytest.raises(ValueError, match="declares an 8-bit KV cache .* holds no usable k_scale / v_scale") as error:
        read_scales(write(tmp_path, given), PATHS)
    assert str(tmp_path) in str(error.value)
    assert "scales='dynamic'" in str(error.value)


def test_a_model_that_was_saved_without_its_scales(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """transformers knows no scales of KV caches, but keeps what declares them."""
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    quantization = {"quant_method": "compressed-tensors", "kv_cache_scheme": FP8}
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    model.config._name_or_path = str(tmp_path)
    with caplog.at_level("WARNING", logger="transformers"):
        cache = QuantizedPagedCache.from_model(model)
    message = "holds no usable k_scale / v_scale"
    assert message in caplog.text
    assert any(message in note and "scales are dynamic now" in note for note in cache.report().notes)
    assert {layer.kv_cache_dtype for layer in cache.report().layers} == {("int8", "int8")}
    with pytest.raises(ValueError, match=message):
        QuantizedPagedCache.from_model(model, scales="checkpoint")


def test_undeclared_and_unusable_is_nothing(tmp_path: Path) -> None:
    given = {key: torch.zeros(1) for key in scales_of_layers()}
    assert read_scales(write(tmp_path, given, scheme=None), PATHS) is None


# -- broken files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("scheme", [FP8, None], ids=["declared", "undeclared"])
def test_not_finite_names_file_and_key(tmp_path: Path, side: str, bad: float, scheme: dict[str, Any] | None) -> None:
    given = scales_of_layers()
    key = f"model.layers.1.self_attn.{side}_scale"
    given[key] = torch.tensor([bad])
    with pytest.raises(ValueError, match="NaN or infinite") as error:
        read_scales(write(tmp_path, given, scheme), PATHS)
    assert key in str(error.value)
    assert str(tmp_path / "model.safetensors") in str(error.value)


def test_a_zero_point_that_is_not_finite_names_file_and_key(tmp_path: Path) -> None:
    given = {**scales_of_layers(1), "model.layers.0.self_attn.k_zero_point": torch.tensor([float("nan")])}
    with pytest.raises(ValueError, match="NaN or infinite") as error:
        read_scales(write(tmp_path, given, INT8))
    assert "model.layers.0.self_attn.k_zero_point" in str(error.value)
    assert str(tmp_path / "model.safetensors") in str(error.value)


def test_an_empty_scale_names_file_and_key(tmp_path: Path) -> None:
    given = {**scales_of_layers(1), "model.layers.0.self_attn.v_scale": torch.ones(0)}
    with pytest.raises(ValueError, match="model.layers.0.self_attn.v_scale") as error:
        read_scales(write(tmp_path, given))
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    "file", ["../outside.safetensors", "/etc/passwd", "sub/model.safetensors", "", ".", "..", 3, None]
)
def test_an_index_may_only_name_files_of_its_directory(tmp_path: Path, file: Any) -> None:
    save_file(scales_of_layers(), tmp_path / "outside.safetensors")
    directory = tmp_path / "checkpoint"
    name = "model.layers.0.self_attn.k_scale"
    write_sharded(directory, {"model-00001-of-00001.safetensors": scales_of_layers()}, {name: file})
    with pytest.raises(ValueError, match="not a file of that directory") as error:
        read_scales(directory)
    assert "model.safetensors.index.json" in str(error.value)
    assert repr(file) in str(error.value)


def test_an_index_that_names_a_missing_file(tmp_path: Path) -> None:
    write_sharded(
        tmp_path, {"a.safetensors": scales_of_layers()}, {"model.layers.0.self_attn.k_scale": "b.safetensors"}
    )
    with pytest.raises(ValueError, match="b.safetensors"):
        read_scales(tmp_path)


def test_an_index_that_names_a_missing_tensor(tmp_path: Path) -> None:
    name = "model.layers.2.self_attn.k_scale"
    write_sharded(tmp_path, {"a.safetensors": scales_of_layers()}, {name: "a.safetensors"})
    with pytest.raises(ValueError, match=name) as error:
        read_scales(tmp_path)
    assert "a.safetensors" in str(error.value)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": []}', '{"weight_map"', "", "\x00", '"x"', "null"])
def test_a_broken_index_is_named(tmp_path: Path, content: str) -> None:
    write(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match="model.safetensors.index.json"):
        read_scales(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"3", b"{'a': 1}"], ids=repr)
def test_a_broken_config_is_named(tmp_path: Path, content: bytes) -> None:
    write(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match="config.json"):
        read_scales(tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 8, 60, -1])
def test_a_truncated_file_is_named(tmp_path: Path, kept: int) -> None:
    write(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match="model.safetensors cannot be read as safetensors"):
        read_scales(tmp_path)


@pytest.mark.parametrize("source", ["no/such/directory", "./nowhere", "/nowhere/at/all", "a b"])
def test_a_source_that_is_nothing_is_named(source: str) -> None:
    with pytest.raises(ValueError, match="neither a file, a directory nor a hub id") as error:
        read_scales(source)
    assert source in str(error.value)


@pytest.mark.parametrize(
    "scheme",
    [
        {**FP8, "num_bits": 4},
        {**INT8, "num_bits": 4},
        {**FP8, "num_bits": 4, "strategy": "tensor_group", "group_size": 16},  # NVFP4
        {**FP8, "strategy": "tensor_group", "group_size": 16},
        {**FP8, "strategy": "channel"},
        {**FP8, "strategy": "token"},
        {**FP8, "strategy": "group", "dynamic": True},
        {**FP8, "type": "bool"},
    ],
    ids=lambda scheme: "-".join(str(scheme[key]) for key in ("num_bits", "type", "strategy", "dynamic")),
)
def test_unsupported_schemes(tmp_path: Path, scheme: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="is not supported; supported are 8 bits") as error:
        read_scales(write(tmp_path, scheme=scheme))
    assert f"num_bits={scheme['num_bits']}, type={scheme['type']!r}, strategy={scheme['strategy']!r}" in str(
        error.value
    )
    assert str(tmp_path) in str(error.value)


# -- which layer -------------------------------------------------------------------------------------------------------

WRAPPERS = {
    "plain": "layers.{}.self_attn",
    "causal_lm": "model.layers.{}.self_attn",
    "wrapper": "model.language_model.layers.{}.self_attn",
    "old_wrapper": "language_model.model.layers.{}.self_attn",
}


@pytest.mark.parametrize("loaded", WRAPPERS.values(), ids=WRAPPERS.keys())
@pytest.mark.parametrize("stored", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_prefixes_of_wrappers(tmp_path: Path, stored: str, loaded: str) -> None:
    write(tmp_path, scales_of_layers(prefix=stored))
    found = read_scales(tmp_path, layers_at(*[loaded.format(index) for index in range(2)]))
    assert found is not None
    assert [layer.v_scale.item() for layer in layers_of(found)] == [0.5, 1.0]
    assert found.sources[1]["k_scale"].key == stored.format(1) + ".k_scale"


def test_layers_are_matched_by_path_not_by_order(tmp_path: Path) -> None:
    """Layer 10 comes before layer 2 in the alphabet, and some layers have no attention."""
    write(tmp_path, scales_of_layers(12))
    paths = [f"model.layers.{index}.self_attn" for index in (10, 2, 11)]
    found = read_scales(tmp_path, layers_at(paths[0], "", paths[1], paths[2]))
    assert found is not None
    assert [layer and layer.v_scale.item() for layer in found.layers] == [5.5, None, 1.5, 6.0]
    by_number = layers_of(read_scales(tmp_path))
    assert [layer.v_scale.item() for layer in by_number] == [0.5 * (index + 1) for index in range(12)]


def test_a_vision_tower_with_the_same_numbers_is_another_module(tmp_path: Path) -> None:
    tensors = scales_of_layers(prefix="model.language_model.layers.{}.self_attn")
    tensors |= {key: scale * 3 for key, scale in scales_of_layers(prefix="model.visual.layers.{}.self_attn").items()}
    write(tmp_path, tensors)
    found = read_scales(tmp_path, layers_at(*[f"model.language_model.layers.{index}.self_attn" for index in range(2)]))
    assert [layer.v_scale.item() for layer in layers_of(found)] == [0.5, 1.0]
    with pytest.raises(ValueError, match="both look like layer 0; name the model"):
        read_scales(tmp_path)


def test_scales_of_another_model(tmp_path: Path) -> None:
    write(tmp_path, scales_of_layers(prefix="transformer.h.{}.attn"))
    with pytest.raises(ValueError, match=r"transformer\.h\.0\.attn.*model\.layers\.0\.self_attn.*another model"):
        read_scales(tmp_path, PATHS)


def test_two_sets_of_scales_for_one_module(tmp_path: Path) -> None:
    """One of them may be the module's own path; otherwise nobody knows which one is meant."""
    tensors = scales_of_layers(1, "language_model.model.layers.{}.self_attn")
    tensors |= {
        name: scale * 3 for name, scale in scales_of_layers(1, "model.language_model.layers.{}.self_attn").items()
    }
    write(tmp_path, tensors)
    with pytest.raises(ValueError, match="two sets of scales for one module"):
        read_scales(tmp_path, layers_at("model.layers.0.self_attn"))
    found = read_scales(tmp_path, layers_at("language_model.model.layers.0.self_attn"))
    assert found is not None
    assert layers_of(found)[0].v_scale.item() == 0.5
    assert found.ignored == [f"model.language_model.layers.0.self_attn.{side}_scale" for side in "kv"]
    assert any("of no cache layer" in note for note in found.notes)


def test_prefixes_without_a_number_need_the_model(tmp_path: Path) -> None:
    write(tmp_path, scales_of_layers(1, "decoder.attention"))
    with pytest.raises(ValueError, match="no layer number in decoder.attention"):
        read_scales(tmp_path)
    assert len(layers_of(read_scales(tmp_path, layers_at("decoder.attention")))) == 1


@pytest.mark.parametrize("num_layers", [1, 3])
def test_another_number_of_layers(tmp_path: Path, num_layers: int) -> None:
    found = read_scales(write(tmp_path, scales_of_layers(num_layers)))
    with pytest.raises(ValueError, match=f"holds scales for {num_layers} layers, but this model has 2 cache layers"):
        QuantizedPagedCache(llama_config(), checkpoint=found)


# -- end to end --------------------------------------------------------------------------------------------------------


def _save_model(directory: Path, scheme: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[Path, Tensors]:
    """A tiny Llama with calibrated KV scales, as llm-compressor leaves it."""
    model = tiny_llama("sdpa", dtype)
    model.save_pretrained(directory)
    file = directory / "model.safetensors"
    shape = (2, 1, 1) if scheme["strategy"] == "attn_head" else (1,)
    scales = {key: (0.05 * (1 + index) * torch.ones(shape)).to(dtype) for index, key in enumerate(scales_of_layers())}
    save_file({**load_file(file), **scales}, file, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "quantization_status": "compressed",
        "config_groups": {},
        "ignore": [],
        "kv_cache_scheme": scheme,
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory, scales


def _load_quantized(directory: Path) -> LlamaForCausalLM:
    need_fake_quantization()
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="kvquant")
    model.generation_config.eos_token_id = None
    assert all(hasattr(layer.self_attn, "kv_cache") for layer in model.model.layers), "nothing fakes quantization"
    return model


def _load_plain(directory: Path) -> LlamaForCausalLM:
    config = AutoConfig.from_pretrained(directory)
    del config.quantization_config
    model = AutoModelForCausalLM.from_pretrained(directory, config=config, attn_implementation="kvquant")
    model.generation_config.eos_token_id = None
    assert not any(hasattr(layer.self_attn, "kv_cache") for layer in model.model.layers)
    return model


def _pages(model: LlamaForCausalLM, cache: QuantizedPagedCache) -> list[torch.Tensor]:
    """What a prompt and a few tokens leave in the cache."""
    with torch.no_grad():
        tokens = prompt()
        for chunk in (tokens[:, :15], tokens[:, 15:16], tokens[:, 16:]):
            model(chunk, past_key_values=cache)
    return [store.paged.pages for layer in cache.layers for store in (layer.k, layer.v)]


def _same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


SCHEMES = {
    "fp8_tensor": FP8,
    "int8_tensor": INT8,
    "fp8_attn_head": {**FP8, "strategy": "attn_head"},
}


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
@pytest.mark.parametrize(
    "options", [{}, {"kv_cache_dtype": "int8", "scales": "dynamic"}], ids=["own_scales", "dynamic_int8"]
)
def test_numbers_are_rounded_once(tmp_path: Path, scheme: dict[str, Any], options: dict[str, Any]) -> None:
    """compressed-tensors rounds K and V inside the model; under our cache the pages must not show it."""
    directory, scales = _save_model(tmp_path, scheme, torch.bfloat16)
    quantized, plain = _load_quantized(directory), _load_plain(directory)
    cache = QuantizedPagedCache.from_model(quantized, **options)
    expected = _pages(plain, QuantizedPagedCache.from_model(plain, **options))
    assert _same(_pages(quantized, cache), expected)

    notes = [note for note in cache.report().notes if "compressed-tensors" in note]
    assert len(notes) == 1
    assert "2 layers" in notes[0]
    assert "off now" in notes[0]
    if not options:
        assert {row.kv_cache_dtype[0] for row in cache.report().layers} == {
            "fp8_e4m3" if scheme["type"] == "float" else "int8"
        }
        for index, layer in enumerate(cache.layers):
            for side, store in zip("kv", (layer.k, layer.v), strict=True):
                key = f"model.layers.{index}.self_attn.{side}_scale"
                assert store.paged.scale is not None
                assert torch.equal(store.paged.scale.flatten(), scales[key].to(torch.float32).flatten())
                assert key in cache.report().layers[index].scales["kv".index(side)]

    # With the rounding left on, the pages differ; otherwise the comparison above would mean nothing.
    twice = QuantizedPagedCache.from_model(quantized, **options)
    for layer in quantized.model.layers:
        layer.self_attn.quantization_enabled = True
    assert not _same(_pages(quantized, twice), expected)


def test_generate_uses_the_scales(tmp_path: Path) -> None:
    directory, _ = _save_model(tmp_path, FP8)
    quantized, plain = _load_quantized(directory), _load_plain(directory)
    outputs = [
        model.generate(prompt(), max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
        for model in (quantized, plain)
    ]
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    for output in outputs:
        cache = output.past_key_values
        assert isinstance(cache, QuantizedPagedCache)
        assert [row.kv_cache_dtype for row in cache.report().layers] == [("fp8_e4m3", "fp8_e4m3")] * 2
        assert cache.report().layers[1].scales[1] == "checkpoint: model.layers.1.self_attn.v_scale"
    first, second = ([s.paged.pages for layer in o.past_key_values.layers for s in (layer.k, layer.v)] for o in outputs)
    assert _same(first, second)


def test_every_report_says_that_rounding_is_off(tmp_path: Path) -> None:
    directory, _ = _save_model(tmp_path, FP8)
    model = _load_quantized(directory)
    for _ in range(2):
        cache = QuantizedPagedCache.from_model(model)
        assert any("rounding is off" in note for note in cache.report().notes)


def test_dynamic_checkpoint_end_to_end(tmp_path: Path) -> None:
    directory, _ = _save_model(tmp_path, {**FP8, "dynamic": True})
    model = _load_plain(directory)
    cache = QuantizedPagedCache.from_model(model)
    _pages(model, cache)
    assert [(row.kv_cache_dtype[0], row.scales[0]) for row in cache.report().layers] == [("fp8_e4m3", "dynamic")] * 2


def test_scales_of_another_directory(tmp_path: Path) -> None:
    """A model without scales of its own, and scales that somebody calibrated for it."""
    directory, _ = _save_model(tmp_path, FP8)
    model = tiny_llama()
    for source in (directory, str(directory)):
        cache = QuantizedPagedCache.from_model(model, scales=source)
        assert cache.report().layers[0].scales[0] == "checkpoint: model.layers.0.self_attn.k_scale"


READ_OPTIONS: list[dict[str, Any]] = [
    {},
    {"kv_cache_dtype": "fp8"},
    {"kv_cache_dtype": "int8"},
    {"kv_cache_dtype": ("fp8", "int8")},
    {"kv_cache_dtype": "model"},
    {"skip_layers": [0]},
    {"q_dtype": "fp8"},
]


@pytest.mark.parametrize("attention", ["kvquant", "kvquant_int8"])
@pytest.mark.parametrize("options", READ_OPTIONS, ids=str)
@pytest.mark.parametrize("through", ["from_model", "generate"])
def test_scales_that_were_read_are_the_path_they_came_from(
    tmp_path: Path, through: str, options: dict[str, Any], attention: str
) -> None:
    """The format that they name, or another one; notes and the names of sources too."""
    directory, _ = _save_model(tmp_path, {**FP8, "strategy": "attn_head"})
    model = tiny_llama(attention)
    if attention == "kvquant_int8" and "q_dtype" in options:
        options = {**options, "kv_cache_dtype": "fp8"}

    def run(scales: Any) -> tuple[torch.Tensor, QuantizedPagedCache]:
        given = {**options, "scales": scales}
        cache = QuantizedPagedCache.from_model(model, **given) if through == "from_model" else None
        made = {"cache_config": given} if cache is None else {CACHE_NAME: cache}
        output = model.generate(prompt(), max_new_tokens=5, do_sample=False, return_dict_in_generate=True, **made)
        return output.sequences, getattr(output, CACHE_NAME)

    (expected, by_path), (tokens, by_scales) = run(directory), run(read_scales(directory, model))
    assert torch.equal(tokens, expected)
    assert str(by_scales.report()) == str(by_path.report())
    assert by_scales.report().notes == by_path.report().notes
    assert _same(*([s.paged.pages for x in cache.layers for s in (x.k, x.v)] for cache in (by_path, by_scales)))
    if not options:
        is_int8 = attention == "kvquant_int8"
        assert by_scales.report().layers[0].kv_cache_dtype == (("int8" if is_int8 else "fp8_e4m3"),) * 2
        assert any("they are not used for int8" in note for note in by_scales.notes) == is_int8


def test_scales_that_were_read_go_where_other_options_go(tmp_path: Path) -> None:
    """Into a cache made without a model, a saved generation configuration and a saved session."""
    directory, _ = _save_model(tmp_path / "scales", FP8)
    model = tiny_llama()
    found = read_scales(directory, model)
    expected = QuantizedPagedCache.from_model(model, scales=directory)
    pages = _pages(model, expected)
    assert _same(_pages(model, QuantizedPagedCache(model.config, KVQuantConfig(scales=found))), pages)

    model.generation_config.cache_config = {"scales": found}
    model.save_pretrained(tmp_path / "model")
    loaded = type(model).from_pretrained(tmp_path / "model", attn_implementation="kvquant")
    assert loaded.generation_config.cache_config["scales"]["path"] == str(directory)
    made = QuantizedPagedCache.from_model(loaded, **loaded.generation_config.cache_config)
    assert _same(_pages(loaded, made), pages)
    assert str(made.report()) == str(expected.report())

    made.save_pretrained(tmp_path / "session")
    restored = QuantizedPagedCache.from_pretrained(tmp_path / "session", loaded)
    assert [row.scales for row in restored.report().layers] == [row.scales for row in expected.report().layers]
    assert restored.kvquant.to_dict() == made.kvquant.to_dict()
    again = [cache.update(*torch.ones(2, 2, 2, 3, 16), 0) and cache.layers[0] for cache in (made, restored)]
    assert torch.equal(*(layer.k.paged.scale for layer in again))


def test_a_cache_without_a_model_reads_no_files(tmp_path: Path) -> None:
    config = llama_config()
    for scales in ("checkpoint", str(tmp_path), tmp_path):
        with pytest.raises(ValueError, match="a cache reads files for a model only; make it with from_model"):
            QuantizedPagedCache(config, KVQuantConfig(scales=scales))
    found = read_scales(write(tmp_path), PATHS)
    for scales in ("checkpoint", tmp_path):
        cache = QuantizedPagedCache(config, KVQuantConfig(scales=scales), checkpoint=found)
        assert cache.report().layers[0].kv_cache_dtype == ("fp8_e4m3", "fp8_e4m3")
    with pytest.raises(TypeError, match="checkpoint is a list, not what read_scales returned"):
        QuantizedPagedCache(config, checkpoint=layers_of(found))


def test_scales_that_were_read_for_another_model(tmp_path: Path) -> None:
    directory, _ = _save_model(tmp_path, {**FP8, "strategy": "attn_head"})
    found = read_scales(directory)
    with pytest.raises(ValueError, match="holds scales for 2 layers, but this model has 3 .* read_scales"):
        QuantizedPagedCache.from_model(tiny_llama(num_hidden_layers=3), scales=found)
    model = tiny_llama(num_key_value_heads=4)
    with pytest.raises(ValueError, match=r"shape \[2\], but this model needs .*made for another model"):
        _pages(model, QuantizedPagedCache.from_model(model, scales=found))
    with pytest.raises(TypeError, match="scales=None .read_scales gives that"):
        model.generate(prompt(), cache_config={"scales": read_scales(model)}, max_new_tokens=2)


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "some-org/not-on-this-machine"])
def test_auto_fetches_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model may have been made from a config alone, or its directory is gone; that is no reason to fail."""
    from hf_kvquant.checkpoints import files

    download, asked = files.snapshot_download, []
    monkeypatch.setattr(files, "snapshot_download", lambda *a, **k: asked.append(k) or download(*a, **k))
    model = tiny_llama()
    model.config._name_or_path = name
    cache = QuantizedPagedCache.from_model(model)
    assert cache.report().layers[0].scales[0].startswith("dynamic")
    assert any(f"{name} is not on this machine" in note for note in cache.report().notes)
    assert [options["local_files_only"] for options in asked] == [True]
    with pytest.raises(Exception, match="neither a file, a directory nor a hub id|snapshot"):
        QuantizedPagedCache.from_model(model, scales="checkpoint")


def test_a_model_from_a_folder_of_what_it_is_named_after(tmp_path: Path) -> None:
    directory, _ = _save_model(tmp_path / "folder", FP8)
    config = AutoConfig.from_pretrained(directory)
    del config.quantization_config
    model = AutoModelForCausalLM.from_pretrained(tmp_path, subfolder=directory.name, config=config)
    cache = QuantizedPagedCache.from_model(model)
    assert any(
        f"{tmp_path} has no config.json" in note and "name a checkpoint" in note for note in cache.report().notes
    )
    cache = QuantizedPagedCache.from_model(model, scales=directory)
    assert cache.report().layers[0].scales[0] == "checkpoint: model.layers.0.self_attn.k_scale"


def test_scales_are_asked_for_and_there_are_none(tmp_path: Path) -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match="scales='checkpoint', but a model that was not loaded from files"):
        QuantizedPagedCache.from_model(model, scales="checkpoint")
    write(tmp_path, {}, scheme=None)
    with pytest.raises(ValueError, match="has no KV scales; use scales='dynamic'"):
        QuantizedPagedCache.from_model(model, scales=tmp_path)
    assert QuantizedPagedCache.from_model(model).report().layers[0].scales[0].startswith("dynamic")


def test_scales_for_another_format(tmp_path: Path) -> None:
    """Scales of fp8 mean nothing to int8: an error if they were asked for, else a note."""
    directory, _ = _save_model(tmp_path, FP8)
    model = _load_plain(directory)
    with pytest.raises(ValueError, match="scales='checkpoint', but the scales of .* are for fp8_e4m3"):
        QuantizedPagedCache.from_model(model, scales="checkpoint", kv_cache_dtype="int8")
    cache = QuantizedPagedCache.from_model(model, kv_cache_dtype="int8")
    assert any("are for fp8_e4m3; they are not used for int8" in note for note in cache.notes)
    mixed = QuantizedPagedCache.from_model(model, kv_cache_dtype=("fp8", "int8"))
    sources = mixed.report().layers[0].scales
    assert sources[0] == "checkpoint: model.layers.0.self_attn.k_scale"
    assert sources[1].startswith("dynamic")


def test_scales_of_a_model_of_other_shape(tmp_path: Path) -> None:
    directory, _ = _save_model(tmp_path, {**FP8, "strategy": "attn_head"})
    model = tiny_llama(num_key_value_heads=4)
    with pytest.raises(ValueError, match=r"k_scale in .* has 2 values, .* does not fit 4 KV heads.* another model"):
        QuantizedPagedCache.from_model(model, scales=directory)


def test_attention_paths_of_a_loaded_model() -> None:
    assert attention_paths(tiny_llama(), 3) == [*(paths[0] for paths in PATHS.paths), None]
    assert model_layers(tiny_llama()) == replace(PATHS, model_type="llama")


def test_scales_of_an_encoder_are_not_of_the_cache(tmp_path: Path) -> None:
    given = scales_of_layers(prefix="model.decoder.layers.{}.self_attn")
    others = scales_of_layers(prefix="model.encoder.layers.{}.self_attn")
    others |= scales_of_layers(prefix="model.decoder.layers.{}.encoder_attn")
    found = read_scales(write(tmp_path, {**given, **others}), build("bart"))
    assert [layer.v_scale.item() for layer in layers_of(found)] == [0.5, 1.0]
    assert found is not None
    assert found.sources[1]["k_scale"].key == "model.decoder.layers.1.self_attn.k_scale"
    assert found.ignored == sorted(others)


def _snapshot(path: Path, first_scale: float) -> Path:
    """A model whose first layer has this scale."""
    _save_model(path, FP8)
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.0.self_attn.k_scale"].fill_(first_scale)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def _loaded(revision: str | None) -> PreTrainedModel:
    config = AutoConfig.from_pretrained("some-org/tiny", revision=revision)
    del config.quantization_config
    return AutoModelForCausalLM.from_pretrained("some-org/tiny", revision=revision, config=config)


def test_scales_of_a_hub_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model loaded by hub id finds its scales in the snapshot that from_pretrained has fetched."""
    commits = with_hub(monkeypatch, tmp_path / "hub", main=_snapshot(tmp_path / "main", 0.25))
    for revision in (None, commits["main"]):
        found = read_scales("some-org/tiny", revision=revision)
        assert found is not None
        assert found.kv_cache_dtype == "fp8_e4m3"
    cache = QuantizedPagedCache.from_model(_loaded(None))
    assert cache.report().layers[0].scales[0] == "checkpoint: model.layers.0.self_attn.k_scale"


def test_scales_of_the_revision_that_was_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of main only the configuration was fetched, so it is not what the model is."""
    with_hub(monkeypatch, tmp_path / "hub", main=None, v2=_snapshot(tmp_path / "v2", 0.75))
    found = read_scales(_loaded("v2"))
    assert found is not None
    assert layers_of(found)[0].k_scale.item() == 0.75
    assert not found.notes


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("other_scale", [0.25, 0.75])
def test_a_revision_that_nobody_knows_is_said(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    other_scale: float,
    recorded: bool,
) -> None:
    """Both were fetched; some versions of transformers keep which one was loaded."""
    both = {"main": _snapshot(tmp_path / "main", 0.25), "a": _snapshot(tmp_path / "a", other_scale)}
    commits = with_hub(monkeypatch, tmp_path / "hub", **both)
    model = _loaded("a")
    model.config._commit_hash = commits["a"] if recorded else None
    found = read_scales(model)
    assert found is not None
    assert layers_of(found)[0].k_scale.item() == (other_scale if recorded else 0.25)
    said = [] if recorded or other_scale == 0.25 else [f"at {commits['main']}; {commits['a']} is on this machine"]
    assert len(found.notes) == len(said)
    assert all(part in note and part in caplog.text for part, note in zip(said, found.notes, strict=True))
    assert QuantizedPagedCache.from_model(model, kv_cache_dtype="fp8").report().notes[: len(said)] == found.notes


def test_of_a_hub_checkpoint_only_what_has_scales_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights from one place and scales from another must not cost the second one's weights."""
    weights = {name: {f"{name}.weight": torch.ones(3)} for name in ("a", "b")}
    shards = {f"{name}.safetensors": tensors for name, tensors in weights.items()}
    hub = Hub(write_sharded(tmp_path / "remote", {**shards, "c.safetensors": scales_of_layers()}), tmp_path / "local")
    hub.install(monkeypatch)
    with pytest.raises(FileNotFoundError, match="some-org/tiny is not on this machine"):
        read_scales("some-org/tiny", fetch=False)
    for _ in range(2):
        assert len(layers_of(read_scales("some-org/tiny"))) == 2
        assert hub.present() == {"config.json", "model.safetensors.index.json", "c.safetensors"}
    whole = CheckpointFiles.find("some-org/tiny")  # who copies a checkpoint needs all of it
    assert hub.present() > set(whole.tensors.values()) == {*shards, "c.safetensors"}
    # Somebody had loaded the configuration alone: what is missing is fetched when it is asked for.
    (hub.local / "c.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="not on this machine, or not as a whole"):
        read_scales("some-org/tiny", fetch=False)
    assert len(layers_of(read_scales("some-org/tiny"))) == 2


@pytest.mark.parametrize("file", ["hf_kvquant_scales.json", "kv_cache_scales.json"])
def test_files_of_scales_beside_a_model_that_was_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    """Loading a model fetches its configuration and weights; the hub is asked once what else there is."""
    hub = Hub(tmp_path / "remote", tmp_path / "local")
    hub.install(monkeypatch)
    tiny_llama().save_pretrained(hub.remote)
    layers = [LayerScales(torch.tensor([0.5]), torch.tensor([0.5]))] * 2
    given = SimpleNamespace(kv_cache_dtype="fp8_e4m3", layers=layers)
    write_scales(given, hub.remote, layout="sidecar" if "hf_kvquant" in file else "vllm-json")
    hub.load("config.json", "model.safetensors")
    model = tiny_llama()
    model.config._name_or_path = "some-org/tiny"
    model.config._commit_hash = "0123456789abcdef0123456789abcdef01234567"
    assert read_scales(model, fetch=False) is None
    assert read_scales("some-org/tiny", fetch=False) is None
    hub.is_reachable = False  # what is here is enough then
    assert read_scales("some-org/tiny") is None
    hub.is_reachable = True
    for source in ("some-org/tiny", model):
        assert read_scales(source, model).sources[0]["k_scale"].file == file
        num_asked = hub.num_asked
        assert read_scales(source, model).sources[0]["k_scale"].file == file
        assert hub.num_asked == num_asked


def test_modelopt_end_to_end(tmp_path: Path) -> None:
    """transformers leaves such scales lie; the cache finds them in the model's own files."""
    tiny_llama("sdpa").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    scales = {f"model.layers.{i}.self_attn.{s}_proj.{s}_scale": torch.tensor(0.03) for i in range(2) for s in "kv"}
    save_file({**load_file(file), **scales}, file, metadata={"format": "pt"})
    content = {"producer": {"name": "modelopt"}, "quantization": {"kv_cache_quant_algo": "FP8"}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(content))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="kvquant")
    model.generation_config.eos_token_id = None
    output = model.generate(prompt(), max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    cache = output.past_key_values
    assert [row.kv_cache_dtype for row in cache.report().layers] == [("fp8_e4m3", "fp8_e4m3")] * 2
    assert cache.report().layers[1].scales[0] == "checkpoint: model.layers.1.self_attn.k_proj.k_scale"
    assert all(torch.equal(layer.k.paged.scale.flatten(), torch.tensor([0.03])) for layer in cache.layers)
