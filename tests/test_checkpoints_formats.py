"""Every producer's names, declarations, shapes and traps, on hand-made files."""

from __future__ import annotations

import json
import re
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import FP8, PATHS, Tensors, layers_at, layers_of, scales_of_layers, write, write_statistics
from helpers import llama_config, prompt, tiny_llama
from safetensors.torch import save_file

from hf_kvquant import KVQuantConfig, QuantizedPagedCache, read_scales
from hf_kvquant.checkpoints import CheckpointScales, ModelLayers, ScaleSource
from hf_kvquant.scales import granularity_of

HEADS = {"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
PREFIX = "model.layers.{}.self_attn"


@pytest.fixture(autouse=True)
def _no_surprising_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning)
        yield


def tensors_called(names: dict[str, Any], num_layers: int = 2) -> Tensors:
    """`names` with `{}` for the layer; its numbers grow with the layer."""
    return {
        name.format(index): torch.as_tensor(value) * (index + 1)
        for index in range(num_layers)
        for name, value in names.items()
    }


def checkpoint(directory: Path, names: dict[str, Any], quantization: Any = None, **config: Any) -> Path:
    config = {**HEADS, **config}
    if quantization is not None:
        config["quantization_config"] = quantization
    return write(directory, tensors_called(names), config=config)


def read(source: Path, model: ModelLayers | None = PATHS) -> CheckpointScales:
    found = read_scales(source, model)
    assert found is not None
    return found


def spec(**changes: Any) -> dict[str, Any]:
    return {"output_tensors": {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False, **changes}}


