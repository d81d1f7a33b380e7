"""A comparison as a section: tables, quality against bytes, and errors by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from . import charts
from .caches import DENSE
from .pictures import Picture
from .quality import Quality
from .rows import Comparison
from .sections import Section, Table, provenance
from .text import (
    ABOUT,
    SAME_TOKENS,
    STORED,
    about_cells,
    acceptance_cells,
    retrieval_cells,
    same_token_cells,
    stored_cells,
)

_ERRORS = {"k_error": "error of K", "v_error": "error of V", "attention_error": "error of attention"}
_LEAST_KL = 1e-7  # less is rounding
_LINEAR = 0.01  # percent of perplexity


def quality_section(comparison: Comparison, name: str | None, title: str = "", about: str = "") -> Section:
    """Of `compare`, by whole windows in chunks: there all tokens count.

    Args:
        comparison: what is shown.
        name: begins the names of pictures; None for a section without any, as drawing takes seconds.
        title: in place of the model's name.
        about: what the model is.
    """
    setup = comparison.setup
    rows = {row.cache: row.quality for row in comparison.rows if row.quality is not None}
    model = title or f"{setup['model']} ({setup['dtype']})"
    read = f"{setup['windows']} windows of {setup['context']:,} tokens in growing chunks"
    where = provenance(setup)
    caption = (
        f"{about + '. ' if about else ''}{read}; KL divergence from the unquantized cache in nats; top-1 and "
        f"greedy: shares of equal tokens, greedy over {setup['new_tokens']}; errors are relative RMS, of the "
        f"worst layer. {where}."
    )
    tables = [quality_table(rows)] if rows else []
    for header, *lines in filter(None, (retrieval_cells(comparison.rows), acceptance_cells(comparison.rows))):
        tables.append(Table(header, lines))
    failed = [f"{row.cache}: not measured: {row.failed}" for row in comparison.rows if row.failed]
    pictures = [] if name is None else _pictures(rows, setup["context"], name, f"{model}: {read}. {where}")
    return Section(f"Quality: {model}", caption, tables, pictures, failed + comparison.notes)


def bytes_per_token(quality: Quality, context: int) -> float:
    """Of a sequence as long as a window."""
    return quality.bytes_held / (context - 1)  # the last token is only predicted


def perplexity_increase(quality: Quality, dense: Quality) -> float:
    """Relative to the unquantized cache, in percent."""
    return 100 * (quality.chunks.perplexity / dense.chunks.perplexity - 1)


def divergence(quality: Quality) -> str:
    """From the unquantized cache's predictions, in nats."""
    found = quality.chunks.kl_divergence
    return f"{found:.1e}" if found >= _LEAST_KL else f"<{_LEAST_KL:.0e}"


def quality_table(rows: Mapping[str, Quality]) -> Table:
    """One line per cache."""
    dense = rows.get(DENSE)
    lines = []
    for cache, quality in rows.items():
        increase = "" if dense is None else f" ({perplexity_increase(quality, dense):+.3f} %)"
        lines.append((
            *about_cells(cache, quality, dense),
            f"{quality.chunks.perplexity:.4f}{increase}", divergence(quality),
            *same_token_cells(quality.chunks, quality),
            *stored_cells(quality),
        ))  # fmt: skip
    return Table((*ABOUT, "perplexity", "KL", *SAME_TOKENS, *STORED), lines)


def _pictures(rows: Mapping[str, Quality], context: int, name: str, caption: str) -> list[Picture]:
    others = {cache: quality for cache, quality in rows.items() if cache != DENSE}
    if not others:
        return []
    dense = rows.get(DENSE)
    places = {cache: bytes_per_token(quality, context) for cache, quality in others.items()}
    x_label = f"bytes per token, over {context:,} tokens"
    reference = None if dense is None else (DENSE, bytes_per_token(dense, context))
    divergences = {
        cache: (places[cache], max(quality.chunks.kl_divergence, _LEAST_KL)) for cache, quality in others.items()
    }
    title, y_label = "Divergence against memory", f"KL divergence (nats, at least {_LEAST_KL:g})"
    pictures = [charts.points(f"{name}-kl", title, caption, divergences, x_label, y_label, reference)]
    if dense is not None:
        increase = {cache: (places[cache], perplexity_increase(quality, dense)) for cache, quality in others.items()}
        title, y_label = "Perplexity against memory", f"perplexity over {DENSE}'s (%)"
        pictures.append(
            charts.points(f"{name}-perplexity", title, caption, increase, x_label, y_label, reference, _LINEAR)
        )
    return pictures + _by_layer(others, name, caption)


def _by_layer(rows: Mapping[str, Quality], name: str, caption: str) -> list[Picture]:
    panels: dict[str, charts.Matrix] = {
        f"{label} (%)": _percent([getattr(quality, which) for quality in rows.values()])
        for which, label in _ERRORS.items()
    }
    panels = {label: matrix for label, matrix in panels.items() if any(e is not None for row in matrix for e in row)}
    clipped = [quality.clipped for quality in rows.values()]
    if any(sum(each) for each in clipped if each is not None):
        layers = next(len(each) for each in clipped if each is not None)
        panels["clipped numbers"] = [each if each is not None else [None] * layers for each in clipped]
    if not panels:
        return []
    return [charts.heat_maps(f"{name}-layers", "Layer by layer", caption, list(rows), panels, "layer")]


def _percent(errors: Sequence[Sequence[float | None]]) -> charts.Matrix:
    return [[None if error is None else 100 * error for error in of_layer] for of_layer in errors]
