"""The examples run, in their quick form, and print what they are there to show."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import hf_kvquant

ROOT = Path(__file__).parent.parent


def run(name: str, *arguments: str) -> str:
    """Standard output of an example, which must succeed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_demo(tmp_path: Path) -> None:
    output = run("demo.py", "--quick", "--json", str(tmp_path / "numbers.json"))
    assert "def read_lines(path" in output
    assert re.search(r"^0 +full_attention +fp8_e4m3 +checkpoint", output, re.MULTILINE), output
    saved = json.loads((tmp_path / "numbers.json").read_text())
    assert saved["versions"]["hf-kvquant"] == hf_kvquant.__version__
    rows = {row["cache"]: row for row in saved["results"]}
    dynamic = rows["DynamicCache"]
    for name in ("kvquant fp8 (checkpoint scales)", "kvquant int8 (dynamic scales)"):
        row = rows[name]
        assert f"{name} " in output
        assert 0.5 < row["share_of_dynamic"] < 0.6
        assert abs(row["perplexity"] / dynamic["perplexity"] - 1) < 0.03
        assert row["same_greedy_token"] > 0.9
        assert row["tokens_per_second"] > 0
    host = rows["transformers fp8"]
    assert ("unavailable" in host and "not in this transformers" in output) or 0.5 < host["share_of_dynamic"] < 0.51


def test_chat_keeps_what_it_stored() -> None:
    output = run("chat.py", "--new-tokens", "12")
    computed = [(int(new), int(whole)) for new, whole in re.findall(r"(\d+) of (\d+) tokens to compute", output)]
    stored = [int(count) for count in re.findall(r"(\d+) tokens stored", output)]
    assert len(computed) == len(stored) == 3
    # The last generated token is not in the cache yet: the next turn computes it and what was added.
    for before, (new, whole) in zip([0, *stored], computed, strict=False):
        assert whole - new == before
    assert "total:" in output


def test_calibrate(tmp_path: Path) -> None:
    output = run("calibrate.py", "--quick", "--output", str(tmp_path / "new"))
    lines = re.findall(r"^(fp8|int8) +(dynamic|per [\w, ]+?) +([\d.]+) +([\d.]+)% +([\d,]+)$", output, re.MULTILINE)
    assert len(lines) == 10, output
    exact = float(re.search(r"^DynamicCache +- +([\d.]+)", output, re.MULTILINE)[1])
    for _, source, perplexity, agreement, clipped in lines:
        assert abs(float(perplexity) / exact - 1) < 0.03
        assert float(agreement) > 90
        assert source != "dynamic" or clipped == "0"
    assert f"{tmp_path / 'new'}: config.json" in output
    assert hf_kvquant.read_scales(tmp_path / "new").producer == "compressed-tensors"


def test_long_context() -> None:
    output = run("long_context.py", "--tokens", "512", "1024")
    rows = re.findall(r"^(\w+ ?\w+)  +([\d.]+) ", output, re.MULTILINE)
    sizes = {name: float(size) for name, size in rows}
    for name in ("kvquant fp8", "kvquant int8"):
        assert sizes[name] < 0.6 * sizes["DynamicCache"], output
    assert "OutOfPagesError: 513 tokens" in output
    assert "still held: 512 tokens" in output
    assert "after reset(): 0 tokens" in output


def test_shared_prompt() -> None:
    output = run("shared_prompt.py", "--tokens", "256", "--new-tokens", "4")
    kept = int(re.search(r"^kept: 256 tokens, ([\d,]+) bytes", output)[1].replace(",", ""))
    computed = [(int(new), int(whole)) for new, whole in re.findall(r"(\d+) of (\d+) tokens to compute", output)]
    assert len(computed) == 3
    assert all(whole - new == 256 for new, whole in computed)
    together = int(re.search(r"hold ([\d,]+) bytes together", output)[1].replace(",", ""))
    assert together < 2 * kept  # three requests, each as long as what is kept


def test_saved_session(tmp_path: Path) -> None:
    output = run("saved_session.py", "--tokens", "300", "--new-tokens", "6", "--directory", str(tmp_path / "new"))
    size, dense = (int(number.replace(",", "")) for number in re.findall(r" ([\d,]{5,})", output)[:2])
    assert sum(file.stat().st_size for file in (tmp_path / "new").iterdir()) == size < 0.55 * dense
    assert len(set(re.findall(r"(\d+ of \d+) tokens to compute", output))) == 1
    assert "same tokens: True" in output


def test_choose_format() -> None:
    output = run("choose_format.py", "--context", "64", "--windows", "1", "--most", "1e-2")
    name = re.search(r"^smallest with a KL divergence of at most 0.01: (.+)$", output, re.MULTILINE)[1]
    sizes = re.findall(r"^(\S.*?)  .*? ([\d,]+) \(", output, re.MULTILINE)
    held = {cache: int(size.replace(",", "")) for cache, size in sizes}
    assert len(held) >= 5
    assert held[name] < 0.6 * held["DynamicCache"]
    assert "needle, 64 tokens" in output
