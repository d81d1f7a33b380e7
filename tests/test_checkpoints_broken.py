"""Whatever is wrong with files gives an error that names them, or scales that are sound: nothing else."""

from __future__ import annotations

import copy
import json
import math
import os
import struct
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import FP8, PATHS, scales_of_layers, write
from helpers import llama_config, tiny_llama
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from hf_kvquant import LayerScales, QuantizedPagedCache, read_scales
from hf_kvquant.checkpoints import ModelLayers, sidecar

SETTINGS = settings(
    max_examples=int(os.environ.get("BROKEN_FILES_EXAMPLES", "60")),
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
PREFIX = "model.layers.{}.self_attn"
HEADS = {"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(autouse=True)
def _warnings_are_not_the_question() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def sound_or_named(directory: Path, model: ModelLayers | None = PATHS) -> None:
    """Reads; an error is a ValueError that names the directory, and a result fits the model."""
    found, said = None, str(directory)
    try:
        found = read_scales(directory, model)
    except ValueError as error:
        said = str(error)
    assert str(directory) in said
    if found is None:
        return
    assert len(found.layers) == len(found.sources)
    assert model is None or len(found.layers) == len(model)
    for layer, sources in zip(found.layers, found.sources, strict=True):
        assert (layer is None) == (not sources)
        if layer is not None:
            assert isinstance(layer, LayerScales)  # which has checked its values
            if found.producer != "modelopt":  # means 1.0 without any
                assert all((directory / source.file).exists() or "*" in source.file for source in sources.values())


# -- directories of every kind, right until a test breaks them ---------------------------------------------------------


def _tensors(directory: Path) -> None:
    config = {**HEADS, "quantization_config": {"quant_method": "compressed-tensors", "kv_cache_scheme": FP8}}
    write(directory, scales_of_layers(), config=config)


def _sharded(directory: Path) -> None:
    _tensors(directory)
    names = [*scales_of_layers(), "model.layers.0.self_attn.k_proj.weight"]
    (directory / "model.safetensors").rename(directory / "model-00001-of-00001.safetensors")
    weight_map = dict.fromkeys(names, "model-00001-of-00001.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _modelopt(directory: Path) -> None:
    names = {f"{PREFIX.format(i)}.{s}_proj.{s}_scale": torch.tensor(0.5) for i in range(2) for s in "kv"}
    write(directory, names, config=HEADS)
    content = {"producer": {"name": "modelopt"}, "quantization": {"kv_cache_quant_algo": "FP8"}}
    (directory / "hf_quant_config.json").write_text(json.dumps(content))


def _quark(directory: Path) -> None:
    names = {f"{PREFIX.format(i)}.{s}_proj.output_scale": torch.tensor(0.5) for i in range(2) for s in "kv"}
    spec = {"output_tensors": {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False}}
    quark = {
        "quant_method": "quark",
        "export": {"kv_cache_group": ["*k_proj"]},
        "layer_quant_config": {"*k_proj": spec},
        "algo_config": [{"name": "rotation", "r3": True}],
        "kv_cache_post_rope": True,
    }
    write(directory, names, config={**HEADS, "quantization_config": quark})


def _angelslim(directory: Path) -> None:
    names = {f"{PREFIX.format(i)}.v_cache.scale": torch.ones(2) for i in range(2)}
    schemes = {"k_quant": "dynamic", "v_quant": "static"}
    sides = {side: {"dtype": "fp8_e4m3", "scheme": scheme} for side, scheme in schemes.items()}
    write(directory, names, config={**HEADS, "attn_quant_config": {"kv_cache_quant": sides}})


def _attention_group(directory: Path) -> None:
    group = {"targets": ["LlamaAttention"], "weights": None, "input_activations": FP8}
    transform = {"config_groups": {"R3": {"apply": [{"location": "k_cache"}]}}}
    config = {**HEADS, "quantization_config": {"config_groups": {"group_0": group}, "transform_config": transform}}
    write(directory, scales_of_layers(), config=config)


def _ascend(directory: Path) -> None:
    names = {f"{PREFIX.format(i)}.{s}_proj.kv_cache_scale": torch.ones(32) for i in range(2) for s in "kv"}
    write(directory, names, config=HEADS)
    (directory / "quant_model_description.json").write_text(json.dumps({"kv_cache_type": "C8"}))


def _tensorrt_llm(directory: Path) -> None:
    config = {**HEADS, "quantization": {"kv_cache_quant_algo": "INT8"}, "mapping": {"tp_size": 2, "pp_size": 1}}
    (directory / "config.json").write_text(json.dumps(config))
    for rank in range(2):
        names = {f"transformer.layers.{i}.attention.kv_cache_scaling_factor": torch.ones(1) for i in range(2)}
        save_file(names, directory / f"rank{rank}.safetensors")


def _json(name: str, content: Any) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_text(json.dumps(content)) and None


def _parameters(directory: Path) -> None:
    for layer in range(2):
        (directory / f"layers.{layer}.past_kv_scale.0.weight").write_bytes(struct.pack("<4f", 0.5, 0.0, 0.25, 1.0))


def _statistics(directory: Path) -> None:
    x = {f"model.layers.{index}": torch.ones(2, 16) for index in range(2)}
    for name in ("key", "value"):
        torch.save({"max": x, "min": {key: -value for key, value in x.items()}}, directory / f"{name}_stats.pth")


VLLM = {
    "kv_cache": {"dtype": "float8_e4m3fn", "scaling_factor": {"0": {"0": 0.5, "1": 0.5}, "1": {"0": 1.0, "1": 2.0}}}
}
LIGHTLLM = {"quant_type": "per_head", "qmax": 448.0, "num_layers": 2, "num_head": 2, "scales": [[1.0] * 4] * 2}
ORT = {"scales": {"k_scales": [0.5, [1.0] * 32], "v_scales": [0.5, [1.0] * 32]}, "layer_ids": [0, 1], "qmax": 128.0}
OWN_LAYERS = {PREFIX.format(i): {"k_scale": [0.5], "v_scale": [[1.0] * 16] * 2, "k_zero": [1.0, 2.0]} for i in range(2)}
OWN = {"format": "hf_kvquant scales", "version": 1, "kv_cache_dtype": "int8", "layers": OWN_LAYERS}
KINDS: dict[str, Callable[[Path], None]] = {
    "tensors": _tensors,
    "sharded": _sharded,
    "modelopt": _modelopt,
    "quark": _quark,
    "angelslim": _angelslim,
    "attention_group": _attention_group,
    "ascend": _ascend,
    "tensorrt_llm": _tensorrt_llm,
    "vllm": _json("kv_cache_scales.json", VLLM),
    "lightllm": _json("kv_cache_calib.json", LIGHTLLM),
    "ort_genai": _json("kv_cache_scales.json", ORT),
    "own": _json(sidecar.FILE, OWN),
    "lmdeploy_parameters": _parameters,
    "lmdeploy_statistics": _statistics,
}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())
def test_they_are_right_to_begin_with(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path)
    found = read_scales(tmp_path, PATHS)
    assert found is not None
    assert all(layer is not None for layer in found.layers)


# -- bytes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())
@SETTINGS
@given(data=st.data())
def test_broken_bytes(make: Callable[[Path], None], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        make(directory)
        file = data.draw(st.sampled_from(sorted(directory.iterdir())))
        content = bytearray(file.read_bytes())
        place = data.draw(st.integers(0, len(content)))
        kind = data.draw(st.sampled_from(["truncate", "flip", "overwrite", "insert", "empty", "header"]))
        if kind == "truncate":
            del content[place:]
        elif kind == "flip" and place < len(content):
            content[place] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "overwrite":
            content[place : place + 8] = data.draw(st.binary(max_size=8))
        elif kind == "insert":
            content[place:place] = data.draw(st.binary(max_size=8))
        elif kind == "empty":
            content.clear()
        else:  # the length of a safetensors header, hostile
            content[:8] = struct.pack("<Q", data.draw(st.sampled_from([0, 1, 2**31, 2**40, 2**63, 2**64 - 1])))
        file.write_bytes(content)
        sound_or_named(directory, data.draw(st.sampled_from([PATHS, None])))


# -- JSON --------------------------------------------------------------------------------------------------------------

LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.just(10**400), st.floats(), st.text(max_size=4),
    st.sampled_from(["../x", "/etc/passwd", "model.safetensors", "FP8", "static", "0", "-1", "\0", 0, -1, 1, 8, 2**40]),
)  # fmt: skip
ANYTHING = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
)


def nodes(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values in a document."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [path, *(found for key, value in items for found in nodes(value, (*path, key)))]


def replaced(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    content = copy.copy(content)
    content[path[0]] = replaced(content[path[0]], path[1:], value)
    return content


@pytest.mark.parametrize(
    "make",
    [make for name, make in KINDS.items() if "lmdeploy" not in name],
    ids=[n for n in KINDS if "lmdeploy" not in n],
)
@SETTINGS
@given(data=st.data())
def test_wrong_values_in_json(make: Callable[[Path], None], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        make(directory)
        file = data.draw(st.sampled_from(sorted(directory.glob("*.json"))))
        content = json.loads(file.read_text())
        path = data.draw(st.sampled_from(nodes(content)))
        file.write_text(json.dumps(replaced(content, path, data.draw(ANYTHING))))
        sound_or_named(directory, data.draw(st.sampled_from([PATHS, None])))


@pytest.mark.parametrize("name", ["config.json", "hf_quant_config.json", "kv_cache_scales.json", sidecar.FILE])
def test_nesting_without_end(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"a":' + "[" * 200_000)
    with pytest.raises(ValueError, match=f"{name} cannot be read as JSON"):
        read_scales(tmp_path, PATHS)


@pytest.mark.parametrize("model", [PATHS, None], ids=["by_path", "by_number"])
@pytest.mark.parametrize("where", ["config", "name", "layer_ids", "long_name"])
def test_numbers_without_end(tmp_path: Path, where: str, model: ModelLayers | None) -> None:
    """A layer of this number is no reason to make a list of that length, nor a name to search for ever."""
    if where == "config":
        write(tmp_path, scales_of_layers(), config={**HEADS, "num_hidden_layers": 10**12})
    elif where == "name":
        write(tmp_path, scales_of_layers(1, f"model.layers.{'9' * 99}.self_attn"))
    elif where == "layer_ids":
        content = {"scales": {"k_scales": [1.0], "v_scales": [1.0]}, "layer_ids": [10**12], "qmax": 128.0}
        (tmp_path / "kv_cache_scales.json").write_text(json.dumps(content))
    else:
        write(tmp_path, {"k_proj." * 200_000 + "x": torch.ones(1), **scales_of_layers()})
    sound_or_named(tmp_path, model)


# -- tensors -----------------------------------------------------------------------------------------------------------

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int64, torch.bool,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64,
]  # fmt: skip
NAMES = [
    "{}.k_scale", "{}.v_scale", "{}.q_scale", "{}.kv_scale", "{}.k_zero_point", "{}.v_zero_point", "{}.k_proj.k_scale",
    "{}.v_proj.v_bias", "{}.k_proj.output_scale", "{}.qkv_proj.output_scale", "{}.k_cache.scale", "{}.attn.v_scale",
    "{}.kv_fake_quantizer.qscale_act", "{}.v_proj.kv_cache_offset", "{}.k_global_scale", "k_scale", "..v_scale",
]  # fmt: skip
MODULES = [
    PREFIX.format(0),
    PREFIX.format(1),
    PREFIX.format(7),
    "model.visual.layers.0.self_attn",
    "layers.0.attention",
    "x",
]


@SETTINGS
@given(data=st.data())
def test_wrong_tensors(data: st.DataObject) -> None:
    shapes = st.lists(st.sampled_from([0, 1, 2, 3, 16, 17]), max_size=4)
    names = st.builds(lambda name, module: name.format(module), st.sampled_from(NAMES), st.sampled_from(MODULES))
    tensors = {}
    for name in data.draw(st.lists(names, max_size=6, unique=True)):
        value = data.draw(st.sampled_from([0.5, 1.0, 0.0, -1.0, 1e-30, 1e30, math.inf, math.nan]))
        dtype = data.draw(st.sampled_from(DTYPES))
        shape = data.draw(shapes)
        whole = dtype in (torch.int8, torch.uint8, torch.int64, torch.bool)
        tensors[name] = torch.full(shape, 1 if whole else value).to(dtype)
    with tempfile.TemporaryDirectory() as name:
        config: dict[str, Any] = dict(HEADS) if data.draw(st.booleans()) else {}
        scheme = data.draw(st.sampled_from([None, FP8, {**FP8, "type": "int"}, {**FP8, "dynamic": True}]))
        config |= {"quantization_config": {"kv_cache_scheme": scheme}}
        sound_or_named(write(Path(name), tensors, config=config), data.draw(st.sampled_from([PATHS, None])))


@SETTINGS
@example(values=[math.nan, 1.0])
@example(values=[0.0, 1.0])
@given(values=st.lists(st.floats(width=32), min_size=1, max_size=2))
def test_any_number(values: list[float]) -> None:
    """NaN and infinity are errors; zero and less is not set; everything else is taken as it is."""
    with tempfile.TemporaryDirectory() as name:
        names = {f"{PREFIX.format(0)}.k_scale": torch.tensor(values), f"{PREFIX.format(0)}.v_scale": torch.ones(1)}
        directory = write(Path(name), names, config={**HEADS, "quantization_config": {"kv_cache_scheme": FP8}})
        if not all(map(math.isfinite, values)):
            with pytest.raises(ValueError, match="k_scale in .* holds NaN or infinite values"):
                read_scales(directory, PATHS)
            return
        found = read_scales(directory, PATHS)
        assert found is not None
        assert found.layers[0] is not None
        if min(values) > 0:
            assert torch.equal(found.layers[0].k_scale, torch.tensor(values))
        else:
            assert found.layers[0].k_scale is None


def test_a_scale_that_is_far_too_large(tmp_path: Path) -> None:
    """Of a file of gigabytes a few numbers are read; a tensor that calls itself a scale must not change that."""
    write(tmp_path, {**scales_of_layers(1), f"{PREFIX.format(1)}.k_scale": torch.ones(2**20 + 1)})
    with pytest.raises(ValueError, match=r"k_scale in .*model.safetensors has shape \[1048577\]; no KV scale is that"):
        read_scales(tmp_path, PATHS)


def with_header(directory: Path, entries: dict[str, Any], size: int) -> None:
    """A checkpoint of one safetensors file with this header and ones behind it."""
    raw = json.dumps({name: {"dtype": "F32", **entry} for name, entry in entries.items()}).encode()
    content = struct.pack("<Q", len(raw)) + raw + struct.pack("<f", 1.0) * (size // 4)
    (directory / "model.safetensors").write_bytes(content)
    (directory / "config.json").write_text(json.dumps(HEADS))


@pytest.mark.parametrize(
    ("shape", "size", "message"),
    [
        ([2**32, 2**32], 0, "no KV scale is that large"),  # 2**64 is 0 in 64 bits
        ([2**33, 2**31], 0, "no KV scale is that large"),
        ([2**62 + 1, 4], 16, "no KV scale is that large"),
        ([0, 2**62], 0, "no KV scale is that large"),
        ([2**63 - 1, 0], 0, "no KV scale is that large"),
        ([1] * 3000, 4, "3000 dimensions; no KV scale has more than 8"),
    ],
    ids=["wraps", "wraps_too", "wraps_to_four", "empty", "empty_too", "dimensions"],
)
def test_shapes_beyond_all_numbers(tmp_path: Path, shape: list[int], size: int, message: str) -> None:
    name = f"{PREFIX.format(0)}.k_scale"
    with_header(tmp_path, {name: {"shape": shape, "data_offsets": [0, size]}}, size)
    with pytest.raises(ValueError, match=rf"{name} in .*model.safetensors has .*{message}"):
        read_scales(tmp_path, PATHS)


def test_tensors_that_share_bytes(tmp_path: Path) -> None:
    """As the safetensors library has it: a file of a few bytes must not become gigabytes."""
    names = [f"{PREFIX.format(0)}.{side}_scale" for side in "kv"]
    entries = {name: {"shape": [2], "data_offsets": [at, at + 8]} for name, at in zip(names, (4, 0), strict=True)}
    with_header(tmp_path, entries, 12)
    message = rf"model.safetensors cannot be read .*{names[0]} begins at byte 4, before the end of {names[1]} at 8"
    with pytest.raises(ValueError, match=message):
        read_scales(tmp_path, PATHS)


def test_empty_tensors_between_others(tmp_path: Path) -> None:
    offsets = {"k_scale": [0, 4], "x.empty": [4, 4], "y.empty": [4, 4], "v_scale": [4, 8]}
    entries = {
        f"{PREFIX.format(0)}.{name}": {"shape": [(end - begin) // 4], "data_offsets": [begin, end]}
        for name, (begin, end) in offsets.items()
    }
    with_header(tmp_path, entries, 8)
    found = read_scales(tmp_path, PATHS)
    assert found is not None
    assert found.layers[0] is not None


def test_a_checkpoint_of_a_terabyte_takes_no_memory(tmp_path: Path) -> None:
    """A file with a hole where the weights would be: nothing of it is read."""
    header: dict[str, Any] = {}
    offset = 0
    for name in scales_of_layers():
        header[name] = {"dtype": "F32", "shape": [1], "data_offsets": [offset, offset + 4]}
        offset += 4
    size = 2**40
    header["model.embed_tokens.weight"] = {"dtype": "U8", "shape": [size], "data_offsets": [offset, offset + size]}
    raw = json.dumps(header).encode()
    file = tmp_path / "model.safetensors"
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(raw)) + raw + struct.pack("<4f", 0.1, 0.2, 0.3, 0.4))
        opened.truncate(8 + len(raw) + offset + size)
    (tmp_path / "config.json").write_text(json.dumps({**HEADS, "quantization_config": {"kv_cache_scheme": FP8}}))
    found = read_scales(tmp_path, PATHS)
    assert found is not None
    assert found.layers[1] is not None
    torch.testing.assert_close(found.layers[1].v_scale, torch.tensor([0.4]))


# -- files beside a checkpoint -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", [b"", b"not a tensor", struct.pack("<Q", 2**63) + b"{}"], ids=["empty", "text", "huge"]
)
def test_a_broken_file_beside_a_model(tmp_path: Path, content: bytes) -> None:
    """Nothing says that it belongs to the checkpoint, and transformers does not read it; it is noted and left out."""
    _tensors(tmp_path)
    (tmp_path / "leftover.safetensors").write_bytes(content)
    found = read_scales(tmp_path, PATHS)
    assert found is not None
    assert found.kv_cache_dtype == "fp8_e4m3"
    (note,) = [note for note in found.notes if "leftover.safetensors" in note]
    assert "not part of the checkpoint and is left out" in note
    model = tiny_llama()
    model.config._name_or_path = str(tmp_path)
    assert QuantizedPagedCache.from_model(model).report().layers[0].scales[0].startswith("checkpoint")


def test_a_broken_file_of_a_model(tmp_path: Path) -> None:
    """If it is part of the checkpoint, the error says which file it is and what to do."""
    _tensors(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read as safetensors .*fetch or save it again"):
        read_scales(tmp_path)


def test_scales_beside_a_model_do_not_replace_its_own(tmp_path: Path) -> None:
    _tensors(tmp_path)
    save_file({name: tensor * 9 for name, tensor in scales_of_layers(3).items()}, tmp_path / "other.safetensors")
    found = read_scales(tmp_path, PATHS)
    assert found is not None
    assert found.layers[1] is not None
    assert found.layers[1].v_scale.item() == 1.0
    assert {source.file for sources in found.sources for source in sources.values()} == {"model.safetensors"}
    assert found.ignored == [f"{PREFIX.format(2)}.{side}_scale" for side in "kv"]


@pytest.mark.parametrize("part", ["key", "value"])
def test_nothing_is_unpickled(tmp_path: Path, part: str) -> None:
    """A pickle may run anything; these must not."""

    class Hostile:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "harm"),))

    _statistics(tmp_path)
    torch.save({"max": Hostile(), "min": {}}, tmp_path / f"{part}_stats.pth")
    with pytest.raises(ValueError, match=f"{part}_stats.pth cannot be read as tensors saved by torch"):
        read_scales(tmp_path, PATHS)
    assert not (tmp_path / "harm").exists()


ODD: dict[str, Callable[[], torch.Tensor]] = {
    "sparse": lambda: torch.eye(4).to_sparse(),
    "sparse_rows": lambda: torch.eye(4).to_sparse_csr(),
    "meta": lambda: torch.empty(4, 4, device="meta"),
    "complex": lambda: torch.ones(2, 16, dtype=torch.complex64),
    "bool": lambda: torch.ones(2, 16, dtype=torch.bool),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(2, 16), 0.1, 0, torch.qint8),
    "float8": lambda: torch.ones(2, 16).to(torch.float8_e4m3fn),
}


@pytest.mark.parametrize("make", ODD.values(), ids=ODD.keys())
def test_statistics_of_other_kinds(tmp_path: Path, make: Callable[[], torch.Tensor]) -> None:
    tensor = make()
    for name in ("key", "value"):
        layers = {f"model.layers.{index}": tensor for index in range(2)}
        torch.save({"max": layers, "min": layers}, tmp_path / f"{name}_stats.pth")
    with pytest.raises(ValueError, match=r"key_stats.pth (is not a tensor .* of floats|cannot be read as tensors)"):
        read_scales(tmp_path, PATHS)


@pytest.mark.parametrize("layers", [1, 2**13], ids=["one", "many"])
def test_statistics_that_are_small_only_in_the_file(tmp_path: Path, layers: int) -> None:
    """One number, said to be many."""
    tensor = torch.ones(1).as_strided((2**12, 2**13 // layers), (0, 0))
    for name in ("key", "value"):
        content = {f"model.layers.{index}": tensor for index in range(layers)}
        torch.save({"max": content, "min": content}, tmp_path / f"{name}_stats.pth")
    with pytest.raises(ValueError, match=r"'max' in .*key_stats.pth holds more than 16777216 numbers"):
        read_scales(tmp_path, PATHS)


def test_statistics_that_are_packed(tmp_path: Path) -> None:
    """A few kilobytes that would become half a gigabyte."""
    _statistics(tmp_path)
    file = tmp_path / "key_stats.pth"
    with zipfile.ZipFile(file) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
        with archive.open(f"{next(iter(contents)).split('/')[0]}/data/9", "w") as entry:
            for _ in range(2**5 + 1):
                entry.write(bytes(2**23))
    with pytest.raises(ValueError, match=r"key_stats.pth cannot be read .*unpacked it has \d+ bytes"):
        read_scales(tmp_path, PATHS)


def test_surplus_layers_are_said(tmp_path: Path) -> None:
    """A checkpoint of more layers than the model is no error, but nobody should have to find out."""
    write(tmp_path, scales_of_layers(3), config={**HEADS, "num_hidden_layers": 3})
    found = read_scales(tmp_path, PATHS)
    cache = QuantizedPagedCache(llama_config(), checkpoint=found)
    assert any(f"not used: {PREFIX.format(2)}.k_scale, {PREFIX.format(2)}.v_scale" in note for note in cache.notes)
