"""The commands, and what they say against what the cache then does."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from checkpoint_files import with_hub, write_statistics
from helpers import prompt, tiny_llama
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    EncoderDecoderCache,
    PreTrainedModel,
)
from transformers.utils import quantization_config

import hf_kvquant
from hf_kvquant import LayerScales, QuantizedPagedCache, read_scales, write_scales
from hf_kvquant.cli import commands, main
from hf_kvquant.doctor import diagnose
from hf_kvquant.inspection import inspect_scales
from hf_kvquant.layers import PagedLayer
from hf_kvquant.ops import cpu
from hf_kvquant.planning import plan_memory
from hf_kvquant.scales import granularity_of
from hf_kvquant.skeleton import layer_shapes, model_skeleton
from hf_kvquant.tables import size, table

TINY = Path(__file__).parents[1] / "examples" / "tiny-python-lm"


class Scales:
    """What `write_scales` needs."""

    kv_cache_dtype = "fp8_e4m3"

    def __init__(self, *pairs: tuple[float, float]) -> None:
        self.layers = [LayerScales(torch.tensor([k]), torch.tensor([v])) for k, v in pairs]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    directory = tmp_path / "base"
    tiny_llama("sdpa").save_pretrained(directory)
    return directory


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Standard output of a command that must succeed."""
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a command that cannot be done says."""
    assert main([str(argument) for argument in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def load_plain(directory: Path) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(directory)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return AutoModelForCausalLM.from_pretrained(directory, config=config, attn_implementation="kvquant")


# -- as a program ------------------------------------------------------------------------------------------------------


def test_python_m() -> None:
    done = subprocess.run([sys.executable, "-m", "hf_kvquant", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"hf-kvquant {hf_kvquant.__version__}\n"


def test_letters_that_standard_output_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a pipe on Windows, which takes those of one code page; others raised an error, and nothing was printed."""
    model = shutil.copytree(TINY, tmp_path / "модель")
    pipe = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", pipe)
    assert main(["doctor", str(model), "--device", "cpu"]) == 0
    pipe.flush()
    output = pipe.buffer.getvalue().decode("cp1252")  # type: ignore[attr-defined]
    assert "модель".encode("unicode_escape").decode() in output
    assert "kernels: " in output


WRONG = ("", "dance", "plan", "plan x --memory much", "doctor x --device abacus", "calibrate x --data y",
         "convert x y --output z --in-place", "bench x --dtype bfloat15", "eval x --data y --dtype int8")  # fmt: skip


@pytest.mark.parametrize("arguments", [text.split() for text in WRONG], ids=WRONG)
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: hf-kvquant" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "kernels"), [("cpu", None), ("meta", "plain torch, which is slow"), ("cuda", "Triton kernels")]
)
def test_doctor_names_the_kernels(device: str, kernels: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    cpu.use()  # built now, so that nothing else builds them while the doctor looks
    output = run(capsys, "doctor", TINY, "--device", device)
    assert f"(llama, bfloat16) on {device}" in output
    assert f"kernels: {kernels or cpu.outlook()}" in output


def test_the_doctor_names_what_is_no_device() -> None:
    with pytest.raises(ValueError, match="device='gpu' is no device; give cpu, cuda"):
        diagnose(TINY, device="gpu")


def test_doctor_takes_auto_for_what_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "doctor", TINY, "--device", "auto") == run(capsys, "doctor", TINY)


