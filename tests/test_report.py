"""Reports: what was measured is in tables and pictures, names cannot break the page, and strange files are named."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

pytest.importorskip("matplotlib")

from hf_kvquant import Benchmark, BenchRow, Comparison, ComparisonRow, cli
from hf_kvquant.evaluation import charts
from hf_kvquant.evaluation.agreement import Agreement
from hf_kvquant.evaluation.capacity import Capacity, CapacityRow
from hf_kvquant.evaluation.parts import with_ratios
from hf_kvquant.evaluation.pictures import spread
from hf_kvquant.evaluation.quality import Quality
from hf_kvquant.evaluation.quality_section import quality_section
from hf_kvquant.evaluation.reporting import write_report
from hf_kvquant.evaluation.sections import Table, speed_section
from hf_kvquant.evaluation.text import quality_cells
from hf_kvquant.evaluation.timing import Run

NASTY = "<script>alert('$x$')</script> & \"co\""
SETUP = {
    "model": NASTY, "dtype": "bfloat16", "device": "cpu", "machine": "Some CPU", "attention": "kvquant", "config": "0",
    "weights": "0", "versions": {"torch": "2.13.0"}, "text": "0", "context": 101, "windows": 3, "new_tokens": 7,
    "steps": 5, "threads": 2, "peak_memory": None, "commit": "0123456789abcdef",
}  # fmt: skip


def quality(kl: float, perplexity: float, nbytes: int, **changes: Any) -> Quality:
    agreement = Agreement(perplexity, kl, 0.875)
    fields: dict[str, Any] = {
        "steps": agreement, "chunks": agreement, "greedy_match": 0.5, "first_divergence": [None, 3],
        "k_error": [0.011, None, 0.033], "v_error": [0.04, 0.05, 0.06], "attention_error": [None, None, None],
        "clipped": None, "bytes_held": nbytes, "scales": None,
    }  # fmt: skip
    return Quality(**{**fields, **changes})


def comparison() -> Comparison:
    none = [None, None, None]
    rows = [
        ComparisonRow("DynamicCache", {}, quality(0.0, 10.0, 20000, k_error=none, v_error=none)),
        ComparisonRow("ours", {}, quality(1e-3, 10.1, 10000, clipped=[0, 1234, 5], scales=["checkpoint"])),
        ComparisonRow(NASTY, {}, quality(1e-4, 9.99, 11000)),
        ComparisonRow("missing", {}, failed="ImportError: <none>"),
    ]
    return Comparison(dict(SETUP), rows, ["a note & more"])


def benchmark() -> Benchmark:
    def row(cache: str, batch: int, context: int, ms: float) -> BenchRow:
        return BenchRow(
            cache, {}, batch, context, [Run(0.5, [ms, ms], 1000 * context * batch, None, cache == "compiled")]
        )

    rows = [
        row(cache, batch, context, ms * batch)
        for batch in (1, 4)
        for context in (100, 1000, 3001)
        for cache, ms in (("DynamicCache", 20.0), ("compiled", 8.0))
    ]
    rows.append(BenchRow("missing", {}, 1, 100, [], "ImportError: <none>"))
    return Benchmark(dict(SETUP), rows, [])


class Texts(HTMLParser):
    """All text of a page, and its tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.tags = "", list[str]()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def saved(folder: Path) -> list[Path]:
    capacity = Capacity(
        dict(SETUP),
        [CapacityRow("DynamicCache", {}, None, 64, 12), CapacityRow("ours", {}, None, 64, 24, bounded=False)],
        [],
    )
    models = [{"name": f"model {n}", "description": "It is", "comparison": comparison().to_dict()} for n in (1, 2)]
    for name in ("machine", "commit"):
        del models[0]["comparison"]["setup"][name]  # which then are the record's
    record = {"git_commit": "fedcba9876543210", "machine": "Another CPU", "models": models}
    parts = {
        "about": {"device": "Some GPU", "versions": {"torch": "1"}, "date": "2026-01-02T03:04:05"},
        "parts": {
            "generate": {
                "title": "a title", "git_commit": None,
                "rows": [
                    {"cache": "DynamicCache", "batch": 2, "context": 4096, "tok_s": 10.0},
                    {"cache": "ours", "batch": 2, "context": 4096, "tok_s": 25.0},
                    {"cache": "other", "batch": 2, "context": 4096, "error": "it broke"},
                ],
            }
        },
    }  # fmt: skip
    contents = {
        "quality run": comparison().to_dict(), "speed": benchmark().to_dict(), "fits": capacity.to_dict(),
        "record": record, "parts": parts,
    }  # fmt: skip
    files = [folder / f"{name}.json" for name in contents]
    for file, content in zip(files, contents.values(), strict=True):
        file.write_text(json.dumps(content), encoding="utf-8")
    return files


