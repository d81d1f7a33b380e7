"""Measurements for a terminal. Of a comparison the cells of its tables, header first; none where there is nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..tables import printable, table
from .agreement import Agreement
from .caches import DENSE
from .quality import Quality

if TYPE_CHECKING:
    from .capacity import Capacity
    from .retrieval import Retrieval
    from .rows import ComparisonRow
    from .speed import Benchmark

Cells = list[tuple[str, ...]]


def told(measured: Benchmark | Capacity) -> str:
    """Its table, what is missing there and why, what the numbers are of, and its notes."""
    lines = [table(measured.table())]
    lines += [f"{what}: not measured: {why}" for what, why in measured.failures()]
    lines += [f"{measured.caption()}; on {measured.setup['machine']}", *(f"note: {note}" for note in measured.notes)]
    return printable("\n".join(lines))


# What tables of qualities have in common: the columns before those of predictions, those of equal tokens, and the last.
ABOUT = ("cache", "scales", "bytes held")
SAME_TOKENS = ("top-1", "greedy")
STORED = ("worst K error", "worst V error", "worst attention error", "clipped")


def about_cells(cache: str, quality: Quality, dense: Quality | None) -> tuple[str, ...]:
    """Of the columns `ABOUT`; bytes also over those of the unquantized cache."""
    share = f" ({quality.bytes_held / dense.bytes_held:.2f}x)" if dense is not None else ""
    return (
        cache,
        "-" if quality.scales is None else " / ".join(quality.scales),
        f"{quality.bytes_held:,}{share}",
    )


def same_token_cells(agreement: Agreement, quality: Quality) -> tuple[str, ...]:
    """Of the columns `SAME_TOKENS`."""
    return f"{agreement.top1_agreement:.2%}", f"{quality.greedy_match:.2%}"


def stored_cells(quality: Quality) -> tuple[str, ...]:
    """Of the columns `STORED`."""
    worst = [
        max((error for error in errors if error is not None), default=None)
        for errors in (quality.k_error, quality.v_error, quality.attention_error)
    ]
    return (
        *("-" if error is None else f"{error:.2%}" for error in worst),
        "-" if quality.clipped is None else f"{sum(quality.clipped):,}",
    )


def quality_cells(rows: Sequence[ComparisonRow]) -> Cells:
    """One line per cache that could be measured."""
    header = (*ABOUT, "perplexity", "in chunks", "KL", *SAME_TOKENS, "differs at", *STORED)
    measured = {row.cache: row.quality for row in rows if row.quality is not None}
    dense = measured.get(DENSE)
    return [header, *(_quality_cells(name, quality, dense) for name, quality in measured.items())] if measured else []


def _quality_cells(name: str, quality: Quality, dense: Quality | None) -> tuple[str, ...]:
    places = [place for place in quality.first_divergence if place is not None]
    return (
        *about_cells(name, quality, dense),
        f"{quality.steps.perplexity:.4f}", f"{quality.chunks.perplexity:.4f}", f"{quality.steps.kl_divergence:.2e}",
        *same_token_cells(quality.steps, quality),
        str(min(places)) if places else "-",
        *stored_cells(quality),
    )  # fmt: skip


def retrieval_cells(rows: Sequence[ComparisonRow]) -> Cells:
    """One line per task, length and cache."""
    lines: dict[tuple[str, int], list[tuple[str, ...]]] = {}
    expected = {_place(found): found for row in rows if row.cache == DENSE for found in row.retrieval}
    depths: list[str] = []
    for row in rows:
        tasks: dict[tuple[str, int], list[Retrieval]] = {}
        for found in row.retrieval:
            tasks.setdefault((found.task, found.length), []).append(found)
        for task, places in tasks.items():
            depths = [f"{found.depth:.0%}" for found in places]
            changes = [
                found.log_probability - expected[_place(found)].log_probability
                for found in places
                if _place(found) in expected
            ]
            lines.setdefault(task, []).append((
                f"{task[0]}, {task[1]:,} tokens", row.cache, " / ".join(f"{found.found:.0%}" for found in places),
                f"{sum(found.log_probability for found in places) / len(places):.4f}",
                f"{sum(changes) / len(changes):+.4f} ({max(changes, key=abs):+.4f})" if changes else "-",
                " / ".join(f"{found.rank:.1f}" for found in places),
            ))  # fmt: skip
    if not lines:
        return []
    where = " / ".join(depths)
    header = ("retrieval", "cache", f"found at depth {where}", "log p", "change (largest)", "rank at those depths")
    return [header, *(line for of_task in lines.values() for line in of_task)]


def _place(found: Retrieval) -> tuple[str, int, float]:
    return found.task, found.length, found.depth


def acceptance_cells(rows: Sequence[ComparisonRow]) -> Cells:
    """One line per cache, drafter and place of the cache."""
    lines = [
        (
            found.drafts, row.cache, found.place, f"{found.accepted:,} of {found.proposed:,}",
            f"{found.accepted / found.proposed:.2%}" if found.proposed else "-", f"{found.same_tokens:.2%}",
        )
        for row in rows
        for found in row.acceptance
    ]  # fmt: skip
    header = ("drafts by", "cache", "of", "accepted", "rate", "tokens as without drafts")
    return [header, *sorted(lines, key=lambda line: line[0], reverse=True)] if lines else []
