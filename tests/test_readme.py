"""The Python blocks of the README run, in order, as one program: later ones build on earlier ones."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A folder of its own for what the blocks write, with the paths that they read.
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    text = README.read_text(encoding="utf-8")
    blocks = list(PYTHON_BLOCK.finditer(text))
    assert len(blocks) == text.count("```python") > 0
    namespace: dict[str, Any] = {"__name__": "readme"}
    for block in blocks:
        lines_before = text.count("\n", 0, block.start(1))
        code = "\n" * lines_before + block[1]  # so that a traceback shows the README's line
        exec(compile(code, str(README), "exec"), namespace)


def test_the_table_is_the_committed_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import readme

    text = README.read_text(encoding="utf-8")
    result = json.loads(readme.RESULT.read_text())
    assert readme.table(result) in text
    assert readme.render(text, result) == text


def test_the_figures_of_a_gpu_are_the_committed_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_tables
    import readme

    result = json.loads(readme.GPU_RESULT.read_text())
    text = README.read_text(encoding="utf-8")
    assert gpu_tables.readme_table(result) in text
    assert readme.render_gpu(text, result) == text
    images = list(gpu_tables.plots(result))
    assert gpu_tables.document(result, images) == (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
