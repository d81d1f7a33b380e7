"""How fast each cache lets a model generate: rows of runs, and what they amount to."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..tables import size
from .caches import DENSE
from .text import told
from .timing import Run


@dataclass(frozen=True)
class BenchRow:
    """One cache at one batch and context.

    Attributes:
        cache: its name.
        options: what it was made with, as JSON.
        batch: sequences.
        context: tokens of each prompt.
        runs: one per round.
        failed: the exception that ended it, "" if none did.
    """

    cache: str
    options: dict[str, Any]
    batch: int
    context: int
    runs: list[Run]
    failed: str = ""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> BenchRow:
        """A row from what `to_dict` made of one."""
        known = {field.name: data[field.name] for field in dataclasses.fields(cls)}
        return cls(**{**known, "runs": [Run(**run) for run in data["runs"]]})

    def __str__(self) -> str:
        return f"{self.cache}, {self.place}"

    @property
    def place(self) -> str:
        """Batch and context, for people."""
        return f"{self.batch} x {self.context:,}"

    @property
    def tokens_per_s(self) -> float:
        """New tokens of all sequences a second, from the sixth token on; the median of the rounds."""
        return statistics.median(map(self._speed, self.runs))

    @property
    def first_token_s(self) -> float:
        """Seconds to the first token; the median of the rounds."""
        return statistics.median(run.first_token_s for run in self.runs)

    def inter_token_ms(self, percentile: float) -> float:
        """Milliseconds between tokens, of all rounds together."""
        return float(np.percentile([ms for run in self.runs for ms in run.inter_token_ms], percentile))

    @property
    def cache_bytes(self) -> int:
        """What the cache held in the end."""
        return max(run.cache_bytes for run in self.runs)

    @property
    def peak_bytes(self) -> int | None:
        """The highest peak of the rounds; None where the system does not tell."""
        return max((run.peak_bytes for run in self.runs if run.peak_bytes is not None), default=None)

    @property
    def compiled(self) -> bool:
        """Whether `generate` compiled its steps."""
        return any(run.compiled for run in self.runs)

    def speed_over(self, other: BenchRow) -> float:
        """How many times as many tokens a second as `other`: the median over rounds that both have."""
        pairs = zip(self.runs, other.runs, strict=False)
        return statistics.median(self._speed(run) / self._speed(beside) for run, beside in pairs)

    def _speed(self, run: Run) -> float:
        return self.batch * 1e3 / statistics.mean(run.inter_token_ms)

    def to_dict(self, dense: BenchRow | None = None) -> dict[str, Any]:
        """For JSON; beside the runs what they amount to, with ratios to `dense` if given."""
        medians: dict[str, Any] = {}
        if self.runs and not self.failed:
            medians = {
                "tokens_per_s": self.tokens_per_s,
                "tokens_per_s_ratio": None if dense is None else self.speed_over(dense),
                "first_token_s": self.first_token_s,
                "inter_token_ms": {f"p{p}": self.inter_token_ms(p) for p in (50, 90, 99)},
                "cache_bytes": self.cache_bytes,
                "peak_bytes": self.peak_bytes,
                "compiled": self.compiled,
            }
        return {**dataclasses.asdict(self), "summary": medians}


@dataclass(frozen=True)
class Benchmark:
    """Caches side by side. `str(benchmark)` is a table.

    Attributes:
        setup: model, machine and versions that the numbers belong to.
        rows: one per cache, batch and context.
        notes: what the user should know of.
    """

    setup: dict[str, Any]
    rows: list[BenchRow]
    notes: list[str]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Benchmark:
        """From what `to_dict` made."""
        return cls(data["setup"], [BenchRow.from_dict(row) for row in data["rows"]], data["notes"])

    def dense(self, row: BenchRow) -> BenchRow | None:
        """The row of transformers' unquantized cache at the same batch and context, if it was measured."""
        for other in self.rows:
            if other.cache == DENSE and (other.batch, other.context) == (row.batch, row.context) and other.runs:
                return None if other.failed else other
        return None

    def failures(self) -> list[tuple[str, str]]:
        """Which rows there are not, and why: one entry for a cache that failed everywhere for the same reason."""
        places: dict[tuple[str, str], list[str]] = {}
        for row in self.rows:
            if row.failed:
                places.setdefault((row.cache, row.failed), []).append(row.place)
        cells = {row.place for row in self.rows}
        return [
            (cache if len(where) == len(cells) else f"{cache}, {', '.join(where)}", why)
            for (cache, why), where in places.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        rows = [row.to_dict(self.dense(row)) for row in self.rows]
        return {"setup": self.setup, "rows": rows, "notes": self.notes}

    def table(self) -> list[tuple[str, ...]]:
        """Cells, the header first."""
        header = (
            "cache", "batch", "context", "tokens/s", "first token, s", "inter-token ms: median", "p90", "p99",
            "bytes held", "peak",
        )  # fmt: skip
        return [header, *(self._cells(row) for row in self.rows if row.runs and not row.failed)]

    def _cells(self, row: BenchRow) -> tuple[str, ...]:
        dense = self.dense(row)
        speed, held = f"{row.tokens_per_s:,.1f}", size(row.cache_bytes)
        if dense is not None:
            speed += f" ({row.speed_over(dense):.2f}x)"
            held += f" ({row.cache_bytes / dense.cache_bytes:.2f}x)"
        return (
            row.cache + (" compiled" if row.compiled else ""), str(row.batch), f"{row.context:,}", speed,
            f"{row.first_token_s:.3f}", *(f"{row.inter_token_ms(p):.2f}" for p in (50, 90, 99)), held,
            "-" if row.peak_bytes is None else size(row.peak_bytes),
        )  # fmt: skip

    def caption(self) -> str:
        """What the numbers are of."""
        peak = self.setup["peak_memory"]
        return (
            "{model} ({dtype}): {new_tokens} tokens after prompts of random ones, caches in turn; medians of rounds, "
            "ratios to {dense}, latencies of all rounds together".format(**self.setup, dense=DENSE)
        ) + (f"; peak: {peak}" if peak else "")

    def __str__(self) -> str:
        return told(self)
