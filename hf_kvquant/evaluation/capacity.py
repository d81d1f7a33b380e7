"""`measure_capacity`: the largest batch and the longest context that a GPU's memory holds, for each cache."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from ..hosts.configuration import longest_sequence
from ..hosts.devices import input_device
from ..hosts.fake_quantization import disable_fake_quantization
from ..hosts.wrappers import without_data_parallelism, without_wrapper
from ..pools import OutOfPagesError
from .attempt import attempt
from .caches import DEFAULT_FORMATS, DENSE, Candidate, Formats
from .generating import (
    as_generating,
    check_generating,
    generating_candidates,
    generating_setup,
    random_ids,
    usual_contexts,
)
from .resume import read_rows, write_json
from .text import told
from .timing import SETTLING, generate_once

_CONTEXTS = (8192,)
_NEW_TOKENS = SETTLING + 2
_TOKENS = 256  # contexts are multiples of it
_MOST = 1 << 20  # of either, where the model sets no bound
_PRECISION = 32  # the answer is right to one part in so many


@dataclass(frozen=True)
class CapacityRow:
    """The most that one cache leaves room for.

    Attributes:
        cache: its name.
        options: what it was made with, as JSON.
        batch: sequences; None if that is what was looked for.
        context: tokens of each prompt; None if that is what was looked for.
        largest: the largest value found of whichever is None; 0 if none fits.
        bounded: whether memory ended it, not what the model is made for.
        failed: the exception that ended it, "" if none did.
    """

    cache: str
    options: dict[str, Any]
    batch: int | None
    context: int | None
    largest: int = 0
    bounded: bool = True
    failed: str = ""

    def __str__(self) -> str:
        return f"{self.cache}, {self.question}"

    @property
    def question(self) -> str:
        """What was looked for."""
        if self.batch is None:
            return f"largest batch at {self.context:,} tokens"
        return f"longest context at batch {self.batch}"


@dataclass(frozen=True)
class Capacity:
    """Caches side by side. `str(capacity)` is a table.

    Attributes:
        setup: model, machine and versions that the numbers belong to.
        rows: one per cache and question.
        notes: what the user should know of.
    """

    setup: dict[str, Any]
    rows: list[CapacityRow]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Capacity:
        """From what `to_dict` made."""
        return cls(data["setup"], [CapacityRow(**row) for row in data["rows"]], data["notes"])

    def dense(self, row: CapacityRow) -> CapacityRow | None:
        """The answer of transformers' unquantized cache to the same question, if there is one."""
        found = (other for other in self.rows if other.cache == DENSE and other.question == row.question)
        return next((other for other in found if not other.failed and other.largest), None)

    def table(self) -> list[tuple[str, ...]]:
        """Cells, the header first."""
        rows: list[tuple[str, ...]] = [("cache", "looked for", "largest", "ended by")]
        for row in self.rows:
            if not row.failed:
                dense = self.dense(row)
                ratio = f" ({row.largest / dense.largest:.2f}x)" if dense is not None else ""
                rows.append(
                    (row.cache, row.question, f"{row.largest:,}{ratio}", "memory" if row.bounded else "the model")
                )
        return rows

    def failures(self) -> list[tuple[str, str]]:
        """Which rows there are not, and why."""
        return [(str(row), row.failed) for row in self.rows if row.failed]

    def caption(self) -> str:
        """What the numbers are of."""
        model = "{model} ({dtype})".format(**self.setup)
        return f"{model}: random prompts and a few new tokens, more until memory ran out; to one part in 32"

    def __str__(self) -> str:
        return told(self)


