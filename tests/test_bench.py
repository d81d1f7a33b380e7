"""`bench` and `measure_capacity`: what is measured of every cache, what an interrupted run leaves, and bad input."""

from __future__ import annotations

import json
import math
import os
import platform
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import llama_config, prompt, tiny_llama
from transformers import LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from hf_kvquant import Benchmark, bench, cli
from hf_kvquant.evaluation import capacity
from hf_kvquant.evaluation.caches import candidates
from hf_kvquant.evaluation.capacity import Capacity, largest_fitting, measure_capacity
from hf_kvquant.evaluation.machine import processor_name
from hf_kvquant.evaluation.random_weights import random_model
from hf_kvquant.evaluation.speed import BenchRow
from hf_kvquant.evaluation.timing import SETTLING, Run, generate_once

NEW_TOKENS = 9
HOSTS = ["transformers fp8", "transformers quanto 4 bit", "transformers hqq 8 bit", "transformers hqq 4 bit"]
NOT_HERE = ("ImportError", "ValueError")  # a package that is not installed; a host without fp8


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama("sdpa", num_key_value_heads=1, head_dim=80)


def measured(model: Any, **options: Any) -> Benchmark:
    return bench(model, **{"contexts": [15], "new_tokens": NEW_TOKENS, "rounds": 2, "formats": ["int8"], **options})


def test_every_cache_at_every_size(model: Any) -> None:
    done: list[BenchRow] = []
    result = measured(model, contexts=[1, 63], batches=[1, 3], formats=["int8", ("model", "fp8")], on_row=done.append)
    names = ["DynamicCache", "kvquant int8", "kvquant model / fp8", *HOSTS]
    places = [(batch, context) for batch in (1, 3) for context in (1, 63)]
    assert [(row.cache, row.batch, row.context) for row in result.rows] == [(n, *p) for p in places for n in names]
    assert sorted(map(str, done)) == sorted(map(str, result.rows))
    for row in result.rows:
        if row.failed:
            assert row.cache in HOSTS
            assert row.failed.startswith(NOT_HERE)
            assert str(result).count(f"{row.cache}: not measured: {row.failed}") == 1  # once, not for every size
            continue
        assert len(row.runs) == 2
        assert all(len(run.inter_token_ms) == NEW_TOKENS - 1 - SETTLING for run in row.runs)
        assert not row.compiled
        # The last token is not put into the cache. One K/V head of 80 channels in two layers.
        numbers = row.batch * (row.context + NEW_TOKENS - 1) * 2 * 2 * 80
        if row.cache == "DynamicCache":
            assert row.cache_bytes == numbers * 4
            assert row.speed_over(row) == 1
        elif row.cache == "kvquant int8":
            assert numbers < row.cache_bytes
        assert row.cache in str(result)


def test_what_runs_amount_to() -> None:
    runs = [
        Run(3.0, [10.0, 30.0], 7, 50, False),
        Run(1.0, [40.0, 40.0], 9, None, False),
        Run(2.0, [5.0, 5.0], 8, 60, True),
    ]
    row = BenchRow("some", {}, 4, 100, runs)
    dense = BenchRow("DynamicCache", {}, 4, 100, [Run(1.0, [40.0], 1, 1, False), Run(1.0, [20.0], 1, 1, False)])
    assert row.tokens_per_s == pytest.approx(200)  # of 200, 100 and 800
    assert row.first_token_s == 2.0
    assert row.inter_token_ms(50) == np.percentile([10, 30, 40, 40, 5, 5], 50)
    assert (row.cache_bytes, row.peak_bytes, row.compiled) == (9, 60, True)
    assert row.speed_over(dense) == pytest.approx((2 + 0.5) / 2)  # of the rounds that both have
    summary = row.to_dict(dense)["summary"]
    assert summary["tokens_per_s"] == row.tokens_per_s
    assert summary["tokens_per_s_ratio"] == row.speed_over(dense)
    assert summary["inter_token_ms"]["p99"] == row.inter_token_ms(99)
    assert BenchRow.from_dict(json.loads(json.dumps(row.to_dict(dense)))) == row


class Interruption(KeyboardInterrupt):
    pass


def test_an_interrupted_run_is_taken_up(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bench.json"
    calls = 0
    generate = type(model).generate

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise Interruption
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "generate", counting)
    with pytest.raises(Interruption):
        measured(model, save=path)
    kept = Benchmark.from_dict(json.loads(path.read_text()))
    calls = 100
    result = measured(model, save=path)
    caches = [str(row) for row in result.rows if not row.failed]
    done = {str(row): len(row.runs) for row in kept.rows}
    assert sum(done.values()) == 5 - len(caches)  # of five calls, one per cache warms up
    assert calls == 100 + sum(1 + 2 - done[name] for name in caches if done[name] < 2)
    assert Benchmark.from_dict(json.loads(path.read_text())).rows == result.rows
    for row in kept.rows:
        assert next(other for other in result.rows if str(other) == str(row)).runs[: len(row.runs)] == row.runs
    before = calls
    again = measured(model, save=path, contexts=[15, 17])
    assert again.rows[: len(result.rows)] == result.rows
    assert calls == before + 3 * len(caches)  # the new size alone
    assert list(tmp_path.iterdir()) == [path]  # nothing is left beside


