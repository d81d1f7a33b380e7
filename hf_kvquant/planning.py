"""`plan_memory`: what a cache takes, by batch and format, and what fits into a device's memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .cache import QuantizedPagedCache
from .checkpoints.files import CheckpointFiles
from .config import KVQuantConfig, is_integer
from .hosts.configuration import longest_sequence
from .layers import PagedLayer
from .policy import SidePlan
from .skeleton import LayerShape, layer_shapes, model_skeleton
from .tables import printable, size, table

# What the cache can be stored as, and what decides its size about it.
_FORMATS = {
    "model": SidePlan("model", "none", ""),
    "8-bit, static scales": SidePlan("int8", "static", ""),
    "8-bit, dynamic scales": SidePlan("int8", "dynamic", ""),
}
_MAX_TOKENS = 2**40


@dataclass(frozen=True)
class FormatPlan:
    """One format: bytes of the cache by batch size, and what fits (None without a bound on memory).

    Attributes:
        format: its name, with the kind of scales. fp8 and int8 take the same.
        cache_bytes: for each batch size of the plan, at its context.
        largest_batch: at its context.
        largest_context: tokens of a sequence, for each batch size; None where the model sets no bound either.
    """

    format: str
    cache_bytes: list[int]
    largest_batch: int | None
    largest_context: list[int | None]


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of a model's cache. `str()` is a table.

    Attributes:
        model: directory or hub id.
        dtype: of its weights, and of a cache without quantization.
        context: tokens of a sequence.
        batches: sequences.
        memory: bytes of the device, None if not given.
        weight_bytes: what the weights take of it.
        formats: one entry per format.
        notes: what is not counted.
    """

    model: str
    dtype: str
    context: int
    batches: list[int]
    memory: int | None
    weight_bytes: int
    formats: list[FormatPlan]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        names = [f"{self.dtype}" if row.format == "model" else row.format for row in self.formats]
        rows = [("batch", *names)]
        for column, batch in enumerate(self.batches):
            rows.append((str(batch), *(size(row.cache_bytes[column]) for row in self.formats)))
        lines = [f"{self.model}: cache of {self.context:,} tokens a sequence", table(rows)]
        if self.memory is not None:
            free = max(self.memory - self.weight_bytes, 0)
            lines.append(f"{size(self.memory)} less {size(self.weight_bytes)} of weights leaves {size(free)}:")
            fits = [("", *names)]
            fits.append(
                (f"largest batch at {self.context:,} tokens", *(f"{row.largest_batch:,}" for row in self.formats))
            )
            for column, batch in enumerate(self.batches):
                contexts = (row.largest_context[column] for row in self.formats)
                cells = ("any" if tokens is None else f"{tokens:,}" for tokens in contexts)
                fits.append((f"largest context at batch {batch}", *cells))
            lines.append(table(fits))
        return printable("\n".join(lines + [f"note: {note}" for note in self.notes]))


