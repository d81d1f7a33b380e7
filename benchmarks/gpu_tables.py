"""Tables and plots of a result of `benchmarks.gpu`: a short table for the README, all of it for docs/gpu.md."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from hf_kvquant.evaluation import charts
from hf_kvquant.evaluation.caches import DENSE
from hf_kvquant.evaluation.parts import cell, failures, speed_bars, tables_by_kind, with_ratios
from hf_kvquant.evaluation.pictures import Picture
from hf_kvquant.evaluation.sections import Table

Row = dict[str, Any]
# The formats of the decode table, as it calls them.
_FORMATS = {"model": "bf16 pages", "fp8_e4m3": "fp8", "int8": "int8"}
_SHAPES = {"generate": "Llama 3.1 8B", "generate-1B": "Llama 3.2 1B"}
_CAPACITY_NAMES = {"kvquant fp8 reserved": "kvquant fp8 compiled", "kvquant int8 reserved": "kvquant int8 compiled"}


def rows_of(result: dict[str, Any], part: str) -> list[Row]:
    """The rows of a part that were measured."""
    return [row for row in result["parts"].get(part, {}).get("rows", []) if "error" not in row]


def readme_table(result: dict[str, Any]) -> str:
    """Tokens a second and capacity, in Markdown, with what they were measured on."""
    parts = [part for part in _SHAPES if rows_of(result, part)]
    cells = list(dict.fromkeys((p, row["batch"], row["context"]) for p in parts for row in rows_of(result, p)))
    speed = {(row["cache"], p, row["batch"], row["context"]): row["tok_s"] for p in parts for row in rows_of(result, p)}
    questions = list(dict.fromkeys(row["what"] for row in rows_of(result, "capacity")))
    largest = {
        (_CAPACITY_NAMES.get(row["cache"], row["cache"]), row["what"]): row["largest"]
        for row in rows_of(result, "capacity")
    }
    header = ["cache"]
    header += [f"tokens/s, {_SHAPES[p]}, {batch} x {charts.short(context)}" for p, batch, context in cells]
    header += [f"largest {question.replace('8192', '8k')}" for question in questions]
    lines = []
    for cache in dict.fromkeys(cache for cache, *_ in speed):
        line = [cache]
        for place in cells:
            line.append(_with_ratio(speed.get((cache, *place)), speed.get((DENSE, *place))))
        line += [_with_ratio(largest.get((cache, q)), largest.get((DENSE, q))) for q in questions]
        lines.append(line)
    return Table(header, lines).markdown() + "\n" + about(result, parts)


def about(result: dict[str, Any], parts: Sequence[str]) -> str:
    """Where and with what `generate` was measured, and `parts` were."""
    return (
        f"`generate` of models of these shapes with random bf16 weights on one {result['about']['device']}, batch x "
        f"tokens held. {_versions(result, parts)}.\n"
    )


def _versions(result: dict[str, Any], parts: Sequence[str]) -> str:
    versions = result["about"]["versions"]
    commits = dict.fromkeys((result["parts"][part].get("git_commit") or "unknown")[:7] for part in parts)
    software = ", ".join(f"{name} {versions[name]}" for name in ("torch", "triton", "transformers"))
    return f"{software}, commit {', '.join(commits)}, {result['about']['date'][:10]}"


def document(result: dict[str, Any], images: Sequence[Picture] = ()) -> str:
    """All parts in Markdown."""
    machine = result["about"]
    lines = [
        "# On a GPU",
        "",
        f"`python -m benchmarks.gpu` on one {machine['device']} (driver {machine['driver']}); written by "
        "`make readme`.",
        "",
        about(result, list(result["parts"])),
        *(f"![{picture.title}]({picture.name}.svg)\n" for picture in images),
    ]
    for name, part in result["parts"].items():
        lines += [f"## {name}", "", part["title"] + ".", ""]
        measured = with_ratios(rows_of(result, name))
        if name == "decode" and any(_in_decode_table(row) for row in measured):
            lines += [_decode(measured), ""]
            measured = [row for row in measured if not _in_decode_table(row)]
        lines += [f"{table.markdown()}\n" for table in tables_by_kind(measured)]
        failed = [f"- {failure}" for failure in failures(part["rows"])]
        lines += [*failed, ""] if failed else []
    return "\n".join(lines).rstrip() + "\n"


def pictures(result: dict[str, Any]) -> list[Picture]:
    """What is drawn of it."""
    drawn = []
    decode = [row for row in rows_of(result, "decode") if _in_decode_table(row) and row["format"] in _FORMATS]
    if decode:
        # Batches and contexts that hold equally many tokens share a point.
        shares: dict[str, dict[int, list[float]]] = {}
        for row in decode:
            tokens = row["batch"] * row["context"]
            shares.setdefault(_FORMATS[row["format"]], {}).setdefault(tokens, []).append(row["share"])
        medians = {
            name: [(tokens, statistics.median(values)) for tokens, values in sorted(points.items())]
            for name, points in shares.items()
        }
        where = f"{result['about']['device']}, {_versions(result, ['decode'])}"
        caption = f"32 query heads, 8 of K and V, head_dim 128, one new token a sequence. {where}."
        axes = ("tokens held by all sequences", "share of the read bandwidth")
        drawn.append(charts.lines("gpu-decode", "Decode attention", caption, medians, *axes))
    part = next((part for part in _SHAPES if rows_of(result, part)), None)
    if part is not None:
        title = f"generate, {_SHAPES[part]}'s shape: tokens/s over those of {DENSE}"
        caption = about(result, [part]).replace("`", "").strip()
        drawn += speed_bars(rows_of(result, part), "gpu-generate", title, caption)
    return drawn


def _in_decode_table(row: Row) -> bool:
    usual = row.get("page_size") in (16, None) and row.get("q_heads") == 32 and row.get("kv_heads") == 8
    return (
        usual and row.get("head_dim") == 128 and row["tokens"] == 1 and "sweep" not in row and "order" not in row
        and row["scales"] in ("", "dynamic", "equalized")
        and row["format"] in (*_FORMATS, "sdpa enable_gqa", "sdpa packed")
    )  # fmt: skip


def _decode(rows: list[Row]) -> str:
    """A line for each batch and context; the formats side by side."""
    cells: dict[tuple[int, int], dict[str, Row]] = {}
    for row in rows:
        if _in_decode_table(row):
            cells.setdefault((row["context"], row["batch"]), {})[row["format"]] = row
    header = ["context", "batch", "SDPA us"]
    header += [f"{name} {what}" for name in _FORMATS.values() for what in ("us", "share")]
    header += [f"{name} over {other}" for name in ("fp8", "int8") for other in ("bf16 pages", "SDPA")]
    lines = []
    for (context, batch), formats in sorted(cells.items()):
        sdpa = min((row["us"] for name, row in formats.items() if name.startswith("sdpa")), default=None)
        line = [charts.short(context), str(batch), cell(sdpa)]
        for name in _FORMATS:
            line += [cell(formats.get(name, {}).get(what)) for what in ("us", "share")]
        for name in ("fp8_e4m3", "int8"):
            ours = formats.get(name, {}).get("us")
            for other in (formats.get("model", {}).get("us"), sdpa):
                line.append(f"{other / ours:.2f}x" if ours and other else "")
        lines.append(line)
    return Table(header, lines).markdown()


def _with_ratio(value: float | None, base: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" + (f" ({value / base:.2f}x)" if base else "")