def test_nothing_is_saved_through_a_link(model: Any, tmp_path: Path) -> None:
    """Not even through one that has the name of a file beside, with this process in it."""
    path, other = tmp_path / "bench.json", tmp_path / "other"
    other.write_text("precious")
    (tmp_path / f".bench.json.{os.getpid()}.partial").symlink_to(other)
    measured(model, save=path, rounds=1)
    assert other.read_text() == "precious"
    assert not path.is_symlink()
    assert json.loads(path.read_text())["rows"]


def test_a_saved_file_that_is_nested_too_deeply(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    path.write_text(100_000 * "[")
    with pytest.raises(ValueError, match=f"{path} is not a saved measurement"):
        measured(model, save=path, rounds=1)


@pytest.mark.parametrize("change", ["new_tokens", "model", "config"])
def test_a_file_of_another_measurement_is_refused(model: Any, tmp_path: Path, change: str) -> None:
    path = tmp_path / "bench.json"
    measured(model, save=path, rounds=1)
    other = tiny_llama("sdpa") if change == "config" else model
    options: dict[str, Any] = {"new_tokens": {"new_tokens": 8}, "model": {"name": "another"}}.get(change, {})
    with pytest.raises(ValueError, match=f"{path} holds a measurement that differs in {change}"):
        measured(other, save=path, rounds=1, **options)


def test_a_cache_that_fails_is_a_row_and_the_rest_goes_on(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    formats = {"bounded": {"kv_cache_dtype": "int8", "num_pages": 2}, "int8": {"kv_cache_dtype": "int8"}}
    result = measured(model, formats=formats, contexts=[15, 63], save=path, rounds=1)
    rows = {(row.cache, row.context): row for row in result.rows}
    assert rows["bounded", 15].failed == ""
    assert rows["bounded", 63].failed.startswith("OutOfPagesError: ")
    assert f"bounded, 1 x 63: not measured: {rows['bounded', 63].failed}" in str(result)
    assert rows["int8", 63].failed == rows["DynamicCache", 63].failed == ""
    assert result.to_dict()["rows"][-1]["summary"] == {} if result.rows[-1].failed else True
    assert json.loads(path.read_text()) == json.loads(json.dumps(result.to_dict()))


@pytest.mark.parametrize("attention", ["sdpa", "eager", "kvquant_fp8"])
def test_the_model_is_given_back_as_it_was(attention: str) -> None:
    model = tiny_llama(attention)
    model.train()
    seen = []
    forward = model.model.layers[0].self_attn.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append((model.config._attn_implementation, model.training))
        return forward(*args, **kwargs)

    model.model.layers[0].self_attn.forward = watched
    result = measured(model, rounds=1)
    assert result.setup["attention"] == ("sdpa" if attention == "kvquant_fp8" else attention)
    assert set(seen) == {("kvquant", False), (result.setup["attention"], False)}
    assert model.config._attn_implementation == attention
    assert model.training
    with pytest.raises(Interruption):
        measured(model, rounds=1, on_row=raise_interruption)
    assert model.config._attn_implementation == attention
    assert model.training


def raise_interruption(row: BenchRow) -> None:
    raise Interruption


def test_an_end_of_text_does_not_end_it() -> None:
    model = tiny_llama("sdpa")
    tokens = model.generate(prompt(1, 15), max_new_tokens=NEW_TOKENS, do_sample=False)[0, 15:]
    model.generation_config.eos_token_id = sorted(set(tokens.tolist()))
    for row in measured(model, rounds=1).rows:
        assert all(len(run.inter_token_ms) == NEW_TOKENS - 1 - SETTLING for run in row.runs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contexts": []}, None),
        ({"contexts": [0]}, "contexts: 0; it must be an integer of at least 1"),
        ({"contexts": [2.5]}, "contexts: 2.5; it must"),
        ({"batches": []}, "batches is empty"),
        ({"batches": [True]}, "batches: True"),
        ({"rounds": 0}, "rounds: 0"),
        ({"new_tokens": SETTLING + 1}, f"new_tokens: {SETTLING + 1}; it must be an integer of at least {SETTLING + 2}"),
        ({"contexts": [504]}, "513 together, but the model is made for 512 .max_position_embeddings"),
        ({"contexts": [], "new_tokens": 300}, "556 together"),  # beside half of what the model is made for
        ({"formats": {"StaticCache": {"kv_cache_dtype": "int9"}}}, "int9"),
        ({"save": "/nowhere/at/all.json"}, "there is no directory"),
    ],
)
def test_bad_amounts_are_refused_before_anything_runs(model: Any, options: dict[str, Any], message: str | None) -> None:
    if message is None:  # nothing asked for is the default
        assert {row.context for row in measured(model, rounds=1, **options).rows} == {256}
        return
    with pytest.raises(ValueError, match=message):
        measured(model, **options)


@pytest.mark.parametrize("name", ["contexts", "batches"])
def test_amounts_that_are_no_list(model: Any, name: str) -> None:
    with pytest.raises(TypeError, match=rf"{name}=8; give a list, such as \[8\]"):
        measured(model, **{name: 8})
    with pytest.raises(TypeError, match="give a list"):  # it would be used up by looking at it
        measured(model, **{name: iter([8])})


def test_a_model_without_a_causal_head_is_refused(model: Any) -> None:
    config = T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=9, decoder_start_token_id=0)
    for other in (T5ForConditionalGeneration(config), model.model):
        with pytest.raises(ValueError, match="is not a causal language model"):
            measured(other)