@pytest.mark.parametrize(
    "arguments", [["eval", "--data", "x.txt"], ["bench"], ["bench", "--random-weights"]], ids=" ".join
)
def test_a_device_that_is_not_here(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    said = fails(capsys, *arguments, TINY, "--device", "cuda:63")
    assert said.startswith("hf-kvquant: --device cuda:63: torch finds no such device here; there is cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("eval --data nofile.txt", "nofile.txt is not a file"),
        ("eval --data README.md --save /no/dir.json", "there is no directory /no to save to"),
        ("eval --data README.md --context 9999", "context: 9999; the model is made for 2048 tokens"),
        ("eval --data README.md --formats int9", "unknown storage format 'int9'"),
        ("bench --save /no/dir.json", "there is no directory /no to save to"),
        ("bench --rounds 0", "rounds: 0"),
        ("bench --context 2047", "2,079 together, but the model is made for 2,048"),
        ("bench --formats int9", "unknown storage format 'int9'"),
        ("bench --largest --device cpu", "hf-kvquant plan MODEL --memory SIZE"),
        ("calibrate --data nofile.txt --layout sidecar --output {}/new", "nofile.txt is not a file"),
        ("calibrate --data README.md --output {}/new --percentile 20", "percentile=20.0; it is the share"),
        ("calibrate --data README.md --output {}/new --percentile 99", "is for estimator='percentile'"),
        ("calibrate --data README.md --output {}/new --batch-size 0", "batch_size=0; it must be a positive integer"),
        ("calibrate --data README.md --output {}/new --max-length 0", "max_length=0; it must be a positive integer"),
        ("calibrate --data README.md --output {}/new --num-samples 0", "num_samples=0; it must be a positive integer"),
    ],
)
def test_arguments_are_refused_before_a_model_is_loaded(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(commands, "_load", None)
    monkeypatch.chdir(Path(__file__).parents[1])
    command, *others = arguments.format(tmp_path).split()
    assert message in fails(capsys, command, TINY, *others)


@pytest.mark.parametrize(
    "arguments",
    [
        "inspect {model}",
        "doctor {model}",
        "plan {model}",
        "eval {model} --data {data} --context 32 --num-windows 1 --new-tokens 4 --formats int8",
        "bench {model} --context 16 --new-tokens 8 --rounds 1 --formats int8",
        "calibrate {model} --data {data} --num-samples 1 --max-length 32 --output {new}",
        "convert {model} {model} --source-revision v2 --output {new}",
    ],
    ids=lambda arguments: arguments.split()[0],
)
def test_another_revision(
    arguments: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On the main branch there is nothing: whoever asks for it, be it for scales or a tokenizer, fails."""
    with_hub(monkeypatch, tmp_path, main=None, v2=TINY)
    given = {"model": "some-org/tiny", "data": TINY / "README.md", "new": tmp_path / "new"}
    command = arguments.format(**given).split()
    said = run(capsys, *command, "--revision", "v2")
    if command[0] == "inspect":
        assert "self_attn.k_scale" in said
        assert "no KV scales" in run(capsys, *command, "--revision", "main")
    else:
        fails(capsys, *command, "--revision", "main")
    if (tmp_path / "new").exists():
        weights = load_file(tmp_path / "new" / "model-00001-of-00001.safetensors")
        theirs = load_file(TINY / "model.safetensors")
        assert all(torch.equal(theirs[name], value) for name, value in weights.items())
        found = read_scales(tmp_path / "new")
        assert found is not None
        same = [layer.to_dict() for layer in found.layers] == [layer.to_dict() for layer in read_scales(TINY).layers]
        assert same == (command[0] == "convert")


@pytest.mark.parametrize("command", ["eval --data README.md", "bench", "calibrate --data README.md --output {}/new"])
def test_without_compressed_tensors_the_extra_is_named(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(quantization_config, "is_compressed_tensors_available", lambda *_, **__: False)
    monkeypatch.chdir(Path(__file__).parents[1])
    command, *others = command.format(tmp_path).split()
    said = fails(capsys, command, TINY, *others)
    assert "pip install compressed-tensors" in said  # transformers' words
    assert "pip install 'hf-kvquant[demo]'" in said
    assert "del config.quantization_config" in said


@pytest.mark.parametrize("command", ["inspect", "doctor", "plan"])
def test_nothing_there(command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    said = fails(capsys, command, tmp_path / "nowhere")
    assert said.startswith("hf-kvquant: ")
    assert "nowhere" in said
    assert "Traceback" not in said


# -- inspect -----------------------------------------------------------------------------------------------------------


def test_inspect(capsys: pytest.CaptureFixture[str]) -> None:
    output = run(capsys, "inspect", TINY)
    found = read_scales(TINY)
    assert "scales of 4 layers for fp8_e4m3, as compressed-tensors writes them" in output
    for index, layer in enumerate(found.layers):
        line = next(line for line in output.splitlines() if line.startswith(f"{index} "))
        assert f"{layer.k_scale.item():.4g}" in line
        assert f"model.safetensors: model.layers.{index}.self_attn.k_scale / v_scale" in line
    assert "suspicious" not in output
    data = json.loads(run(capsys, "inspect", TINY, "--json"))
    assert data["producer"] == "compressed-tensors"
    assert [row["ranges"]["v_scale"] for row in data["layers"]] == [[each.v_scale.item()] * 2 for each in found.layers]
    assert data["layers"][2]["granularity"] == {"k_scale": "tensor", "v_scale": "tensor"}
    assert data["layers"][2]["sources"]["k_scale"] == "model.safetensors: model.layers.2.self_attn.k_scale"


def test_inspect_nothing(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no KV scales, and none declared" in run(capsys, "inspect", base)
    assert json.loads(run(capsys, "inspect", base, "--json"))["producer"] is None


def test_inspect_names_of_no_known_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"model.layers.{index}.self_attn.{side}_cache_scale" for index in range(2) for side in "kv"]
    save_file({name: torch.ones(1) for name in (*names, "lm_head.weight")}, tmp_path / "model.safetensors")
    assert run(capsys, "inspect", tmp_path).splitlines() == [
        f"{tmp_path}: no usable KV scales, and none declared",
        *(f"ignored: {name}" for name in names),
    ]
    found = json.loads(run(capsys, "inspect", tmp_path, "--json"))
    assert (found["producer"], found["layers"], found["ignored"]) == (None, [], names)


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        (((0.02, 0.03), (0.03, 0.01)), []),
        (((1.0, 1.0), (1.0, 1.0)), ["every scale is exactly 1.0"]),
        (((0.02, 0.03), (0.02, 0.03)), ["all layers have the same scales"]),
        (((0.6, 0.03), (0.03, 0.01)), ["layer 0: K: its scale is 0.6, for numbers up to 269"]),
        (((0.02, 0.03), (0.03, 1e-7)), ["layer 1: scales from 1e-07 to 0.03"]),
    ],
)
def test_suspicious_values(base: Path, pairs: tuple[Any, ...], expected: list[str]) -> None:
    write_scales(Scales(*pairs), base)
    inspection = inspect_scales(base)
    assert len(inspection.suspicious) == len(expected)
    assert all(text in said for text, said in zip(expected, inspection.suspicious, strict=True))
    assert [line for line in str(inspection).splitlines() if line.startswith("suspicious: ")] == [
        f"suspicious: {text}" for text in inspection.suspicious
    ]


def test_inspect_a_file_apart_from_its_model(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layers = Scales((0.02, 0.03), (0.03, 0.01))
    layers.layers[0] = LayerScales(
        torch.full((2, 16), 0.1), torch.tensor([0.1]), k_zero=torch.linspace(-1, 3, 32).view(2, 16)
    )
    write_scales(layers, base, tmp_path / "file", layout="sidecar")
    for source in (tmp_path / "file", tmp_path / "file" / "hf_kvquant_scales.json"):
        output = run(capsys, "inspect", source, "--model", base)
        assert "-1 .. 3" in output
        assert "channel / tensor" in output
    other = tmp_path / "other"
    tiny_llama(num_hidden_layers=1).save_pretrained(other)
    assert "ignored: model.layers.1.self_attn" in run(capsys, "inspect", tmp_path / "file", "--model", other)


def test_inspect_scales_of_one_side(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layers = Scales((0.02, 0.03), (0.03, 0.01))
    layers.layers[1] = LayerScales(None, torch.tensor([0.6]))
    write_scales(layers, base, layout="sidecar")
    output = run(capsys, "inspect", base)
    row = "1      -        0.6      - / tensor  - / hf_kvquant_scales.json: model.layers.1.self_attn.v_scale"
    assert row in output.splitlines()
    assert "suspicious: layer 1: V: its scale is 0.6" in output
    (_, second) = json.loads(run(capsys, "inspect", base, "--json"))["layers"]
    assert second["granularity"] == {"v_scale": "tensor"}


def test_names_in_files_command_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "\x1b]0;title\x07größe.layers.{}.self_attn.k_scale"
    save_file({name.format(layer): torch.tensor([0.5]) for layer in range(2)}, tmp_path / "model.safetensors")
    lines = run(capsys, "inspect", tmp_path).splitlines() + str(inspect_scales(tmp_path)).splitlines()
    assert all(line.isprintable() for line in lines)
    assert [line for line in lines if line.startswith("1 ") and "\\x1b]0;title\\x07größe.layers.1.self_attn" in line]
    assert table([("a", "b"), ("x\ny", "z")]).splitlines() == ["a     b", "x\\ny  z"]
    said = fails(capsys, "report", tmp_path / "\x1b[31m.json", "--output", tmp_path / "out")
    assert "\\x1b[31m.json" in said
    assert "\x1b" not in said


# -- doctor ------------------------------------------------------------------------------------------------------------


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    output = run(capsys, "doctor", TINY, "--device", "cpu")
    assert "(llama, bfloat16) on cpu" in output
    assert "a token takes 1.0 KiB, 2.0 KiB in bfloat16 (0.500 of it)" in output
    data = json.loads(run(capsys, "doctor", TINY, "--json", "--kv-cache-dtype", "int8", "--scales", "dynamic"))
    assert data["layers"][3]["kv_cache_dtype"] == ["int8", "int8"]
    # Two heads of 64 numbers for K and V, and a scale of two bytes each.
    assert data["bytes_per_token"] == 4 * 2 * 2 * (64 + 2)
    assert data["model_dtype_bytes_per_token"] == 4 * 2 * 2 * 64 * 2
    data = json.loads(run(capsys, "doctor", TINY, "--json", "--kv-cache-dtype", "int8,fp8"))
    assert data["layers"][3]["kv_cache_dtype"] == ["int8", "fp8_e4m3"]


def test_the_doctor_asks_for_an_accelerator_that_is_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build for GPUs names one on any machine."""

    def current_accelerator(check_available: bool = False) -> torch.device | None:
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", current_accelerator)
    assert "(llama, bfloat16) on cpu" in run(capsys, "doctor", TINY)


def test_doctor_refuses_what_the_cache_refuses(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown storage format 'int3'" in fails(capsys, "doctor", base, "--kv-cache-dtype", "int3")
    assert "has no KV scales" in fails(capsys, "doctor", base, "--scales", "checkpoint")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["Trainer"]}, "'Trainer', which is no model"),
        ({"architectures": [5]}, "architectures"),
        ({"architectures": ["WhisperModel"]}, "no model can be built by the configuration"),
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"num_key_value_heads": 0}, "no model can be built by the configuration"),
        ({"hidden_size": -8}, "negative dimension -8"),
        ({"intermediate_size": -8}, "negative dimension -8"),
        ({"vocab_size": 10**30}, "no model can be built by the configuration"),
        ({"num_hidden_layers": "x"}, "expected int, got str"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1,000,000; more than 4,096 are not built"),
        ({"model_type": "qwen2", "num_hidden_layers": 10**12}, "more than 4,096"),
        ({"text_config": {"num_hidden_layers": 2}}, "it has a text_config, which a llama does not take"),
        ({"text_config": "x"}, "text_config is a str, not an object"),
        ({"quantization_config": [1]}, "quantization_config is a list, not an object"),
    ],
)
def test_doctor_names_a_configuration_that_makes_no_model(
    base: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, **changes}))
    said = fails(capsys, "doctor", base)
    assert said.startswith("hf-kvquant: ")
    assert said.count("\n") == 1
    assert str(base) in said
    assert message in said
    if "architectures" not in changes:  # what generates is chosen by the kind of configuration
        fails(capsys, "bench", base, "--random-weights")