AUTOFP8 = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": [], "kv_cache_scheme": "static"}
COMPRESSED = {"quant_method": "compressed-tensors", "kv_cache_scheme": FP8}
MODELOPT = {"quant_method": "modelopt", "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}}
MODELOPT_NESTED = {"quant_method": "modelopt", "quantization": {"kv_cache_quant_algo": "fp8"}}
GROUP = {"kv_cache_group": ["*k_proj", "*v_proj"], "min_kv_scale": 0.0}
QUARK = {"quant_method": "quark", "export": GROUP, "layer_quant_config": {"*k_proj": spec(), "*v_proj": spec()}}
QUARK_NEW = {"quant_method": "quark", "kv_cache_quant_config": {"*k_proj": spec(), "*v_proj": spec()}}
QUARK_FP8 = {**AUTOFP8, "export": GROUP}
ATTENTION = {
    "quant_method": "compressed-tensors",
    "kv_cache_scheme": None,
    "config_groups": {"group_0": {"targets": ["LlamaAttention"], "weights": None, "input_activations": FP8}},
}
AUTOROUND = {
    "quant_method": "compressed-tensors",
    "provider": "auto-round",
    "attention_input_activations": {"targets": ["LlamaAttention"], "input_activations": FP8},
}
ABBREVIATED = {
    "quant_method": "compressed-tensors",
    "kv_cache_scheme": {"num_bits": 8, "strategy": "tensor", "type": "float"},
}

K, V = 0.25, 0.5
OWN = {f"{PREFIX}.k_scale": [K], f"{PREFIX}.v_scale": [V]}
PROJECTIONS = {f"{PREFIX}.k_proj.k_scale": K, f"{PREFIX}.v_proj.v_scale": V}
WRAPPED = {name.replace("_proj.", "_proj.base_layer."): value for name, value in PROJECTIONS.items()}
OUTPUTS = {f"{PREFIX}.k_proj.output_scale": K, f"{PREFIX}.v_proj.output_scale": V}
SHARED = {f"{PREFIX}.kv_scale": K}
CACHES = {f"{PREFIX}.k_cache.scale": K, f"{PREFIX}.v_cache.scale": [V]}

# What is in the files -> producer, K's and V's scale of the first layer.
CASES: dict[str, tuple[dict[str, Any], Any, str, float, float]] = {
    "modelopt": (PROJECTIONS, MODELOPT, "modelopt", K, V),
    "modelopt_nested": (PROJECTIONS, MODELOPT_NESTED, "modelopt", K, V),
    "modelopt_names_under_compressed_tensors": (PROJECTIONS, COMPRESSED, "compressed-tensors", K, V),
    "modelopt_wrapped": (WRAPPED, MODELOPT, "modelopt", K, V),
    "fused_qkv": ({f"{PREFIX}.qkv_proj.k_scale": K, f"{PREFIX}.qkv_proj.v_scale": V}, MODELOPT, "modelopt", K, V),
    "fused_qkqkv": ({f"{PREFIX}.qkqkv_proj.k_scale": K, f"{PREFIX}.qkqkv_proj.v_scale": V}, MODELOPT, "modelopt", K, V),
    "quark": (OUTPUTS, QUARK, "quark", K, V),
    "quark_new": (OUTPUTS, QUARK_NEW, "quark", K, V),
    "quark_fused": ({f"{PREFIX}.query_key_value.output_scale": K}, QUARK, "quark", K, K),
    "quark_dbrx": ({f"{PREFIX}.Wqkv.output_scale": [K]}, QUARK, "quark", K, K),
    "quark_fp8": (OWN, QUARK_FP8, "autofp8", K, V),
    "compressed_tensors_0.5": (OUTPUTS, COMPRESSED, "compressed-tensors", K, V),
    "compressed_tensors_attention": (OWN, ATTENTION, "compressed-tensors", K, V),
    "autoround": (OWN, AUTOROUND, "compressed-tensors", K, V),
    "autoround_gaudi": (OWN, {**AUTOROUND, "fp8_dtype_flavor": "float8_e4m3fnuz"}, "compressed-tensors", K, V),
    "autofp8": ({f"{PREFIX}.k_scale": K, f"{PREFIX}.v_scale": V}, AUTOFP8, "autofp8", K, V),
    "autofp8_shared": (SHARED, AUTOFP8, "autofp8", K, K),
    "angelslim": (CACHES, ABBREVIATED, "compressed-tensors", K, V),
    "angelslim_fp8": (CACHES, AUTOFP8, "autofp8", K, V),
    "vllm_inside": ({f"{PREFIX}.attn.k_scale": K, f"{PREFIX}.attn.v_scale": V}, COMPRESSED, "compressed-tensors", K, V),
}  # fmt: skip


@pytest.mark.parametrize("model", [PATHS, None], ids=["by_path", "by_number"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_names_and_declarations(
    tmp_path: Path, case: tuple[dict[str, Any], Any, str, float, float], model: ModelLayers | None
) -> None:
    names, quantization, producer, k_scale, v_scale = case
    found = read(checkpoint(tmp_path, names, quantization), model)
    assert (found.producer, found.kv_cache_dtype, found.dynamic, found.ignored) == (producer, "fp8_e4m3", False, [])
    for index, layer in enumerate(layers_of(found)):
        assert (layer.k_scale.tolist(), layer.v_scale.tolist()) == ([k_scale * (index + 1)], [v_scale * (index + 1)])
        assert layer.q_scale is layer.k_zero is layer.v_zero is None
        keys = {source.key for source in found.sources[index].values()}
        assert keys == {name.format(index) for name in names}
        assert {source.file for source in found.sources[index].values()} == {"model.safetensors"}


@pytest.mark.parametrize("names", [PROJECTIONS, OUTPUTS, SHARED, CACHES, OWN], ids=lambda names: next(iter(names)))
def test_undeclared(tmp_path: Path, names: dict[str, Any]) -> None:
    found = read(checkpoint(tmp_path, names))
    assert found.kv_cache_dtype == "fp8_e4m3"
    assert [layer.k_scale.item() for layer in layers_of(found)] == [K, 2 * K]
    assert found.notes == [f"{tmp_path} declares no KV cache format; its scales are taken to be for fp8_e4m3"]


@pytest.mark.parametrize(
    ("names", "quantization", "is_noted"),
    [
        (OUTPUTS, QUARK, True),
        (OUTPUTS, {**QUARK, "kv_cache_post_rope": True}, False),
        (OUTPUTS, AUTOFP8, True),
        (CACHES, AUTOFP8, False),  # whose names say that AngelSlim measured them
    ],
)
def test_keys_measured_before_rotation(tmp_path: Path, names: Any, quantization: Any, is_noted: bool) -> None:
    """Such scales are what servers use too; they may clip a little, and the report says so."""
    found = read(checkpoint(tmp_path, names, quantization))
    assert any("before their rotary embedding" in note for note in found.notes) == is_noted


def test_keys_without_a_scale_were_not_measured_at_all(tmp_path: Path) -> None:
    names = {name: value for name, value in OUTPUTS.items() if "v_proj" in name}
    with pytest.warns(UserWarning, match="K is dynamic there"):
        found = read(checkpoint(tmp_path, names, QUARK))
    assert not any("before their rotary embedding" in note for note in found.notes)


def test_query_scales(tmp_path: Path) -> None:
    for index, (names, name) in enumerate(((OWN, "q_scale"), (OUTPUTS, "q_proj.output_scale"), (CACHES, "q.scale"))):
        found = read(checkpoint(tmp_path / str(index), {**names, f"{PREFIX}.{name}": 0.75}))
        assert [layer.q_scale.tolist() for layer in layers_of(found)] == [[0.75], [1.5]]  # type: ignore[union-attr]
        assert found.sources[1]["q_scale"].key == f"{PREFIX}.{name}".format(1)


def transformed(*locations: str) -> dict[str, Any]:
    """What compressed-tensors writes of SpinQuant's R3."""
    applied = [{"targets": ["re:.*self_attn$"], "location": location, "inverse": False} for location in locations]
    return {"config_groups": {"R1": {"type": "hadamard", "apply": []}, "R3": {"type": "hadamard", "apply": applied}}}


@pytest.mark.parametrize(
    ("locations", "used"),
    [
        (["weight_output", "input"], {"k_scale", "v_scale", "q_scale"}),
        (["q_attn"], {"k_scale", "v_scale"}),
        (["q_attn", "k_cache"], {"v_scale"}),
        (["v_cache"], {"k_scale", "q_scale"}),
        (["k_cache", "v_cache"], set()),
    ],
    ids=["weights", "q", "k", "v", "both"],
)
def test_scales_of_transformed_numbers(tmp_path: Path, locations: list[str], used: set[str]) -> None:
    """Nobody transforms K or V on their way into this cache, so such scales have the wrong range."""
    quantization = {**COMPRESSED, "transform_config": transformed(*locations)}
    found = read(checkpoint(tmp_path, {**OWN, f"{PREFIX}.q_scale": 0.75}, quantization))
    assert [set(sources) for sources in found.sources] == [used, used]
    assert [set() if layer is None else set(layer.to_dict()) for layer in found.layers] == [used, used]
    assert found.dynamic == (not used)
    of_sides = [location for location in locations if location.endswith(("cache", "attn"))]
    said = [note for note in found.notes if "which transformers does not do; its scales are not used" in note]
    assert sorted(re.findall(r"transform_config: (\w+)", "".join(said))) == sorted(of_sides)
    row = QuantizedPagedCache(llama_config(), checkpoint=found).report().layers[0]
    assert row.kv_cache_dtype == ("fp8_e4m3", "fp8_e4m3")
    assert [source == "dynamic" for source in row.scales] == [f"{side}_scale" not in used for side in "kv"]


def test_a_scale_for_both_of_which_one_is_transformed(tmp_path: Path) -> None:
    quantization = {**COMPRESSED, "transform_config": transformed("k_cache")}
    layers = layers_of(read(checkpoint(tmp_path, SHARED, quantization)))
    assert [(layer.k_scale, layer.v_scale.tolist()) for layer in layers] == [(None, [K]), (None, [2 * K])]


# -- NVIDIA ModelOpt ---------------------------------------------------------------------------------------------------


def hf_quant_config(directory: Path, algorithm: Any) -> Path:
    content = {"producer": {"name": "modelopt", "version": "0.23"}, "quantization": {"kv_cache_quant_algo": algorithm}}
    return write_json(directory, "hf_quant_config.json", content)


@pytest.mark.parametrize(("algorithm", "name"), [("FP8", "fp8_e4m3"), ("fp8", "fp8_e4m3"), ("INT8", "int8")])
def test_modelopt_with_a_file_of_its_own(tmp_path: Path, algorithm: str, name: str) -> None:
    checkpoint(tmp_path, PROJECTIONS)
    hf_quant_config(tmp_path, algorithm)
    found = read(tmp_path)
    assert (found.producer, found.kv_cache_dtype, found.notes) == ("modelopt", name, [])


@pytest.mark.parametrize(
    ("algorithm", "said"),
    [
        ("INT8", "config.json declares static fp8_e4m3, hf_quant_config.json declares static int8; config.json is"),
        ("NVFP4", "hf_quant_config.json declares a KV cache of format 'NVFP4', .*; config.json is followed"),
        ("FP8", None),
        (None, None),
    ],
)
@pytest.mark.parametrize("quantization", [COMPRESSED, MODELOPT], ids=["compressed-tensors", "modelopt"])
def test_config_json_comes_before_a_file_beside_it(
    tmp_path: Path, quantization: Any, algorithm: str | None, said: str | None
) -> None:
    """As in vLLM: the file may be of an earlier quantization."""
    checkpoint(tmp_path, PROJECTIONS, quantization)
    hf_quant_config(tmp_path, algorithm)
    found = read(tmp_path)
    assert found.kv_cache_dtype == "fp8_e4m3"
    assert [re.search(str(said), note) is not None for note in found.notes] == ([True] if said else [])


@pytest.mark.parametrize("algorithm", [None, "None", ""])
def test_modelopt_that_quantizes_no_cache(tmp_path: Path, algorithm: str | None) -> None:
    checkpoint(tmp_path, {}, {"quant_method": "modelopt", "kv_cache_quant_algo": algorithm})
    hf_quant_config(tmp_path, algorithm)
    assert read_scales(tmp_path, PATHS) is None


def test_modelopt_int8_without_scales_is_dynamic(tmp_path: Path) -> None:
    """1.0 would leave most numbers no more than three codes."""
    found = read(checkpoint(tmp_path, {}, {"quant_method": "modelopt", "kv_cache_scheme": "INT8"}))
    assert (found.kv_cache_dtype, found.dynamic, found.layers) == ("int8", True, [None, None])
    assert found.notes == [f"config.json declares int8, but {tmp_path} holds no KV scales; they are dynamic"]


@pytest.mark.parametrize("model", [PATHS, None], ids=["by_path", "by_number"])
def test_modelopt_means_one_where_it_writes_nothing(tmp_path: Path, model: ModelLayers | None) -> None:
    found = read(checkpoint(tmp_path, {}, MODELOPT), model)
    assert [(layer.k_scale.item(), layer.v_scale.item()) for layer in layers_of(found)] == [(1.0, 1.0)] * 2
    assert any("modelopt means 1.0 by that" in note for note in found.notes)
    cache = QuantizedPagedCache(llama_config(), checkpoint=found)
    assert cache.report().layers[0].scales == ("checkpoint: 1.0 (declared without a scale)",) * 2


def test_modelopt_ones_need_the_number_of_layers(tmp_path: Path) -> None:
    write(tmp_path, {}, config={"quantization_config": MODELOPT})
    with pytest.raises(ValueError, match="how many layers it has; name the model"):
        read_scales(tmp_path)
    hybrid = layers_at("model.layers.0.self_attn", "", "model.layers.2.self_attn")
    assert [layer is None for layer in read(tmp_path, hybrid).layers] == [False, True, False]


def test_one_is_a_scale(tmp_path: Path) -> None:
    """ModelOpt up to 0.42 wrote 1.0 for whatever was smaller."""
    found = read(checkpoint(tmp_path, dict.fromkeys(PROJECTIONS, 1.0), MODELOPT))
    assert [layer.k_scale.item() for layer in layers_of(found)] == [1.0, 2.0]
    assert found.notes == []


def test_modelopt_affine(tmp_path: Path) -> None:
    """What is added after scaling is per channel; the bias of the projection itself is something else."""
    bias = torch.arange(32.0).view(1, 2, 1, 16).to(torch.bfloat16)
    names = {
        **PROJECTIONS,
        f"{PREFIX}.k_proj.k_bias": bias,
        f"{PREFIX}.v_proj.v_bias": -bias,
        f"{PREFIX}.k_proj.bias": torch.ones(32),
    }
    layers = layers_of(read(checkpoint(tmp_path, names, MODELOPT)))
    for index, layer in enumerate(layers):
        assert layer.k_zero is not None
        assert layer.v_zero is not None
        assert torch.equal(layer.k_zero, torch.arange(32.0).view(2, 16) * (index + 1))
        assert torch.equal(layer.v_zero, -layer.k_zero)
        assert layer.k_scale.tolist() == [K * (index + 1)]


@pytest.mark.parametrize("scheme", ["NVFP4", "NVFP4_AFFINE", "nvfp4"])
def test_nvfp4_is_not_supported(tmp_path: Path, scheme: str) -> None:
    with pytest.raises(ValueError, match=f"format '{scheme}', which is not supported.*scales='dynamic'") as error:
        read_scales(checkpoint(tmp_path, PROJECTIONS, {"quant_method": "modelopt", "kv_cache_scheme": scheme}))
    assert str(tmp_path) in str(error.value)


def test_layers_that_predict_further_tokens(tmp_path: Path) -> None:
    """They carry scales like any layer; the model that is loaded has not got them."""
    directory = write(tmp_path, tensors_called(PROJECTIONS, 3), config={**HEADS, "quantization_config": MODELOPT})
    for model in (PATHS, None):
        found = read(directory, model)
        assert [layer.k_scale.item() for layer in layers_of(found)] == [K, 2 * K]
        assert found.ignored == [name.format(2) for name in PROJECTIONS]
        assert any("2 names look like KV scales but are of no cache layer" in note for note in found.notes)


def test_towers_with_the_same_numbers(tmp_path: Path) -> None:
    names = {name.replace("model.", "model.language_model."): value for name, value in PROJECTIONS.items()}
    tower = {name.replace("model.", "model.vision_tower."): 7.0 for name in PROJECTIONS}
    found = read(checkpoint(tmp_path, {**tower, **names}, MODELOPT))
    assert [layer.k_scale.item() for layer in layers_of(found)] == [K, 2 * K]
    assert len(found.ignored) == 4
    assert all("vision_tower" in name for name in found.ignored)


def test_hybrid_models(tmp_path: Path) -> None:
    names = {f"backbone.layers.{{}}.mixer.{side}_proj.{side}_scale": K for side in "kv"}
    tensors = {name.format(3): torch.tensor(value) for name, value in names.items()}
    write(tmp_path, tensors, config={**HEADS, "quantization_config": MODELOPT})
    found = read(tmp_path, layers_at("", "", "", "model.layers.3.mixer"))
    assert [layer is None for layer in found.layers] == [True, True, True, False]
    assert found.notes == []


# -- AMD Quark ---------------------------------------------------------------------------------------------------------


def test_quark_aliases_are_one_module(tmp_path: Path) -> None:
    aliases = {name.replace("model.layers", "model.decoder.layers"): value for name, value in OUTPUTS.items()}
    found = read(checkpoint(tmp_path, {**OUTPUTS, **aliases}, QUARK))
    assert [layer.v_scale.item() for layer in layers_of(found)] == [V, 2 * V]
    assert len(found.ignored) == 4


@pytest.mark.parametrize(
    ("algorithms", "post_rope", "is_rotated"),
    [
        ([{"name": "gptq"}, {"name": "rotation", "r1": True, "r3": True}], True, True),
        ({"name": "rotation", "r3": True}, True, True),
        ({"name": "quarot"}, True, True),
        ([{"name": "rotation", "r1": True, "r3": False}], True, False),
        ([{"name": "rotation", "r3": True}], False, False),  # measured at the projection, before all of that
        (None, True, False),
    ],
)
def test_quark_with_rotated_keys(tmp_path: Path, algorithms: Any, post_rope: bool, is_rotated: bool) -> None:
    quantization = {**QUARK_NEW, "algo_config": algorithms, "kv_cache_post_rope": post_rope}
    found = read(checkpoint(tmp_path, OUTPUTS, quantization))
    assert [layer.k_scale is None for layer in layers_of(found)] == [is_rotated] * 2
    assert [layer.v_scale.tolist() for layer in layers_of(found)] == [[V], [2 * V]]
    assert any("algo_config: r3" in note for note in found.notes) == is_rotated


def test_quark_without_a_cache(tmp_path: Path) -> None:
    assert read_scales(checkpoint(tmp_path, {}, {**QUARK, "export": {"kv_cache_group": []}}), PATHS) is None


@pytest.mark.parametrize("changes", [{"dtype": "int8"}, {"qscheme": "per_channel"}, {"is_dynamic": True}], ids=str)
def test_quark_in_other_formats(tmp_path: Path, changes: dict[str, Any]) -> None:
    quark = {**QUARK, "layer_quant_config": {"*k_proj": spec(**changes)}}
    with pytest.raises(ValueError, match="not supported; supported is fp8_e4m3 per_tensor"):
        read_scales(checkpoint(tmp_path, OUTPUTS, quark))


def test_what_is_not_read_is_listed(tmp_path: Path) -> None:
    """No use for a scale of probabilities; latents are not what is cached."""
    others = {f"{PREFIX}.prob_output_scale": 1.0, f"{PREFIX}.kv_b_proj.output_scale": 1.0}
    found = read(checkpoint(tmp_path, {**OUTPUTS, **others, f"{PREFIX}.o_proj.output_scale": 1.0}, QUARK))
    assert sorted(found.ignored) == sorted(name.format(index) for name in others for index in range(2))


@pytest.mark.parametrize(
    "name", ["k_global_scale", "fa_k.scale", "cachek_matmul.activation_scale", "kv_b_proj.output_scale"]
)
def test_unknown_names_alone_are_warned_of(tmp_path: Path, name: str) -> None:
    with pytest.warns(UserWarning, match="looks like a KV scale of no known format"):
        assert read_scales(checkpoint(tmp_path, {f"{PREFIX}.{name}": 1.0}), PATHS) is None


def test_scales_of_unknown_width_are_not_used(tmp_path: Path) -> None:
    """What nothing declares is not guessed: whether Gemma's are for 8 or for 4 bits."""
    names = {f"model.language_model.layers.{{}}.self_attn.{side}_cache_scale": 0.05 for side in "kv"}
    checkpoint(tmp_path, names, {"quant_method": "gemma", "num_bits": 4})
    model = tiny_llama()
    model.config._name_or_path = str(tmp_path)
    with pytest.warns(UserWarning, match="k_cache_scale, a scale of Google's .* nothing declares; it is not used"):
        cache = QuantizedPagedCache.from_model(model)
    assert cache.report().layers[0].scales[0].startswith("dynamic")


# -- AutoFP8, TGI ------------------------------------------------------------------------------------------------------


def test_autofp8_dynamic(tmp_path: Path) -> None:
    found = read(checkpoint(tmp_path, {}, {**AUTOFP8, "kv_cache_scheme": "dynamic"}))
    assert (found.dynamic, found.kv_cache_dtype, found.layers) == (True, "fp8_e4m3", [None, None])


def test_fp8_weights_alone_are_no_declaration(tmp_path: Path) -> None:
    assert read_scales(checkpoint(tmp_path, {}, {**AUTOFP8, "kv_cache_scheme": None}), PATHS) is None


@pytest.mark.parametrize("quantization", [AUTOFP8, QUARK, COMPRESSED, ATTENTION, AUTOROUND], ids=str)
def test_declared_without_scales(tmp_path: Path, quantization: Any) -> None:
    with pytest.raises(ValueError, match=r"declares an 8-bit KV cache \(config.json, .* holds no usable"):
        read_scales(checkpoint(tmp_path, {}, quantization), PATHS)


@pytest.mark.parametrize("key", ["kv_cache_torch_dtype", "kv_cache_dtype"])
@pytest.mark.parametrize("value", ["float8_e4m3fn", "torch.float8_e4m3fnuz"])
def test_tgi(tmp_path: Path, key: str, value: str) -> None:
    found = read(checkpoint(tmp_path, SHARED, **{key: value}))
    assert (found.producer, found.kv_cache_dtype) == ("tgi", "fp8_e4m3")
    assert [layer.v_scale.item() for layer in layers_of(found)] == [K, 2 * K]
    assert found.notes == []


@pytest.mark.parametrize("qmax", [240.0, 448.0])
def test_scales_for_e4m3fnuz_hold_what_was_measured(tmp_path: Path, qmax: float) -> None:
    """Tools divide by 240, or by 448 all the same (AutoRound, per head); codes of either lie in no checkpoint."""
    key = torch.linspace(-10, 10, 2 * 7 * 16).view(1, 2, 7, 16)
    quantization = {**COMPRESSED, "fp8_dtype_flavor": "float8_e4m3fnuz"}
    names = {name: [10 / qmax] for name in OWN}
    cache = QuantizedPagedCache(llama_config(), checkpoint=read(checkpoint(tmp_path, names, quantization)))
    cache.update(key, key, 0)
    assert cache.report().layers[0].clipped == (0, 0)


def test_tgi_e5m2_has_no_scales(tmp_path: Path) -> None:
    found = read(checkpoint(tmp_path / "without", {}, kv_cache_torch_dtype="float8_e5m2"))
    assert found.kv_cache_dtype == "fp8_e5m2"
    assert [layer.k_scale.item() for layer in layers_of(found)] == [1.0, 1.0]
    with pytest.raises(ValueError, match="declares fp8_e5m2, which has no scales"):
        read_scales(checkpoint(tmp_path / "with", SHARED, kv_cache_torch_dtype="float8_e5m2"))
    with pytest.raises(ValueError, match="kv_cache_torch_dtype 'float8_e3m4' is not supported"):
        read_scales(checkpoint(tmp_path / "other", SHARED, kv_cache_torch_dtype="float8_e3m4"))


# -- AutoRound, AngelSlim, Mistral, Ascend -----------------------------------------------------------------------------


def test_autoround_heads_are_flat_and_unused_ones_zero(tmp_path: Path) -> None:
    tensors = {f"{PREFIX.format(0)}.{side}_scale": torch.tensor([0.1, 0.2]) for side in "kv"}
    tensors |= {f"{PREFIX.format(1)}.{side}_scale": torch.zeros(2) for side in "kv"}
    write(tmp_path, tensors, config={**HEADS, "quantization_config": AUTOROUND})
    found = read(tmp_path)
    assert found.layers[0] is not None
    assert granularity_of(found.layers[0].k_scale) == "head"
    assert found.layers[1] is None


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("LlamaAttention", "int8"),
        ("re:.*self_attn$", "int8"),
        ("re:model[.]layers[.].*[.]attn", "int8"),
        ("re:.*(self_attn|attention)$", "int8"),  # what compressed-tensors has for a kv_cache_scheme
        ("re:.*(?:attn|mixer)$", "int8"),
        ("re:.*self_attn.*", "int8"),
        ("Linear", "fp8_e4m3"),
        ("re:.*(self_attn|attention)[.]o_proj$", "fp8_e4m3"),
        ("re:.*attn[.](q|k|v)_proj", "fp8_e4m3"),
        ("re:.*attn[.](qkv_proj)$", "fp8_e4m3"),
        ("re:((a+)+)+$(", "fp8_e4m3"),
    ],
)
def test_attention_modules_by_class_or_pattern(tmp_path: Path, target: str, name: str) -> None:
    group = {"targets": [target], "weights": None, "input_activations": {**FP8, "type": "int"}}
    quantization = {"quant_method": "compressed-tensors", "kv_cache_scheme": None, "config_groups": {"group_0": group}}
    found = read(checkpoint(tmp_path, OWN, quantization))
    assert (found.kv_cache_dtype, bool(found.notes)) == (name, name == "fp8_e4m3")


def test_flat_values_without_the_number_of_heads(tmp_path: Path) -> None:
    write(tmp_path, {f"{PREFIX.format(0)}.{side}_scale": torch.tensor([0.1, 0.2]) for side in "kv"})
    with pytest.raises(ValueError, match="depends on the KV heads, name the model"):
        read_scales(tmp_path)


def test_angelslim_in_a_file_of_its_own(tmp_path: Path) -> None:
    """Beside a single file, and beside an index that does not know it."""
    for directory, with_index in ((tmp_path / "single", False), (tmp_path / "sharded", True)):
        checkpoint(directory, {}, ABBREVIATED)
        save_file(tensors_called(CACHES), directory / "kv_cache_scales.safetensors")
        hf_quant_config(directory, None)
        if with_index:
            weight_map = {"model.layers.0.self_attn.k_proj.weight": "model.safetensors"}
            (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        found = read(directory)
        assert [layer.k_scale.item() for layer in layers_of(found)] == [K, 2 * K]
        assert found.sources[0]["k_scale"].file == "kv_cache_scales.safetensors"


def angelslim(**schemes: str) -> dict[str, Any]:
    sides = {f"{side}_quant": {"dtype": "fp8_e4m3", "scheme": scheme} for side, scheme in schemes.items()}
    return {"kv_cache_quant": {"dtype": "fp8_e4m3", **sides}, "q_quant": {"dtype": "fp8_e4m3", "scheme": "dynamic"}}


@pytest.mark.parametrize("dynamic", ["", "k", "v", "kv"])
def test_angelslims_own_declaration(tmp_path: Path, dynamic: str) -> None:
    """K and V are declared apart; a side that is meant to be dynamic has no scales, which is nothing to warn of."""
    schemes = {side: "dynamic" if side in dynamic else "static" for side in "kv"}
    names = {name: value for name, value in CACHES.items() if name.split(".")[-2][0] not in dynamic}
    quantization = {**AUTOFP8, "kv_cache_scheme": "static" if names else None}
    found = read(checkpoint(tmp_path, names, quantization, attn_quant_config=angelslim(**schemes)))
    assert (found.producer, found.kv_cache_dtype, found.dynamic) == ("angelslim", "fp8_e4m3", dynamic == "kv")
    assert found.notes == [f"config.json asks for dynamic scales of {side.upper()}" for side in dynamic if names]
    row = QuantizedPagedCache(llama_config(), checkpoint=found).report().layers[1]
    assert row.kv_cache_dtype == ("fp8_e4m3", "fp8_e4m3")
    assert row.scales == tuple(
        "dynamic" if side in dynamic else f"checkpoint: {PREFIX.format(1)}.{side}_cache.scale" for side in "kv"
    )


@pytest.mark.parametrize("missing", ["k", "v"])
def test_angelslim_that_lacks_what_it_declares(tmp_path: Path, missing: str) -> None:
    names = {name: value for name, value in CACHES.items() if f".{missing}_cache." not in name}
    checkpoint(tmp_path, names, AUTOFP8, attn_quant_config=angelslim(k="static", v="static"))
    with pytest.warns(UserWarning, match=f"no {missing}_scale; {missing.upper()} is dynamic there"):
        read(tmp_path)


@pytest.mark.parametrize("shared", [False, True])
def test_mistral(tmp_path: Path, shared: bool) -> None:
    """`consolidated.safetensors` calls the modules otherwise."""
    prefix = "layers.{}.attention"
    sides = {"kv": K} if shared else {"k": K, "v": V, "q": 0.75}
    names = {f"{prefix}.{side}_fake_quantizer.qscale_act": value for side, value in sides.items()}
    weights = {f"{prefix}.wk.qscale_weight": 9.0, f"{prefix}.wk.qscale_act": 9.0}
    save_file(tensors_called({**names, **weights}), tmp_path / "consolidated.safetensors")
    (tmp_path / "params.json").write_text("{}")
    for model in (PATHS, None):
        layers = layers_of(read(tmp_path, model))
        assert [layer.k_scale.item() for layer in layers] == [K, 2 * K]
        assert [layer.v_scale.item() for layer in layers] == ([K, 2 * K] if shared else [V, 2 * V])
        assert (layers[0].q_scale is None) == shared


@pytest.mark.parametrize("key", ["kv_cache_type", "kv_quant_type"])
@pytest.mark.parametrize("numel", [1, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ascend(tmp_path: Path, key: str, numel: int, dtype: torch.dtype) -> None:
    """int8; the offset is in steps and subtracted."""
    scale = torch.linspace(0.5, 1.0, numel)
    names = {f"{PREFIX}.{side}_proj.kv_cache_scale": scale.to(dtype) for side in "kv"}
    names |= {f"{PREFIX}.{side}_proj.kv_cache_offset": torch.full((numel,), 3.0).to(dtype) for side in "kv"}
    checkpoint(tmp_path, names)
    undeclared = read(tmp_path)
    assert undeclared.kv_cache_dtype == "int8"
    (tmp_path / "quant_model_description_w8a8.json").write_text(json.dumps({key: "C8"}))
    found = read(tmp_path)
    assert (found.producer, found.kv_cache_dtype, found.notes) == ("ascend", "int8", [])
    first = layers_of(found)[0]
    shape = (1,) if numel == 1 else (2, 16)
    assert torch.equal(first.k_scale, scale.to(dtype).float().view(shape))
    assert first.k_zero is not None
    assert torch.equal(first.k_zero, -3 * first.k_scale)


def test_ascend_in_other_formats(tmp_path: Path) -> None:
    checkpoint(tmp_path, {})
    (tmp_path / "quant_model_description.json").write_text(json.dumps({"kv_cache_type": "C4"}))
    with pytest.raises(ValueError, match=r"quant_model_description.json declares a KV cache of type 'C4'"):
        read_scales(tmp_path)


# -- shapes ------------------------------------------------------------------------------------------------------------

SHAPES = {"0-d": (), "[1]": (1,), "[H]": (2,), "[H,1]": (2, 1), "[H,1,1]": (2, 1, 1), "[1,H,1,1]": (1, 2, 1, 1),
          "[H*D]": (32,), "[H,D]": (2, 16), "[1,H,1,D]": (1, 2, 1, 16)}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_shapes(tmp_path: Path, shape: tuple[int, ...]) -> None:
    numel = torch.Size(shape).numel()
    values = torch.arange(1.0, numel + 1).view(shape)
    found = read(checkpoint(tmp_path, dict.fromkeys(OWN, values), COMPRESSED))
    expected = {1: (1,), 2: (2,), 32: (2, 16)}[numel]
    assert torch.equal(layers_of(found)[0].k_scale, torch.arange(1.0, numel + 1).view(expected))


@pytest.mark.parametrize("shape", [(3,), (4,), (3, 1, 1), (17,), (0,)], ids=str)
def test_shapes_that_do_not_fit(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """Four values could be two channels of two heads; the layer's own shape is the last to say so."""
    directory = checkpoint(tmp_path, {name: torch.ones(shape) for name in OWN}, COMPRESSED)

    def use() -> None:
        cache = QuantizedPagedCache(llama_config(), checkpoint=read_scales(directory, PATHS))
        with torch.no_grad():
            tiny_llama()(prompt(), past_key_values=cache)

    with pytest.raises(ValueError, match="k_scale") as error:
        use()
    assert "another model" in str(error.value) or "is empty" in str(error.value)


def test_a_single_head(tmp_path: Path) -> None:
    names = {f"{PREFIX}.k_scale": torch.arange(1.0, 17), f"{PREFIX}.v_scale": torch.ones(1, 1, 1)}
    model = ModelLayers(PATHS.paths, [1, 1])
    first = layers_of(read(checkpoint(tmp_path, names, COMPRESSED), model))[0]
    assert (tuple(first.k_scale.shape), tuple(first.v_scale.shape)) == ((1, 16), (1,))


@pytest.mark.parametrize("scale_shape", [(1,), (2,), (2, 16)], ids=str)
@pytest.mark.parametrize("zero_shape", [(1,), (2,), (2, 16)], ids=str)
def test_zero_points_of_any_granularity(
    tmp_path: Path, scale_shape: tuple[int, ...], zero_shape: tuple[int, ...]
) -> None:
    scale = torch.linspace(0.5, 1.0, torch.Size(scale_shape).numel()).view(scale_shape)
    steps = torch.linspace(-3.0, 4.0, torch.Size(zero_shape).numel()).view(zero_shape)
    tensors = {f"{PREFIX.format(0)}.{side}_scale": scale.clone() for side in "kv"}
    tensors[f"{PREFIX.format(0)}.k_zero_point"] = steps
    write(tmp_path, tensors, config={**HEADS, "quantization_config": COMPRESSED})
    layer = read(tmp_path).layers[0]
    assert layer is not None
    assert layer.k_zero is not None

    def over_channels(x: torch.Tensor) -> torch.Tensor:
        return (x if x.ndim == 2 else x[:, None]).expand(2, 16)

    assert torch.equal(over_channels(layer.k_zero), -over_channels(steps) * over_channels(scale))


def test_zeros_of_another_shape_are_named(tmp_path: Path) -> None:
    names = {**OWN, f"{PREFIX}.k_scale": torch.ones(2, 2), f"{PREFIX}.k_zero_point": torch.ones(16)}
    with pytest.raises(ValueError, match=r"k_zero_point in .* has shape \[2, 8\], its scale \[2, 2\]"):
        read_scales(checkpoint(tmp_path, names, COMPRESSED), PATHS)


def test_zeros_without_measure_are_named(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no activation"):
        found = read(checkpoint(tmp_path, {**OWN, f"{PREFIX}.k_scale": 1e30}, COMPRESSED))
    assert found.layers[0] is not None
    checkpoint(tmp_path, {**OWN, f"{PREFIX}.k_scale": 1e30, f"{PREFIX}.k_zero_point": 1e30}, COMPRESSED)
    with pytest.raises(ValueError, match="k_zero holds NaN or infinite values") as error:
        read_scales(tmp_path, PATHS)
    assert f"{PREFIX.format(0)} in {tmp_path}" in str(error.value)


@pytest.mark.parametrize("value", [1e-20, 1e9])
def test_scales_beyond_all_measure_are_suspicious(tmp_path: Path, value: float) -> None:
    with pytest.warns(UserWarning, match=r"k_scale holds .*, which no activation can have led to \(and 1 more"):
        found = read(checkpoint(tmp_path, {**OWN, f"{PREFIX}.k_scale": value}, COMPRESSED))
    assert len(layers_of(found)) == len(found.notes) == 2


# -- vLLM, LightLLM, ONNX Runtime GenAI --------------------------------------------------------------------------------


def write_json(directory: Path, name: str, content: Any) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(json.dumps(content))
    return directory


def vllm_json(*ranks: dict[str, Any], dtype: str = "float8_e4m3fn", model_type: str | None = "llama") -> dict[str, Any]:
    factors = {str(rank): layers for rank, layers in enumerate(ranks)}
    return {"model_type": model_type, "kv_cache": {"dtype": dtype, "scaling_factor": factors}}


LLAMA = ModelLayers(PATHS.paths, [2, 2], "llama")


def test_vllm_json(tmp_path: Path) -> None:
    write_json(tmp_path, "kv_cache_scales.json", vllm_json({"1": 0.5, "0": 0.25}))
    for source, model in ((tmp_path, LLAMA), (tmp_path, None), (tmp_path / "kv_cache_scales.json", LLAMA)):
        found = read(source, model)
        assert (found.producer, found.kv_cache_dtype) == ("vllm", "fp8_e4m3")
        assert [(layer.k_scale.item(), layer.v_scale.item()) for layer in layers_of(found)] == [(0.25,) * 2, (0.5,) * 2]
        assert found.sources[1]["v_scale"] == ScaleSource("kv_cache_scales.json", "scaling_factor[0][1]")


def test_vllm_json_ranks_are_groups_of_heads(tmp_path: Path) -> None:
    write_json(tmp_path, "kv_cache_scales.json", vllm_json({"0": 0.25, "1": 0.5}, {"0": 0.75, "1": 0.5}))
    first, second = layers_of(read(tmp_path, ModelLayers(PATHS.paths, [6, 6], "llama")))
    assert first.k_scale.tolist() == [0.25, 0.25, 0.25, 0.75, 0.75, 0.75]
    assert second.k_scale.tolist() == [0.5]
    with pytest.raises(ValueError, match="has 2 tensor-parallel ranks, .* does not fit 3 KV heads"):
        read_scales(tmp_path, ModelLayers(PATHS.paths, [3, 3]))
    with pytest.raises(ValueError, match="name the model"):
        read_scales(tmp_path)


def test_vllm_json_of_more_ranks_than_heads(tmp_path: Path) -> None:
    """Which then share heads, and their scales if the file is right."""
    ranks = [{"0": 0.25 * (1 + rank // 2), "1": 0.5} for rank in range(4)]
    write_json(tmp_path, "kv_cache_scales.json", vllm_json(*ranks))
    assert layers_of(read(tmp_path))[0].k_scale.tolist() == [0.25, 0.5]
    ranks[1]["0"] = 0.75
    write_json(tmp_path, "kv_cache_scales.json", vllm_json(*ranks))
    with pytest.raises(ValueError, match="has 4 tensor-parallel ranks, .* does not fit 2 KV heads"):
        read_scales(tmp_path, PATHS)


def test_vllm_json_of_a_checkpoint_whose_text_model_is_loaded_alone(tmp_path: Path) -> None:
    write_json(tmp_path, "kv_cache_scales.json", vllm_json({"0": 0.1, "1": 0.1}, model_type="seeing"))
    text = ModelLayers(PATHS.paths, PATHS.num_kv_heads, "seeing_text")
    with pytest.raises(ValueError, match="for a model of type 'seeing', this one is 'seeing_text'"):
        read_scales(tmp_path, text)
    config = {"model_type": "seeing", "text_config": {"model_type": "seeing_text"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert len(layers_of(read(tmp_path, text))) == 2
    with pytest.raises(ValueError, match="for a model of type 'seeing', this one is 'llama'"):
        read_scales(tmp_path, LLAMA)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (vllm_json({"0": 0.1, "1": 0.1}, dtype="int8"), "dtype 'int8' is not supported"),
        (vllm_json({"0": 0.1, "1": 0.1}, model_type="mixtral"), "for a model of type 'mixtral', this one is 'llama'"),
        (vllm_json({"0": 0.1, "2": 0.1}), "they must be 0, 1, 2"),
        (vllm_json({"0": 0.1, "01": 0.1}), "they must be 0, 1, 2"),
        (vllm_json({"0": 0.1, "1": 0.1, "2": 0.1}), "scales for layer 2, but this model has 2 cache layers"),
        (vllm_json({"0": 0.1, "1": "0.1"}), r"scaling_factor\[0\]\[1\] in .* is '0.1', not a number"),
        (vllm_json({"0": 0.1, "1": True}), "is True, not a number"),
        (vllm_json({"0": 0.1, "1": float("nan")}), "NaN or infinite"),
        (vllm_json({"0": 0.1, "1": 10**400}), "NaN or infinite"),
        (vllm_json({"0": 0.1}, {"0": 0.1, "1": 0.1}), "ranks of scaling_factor have different layers"),
        (vllm_json({}), "not an object with an entry for each"),
        (vllm_json(), "not an object with an entry for each"),
        ({"kv_cache": {"dtype": "float8_e4m3fn", "scaling_factor": [0.1]}}, "scaling_factor is .*, not an object"),
        (vllm_json({"0": 0.0, "1": -1.0}), "holds no usable k_scale"),
    ],
)
def test_vllm_json_that_is_wrong(tmp_path: Path, content: Any, message: str) -> None:
    write_json(tmp_path, "kv_cache_scales.json", content)
    with pytest.raises(ValueError, match=message) as error:
        read_scales(tmp_path, LLAMA)
    assert str(tmp_path) in str(error.value)


def lightllm_json(kind: str = "per_tensor", **changes: Any) -> dict[str, Any]:
    heads = 1 if kind == "per_tensor" else 2
    scales = [[0.25 * (i + 1)] * heads + [0.5 * (i + 1)] * heads for i in range(2)]
    return {"version": "1.0", "architectures": "LlamaForCausalLM", "quant_type": kind, "qmin": -448.0, "qmax": 448.0,
            "num_layers": 2, "num_head": 2, "scales_shape": [2, 2 * heads], "scales": scales, **changes}  # fmt: skip


@pytest.mark.parametrize("kind", ["per_tensor", "per_head"])
def test_lightllm(tmp_path: Path, kind: str) -> None:
    found = read(write_json(tmp_path, "kv_cache_calib.json", lightllm_json(kind)))
    assert (found.producer, found.kv_cache_dtype) == ("lightllm", "fp8_e4m3")
    heads = 1 if kind == "per_tensor" else 2
    assert [layer.v_scale.tolist() for layer in layers_of(found)] == [[0.5] * heads, [1.0] * heads]
    assert [layer.k_scale.tolist() for layer in layers_of(found)] == [[0.25] * heads, [0.5] * heads]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qmax": 8.0}, "qmax 8 is not supported"),
        ({"quant_type": "per_channel"}, "quant_type 'per_channel'"),
        ({"num_layers": 3}, "has 2 rows for 3 layers"),
        ({"scales": [[0.1, 0.1], [0.1]]}, r"scales\[1\] in .* has 1 numbers; per_tensor needs 2"),
        ({"scales": {}}, "scales is {}, not a list"),
        ({"qmax": None}, "is None, not a number"),
    ],
)
def test_lightllm_that_is_wrong(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_scales(write_json(tmp_path, "kv_cache_calib.json", lightllm_json(**changes)), PATHS)


@pytest.mark.parametrize(("qmax", "name"), [(128.0, "int8"), (127, "int8"), (448.0, "fp8_e4m3")])
def test_ort_genai(tmp_path: Path, qmax: float, name: str) -> None:
    """Rows are of the layers with full attention; a file may have any name."""
    channels = torch.linspace(0.1, 0.2, 32).tolist()
    content = {"scales": {"k_scales": [0.25, channels], "v_scales": [0.5, channels]}, "layer_ids": [1, 3], "qmax": qmax}
    write_json(tmp_path, "mine.json", {**content, "mtp": {"scales": {}}})
    model = layers_at("", "model.layers.1.self_attn", "", "model.layers.3.self_attn")
    found = read(tmp_path / "mine.json", model)
    assert (found.producer, found.kv_cache_dtype) == ("onnxruntime-genai", name)
    assert [layer is None for layer in found.layers] == [True, False, True, False]
    assert found.layers[1] is not None
    assert found.layers[1].v_scale.tolist() == [0.5]
    assert found.layers[3] is not None
    torch.testing.assert_close(found.layers[3].k_scale, torch.tensor(channels).view(2, 16), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qmax": 8}, "qmax 8 is not supported"),
        ({"layer_ids": [0]}, "each layer needs one of both"),
        ({"layer_ids": [0, 0]}, "each layer needs one of both"),
        ({"layer_ids": [0, "1"]}, "each layer needs one of both"),
        ({"layer_ids": [0, 5]}, "scales for layer 5, but this model has 2"),
        ({"scales": {"k_scales": [1.0, 1.0], "v_scales": 1.0}}, "v_scales is 1.0, not a list"),
    ],
)
def test_ort_genai_that_is_wrong(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    content = {"scales": {"k_scales": [1.0, 1.0], "v_scales": [1.0, 1.0]}, "layer_ids": [0, 1], "qmax": 128.0}
    write_json(tmp_path, "kv_cache_scales.json", {**content, **changes})
    with pytest.raises(ValueError, match=message):
        read_scales(tmp_path, PATHS)


# -- TensorRT-LLM ------------------------------------------------------------------------------------------------------


def write_ranks(directory: Path, ranks: list[dict[str, Any]], algorithm: str | None = "INT8", **mapping: Any) -> Path:
    config = {"architecture": "LlamaForCausalLM", "quantization": {"kv_cache_quant_algo": algorithm}, **HEADS}
    write_json(directory, "config.json", {**config, "mapping": mapping})
    for rank, names in enumerate(ranks):
        save_file(tensors_called(names), directory / f"rank{rank}.safetensors")
    return directory


TRT = "transformer.layers.{}.attention."


def test_tensorrt_llm(tmp_path: Path) -> None:
    names = {TRT + "kv_cache_scaling_factor": [K], "transformer.layers.{}.attention.qkv.weights_scaling_factor": [9.0]}
    found = read(write_ranks(tmp_path, [names]))
    assert (found.producer, found.kv_cache_dtype, found.ignored) == ("tensorrt-llm", "int8", [])
    assert [(layer.k_scale.item(), layer.v_scale.item()) for layer in layers_of(found)] == [(K, K), (2 * K, 2 * K)]
    assert found.sources[1]["k_scale"] == ScaleSource("rank0.safetensors", TRT.format(1) + "kv_cache_scaling_factor")


def test_tensorrt_llm_ranks(tmp_path: Path) -> None:
    ranks = [{TRT + "k_cache_scaling_factor": [K * r], TRT + "v_cache_scaling_factor": [V]} for r in (1, 3)]
    found = read(write_ranks(tmp_path, ranks, "FP8", tp_size=2, pp_size=1), ModelLayers(PATHS.paths, [4, 4]))
    assert found.kv_cache_dtype == "fp8_e4m3"
    assert layers_of(found)[0].k_scale.tolist() == [K, K, 3 * K, 3 * K]
    assert layers_of(found)[0].v_scale.tolist() == [V]


def test_tensorrt_llm_that_declares_nothing(tmp_path: Path) -> None:
    for algorithm in (None, "None", ""):
        found = read(write_ranks(tmp_path, [{TRT + "kv_cache_scaling_factor": [K]}], algorithm))
        assert found.kv_cache_dtype == "fp8_e4m3"
        assert any("declares no KV cache format" in note for note in found.notes)


def test_tensorrt_llm_that_is_wrong(tmp_path: Path) -> None:
    names = {TRT + "kv_cache_scaling_factor": [K]}
    with pytest.raises(ValueError, match="pipeline stages"):
        read_scales(write_ranks(tmp_path / "pipeline", [names, names], pp_size=2))
    with pytest.raises(ValueError, match="format 'FP4', which is not supported"):
        read_scales(write_ranks(tmp_path / "fp4", [names], "FP4"))
    with pytest.raises(ValueError, match="rank files have scales of different layers"):
        read_scales(write_ranks(tmp_path / "uneven", [names, {TRT + "k_cache_scaling_factor": [K]}]))


# -- LMDeploy ----------------------------------------------------------------------------------------------------------


def write_parameters(directory: Path, values: dict[tuple[int, int], list[float]]) -> Path:
    directory.mkdir(exist_ok=True)
    for (layer, rank), numbers in values.items():
        name = f"layers.{layer}.past_kv_scale.{rank}.weight"
        (directory / name).write_bytes(struct.pack(f"<{len(numbers)}f", *numbers))
    return directory


def test_lmdeploy_parameters_asymmetric(tmp_path: Path) -> None:
    """`[k_scale, k_zero, v_scale, v_zero]`, zeros in the units of x."""
    write_parameters(tmp_path, {(layer, 0): [0.25, -1.5, 0.5, 3.0 * layer] for layer in range(2)})
    for source in (tmp_path, tmp_path / "layers.0.past_kv_scale.0.weight"):
        found = read(source)
        assert (found.producer, found.kv_cache_dtype) == ("lmdeploy", "int8")
        first, second = layers_of(found)
        assert first.k_zero is not None
        assert first.v_zero is None
        assert second.v_zero is not None
        assert (first.k_scale.item(), first.k_zero.item(), second.v_scale.item(), second.v_zero.item()) == (
            0.25, -1.5, 0.5, 3.0,
        )  # fmt: skip


def test_lmdeploy_parameters_symmetric_in_ranks(tmp_path: Path) -> None:
    write_parameters(tmp_path, {(layer, r): [0.25 + r, 0.5] for layer in range(12) for r in range(2)})
    model = layers_at(*[PREFIX.format(index) for index in range(12)])
    layers = layers_of(read(tmp_path, model))
    assert len(layers) == 12
    assert [(layer.k_scale.tolist(), layer.v_scale.tolist()) for layer in layers] == [([0.25, 1.25], [0.5])] * 12


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({(0, 0): [1.0]}, "has 4 bytes; it must be 8"),
        ({(0, 0): [1.0] * 5}, "has 17 bytes|has 20 bytes"),
        ({(0, 0): [1.0] * 2, (1, 0): [1.0] * 4}, "mix symmetric and asymmetric"),
        ({(0, 0): [1.0] * 2, (1, 1): [1.0] * 2}, "same ranks"),
        ({(0, 1): [1.0] * 2}, "same ranks"),
        ({(0, 0): [float("nan")] * 2}, "NaN or infinite"),
        ({(0, 0): [1.0] * 2, (7, 0): [1.0] * 2}, "scales for layer 7, but this model has 2"),
    ],
)
def test_lmdeploy_parameters_that_are_wrong(tmp_path: Path, values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_scales(write_parameters(tmp_path, values), PATHS)


@pytest.mark.parametrize("granularity", ["tensor", "head", "channel"])
@pytest.mark.parametrize("name", ["int8", "fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("by_path", [True, False])
def test_lmdeploy_statistics(tmp_path: Path, granularity: str, name: str, by_path: bool) -> None:
    """What was seen fits, and the largest of it just so."""
    seen = write_statistics(tmp_path)
    found = read_scales(tmp_path, PATHS if by_path else None, kv_cache_dtype=name, granularity=granularity)
    assert found is not None
    assert found.kv_cache_dtype == name
    for index, layer in enumerate(layers_of(found)):
        assert granularity_of(layer.k_scale) == granularity_of(layer.v_scale) == granularity
        for side, numbers in zip("kv", seen.values(), strict=True):
            x = numbers[f"model.layers.{index}"].half().float()
            scale, zero = getattr(layer, f"{side}_scale"), getattr(layer, f"{side}_zero")
            assert (zero is None) == (name != "int8" or side == "k")  # keys turn; their middle is not a constant
            qmax = {"int8": 127.0 if side == "k" else 127.5, "fp8_e4m3": 448.0, "fp8_e5m2": 57344.0}[name]
            scale, zero = (
                None if value is None else (value if value.ndim == 2 else value[:, None]) for value in (scale, zero)
            )
            codes = ((x if zero is None else x - zero) / scale).abs()
            largest = codes.amax() if granularity == "tensor" else codes.amax((0, 2) if granularity == "head" else 0)
            torch.testing.assert_close(largest, torch.full_like(largest, qmax), rtol=1e-5, atol=0)
        assert found.sources[index]["k_scale"] == ScaleSource("key_stats.pth", f"model.layers.{index}")


def test_statistics_become_what_the_cache_is_asked_for(tmp_path: Path) -> None:
    write_statistics(tmp_path)
    for name in ("int8", "fp8_e4m3"):
        cache = QuantizedPagedCache.from_model(tiny_llama(), scales=tmp_path, kv_cache_dtype=name)
        assert cache.report().layers[1].kv_cache_dtype == (name, name)
        assert cache.report().layers[1].scales == ("checkpoint: model.layers.1",) * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": "token"}, "granularity='token'; choose one of tensor, head, channel"),
        ({"granularity": None}, "granularity=None; choose one of tensor, head, channel"),
        ({"kv_cache_dtype": "int3"}, "unknown storage format 'int3'; known: fp8_e4m3"),
        ({"kv_cache_dtype": "auto"}, "unknown storage format 'auto'; known: fp8_e4m3"),
        ({"kv_cache_dtype": "model"}, "kv_cache_dtype='model' has no scales; choose one of fp8_e4m3, fp8_e5m2, int8"),
    ],
)
def test_what_statistics_cannot_become_is_refused_whatever_there_is(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    model = tiny_llama()
    write_statistics(tmp_path / "statistics")
    checkpoint(tmp_path / "scales", OWN, COMPRESSED)
    checkpoint(tmp_path / "nothing", {})
    for source in (tmp_path / "statistics", tmp_path / "scales", tmp_path / "nothing", model):
        with pytest.raises(ValueError, match=message):
            read_scales(source, **options)
        with pytest.raises(ValueError, match=message):
            read_scales(source, model, **options)


def test_statistics_become_formats_by_any_of_their_names(tmp_path: Path) -> None:
    write_statistics(tmp_path)
    for name in ("fp8", torch.float8_e4m3fn):
        found = read_scales(tmp_path, PATHS, kv_cache_dtype=name)
        assert found is not None
        assert found.kv_cache_dtype == "fp8_e4m3"


def test_silent_channels_and_layers(tmp_path: Path) -> None:
    """A channel of zeros gets a scale all the same; a layer of zeros has none."""
    x = torch.ones(2, 16)
    x[0, 3] = 0
    content = {
        "max": {"model.layers.0": x, "model.layers.1": 0 * x},
        "min": {"model.layers.0": -x, "model.layers.1": 0 * x},
    }
    for name in ("key", "value"):
        torch.save(content, tmp_path / f"{name}_stats.pth")
    found = read(tmp_path)
    assert found.layers[1] is None
    assert found.layers[0] is not None
    assert found.layers[0].k_scale[0, 3] == found.layers[0].k_scale[0, 0] / 256


def test_statistics_that_are_wrong(tmp_path: Path) -> None:
    x = torch.ones(2, 16)

    def wrong(content: Any, message: str) -> None:
        torch.save(content, tmp_path / "key_stats.pth")
        with pytest.raises(ValueError, match=message) as error:
            read_scales(tmp_path, PATHS)
        assert str(tmp_path) in str(error.value)

    wrong({"max": {}, "min": {}}, "has key_stats.pth alone")
    torch.save({"max": {"model.layers.0": x}, "min": {"model.layers.0": -x}}, tmp_path / "value_stats.pth")
    wrong([], "holds no 'max' of layers")
    wrong({"max": {"model.layers.0": x}, "min": {}}, "no minimum of model.layers.0")
    wrong({"max": {"model.layers.0": x}, "min": {"model.layers.0": -x[:1]}}, "no minimum of model.layers.0")
    wrong({"max": {"model.layers.0": [1.0]}, "min": {}}, r"is not a tensor \[num_kv_heads, head_dim\]")
    wrong({"max": {"model.layers.0": x / 0}, "min": {"model.layers.0": x}}, "NaN or infinite")
    wrong(Path("/"), "cannot be read as tensors saved by torch")  # would be unpickled by importing pathlib


# -- which of several, and the whole way -------------------------------------------------------------------------------


def test_explicit_formats_win(tmp_path: Path) -> None:
    """Scales of e4m3 mean nothing to e5m2; that is said, and the scales are not used."""
    found = read(checkpoint(tmp_path, OWN, AUTOFP8))
    automatic = QuantizedPagedCache(llama_config(), checkpoint=found)
    assert automatic.report().layers[0].kv_cache_dtype == ("fp8_e4m3", "fp8_e4m3")
    explicit = QuantizedPagedCache(llama_config(), KVQuantConfig("fp8_e5m2"), checkpoint=found)
    row = explicit.report().layers[0]
    assert (row.kv_cache_dtype, row.scales) == (("fp8_e5m2", "fp8_e5m2"), ("dynamic", "dynamic"))
    assert any("are for fp8_e4m3; they are not used for fp8_e5m2" in note for note in explicit.notes)


NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "dynamic": "local"}
GROUPS = {**COMPRESSED, "kv_cache_scheme": {**FP8, "strategy": "group"}}
AUTOROUND_NVFP4 = {"attention_input_activations": {"targets": ["LlamaAttention"], "input_activations": NVFP4}}
QUARK_FP4 = {**QUARK, "layer_quant_config": {"*k_proj": spec(dtype="fp4")}}
ORT = {"scales": {"k_scales": [], "v_scales": []}, "qmax": 7}
# What declares a format that is not supported, and what is said of it.
UNSUPPORTED: dict[str, tuple[Callable[[Path], object], str]] = {
    "compressed_tensors": (lambda d: checkpoint(d, OWN, {**COMPRESSED, "kv_cache_scheme": NVFP4}), "num_bits=4"),
    "groups": (lambda d: checkpoint(d, OWN, GROUPS), "'group'"),
    "autoround": (lambda d: checkpoint(d, OWN, AUTOROUND_NVFP4), "num_bits=4"),
    "modelopt": (lambda d: checkpoint(d, PROJECTIONS, {**MODELOPT, "kv_cache_scheme": "NVFP4"}), "format 'NVFP4'"),
    "modelopt_beside": (lambda d: hf_quant_config(checkpoint(d, PROJECTIONS), "NVFP4"), "format 'NVFP4'"),
    "quark": (lambda d: checkpoint(d, OUTPUTS, QUARK_FP4), "'fp4'"),
    "angelslim": (
        lambda d: checkpoint(d, CACHES, AUTOFP8, attn_quant_config=angelslim(k="static", v="block")), "scheme 'block'",
    ),
    "autofp8": (lambda d: checkpoint(d, OWN, {**AUTOFP8, "kv_cache_scheme": "nvfp4"}), "'nvfp4'"),
    "tgi": (lambda d: checkpoint(d, SHARED, kv_cache_dtype="float8_e3m4"), "'float8_e3m4'"),
    "tgi_e5m2": (lambda d: checkpoint(d, SHARED, kv_cache_dtype="float8_e5m2"), "fp8_e5m2, which has no scales"),
    "ascend": (
        lambda d: write_json(checkpoint(d, {}), "quant_model_description.json", {"kv_cache_type": "C4"}), "type 'C4'",
    ),
    "vllm": (lambda d: write_json(d, "kv_cache_scales.json", vllm_json({"0": 0.1, "1": 0.1}, dtype="fp4")), "'fp4'"),
    "lightllm": (lambda d: write_json(d, "kv_cache_calib.json", lightllm_json(qmax=6.0)), "qmax 6"),
    "ort_genai": (lambda d: write_json(d, "kv_cache_scales.json", ORT), "qmax 7"),
    "tensorrt_llm": (lambda d: write_ranks(d, [{TRT + "kv_cache_scaling_factor": [K]}], "FP4"), "format 'FP4'"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_a_declared_format_that_is_not_supported(tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture) -> None:
    """Nobody asked for its scales, so it is no reason to fail; who names them is told."""
    make, said = UNSUPPORTED[case]
    make(tmp_path)
    model = tiny_llama()
    model.config._name_or_path = str(tmp_path)
    with caplog.at_level("WARNING", logger="transformers"):
        for dtype, stored in (("auto", "int8"), ("fp8", "fp8_e4m3")):
            cache = QuantizedPagedCache.from_model(model, kv_cache_dtype=dtype)
            for row in cache.report().layers:
                assert row.kv_cache_dtype == (stored, stored)
                assert {source.split(",")[0] for source in row.scales} == {"dynamic"}
            (note,) = [note for note in cache.report().notes if said in note]
            assert str(tmp_path) in note
            assert note.endswith("what it declares is not used, scales are dynamic now")
    assert caplog.text.count("is not used, scales are dynamic now") == 1
    for scales in ("checkpoint", tmp_path):
        with pytest.raises(ValueError, match=re.escape(said)):
            QuantizedPagedCache.from_model(model, kv_cache_dtype="fp8", scales=scales)


def test_what_is_of_no_use_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every generate asks, and an index may have a hundred thousand names."""
    model = tiny_llama()
    model.config._name_or_path = str(checkpoint(tmp_path, OWN, GROUPS))
    caches = [QuantizedPagedCache.from_model(model)]
    monkeypatch.setattr("hf_kvquant.reading.read_checkpoint", None)
    caches.append(QuantizedPagedCache.from_model(model))
    assert caches[0].notes == caches[1].notes
    monkeypatch.undo()
    checkpoint(tmp_path, OWN, COMPRESSED)
    assert QuantizedPagedCache.from_model(model).report().layers[0].scales[0].startswith("checkpoint: ")


def test_what_is_broken_is_an_error_though_nobody_asked(tmp_path: Path) -> None:
    model = tiny_llama()
    model.config._name_or_path = str(checkpoint(tmp_path, {**OWN, f"{PREFIX}.k_scale": [float("nan")]}, COMPRESSED))
    with pytest.raises(ValueError, match="NaN"):
        QuantizedPagedCache.from_model(model)


def test_unit_scales_are_for_fp8() -> None:
    """1.0 is what servers use without scales; whole numbers in int8 are what nobody means."""
    cache = QuantizedPagedCache(llama_config(), KVQuantConfig(scales="unit"))
    assert cache.report().layers[0].kv_cache_dtype == ("fp8_e4m3", "fp8_e4m3")


@pytest.mark.parametrize("case", ["modelopt_affine", "lmdeploy", "vllm", "ascend"])
def test_generate_with_scales_of_elsewhere(tmp_path: Path, case: str) -> None:
    """Weights from one place, scales from another; every granularity and zero reaches the pages."""
    if case == "modelopt_affine":
        bias = torch.linspace(-1, 1, 32).view(1, 2, 1, 16)
        names = {**PROJECTIONS, f"{PREFIX}.k_proj.k_bias": bias, f"{PREFIX}.v_proj.v_bias": bias}
        source = checkpoint(tmp_path, names, MODELOPT)
    elif case == "lmdeploy":
        write_statistics(source := tmp_path)
    elif case == "vllm":
        source = write_json(tmp_path, "kv_cache_scales.json", vllm_json({"0": 0.01, "1": 0.01}))
    else:
        names = {f"{PREFIX}.{side}_proj.kv_cache_scale": torch.linspace(0.01, 0.02, 32) for side in "kv"}
        names |= {f"{PREFIX}.{side}_proj.kv_cache_offset": torch.full((32,), 3.0) for side in "kv"}
        source = checkpoint(tmp_path, names)
    model = tiny_llama()
    output = model.generate(
        prompt(), max_new_tokens=5, do_sample=False, return_dict_in_generate=True, cache_config={"scales": source}
    )
    cache = output.past_key_values
    found = read_scales(source, model)
    for index, layer in enumerate(layers_of(found)):
        for side, store in zip("kv", (cache.layers[index].k, cache.layers[index].v), strict=True):
            for name in ("scale", "zero"):
                expected, used = getattr(layer, f"{side}_{name}"), getattr(store.paged, name)
                assert (expected is None) == (used is None)
                if used is not None:
                    assert torch.equal(used.flatten(), expected.flatten())
    assert set(cache.report().layers[0].kv_cache_dtype) == {found.kv_cache_dtype}  # type: ignore[union-attr]
    assert output.sequences.shape == (2, 26)


def test_a_model_as_the_source(tmp_path: Path) -> None:
    model = tiny_llama()
    assert read_scales(model) is None  # it came from nowhere
    model.config._name_or_path = str(checkpoint(tmp_path, OWN, COMPRESSED))
    found = read_scales(model)
    assert [layer.k_scale.item() for layer in layers_of(found)] == [K, 2 * K]
    assert read_scales(model) is found  # every generate asks
    checkpoint(tmp_path, {name: 2 * torch.as_tensor(value) for name, value in OWN.items()}, COMPRESSED)
    changed = read_scales(model)
    assert [layer.k_scale.item() for layer in layers_of(changed)] == [2 * K, 4 * K]
    other = tiny_llama(num_hidden_layers=1)
    assert len(layers_of(read_scales(model, other))) == 1


def test_other_files_with_scales_are_said(tmp_path: Path) -> None:
    checkpoint(tmp_path, OWN, COMPRESSED)
    write_json(tmp_path, "kv_cache_scales.json", vllm_json({"0": 0.25, "1": 0.5}))
    write_statistics(tmp_path)
    found = read(tmp_path)
    assert layers_of(found)[0].k_scale.item() == K
    assert found.ignored == ["kv_cache_scales.json", "key_stats.pth", "value_stats.pth"]
    assert any("kv_cache_scales.json" in note for note in found.notes)
    assert read(tmp_path / "kv_cache_scales.json").ignored == []


def test_the_side_car_comes_first(tmp_path: Path) -> None:
    """This package's own file is put beside a checkpoint on purpose."""
    from hf_kvquant.checkpoints import sidecar

    checkpoint(tmp_path, OWN, COMPRESSED)
    layers = layers_of(read(tmp_path))
    written = {PREFIX.format(index): layer.to_dict() for index, layer in enumerate(layers)}
    written[PREFIX.format(0)] |= {"k_scale": [[0.5] * 16] * 2, "k_zero": [1.0, 2.0]}
    content = {"format": "hf_kvquant scales", "version": 1, "kv_cache_dtype": "int8", "layers": written}
    write_json(tmp_path, sidecar.FILE, content)
    found = read(tmp_path)
    assert (found.producer, found.kv_cache_dtype) == ("hf_kvquant", "int8")
    assert sorted(found.ignored) == sorted(name.format(index) for name in OWN for index in range(2))
    first, second = layers_of(found)
    assert torch.equal(first.k_scale, torch.full((2, 16), 0.5))
    assert first.k_zero is not None
    assert first.k_zero.tolist() == [1.0, 2.0]
    assert second.v_scale.tolist() == [2 * V]
    for changes, message in (
        ({"version": 2}, "of version 2"),
        ({"kv_cache_dtype": "fp4"}, "'fp4' is not known"),
        ({"layers": []}, r"layers is \[\], not an object"),
        ({"layers": {PREFIX.format(0): {"k_scale": [[1.0], [1.0, 2.0]]}}}, "rows of different length"),
        ({"layers": {PREFIX.format(0): {"k_scale": "x"}}}, "is 'x', not a number"),
    ):
        write_json(tmp_path, sidecar.FILE, {**content, **changes})
        with pytest.raises(ValueError, match=message):
            read_scales(tmp_path, PATHS)


def test_scales_of_tests_are_where_they_say(tmp_path: Path) -> None:
    """`scales_of_layers` is family one: what every test of names is held against."""
    found = read(write(tmp_path, scales_of_layers()))
    assert found.producer == "compressed-tensors"
