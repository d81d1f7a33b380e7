"""Caches that went to disk and back: the same tokens, few bytes, and no file that is half or another model's."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import pytest
import torch
from helpers import prompt, tiny_llama
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_cache import add, contents, make_cache, sliding_model
from test_prefix import hybrid_model

from hf_kvquant import KVQuantConfig, LayerScales, QuantizedPagedCache, sessions

NUM_NEW = 14
MODELS: dict[str, Any] = {"full": tiny_llama, "sliding": sliding_model, "hybrid": hybrid_model}
OPTIONS: dict[str, dict[str, Any]] = {
    "model": {"kv_cache_dtype": "model"},
    "fp8": {"kv_cache_dtype": "fp8", "scales": "dynamic"},
    "int8": {"kv_cache_dtype": "int8", "scales": "dynamic"},
    "first_batch": {"kv_cache_dtype": "int8", "scales": "first_batch", "granularity": "channel"},
    "mixed": {"kv_cache_dtype": ("fp8_e5m2", "model"), "scales": "unit", "skip_layers": (0,), "page_size": 5},
    "offload": {"kv_cache_dtype": "int8", "scales": "dynamic", "offload": True},
    "fixed": {"kv_cache_dtype": "fp8", "scales": "dynamic", "max_cache_len": 128},
    "exact": {"kv_cache_dtype": "fp8", "scales": "unit", "sink_tokens": 3, "recent_tokens": 7},
    "exact_fixed": {
        "kv_cache_dtype": "fp8",
        "scales": "unit",
        "sink_tokens": 3,
        "recent_tokens": 7,
        "max_cache_len": 128,
    },
    "query": {"kv_cache_dtype": "fp8", "scales": "unit", "q_dtype": "fp8"},
}


def generate(model: Any, ids: torch.Tensor, cache: Any, **options: Any) -> torch.Tensor:
    options = {"max_new_tokens": NUM_NEW, "do_sample": False, **options}
    return model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **options)


def filled(model: Any, batch_size: int = 2, **options: Any) -> tuple[QuantizedPagedCache, torch.Tensor]:
    """A cache after a turn of generating, and the text."""
    cache = QuantizedPagedCache.from_model(model, **options)
    return cache, generate(model, prompt(batch_size, 23), cache)


def equal(one: Any, other: Any) -> bool:
    pairs = zip(contents(one), contents(other), strict=True)
    return all(
        (a is None and b is None) or torch.equal(a, b) for pair in pairs for a, b in zip(*pair, strict=True)
    )  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_a_saved_session_goes_on_as_if_nothing_had_been(name: str, options: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    cache, text = filled(model, **OPTIONS[options])
    cache.save_pretrained(tmp_path)
    loaded = QuantizedPagedCache.from_pretrained(tmp_path, model)
    assert equal(loaded, cache)
    assert loaded.get_seq_length() == cache.get_seq_length()
    assert loaded.kvquant == cache.kvquant
    one, other = loaded.report(), cache.report()
    for mine, original in zip(one.layers, other.layers, strict=True):
        assert (mine.kv_cache_dtype, mine.scales, mine.clipped, mine.q_dtype, mine.q_scale) == (
            original.kv_cache_dtype, original.scales, original.clipped, original.q_dtype, original.q_scale,
        )  # fmt: skip
        assert mine.stored_bytes <= original.stored_bytes
    turn = torch.cat([text, prompt(2, 5, seed=3)], dim=1)
    both = [generate(model, turn, each, return_dict_in_generate=True, output_logits=True) for each in (cache, loaded)]
    assert torch.equal(both[0].sequences, both[1].sequences)
    assert all(torch.equal(*pair) for pair in zip(both[0].logits, both[1].logits, strict=True))
    assert equal(loaded, cache)


@pytest.mark.parametrize("options", ["model", "int8", "first_batch", "exact", "fixed"])
@pytest.mark.parametrize("name", MODELS)
def test_a_loaded_session_is_done_with_its_file(name: str, options: str, tmp_path: Path) -> None:
    """Memory of its own, not the file's: on Windows that could not be replaced, nor the session saved there again."""
    model = MODELS[name]()
    cache, text = filled(model, **OPTIONS[options])
    cache.save_pretrained(tmp_path)
    loaded = QuantizedPagedCache.from_pretrained(tmp_path, model)
    file = tmp_path / sessions.FILE
    with file.open("rb+") as handle:
        handle.write(b"\xff" * file.stat().st_size)
    assert equal(loaded, cache)
    turn = torch.cat([text, prompt(2, 5, seed=3)], dim=1)
    assert torch.equal(generate(model, turn, loaded), generate(model, turn, cache))


