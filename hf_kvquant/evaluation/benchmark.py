"""`bench`: how fast a model generates over each cache, and in how much memory, beside transformers'."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product

import torch
from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from ..hosts.devices import input_device
from ..hosts.fake_quantization import disable_fake_quantization
from ..hosts.wrappers import without_data_parallelism, without_wrapper
from .attempt import attempt
from .caches import DEFAULT_FORMATS, Formats
from .generating import (
    as_generating,
    check_generating,
    generating_candidates,
    generating_setup,
    random_ids,
    starting_at,
    usual_contexts,
)
from .resume import read_rows, write_json
from .speed import Benchmark, BenchRow
from .timing import generate_once

_CONTEXTS = (1024, 4096)


def bench(
    model: PreTrainedModel,
    *,
    formats: Formats = DEFAULT_FORMATS,
    contexts: Sequence[int] | None = None,
    batches: Sequence[int] = (1,),
    new_tokens: int = 32,
    rounds: int = 3,
    name: str | None = None,
    save: str | os.PathLike[str] | None = None,
    on_row: Callable[[BenchRow], None] | None = None,
) -> Benchmark:
    """Measure how fast `model` generates over each cache, and with how much memory.

    In every round each cache gets its turn: transformers' unquantized one, ours in each format, transformers' quantized
    ones. Ours run under our attention, the others under the model's own, sdpa if that is ours. A first round warms up
    and does not count. `generate` compiles where it does so by itself: on GPUs over caches at fixed addresses, which
    ours then are, and transformers' `StaticCache` is measured too. A cache that fails (not installed, out of memory)
    is a row that says so.

    Args:
        model: a causal language model; random weights will do. It gets its attention and mode back.
        formats: values of `kv_cache_dtype`; or the names of rows and their options, the fields of `KVQuantConfig`.
        contexts: tokens of a prompt; they are random, and read in one go. By default 1,024 and 4,096, if the model is
            made for them; if it is for neither, half of what it is made for.
        batches: sequences at a time.
        new_tokens: how many are generated, at least 6: the first five only set the pace.
        rounds: how often.
        name: what the model is called in the result; by default its path.
        save: a JSON file, written after every run. If it is there, the runs in it are taken over if they belong to the
            same model, machine, versions and commit; rows that failed are tried again.
        on_row: called with every row as it is done.

    Raises ValueError for amounts that do not fit, a model without a causal head, and a file of another measurement;
    TypeError for what is no transformers model.
    """
    model = without_data_parallelism(model)
    check_generating(model, formats, contexts, batches, new_tokens, rounds, save)
    contexts = contexts or usual_contexts(model, _CONTEXTS, new_tokens)
    compared = generating_candidates(model, formats)
    setup = generating_setup(model, name, new_tokens)
    rows = {(row.cache, row.batch, row.context): row for row in read_rows(save, setup, BenchRow.from_dict)}
    notes = disable_fake_quantization(without_wrapper(model))
    cells = list(product(batches, contexts))
    for (batch, context), candidate in product(cells, compared):
        place = candidate.name, batch, context
        found = rows.get(place)
        if found is None or found.failed or found.options != candidate.options:
            rows[place] = BenchRow(candidate.name, candidate.options, batch, context, [])

    def result() -> Benchmark:
        return Benchmark(setup, list(rows.values()), notes)

    with as_generating(model) as attend, tqdm(total=len(cells) * len(compared) * rounds, disable=None) as bar:
        for batch, context in cells:
            if input_device(model).type != "cpu":
                torch.compiler.reset()  # after a few sizes it would no longer compile for another
            ids = random_ids(model, batch, context)
            for index in range(-1, rounds):
                for candidate in starting_at(index, compared):
                    place = candidate.name, batch, context
                    row = rows[place]
                    bar.set_description(f"{batch} x {context:,} {candidate.name}", refresh=False)
                    bar.update(index >= 0)
                    if not _is_due(row, index, rounds):
                        continue
                    attend(candidate)
                    run, failed = attempt(partial(generate_once, model, candidate.make, ids, new_tokens))
                    if index < 0 and not failed:
                        continue
                    runs = row.runs if run is None else [*row.runs, run]
                    rows[place] = row = dataclasses.replace(row, runs=runs, failed=failed)
                    if save is not None:
                        write_json(save, result().to_dict())
                    if on_row is not None and (failed or len(runs) == rounds):
                        on_row(row)
    return result()


def _is_due(row: BenchRow, index: int, rounds: int) -> bool:
    """Whether a row that did not fail lacks the run of this round; of any round in -1, which warms up."""
    done = len(row.runs)
    return not row.failed and done < rounds and (index < 0 or done <= index)
