"""Measurements as sections of tables and pictures, which a page or a document is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import charts
from .caches import DENSE
from .capacity import Capacity
from .pictures import Picture
from .speed import Benchmark, BenchRow

Cells = Sequence[str]


@dataclass(frozen=True)
class Table:
    """Rows of as many cells as the header has; the first cell is what a row is about."""

    header: Cells
    rows: Sequence[Cells]

    def markdown(self) -> str:
        """For a document."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


@dataclass(frozen=True)
class Section:
    """A measurement for people.

    Attributes:
        title: what was measured.
        caption: on what, with what and how.
        tables: all numbers.
        pictures: some of them.
        notes: what the reader should know of, among it what could not be measured.
    """

    title: str
    caption: str
    tables: list[Table]
    pictures: list[Picture] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def markdown(self, pictures: Sequence[Picture], folded: bool = False, level: int = 2) -> str:
        """For a document beside which `pictures` lie as SVG files.

        `folded` tables are hidden until asked for; `level` is that of the heading.
        """
        parts = [f"{'#' * level} {self.title}\n", f"{self.caption}\n"]
        parts += [f"![{picture.title}]({picture.name}.svg)\n" for picture in pictures]
        body = [table.markdown() for table in self.tables]
        if self.notes:
            body.append("".join(f"- {note}\n" for note in self.notes))
        parts += ["<details><summary>All rows</summary>\n", *body, "</details>\n"] if folded else body
        return "\n".join(parts)


def provenance(setup: Mapping[str, Any]) -> str:
    """Device, versions and commit, in words."""
    versions = ", ".join(f"{name} {version}" for name, version in setup["versions"].items() if version)
    threads = f", {setup['threads']} thread{'s' * (setup['threads'] > 1)}" if setup.get("threads") else ""
    commit = f", commit {setup['commit'][:7]}" if setup.get("commit") else ""
    return f"{setup.get('machine') or setup['device']}{threads}; {versions}{commit}"


def speed_section(benchmark: Benchmark, name: str) -> Section:
    """Of `bench`; pictures of tokens a second and of memory over the context, for each batch.

    `name` begins the names of pictures.
    """
    setup = benchmark.setup
    measured = [row for row in benchmark.rows if row.runs and not row.failed]
    about = f"{setup['model']} ({setup['dtype']})"
    where = provenance(setup)
    pictures = []
    for batch in sorted({row.batch for row in measured}):
        of_batch = [row for row in measured if row.batch == batch]
        if len({row.context for row in of_batch}) < 2:
            continue
        caption = f"{about}, {batch} sequence{'s' * (batch > 1)}, {setup['new_tokens']} new tokens. {where}"
        speed = {label: [(r.context, r.tokens_per_s) for r in rows] for label, rows in _by_cache(of_batch).items()}
        held = {
            label: [(r.context, r.cache_bytes / 2**20) for r in rows] for label, rows in _by_cache(of_batch).items()
        }
        context = "context (tokens of each prompt)"
        title = f"Generation speed, batch {batch}"
        axes = (context, "new tokens per second", DENSE)
        pictures.append(charts.lines(f"{name}-speed-{batch}", title, caption, speed, *axes))
        title = f"Memory of the cache, batch {batch}"
        axes = (context, "held by the cache (MiB)", DENSE)
        pictures.append(charts.lines(f"{name}-memory-{batch}", title, caption, held, *axes, log_x=False))
    title = "Speed and memory"
    return Section(title, f"{benchmark.caption()}. {where}.", [_table(benchmark)], pictures, _notes(benchmark))


def _by_cache(rows: Sequence[BenchRow]) -> dict[str, list[BenchRow]]:
    """Of each cache its rows by context; the unquantized one first."""
    names = sorted(dict.fromkeys(row.cache for row in rows), key=lambda name: name != DENSE)
    return {
        name + (" compiled" if any(row.compiled for row in rows if row.cache == name) else ""): sorted(
            (row for row in rows if row.cache == name), key=lambda row: row.context
        )
        for name in names
    }


def capacity_section(capacity: Capacity) -> Section:
    """Of `measure_capacity`."""
    caption = f"{capacity.caption()}. {provenance(capacity.setup)}."
    return Section("How much fits", caption, [_table(capacity)], [], _notes(capacity))


def _table(measured: Benchmark | Capacity) -> Table:
    header, *rows = measured.table()
    return Table(header, rows)


def _notes(measured: Benchmark | Capacity) -> list[str]:
    return [*(f"{what}: not measured: {why}" for what, why in measured.failures()), *measured.notes]
