"""Writing scales: into checkpoints that transformers loads, into files, and back again."""

from __future__ import annotations

import json
import os
import re
import shutil
import tracemalloc
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from checkpoint_files import Hub
from helpers import need_fake_quantization, prompt, tiny_llama
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from hf_kvquant import LayerScales, QuantizedPagedCache, calibrate, read_scales, write_scales
from hf_kvquant.checkpoints import ModelLayers, sidecar
from hf_kvquant.exporting import check_export
from hf_kvquant.hosts.files import model_layers
from hf_kvquant.inspection import inspect_scales
from hf_kvquant.ops import reference
from hf_kvquant.planning import plan_memory
from hf_kvquant.scales import as_head_channel

MODULES = [f"model.layers.{index}.self_attn" for index in range(2)]
LAYERS = ModelLayers([[module] for module in MODULES], [2, 2])


@dataclass
class Scales:
    """What `write_scales` needs, made by hand."""

    layers: Sequence[LayerScales | None]
    kv_cache_dtype: str | None = "fp8_e4m3"
    settings: dict[str, Any] = field(default_factory=dict)


def scales_of(
    shape: Sequence[int] = (1,), zeros: bool = False, q: Sequence[int] = (), seed: int = 0
) -> list[LayerScales]:
    """Two layers; zeros are whole steps."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> torch.Tensor:
        return torch.rand(size, generator=generator) * 0.1 + 0.01

    layers = []
    for _ in range(2):
        k_scale, v_scale = draw(*shape), draw(*shape)
        k_zero, v_zero = (7 * k_scale, -3 * v_scale) if zeros else (None, None)
        layers.append(LayerScales(k_scale, v_scale, draw(*q) if q else None, k_zero, v_zero))
    return layers


def same(found: Sequence[LayerScales | None], expected: Sequence[LayerScales | None], rtol: float = 0.0) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        for name in ("k_scale", "v_scale", "q_scale", "k_zero", "v_zero"):
            values = getattr(one, name, None), getattr(other, name, None)
            if values[1] is None:
                assert values[0] is None
            else:
                torch.testing.assert_close(*values, rtol=rtol, atol=0.0)


@pytest.fixture(autouse=True)
def _warnings_are_asked_for() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="layout ")
        yield


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A checkpoint of one file, without quantization."""
    directory = tmp_path / "base"
    tiny_llama("sdpa").save_pretrained(directory)
    (directory / "tokenizer.json").write_text("{}")
    return directory


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    directory = tmp_path / "sharded"
    tiny_llama("sdpa").save_pretrained(directory, max_shard_size="100KB")
    assert (directory / "model.safetensors.index.json").exists()
    return directory


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


def with_quantization(directory: Path, quantization: dict[str, Any]) -> Path:
    config = {**config_of(directory), "quantization_config": quantization}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def names_and_values(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of all files; none may be in two."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors = load_file(file)
        assert not set(tensors) & set(found)
        found.update(tensors)
    return found


def load_plain(directory: Path, attention: str = "kvquant") -> PreTrainedModel:
    """Without the integration of compressed-tensors."""
    config = AutoConfig.from_pretrained(directory)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_pretrained(
        directory, config=config, attn_implementation=attention, dtype=torch.float32
    )
    model.generation_config.eos_token_id = None
    return model


KINDS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "fp8": ("fp8_e4m3", {}, []),
    "fp8_head": ("fp8_e4m3", {"shape": (2,)}, ["per head"]),
    "int8": ("int8", {}, ["int8 is read by"]),
    "int8_zeros": ("int8", {"zeros": True}, ["int8 is read by", "zero points"]),
    "int8_head_zeros": ("int8", {"shape": (2,), "zeros": True}, ["int8 is read by", "per head", "zero points"]),
}


def make(kind: str) -> tuple[Scales, list[str]]:
    name, options, limits = KINDS[kind]
    return Scales(scales_of(**options), name), limits