@pytest.mark.parametrize("options", [{}, {"kv_cache_dtype": "fp8", "scales": "unit", "skip_layers": [0]}])
def test_the_doctor_says_what_the_cache_does(options: dict[str, Any]) -> None:
    model = load_plain(TINY)
    tokens = prompt(1, 40)
    cache = QuantizedPagedCache.from_model(model, **options)
    with torch.no_grad():
        model(tokens, past_key_values=cache)
    said = diagnose(TINY, options)
    rows = cache.report().layers
    assert [layer.layer for layer in said.layers] == [row.layer for row in rows]
    assert [layer.kv_cache_dtype for layer in said.layers] == [row.kv_cache_dtype for row in rows]
    assert [layer.scales for layer in said.layers] == [row.scales for row in rows]
    assert [layer.model_dtype_bytes_per_token * 40 for layer in said.layers] == [row.model_dtype_bytes for row in rows]
    for layer, store_layer in zip(said.layers, cache.layers, strict=True):
        per_page = sum(store.page_nbytes for store in (store_layer.k, store_layer.v))
        assert layer.bytes_per_token * 16 == per_page


def qwen_with_biases(directory: Path, biases: dict[int, float], scales: Scales | None = None) -> Path:
    """A checkpoint of a Qwen2 whose key projections have one large bias in some layers."""
    model = families.build("qwen2")
    with torch.no_grad():
        for index, bias in biases.items():
            model.model.layers[index].self_attn.k_proj.bias[3] = bias
    model.save_pretrained(directory)
    if scales is not None:
        write_scales(scales, directory)
    return directory