def test_a_report_of_everything(tmp_path: Path) -> None:
    files = saved(tmp_path)
    written = write_report([*files, files[1]], tmp_path / "deep" / "report")
    assert [path.name for path in written if not path.exists()] == []
    page = written[0].read_text(encoding="utf-8")
    read = Texts(page)
    # Nothing from elsewhere, and nothing that a name could start.
    assert not {"script", "link", "img", "iframe"} & set(read.tags)
    assert not re.findall(r"(?:src|href)\s*=\s*\"(?!#|data:)", page)
    names = {path.stem for path in written[1:]}
    assert names == {
        *(f"quality-run-{kind}" for kind in ("kl", "perplexity", "layers")),
        *(
            f"{stem}-{kind}-{batch}"
            for stem in ("speed", "speed-2")
            for kind in ("speed", "memory")
            for batch in (1, 4)
        ),
        *(f"record-model-{n}-{kind}" for n in (1, 2) for kind in ("kl", "perplexity", "layers")),
        "parts-generate",
    }
    assert read.tags.count("svg") == len(names) == len(list((tmp_path / "deep" / "report").glob("*.png")))
    for expected in (
        "10.1000 (+1.000 %)", "9.9900 (-0.100 %)", "1.0e-03", "10,000 (0.50x)", "3.30%", "6.00%", "1,239", "checkpoint",
        "missing: not measured: ImportError: <none>", "a note & more", NASTY,
        "50.0 (1.00x)", "125.0 (2.50x)", "compiled", "24 (2.00x)", "the model",
        "cache=other, batch=2, context=4096: it broke",
        "Some CPU, 2 threads; torch 2.13.0, commit 0123456", "Another CPU", "commit fedcba9", "Some GPU", "2026-01-02",
    ):  # fmt: skip
        assert expected in read.text, expected


def test_pictures_hold_their_words_and_numbers() -> None:
    pictures = {
        p.name: p for p in quality_section(comparison(), "q").pictures + speed_section(benchmark(), "s").pictures
    }
    for picture in pictures.values():
        svg = picture.svg()
        root = ElementTree.fromstring(svg)  # it is XML whatever the names are
        words = " ".join("".join(element.itertext()) for element in root.iter() if element.tag.endswith("}text"))
        for part in ("Some CPU", "commit 0123456"):
            assert part in words.replace("\n", " ")
        assert picture.title in words
        assert f"drawn from data {picture.digest}" in svg
        assert picture.png().startswith(b"\x89PNG")
        assert svg == picture.svg()
    layers = pictures["q-layers"].svg()
    for expected in (">1.1<", ">3.3<", ">4<", ">1,234<", ">-<", "clipped numbers", "error of K (%)"):
        assert expected in layers
    assert "error of attention" not in layers  # there is none
    speed = pictures["s-speed-1"].svg()
    for expected in ("DynamicCache", "compiled", "new tokens per second", "context (tokens of each prompt)", ">3,001<"):
        assert expected in speed
    assert "KL divergence (nats, at least 1e-07)" in pictures["q-kl"].svg()


def test_the_digest_is_of_everything_shown() -> None:
    def picture(**changes: Any) -> str:
        fields: dict[str, Any] = {
            "name": "n", "title": "t", "caption": "c", "series": {"a": [(1, 2.0), (3, 4.0)]}, "x_label": "x",
            "y_label": "y",
        }  # fmt: skip
        return charts.lines(**{**fields, **changes}).digest

    changes = [
        {}, {"title": "u"}, {"caption": "d"}, {"x_label": "z"}, {"y_label": "z"},
        {"series": {"b": [(1, 2.0), (3, 4.0)]}}, {"series": {"a": [(1, 2.0), (3, 4.5)]}},
    ]  # fmt: skip
    assert len({picture(**each) for each in changes}) == len(changes)
    assert picture(name="m") == picture()


@pytest.mark.parametrize("count", [0, 1, 2, 17])
def test_labels_are_spread(count: int) -> None:
    gap = 0.03
    wanted = [0.5 + 0.001 * index**2 for index in range(count)]
    places = spread(wanted, gap)
    assert all(after - before >= gap - 1e-12 for before, after in zip(places, places[1:], strict=False))
    assert sum(places) == pytest.approx(sum(wanted))  # moved up as much as down
    for edge in (-0.2, 0.02, 0.98, 1.2):
        places = spread([edge] * count, gap)
        assert all(after - before >= gap - 1e-12 for before, after in zip(places, places[1:], strict=False))
        assert all(-1e-12 <= place <= 1 + 1e-12 for place in places)
    assert spread([0.1, 0.5, 0.9], gap) == pytest.approx([0.1, 0.5, 0.9])


@pytest.mark.parametrize("values", [{"a": 0.0}, {"a": -0.5, "b": 0.0, "c": 300.0}, {"a": 1e-7, "b": 1e-6}])
def test_points_of_any_sign_and_size(values: dict[str, float]) -> None:
    series = {name: (100.0, value) for name, value in values.items()}
    svg = charts.points("n", "t", "c", series, "x", "y", ("dense", 200.0), linear_below=0.01).svg()
    for name in (*values, "dense"):
        assert re.search(rf">{name} ?<", svg)


def test_many_layers_leave_the_numbers_out() -> None:
    matrix = [[0.1 * layer for layer in range(40)]]
    svg = charts.heat_maps("n", "t", "c", ["row"], {"p": matrix}, "layer").svg()
    assert ">0.1<" not in svg
    assert ">row<" in svg