def test_every_option_has_been_thought_of() -> None:
    """A new one may keep something that a saved cache has to hold: add it to OPTIONS, then here."""
    assert {field.name for field in dataclasses.fields(KVQuantConfig)} == {
        "equalize", "granularity", "kv_cache_dtype", "margin", "max_cache_len", "num_pages", "offload", "page_size",
        "q_dtype", "recent_tokens", "scales", "sink_tokens", "skip_layers",
    }  # fmt: skip


def test_half_the_bytes_of_a_dense_dump(tmp_path: Path) -> None:
    model = tiny_llama(dtype=torch.bfloat16, head_dim=64, num_key_value_heads=1)
    for dtype, bound in (("fp8", 0.54), ("int8", 0.54), ("model", 1.04)):
        cache = QuantizedPagedCache.from_model(model, kv_cache_dtype=dtype, scales="dynamic")
        for index in range(2):
            cache.update(*torch.randn(2, 1, 1, 1000, 64, dtype=torch.bfloat16), index)
        cache.save_pretrained(tmp_path)
        dense = 2 * 2 * 1000 * 64 * 2
        assert (tmp_path / sessions.FILE).stat().st_size <= bound * dense


def test_only_live_pages_are_written(tmp_path: Path) -> None:
    """Not those of other forks, nor what a crop has taken back, and shared pages once."""
    cache = make_cache(page_size=4)
    add(cache, 4 * 9 + 3)
    fork = cache.fork()
    for index in range(2):
        fork.update(*torch.randn(2, 1, 2, 50, 16), index)
    cache.crop(-6)
    cache.batch_repeat_interleave(3)
    cache.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / sessions.FILE)
    assert tensors["tables.0"].shape == (3, 9)
    assert len([name for name in tensors if name.startswith("tables")]) == 1
    for name, tensor in tensors.items():
        if name.endswith(("pages", "token_scale")):
            assert len(tensor) == 9  # 33 tokens
            assert tensor[-1, :, 0].any()
            assert not tensor[-1, :, 1:].any()


def test_layers_that_a_model_has_added_are_not_saved(tmp_path: Path) -> None:
    model = tiny_llama()
    cache = QuantizedPagedCache.from_model(model)
    cache.layers.append(copy.deepcopy(cache.layers[1]))
    model(prompt(1, 21), past_key_values=cache)
    with pytest.raises(ValueError, match="made 3 layers of the cache's 2 while it ran; .* cannot be saved"):
        cache.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_beams_and_layers_that_went_their_own_way(tmp_path: Path) -> None:
    """Rows that share pages still do, and a layer that was skipped has its own table."""
    model = tiny_llama(num_hidden_layers=3)
    cache = QuantizedPagedCache.from_model(model, kv_cache_dtype="fp8", scales="dynamic", page_size=4)
    model(prompt(1, 21), past_key_values=cache)
    cache.batch_repeat_interleave(2)
    for index in (0, 2):
        cache.update(*torch.randn(2, 2, 2, 3, 16), index)
    cache.layers[1].crop(-2)
    cache.save_pretrained(tmp_path)
    loaded = QuantizedPagedCache.from_pretrained(tmp_path, model)
    assert equal(loaded, cache)
    assert [layer.get_seq_length() for layer in loaded.layers] == [24, 19, 24]
    assert loaded.layers[0].table is loaded.layers[2].table
    for one, other in zip(loaded.layers, cache.layers, strict=True):
        assert one.table.pages_in_use == other.table.pages_in_use
    for each in (loaded, cache):
        each.batch_select_indices(torch.tensor([1]))
        for index in range(3):
            each.update(*torch.ones(2, 1, 2, 6, 16) * index, index)
    assert equal(loaded, cache)