@pytest.mark.parametrize("size", [150.0, -150.0])
def test_large_key_biases(tmp_path: Path, size: float) -> None:
    """`auto` does not trust fp8 with them, an explicit choice holds; both say so, before and after loading."""
    directory = qwen_with_biases(tmp_path / "qwen", {1: size}, Scales((0.4, 0.03), (0.4, 0.01)))
    said = diagnose(directory)
    assert [layer.kv_cache_dtype for layer in said.layers] == [("fp8_e4m3",) * 2, ("int8", "fp8_e4m3")]
    assert [layer.risk for layer in said.layers] == [None, None]  # of what is stored in the end
    told = "layer 1: K in fp8_e4m3: the bias of its projection reaches 150; it is stored as int8 with dynamic scales"
    assert any(told in note for note in said.notes)
    model = load_plain(directory)
    cache = QuantizedPagedCache.from_model(model)
    assert [row.kv_cache_dtype for row in cache.report().layers] == [("fp8_e4m3",) * 2, ("int8", "fp8_e4m3")]
    assert any(told in note for note in cache.report().notes)
    output = model.generate(prompt(), max_new_tokens=4, return_dict_in_generate=True)
    assert output.past_key_values.report().layers[1].kv_cache_dtype == ("int8", "fp8_e4m3")

    for options in ({"kv_cache_dtype": "fp8"}, {"scales": "checkpoint"}):
        for notes in (diagnose(directory, options).notes, QuantizedPagedCache.from_model(model, **options).notes):
            assert any("K in fp8_e4m3: the bias" in note and "would store it as int8" in note for note in notes)
        cache = QuantizedPagedCache.from_model(model, **options)
        assert {row.kv_cache_dtype for row in cache.report().layers} == {("fp8_e4m3", "fp8_e4m3")}
    risks = [layer.risk for layer in diagnose(directory, {"kv_cache_dtype": "fp8"}).layers]
    assert risks == [None, "K: the bias of its projection reaches 150"]


