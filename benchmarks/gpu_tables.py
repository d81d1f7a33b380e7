"""Tables and plots of a result of `benchmarks.gpu`: a short table for the README, all of it for docs/gpu.md."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import plot

Row = dict[str, Any]
# The formats of the decode table, as it calls them.
_FORMATS = {"model": "bf16 pages", "fp8_e4m3": "fp8", "int8": "int8"}
_DYNAMIC = "DynamicCache"
_SHAPES = {"generate": "Llama 3.1 8B", "generate-1B": "Llama 3.2 1B"}
_CAPACITY_NAMES = {"kvquant fp8 reserved": "kvquant fp8 compiled", "kvquant int8 reserved": "kvquant int8 compiled"}
# What rows are told by, not what was measured.
_HIDDEN = {"traceback", "row_seconds", "failures"}


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
    header += [f"tokens/s, {_SHAPES[p]}, {batch} x {_thousands(context)}" for p, batch, context in cells]
    header += [f"largest {question.replace('8192', '8k')}" for question in questions]
    lines = []
    for cache in dict.fromkeys(cache for cache, *_ in speed):
        line = [cache]
        for cell in cells:
            line.append(_with_ratio(speed.get((cache, *cell)), speed.get((_DYNAMIC, *cell))))
        line += [_with_ratio(largest.get((cache, q)), largest.get((_DYNAMIC, q))) for q in questions]
        lines.append(line)
    return _markdown(header, lines) + "\n" + about(result, parts)


def about(result: dict[str, Any], parts: Sequence[str]) -> str:
    """Where and with what `parts` were measured."""
    machine, versions = result["about"], result["about"]["versions"]
    commits = dict.fromkeys((result["parts"][part].get("git_commit") or "unknown")[:7] for part in parts)
    software = ", ".join(f"{name} {versions[name]}" for name in ("torch", "triton", "transformers"))
    return (
        f"`generate` of models of these shapes with random bf16 weights on one {machine['device']}, batch x tokens "
        f"held. {software}, commit {', '.join(commits)}, {machine['date'][:10]}.\n"
    )


def document(result: dict[str, Any], images: Sequence[str] = ()) -> str:
    """All parts in Markdown."""
    machine = result["about"]
    lines = [
        "# On a GPU",
        "",
        f"`python -m benchmarks.gpu` on one {machine['device']} (driver {machine['driver']}); written by "
        "`benchmarks/readme.py --gpu`.",
        "",
        about(result, list(result["parts"])),
        *(f"![{name}]({name})\n" for name in images),
    ]
    for name, part in result["parts"].items():
        lines += [f"## {name}", "", part["title"] + ".", ""]
        measured = rows_of(result, name)
        if name == "decode" and any(_in_decode_table(row) for row in measured):
            lines += [_decode(measured), ""]
            measured = [row for row in measured if not _in_decode_table(row)]
        # Rows of one kind share a table.
        kinds = dict.fromkeys(_columns(row) for row in measured)
        for columns in kinds:
            of_kind = [row for row in measured if _columns(row) == columns]
            lines += [_markdown(columns, [[_text(row[c]) for c in columns] for row in of_kind]), ""]
        failed = [row for row in part["rows"] if "error" in row]
        for row in failed:
            key = ", ".join(f"{k}={v}" for k, v in row.items() if k not in _HIDDEN | {"error"})
            lines.append(f"- {key}: {row['error']}")
        lines += [""] if failed else []
    return "\n".join(lines).rstrip() + "\n"


def plots(result: dict[str, Any]) -> dict[str, str]:
    """SVG files by name."""
    files = {}
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
        files["gpu-decode.svg"] = plot.lines(
            medians, "Decode attention: share of the read bandwidth", "tokens held by all sequences"
        )
    part = next((part for part in _SHAPES if rows_of(result, part)), None)
    if part is not None:
        rows = rows_of(result, part)
        bars: dict[str, dict[str, float]] = {}
        dynamic = {(row["batch"], row["context"]): row["tok_s"] for row in rows if row["cache"] == _DYNAMIC}
        for row in rows:
            cell = (row["batch"], row["context"])
            if cell in dynamic:
                group = f"{cell[0]} x {_thousands(cell[1])}"
                bars.setdefault(group, {})[row["cache"]] = row["tok_s"] / dynamic[cell]
        if bars:
            files["gpu-generate.svg"] = plot.bars(
                bars, f"generate, {_SHAPES[part]}'s shape: tokens/s over those of DynamicCache"
            )
    return files


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
        line = [_thousands(context), str(batch), _text(sdpa)]
        for name in _FORMATS:
            line += [_text(formats.get(name, {}).get(what)) for what in ("us", "share")]
        for name in ("fp8_e4m3", "int8"):
            ours = formats.get(name, {}).get("us")
            for other in (formats.get("model", {}).get("us"), sdpa):
                line.append(f"{other / ours:.2f}x" if ours and other else "")
        lines.append(line)
    return _markdown(header, lines)


def _columns(row: Row) -> tuple[str, ...]:
    return tuple(name for name in row if name not in _HIDDEN)


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    table = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in table) + "\n"


def _with_ratio(value: float | None, base: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" + (f" ({value / base:.2f}x)" if base else "")


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def _thousands(number: int) -> str:
    return f"{number // 1024}k" if number >= 1024 and number % 1024 == 0 else str(number)
