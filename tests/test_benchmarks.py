"""The programs that measure on a GPU run on a CPU too, in sizes that say nothing; tables hold what was measured."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_llama

from hf_kvquant import QuantizedPagedCache
from hf_kvquant.batching import hooks

ROOT = Path(__file__).parent.parent
PARTS = ["bandwidth", "decode", "small", "write", "prefill", "generate", "calls", "capacity"]
if hooks.is_known():
    PARTS.append("batching")
# Packages and devices that are not here.
EXPECTED_ERRORS = ("not installed", "not available", "on GPUs only")


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("gpu") / "result.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--tiny", "--json", str(path)]
    subprocess.run([*command, "--only", ",".join(PARTS)], cwd=ROOT, env=dict(os.environ), check=True)
    return json.loads(path.read_text())


def test_every_part_measures(result: dict[str, Any]) -> None:
    assert list(result["parts"]) == PARTS
    for name, part in result["parts"].items():
        errors = [row["error"] for row in part["rows"] if "error" in row]
        assert not [error for error in errors if not any(expected in error for expected in EXPECTED_ERRORS)]
        assert len(part["rows"]) > len(errors), name


def test_tables_hold_what_was_measured(result: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_tables

    for number, row in enumerate(result["parts"]["decode"]["rows"]):
        # As of the shape that has a table of its own.
        row |= {"q_heads": 32, "kv_heads": 8, "head_dim": 128, "context": 1024 << number % 3}
    pictures = gpu_tables.pictures(result)
    text = gpu_tables.document(result, pictures)
    for part in result["parts"].values():
        for row in part["rows"]:
            assert row.get("error", "") in text
    table = gpu_tables.readme_table(result)
    for row in gpu_tables.rows_of(result, "generate"):
        assert f"| {row['cache']} | {row['tok_s']:,.0f} (" in table
    for row in gpu_tables.rows_of(result, "capacity"):
        assert f"{row['largest']:,.0f} (" in table
    svgs = {picture.name: picture.svg() for picture in pictures}
    assert sorted(svgs) == ["gpu-decode", "gpu-generate"]
    for name, svg in svgs.items():
        assert f"({name}.svg)" in text
        assert result["about"]["git_commit"][:7] in svg
    for name in ("bf16 pages", "fp8", "int8"):
        assert f">{name}<" in svgs["gpu-decode"]
    for row in gpu_tables.rows_of(result, "generate"):
        assert f">{row['cache']}<" in svgs["gpu-generate"]


def test_the_cpu_page_gives_speeds_over_the_unquantized_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import cpu_tables

    title = "tokens/s; x: kvquant int8 over it"
    row = {"context": 512, "kvquant int8, x": 1.0, "DynamicCache, x": 2.0, "kvquant int8, compiled, x": 0.8}
    part = cpu_tables.over_dense({"title": title, "rows": [row]})
    assert part["title"] == "tokens/s; x: over DynamicCache"
    assert list(part["rows"][0].values()) == [512, 2.0, 1.0, 2.5]
    times = {"title": "ms; x: times as long as kvquant int8", "rows": [row]}
    assert cpu_tables.over_dense(times) == times
    page = (ROOT / "docs" / "cpu.md").read_text(encoding="utf-8")
    assert [line for line in page.splitlines() if line.startswith("# ")] == ["# On a CPU"]


def test_a_failing_row_is_recorded_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    import torch

    from benchmarks.results import Results

    path = tmp_path / "result.json"
    results = Results(path, torch.device("cpu"), budget=100.0)
    results.part("some", "title")
    results.row({"a": 1}, lambda: {"b": 1 // 0})
    assert "ZeroDivisionError" in json.loads(path.read_text())["parts"]["some"]["rows"][0]["error"]
    results.row({"a": 2}, lambda: {"b": 2.5})
    assert results.rows("some")[1]["b"] == 2.5
    results.budget = -1.0
    results.row({"a": 3}, lambda: {"b": 3})
    # Another run keeps what it does not measure again.
    kept = Results(path, torch.device("cpu"), budget=100.0)
    kept.part("other", "title")
    rows = kept.rows("some")
    assert [row.get("b") for row in rows] == [None, 2.5, None]
    assert "not started" in rows[2]["error"]


def test_parts_of_another_call_are_taken_in(tmp_path: Path) -> None:
    from benchmarks.results import Results

    first = Results(tmp_path / "first.json", torch.device("cpu"), budget=10)
    first.part("decode", "...")
    first.row({"what": "a"}, lambda: {"us": 1.0})
    second = Results(tmp_path / "second.json", torch.device("cpu"), budget=10)
    second.part("write", "...")
    second.take(tmp_path / "first.json")
    saved = json.loads((tmp_path / "second.json").read_text())
    assert sorted(saved["parts"]) == ["decode", "write"]
    assert saved["parts"]["decode"]["rows"][0]["us"] == 1.0
    saved["about"]["device"] = "another"
    (tmp_path / "third.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="measured on another"):
        second.take(tmp_path / "third.json")
    with pytest.raises(ValueError, match="measured on another"):
        Results(tmp_path / "third.json", torch.device("cpu"), budget=10)


# Stands for SGLang's file: its names, imports and launch, and a loop of its own.
STAND_IN = """
import triton
import triton.language as tl
from sglang.srt.utils import is_hip