def test_large_key_biases_where_scales_are_dynamic(tmp_path: Path) -> None:
    directory = qwen_with_biases(tmp_path / "qwen", {0: 99.0})
    config = json.loads((directory / "config.json").read_text())
    scheme = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}
    config["quantization_config"] = {"quant_method": "compressed-tensors", "kv_cache_scheme": scheme}
    (directory / "config.json").write_text(json.dumps(config))
    said = diagnose(directory)
    assert [layer.kv_cache_dtype for layer in said.layers] == [("int8", "fp8_e4m3"), ("fp8_e4m3",) * 2]
    assert any("layer 0: K in fp8_e4m3: the bias of its projection reaches 99" in note for note in said.notes)


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        ({"kv_cache_dtype": "fp8", "scales": "dynamic"}, True),
        ({"kv_cache_dtype": ("fp8_e5m2", "int8")}, True),
        ({"kv_cache_dtype": "fp8", "scales": "unit"}, True),
        ({"kv_cache_dtype": "int8", "scales": "first_batch"}, True),
        ({"kv_cache_dtype": "int8", "scales": "first_batch", "granularity": "channel"}, False),
        ({"kv_cache_dtype": ("int8", "fp8_e4m3")}, False),
        ({"kv_cache_dtype": ("model", "fp8_e4m3")}, False),
        ({}, False),
    ],
    ids=str,
)
def test_what_large_key_biases_meet_without_a_checkpoint_is_noted(
    tmp_path: Path, options: dict[str, Any], warned: bool
) -> None:
    """The choice holds."""
    directory = qwen_with_biases(tmp_path / "qwen", {1: 150.0})
    cache = QuantizedPagedCache.from_model(load_plain(directory), **options)
    noted = [note for note in cache.report().notes if "the bias of its projection reaches 150; kv_cache_dtype" in note]
    assert [note.startswith("layer 1: K in ") for note in noted] == [True] * warned
    said = diagnose(directory, options).layers
    assert [layer.kv_cache_dtype for layer in said] == [layer.kv_cache_dtype for layer in cache.report().layers]
    assert [layer.risk is not None for layer in said] == [False, warned]


def test_biases_that_do_no_harm(tmp_path: Path) -> None:
    directory = qwen_with_biases(tmp_path / "small", {0: 20.0}, Scales((0.4, 0.03), (0.4, 0.01)))
    assert {layer.kv_cache_dtype for layer in diagnose(directory).layers} == {("fp8_e4m3", "fp8_e4m3")}
    # Keys that are normalized after their projection do not show its bias.
    torch.manual_seed(0)
    config = families.config_of("qwen3")
    config.attention_bias = True
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.bias[3] = 150.0
    model.save_pretrained(tmp_path / "normed")
    write_scales(Scales((0.4, 0.03), (0.4, 0.01)), tmp_path / "normed")
    assert {layer.kv_cache_dtype for layer in diagnose(tmp_path / "normed").layers} == {("fp8_e4m3", "fp8_e4m3")}


@pytest.mark.parametrize(("model_type", "is_fused"), [("gemma3n_text", True), ("gemma4_text", True), ("bloom", False)])
def test_the_doctor_knows_whose_attention_runs(model_type: str, is_fused: bool, tmp_path: Path) -> None:
    families.build(model_type).save_pretrained(tmp_path)
    said = diagnose(tmp_path)
    assert ("reads the pages" in said.attention) == is_fused
    assert ("storage only" in said.attention) != is_fused
    assert not any("state of another kind" in note for note in said.notes)  # layers without keys of their own have none


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        (model_type, expected)
        for model_type, expected in {
            "llama": "attn_implementation='kvquant' reads the pages; any other",
            "deepseek_v3": "over dense keys and values, which are read from the pages: the model calls linear",
            "t5": "attn_implementation='kvquant' reads the pages; any other",
            "doge": "the model reads .transpose (storage only)",
            "inkling2_text": "sinks differ between tokens (storage only)",
            "longcat_flash": "the model reads .expand (storage only)",  # stops after its attention
            "gpt2": "reads the pages, unless the model itself",  # does not run without weights
        }.items()
        if model_type in families.available([model_type])
    ],
)
def test_the_doctor_knows_whose_keys_become_dense(model_type: str, expected: str, tmp_path: Path) -> None:
    families.build(model_type).save_pretrained(tmp_path)
    assert expected in diagnose(tmp_path).attention


def test_large_scales(base: Path) -> None:
    write_scales(Scales((0.7, 0.03), (0.03, 0.8)), base)
    said = diagnose(base)
    assert [layer.kv_cache_dtype for layer in said.layers] == [("int8", "fp8_e4m3"), ("fp8_e4m3", "int8")]
    assert any("layer 0: K in fp8_e4m3: its scale is 0.7, for numbers up to 314" in note for note in said.notes)
    cache = QuantizedPagedCache.from_model(load_plain(base))
    assert [row.kv_cache_dtype for row in cache.report().layers] == [layer.kv_cache_dtype for layer in said.layers]
    risks = ["K: its scale is 0.7, for numbers up to 314", "V: its scale is 0.8, for numbers up to 358"]
    assert [layer.risk for layer in diagnose(base, {"scales": "checkpoint"}).layers] == risks
    assert inspect_scales(base).suspicious == [f"layer {index}: {risk}" for index, risk in enumerate(risks)]
    # 1.0 is what tools write that never go below it, and says nothing about the numbers.
    write_scales(Scales((1.0, 1.0), (1.0, 1.0)), base)
    assert {layer.kv_cache_dtype for layer in diagnose(base).layers} == {("fp8_e4m3", "fp8_e4m3")}


def test_the_doctor_reads_only_what_it_needs(tmp_path: Path) -> None:
    """Of the weights only headers, biases and scales: everything else may be gone."""
    directory = qwen_with_biases(tmp_path / "qwen", {1: 150.0}, Scales((0.4, 0.03), (0.4, 0.01)))
    expected = diagnose(directory)
    file = directory / "model-00001-of-00001.safetensors"
    tensors = load_file(file)
    header = int.from_bytes(file.read_bytes()[:8], "little")
    spans = json.loads(file.read_bytes()[8 : 8 + header])
    raw = bytearray(file.read_bytes())
    for name in tensors:
        if not name.endswith("k_proj.bias"):
            start, end = (8 + header + offset for offset in spans[name]["data_offsets"])
            raw[start:end] = b"\xff" * (end - start)
    file.write_bytes(raw)
    assert diagnose(directory) == expected


