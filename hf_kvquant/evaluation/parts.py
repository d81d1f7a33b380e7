"""Rows of any kind, as this project's own benchmarks (by part) and demo save them, as sections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import charts
from .caches import DENSE
from .pictures import Picture, plain
from .sections import Section, Table

Row = Mapping[str, Any]
# What rows are told by, not what was measured.
_HIDDEN = {"traceback", "row_seconds", "failures"}
# What a row of tokens a second has.
_SPEED = {"cache", "batch", "context", "tok_s"}


def part_sections(result: Mapping[str, Any], name: str) -> list[Section]:
    """One section per part: tables of like rows, and bars where caches generate. `name` begins pictures' names."""
    sections = []
    for part, content in result["parts"].items():
        commit = (content.get("git_commit") or "unknown")[:7]
        about = result["about"]
        versions = ", ".join(f"{key} {version}" for key, version in about["versions"].items() if version)
        where = f"{about['device']}; {versions}, commit {commit}, {about['date'][:10]}"
        rows = with_ratios([row for row in content["rows"] if "error" not in row])
        pictures = speed_bars(
            rows, f"{name}-{plain(part)}", f"{part}: tokens/s over {DENSE}'s", f"{content['title']}. {where}"
        )
        notes = failures(content["rows"])
        sections.append(Section(part, f"{content['title']}. {where}.", tables_by_kind(rows), pictures, notes))
    return sections


def demo_sections(result: Mapping[str, Any], name: str) -> list[Section]:
    """Of `examples/demo.py --json`; it has no pictures that `name` could begin the names of."""
    versions = ", ".join(f"{key} {version}" for key, version in result["versions"].items() if version)
    commit = (result["git_commit"] or "unknown")[:7]
    caption = (
        f"Greedy, {result['prompt_tokens']} + {result['new_tokens']} tokens, median of {result['rounds']}; perplexity "
        f"and greedy tokens over {result['text_tokens']:,} tokens. {result['gpu'] or result['cpu']}, "
        f"{result['threads']} threads; {versions}, commit {commit}."
    )
    return [Section("Demo", caption, tables_by_kind(result["results"]))]


def with_ratios(rows: Sequence[Row]) -> list[Row]:
    """Rows of tokens a second with `vs_dynamic`, those over transformers' unquantized cache's, whichever came first."""
    dense = _dense_speeds(rows)
    return [
        {**row, "vs_dynamic": row["tok_s"] / dense[row["batch"], row["context"]]}
        if row.keys() >= _SPEED and (row["batch"], row["context"]) in dense
        else row
        for row in rows
    ]


def _dense_speeds(rows: Sequence[Row]) -> dict[tuple[int, int], float]:
    """By batch and context."""
    return {
        (row["batch"], row["context"]): row["tok_s"] for row in rows if row.keys() >= _SPEED and row["cache"] == DENSE
    }


def tables_by_kind(rows: Sequence[Row]) -> list[Table]:
    """Rows with the same columns share a table."""
    kinds: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        kinds.setdefault(tuple(name for name in row if name not in _HIDDEN), []).append(row)
    return [Table(kind, [[cell(row[column]) for column in kind] for row in of_kind]) for kind, of_kind in kinds.items()]


def failures(rows: Sequence[Row]) -> list[str]:
    """What was not measured, and why."""
    told = {id(row): ", ".join(f"{k}={v}" for k, v in row.items() if k not in _HIDDEN | {"error"}) for row in rows}
    return [f"{told[id(row)]}: {row['error']}" for row in rows if "error" in row]


def speed_bars(rows: Sequence[Row], name: str, title: str, caption: str) -> list[Picture]:
    """Tokens a second of each cache over those of transformers' unquantized one, by batch and context; none without."""
    speeds = [row for row in rows if row.keys() >= _SPEED]
    dense = _dense_speeds(rows)
    groups: dict[str, dict[str, float]] = {}
    for row in sorted(speeds, key=lambda row: row["cache"] != DENSE):
        place = row["batch"], row["context"]
        if place in dense:
            group = f"{place[0]} x {charts.short(place[1])}"
            groups.setdefault(group, {})[row["cache"]] = row["tok_s"] / dense[place]
    if not groups:
        return []
    return [charts.bars(name, title, caption, groups, f"tokens/s over {DENSE}'s", "batch x tokens held")]


def cell(value: Any) -> str:
    """A value for people."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)
