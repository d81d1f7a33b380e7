"""`compare`: what each cache costs a model in quality, on text, beside the host's unquantized cache."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import DynamicCache, PreTrainedModel, QuantizedCache
from transformers.cache_utils import Cache

from ._version import __version__
from .cache import QuantizedPagedCache
from .calibration_data import batches_of
from .config import KVQuantConfig
from .hosts import attention_name, disable_fake_quantization, without_wrapper
from .identity import config_facts, weights_digest
from .tables import table

DENSE = "DynamicCache"
DEFAULT_FORMATS = ("fp8_e4m3", "fp8_e5m2", "int8")
# The host's quantized caches; of the bits that a backend offers, the host's default and, if there is one, 8.
_HOST_CACHES: dict[str, dict[str, Any]] = {
    "transformers fp8": {"backend": "fp8"},
    "transformers quanto 4 bit": {"backend": "quanto", "nbits": 4},
    "transformers hqq 8 bit": {"backend": "hqq", "nbits": 8},
    "transformers hqq 4 bit": {"backend": "hqq", "nbits": 4},
}
# Text in chunks begins with few tokens, as a conversation does: a cache that takes its scales from the first tokens has
# to live with them.
_CHUNKS = (8, 24, 32, 64, 128)
_LATER_CHUNKS = 256


@dataclass(frozen=True)
class Agreement:
    """What a model predicts over a cache, against what it predicts over the unquantized one.

    Attributes:
        perplexity: per token.
        kl_divergence: mean over tokens of KL(unquantized || this cache), in nats. Probabilities are fp32: 1e-7 of
            either sign is nothing.
        top1_agreement: share of tokens whose most likely successor is the same.
    """

    perplexity: float
    kl_divergence: float
    top1_agreement: float


@dataclass(frozen=True)
class Quality:
    """The numbers of one cache.

    Attributes:
        steps: from prompts of half a window on, token by token, as in generation.
        chunks: over whole windows in growing chunks.
        greedy_match: share of equal tokens, place by place, in greedy continuations of the prompts.
        first_divergence: for each window the first place where the continuations differ; None where they never do.
        k_error: for each layer the relative RMS error of what the cache gives back, against what was put in, in the
            last window; None for layers that were given nothing.
        v_error: the same of V.
        clipped: numbers of K and V beyond their static scales, in all windows in chunks; None for the host's caches.
        bytes_held: with one window in it, memory that is held but not used included.
        scales: where the scales of ours come from, every source once; None for the host's caches.
    """

    steps: Agreement
    chunks: Agreement
    greedy_match: float
    first_divergence: list[int | None]
    k_error: list[float | None]
    v_error: list[float | None]
    clipped: int | None
    bytes_held: int
    scales: list[str] | None


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
            "worst K error", "worst V error", "clipped",
        )  # fmt: skip
        measured = {row.cache: row.quality for row in self.rows if row.quality is not None}
        dense = measured.get(DENSE)
        lines = [table([header, *(_cells(name, quality, dense) for name, quality in measured.items())])]
        lines += [f"{row.cache}: not measured: {row.failed}" for row in self.rows if row.failed]
        lines.append(
            "{windows} windows of {context:,} tokens, {model} ({dtype}, attention {attention}) on {device}; KL (nats) "
            "and top-1 token by token after half a window, greedy over {new_tokens} tokens".format(**self.setup)
        )
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def compare(
    model: PreTrainedModel,
    data: Any,
    *,
    formats: Iterable[str | tuple[str, str]] | Mapping[str, Mapping[str, Any]] = DEFAULT_FORMATS,
    tokenizer: Any = None,
    context: int = 1024,
    num_windows: int = 8,
    new_tokens: int = 64,
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
        save: a JSON file, written after every row. If it is there, the rows in it are taken over if they belong to the
            same model, text and versions; those that failed are tried again.
        on_row: called with every row as it is done.

    Raises ValueError for no data, data shorter than `context`, options that do not fit, a model without a causal head,
    and a file of another comparison; TypeError for data of an unknown kind.
    """
    _check_amounts(model, context, num_windows, new_tokens)
    makers = _makers(model, formats, context)
    windows = _windows(model, data, tokenizer, context, num_windows)
    setup = _setup(model, windows, new_tokens)
    path = None if save is None else Path(save)
    done = {} if path is None else _read_rows(path, setup)
    notes = disable_fake_quantization(without_wrapper(model))
    if len(windows) < num_windows:
        notes.append(f"only {len(windows)} of the {num_windows} windows asked for: there is no more data")
    rows: list[ComparisonRow] = []
    was_training = model.training
    model.eval()
    try:
        run = _Run(model, windows, new_tokens)
        for name, (options, make) in makers.items():
            kept = done.get(name)
            row = kept if kept is not None and kept.options == options else run.row(name, options, make)
            rows.append(row)
            if path is not None:
                later = [done[other] for other in list(makers)[len(rows) :] if other in done]
                _write(path, Comparison(setup, [*rows, *later], notes))
            if on_row is not None:
                on_row(row)
    finally:
        model.train(was_training)
    return Comparison(setup, rows, notes)