@pytest.mark.parametrize("other", [None, LayerScales(None, torch.rand(2, 16) + 0.01)], ids=["none", "one_side"])
def test_scales_of_a_checkpoint_come_with_the_cache(other: LayerScales | None, tmp_path: Path) -> None:
    model = tiny_llama()
    scales = {0: LayerScales(torch.rand(2) + 0.01, torch.rand(2, 16) + 0.01, k_zero=torch.randn(2)), 1: other}
    cache, text = filled(model, kv_cache_dtype="fp8", scales=scales)
    cache.save_pretrained(tmp_path)
    loaded = QuantizedPagedCache.from_pretrained(tmp_path, model)
    assert equal(loaded, cache)
    assert [row.scales for row in loaded.report().layers] == [row.scales for row in cache.report().layers]
    for each in (loaded, cache):
        each.reset()  # frozen scales stay
        model(text, past_key_values=each)
    assert equal(loaded, cache)


def test_scales_that_still_wait_for_tokens(tmp_path: Path) -> None:
    cache = make_cache(kv_cache_dtype="fp8", scales="first_batch")
    zeros = torch.zeros(1, 2, 5, 16)
    for index in range(2):
        cache.update(zeros, zeros, index)
    cache.save_pretrained(tmp_path)
    loaded = QuantizedPagedCache.from_pretrained(tmp_path, tiny_llama())
    for each in (cache, loaded):
        assert "none seen yet" in each.report().layers[0].scales[0]
        add(each, 7)
    assert equal(loaded, cache)
    assert "first batch (7 tokens" in loaded.report().layers[0].scales[0]