def write(scales: Scales, limits: list[str], *arguments: Any, **options: Any) -> Any:
    """`write_scales`, which has to warn of these limits and of nothing else."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        written = write_scales(scales, *arguments, **options)
    said = [str(warning.message) for warning in caught if str(warning.message).startswith("layout ")]
    assert len(said) == len(limits) == len(written.notes)
    assert all(re.search(limit, message) for limit, message in zip(limits, said, strict=True))
    return written


# -- compressed-tensors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["base", "sharded"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_new_checkpoint(tmp_path: Path, request: pytest.FixtureRequest, source: str, kind: str) -> None:
    checkpoint = request.getfixturevalue(source)
    before = {file.name: file.read_bytes() for file in checkpoint.iterdir()}
    scales, limits = make(kind)
    written = write(scales, limits, checkpoint, tmp_path / "new" / "model")
    output = tmp_path / "new" / "model"
    assert Path(written.path) == output
    assert written.layout == "compressed-tensors"
    assert {file.name: file.read_bytes() for file in checkpoint.iterdir()} == before
    assert {name for name in before if name != "model.safetensors"} <= {file.name for file in output.iterdir()}
    assert not list(tmp_path.glob("new/.*"))
    new_or_changed = {file.name for file in output.iterdir() if before.get(file.name) != file.read_bytes()}
    assert set(written.files) == new_or_changed

    quantization = config_of(output)["quantization_config"]
    assert quantization["quant_method"] == "compressed-tensors"
    assert quantization["config_groups"] == {}
    assert quantization["ignore"] == ["Linear"]
    assert quantization["kv_cache_scheme"] == {
        "num_bits": 8,
        "type": "int" if scales.kv_cache_dtype == "int8" else "float",
        "strategy": "attn_head" if "head" in kind else "tensor",
        "dynamic": False,
        "symmetric": "zeros" not in kind,
    }
    tensors = names_and_values(output)
    weights = names_and_values(checkpoint)
    assert all(torch.equal(tensors[name], weight) for name, weight in weights.items())
    added = {name: value for name, value in tensors.items() if name not in weights}
    parts = ("k_scale", "v_scale") + (("k_zero_point", "v_zero_point") if "zeros" in kind else ())
    assert set(added) == {f"{module}.{part}" for module in MODULES for part in parts}
    for name, value in added.items():
        assert list(value.shape) == ([2, 1, 1] if "head" in kind else [1])
        assert value.dtype == (torch.int8 if "zero_point" in name else torch.float32)
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors)
    assert not (output / "model.safetensors").exists()

    found = read_scales(output, LAYERS)
    assert found.kv_cache_dtype == scales.kv_cache_dtype
    assert found.notes == found.ignored == []
    same(found.layers, scales.layers, rtol=1e-6)


class RoundedCache(DynamicCache):
    """Keys and values in the model's dtype, rounded to 8 bits on their way in, by this package's reference."""

    def __init__(self, config: Any, scales: Scales) -> None:
        super().__init__(config=config)
        self.scales = scales

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        layer, rounded = self.scales.layers[layer_idx], []
        for side, x in (("k", keys), ("v", values)):
            scale, zero = getattr(layer, f"{side}_scale"), getattr(layer, f"{side}_zero")
            scale = as_head_channel(scale, x.shape[1], x.shape[3], side)
            zero = None if zero is None else as_head_channel(zero, x.shape[1], x.shape[3], side)
            codes, _, _ = reference.quantize(x, self.scales.kv_cache_dtype, scale, zero, dynamic=False)
            rounded.append(reference.dequantize(codes, self.scales.kv_cache_dtype, scale, zero, None).to(x.dtype))
        return super().update(*rounded, layer_idx, *args, **kwargs)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_it_and_rounds_as_we_store(tmp_path: Path, base: Path, kind: str) -> None:
    need_fake_quantization()
    scales, limits = make(kind)
    # Scales that fit the numbers, so that rounding shows and clipping, for which compressed-tensors has one code more,
    # does not hide it.
    tokens = prompt(2, 63, seed=5)
    calibrated = calibrate(
        load_plain(base),
        tokens,
        kv_cache_dtype=scales.kv_cache_dtype,
        granularity="head" if "head" in kind else "tensor",
        symmetric="zeros" not in kind,
        progress=False,
    )
    scales = Scales(calibrated.layers, scales.kv_cache_dtype)
    output = tmp_path / "new"
    write(scales, limits, base, output)
    loaded, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True, attn_implementation="sdpa")
    assert not any(info.values()), info
    assert all(hasattr(layer.self_attn, "kv_cache") for layer in loaded.model.layers), "nothing fakes quantization"
    plain = load_plain(output, "sdpa")
    with torch.no_grad():
        rounded = loaded(tokens, past_key_values=DynamicCache(config=loaded.config)).logits
        expected = plain(tokens, past_key_values=RoundedCache(plain.config, scales)).logits
        exact = plain(tokens, past_key_values=DynamicCache(config=plain.config)).logits
    effect = (expected - exact).abs().max()
    assert effect > 1e-3
    # One divides by the scale, the other multiplies by its reciprocal: now and then a number falls to the next code.
    assert (rounded - expected).abs().max() < effect / 4
    assert (rounded - expected).abs().mean() < (expected - exact).abs().mean() / 20


@pytest.mark.parametrize("kind", KINDS)
def test_generating_with_what_was_written(tmp_path: Path, base: Path, kind: str) -> None:
    scales, limits = make(kind)
    write(scales, limits, base, tmp_path / "new")
    model = load_plain(tmp_path / "new")
    tokens = prompt(2, 17)
    outputs = []
    given = {"scales": list(scales.layers), "kv_cache_dtype": scales.kv_cache_dtype}
    for options in ({}, given):
        output = model.generate(
            tokens, max_new_tokens=6, do_sample=False, cache_config=options, return_dict_in_generate=True
        )
        outputs.append(output)
    report = outputs[0].past_key_values.report()
    assert report.layers[1].kv_cache_dtype == (scales.kv_cache_dtype,) * 2
    assert report.layers[1].scales[0] == "checkpoint: model.layers.1.self_attn.k_scale"
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    pages = [[store.paged.pages for layer in o.past_key_values.layers for store in (layer.k, layer.v)] for o in outputs]
    assert all(torch.equal(one, other) for one, other in zip(*pages, strict=True))


def test_a_query_scale(tmp_path: Path, base: Path) -> None:
    scales = Scales(scales_of(q=(1,)))
    write(scales, ["transformers reports q_scale"], base, tmp_path / "new")
    same(read_scales(tmp_path / "new", LAYERS).layers, scales.layers)
    scales = Scales(scales_of((2,), q=(4,)))
    write(scales, ["per head", "transformers reports q_scale"], base, tmp_path / "heads")
    assert load_file(tmp_path / "heads" / "model-kv-scales.safetensors")[f"{MODULES[0]}.q_scale"].shape == (4, 1, 1)


def test_a_query_scale_per_head_of_a_model_with_one_kv_head(tmp_path: Path) -> None:
    model = tiny_llama("kvquant", num_key_value_heads=1)
    model.save_pretrained(tmp_path / "base")
    scales = calibrate(model, prompt(2, 40), kv_cache_dtype="fp8", granularity="head", q_scale=True, progress=False)
    assert [layer.q_scale.shape for layer in scales.layers] == [(4,), (4,)]
    write(scales, ["per head", "transformers reports q_scale"], tmp_path / "base", tmp_path / "new")
    same(read_scales(tmp_path / "new", model).layers, scales.layers)
    scheme = config_of(tmp_path / "new")["quantization_config"]["kv_cache_scheme"]
    assert scheme["strategy"] == "attn_head"  # else servers make room for one number
    shapes = {value.shape for value in load_file(tmp_path / "new" / "model-kv-scales.safetensors").values()}
    assert shapes == {(1, 1, 1), (4, 1, 1)}


@pytest.mark.parametrize(("model_type", "obstacle"), [("mixtral", "the experts"), ("opt", "num_key_value_heads")])
def test_models_that_transformers_may_not_load_with_a_declaration(
    tmp_path: Path, model_type: str, obstacle: str
) -> None:
    """compressed-tensors may want more of them than a KV cache needs; that is said, and the way around it works."""
    model = families.build(model_type)
    model.save_pretrained(tmp_path)
    calibrated = calibrate(model, prompt(), progress=False)
    write(calibrated, [obstacle], tmp_path)
    cache = QuantizedPagedCache.from_model(load_plain(tmp_path))
    assert {row.kv_cache_dtype for row in cache.report().layers} == {("fp8_e4m3", "fp8_e4m3")}


@pytest.mark.parametrize("model_type", families.available(["gemma3_text", "bamba", "qwen2_5_vl", "phi3"]))
def test_other_models_load_in_place(tmp_path: Path, model_type: str) -> None:
    need_fake_quantization()
    model = families.build(model_type)
    model.save_pretrained(tmp_path)
    write_scales(calibrate(model, prompt(2, 21), progress=False), tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    rounded = sum(hasattr(module, "k_scale") for module in loaded.modules())
    assert rounded == sum(1 for paths in model_layers(model).paths if paths)


def test_old_scales_give_way(tmp_path: Path, base: Path) -> None:
    """Of whatever family they are, and wherever they lie; a copy's other tensors stay."""
    file = base / "model.safetensors"
    old = {
        f"{MODULES[0]}.k_scale": torch.tensor(3.0), f"{MODULES[0]}.k_proj.k_scale": torch.tensor(4.0),
        f"{MODULES[1]}.kv_scale": torch.tensor(5.0), f"{MODULES[1]}.v_proj.output_scale": torch.tensor(6.0),
    }  # fmt: skip
    weights = load_file(file)
    save_file({**weights, **old}, file, {"format": "pt", "note": "kept"})
    scales, _ = make("fp8")
    with pytest.raises(ValueError, match=r"has KV scales among the weights of model.safetensors; give an output"):
        write_scales(scales, base)
    write_scales(scales, base, tmp_path / "new")
    tensors = names_and_values(tmp_path / "new")
    assert set(tensors) == {*weights, *(f"{module}.{side}_scale" for module in MODULES for side in "kv")}
    same(read_scales(tmp_path / "new", LAYERS).layers, scales.layers)
    with safe_open(tmp_path / "new" / "model-00001-of-00001.safetensors", framework="pt") as handle:
        assert handle.metadata() == {"format": "pt", "note": "kept"}