def chunk_sizes(num_tokens: int) -> list[int]:
    """How many tokens come at a time when text is read in chunks: few, then more; they sum to `num_tokens`."""
    sizes: list[int] = []
    for size in itertools.chain(_CHUNKS, itertools.repeat(_LATER_CHUNKS)):
        left = num_tokens - sum(sizes)
        if left <= size:
            return [*sizes, left] if left else sizes
        sizes.append(size)
    return sizes


def held_bytes(cache: Cache) -> int:
    """Bytes that a cache holds: for ours also pages that are not in use yet, for the host's every tensor it keeps."""
    if isinstance(cache, QuantizedPagedCache):
        return cache.nbytes_allocated
    return sum(_tensor_bytes(list(vars(layer).values())) for layer in cache.layers)


def _tensor_bytes(value: Any) -> int:
    """Bytes of the tensors in `value`: quantized data comes as containers, or as tensors around others."""
    if isinstance(value, torch.Tensor):
        if not hasattr(value, "__tensor_flatten__"):
            return value.nbytes
        return sum(_tensor_bytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    if isinstance(value, dict):
        value = list(value.values())
    return sum(map(_tensor_bytes, value)) if isinstance(value, (list, tuple)) else 0


# -- what is compared --------------------------------------------------------------------------------------------------


def _check_amounts(model: PreTrainedModel, context: int, num_windows: int, new_tokens: int) -> None:
    if model.config.is_encoder_decoder or not model.can_generate():
        raise ValueError(f"{type(model).__name__} is not a causal language model, whose next tokens can be compared")
    amounts = {"context": (context, 16), "num_windows": (num_windows, 1), "new_tokens": (new_tokens, 1)}
    for name, (value, least) in amounts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}={value!r}; it must be an integer of at least {least}")
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if isinstance(longest, int) and context > longest:
        raise ValueError(f"context={context}, but the model is made for {longest} tokens (max_position_embeddings)")
    if new_tokens > context // 2:
        raise ValueError(f"new_tokens={new_tokens}; at most half of context={context}, the other half is the prompt")


_Makers = dict[str, tuple[dict[str, Any], Callable[[], Cache]]]


def _makers(model: PreTrainedModel, formats: Any, context: int) -> _Makers:
    """Name of each cache -> its options as JSON, and a function that makes an empty one."""
    text_config = model.config.get_text_config(decoder=True)
    if isinstance(formats, str):
        raise TypeError(f"formats={formats!r} is text; give a list such as [{formats!r}], or names and their options")
    if not isinstance(formats, Mapping):
        formats = {f"kvquant {' / '.join([f] if isinstance(f, str) else f)}": {"kv_cache_dtype": f} for f in formats}
    makers: _Makers = {DENSE: ({}, partial(DynamicCache, config=text_config))}
    for name, options in formats.items():
        if name == DENSE or name in _HOST_CACHES:
            raise ValueError(f"formats: {name!r} is the name of a cache of transformers, which has a row anyway")
        config = KVQuantConfig.parse(options)
        plain = json.loads(json.dumps(config.to_dict()))
        # As in `generate`, which knows how long a sequence can get: no memory beyond that.
        makers[name] = plain, partial(QuantizedPagedCache.for_generation, model, config, expected_length=context)
    for name, options in _HOST_CACHES.items():
        makers[name] = options, partial(QuantizedCache, config=text_config, **options)
    return makers


def _windows(model: PreTrainedModel, data: Any, tokenizer: Any, context: int, num_windows: int) -> list[torch.Tensor]:
    """The first `num_windows` windows of the data, token ids `[context]` each."""
    windows: list[torch.Tensor] = []
    longest = 0
    # Short texts do not count, so how many have to be read is not known.
    for batch in batches_of(data, model, tokenizer, sys.maxsize, context, 1):
        if "input_ids" not in batch.inputs:
            raise ValueError("compare() needs token ids to predict; these batches have only inputs_embeds")
        ids = batch.inputs["input_ids"]
        masks: Any = itertools.repeat(slice(None)) if batch.mask is None else batch.mask
        for row, mask in zip(ids, masks, strict=False):
            tokens = row[mask]
            longest = max(longest, len(tokens))
            windows += [piece for piece in tokens.split(context) if len(piece) == context]
        if len(windows) >= num_windows:
            break
    if not windows:
        raise ValueError(
            f"the data is shorter than the context: its longest text has {longest} tokens, and windows are of "
            f"context={context}; give longer texts, or a smaller context"
        )
    return [window.to(model.device) for window in windows[:num_windows]]


