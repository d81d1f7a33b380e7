"""The Python blocks of a document run, in order, as one program: later ones build on earlier ones."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from hf_kvquant.batching.hooks import is_known as batching_is_known

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
BATCHING = ROOT / "docs" / "batching.md"
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("document", [README, BATCHING], ids=lambda path: path.stem)
def test_code_blocks_run(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if document == BATCHING and not batching_is_known():
        pytest.skip("the installed transformers has continuous batching of another form")
    # A folder of its own for what the blocks write, with the paths that they read.
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    text = document.read_text(encoding="utf-8")
    blocks = list(PYTHON_BLOCK.finditer(text))
    assert len(blocks) == text.count("```python") > 0
    namespace: dict[str, Any] = {"__name__": "readme"}
    for block in blocks:
        lines_before = text.count("\n", 0, block.start(1))
        code = "\n" * lines_before + block[1]  # so that a traceback shows the document's line
        exec(compile(code, str(document), "exec"), namespace)


def test_documents_are_the_committed_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """`make readme` would change nothing: every number of theirs is measured."""
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import readme

    texts, pictures = readme.documents()
    for path, text in texts.items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is not of these results; run `make readme`"
    # By the data in them: other versions of matplotlib draw the same a little differently.
    for path, picture in pictures.items():
        drawn = f"drawn from data {picture.digest}"
        assert drawn in path.read_text(encoding="utf-8"), f"{path.name}: run `make readme`"
        assert any(f"({path.name})" in text for text in texts.values())
    assert set((ROOT / "docs").glob("*.svg")) == set(pictures)


def test_what_recent_tokens_are_said_to_give_is_in_the_record() -> None:
    said = (
        "`recent_tokens=16` leaves a quarter to a third of int8's KL\n"
        "divergence, and less than a tenth where keys have large biases"
    )
    assert said in README.read_text(encoding="utf-8")
    record = json.loads((ROOT / "benchmarks" / "results" / "quality-2026-12-01.json").read_text(encoding="utf-8"))
    left = {}
    for model in record["models"]:
        rows = {row["cache"]: row["quality"] for row in model["comparison"]["rows"]}
        exact, plain = (
            rows[f"int8 dynamic{more}"]["chunks"]["kl_divergence"] for more in (", 16 recent tokens exact", "")
        )
        left[model["name"]] = exact / plain
    for name in ("SmolLM2-135M-Instruct", "tiny-python-lm", "tiny-python-qk-norm"):
        assert 0.24 < left[name] < 0.34
    assert left["tiny-python-key-bias"] < 0.1


def test_a_table_has_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import readme

    place = "<!-- some-table -->\nold\n<!-- /some-table -->\n"
    assert readme.put(f"a\n{place}b\n", "some", "| 1 |\n") == "a\n<!-- some-table -->\n| 1 |\n<!-- /some-table -->\nb\n"
    for text in ("a\n", place * 2):
        with pytest.raises(ValueError, match="places for the table 'some'; there must be one"):
            readme.put(text, "some", "| 1 |\n")