def test_a_model_is_taken_as_everywhere_else(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of data parallelism, which would split its batches; and what is no model is named."""
    monkeypatch.setattr(capacity, "check_device", lambda model: None)
    monkeypatch.setattr(capacity, "_MOST", 2)
    options: dict[str, Any] = {"formats": ["int8"], "contexts": [15]}
    for measure in (partial(bench, new_tokens=6, rounds=1), measure_capacity):
        rows = measure(torch.nn.DataParallel(model), **options).rows
        assert {row.failed for row in rows if row.cache == "kvquant int8"} == {""}
        with pytest.raises(TypeError, match="str is no transformers model; give what from_pretrained has returned"):
            measure("a hub id", **options)


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n", "AMD EPYC (family 25, model 17)"),
        ("processor\t: 0\nCPU part\t: 0xd40\n", platform.processor() or platform.machine()),
        ("", platform.processor() or platform.machine()),
    ],
)
def test_processors_that_have_one_name_are_told_apart(cpuinfo: str, expected: str) -> None:
    assert processor_name(cpuinfo) == expected


# -- random weights ----------------------------------------------------------------------------------------------------


def test_random_weights_need_a_configuration_alone(tmp_path: Path) -> None:
    config = llama_config(dtype=torch.bfloat16)
    config.save_pretrained(tmp_path)
    one, other = random_model(tmp_path), random_model(tmp_path, dtype="float32")
    assert (one.dtype, other.dtype) == (torch.bfloat16, torch.float32)
    again = random_model(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), again.parameters(), strict=True))
    assert not one.training
    with pytest.raises(ValueError, match="nothing has no configuration"):
        random_model(tmp_path / "nothing")


@pytest.mark.parametrize("missing", [ImportError("a package"), torch.OutOfMemoryError("CUDA out of memory.")])
def test_what_no_configuration_is_to_blame_for(
    missing: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise missing

    llama_config().save_pretrained(tmp_path)
    monkeypatch.setattr(LlamaForCausalLM, "__init__", fails)
    with pytest.raises(type(missing), match=str(missing)):
        random_model(tmp_path)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama_config().save_pretrained(tmp_path)
    path = tmp_path / "bench.json"
    options = ["--context", "17", "--new-tokens", "6", "--rounds", "1", "--formats", "int8", "--device", "cpu"]
    assert cli.main(["bench", str(tmp_path), "--random-weights", *options, "--save", str(path)]) == 0
    out, err = capsys.readouterr()
    result = Benchmark.from_dict(json.loads(path.read_text()))
    assert str(result) in out
    assert result.setup["model"] == f"{tmp_path}, random weights"
    assert "kvquant int8, 1 x 17: done" in err
    assert cli.main(["bench", str(tmp_path), "--random-weights", "--largest", "--device", "cpu"]) == 1
    assert "hf-kvquant plan MODEL --memory" in capsys.readouterr().err


# -- how much fits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", [1, 256])
@pytest.mark.parametrize("most", [1, 255, 256, 1000, 1 << 20])
@pytest.mark.parametrize("limit", [0, 1, 3, 31, 33, 255, 257, 777, 9999, 10**7])
@pytest.mark.parametrize(("first", "precision"), [(1, 32), (901, 100), (7, 2)])
def test_the_search_finds_the_largest(unit: int, most: int, limit: int, first: int, precision: int) -> None:
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= limit

    found = largest_fitting(fits, unit, most, first * unit, precision)
    best = min(limit, most) // unit * unit
    assert best - max(best // precision, unit - 1) <= found <= best
    assert found % unit == 0
    assert len(set(tried)) == len(tried)
    assert all(0 < size <= most and size % unit == 0 for size in tried)
    assert all(size <= max(2 * limit, first * unit) for size in tried)


def test_capacity_by_filling_memory(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="the model is on cpu: how much fits is found by filling a GPU's memory"):
        measure_capacity(model)
    monkeypatch.setattr(capacity, "check_device", lambda model: None)
    monkeypatch.setattr(capacity, "_MOST", 8)
    path = tmp_path / "capacity.json"
    # Pages that run out as memory does: a prompt of 15 tokens and five more take two pages of 16.
    formats = {"bounded": {"kv_cache_dtype": "int8", "num_pages": 11}, "free": {"kv_cache_dtype": "int8"}}
    options: dict[str, Any] = {"formats": formats, "contexts": [15], "batches": [3], "save": path}
    result = measure_capacity(model, **options)
    rows = {(row.cache, row.question): row for row in result.rows}
    batch, context = "largest batch at 15 tokens", "longest context at batch 3"
    assert (rows["bounded", batch].largest, rows["bounded", batch].bounded) == (5, True)
    assert (rows["free", batch].largest, rows["free", batch].bounded) == (8, False)
    assert rows["bounded", context].largest == 0
    assert (rows["free", context].largest, rows["free", context].bounded) == (256, False)
    assert rows[HOSTS[1], batch].failed.startswith(NOT_HERE)
    assert "5 (0.62x)" in str(result)
    assert Capacity.from_dict(json.loads(path.read_text())) == result
    monkeypatch.setattr(type(model), "generate", None)  # nothing is lacking, so nothing runs
    kept = measure_capacity(model, **options)
    assert [row for row in kept.rows if not row.failed] == [row for row in result.rows if not row.failed]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("cuBLAS: out of memory")]
)
def test_running_out_of_memory_is_an_answer(model: Any, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr(capacity, "check_device", lambda model: None)
    generate = type(model).generate

    def limited(self: Any, ids: torch.Tensor, **kwargs: Any) -> Any:
        if ids.shape[0] > 3:
            raise error
        return generate(self, ids, **kwargs)

    monkeypatch.setattr(type(model), "generate", limited)
    result = measure_capacity(model, formats=["int8"], contexts=[15], batches=[1])
    assert [row.largest for row in result.rows if row.batch is None and not row.failed][:2] == [3, 3]

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("something else")

    monkeypatch.setattr(type(model), "generate", broken)
    result = measure_capacity(model, formats=["int8"], contexts=[15], batches=[1])
    assert {row.failed for row in result.rows if row.cache == "DynamicCache"} == {"RuntimeError: something else"}


def test_caches_at_fixed_addresses(model: Any) -> None:
    """As on a GPU, where the host's cache of that kind is there too; `generate` compiles there only."""
    found = {each.name: each for each in candidates(model, ["int8"], reserved=True)}
    assert list(found) == ["DynamicCache", "StaticCache", "kvquant int8", *HOSTS]
    for name in ("StaticCache", "kvquant int8"):
        cache = found[name].make(32)
        assert cache.is_compileable
        run = generate_once(model, found[name].make, prompt(1, 15), NEW_TOKENS)
        assert len(run.inter_token_ms) == NEW_TOKENS - 1 - SETTLING
        assert not run.compiled
    bounded = candidates(model, {"few": {"kv_cache_dtype": "int8", "num_pages": 9}}, reserved=True)[2]
    assert not bounded.make(32).is_compileable  # it must not reserve more


@pytest.mark.gpu
def test_generate_compiles_where_it_does_by_itself() -> None:
    model = tiny_llama("sdpa", torch.bfloat16, head_dim=64).to("cuda")
    result = measured(model, contexts=[63], new_tokens=12)
    compiled = {row.cache: row.compiled for row in result.rows if not row.failed}
    assert {name: compiled[name] for name in ("DynamicCache", "StaticCache", "kvquant int8")} == {
        "DynamicCache": False, "StaticCache": True, "kvquant int8": True,
    }  # fmt: skip
    assert all(
        row.peak_bytes is not None and row.peak_bytes >= row.cache_bytes for row in result.rows if not row.failed
    )


@pytest.mark.gpu
def test_capacity_of_a_gpu() -> None:
    model = tiny_llama("sdpa", torch.bfloat16, head_dim=64, max_position_embeddings=1 << 14).to("cuda")
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(512 * 2**20 / total)
    try:
        result = measure_capacity(model, formats=["int8"], contexts=[1024], batches=[64])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    for row in result.rows:
        if not row.failed:
            assert row.largest > 0
            assert row.bounded
            # Keys and values of what is said to fit do fit.
            bits = 8 if row.cache == "kvquant int8" else 16
            tokens = row.largest * (1024 if row.batch is None else 64)
            assert math.prod([tokens, 2, 2, 2, 64, bits // 8]) <= 512 * 2**20
