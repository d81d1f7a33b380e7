"""`compare`: what each cache costs a model in quality, on text, beside the host's unquantized cache."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..hosts import disable_fake_quantization, without_wrapper
from ..tables import table
from .agreement import Agreement
from .attempt import attempt
from .caches import DEFAULT_FORMATS, DENSE, Formats, candidates
from .quality import Quality, QualityRun
from .resume import read_rows, write_json
from .setup import model_setup
from .windows import windows_of


@dataclass(frozen=True)
class ComparisonRow:
    """One cache of a comparison.

    Attributes:
        cache: its name.
        options: what it was made with, as JSON.
        quality: its numbers; None if it could not be measured.
        failed: then the exception that ended it.
    """

    cache: str
    options: dict[str, Any]
    quality: Quality | None = None
    failed: str = ""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ComparisonRow:
        """A row from what `dataclasses.asdict` made of one."""
        if data["quality"] is None:
            return cls(**data)
        agreements = {name: Agreement(**data["quality"][name]) for name in ("steps", "chunks")}
        return cls(**{**data, "quality": Quality(**{**data["quality"], **agreements})})


@dataclass(frozen=True)
class Comparison:
    """Caches side by side. `str(comparison)` is a table.

    Attributes:
        setup: model, text and versions that the numbers belong to.
        rows: one a cache; the first is the host's unquantized one.
        notes: what the user should know of.
    """

    setup: dict[str, Any]
    rows: list[ComparisonRow]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        header = (
            "cache", "scales", "bytes held", "perplexity", "in chunks", "KL", "top-1", "greedy", "differs at",
            "worst K error", "worst V error", "worst attention error", "clipped",
        )  # fmt: skip
        measured = {row.cache: row.quality for row in self.rows if row.quality is not None}
        dense = measured.get(DENSE)
        lines = [table([header, *(_cells(name, quality, dense) for name, quality in measured.items())])]
        lines += [f"{row.cache}: not measured: {row.failed}" for row in self.rows if row.failed]
        lines.append(
            "{windows} windows of {context:,} tokens, {model} ({dtype}, attention {attention}) on {device}; KL (nats) "
            "and top-1 over the last {steps:,}, one by one; greedy over {new_tokens} tokens".format(**self.setup)
        )
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


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
    save: str | os.PathLike[str] | None = None,
    on_row: Callable[[ComparisonRow], None] | None = None,
) -> Comparison:
    """Measure what caches cost `model` on text: the host's unquantized one, its quantized ones, and ours.

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
        save: a JSON file, written after every row. If it is there, the rows in it are taken over if they belong to the
            same model, text and versions; those that failed are tried again.
        on_row: called with every row as it is done.

    Raises ValueError for no data, data shorter than `context`, options that do not fit, a model without a causal head,
    and a file of another comparison; TypeError for data of an unknown kind.
    """
    _check_amounts(model, context, num_windows, new_tokens, steps)
    steps = context - context // 2 if steps is None else steps
    compared = candidates(model, formats)
    windows = windows_of(data, model, tokenizer, context, num_windows)
    setup = {
        **model_setup(model),
        "text": hashlib.sha256(torch.stack(windows).cpu().numpy().tobytes()).hexdigest(),
        "context": context,
        "windows": len(windows),
        "new_tokens": new_tokens,
        "steps": steps,
    }
    path = None if save is None else Path(save)
    saved = [] if path is None else read_rows(path, setup, ComparisonRow.from_dict)
    done = {row.cache: row for row in saved if not row.failed}
    notes = disable_fake_quantization(without_wrapper(model))
    if len(windows) < num_windows:
        notes.append(f"only {len(windows)} of the {num_windows} windows asked for: there is no more data")
    rows: list[ComparisonRow] = []
    was_training = model.training
    model.eval()
    try:
        run = QualityRun(model, windows, new_tokens, steps)
        for index, candidate in enumerate(compared):
            row = done.get(candidate.name)
            if row is None or row.options != candidate.options:
                quality, failed = attempt(partial(run.measure, partial(candidate.make, context)))
                row = ComparisonRow(candidate.name, candidate.options, quality, failed)
            rows.append(row)
            if path is not None:
                later = [done[other.name] for other in compared[index + 1 :] if other.name in done]
                write_json(path, Comparison(setup, [*rows, *later], notes).to_dict())
            if on_row is not None:
                on_row(row)
    finally:
        model.train(was_training)
    return Comparison(setup, rows, notes)


def _check_amounts(model: PreTrainedModel, context: int, num_windows: int, new_tokens: int, steps: int | None) -> None:
    if model.config.is_encoder_decoder or not model.can_generate():
        raise ValueError(f"{type(model).__name__} is not a causal language model, whose next tokens can be compared")
    amounts = {
        "context": (context, 16),
        "num_windows": (num_windows, 1),
        "new_tokens": (new_tokens, 1),
        "steps": (1 if steps is None else steps, 1),
    }
    for name, (value, least) in amounts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}={value!r}; it must be an integer of at least {least}")
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if isinstance(longest, int) and context > longest:
        raise ValueError(f"context={context}, but the model is made for {longest} tokens (max_position_embeddings)")
    if new_tokens > context // 2:
        raise ValueError(f"new_tokens={new_tokens}; at most half of context={context}, the other half is the prompt")
    if steps is not None and steps >= context:
        raise ValueError(f"steps={steps}; it must be less than context={context}: what comes before is the prompt")


def _cells(name: str, quality: Quality, dense: Quality | None) -> tuple[str, ...]:
    """A row of the table."""
    share = f" ({quality.bytes_held / dense.bytes_held:.2f}x)" if dense is not None else ""
    places = [place for place in quality.first_divergence if place is not None]
    worst = [
        max((error for error in errors if error is not None), default=0.0)
        for errors in (quality.k_error, quality.v_error, quality.attention_error)
    ]
    return (
        name, "-" if quality.scales is None else " / ".join(quality.scales), f"{quality.bytes_held:,}{share}",
        f"{quality.steps.perplexity:.4f}", f"{quality.chunks.perplexity:.4f}",
        f"{quality.steps.kl_divergence:.2e}", f"{quality.steps.top1_agreement:.2%}", f"{quality.greedy_match:.2%}",
        str(min(places)) if places else "-", *(f"{error:.3%}" for error in worst),
        "-" if quality.clipped is None else f"{sum(quality.clipped):,}",
    )  # fmt: skip