@triton.jit
def _fwd_grouped_kernel_stage1(q_ptr, k_ptr, v_ptr, o_ptr, length, BLOCK_N: tl.constexpr):
    rows, tokens, channels = tl.arange(0, 16), tl.arange(0, BLOCK_N), tl.arange(0, 128)
    q = tl.load(q_ptr + rows[:, None] * 128 + channels[None, :])
    result = tl.zeros([16, 128], tl.float32)
    for start in tl.range(0, length, BLOCK_N):
        places = (start + tokens)[:, None] * 1024 + channels[None, :]
        logits = tl.dot(q, tl.trans(tl.load(k_ptr + places)).to(q.dtype))
        result += tl.dot(logits.to(q.dtype), tl.load(v_ptr + places).to(q.dtype))
    tl.store(o_ptr + rows[:, None] * 128 + channels[None, :], result)

_fwd_kernel_stage2 = None

def decode_attention_fwd(q, k, v, o, *others, max_kv_splits, **scales):
    assert not is_hip()
    _fwd_grouped_kernel_stage1[(8, 8, max_kv_splits)](q, k, v, o, 4096, BLOCK_N=64, num_warps=4, num_stages=3)
    _fwd_kernel_stage2[(1,)](o)
"""


def test_our_loops_stand_beside_published_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton")
    kernel_compiler = pytest.importorskip("kernel_compiler")
    if not kernel_compiler.CUOBJDUMP.exists():
        pytest.skip(f"this Triton has no {kernel_compiler.CUOBJDUMP}")
    from benchmarks import published

    file = tmp_path / "decode_attention.py"
    file.write_text(STAND_IN)
    monkeypatch.setattr(sys, "argv", ["published", "--sglang", str(file)])
    published.main()
    header, _, *lines = (line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines())
    rows = [dict(zip(header, line, strict=True)) for line in lines]
    assert [row["kernel"] for row in rows] == [
        "ours, fp8_e4m3", "ours, fp8_e4m3 by token", "ours, int8 by token", "sglang, fp8_e4m3",
    ]  # fmt: skip
    for row in rows[:3]:
        assert (row["bits"], row["bytes"]) == ("128", "0")
        assert "(" not in row["us"]  # copies run ahead
        assert float(row["a number"]) < 4
    assert (rows[3]["tokens x warps x stages"], rows[3]["splits"]) == ("64 x 4 x 3", "8")

    file.write_text("from sglang.srt.utils import not_there")
    with pytest.raises(SystemExit, match=r"decode_attention\.py is not the sglang.*not_there"):
        published.main()


# Ends when it is interrupted and all others have been too.
INTERRUPTED = """
import pathlib, signal, sys, time

def stop(*_):
    pathlib.Path(sys.argv[1]).touch()
    while len(list(pathlib.Path(sys.argv[1]).parent.iterdir())) < 3:
        time.sleep(0.01)
    raise SystemExit(2)

signal.signal(signal.SIGINT, stop)
print("ready", flush=True)
while True:  # a signal that arrives just before a sleep is seen after it
    time.sleep(0.01)
"""


def test_workers_are_stopped_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import gpu_tests

    with contextlib.ExitStack() as stack:
        processes = []
        for worker in range(3):
            command = [sys.executable, "-c", INTERRUPTED, str(tmp_path / str(worker))]
            process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            stack.callback(process.kill)
            processes.append(process)
        assert [process.stdout.readline() for process in processes] == ["ready\n"] * 3
        gpu_tests._end(processes, time.monotonic())
        assert [process.returncode for process in processes] == [2, 2, 2]


def test_filled_layers_share_their_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a model's prompt: what a step does to the table it then does once."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.models import fill

    model = tiny_llama("kvquant")
    cache = QuantizedPagedCache.from_model(model, kv_cache_dtype="int8")
    fill(cache, model, 2, 150)
    assert cache.get_seq_length() == 150
    assert len({id(layer.table) for layer in cache.layers}) == 1