def _setup(model: PreTrainedModel, windows: Sequence[torch.Tensor], new_tokens: int) -> dict[str, Any]:
    facts = json.dumps(config_facts(model.config), sort_keys=True).encode()
    return {
        "model": str(getattr(model, "name_or_path", "") or type(model).__name__),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "attention": attention_name(model.config.get_text_config(decoder=True)),
        "config": hashlib.sha256(facts).hexdigest(),
        "weights": weights_digest(model),
        "text": hashlib.sha256(torch.stack(list(windows)).cpu().numpy().tobytes()).hexdigest(),
        "context": len(windows[0]),
        "windows": len(windows),
        "new_tokens": new_tokens,
        "versions": {"hf_kvquant": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }


def _read_rows(path: Path, setup: dict[str, Any]) -> dict[str, ComparisonRow]:
    """The rows of an earlier run that need not be measured again."""
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no directory {path.parent} to save to")
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        rows = [ComparisonRow.from_dict(row) for row in found["rows"]]
        differing = [name for name in setup if found["setup"][name] != setup[name]]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not a saved comparison ({error!r}); name another file, or remove it") from error
    if differing:
        raise ValueError(
            f"{path} holds a comparison that differs in {', '.join(differing)}; name another file, or remove it"
        )
    return {row.cache: row for row in rows if not row.failed}


def _write(path: Path, comparison: Comparison) -> None:
    """The whole file or, if interrupted, the one before."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        beside.write_text(json.dumps(comparison.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


# -- measuring ---------------------------------------------------------------------------------------------------------


class _Run:
    """Measures one cache after the other on the same windows."""

    def __init__(self, model: PreTrainedModel, windows: Sequence[torch.Tensor], new_tokens: int) -> None:
        self._model = model
        self._windows = windows
        self._new_tokens = new_tokens
        self._text_config = model.config.get_text_config(decoder=True)
        self._expected: list[torch.Tensor] = []  # greedy continuations over the unquantized cache

    def row(self, name: str, options: dict[str, Any], make: Callable[[], Cache]) -> ComparisonRow:
        """One cache's numbers, or why there are none."""
        try:
            with torch.no_grad():
                return ComparisonRow(name, options, self._measure(make))
        except Exception as error:  # whatever it is, the other caches can still be measured
            reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        # Here, not above: what the failed row held is let go of with the exception.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return ComparisonRow(name, options, failed=reason)

    def _dense(self) -> Cache:
        return DynamicCache(config=self._text_config)

    def _measure(self, make: Callable[[], Cache]) -> Quality:
        steps, chunks = _Sums(), _Sums()
        clipped: int | None = None
        scales: list[str] | None = None
        for window in self._windows:
            prompt = len(window) // 2
            following = [prompt] + [1] * (len(window) - 1 - prompt)
            for prediction in self._predictions(window, following, make()):
                steps.add(*(each[-1:] for each in prediction))  # a fresh prompt does not read what is stored
            cache = make()
            watched = _Watched(cache) if window is self._windows[-1] else None
            for prediction in self._predictions(window, chunk_sizes(len(window) - 1), cache):
                chunks.add(*prediction)
            if isinstance(cache, QuantizedPagedCache):
                layers = cache.report().layers
                clipped = (clipped or 0) + sum(sum(layer.clipped) for layer in layers)
                # Without the tensor's name, which is each layer's own.
                scales = list(dict.fromkeys(source.split(":")[0] for layer in layers for source in layer.scales))
        bytes_held = held_bytes(cache)
        assert watched is not None  # noqa: S101 - the last window's
        k_error, v_error = watched.errors()
        match, places = self._continuations(make)
        return Quality(
            steps.agreement(), chunks.agreement(), match, places, k_error, v_error, clipped, bytes_held, scales
        )

    def _predictions(
        self, window: torch.Tensor, sizes: list[int], cache: Cache
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """For each piece of a window what follows `[T]`, the logits `[T, vocabulary]` of a dense cache and of this."""
        dense = self._dense()
        for tokens, following in zip(window[:-1].split(sizes), window[1:].split(sizes), strict=True):
            expected, seen = self._logits(tokens, dense), self._logits(tokens, cache)
            yield following.to(seen.device), expected, seen

    def _logits(self, tokens: torch.Tensor, cache: Cache) -> torch.Tensor:
        logits: torch.Tensor = self._model(input_ids=tokens[None], past_key_values=cache, use_cache=True).logits
        return logits[0].float()

    def _greedy(self, prompt: torch.Tensor, cache: Cache) -> torch.Tensor:
        """`new_tokens` token ids; the end of a text does not end it."""
        tokens = [prompt]
        for _ in range(self._new_tokens):
            tokens.append(self._logits(tokens[-1], cache)[-1:].argmax(dim=-1).to(prompt.device))
        return torch.cat(tokens[1:])

    def _continuations(self, make: Callable[[], Cache]) -> tuple[float, list[int | None]]:
        prompts = [window[: len(window) // 2] for window in self._windows]
        if not self._expected:
            self._expected = [self._greedy(prompt, self._dense()) for prompt in prompts]
        differs = torch.stack([
            self._greedy(prompt, make()) != expected for prompt, expected in zip(prompts, self._expected, strict=True)
        ])  # fmt: skip
        places = [int(row.int().argmax()) if row.any() else None for row in differs]
        return 1 - differs.float().mean().item(), places


class _Sums:
    """Sums over tokens, in double precision on the CPU."""

    def __init__(self) -> None:
        self._loss = self._divergence = 0.0
        self._same = self._count = 0

    def add(self, following: torch.Tensor, dense: torch.Tensor, logits: torch.Tensor) -> None:
        """Add tokens: what follows them `[T]`, and the logits `[T, vocabulary]` over the unquantized cache and ours."""
        expected, seen = dense.log_softmax(dim=-1), logits.log_softmax(dim=-1)
        weights = expected.exp()
        # Where a model rules a token out, both are minus infinity, and their difference is not a number.
        terms = torch.where(weights > 0, weights * (expected - seen), 0)
        self._divergence += terms.sum(dim=-1).cpu().double().sum().item()
        self._loss -= seen.gather(-1, following[:, None]).cpu().double().sum().item()
        self._same += int((dense.argmax(dim=-1) == logits.argmax(dim=-1)).sum())
        self._count += len(following)

    def agreement(self) -> Agreement:
        """The means. Raises ArithmeticError where the model's predictions are no numbers."""
        loss, divergence = self._loss / self._count, self._divergence / self._count
        if not math.isfinite(divergence) or not loss < math.log(sys.float_info.max):
            raise ArithmeticError(f"the predictions are no numbers: mean loss {loss}, KL divergence {divergence}")
        return Agreement(math.exp(loss), divergence, self._same / self._count)


class _Watched:
    """A cache, of which is kept what is put into it and what it gave back last."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._put: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._returned: dict[int, Any] = {}
        update = cache.update

        def watched(key: torch.Tensor, value: torch.Tensor, layer: int, *args: Any, **kwargs: Any) -> Any:
            self._put.setdefault(layer, []).append((key, value))
            self._returned[layer] = update(key, value, layer, *args, **kwargs)
            return self._returned[layer]

        cache.update = watched  # type: ignore[method-assign]

    def errors(self) -> tuple[list[float | None], list[float | None]]:
        """Relative RMS errors of K and of V, a number a layer; the watching ends."""
        del self._cache.update  # type: ignore[method-assign]
        # Under our attention `update` does not return dense tensors, but iterating does.
        held = list(self._cache) if isinstance(self._cache, QuantizedPagedCache) else self._returned
        layers = range(len(self._cache.layers))
        sides: list[list[float | None]] = [
            [_relative_error([put[side] for put in self._put[layer]], held[layer][side]) if layer in self._put else None
             for layer in layers]
            for side in (0, 1)
        ]  # fmt: skip
        return sides[0], sides[1]


def _relative_error(put: list[torch.Tensor], got: torch.Tensor) -> float | None:
    """Of the newest tokens that both have (a window forgets), `[B, H, T, D]`; None where all is zero."""
    expected = torch.cat(put, dim=-2)
    num_tokens = min(expected.shape[-2], got.shape[-2])
    expected, got = (x[..., -num_tokens:, :].float() for x in (expected, got))
    scale = expected.square().mean().item()
    return math.sqrt((got - expected).square().mean().item() / scale) if scale else None


def _cells(name: str, quality: Quality, dense: Quality | None) -> tuple[str, ...]:
    """A row of the table."""
    share = f" ({quality.bytes_held / dense.bytes_held:.2f}x)" if dense is not None else ""
    places = [place for place in quality.first_divergence if place is not None]
    worst = [
        max((error for error in errors if error is not None), default=0.0)
        for errors in (quality.k_error, quality.v_error)
    ]
    return (
        name, "-" if quality.scales is None else " / ".join(quality.scales), f"{quality.bytes_held:,}{share}",
        f"{quality.steps.perplexity:.4f}", f"{quality.chunks.perplexity:.4f}",
        f"{quality.steps.kl_divergence:.2e}", f"{quality.steps.top1_agreement:.2%}", f"{quality.greedy_match:.2%}",
        str(min(places)) if places else "-", *(f"{error:.3%}" for error in worst),
        "-" if quality.clipped is None else f"{quality.clipped:,}",
    )  # fmt: skip