def test_a_checkpoint_that_compressed_tensors_has_quantized(tmp_path: Path, base: Path) -> None:
    group = {"targets": ["Linear"], "weights": {"num_bits": 8}}
    with_quantization(
        base,
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": ["lm_head"],
         "format": "float-quantized", "kv_cache_scheme": None},
    )  # fmt: skip
    write_scales(make("fp8")[0], base, tmp_path / "new")
    quantization = config_of(tmp_path / "new")["quantization_config"]
    assert quantization["config_groups"] == {"group_0": group}
    assert quantization["ignore"] == ["lm_head"]
    assert quantization["kv_cache_scheme"]["type"] == "float"


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("nested", [False, True])
def test_the_declaration_goes_where_there_is_one(tmp_path: Path, base: Path, key: str, nested: bool) -> None:
    """Old files have it under another name, and some models in the configuration of their text part."""
    config, old = config_of(base), {"quant_method": "compressed-tensors", "config_groups": {"group_0": {}}}
    config |= {"text_config": {key: old}} if nested else {key: old}
    (base / "config.json").write_text(json.dumps(config))
    write_scales(make("fp8")[0], base, tmp_path / "new", model=LAYERS)
    new = config_of(tmp_path / "new")
    declared = (new["text_config"] if nested else new)[key]
    assert declared.pop("kv_cache_scheme")["strategy"] == "tensor"
    assert declared == old
    assert set(new) == set(config)


def test_modules_are_named_as_the_checkpoint_names_them(tmp_path: Path, base: Path) -> None:
    file = base / "model.safetensors"
    renamed = {f"language_model.{name}": value for name, value in load_file(file).items()}
    save_file(renamed, file, {"format": "pt"})
    write_scales(make("fp8")[0], base, model=LAYERS)
    added = set(names_and_values(base)) - set(renamed)
    assert added == {f"language_model.{module}.{side}_scale" for module in MODULES for side in "kv"}
    same(read_scales(base, LAYERS).layers, make("fp8")[0].layers)


# -- in place ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["base", "sharded"])
def test_in_place(request: pytest.FixtureRequest, source: str) -> None:
    checkpoint = request.getfixturevalue(source)
    weights = names_and_values(checkpoint)
    inodes = {file.stat().st_ino for file in checkpoint.glob("*.safetensors")}
    scales, _ = make("fp8")
    written = write_scales(scales, checkpoint)
    assert Path(written.path) == checkpoint
    tensors = names_and_values(checkpoint)
    assert all(torch.equal(tensors[name], value) for name, value in weights.items())
    # The weights are the same files, not copies; what is new is small.
    assert inodes < {file.stat().st_ino for file in checkpoint.glob("*.safetensors")}
    assert (checkpoint / "model-kv-scales.safetensors").stat().st_size < 1000
    same(read_scales(checkpoint, LAYERS).layers, scales.layers)
    # Again, with other values: the small file is replaced.
    again = Scales(scales_of(seed=1))
    write_scales(again, checkpoint)
    same(read_scales(checkpoint, LAYERS).layers, again.layers)
    assert set(names_and_values(checkpoint)) == set(tensors)
    with pytest.raises(ValueError, match=r"has KV scales for .*'float'.*the new ones are for .*'int'"):
        write_scales(Scales(scales_of(), "int8"), checkpoint)