def measure_capacity(
    model: PreTrainedModel,
    *,
    formats: Formats = DEFAULT_FORMATS,
    contexts: Sequence[int] | None = None,
    batches: Sequence[int] = (1,),
    name: str | None = None,
    save: str | os.PathLike[str] | None = None,
    on_row: Callable[[CapacityRow], None] | None = None,
) -> Capacity:
    """Find the largest batch at each context and the longest context at each batch before a GPU's memory runs out.

    By generating a few tokens after prompts of random ones, twice as many each time, then by bisection, to one part in
    32. Arguments are those of `bench`; contexts are 8,192 by default.

    Raises ValueError on a CPU, whose memory does not run out but slows everything down, for amounts that do not fit, a
    model without a causal head, and a file of another measurement; TypeError for what is no transformers model.
    """
    model = without_data_parallelism(model)
    check_capacity(model, input_device(model), formats, contexts, batches, save)
    contexts = contexts or usual_contexts(model, _CONTEXTS, _NEW_TOKENS)
    compared = generating_candidates(model, formats)
    setup = generating_setup(model, name, _NEW_TOKENS)
    rows = [row for row in read_rows(save, setup, lambda row: CapacityRow(**row)) if not row.failed]
    notes = disable_fake_quantization(without_wrapper(model))
    questions = [*((None, context) for context in contexts), *((batch, None) for batch in batches)]
    known = {(row.cache, row.batch, row.context): row.options for row in rows}
    with as_generating(model) as attend, tqdm(total=len(questions) * len(compared), disable=None) as bar:
        for batch, context in questions:
            for candidate in compared:
                bar.set_description(candidate.name, refresh=False)
                if known.get((candidate.name, batch, context)) != candidate.options:
                    attend(candidate)
                    row = _row(model, candidate, batch, context)
                    rows.append(row)
                    if save is not None:
                        write_json(save, Capacity(setup, rows, notes).to_dict())
                    if on_row is not None:
                        on_row(row)
                bar.update()
    return Capacity(setup, rows, notes)


def check_capacity(
    model: PreTrainedModel,
    device: torch.device,
    formats: Formats,
    contexts: Sequence[int] | None,
    batches: Sequence[int],
    save: str | os.PathLike[str] | None,
) -> None:
    """Raise what `measure_capacity` raises; `model`, for `device`, may still be on the meta device."""
    check_device(device)
    check_generating(model, formats, contexts, batches, _NEW_TOKENS, 1, save)


def check_device(device: torch.device) -> None:
    """Raise ValueError where memory does not simply run out."""
    if device.type != "cuda":
        raise ValueError(
            f"the model is on {device}: how much fits is found by filling a GPU's memory; for other devices "
            "`hf-kvquant plan MODEL --memory SIZE` computes it"
        )


def _row(model: PreTrainedModel, candidate: Candidate, batch: int | None, context: int | None) -> CapacityRow:
    unit = 1 if batch is None else _TOKENS
    longest = longest_sequence(model.config)
    most = _MOST if batch is None or longest is None else (longest - _NEW_TOKENS)

    def fits(count: int) -> bool:
        return _fits(model, candidate, count if batch is None else batch, count if context is None else context)

    largest, failed = attempt(partial(largest_fitting, fits, unit, most, first=unit, precision=_PRECISION))
    row = CapacityRow(candidate.name, candidate.options, batch, context, largest or 0, failed=failed)
    return dataclasses.replace(row, bounded=row.largest + unit <= most)


def _fits(model: PreTrainedModel, candidate: Candidate, batch: int, context: int) -> bool:
    if input_device(model).type != "cpu":
        torch.compiler.reset()  # after a few sizes it would no longer compile for another
    try:
        generate_once(model, candidate.make, random_ids(model, batch, context), _NEW_TOKENS)
        return True
    except OutOfPagesError:
        return False
    except RuntimeError as error:
        # Libraries below torch have errors of their own for it.
        if not isinstance(error, torch.OutOfMemoryError) and "out of memory" not in str(error).lower():
            raise
        return False


def largest_fitting(fits: Callable[[int], bool], unit: int, most: int, first: int, precision: int) -> int:
    """The largest multiple of `unit`, up to `most`, that fits; 0 if not even `unit` does.

    By doubling `first`, then bisection to one part in `precision`. What is larger than something that does not fit is
    not tried.
    """
    most -= most % unit
    below, above = 0, most + unit
    while above - below > max(unit, below // precision // unit * unit):
        doubled = 2 * below or first
        middle = (below + above) // 2 // unit * unit
        trial = min(doubled, most) if above > most else middle
        if fits(trial):
            below = trial
        else:
            above = trial
    return below
