"""`PrefixCache`: what requests begin with is computed once, and its pages are shared."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .broken import take_back_broken_step
from .cache import QuantizedPagedCache
from .growing import GrowingLayer
from .hosts.conventions import with_cache
from .hosts.devices import input_device
from .hosts.wrappers import without_data_parallelism, without_wrapper
from .stores import PageStore

_MEDIA_TOKEN = re.compile(r".*(image|video|audio|vision).*_token_(id|index)")


@dataclass(eq=False)
class _Entry:
    """Tokens `[T]` on the CPU, and a cache of one sequence that holds just them."""

    tokens: torch.Tensor
    cache: QuantizedPagedCache

    def num_shared(self, tokens: torch.Tensor) -> int:
        """How many tokens `tokens` `[B, L]` begin with that are this entry's, in every row."""
        length = min(len(self.tokens), tokens.shape[1])
        differs = (tokens[:, :length] != self.tokens[:length]).any(dim=0)
        return int(differs.int().argmax()) if differs.any() else length


class PrefixCache:
    """Beginnings of requests (system prompts, documents, earlier turns) in one place, served page by page.

    A request that begins with tokens that are kept gets a fork of their cache, which shares its pages: nothing of them
    is computed or stored again. Tokens themselves are compared, so that a wrong beginning is never served. A beginning
    that is kept as a whole is used as a whole, and part of one up to its last full page.

    What a request computes on top of a kept beginning reads it from the 8-bit pages, as in a later turn of a chat;
    computed at once, a prompt attends to itself unrounded. Keys and values are those of the model as it was: `clear()`
    after its weights, its adapters or its position embedding change. Forks share a pool of pages: use one `PrefixCache`
    and the caches that come from it from one thread at a time. For requests in several threads use it under a lock, and
    give each request a `copy.deepcopy` of its cache, made under the lock too.

    Args:
        model: a decoder-only transformers model.
        max_bytes: bound of what is kept, pages that are shared counted once; the least recently used goes first.
            Requests that are still held by their users are not counted.
        options: of `QuantizedPagedCache.from_model`; not `max_cache_len`: pages at fixed addresses are not shared.

    Attributes:
        hits, misses: requests that were served with and without a kept beginning.

    Raises ValueError for encoder-decoders and for options that do not fit the model.
    """

    def __init__(self, model: PreTrainedModel, max_bytes: int, **options: Any) -> None:
        config = without_wrapper(model).config
        if config.is_encoder_decoder:
            raise ValueError("PrefixCache is for decoder-only models: the cache of a decoder depends on its encoder")
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 1:
            raise ValueError(f"max_bytes={max_bytes!r}; it must be a positive integer")
        self._empty = QuantizedPagedCache.from_model(model, **options)
        if self._empty.kvquant.max_cache_len is not None:
            raise ValueError("max_cache_len reserves pages at fixed addresses, which are not shared; leave it out")
        self.model: PreTrainedModel = without_data_parallelism(model)
        self.max_bytes = max_bytes
        self.hits = 0
        self.misses = 0
        self._entries: list[_Entry] = []  # least recently used first
        self._media_tokens = torch.tensor(_media_tokens(config), dtype=torch.int64, device="cpu")

    def __len__(self) -> int:
        """How many beginnings are kept."""
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept."""
        return _nbytes_of(entry.cache for entry in self._entries)

    def cache_for(self, input_ids: torch.Tensor, num_copies: int = 1) -> QuantizedPagedCache:
        """A cache for `generate(input_ids, past_key_values=...)` that holds what is kept of their beginning.

        Args:
            input_ids: `[B, T]`, the whole prompt. Rows of different length are padded between the beginning that they
                share and the rest, or on the left, where they share nothing.
            num_copies: `num_beams` or `num_return_sequences` of the `generate` to come.

        At least the last token is left to be computed. Image, video and audio tokens stand for more than themselves, so
        only what is before them is looked up.
        """
        tokens = _as_rows(input_ids)
        cache = self._longest(tokens, self._text_length(tokens[:, :-1]))
        if cache is None:
            self.misses += 1
            return self._empty.fork()
        self.hits += 1
        if tokens.shape[0] * num_copies > 1:
            cache.batch_repeat_interleave(tokens.shape[0] * num_copies)
        return cache

    def prefill(self, input_ids: torch.Tensor) -> bool:
        """Compute a beginning `[T]` or `[1, T]` and keep it; returns whether `max_bytes` has room for it.

        Raises ValueError for several rows and for image, video or audio tokens.
        """
        tokens = _as_rows(input_ids)
        if tokens.shape[0] != 1:
            raise ValueError(f"{tokens.shape[0]} row(s) of tokens; a beginning is one sequence [T] or [1, T]")
        if self._text_length(tokens) < tokens.shape[1]:
            raise ValueError(
                "a beginning with image, video or audio tokens cannot be told from another by its tokens; "
                "keep what is before them"
            )
        cache = self._longest(tokens, tokens.shape[1]) or self._empty.fork()
        rest = tokens[:, cache.get_seq_length() :].to(input_device(self.model))
        if rest.shape[1]:
            takes_logits_to_keep = "logits_to_keep" in inspect.signature(self.model.forward).parameters
            last_only = {"logits_to_keep": 1} if takes_logits_to_keep else {}
            with torch.no_grad():
                self.model(input_ids=rest, **with_cache(cache), **last_only)
        return self.keep(tokens, cache)

    def keep(self, tokens: torch.Tensor, cache: QuantizedPagedCache) -> bool:
        """Keep what a request has computed; returns whether `max_bytes` has room for it.

        Args:
            tokens: `[T]` or `[1, T]`, without padding, such as the sequence that `generate` returned. Those that the
                cache does not hold (the last one that was sampled) are not kept.
            cache: that the request used, made by `cache_for`. It stays the caller's.

        Raises ValueError if they do not belong together.
        """
        row = _as_rows(tokens)
        owner = cache.shared.model
        if owner is None or owner() is not without_wrapper(self.model) or cache.kvquant != self._empty.kvquant:
            raise ValueError("this cache is another model's, or has other options; keep one that cache_for() has made")
        take_back_broken_step(cache)
        length = int(cache.get_seq_length())
        if not length:
            raise ValueError("the cache holds no tokens")
        if row.shape[0] != 1 or cache.batch_size != 1:
            raise ValueError(
                f"{row.shape[0]} row(s) of tokens and a cache of {cache.batch_size} sequence(s); keep one sequence, "
                "see batch_select_indices()"
            )
        if row.shape[1] < length:
            raise ValueError(f"the cache holds {length} tokens, but {row.shape[1]} tokens are given")
        mask = cache.shared.padding_mask
        if mask is not None and not mask.all():
            raise ValueError("the cache was filled under a mask that hides tokens; keep a sequence without padding")
        tokens = row[0, :length].clone()
        if _nbytes_of([cache]) > self.max_bytes:
            return False
        self._entries = [entry for entry in self._entries if not torch.equal(entry.tokens, tokens)]
        self._entries.append(_Entry(tokens, cache.fork()))
        if self.nbytes > self.max_bytes:
            while self.nbytes > self.max_bytes:
                del self._entries[0]
            _trim(entry.cache for entry in self._entries)
        return True

    def clear(self) -> None:
        """Forget everything that is kept."""
        self._entries.clear()

    def _longest(self, tokens: torch.Tensor, limit: int) -> QuantizedPagedCache | None:
        """A fork of the entry that has most of the first `limit` tokens, with just these; None if there is none."""
        found = []
        for entry in self._entries:
            num_shared = min(entry.num_shared(tokens), limit)
            if num_shared < len(entry.tokens):
                page_size = entry.cache.kvquant.page_size
                num_shared = num_shared // page_size * page_size
            if num_shared:
                found.append((num_shared, entry))
        for num_shared, entry in sorted(found, key=lambda pair: pair[0], reverse=True):
            fork = entry.cache.fork()
            try:
                if num_shared < len(entry.tokens):
                    fork.crop(num_shared - len(entry.tokens))
            except RuntimeError:  # a window or a linear-attention state has moved on: all of it or nothing
                continue
            self._entries.remove(entry)
            self._entries.append(entry)
            return fork
        return None

    def _text_length(self, tokens: torch.Tensor) -> int:
        """How many tokens come before the first that stands for something else."""
        is_media = torch.isin(tokens, self._media_tokens).any(dim=0)
        return int(is_media.int().argmax()) if is_media.any() else tokens.shape[1]


def _as_rows(tokens: torch.Tensor) -> torch.Tensor:
    """`[B, T]` on the CPU. Raises ValueError for anything that is not token ids."""
    if not isinstance(tokens, torch.Tensor) or tokens.ndim not in (1, 2) or tokens.is_floating_point():
        what = list(tokens.shape) if isinstance(tokens, torch.Tensor) else type(tokens).__name__
        raise ValueError(f"token ids must be a tensor [T] or [B, T] of integers, not {what}")
    if not tokens.numel():
        raise ValueError(f"token ids of shape {list(tokens.shape)}; there must be at least one")
    return tokens.detach().cpu().reshape(-1, tokens.shape[-1])


def _media_tokens(config: PreTrainedConfig) -> list[int]:
    """Of the model and its parts."""
    own = [value for name, value in vars(config).items() if _MEDIA_TOKEN.fullmatch(name) and isinstance(value, int)]
    parts = [getattr(config, name, None) for name in config.sub_configs]
    return own + [token for part in parts if isinstance(part, PreTrainedConfig) for token in _media_tokens(part)]


def _nbytes_of(caches: Iterable[QuantizedPagedCache]) -> int:
    """Bytes that these caches use together: pages and scales that they share are counted once, tables not at all."""
    total = 0
    tables: dict[int, dict[int, np.ndarray]] = {}  # pool -> table -> its pages
    stores: dict[int, dict[int, PageStore]] = {}  # pool -> what lies in it
    for cache in caches:
        for layer in cache.layers:
            if isinstance(layer, GrowingLayer) and layer.is_initialized:
                pool = id(layer.table.pool)
                tables.setdefault(pool, {})[id(layer.table)] = layer.table.rows.ravel()
                stores.setdefault(pool, {}).update({id(store): store for store in (layer.k, layer.v)})
                total += layer.exact_nbytes + layer.state_nbytes
            else:
                total += cache._stored_nbytes(layer)
    for pool, users in stores.items():
        num_pages = len(np.unique(np.concatenate(list(tables[pool].values()))))
        total += sum(num_pages * store.page_nbytes + store.scale_nbytes for store in users.values())
    return total


def _trim(caches: Iterable[QuantizedPagedCache]) -> None:
    """Give back the pages of these caches' pools that no cache refers to any more, without waiting for a step."""
    for pool in {id(table.pool): table.pool for cache in caches for table in cache._tables}.values():
        pool.shrink()
