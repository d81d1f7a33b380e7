"""`cache.report()`: what is stored how, per layer, as data and as a table."""

from __future__ import annotations

from dataclasses import dataclass, field

from .tables import pair, printable, size, table


@dataclass(frozen=True)
class LayerReport:
    """One layer of the report; bytes are those of pages in use and scales.

    Attributes:
        layer: index in the cache.
        layer_type: transformers' name for it.
        kv_cache_dtype: formats of K and V, or what transformers stores for a layer that is not paged.
        scales: where K's and V's scales come from.
        stored_bytes: bytes in use.
        model_dtype_bytes: what the same tokens take in the model's dtype.
        clipped: how many numbers of K and V did not fit under static scales, NaN among them.
        dense: why the layer was read as dense tensors; empty if it never was.
        q_dtype: what the query of attention over its pages is rounded to; None if it is not.
        q_scale: where the scale for that comes from.
    """

    layer: int
    layer_type: str
    kv_cache_dtype: tuple[str, str]
    scales: tuple[str, str]
    stored_bytes: int
    model_dtype_bytes: int
    clipped: tuple[int, int]
    dense: tuple[str, ...] = ()
    q_dtype: str | None = None
    q_scale: str = ""


@dataclass(frozen=True)
class CacheReport:
    """The state of a cache. `str(report)` is a table.

    Attributes:
        layers: one entry per layer that stores something.
        notes: decisions the user should know of.
        nbytes: bytes in use: distinct pages, scales, tables.
        nbytes_allocated: bytes held.
        model_dtype_bytes: what the tokens take in the model's dtype.
    """

    layers: list[LayerReport]
    notes: list[str] = field(default_factory=list)
    nbytes: int = 0
    nbytes_allocated: int = 0
    model_dtype_bytes: int = 0

    def __str__(self) -> str:
        header = ("layer", "type", "format", "scales", "stored", "model dtype", "clipped", "dense")
        rows = [header, *(_row(layer) for layer in self.layers)]
        if any(layer.q_dtype is not None for layer in self.layers):
            queries = ("query", *(_query(layer) for layer in self.layers))
            rows = [(*row, query) for row, query in zip(rows, queries, strict=True)]
        lines = [table(rows)]
        share = f" ({self.nbytes / self.model_dtype_bytes:.3f} of it)" if self.model_dtype_bytes else ""
        lines.append(
            f"total: {size(self.nbytes)} in use, {size(self.nbytes_allocated)} allocated; "
            f"{size(self.model_dtype_bytes)} in the model's dtype{share}"
        )
        return printable("\n".join(lines + [f"note: {note}" for note in self.notes]))


def _row(layer: LayerReport) -> tuple[str, ...]:
    return (
        str(layer.layer), layer.layer_type, pair(layer.kv_cache_dtype), pair(layer.scales), size(layer.stored_bytes),
        size(layer.model_dtype_bytes), pair(layer.clipped), "; ".join(layer.dense) or "-",
    )  # fmt: skip


def _query(layer: LayerReport) -> str:
    return "-" if layer.q_dtype is None else f"{layer.q_dtype}, {layer.q_scale}"