# -- shapes of a model without weights ---------------------------------------------------------------------------------

# The last ones look at numbers, or at what is not in the vocabulary of a trace, and are told by their configuration.
TRACED = (
    "llama",
    "gemma3_text",
    "gemma4_text",
    "deepseek_v3",
    "mixtral",
    "bamba",
    "falcon_h1",
    "t5",
    "qwen2_5_vl",
    "mamba",
)
CONFIGURED = ("gpt2", "xmod")


@pytest.mark.parametrize("model_type", families.available(TRACED + CONFIGURED))
def test_shapes_are_those_of_the_loaded_model(tmp_path: Path, model_type: str) -> None:
    model = families.build(model_type)
    model.save_pretrained(tmp_path)
    found, notes = layer_shapes(model_skeleton(tmp_path))
    assert len(notes) == (model_type in CONFIGURED)  # a guess is named
    config = model.config.get_text_config(decoder=True)
    cache: Any = DynamicCache(config=config)
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            both = EncoderDecoderCache(cache, DynamicCache(config=config))
            model(prompt(1, 5), decoder_input_ids=prompt(1, 5), past_key_values=both, use_cache=True)
        else:
            model(prompt(1, 5), past_key_values=cache, use_cache=True)
    assert len(found) == len(cache.layers)
    for shape, layer in zip(found, cache.layers, strict=True):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if not isinstance(keys, torch.Tensor):
            assert shape.numbers_per_token == 0
            continue
        assert (shape.num_kv_heads, shape.k_head_dim, shape.v_head_dim) == (
            keys.shape[1], keys.shape[3], values.shape[3]
        )  # fmt: skip
        assert shape.window == getattr(layer, "sliding_window", None)


# -- plan --------------------------------------------------------------------------------------------------------------


def test_plan(capsys: pytest.CaptureFixture[str]) -> None:
    output = run(capsys, "plan", TINY, "--context", "1000", "--batch", "1", "7", "--memory", "32MiB")
    assert "cache of 1,000 tokens a sequence" in output
    data = json.loads(
        run(capsys, "plan", TINY, "--context", "1000", "--batch", "1", "7", "--memory", "32MiB", "--json")
    )
    free = 32 * 2**20 - (TINY / "model.safetensors").stat().st_size
    assert data["memory"] - data["weight_bytes"] == free
    per_token = {"model": 2048, "8-bit, static scales": 1024, "8-bit, dynamic scales": 1024 + 32}
    for row in data["formats"]:
        stored = 1000 if row["format"] == "model" else 1008  # pages of 16
        each = per_token[row["format"]]
        assert row["cache_bytes"] == [stored * each, 7 * stored * each]
        assert row["largest_batch"] == free // (stored * each)
        for batch, context in zip((1, 7), row["largest_context"], strict=True):
            assert context == 2048 or context * each * batch <= free < (context + 16) * each * batch
    assert f"{data['formats'][1]['largest_batch']:,}" in output


def test_weights_that_do_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    output = run(capsys, "plan", TINY, "--memory", "5MiB")
    assert "of weights leaves 0 B" in output
    assert "the weights alone do not fit" in output


