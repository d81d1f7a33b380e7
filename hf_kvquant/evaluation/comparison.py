"""`compare`: what each cache costs a model in quality, on text, beside transformers' unquantized cache."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from ..calibration_data import tokenizer_beside
from ..hosts.configuration import longest_sequence
from ..hosts.fake_quantization import disable_fake_quantization
from ..hosts.modes import evaluating
from ..hosts.wrappers import without_data_parallelism, without_wrapper
from .acceptance import PLACES, AcceptanceRun
from .attempt import attempt
from .caches import DEFAULT_FORMATS, DENSE, Candidate, Formats, candidates
from .generating import check_amounts
from .machine import git_commit
from .quality import QualityRun
from .resume import check_place, read_rows, write_json
from .retrieval import Probe, make_probes, measure_retrieval
from .rows import Comparison, ComparisonRow
from .setup import model_setup
from .windows import read_windows


def compare(
    model: PreTrainedModel,
    data: Any,
    *,
    formats: Formats = DEFAULT_FORMATS,
    tokenizer: Any = None,
    context: int = 1024,
    num_windows: int = 8,
    new_tokens: int = 64,
    steps: int | None = None,
    retrieval: Sequence[int] = (),
    speculation: PreTrainedModel | bool = False,
    save: str | os.PathLike[str] | None = None,
    on_row: Callable[[ComparisonRow], None] | None = None,
) -> Comparison:
    """Measure what caches cost `model` on text: transformers' unquantized one, its quantized ones, and ours.

    Every cache reads the same windows beside an unquantized one, all under the model's attention: load it with
    `attn_implementation="kvquant"` to judge attention over pages, with another to judge storage alone. A cache that
    fails (not installed, out of memory) is a row that says so.

    Args:
        model: a causal language model. Where compressed-tensors rounds K and V inside it, that is switched off for the
            life of the model.
        data: as in `calibrate`: a text, JSON or JSONL file, a data set's name, texts, conversations, token ids, or
            batches.
        formats: values of `kv_cache_dtype`; or the names of rows and their options, the fields of `KVQuantConfig`.
        tokenizer: for text; None for the one beside the model.
        context: tokens of a window; a shorter text is passed over, a longer one gives several.
        num_windows: how many windows are read, or fewer if there are not as many.
        new_tokens: length of the greedy continuations, at most half of `context`.
        steps: tokens at the end of each window that are read one by one, the costly part; None for half of `context`.
        retrieval: lengths in tokens over which facts are to be found again, see `evaluation.retrieval`. The beginning
            of the data hides them, which needs as many tokens as the longest.
        speculation: whether to count how many drafted tokens are accepted in the greedy continuations: those of prompt
            lookup and, if a model is given here, those of this assistant.
        save: a JSON file, written after every row. If it is there, the rows in it are taken over if they belong to the
            same model, text and versions; what failed is tried again.
        on_row: called with every row as it is done.

    Raises ValueError for no data, data shorter than `context`, options that do not fit, a model without a causal head,
    and a file of another comparison; TypeError for data of an unknown kind, and for what is no model.
    """
    model = without_data_parallelism(model)
    if not isinstance(speculation, bool):
        speculation = without_data_parallelism(speculation)
    check_comparison(model, formats, context, num_windows, new_tokens, steps, retrieval, save)
    steps = context - context // 2 if steps is None else steps
    compared = candidates(model, formats)
    windows, pieces = read_windows(data, model, tokenizer, context, num_windows, max(retrieval, default=0))
    probes = _probes(model, pieces, tokenizer, retrieval) if retrieval else []
    assistant = None if isinstance(speculation, bool) else speculation
    prompts = [window[: context // 2] for window in windows]
    drafting = AcceptanceRun(model, assistant, prompts, new_tokens) if speculation else None
    of_assistant = None if assistant is None else candidates(assistant, formats)
    setup = {
        **model_setup(model),
        "text": _digest([*windows, *pieces]),
        "context": context,
        "windows": len(windows),
        "new_tokens": new_tokens,
        "steps": steps,
        "retrieval": list(retrieval),
        "speculation": bool(speculation) if assistant is None else model_setup(assistant),
    }
    saved = {row.cache: row for row in read_rows(save, setup, ComparisonRow.from_dict)}
    setup["commit"] = git_commit()  # to be told, not compared: rows are taken over from one to the next
    models = [model] if assistant is None else [model, assistant]
    notes = [note for each in models for note in disable_fake_quantization(without_wrapper(each))]
    if len(windows) < num_windows:
        notes.append(f"only {len(windows)} of the {num_windows} windows asked for: there is no more data")
    rows: list[ComparisonRow] = []
    with evaluating(*models), tqdm(total=len(compared) * len(windows), unit="window", disable=None) as bar:
        quality = QualityRun(model, windows, new_tokens, steps, on_window=bar.update)
        measuring = _Measuring(model, quality, context, probes, drafting)
        for index, candidate in enumerate(compared):
            bar.set_description(candidate.name)
            row = saved.get(candidate.name)
            if row is None or row.options != candidate.options:
                row = ComparisonRow(candidate.name, candidate.options)
            row = measuring.completed(row, candidate, None if of_assistant is None else of_assistant[index])
            rows.append(row)
            bar.update((index + 1) * len(windows) - bar.n)  # of rows that were saved, or failed
            if save is not None:
                later = [saved[other.name] for other in compared[index + 1 :] if other.name in saved]
                write_json(save, Comparison(setup, [*rows, *later], notes).to_dict())
            if on_row is not None:
                on_row(row)
    return Comparison(setup, rows, notes)


@dataclass(frozen=True)
class _Measuring:
    """Everything that is measured of a cache."""

    model: PreTrainedModel
    quality: QualityRun
    context: int
    probes: list[Probe]
    drafting: AcceptanceRun | None

    def completed(self, row: ComparisonRow, candidate: Candidate, of_assistant: Candidate | None) -> ComparisonRow:
        """The row of a cache with what it lacks, or with the reason why it still does."""
        quality, failed = row.quality, ""
        if quality is None:
            quality, failed = attempt(lambda: self.quality.measure(lambda: candidate.make(self.context)))
        if failed:
            return replace(row, failed=failed)
        row, failures = replace(row, quality=quality), []
        if self.probes and not row.retrieval:
            found, failed = attempt(lambda: measure_retrieval(self.model, self.probes, candidate.make))
            row = replace(row, retrieval=found or [])
            failures += [f"retrieval: {failed}"] if failed else []
        drafting = self.drafting
        if drafting is not None and not row.acceptance:
            make_of_assistant = None if of_assistant is None else of_assistant.make
            places = PLACES if candidate.name != DENSE else PLACES[-1:]
            accepted, failed = attempt(lambda: drafting.measure(candidate.make, make_of_assistant, places))
            row = replace(row, acceptance=accepted or [])
            failures += [f"speculation: {failed}"] if failed else []
        return replace(row, failed="; ".join(failures))


def _digest(pieces: Sequence[torch.Tensor]) -> str:
    return hashlib.sha256(torch.cat([piece.cpu() for piece in pieces]).numpy().tobytes()).hexdigest()


def _probes(
    model: PreTrainedModel, pieces: Sequence[torch.Tensor], tokenizer: Any, lengths: Sequence[int]
) -> list[Probe]:
    tokenizer = tokenizer_beside(model) if tokenizer is None else tokenizer
    # Only the first token of a text says that it begins.
    text = torch.cat([piece[int(piece[:1].tolist() == [tokenizer.bos_token_id]) :].cpu() for piece in pieces])
    return make_probes(text, tokenizer, lengths)


def check_comparison(
    model: PreTrainedModel,
    formats: Formats,
    context: int,
    num_windows: int,
    new_tokens: int,
    steps: int | None,
    retrieval: Sequence[int],
    save: str | os.PathLike[str] | None,
) -> None:
    """Raise what `compare` raises for arguments that do not fit; `model` may be on the meta device."""
    lengths = {"context": [context], **({"retrieval": retrieval} if retrieval else {})}
    check_amounts(model, lengths, least=16)
    check_amounts(model, {"num_windows": [num_windows], "new_tokens": [new_tokens]})
    check_amounts(model, {} if steps is None else {"steps": [steps]})
    longest = longest_sequence(model.config)
    for name, values in lengths.items():
        if longest is not None and max(values) > longest:
            raise ValueError(f"{name}: {max(values)}; the model is made for {longest} tokens (max_position_embeddings)")
    if new_tokens > context // 2:
        raise ValueError(f"new_tokens={new_tokens}; at most half of context={context}, the other half is the prompt")
    if steps is not None and steps >= context:
        raise ValueError(f"steps={steps}; it must be less than context={context}: what comes before is the prompt")
    candidates(model, formats)
    check_place(save)
