"""Self-attention and cross-attention of an encoder-decoder, both in pages, as one cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers.cache_utils import EncoderDecoderCache
from transformers.utils import logging

from .cache import QuantizedPagedCache
from .report import CacheReport

logger = logging.get_logger(__name__)


class QuantizedEncoderDecoderCache(EncoderDecoderCache):
    """transformers' pair of caches; what they hold is reported together. Made by `generate`."""

    def __init__(self, *caches: Any) -> None:
        super().__init__(*caches)
        if len(caches) == 1:
            logger.warning_once(
                "The model has made its cache anew from dense keys and values (RAG does after every step of beams): "
                "they are in the model's dtype from here on."
            )

    @property
    def _paged(self) -> dict[str, QuantizedPagedCache]:
        caches = {"self": self.self_attention_cache, "cross": self.cross_attention_cache}
        return {name: cache for name, cache in caches.items() if isinstance(cache, QuantizedPagedCache)}

    @property
    def nbytes(self) -> int:
        """Bytes in use by both."""
        return sum(cache.nbytes for cache in self._paged.values())

    @property
    def nbytes_allocated(self) -> int:
        """Bytes held by both, used or not."""
        return sum(cache.nbytes_allocated for cache in self._paged.values())

    def report(self) -> CacheReport:
        """What is stored how: the layers of self-attention, then those of cross-attention."""
        reports = {name: cache.report() for name, cache in self._paged.items()}
        layers = [
            replace(layer, layer_type="cross_attention") if name == "cross" else layer
            for name, report in reports.items()
            for layer in report.layers
        ]
        notes = dict.fromkeys(note for report in reports.values() for note in report.notes)
        total = sum(report.model_dtype_bytes for report in reports.values())
        return CacheReport(layers, list(notes), self.nbytes, self.nbytes_allocated, total)