def test_plan_without_memory(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = run(capsys, "plan", base)
    assert "cache of 512 tokens" in output  # what the model is made for
    assert "largest" not in output
    assert json.loads(run(capsys, "plan", base, "--json"))["formats"][0]["largest_batch"] is None


@pytest.mark.parametrize("model_type", families.available(["llama", "gemma3_text", "bamba"]))
def test_the_plan_is_what_the_caches_hold(tmp_path: Path, model_type: str) -> None:
    model = families.build(model_type)
    model.save_pretrained(tmp_path)
    length = 63
    planned = {row.format: row.cache_bytes[0] for row in plan_memory(tmp_path, context=length, batches=[2]).formats}
    scales = LayerScales(torch.ones(1), torch.ones(1))
    for name, options in (("8-bit, static scales", scales), ("8-bit, dynamic scales", "dynamic")):
        cache = QuantizedPagedCache.from_model(model, kv_cache_dtype="fp8", scales=options)
        with torch.no_grad():
            model(prompt(2, length), past_key_values=cache)
        pages = sum(
            layer.table.pages_in_use * store.page_nbytes
            for layer in cache.layers if isinstance(layer, PagedLayer)
            for store in (layer.k, layer.v)
        )  # fmt: skip
        # A window may happen to end with a page; the plan has room for a page more.
        assert pages <= planned[name] <= pages * 1.5
        if model_type != "gemma3_text":
            assert pages == planned[name]


@pytest.mark.parametrize(
    ("model_type", "is_all"),
    [
        (model_type, model_type != "deepseek_v4")
        for model_type in families.available(["axk2", "deepseek_v32", "deepseek_v4", "glm_moe_dsa", "hy_v4"])
    ],
)
def test_the_plan_of_layers_that_stay_as_they_are(tmp_path: Path, model_type: str, is_all: bool) -> None:
    """No format changes them, and what an index over the keys keeps is counted; whatever is not has a note."""
    model = families.build(model_type)
    model.save_pretrained(tmp_path)
    plan = plan_memory(tmp_path, context=43, batches=[2])
    cache = QuantizedPagedCache.from_model(model, kv_cache_dtype="int8")
    with torch.no_grad():
        model(prompt(2, 43), past_key_values=cache)
    planned = {row.cache_bytes[0] for row in plan.formats}
    assert len(planned) == 1
    assert ({cache.nbytes} == planned) == is_all
    assert any("2 layers stay as transformers has them" in note for note in plan.notes)
    assert any("2 layers keep a state" in note for note in plan.notes) != is_all


def test_the_plan_names_states_beside_keys_and_values(tmp_path: Path) -> None:
    model_type = families.available(["falcon_h1"])[0]
    families.build(model_type).save_pretrained(tmp_path)
    assert any("2 layers keep a state beside" in note for note in plan_memory(tmp_path).notes)


@pytest.mark.parametrize("model_type", ["bart", "t5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_encoder_decoders(tmp_path: Path, model_type: str, dtype: torch.dtype) -> None:
    """Their dtype is that of their weights, and what cross-attention keeps is said."""
    model = families.build(model_type).to(dtype)
    model.save_pretrained(tmp_path)
    said, plan = diagnose(tmp_path), plan_memory(tmp_path, context=5, batches=[1])
    assert said.dtype == plan.dtype == str(dtype).removeprefix("torch.")
    both = EncoderDecoderCache(DynamicCache(), DynamicCache())
    with torch.no_grad():
        model(prompt(1, 1), decoder_input_ids=prompt(1, 5), past_key_values=both, use_cache=True)
    own, cross = (
        sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
        for cache in (both.self_attention_cache, both.cross_attention_cache)
    )
    assert plan.formats[0].cache_bytes == [own]
    assert said.model_dtype_bytes_per_token == own // 5
    (note,) = [note for note in plan.notes if "cross-attention" in note]
    assert f"a token of the encoder takes {size(cross)}, or 288 B in 8 bits" in note


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--context", "0"], "context is 0"), (["--batch", "1", "-2"], "batch is -2"), (["--memory", "0"], "memory is 0")],
)
def test_plan_of_nothing(base: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert message in fails(capsys, "plan", base, *arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"context": 1.5}, ValueError, "context is 1.5; it must be a positive integer"),
        ({"context": "8"}, ValueError, "context is '8'; it must be a positive integer"),
        ({"batches": [True]}, ValueError, "batch is True"),
        ({"batches": []}, ValueError, "batches is empty; give at least one"),
        ({"batches": 4}, TypeError, r"batches=4; give a list, such as \[4\]"),
        ({"memory": "24GiB"}, ValueError, "memory is '24GiB'; it must be a positive integer, in bytes"),
    ],
)
def test_plan_of_what_is_no_number(base: Path, arguments: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        plan_memory(base, **arguments)


def test_plan_takes_batches_that_come_once(base: Path) -> None:
    batches = (1, 2)
    assert plan_memory(base, batches=iter(batches)).to_dict() == plan_memory(base, batches=batches).to_dict()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("24", 24 * 2**30), ("24GiB", 24 * 2**30), ("80GB", 80 * 10**9), ("1.5 gib", 3 * 2**29), ("512MiB", 2**29)],
)
def test_sizes(base: Path, capsys: pytest.CaptureFixture[str], text: str, expected: int) -> None:
    assert json.loads(run(capsys, "plan", base, "--memory", text, "--json"))["memory"] == expected