def plan_memory(
    source: str | os.PathLike[str],
    *,
    context: int | None = None,
    batches: Sequence[int] = (1, 8, 32, 128),
    memory: int | None = None,
    revision: str | None = None,
) -> MemoryPlan:
    """How much memory the cache of a model takes, and how large a batch and context fit.

    Args:
        source: directory or hub id; only its configuration and the sizes of its files are read.
        context: tokens of a sequence; by default what the model is made for.
        batches: numbers of sequences.
        memory: bytes of the device; the weights are taken off, activations are not counted.
        revision: of a hub id.

    Raises ValueError for numbers that are no positive integers, and for a source without a configuration; TypeError for
    batches that are no list, and for a source that is no name.
    """
    model = model_skeleton(source, revision)
    config = model.config.get_text_config(decoder=True)
    bound = longest_sequence(config)
    context = context if context is not None else bound or 4096
    if isinstance(batches, str) or not isinstance(batches, Iterable):
        raise TypeError(f"batches={batches!r}; give a list, such as [{batches}]")
    batches = list(batches)
    if not batches:
        raise ValueError("batches is empty; give at least one")
    for name, value in (("context", context), *(("batch", batch) for batch in batches)):
        if not is_integer(value) or value < 1:
            raise ValueError(f"{name} is {value!r}; it must be a positive integer")
    if memory is not None and (not is_integer(memory) or memory < 1):
        raise ValueError(f"memory is {memory!r}; it must be a positive integer, in bytes")
    context, batches = int(context), [int(batch) for batch in batches]
    shapes, guesses = layer_shapes(model)
    are_paged = [isinstance(layer, PagedLayer) for layer in QuantizedPagedCache(config).layers]
    dtype = config.dtype
    weight_bytes, notes = _weight_bytes(source, revision, model)
    notes = [*guesses, *notes]
    if states := sum(shape.keeps_more for shape in shapes):
        notes.append(f"{states} layers keep a state beside keys and values, or instead of them, which is not counted")
    if model.config.is_encoder_decoder:
        notes.append(_of_cross_attention(shapes, dtype))
    if kept := sum(not paged and shape.numbers_per_token > 0 for shape, paged in zip(shapes, are_paged, strict=True)):
        notes.append(f"{kept} layers stay as transformers has them, in the model's dtype whatever the format")
    notes.append("activations are not counted")
    if memory is not None and weight_bytes >= memory:
        notes.append("the weights alone do not fit; give the memory of all devices that share them")
    formats = []
    for name, plan in _FORMATS.items():

        def needed(batch: int, tokens: int, plan: SidePlan = plan) -> int:
            return batch * sum(
                _layer_bytes(shape, plan if is_paged else _FORMATS["model"], tokens, dtype)
                for shape, is_paged in zip(shapes, are_paged, strict=True)
            )

        free = None if memory is None else memory - weight_bytes
        formats.append(
            FormatPlan(
                name,
                [needed(batch, context) for batch in batches],
                None if free is None else max(free, 0) // max(needed(1, context), 1),
                [_largest_context(needed, batch, free, bound) for batch in batches],
            )
        )
    dtype_name = str(dtype).removeprefix("torch.")
    return MemoryPlan(str(source), dtype_name, context, batches, memory, weight_bytes, formats, notes)


def _layer_bytes(shape: LayerShape, plan: SidePlan, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of one sequence in a layer."""
    kept, index = shape.num_tokens(tokens), shape.index_dim * tokens * dtype.itemsize
    if plan.format != "model":  # whole pages; the newest page of a window may be all but empty
        page_size = KVQuantConfig.page_size
        kept = -(-kept // page_size) * page_size + (page_size if kept < tokens else 0)
    return kept * shape.bytes_per_token(plan, plan, dtype) + index


def _of_cross_attention(shapes: Sequence[LayerShape], dtype: torch.dtype) -> str:
    """A note: how long an encoder's text will be is not known."""
    layers = [shape.cross_attention for shape in shapes if shape.cross_attention is not None]
    note = "keys and values of cross-attention are not counted"
    if not layers:
        return note
    stored, quantized = (
        size(sum(layer.bytes_per_token(plan, plan, dtype) for layer in layers))
        # No checkpoint has scales for them.
        for plan in (_FORMATS["model"], _FORMATS["8-bit, dynamic scales"])
    )
    return f"{note}: a token of the encoder takes {stored}, or {quantized} in 8 bits"


def _largest_context(needed: Callable[[int, int], int], batch: int, free: int | None, bound: int | None) -> int | None:
    """Most tokens that fit, at most what the model is made for; None where neither sets a bound."""
    if free is None:
        return bound
    highest = bound or _MAX_TOKENS
    if needed(batch, highest) <= free:
        return bound
    low, high = 0, highest
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if needed(batch, middle) <= free else (low, middle)
    return low


def _weight_bytes(source: str | os.PathLike[str], revision: str | None, model: Any) -> tuple[int, list[str]]:
    """Bytes of the weights: of the files, or where these are not here, what the model has in its dtype."""
    try:
        files = CheckpointFiles.find(source, revision, fetch=False)
        sizes = [(Path(files.path) / file).stat().st_size for file in set(files.tensors.values())]
    except (FileNotFoundError, ValueError):
        sizes = []
    if sizes:
        return sum(sizes), []
    dtype = model.config.get_text_config(decoder=True).dtype
    count = sum(parameter.numel() for parameter in model.parameters())
    return count * dtype.itemsize, [
        "the weight files are not here; the size of the weights is that of the model's dtype"
    ]