def test_ratios_whichever_was_measured_first() -> None:
    rows: list[Any] = [
        {"cache": "ours", "batch": 2, "context": 64, "tok_s": 25.0},
        {"cache": "DynamicCache", "batch": 2, "context": 64, "tok_s": 10.0},
        {"cache": "ours", "batch": 3, "context": 64, "tok_s": 25.0},
        {"what": "something else", "vs_dynamic": 7.0},
    ]
    assert [row.get("vs_dynamic") for row in with_ratios(rows)] == [2.5, 1.0, None, 7.0]


def test_both_tables_of_a_comparison_use_the_same_words() -> None:
    """They differ in where predictions are from; what is stored is the same."""
    table = quality_section(comparison(), "q").tables[0]
    header, *lines = quality_cells(comparison().rows)
    assert set(table.header) < set(header)
    same = set(table.header) - {"perplexity", "KL"}
    for row, line in zip(table.rows, lines, strict=True):
        here, there = dict(zip(table.header, row, strict=True)), dict(zip(header, line, strict=True))
        assert {name: here[name] for name in same} == {name: there[name] for name in same}


def test_tables_in_markdown() -> None:
    table = Table(("a", "b"), [("x|y", "1")])
    assert table.markdown() == "| a | b |\n| --- | --- |\n| x\\|y | 1 |\n"


def of_parts(**speeds: float) -> dict[str, Any]:
    """What a benchmark saves: parts by name, of one row with so many tokens a second each."""
    row = {"cache": "DynamicCache", "batch": 1, "context": 64}
    return {
        "about": {"device": "Some GPU", "versions": {"torch": "1"}, "date": "2026-01-02T03:04:05"},
        "parts": {name: {"title": "t", "rows": [{**row, "tok_s": speed}]} for name, speed in speeds.items()},
    }


def test_pictures_stay_in_the_directory_and_apart(tmp_path: Path) -> None:
    """Whatever parts are called, and files whose names end as others' parts do."""
    (tmp_path / "r.json").write_text(json.dumps(of_parts(**{"/../../x": 1.0, "x": 2.0, "a/b": 3.0, "..": 4.0})))
    (tmp_path / "r-a.json").write_text(json.dumps(of_parts(b=5.0)))
    (tmp_path / "out" / "r-").mkdir(parents=True)  # through which a path could lead elsewhere
    _, *pictures = write_report([tmp_path / "r.json", tmp_path / "r-a.json"], tmp_path / "out")
    names = ["r-x", "r-x-2", "r-a-b", "r-measurement", "r-a-b-2"]
    assert pictures == [tmp_path / "out" / f"{name}.{kind}" for name in names for kind in ("svg", "png")]
    assert len({picture.read_bytes() for picture in pictures}) == len(pictures)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "r-a.json", "r.json"]


def test_no_text_of_a_file_is_more_than_text(tmp_path: Path) -> None:
    content = benchmark().to_dict()
    for row in content["rows"]:
        row["cache"] = "\x1b[31m\ud800 größe"
    content["notes"] = ["one\x07", "two"]
    (tmp_path / "r.json").write_text(json.dumps(content))
    for path in write_report([tmp_path / "r.json"], tmp_path / "out"):
        if path.suffix != ".png":
            text = path.read_text(encoding="utf-8")
            assert all(letter.isprintable() or letter == "\n" for letter in text)
            assert "\\x1b[31m\\ud800 größe" in text
    assert "one\\x07" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not a JSON file"),
        ("[1, 2", "is not a JSON file"),
        ("[]", "holds no measurements that are known"),
        ("{}", "holds no measurements"),
        ('{"rows": []}', "holds no measurements"),
        ('{"rows": [{"runs": []}]}', "is broken, or was written by another version"),
        ('{"setup": {}, "notes": [], "rows": [{"quality": {}}]}', "is broken"),
        ('{"models": [{}]}', "is broken"),
        ('{"parts": {"a": 1}, "about": {}}', "is broken"),
        pytest.param('{"rows": ' + 100_000 * "[", "is not a JSON file", id="deep"),
        (json.dumps(of_parts(generate=0.0)), "is broken"),
    ],
)
def test_files_of_other_kinds_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    path = tmp_path / "file.json"
    path.write_text(content)
    assert cli.main(["report", str(path), "--output", str(tmp_path / "out")]) == 1
    assert f"hf-kvquant: {path} {message}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_files_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(tmp_path / "nothing.json"), "--output", str(tmp_path)]) == 1
    assert "nothing.json" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no files"):
        write_report([], tmp_path)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = saved(tmp_path)
    assert cli.main(["report", str(files[0]), "--output", str(tmp_path / "out")]) == 0
    assert str(tmp_path / "out" / "report.html") in capsys.readouterr().out


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = saved(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    with pytest.raises(ImportError, match=re.escape("pip install 'hf-kvquant[report]'")):
        write_report(files, tmp_path / "out")
    assert not (tmp_path / "out").exists()