@pytest.mark.parametrize("text", ["1.2.3GiB", ".", "GiB", "24XB", "-1"])
def test_what_is_no_size(base: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    with pytest.raises(SystemExit):
        main(["plan", str(base), f"--memory={text}"])
    assert f"{text!r} is no size; write 24GiB, 80GB or a number of GiB" in capsys.readouterr().err


# -- calibrate and convert ---------------------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("def add(a, b):\n    return a + b\n\n\nclass Queue:\n    pass\n" * 20)
    return path


def test_calibrate(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From text to a checkpoint that is generated from."""
    pytest.importorskip("compressed_tensors")
    output = run(
        capsys, "calibrate", TINY, "--data", text, "--output", tmp_path / "new", "--max-length", 63, "--num-samples", 3
    )
    assert "189 tokens seen" in output
    assert "scales written as compressed-tensors" in output
    inspection = inspect_scales(tmp_path / "new")
    assert len(inspection.layers) == 4
    old = read_scales(TINY)
    for layer, before in zip(read_scales(tmp_path / "new").layers, old.layers, strict=True):
        assert layer.k_scale != before.k_scale  # of other text,
        assert 0.3 < layer.k_scale / before.k_scale < 1.5  # and not far from it
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new", attn_implementation="kvquant")
    generated = model.generate(prompt(1, 15), max_new_tokens=4, return_dict_in_generate=True)
    assert generated.past_key_values.report().layers[0].scales[0].startswith("checkpoint")


def test_calibrate_into_a_file(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--granularity", "channel", "--kv-cache-dtype", "int8", "--asymmetric", "--estimator", "percentile")
    few = ("--num-samples", 2, "--max-length", 17, "--q-scale", "--percentile", 99)
    run(capsys, "calibrate", TINY, "--data", text, *options, *few, "--layout", "sidecar", "--output", tmp_path / "new")
    content = json.loads((tmp_path / "new" / "hf_kvquant_scales.json").read_text())
    assert content["kv_cache_dtype"] == "int8"
    assert content["calibration"] == {
        "granularity": "channel", "estimator": "percentile", "symmetric": False, "percentile": 99.0, "tokens": 34,
        "sequences": 2, "max_length": 17,
    }  # fmt: skip
    found = read_scales(tmp_path / "new", load_plain(TINY))
    assert found.layers[1].v_zero.shape == found.layers[1].k_scale.shape == (2, 64)
    assert found.layers[1].q_scale.shape == (4,)


def test_calibrate_refuses_before_it_starts(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("calibrate", TINY, "--data", text)
    said = fails(capsys, *arguments, "--output", tmp_path / "new", "--granularity", "channel")
    assert "cannot hold scales per channel; layout='sidecar'" in said
    assert "calibrating" not in said
    assert "among the weights of model.safetensors" in fails(capsys, *arguments, "--in-place")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert "is not empty" in fails(capsys, *arguments, "--output", tmp_path / "full")


def test_convert(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The scales of an FP8 checkpoint for the model in 16 bits, and on into another format."""
    other = tmp_path / "fp8"
    tiny_llama("sdpa").save_pretrained(other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    file = other / "model.safetensors"
    old = {f"model.layers.{i}.self_attn.{side}_scale": torch.tensor(0.01 * (i + 1)) for i in range(2) for side in "kv"}
    save_file({**load_file(file), **old}, file, {"format": "pt"})
    output = run(capsys, "convert", other, base, "--output", tmp_path / "new")
    assert "scales written as compressed-tensors" in output
    run(capsys, "convert", tmp_path / "new", base, "--output", tmp_path / "json", "--layout", "vllm-json")
    run(capsys, "convert", tmp_path / "json" / "kv_cache_scales.json", base, "--in-place")
    for place in (tmp_path / "new", base):
        found = read_scales(place, load_plain(place))
        assert found.producer == "compressed-tensors"
        assert [layer.v_scale.item() for layer in found.layers] == pytest.approx([0.01, 0.02])
    said = fails(capsys, "convert", tmp_path / "json", TINY, "--output", tmp_path / "more")
    assert "2" in said
    assert not (tmp_path / "more").exists()
    empty = tmp_path / "empty"
    tiny_llama("sdpa").save_pretrained(empty)
    assert "empty has no KV scales" in fails(capsys, "convert", empty, base, "--output", tmp_path / "more")


@pytest.mark.parametrize(
    ("options", "expected"),
    [((), ("int8", "channel")), (("--kv-cache-dtype", "fp8", "--granularity", "head"), ("fp8_e4m3", "head"))],
)
def test_convert_statistics(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], expected: tuple[str, str]
) -> None:
    """Which leave open what they become."""
    write_statistics(tmp_path / "statistics")
    target = ("--output", tmp_path / "new", "--layout", "sidecar")
    run(capsys, "convert", tmp_path / "statistics", base, *target, *options)
    found = read_scales(tmp_path / "new", load_plain(base))
    assert (found.kv_cache_dtype, granularity_of(found.layers[0].k_scale)) == expected
    wrong = fails(capsys, "convert", tmp_path / "statistics", base, *target, "--kv-cache-dtype", "int3")
    assert "unknown storage format 'int3'" in wrong


def test_serve_is_transformers_server_with_our_attentions(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = pytest.importorskip("transformers.cli.transformers")
    manager = pytest.importorskip("transformers.cli.serving.model_manager").ModelManager
    option = "--attn-implementation"
    seen: list[tuple[list[str], str]] = []

    def app(args: list[str], prog_name: str) -> None:
        assert prog_name == "hf-kvquant"
        name = args[args.index(option) + 1]
        seen.append((args, manager(attn_implementation=name, device="cpu").attn_implementation))

    monkeypatch.setattr(server, "app", app)
    assert main(["serve", "some/model", "--continuous-batching"]) == 0
    assert main(["serve", option, "kvquant_int8"]) == 0
    assert main(["serve", option, "sdpa"]) == 0
    assert seen == [
        (
            ["serve", "some/model", "--continuous-batching", option, "kvquant"],
            "kvquant",
        ),
        (["serve", option, "kvquant_int8"], "kvquant_int8"),
        (["serve", option, "sdpa"], "sdpa"),
    ]
    assert main(["serve", option, "nonsense"]) == 1
    assert "hf-kvquant: Unsupported attention implementation: 'nonsense'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="Unsupported attention implementation: 'kvquant'"):  # without this command
        manager(attn_implementation="kvquant", device="cpu")