@pytest.mark.parametrize("name", MODELS)
def test_a_copy_of_a_loaded_cache_is_one(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    cache, text = filled(model, batch_size=1, kv_cache_dtype="int8", scales="dynamic")
    cache.save_pretrained(tmp_path)
    loaded = QuantizedPagedCache.from_pretrained(tmp_path, model)
    fork, other = loaded.fork(), copy.deepcopy(loaded)
    turn = torch.cat([text, prompt(1, 5, seed=3)], dim=1)
    results = [generate(model, turn, each) for each in (cache, fork, loaded, other)]
    assert all(torch.equal(result, results[0]) for result in results)


OTHER_KINDS = [
    "bloom", "deepseek_v3", "deepseek_v32", "deepseek_v4", "falcon_h1", "gemma3n_text", "gpt_oss", "lfm2", "zamba2",
]  # fmt: skip


@pytest.mark.parametrize("model_type", families.available(OTHER_KINDS))
def test_other_kinds_of_layers(model_type: str, tmp_path: Path) -> None:
    """Latents, indexers, states of the host's own, shared layers, sinks."""
    model = families.build(model_type, attn_implementation="kvquant")
    cache, text = filled(model)
    cache.save_pretrained(tmp_path)
    loaded = QuantizedPagedCache.from_pretrained(tmp_path, model)
    turn = torch.cat([text, prompt(2, 5, seed=3)], dim=1)
    assert torch.equal(generate(model, turn, loaded), generate(model, turn, cache))
    assert equal(loaded, cache)


def test_what_is_not_the_same_model(tmp_path: Path) -> None:
    model = tiny_llama()
    cache, _ = filled(model)
    cache.save_pretrained(tmp_path)
    QuantizedPagedCache.from_pretrained(tmp_path, tiny_llama("sdpa"))
    others = {
        r"rope_parameters .*5000": tiny_llama(rope_parameters={"rope_type": "default", "rope_theta": 5000.0}),
        r"num_hidden_layers 2 \(here 3\)": tiny_llama(num_hidden_layers=3),
        "model_type 'llama'": families.build("qwen2"),
        "other weights": tiny_llama(seed=1),
        "other weights .*precision": tiny_llama(dtype=torch.bfloat16),
    }
    for message, other in others.items():
        with pytest.raises(ValueError, match=message):
            QuantizedPagedCache.from_pretrained(tmp_path, other)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight *= 1.01
    with pytest.raises(ValueError, match="other weights"):
        QuantizedPagedCache.from_pretrained(tmp_path, model)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_adapters_make_another_model(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = tiny_llama()
    filled(model)[0].save_pretrained(tmp_path / "without")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["k_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    with pytest.raises(ValueError, match="adapter"):
        QuantizedPagedCache.from_pretrained(tmp_path / "without", model)
    cache, text = filled(adapted)
    cache.save_pretrained(tmp_path / "with")
    assert equal(QuantizedPagedCache.from_pretrained(tmp_path / "with", model), cache)
    with adapted.disable_adapter(), pytest.raises(ValueError, match="adapter"):
        QuantizedPagedCache.from_pretrained(tmp_path / "with", model)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("quantized", [False, True], ids=["", "quantized"])
def test_adapters_of_the_same_name(quantized: bool, tmp_path: Path) -> None:
    """Of other weights, or that count more, over weights that may be packed."""
    peft = pytest.importorskip("peft", reason="peft is not installed")

    def adapted(seed: int = 0, **options: Any) -> Any:
        model = tiny_llama()
        if quantized:
            entries = {"quant_method": "torchao", "quant_type": {"weights": options.pop("weights", "int8")}}
            config = SimpleNamespace(to_dict=lambda: entries)
            model.hf_quantizer = SimpleNamespace(quantization_config=config, is_compileable=False)
        torch.manual_seed(seed)
        config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["k_proj"], init_lora_weights=False, **options)
        return peft.get_peft_model(model, config).eval()

    model = adapted()
    cache, _ = filled(model)
    cache.save_pretrained(tmp_path)
    assert equal(QuantizedPagedCache.from_pretrained(tmp_path, adapted()), cache)
    others = [adapted(seed=1), adapted(lora_alpha=64), *([adapted(weights="int4")] if quantized else [])]
    for other in others:
        with pytest.raises(ValueError, match="adapter or quantization"):
            QuantizedPagedCache.from_pretrained(tmp_path, other)


def test_a_quantization_of_the_cache_alone_leaves_weights_to_be_compared(tmp_path: Path) -> None:
    """Where the package for it is installed, transformers gives such a model a quantizer."""

    def made() -> Any:
        model = tiny_llama()
        config = SimpleNamespace(to_dict=lambda: {"config_groups": {}, "kv_cache_scheme": {"num_bits": 8}})
        model.hf_quantizer = SimpleNamespace(quantization_config=config, is_compileable=False)
        return model

    model = made()
    cache, _ = filled(model)
    cache.save_pretrained(tmp_path)
    assert equal(QuantizedPagedCache.from_pretrained(tmp_path, made()), cache)
    assert equal(QuantizedPagedCache.from_pretrained(tmp_path, tiny_llama()), cache)  # where it is not installed
    other = made()
    other.model.layers[0].self_attn.k_proj.weight.data *= 1.5
    with pytest.raises(ValueError, match="other weights"):
        QuantizedPagedCache.from_pretrained(tmp_path, other)


class Packed(torch.Tensor):
    """A weight as other libraries quantize it."""


def test_weights_of_another_kind(tmp_path: Path) -> None:
    def packed() -> Any:
        model = tiny_llama()
        for layer in model.model.layers:
            weight = layer.self_attn.k_proj.weight.detach().as_subclass(Packed)
            layer.self_attn.k_proj.weight = torch.nn.Parameter(weight, requires_grad=False)
        return model

    plain, other = tiny_llama(), packed()
    for name, model in (("plain", plain), ("other", other)):
        filled(model)[0].save_pretrained(tmp_path / name)
    for name, model in (("plain", other), ("other", plain)):
        with pytest.raises(ValueError, match="quantization"):
            QuantizedPagedCache.from_pretrained(tmp_path / name, model)
    QuantizedPagedCache.from_pretrained(tmp_path / "other", packed())


def test_a_cache_without_its_model_is_checked_by_configuration(tmp_path: Path) -> None:
    cache = make_cache()
    add(cache, 9)
    cache.save_pretrained(tmp_path)
    assert equal(QuantizedPagedCache.from_pretrained(tmp_path, tiny_llama(seed=5)), cache)
    assert equal(QuantizedPagedCache.from_pretrained(tmp_path, tiny_llama(output_hidden_states=True)), cache)
    with pytest.raises(ValueError, match="vocab_size"):
        QuantizedPagedCache.from_pretrained(tmp_path, tiny_llama(vocab_size=101))


def test_there_is_never_half_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    cache, _ = filled(model)
    cache.save_pretrained(tmp_path)
    before = (tmp_path / sessions.FILE).read_bytes()
    add(cache, 3, batch_size=2)

    def fails(*args: Any) -> None:
        raise OSError("no space left on device")

    for name in ("replace", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fails)
            with pytest.raises(OSError, match="no space"):
                cache.save_pretrained(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [sessions.FILE]
        assert (tmp_path / sessions.FILE).read_bytes() == before
    cache.save_pretrained(tmp_path)
    assert equal(QuantizedPagedCache.from_pretrained(tmp_path, model), cache)


def rewrite(path: Path, change: Any) -> None:
    """Change tensors and header of a saved cache."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["hf_kvquant"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    change(tensors, header)
    save_file(tensors, path, {"hf_kvquant": json.dumps(header)})


DAMAGE: dict[str, tuple[Any, str]] = {
    "version": (
        lambda tensors, header: header.update(version=99),
        "version 99.*reads version 2; compute the text again",
    ),
    "missing tensor": (lambda tensors, header: tensors.pop("layers.1.v.pages"), "damaged.*layers.1.v.pages"),
    "missing scale": (lambda tensors, header: tensors.pop("layers.1.v.token_scale"), "damaged.*layers.1.v.token_scale"),
    "page out of range": (lambda tensors, header: tensors["tables.0"].add_(50), "damaged"),
    "negative page": (lambda tensors, header: tensors["tables.0"].sub_(50), "damaged"),
    "length": (lambda tensors, header: header["tables"][0].update(length=999), "damaged"),
    "dtype": (
        lambda tensors, header: tensors.update({"layers.0.k.pages": tensors["layers.0.k.pages"].float()}),
        "damaged.*layers.0.k.pages",
    ),
    "page size": (
        lambda tensors, header: tensors.update(
            {"layers.0.k.pages": tensors["layers.0.k.pages"][:, :, :3].contiguous()}
        ),
        "damaged.*layers.0.k.pages",
    ),
    "scale": (
        lambda tensors, header: tensors.update({"layers.0.k.scale": torch.ones(3, 1)}),
        "damaged.*layers.0.k.scale is not expected",
    ),
    "layer kinds": (lambda tensors, header: header["layers"].pop(), "kinds"),
    "state": (lambda tensors, header: header["layers"][0]["state"].update(settle=1), "settle"),
    "format": (lambda tensors, header: header["layers"][0]["k"]["plan"].update(format="int3"), "int3"),
    "plan": (lambda tensors, header: header["layers"][0]["k"]["plan"].update(code="x"), "damaged"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_files_are_refused(what: str, tmp_path: Path) -> None:
    model = tiny_llama()
    cache, _ = filled(model, kv_cache_dtype="fp8", scales="dynamic")
    cache.save_pretrained(tmp_path)
    change, message = DAMAGE[what]
    rewrite(tmp_path / sessions.FILE, change)
    with pytest.raises(ValueError, match=message):
        QuantizedPagedCache.from_pretrained(tmp_path, model)


def put(name: str, change: Any) -> Any:
    """A tensor is replaced by what `change` makes of it."""
    return lambda tensors, header: tensors.update({name: change(tensors[name]).contiguous()})


def say(path: str, value: Any) -> Any:
    """An entry of the header is `value`."""

    def change(tensors: Any, header: Any) -> None:
        *parents, last = [int(name) if name.isdecimal() else name for name in path.split(".")]
        entry = header
        for name in parents:
            entry = entry[name]
        entry[last] = value

    return change


def many_pages_of_nothing(tensors: Any, header: Any) -> None:
    """Pages without heads take no bytes: the file stays small whatever their number."""
    for name in [name for name in tensors if name.startswith("layers") and name.endswith(("pages", "token_scale"))]:
        tensors[name] = tensors[name].new_zeros((2, 0, *tensors[name].shape[2:]))


LIES: dict[str, tuple[str, Any, str]] = {
    "negative length": ("int8", say("tables.0", {"length": -20, "first_page": -4}), r"tables\.0\.length is -20"),
    "no length": ("int8", say("tables.0", {"length": 0, "first_page": -3}), r"tables\.0\.length is 0"),
    "length beyond 32 bits": ("int8", say("tables.0.length", 2**31), r"tables\.0\.length is 2147483648"),
    "length between numbers": ("int8", say("tables.0.length", 36.5), r"tables\.0\.length is 36\.5, not int"),
    "length yes": ("int8", say("tables.0.length", True), r"tables\.0\.length is True, not int"),
    "pages gone without a window": ("int8", say("tables.0.first_page", 1), r"tables\.0\.first_page is 1"),
    "negative first page": ("int8", say("tables.0.first_page", -1), r"tables\.0\.first_page is -1"),
    "more lost than there is": (
        "fixed",
        say("tables.0.first_position", 37),
        "the oldest token that is held is 37, of 36",
    ),
    "lost before the first": (
        "fixed",
        say("tables.0.first_position", -1),
        "the oldest token that is held is -1, of 36",
    ),
    "half a token lost": ("fixed", say("tables.0.first_position", 0.5), r"tables\.0\.first_position is 0\.5, not int"),
    "negative table": ("int8", say("layers.0.table", -1), r"layers\.0\.table is -1"),
    "no such table": ("int8", say("layers.0.table", 7), r"layers\.0\.table is 7"),
    "numbers of 32 bits": ("int8", put("tables.0", lambda rows: rows.int()), r"tables\.0 is torch\.int32"),
    "numbers in three dimensions": (
        "int8",
        put("tables.0", lambda rows: rows[..., None]),
        r"tables\.0 is torch\.int64",
    ),
    "no sequences": ("int8", put("tables.0", lambda rows: rows[:0]), r"tables\.0 is torch\.int64"),
    "pages left out": ("int8", put("tables.0", lambda rows: rows * 2), r"tables\.0 has 6 pages"),
    "page that nobody has": ("int8", put("tables.0", lambda rows: rows.clamp(max=4)), r"layers\.0\.k\.pages is \[6,"),
    "no heads": ("int8", many_pages_of_nothing, r"layers\.0\.k\.pages is \[2, 0,"),
    "heads of K and V": (
        "int8",
        put("layers.0.v.pages", lambda pages: pages[:, :1]),
        r"layers\.0\.k\.pages has 2 heads and layers\.0\.v\.pages 1",
    ),
    "too few token scales": ("int8", put("layers.0.v.token_scale", lambda x: x[:2]), r"layers\.0\.v\.token_scale is"),
    "scale NaN": ("int8", put("layers.0.k.scale", lambda x: x * float("nan")), r"layers\.0\.k\.scale holds"),
    "scale infinite": ("int8", put("layers.0.v.scale", lambda x: x / 0), r"layers\.0\.v\.scale holds"),
    "scale zero": ("int8", put("layers.1.k.scale", lambda x: x * 0), r"layers\.1\.k\.scale holds"),
    "scale negative": ("int8", put("layers.1.v.scale", lambda x: -x), r"layers\.1\.v\.scale holds"),
    "scale in doubles": (
        "int8",
        put("layers.0.k.scale", lambda x: x.double()),
        r"layers\.0\.k\.scale is torch\.float64",
    ),
    "scale in a row": ("int8", put("layers.0.k.scale", lambda x: x.flatten()), r"layers\.0\.k\.scale is .*\[32\]"),
    "scale of other heads": ("int8", put("layers.0.k.scale", lambda x: x[:1]), r"layer 0: k_scale has shape \[1, 16\]"),
    "scale lost": ("int8", lambda tensors, header: tensors.pop("layers.0.k.scale"), r"layers\.0\.k\.scale is missing"),
    "zero NaN": ("static", put("layers.0.k.zero", lambda x: x * float("nan")), r"layers\.0\.k\.zero holds"),
    "static scale lost": (
        "static",
        lambda tensors, header: tensors.pop("layers.0.v.scale"),
        r"layers\.0\.v\.scale is mis",
    ),
    "kind": ("int8", say("layers.0.k.plan.kind", "none"), r"layers\.0\.k\.plan\.kind is 'none'"),
    "margin": ("int8", say("layers.0.k.plan.margin", float("nan")), r"layers\.0\.k\.plan\.margin is nan"),
    "granularity": ("int8", say("layers.0.k.plan.granularity", "x"), r"layers\.0\.k\.plan\.granularity is 'x'"),
    "waits for tokens": ("static", say("layers.0.k.needs_tokens", True), r"layers\.0\.k\.needs_tokens is true"),
    "dtype": ("int8", say("layers.0.dtype", "torch.int8"), r"layers\.0\.dtype is 'torch.int8'"),
    "no dtype": ("int8", say("layers.0.dtype", "torch.nn"), r"layers\.0\.dtype is 'torch.nn'"),
    "clipped": ("int8", say("layers.0.clipped", [1]), r"layers\.0\.clipped is \[1\]"),
    "query format": ("query", say("layers.0.q.format", "int8"), r"layers\.0\.q\.format is 'int8'"),
    "query scale NaN": ("query", say("layers.0.q.scale", [float("nan")]), r"layers\.0\.q\.scale holds"),
    "query scale zero": ("query", say("layers.0.q.scale", [0.0]), r"layers\.0\.q\.scale holds"),
    "query scale empty": ("query", say("layers.0.q.scale", []), r"layers\.0\.q\.scale holds"),
    "query scale nested": ("query", say("layers.0.q.scale", [[1.0]]), r"layers\.0\.q\.scale\.0 is a list"),
    "first tokens": ("exact", say("layers.0.num_first", 10**9), r"layers\.0\.k\.exact is"),
    "first tokens negative": ("exact", say("layers.0.num_first", -16), r"layers\.0\.num_first is -16"),
    "first tokens of half a page": ("exact", say("layers.0.num_first", 8), r"layers\.0\.num_first is 8"),
    "first tokens at fixed addresses": ("exact_fixed", say("layers.0.num_first", 0), r"layers\.0\.k\.exact is"),
    "exact dtype": ("exact", put("layers.0.k.exact", lambda x: x.int()), r"layers\.0\.k\.exact is torch\.int32"),
    "exact sequences": ("exact", put("layers.1.v.exact", lambda x: x[:1]), r"layers\.1\.v\.exact is"),
    "exact tokens": ("exact", put("layers.0.v.exact", lambda x: x[:, :, :5]), r"layers\.0\.v\.exact is"),
    "exact dimensions": ("exact", put("layers.0.k.exact", lambda x: x[0]), r"layers\.0\.k\.exact is"),
    "options": ("int8", say("options.sink_tokens", "x"), "sink_tokens='x'"),
    "unknown option": ("int8", say("options.code", "x"), "code"),
    "part": ("int8", say("part", [0]), r"part is \[0\]"),
    "facts of weights": ("int8", say("weights.weights", {"a": 1}), r"weights\.weights\.a is not a list"),
}


@pytest.mark.parametrize("what", LIES)
def test_what_a_file_says_is_checked(what: str, tmp_path: Path) -> None:
    options, change, message = LIES[what]
    scales = LayerScales(torch.rand(2) + 0.01, torch.rand(2, 16) + 0.01, k_zero=torch.randn(2))
    model = tiny_llama()
    kinds = {**OPTIONS, "static": {"kv_cache_dtype": "fp8", "scales": scales}}
    cache, _ = filled(model, **kinds[options])
    cache.save_pretrained(tmp_path)
    rewrite(tmp_path / sessions.FILE, change)
    with pytest.raises(ValueError, match=rf"{sessions.FILE} is damaged, or was not written .*{message}"):
        QuantizedPagedCache.from_pretrained(tmp_path, model)


def test_a_window_lets_go_of_no_page_that_it_needs(tmp_path: Path) -> None:
    model = sliding_model()
    cache = QuantizedPagedCache.from_model(model, kv_cache_dtype="int8", page_size=4)
    generate(model, prompt(2, 23), cache)
    cache.save_pretrained(tmp_path)

    def later(tensors: Any, header: Any) -> None:
        for number, table in enumerate(header["tables"]):
            if table["first_page"]:
                table["first_page"] += 1
                tensors[f"tables.{number}"] = tensors[f"tables.{number}"][:, 1:].contiguous()

    rewrite(tmp_path / sessions.FILE, later)
    with pytest.raises(
        ValueError, match=r"damaged.*tables\.\d\.first_page is \d+; with 36 tokens it must be from 0 to"
    ):
        QuantizedPagedCache.from_pretrained(tmp_path, model)


@pytest.mark.parametrize("says", [True, False], ids=["", "older"])
def test_a_window_at_fixed_addresses_has_lost_what_it_had_lost(says: bool, tmp_path: Path) -> None:
    """The pages of a cache that was cropped do not tell how many tokens it held before."""
    model = sliding_model(8)
    cache = QuantizedPagedCache.from_model(model, kv_cache_dtype="model", page_size=4, max_cache_len=400)
    add(cache, 60)
    for _ in range(60):
        add(cache, 1)
    cache.crop(-60)
    cache.save_pretrained(tmp_path)
    if not says:
        rewrite(tmp_path / sessions.FILE, lambda _, header: [table.pop("first_position") for table in header["tables"]])
    loaded = QuantizedPagedCache.from_pretrained(tmp_path, model)
    if not says:
        assert equal(loaded, cache)
        return
    for _ in range(2):  # and a loaded one may be saved again
        with pytest.raises(RuntimeError, match="cannot take back 10 tokens: .* keeps only the tokens from 44 on"):
            loaded.crop(-10)
        loaded.save_pretrained(tmp_path)
        loaded = QuantizedPagedCache.from_pretrained(tmp_path, model)
    loaded.crop(-9)


def test_layers_with_other_windows_have_other_tables(tmp_path: Path) -> None:
    model = sliding_model()
    cache = QuantizedPagedCache.from_model(model, kv_cache_dtype="int8")
    generate(model, prompt(2, 2), cache, max_new_tokens=3)  # no page has left the window yet
    cache.save_pretrained(tmp_path)

    def share(tensors: Any, header: Any) -> None:
        for entry in header["layers"]:
            entry["table"] = 0

    rewrite(tmp_path / sessions.FILE, share)
    with pytest.raises(ValueError, match=r"damaged.*layers\.\d\.table is 0, .* another window"):
        QuantizedPagedCache.from_pretrained(tmp_path, model)


def entries_of(value: Any, path: tuple[Any, ...] = ()) -> Any:
    """The paths of all entries of a header, but for those of the model's configuration and of single weights."""
    if path:
        yield path
    if path == ("config",) or path[:2] == ("weights", "weights") and len(path) > 2:
        return
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, entry in pairs:
        yield from entries_of(entry, (*path, name))


@pytest.mark.parametrize(
    "value", [None, 5, "x", [], {}, -1, True, 10**400, "missing"], ids=lambda value: repr(value)[:8]
)
def test_whatever_stands_in_the_header_it_loads_or_is_refused_by_name(value: Any, tmp_path: Path) -> None:
    model = tiny_llama()
    cache, _ = filled(model, **OPTIONS["exact"], q_dtype="fp8")
    cache.save_pretrained(tmp_path)
    path = tmp_path / sessions.FILE
    with safe_open(path, framework="pt") as file:
        saved = json.loads(file.metadata()["hf_kvquant"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    for entry in [*entries_of(saved)]:
        header = copy.deepcopy(saved)
        parent = header
        for name in entry[:-1]:
            parent = parent[name]
        if value == "missing":
            del parent[entry[-1]]
        else:
            parent[entry[-1]] = value
        save_file(tensors, path, {"hf_kvquant": json.dumps(header)})
        refused = None
        try:
            QuantizedPagedCache.from_pretrained(tmp_path, model)
        except ValueError as error:
            refused = str(error)
        assert refused is None or str(path) in refused, entry


@pytest.mark.parametrize("header", ["[]", "5", "null", '"x"', "[" * 100_000], ids=lambda header: header[:4])
def test_headers_that_are_no_dict(header: str, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / sessions.FILE, {"hf_kvquant": header})
    with pytest.raises(ValueError, match="not a cache that save_pretrained"):
        QuantizedPagedCache.from_pretrained(tmp_path, tiny_llama())


def test_what_is_no_saved_cache(tmp_path: Path) -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match="holds no saved cache: there is no kv_cache.safetensors"):
        QuantizedPagedCache.from_pretrained(tmp_path, model)
    path = tmp_path / sessions.FILE
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="not a cache that save_pretrained"):
        QuantizedPagedCache.from_pretrained(tmp_path, model)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="not a cache that save_pretrained"):
        QuantizedPagedCache.from_pretrained(tmp_path, model)
    with pytest.raises(ValueError, match="empty"):
        make_cache().save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.gpu
@pytest.mark.parametrize("options", [*OPTIONS])
@pytest.mark.parametrize("name", MODELS)
def test_from_one_device_to_another(name: str, options: str, tmp_path: Path) -> None:
    model = MODELS[name]().cuda()
    cache = QuantizedPagedCache.from_model(model, **OPTIONS[options])
    text = generate(model, prompt(2, 23).cuda(), cache)
    cache.save_pretrained(tmp_path)
    loaded = QuantizedPagedCache.from_pretrained(tmp_path, model)
    turn = torch.cat([text, prompt(2, 5, seed=3).cuda()], dim=1)
    assert torch.equal(generate(model, turn, loaded), generate(model, turn, cache))
    loaded = QuantizedPagedCache.from_pretrained(tmp_path, model.cpu())
    on_cpu = contents(loaded)
    assert all(tensor is None or tensor.device.type == "cpu" for pair in on_cpu for tensor in pair)
    again = generate(model, turn.cpu(), loaded)
    assert again.shape == (2, turn.shape[1] + NUM_NEW)
