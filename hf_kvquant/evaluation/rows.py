"""A comparison of caches as data: one row per cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..tables import printable, table
from .acceptance import Acceptance
from .quality import Quality
from .retrieval import Retrieval
from .text import acceptance_cells, quality_cells, retrieval_cells


@dataclass(frozen=True)
class ComparisonRow:
    """One cache of a comparison.

    Attributes:
        cache: its name.
        options: what it was made with, as JSON.
        quality: its numbers; None if it could not be measured.
        retrieval: what the model finds over it, if asked for.
        acceptance: how speculation goes with it, if asked for.
        failed: the exception that ended a measurement, and of what if it was not that of quality.
    """

    cache: str
    options: dict[str, Any]
    quality: Quality | None = None
    retrieval: list[Retrieval] = field(default_factory=list)
    acceptance: list[Acceptance] = field(default_factory=list)
    failed: str = ""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ComparisonRow:
        """A row from what `dataclasses.asdict` made of one."""
        return cls(
            cache=data["cache"],
            options=data["options"],
            quality=None if data["quality"] is None else Quality.from_dict(data["quality"]),
            retrieval=[Retrieval(**found) for found in data["retrieval"]],
            acceptance=[Acceptance(**found) for found in data["acceptance"]],
            failed=data["failed"],
        )


@dataclass(frozen=True)
class Comparison:
    """Caches side by side. `str(comparison)` is a table.

    Attributes:
        setup: model, text and versions that the numbers belong to.
        rows: one per cache; the first is transformers' unquantized one.
        notes: what the user should know of.
    """

    setup: dict[str, Any]
    rows: list[ComparisonRow]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Comparison:
        """From what `to_dict` made."""
        return cls(data["setup"], [ComparisonRow.from_dict(row) for row in data["rows"]], data["notes"])

    def __str__(self) -> str:
        parts = [table(cells) for cells in [quality_cells(self.rows)] if cells]
        parts += [f"{row.cache}: not measured: {row.failed}" for row in self.rows if row.failed]
        parts.append(
            "{windows} windows of {context:,} tokens, {model} ({dtype}, attention {attention}) on {device}; KL (nats) "
            "and top-1 over the last {steps:,}, one by one; greedy over {new_tokens} tokens".format(**self.setup)
        )
        further = (retrieval_cells(self.rows), acceptance_cells(self.rows))
        parts += [f"\n{table(cells)}" for cells in further if cells]
        return printable("\n".join(parts + [f"note: {note}" for note in self.notes]))