class Crash(Exception):
    pass


def crash_at(monkeypatch: pytest.MonkeyPatch, step: int) -> list[int]:
    """Let the step-th change of a file name, which is what makes new content visible, fail."""
    done = [0]

    def failing(change: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if done[0] == step:
                raise Crash
            done[0] += 1
            return change(*arguments, **options)

        return call

    for place, name in ((os, "replace"), (os, "link"), (os, "remove"), (Path, "rename")):
        monkeypatch.setattr(place, name, failing(getattr(place, name)))
    return done


@pytest.mark.parametrize("source", ["base", "sharded"])
@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_a_crash_leaves_a_checkpoint_with_all_its_weights(
    request: pytest.FixtureRequest, tmp_path: Path, source: str, kind: str
) -> None:
    original = request.getfixturevalue(source)
    expected = load_plain(original).state_dict()
    scales, _ = make(kind)
    warnings.filterwarnings("ignore", message="layout ")
    for step in range(10):
        checkpoint = tmp_path / f"step-{step}"
        shutil.copytree(original, checkpoint)
        with pytest.MonkeyPatch.context() as monkeypatch:
            done = crash_at(monkeypatch, step)
            try:
                write_scales(scales, checkpoint)
            except Crash:
                crashed = True
            else:
                crashed = False
        assert not list(checkpoint.glob(".*")), "leftovers"
        loaded = load_plain(checkpoint).state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in expected.items())
        declared = "quantization_config" in config_of(checkpoint)
        assert declared != crashed
        if crashed:  # once more, and it is done
            write_scales(scales, checkpoint)
        found = read_scales(checkpoint, LAYERS)
        assert found.kv_cache_dtype == scales.kv_cache_dtype
        same(found.layers, scales.layers)
        if not crashed:
            break
    assert done[0] == (5 if source == "base" else 3)


@pytest.mark.parametrize("step", range(7))
def test_a_new_checkpoint_is_there_as_a_whole_or_not_at_all(tmp_path: Path, base: Path, step: int) -> None:
    output = tmp_path / "new"
    before = {file.name: file.read_bytes() for file in base.iterdir()}
    with pytest.MonkeyPatch.context() as monkeypatch:
        crash_at(monkeypatch, step)
        if step < 6:
            with pytest.raises(Crash):
                write_scales(make("fp8")[0], base, output)
            assert not output.exists()
            assert {file.name for file in tmp_path.iterdir()} == {"base"}
        else:
            write_scales(make("fp8")[0], base, output)
            assert read_scales(output, LAYERS) is not None
    assert {file.name: file.read_bytes() for file in base.iterdir()} == before


@pytest.mark.parametrize("layout", ["compressed-tensors", "sidecar"])
def test_files_are_flushed_as_windows_wants_it(
    tmp_path: Path, base: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a handle that may write."""
    flushed: list[int] = []

    def fsync(handle: int) -> None:
        os.write(handle, b"")
        flushed.append(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    write_scales(make("fp8")[0], base, tmp_path / "new", layout=layout)
    assert flushed
    assert read_scales(tmp_path / "new", LAYERS) is not None


def test_what_a_killed_run_left_is_cleaned_up(tmp_path: Path, base: Path) -> None:
    leftover = tmp_path / ".new.partial"
    leftover.mkdir()
    (leftover / "config.json").write_text("half")
    write_scales(make("fp8")[0], base, tmp_path / "new")
    assert not leftover.exists()


def with_small_files(directory: Path) -> set[str]:
    """What a checkpoint has beside configuration and weights."""
    names = {
        "chat_template.jinja",
        "tokenizer.model",
        "merges.txt",
        "modeling_own.py",
        "LICENSE",
        "templates/tool.jinja",
    }
    for name in names:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(name)
    return names


def test_a_new_checkpoint_has_what_is_in_folders(tmp_path: Path, base: Path) -> None:
    names = with_small_files(base)
    (base / ".git").mkdir()
    (base / ".git" / "HEAD").touch()
    (base / "new").mkdir()
    for output in (base / "new", tmp_path / "new"):
        write_scales(make("fp8")[0], base, output)
        present = {str(file.relative_to(output)) for file in output.rglob("*") if file.is_file()}
        assert names <= present
        assert not any(name.startswith(("new", ".")) for name in present)
        shutil.rmtree(base / "new", ignore_errors=True)


@pytest.mark.parametrize("layout", ["sidecar", "compressed-tensors"])
def test_nothing_is_written_through_links(tmp_path: Path, base: Path, layout: str) -> None:
    own = tmp_path / "own"
    own.write_text("mine")
    for file in (sidecar.FILE, "config.json", "model.safetensors.index.json", "model-kv-scales.safetensors"):
        (base / f".{file}.partial").symlink_to(own)
        if not (base / file).exists():
            (base / file).symlink_to(own.with_name("nothing"))
    (base / sidecar.FILE).unlink()
    (base / "model.safetensors.index.json").unlink()
    before = (base / "config.json").stat().st_mode
    write(make("fp8")[0], [], base, layout=layout)
    assert own.read_text() == "mine"
    assert not (tmp_path / "nothing").exists()
    assert (base / "config.json").stat().st_mode == before
    same(read_scales(base, LAYERS).layers, make("fp8")[0].layers)


def test_links_out_of_a_checkpoint_are_not_followed(tmp_path: Path, base: Path) -> None:
    """Who made a checkpoint says what is in its copy, but may not choose among the files of this machine."""
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_text("private")
    (base / ".git").mkdir()
    (base / ".git" / "config").write_text("token")
    (base / "templates").mkdir()
    links = {
        "notes.txt": secret / "key",
        "templates/chat.jinja": secret / "key",
        "extra.safetensors": secret / "key",
        "token.txt": Path(".git/config"),
        "assets": secret,
        "again": Path("."),
        "zeros.bin": Path(os.devnull),
    }
    for name, leads_to in links.items():
        (base / name).symlink_to(leads_to)
    (base / "same.json").symlink_to("tokenizer.json")
    (base / "nothing.txt").symlink_to("nowhere")
    notes = [
        f"again, assets, extra.safetensors, notes.txt, templates/chat.jinja, token.txt, zeros.bin of {base}: links"
    ]
    write(make("fp8")[0], notes, base, tmp_path / "new")
    present = {str(file.relative_to(tmp_path / "new")) for file in (tmp_path / "new").rglob("*")}
    assert not present & {*links, "nothing.txt"}
    assert (tmp_path / "new" / "same.json").read_text() == "{}"
    assert not any(file.is_symlink() for file in (tmp_path / "new").rglob("*"))
    same(read_scales(tmp_path / "new", LAYERS).layers, make("fp8")[0].layers)


@pytest.mark.parametrize("source", ["base", "sharded"])
def test_weights_that_are_links_are_copied(request: pytest.FixtureRequest, tmp_path: Path, source: str) -> None:
    """Checkpoints are put together from links to weights that several share; a hub's cache is links to blobs."""
    original = request.getfixturevalue(source)
    weights = names_and_values(original)
    shared = tmp_path / "shared"
    shared.mkdir()
    for file in original.glob("*.safetensors*"):
        file.rename(shared / file.name)
        file.symlink_to(shared / file.name)
    write(make("fp8")[0], [], original, tmp_path / "new")
    copied = names_and_values(tmp_path / "new")
    assert all(torch.equal(copied[name], value) for name, value in weights.items())

    snapshot = tmp_path / "models--some-org--tiny" / "snapshots" / "abc"
    blobs = snapshot.parent.parent / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (original / "tokenizer.json").write_text("{}")
    for file in original.iterdir():
        (blobs / file.name).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    write(make("fp8")[0], [], snapshot, tmp_path / "other")
    assert {file.name for file in (tmp_path / "other").iterdir()} >= {"tokenizer.json", "generation_config.json"}
    copied = names_and_values(tmp_path / "other")
    assert all(torch.equal(copied[name], value) for name, value in weights.items())


def test_weights_that_lead_to_something_else_are_refused(tmp_path: Path, sharded: Path) -> None:
    (tmp_path / "key").write_text("private")
    (shard, *_) = sorted(sharded.glob("*.safetensors"))
    shard.unlink()
    shard.symlink_to(tmp_path / "key")
    with pytest.raises(ValueError, match=f"{shard.name} cannot be read as safetensors"):
        write_scales(make("fp8")[0], sharded, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_name_of_dots_takes_no_time(tmp_path: Path, sharded: Path) -> None:
    """All that a name begins with may be a module; of this one that would be a lot."""
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["a." * 15_000] = next(iter(content["weight_map"].values()))
    index.write_text(json.dumps(content))
    tracemalloc.start()
    try:
        write(make("fp8")[0], [], sharded, layout="sidecar")
        assert tracemalloc.get_traced_memory()[1] < 2**28 + 2**26  # reading the index may take the first
    finally:
        tracemalloc.stop()


def test_a_new_checkpoint_of_the_hub_is_whole(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tokenizer too, which reading scales does not need; not its weights in other formats."""
    names = with_small_files(base)
    (base / "pytorch_model.bin").touch()
    hub = Hub(base, tmp_path / "local")
    hub.install(monkeypatch)
    hub.load("config.json", "model.safetensors")
    written = write_scales(make("fp8")[0], "some-org/tiny", tmp_path / "new", model=LAYERS)
    present = {str(file.relative_to(tmp_path / "new")) for file in (tmp_path / "new").rglob("*") if file.is_file()}
    weights = {"model-00001-of-00001.safetensors", "model-kv-scales.safetensors", "model.safetensors.index.json"}
    assert present == names | weights | {"config.json", "generation_config.json", "tokenizer.json"}
    assert set(written.files) == weights | {"config.json"}
    same(read_scales(tmp_path / "new", LAYERS).layers, make("fp8")[0].layers)
    hub.is_reachable = False
    with pytest.raises(ValueError, match="tokenizer and other small files of some-org/tiny cannot be fetched"):
        write_scales(make("fp8")[0], "some-org/tiny", tmp_path / "other", model=LAYERS)
    assert not (tmp_path / "other").exists()


# -- other layouts -----------------------------------------------------------------------------------------------------


def test_modelopt(tmp_path: Path, base: Path) -> None:
    with_quantization(base, {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]})
    legacy = {"producer": {"name": "modelopt", "version": "0.42.0"},
              "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": None}}  # fmt: skip
    (base / "hf_quant_config.json").write_text(json.dumps(legacy))
    scales, _ = make("fp8")
    written = write_scales(scales, base, tmp_path / "new")
    assert written.layout == "modelopt"
    quantization = config_of(tmp_path / "new")["quantization_config"]
    assert quantization["kv_cache_scheme"] == {"dynamic": False, "num_bits": 8, "type": "float"}
    assert quantization["ignore"] == ["lm_head"]
    declared = json.loads((tmp_path / "new" / "hf_quant_config.json").read_text())
    assert declared["quantization"] == {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}
    added = load_file(tmp_path / "new" / "model-kv-scales.safetensors")
    assert set(added) == {f"{module}.{side}_proj.{side}_scale" for module in MODULES for side in "kv"}
    assert {(value.dtype, value.shape) for value in added.values()} == {(torch.float32, ())}
    found = read_scales(tmp_path / "new", LAYERS)
    assert (found.producer, found.kv_cache_dtype) == ("modelopt", "fp8_e4m3")
    same(found.layers, scales.layers)


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "copy"])
@pytest.mark.parametrize("content", ['{"quantization":', "[]", '{"quantization": 5}'])
def test_a_broken_file_beside_is_named_before_anything_is_written(
    tmp_path: Path, base: Path, content: str, in_place: bool
) -> None:
    with_quantization(base, {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]})
    (base / "hf_quant_config.json").write_text(content)
    before = {file.name: file.read_bytes() for file in base.iterdir()}
    with pytest.raises(ValueError, match="hf_quant_config.json"):
        write_scales(make("fp8")[0], base, None if in_place else tmp_path / "new")
    assert {file.name: file.read_bytes() for file in base.iterdir()} == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("layout", ["compressed-tensors", "vllm-json", "sidecar"])
def test_a_decoder_configuration_that_is_none(tmp_path: Path, base: Path, layout: str) -> None:
    """It is read as if it were not there, as `read_scales` reads it."""
    config = config_of(base) | {"text_config": ["x"]}
    (base / "config.json").write_text(json.dumps(config))
    scales = Scales([LayerScales(torch.tensor([0.5]), torch.tensor([0.5]))] * len(MODULES))
    write_scales(scales, base, layout=layout, model=LAYERS)
    same(read_scales(base, LAYERS).layers, scales.layers)


def test_fp8(tmp_path: Path, base: Path) -> None:
    with_quantization(base, {"quant_method": "fp8", "activation_scheme": "static"})
    scales = Scales(scales_of(q=(1,)))
    written = write(scales, ["no place for q_scale"], base, tmp_path / "new")
    assert written.layout == "fp8"
    assert config_of(tmp_path / "new")["quantization_config"] == {
        "quant_method": "fp8", "activation_scheme": "static", "kv_cache_scheme": "static"
    }  # fmt: skip
    found = read_scales(tmp_path / "new", LAYERS)
    assert found.kv_cache_dtype == "fp8_e4m3"
    assert [layer.k_scale.item() for layer in found.layers] == [layer.k_scale.item() for layer in scales.layers]


@pytest.mark.parametrize("shape", [(1,), (2,), (2, 16)], ids=["tensor", "head", "channel"])
@pytest.mark.parametrize("name", ["fp8_e4m3", "int8"])
def test_a_file_beside_the_checkpoint_holds_everything(
    tmp_path: Path, base: Path, name: str, shape: tuple[int, ...]
) -> None:
    layers = scales_of(shape, zeros=True, q=(4,))
    before = {file.name: file.read_bytes() for file in base.iterdir()}
    elsewhere = tmp_path / "elsewhere"
    for output, where in ((None, base), (elsewhere, elsewhere)):
        written = write_scales(Scales(layers, name, {"tokens": 12}), base, output, layout="sidecar")
        assert written.files == ["hf_kvquant_scales.json"]
        assert Path(written.path) == where
        for source in (where, where / "hf_kvquant_scales.json"):
            found = read_scales(source, LAYERS)
            assert found.kv_cache_dtype == name
            same(found.layers, layers)
    assert {file.name: file.read_bytes() for file in base.iterdir() if file.name in before} == before
    assert [file.name for file in elsewhere.iterdir()] == written.files
    model = load_plain(base)
    report = QuantizedPagedCache.from_model(model).report()
    assert {row.kv_cache_dtype for row in report.layers} == {(name, name)}
    assert report.layers[0].scales[0].startswith("checkpoint: ")


def test_layers_that_are_missing(tmp_path: Path, base: Path) -> None:
    partial = Scales([scales_of()[0], None])
    for layout, message in (("auto", r"layers \[1\] have no scales"), ("vllm-json", "needs scales of all 2 layers")):
        with pytest.raises(ValueError, match=message):
            write_scales(partial, base, tmp_path / layout, layout=layout)
        assert not (tmp_path / layout).exists()
    write_scales(partial, base, layout="sidecar")
    same(read_scales(base, LAYERS).layers, partial.layers)


def test_scales_of_one_side(base: Path) -> None:
    """What a file of ours leaves out is meant to be dynamic, and no reason for a warning."""
    one, other = scales_of((2,))
    layers = [
        LayerScales(None, one.v_scale, v_zero=one.v_scale),
        LayerScales(other.k_scale, None, q_scale=torch.ones(1)),
    ]
    write_scales(Scales(layers, "int8"), base, layout="sidecar")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read_scales(base, LAYERS)
    same(found.layers, layers)
    assert len(found.notes) == 2
    report = QuantizedPagedCache.from_model(load_plain(base)).report()
    assert [[source.split(":")[0] for source in row.scales] for row in report.layers] == [
        ["dynamic, equalized channels", "checkpoint"],
        ["checkpoint", "dynamic, equalized channels"],
    ]


def test_vllm_json(tmp_path: Path, base: Path) -> None:
    scales, _ = make("fp8")
    write(scales, ["K and V share one scale"], base, tmp_path / "new", layout="vllm-json")
    larger = [max(layer.k_scale.item(), layer.v_scale.item()) for layer in scales.layers]
    assert json.loads((tmp_path / "new" / "kv_cache_scales.json").read_text()) == {
        "model_type": "llama",
        "kv_cache": {"dtype": "float8_e4m3fn", "scaling_factor": {"0": {"0": larger[0], "1": larger[1]}}},
    }
    found = read_scales(tmp_path / "new", LAYERS)
    same(found.layers, [LayerScales(torch.tensor([value]), torch.tensor([value])) for value in larger])


def test_from_one_format_into_another(tmp_path: Path, base: Path) -> None:
    """Scales out of an FP8 checkpoint of another family into a model of 16 bits."""
    other = tmp_path / "other"
    shutil.copytree(base, other)
    with_quantization(other, {"quant_method": "fp8", "activation_scheme": "static"})
    write_scales(make("fp8")[0], other)
    read = read_scales(other, load_plain(base))
    write_scales(read, base, tmp_path / "new")
    found = read_scales(tmp_path / "new", LAYERS)
    assert found.producer == "compressed-tensors"
    same(found.layers, make("fp8")[0].layers)


def test_older_scales_beside_it_do_not_come_before_the_new_ones(tmp_path: Path, base: Path) -> None:
    old, new = Scales(scales_of((2, 16), seed=1), "int8"), make("fp8")[0]
    write_scales(old, base, layout="sidecar")
    for layout in ("auto", "vllm-json"):
        with pytest.raises(ValueError, match=r"base has scales in hf_kvquant_scales.json.*remove it"):
            write_scales(new, base, layout=layout)
    same(read_scales(base, LAYERS).layers, old.layers)
    written = write(new, ["hf_kvquant_scales.json of .* is not copied"], base, tmp_path / "new")
    assert not (tmp_path / "new" / "hf_kvquant_scales.json").exists()
    assert "hf_kvquant_scales.json" not in written.files
    same(read_scales(tmp_path / "new", LAYERS).layers, new.layers)
    write_scales(new, base, layout="sidecar")
    same(read_scales(base, LAYERS).layers, new.layers)


# -- refusals ----------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "channel": (Scales(scales_of((2, 16))), {}, "cannot hold scales per channel; layout='sidecar'"),
    "fp8_zeros": (Scales(scales_of(zeros=True)), {}, "cannot hold zeros"),
    "mixed": (Scales([scales_of()[0], scales_of((2,))[0]]), {}, "per tensor beside scales per head"),
    "queries": (Scales(scales_of(q=(4,))), {}, "cannot hold q_scale per head beside scales per tensor"),
    "far_zeros": (
        Scales([LayerScales(torch.ones(1), torch.ones(1), k_zero=torch.tensor([200.0]))] * 2, "int8"), {},
        "zeros of more than 127 steps",
    ),
    "e5m2": (Scales(scales_of(), "fp8_e5m2"), {}, "cannot hold scales for fp8_e5m2"),
    "unknown": (Scales(scales_of(), None), {}, "do not say which format"),
    "json_int8": (Scales(scales_of(), "int8"), {"layout": "vllm-json"}, "cannot hold scales for int8"),
    "json_head": (Scales(scales_of((2,))), {"layout": "vllm-json"}, "cannot hold scales per head"),
    "one_side": (Scales([scales_of()[0], LayerScales(None, torch.ones(1))]), {}, "scales of K or of V alone; layout="),
    "json_one_side": (
        Scales([LayerScales(torch.ones(1), None)] * 2), {"layout": "vllm-json"}, "cannot hold scales of K or of V",
    ),
    "layout": (Scales(scales_of()), {"layout": "npz"}, "choose auto or one of compressed-tensors"),
    "other_layout": (Scales(scales_of()), {"layout": "modelopt"}, "are added as 'compressed-tensors', not 'modelopt'"),
    "number": (Scales(scales_of()[:1]), {}, "scales of 1 layers, but this model has 2"),
    "none": (Scales([None, None]), {}, "no scales to write"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_written(tmp_path: Path, base: Path, case: str) -> None:
    scales, options, message = REFUSED[case]
    before = {file.name: file.read_bytes() for file in base.iterdir()}
    for output in (None, tmp_path / "new"):
        with pytest.raises(ValueError, match=message):
            write_scales(scales, base, output, **options)
    assert not (tmp_path / "new").exists()
    assert {file.name: file.read_bytes() for file in base.iterdir()} == before


def test_what_is_no_scales_no_model_and_no_name(tmp_path: Path, base: Path) -> None:
    scales, _ = make("fp8")
    layers = list(scales.layers)
    for wrong in (layers, layers[0], dict(enumerate(layers)), str(base)):
        with pytest.raises(TypeError, match="do not say which format .* what calibrate or read_scales returned"):
            write_scales(wrong, base, tmp_path / "new")
    with pytest.raises(TypeError, match="NoneType .read_scales gives None for files without scales."):
        write_scales(read_scales(base, LAYERS), base, tmp_path / "new")
    model = tiny_llama("sdpa")
    for call in (partial(write_scales, scales, base, tmp_path / "new"), partial(read_scales, base)):
        for other in (str(base), model.config):
            with pytest.raises(TypeError, match="is no transformers model"):
                call(model=other)
    for call in (partial(write_scales, scales, output=tmp_path / "new"), read_scales, inspect_scales, plan_memory):
        for nothing in (None, 5, scales):
            with pytest.raises(TypeError, match="is no name of a checkpoint; give a directory, a file or a hub id"):
                call(nothing)
        with pytest.raises(ValueError, match="the name of a checkpoint is empty"):
            call("")
    assert not (tmp_path / "new").exists()


def test_a_model_in_a_wrapper_is_the_model(tmp_path: Path, base: Path) -> None:
    scales, _ = make("fp8")
    for index, model in enumerate((tiny_llama("sdpa"), torch.nn.DataParallel(tiny_llama("sdpa")))):
        write_scales(scales, base, tmp_path / str(index), layout="sidecar", model=model)
        same(read_scales(tmp_path / str(index), model).layers, scales.layers)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes"])
def test_weights_whose_readers_know_no_scales(base: Path, method: str) -> None:
    with_quantization(base, {"quant_method": method})
    scales, _ = make("fp8")
    with pytest.raises(ValueError, match=f"quant_method '{method}', whose readers know no KV scales; layout='sidecar'"):
        write_scales(scales, base, model=LAYERS)
    write_scales(scales, base, model=LAYERS, layout="sidecar")
    same(read_scales(base, LAYERS).layers, scales.layers)


def test_places_that_cannot_be_written_to(tmp_path: Path, base: Path, sharded: Path) -> None:
    scales, _ = make("fp8")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="full exists and is not empty"):
        write_scales(scales, base, tmp_path / "full")
    (tmp_path / "empty").mkdir()
    write_scales(scales, base, tmp_path / "empty")
    next(sharded.glob("model-00001*")).unlink()
    with pytest.raises(ValueError, match=r"lacks model-00001-of-\d+.safetensors"):
        write_scales(scales, sharded, tmp_path / "new", model=LAYERS)
    (empty := tmp_path / "no-config").mkdir()
    shutil.copy2(base / "model.safetensors", empty)
    with pytest.raises(ValueError, match=r"no-config has no config.json"):
        write_scales(scales, empty, model=LAYERS)
    (base / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no safetensors files"):
        write_scales(scales, base, tmp_path / "new", model=LAYERS)
    with pytest.raises(ValueError, match="no configuration that transformers can read"):
        write_scales(scales, tmp_path / "full", layout="sidecar")


def test_a_check_says_the_same_before_calibration(tmp_path: Path, base: Path) -> None:
    check_export(base, tmp_path / "new")
    with pytest.raises(ValueError, match="cannot hold scales per channel"):
        check_export(base, tmp_path / "new", granularity="channel")
    with pytest.raises(UserWarning, match="layout 'compressed-tensors': int8"):
        check_export(base, kv_cache_dtype="int8", symmetric=False)
    check_export(base, granularity="channel", symmetric=False, q_scale=True, layout="sidecar")
    assert {file.name for file in tmp_path.iterdir()} == {"base"}


@pytest.mark.parametrize("model_type", families.available(["gemma3_text", "bamba", "gemma4_text", "qwen3_5_text"]))
def test_layers_with_other_states(tmp_path: Path, model_type: str) -> None:
    """Layers without keys of their own have no scales, in the files as in the cache."""
    model = families.build(model_type)
    model.save_pretrained(tmp_path / "base")
    calibrated = calibrate(model, prompt(2, 21), progress=False)
    write_scales(calibrated, tmp_path / "base", tmp_path / "new")
    found = read_scales(tmp_path / "new", model)
    same(found.layers, calibrated.layers)
    assert found.notes == found.ignored == []


# How the checkpoint spells the module that feeds a cache layer: beside what wraps it, encoders and vision towers, and
# where transformers renames it while loading.
SPELLED = {
    "bart": "model.decoder.layers.{}.self_attn",
    "dbrx": "transformer.blocks.{}.norm_attn_norm.attn",
    "gemma4": "model.language_model.layers.{}.self_attn",
    "gpt_neo": "transformer.h.{}.attn.attention",
    "mllama": "language_model.model.layers.{}.self_attn",
    "t5": "decoder.block.{}.layer.0.SelfAttention",
    "bailing_hybrid": "model.layers.{}.attention",
    "exaone": "transformer.h.{}.attn.attention",
    "inkling2_text": "model.llm.layers.{}.attn",
    "sarvam_moe": "model.layers.{}.attention",
}


@pytest.mark.parametrize("model_type", families.available(SPELLED))
def test_names_are_the_checkpoints_own(tmp_path: Path, model_type: str) -> None:
    model = families.build(model_type)
    model.save_pretrained(tmp_path / "base")
    (one, _) = scales_of()
    scales = Scales([one if paths else None for paths in model_layers(model).paths])
    with warnings.catch_warnings(record=True) as caught:  # some configurations have no num_key_value_heads
        warnings.simplefilter("always")
        write_scales(scales, tmp_path / "base", tmp_path / "new", model=model)
    assert not any("no weights of" in str(warning.message) for warning in caught)
    added = load_file(tmp_path / "new" / "model-kv-scales.safetensors")
    indices = [index for index, layer in enumerate(scales.layers) if layer is not None]
    assert set(added) == {f"{SPELLED[model_type].format(index)}.{side}_scale" for index in indices for side in "kv"}
    found = read_scales(tmp_path / "new", model)
    same(found.layers, scales.layers)
    assert found.ignored == []


def test_names_that_the_checkpoint_does_not_have(tmp_path: Path, base: Path) -> None:
    file = base / "model.safetensors"
    save_file({name.replace("self_attn", "sa"): value for name, value in load_file(file).items()}, file)
    write(make("fp8")[0], [f"no weights of {MODULES[0]}: .* other readers"], base, tmp_path / "new", model=LAYERS)
    same(read_scales(tmp_path / "new", LAYERS).layers, make("fp8")[0].layers)


def test_names_with_another_word_for_attention(tmp_path: Path, base: Path) -> None:
    """What reading takes for the same module, writing does too."""
    file = base / "model.safetensors"
    save_file({name.replace("self_attn", "attention"): value for name, value in load_file(file).items()}, file)
    write(make("fp8")[0], [], base, tmp_path / "new", model=LAYERS)
    added = load_file(tmp_path / "new" / "model-kv-scales.safetensors")
    assert set(added) == {f"model.layers.{index}.attention.{side}_scale" for index in range(2) for side in "kv"}


@pytest.mark.parametrize("granularity", ["tensor", "head", "channel"])
@pytest.mark.parametrize("model_type", families.available(["deepseek_v3", "kimi_linear"]))
def test_scales_of_latents(tmp_path: Path, model_type: str, granularity: str) -> None:
    """What is cached has other heads, and as K and as V other channels, than attention has."""
    families.build(model_type).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="kvquant")
    calibrated = calibrate(model, prompt(2, 21), kv_cache_dtype="int8", granularity=granularity, progress=False)
    write_scales(calibrated, tmp_path, layout="sidecar")
    same(read_scales(tmp_path, model).layers, calibrated.layers)
    model.generate(prompt(), max_new_tokens=2, cache_config={"scales": "checkpoint"})


@pytest.mark.parametrize("shape", [(4,), (4, 16), (1, 16)])
def test_scales_for_another_number_of_heads(base: Path, shape: tuple[int, ...]) -> None:
    write_scales(Scales(scales_of(shape)), base, layout="sidecar")
    with pytest.raises(ValueError, match="does not fit 2 KV heads; were the scales made for another model"):
        read_scales(base, LAYERS)
