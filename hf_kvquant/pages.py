"""Page tables: which pages a sequence's tokens lie in.

Layers that see the same tokens share one `PageTable`, so a step edits one table, not one per layer. Token p of a
sequence is in its page `p // page_size`, column `(p // page_size) % N` of the table (see `ops`): with a sliding window
only the pages of the window exist. Sequences of one table, and of the tables of forked caches, may share pages of a
pool (`pools.py`); a shared page that is about to be written is copied first.

This table grows with the tokens and lives on the CPU; `static_pages.py` has the one that is reserved at once and
lives on the device.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch

from .pools import OutOfPagesError, PagePool

_NONE = np.zeros(0, dtype=np.int64)


class Follower(Protocol):
    """What a table asks of the layers that go by it."""

    length: int  # tokens per sequence that it has written

    def leave_table(self) -> None:
        """The layer has not followed the table's last step; it must go on with a table of its own."""


class _Step(NamedTuple):
    """What an append will do to every row."""

    first_page: int
    num_evicted: int
    num_missing: int
    new_length: int
    to_copy: np.ndarray  # rows whose last page belongs to others as well
    free: np.ndarray
    need: int  # pages in all


class PageTable:
    """The page table of a batch of sequences of equal length, with copy on write.

    Args:
        page_size: tokens per page.
        window: only the last `window - 1` tokens are needed by later ones; pages before them are given back.
        pool: where pages come from; None for a pool of its own.
        expected_length: tokens that a sequence is known to reach at most; bounds how far ahead the pool grows.
    """

    rows: np.ndarray  # [B, N], oldest page first; never changed in place, a fork may have it as well
    length: int
    first_page: int  # number of the oldest page of each row

    def __init__(
        self,
        page_size: int,
        window: int | None = None,
        pool: PagePool | None = None,
        expected_length: int | None = None,
    ) -> None:
        self.page_size = page_size
        self.window = window
        self.expected_length = expected_length
        self._num_coming = 1  # sequences that the first append brings
        self.keeps_past = False  # while speculation may take tokens back, pages before the window stay
        self._followers: list[weakref.ref[Follower]] = []
        self._siblings: list[weakref.ref[PageTable]] = []
        self._set_rows(_NONE.reshape(0, 0), length=0, first_page=0)
        self.pool = pool if pool is not None else PagePool()
        self.pool.add_table(self)

    @property
    def followers(self) -> list[Follower]:
        """The layers that go by this table."""
        return [layer for reference in self._followers if (layer := reference()) is not None]

    def add_follower(self, layer: Follower) -> None:
        self._followers.append(weakref.ref(layer))

    def remove_follower(self, layer: Follower) -> None:
        self._followers = [reference for reference in self._followers if reference() is not layer]

    @property
    def siblings(self) -> list[PageTable]:
        """Tables of the same cache: an append that one of them has no room for is refused by all."""
        return [table for reference in self._siblings if (table := reference()) is not None]

    @siblings.setter
    def siblings(self, tables: Iterable[PageTable]) -> None:
        self._siblings = [weakref.ref(table) for table in tables]

    def join(self, other: PageTable) -> None:
        """Be one more table of the cache of `other`."""
        self.siblings = [other, *other.siblings]
        for sibling in self.siblings:
            sibling.siblings = [*sibling.siblings, self]

    def part(self) -> None:
        """Be no sibling any more: from here on these sequences are not as long as others of the cache."""
        for sibling in self.siblings:
            sibling.siblings = [table for table in sibling.siblings if table is not self]
        self.siblings = ()

    def fork(self) -> PageTable:
        """A table of the same sequences that shares all pages and goes its own way from here."""
        # A pool in which nothing lies has nothing to share.
        other = PageTable(
            self.page_size,
            self.window,
            self.pool if self.pool.users else PagePool(self.pool.num_pages),
            self.expected_length,
        )
        other.keeps_past = self.keeps_past
        other._set_rows(self.rows, self.length, self.first_page)
        self._owns_tails = False
        return other

    def move_to(self, pool: PagePool, rows: np.ndarray) -> None:
        """Go on with another pool, in which the same pages have the numbers in `rows`."""
        self.pool.remove_table(self)
        self.pool = pool
        self._set_rows(rows, self.length, self.first_page)
        pool.add_table(self)

    @property
    def is_exclusive(self) -> bool:
        """Whether no page belongs to two sequences, of this table or of another."""
        return int(self.pool.references().max(initial=0)) <= 1

    def clear(self) -> None:
        """Forget all sequences and give their pages back."""
        self._set_rows(_NONE.reshape(0, 0), length=0, first_page=0)
        self.pool.shrink()

    def restore(self, rows: np.ndarray, length: int, first_page: int) -> np.ndarray:
        """Hold sequences of `length` tokens in pages `rows` `[B, N]` of the pool, oldest first; returns the pages."""
        self.pool.hold(int(rows.max()) + 1)
        self._set_rows(rows, length, first_page)
        return rows

    def _set_rows(self, rows: np.ndarray, length: int, first_page: int) -> None:
        self._owns_tails = False  # whether every last page is known to belong to one row only
        self._tables: dict[torch.device, torch.Tensor] = {}
        self._oldest_first: dict[torch.device, torch.Tensor] = {}
        self._seq_lens: dict[tuple[torch.device, int], torch.Tensor] = {}
        # All at once: an interrupt leaves the table of before or that of after.
        self.rows, self.length, self.first_page = rows, length, first_page

    # -- what operators read ---------------------------------------------------------------------------------------

    def page_table(self, device: torch.device) -> torch.Tensor:
        """int32 `[B, N]` on `device`."""
        table = self._tables.get(device)
        if table is None:
            # The oldest page is in column first_page % N.
            turned = np.roll(self.rows, self.first_page, axis=1)
            table = self._tables[device] = _on(device, turned)
        return table

    def oldest_first(self, device: torch.device) -> torch.Tensor:
        """int32 `[B, N]` on `device`: `rows`."""
        if not self.first_page:
            return self.page_table(device)
        table = self._oldest_first.get(device)
        if table is None:
            table = self._oldest_first[device] = _on(device, self.rows)
        return table

    def seq_lens(self, device: torch.device, length: int | None = None) -> torch.Tensor:
        """int32 `[B]` on `device`: the table's length, or what a layer has written of it."""
        key = (device, self.length if length is None else length)
        lens = self._seq_lens.get(key)
        if lens is None:
            lens = self._seq_lens[key] = torch.full((len(self.rows),), key[1], dtype=torch.int32, device=device)
        return lens

    def pages_since(self, position: int) -> np.ndarray:
        """The pages, ascending, that hold tokens from `position` on."""
        return np.unique(self.rows[:, max(position // self.page_size - self.first_page, 0) :])

    def owns_pages_since(self, position: int) -> bool:
        """Whether every page that holds tokens from `position` on belongs to one row only."""
        return self._owns_tails or int(self.pool.references()[self.pages_since(position)].max(initial=0)) <= 1

    # -- sizes -----------------------------------------------------------------------------------------------------

    @property
    def batch_size(self) -> int | None:
        return len(self.rows) or None

    @property
    def pages_in_use(self) -> int:
        """Distinct pages that the table's sequences refer to."""
        return len(np.unique(self.rows))

    @property
    def expected_pages(self) -> int | None:
        """Pages that the sequences will need at most, if known; without sharing."""
        if self.expected_length is None:
            return None
        return (len(self.rows) or self._num_coming) * -(-self.expected_length // self.page_size)

    @property
    def nbytes(self) -> int:
        """Bytes of the device copies."""
        return sum(t.nbytes for t in (*self._tables.values(), *self._oldest_first.values(), *self._seq_lens.values()))

    @property
    def first_position(self) -> int:
        """The oldest token that is still held."""
        return self.first_page * self.page_size

    # -- changing --------------------------------------------------------------------------------------------------

    def append(self, num_tokens: int, batch_size: int, copies: int = 1) -> None:
        """Make room for `num_tokens` more tokens of every sequence.

        Sequences that come in groups of `copies` get the same tokens, and share the pages of their group.

        Raises OutOfPagesError if the pool's bound does not suffice and ValueError if the batch size is not the
        table's; the table is then as before.
        """
        if len(self.rows) not in (0, batch_size):
            raise ValueError(
                f"the cache holds {len(self.rows)} sequence(s) but got keys and values of {batch_size}; use a new "
                "cache, reset() this one, or batch_repeat_interleave / batch_select_indices to change its batch size"
            )
        for layer in self.followers:
            if layer.length != self.length:
                layer.leave_table()
        step = self._plan(num_tokens, batch_size, copies)
        for sibling in self.siblings:
            if sibling.pool.num_pages is not None and sibling.length == self.length:
                sibling._plan(num_tokens, batch_size, copies)
        if step is not None:
            return self._take(step, batch_size // copies, copies)
        self.length += num_tokens
        self._seq_lens.clear()

    def crop(self, num_tokens: int) -> None:
        """Take the last `num_tokens` tokens back. Raises RuntimeError if a window has moved past what remains."""
        self.check_crop(num_tokens)
        new_length = max(self.length - num_tokens, 0)
        if not new_length:
            return self.clear()
        # What a window has left behind was only kept for this.
        oldest = max(self.first_page, self._oldest_visible(new_length))
        held = slice(oldest - self.first_page, max(-(-new_length // self.page_size) - self.first_page, 0))
        self._set_rows(self.rows[:, held], new_length, oldest)
        self.pool.shrink()

    def check_crop(self, num_tokens: int) -> None:
        """Raise what `crop` would raise."""
        new_length = max(self.length - num_tokens, 0)
        if self.first_position > oldest_needed(new_length, self.window):
            raise RuntimeError(
                f"cannot take back {num_tokens} tokens: a layer with a sliding window of {self.window} keeps only the "
                f"tokens from {self.first_position} on; call activate_past_recording() before the tokens are added"
            )

    def select(self, indices: Sequence[int]) -> None:
        """Sequence i becomes a copy of sequence `indices[i]`; pages are shared, not copied."""
        if not len(self.rows):
            return
        order, tables = np.asarray(indices, dtype=np.int64), self._tables
        self._set_rows(self.rows[order], self.length, self.first_page)
        self._tables = {device: table.index_select(0, _on(device, order)) for device, table in tables.items()}
        self.pool.shrink()

    # -- pages -----------------------------------------------------------------------------------------------------

    def _plan(self, num_tokens: int, batch_size: int, copies: int) -> _Step | None:
        """How to make room, None if there is room already. Raises OutOfPagesError if there cannot be."""
        new_length = self.length + num_tokens
        num_held = self.rows.shape[1]
        # Tokens of a first prompt see each other as they came; only what later tokens see has to be stored.
        first_page = max(self.first_page, self._oldest_page(self.length or new_length))
        num_evicted = min(first_page - self.first_page, num_held)
        num_missing = -(-new_length // self.page_size) - first_page - (num_held - num_evicted)
        writes_tails = self.length % self.page_size > 0 and num_evicted < num_held
        if not num_missing and not num_evicted and (self._owns_tails or not writes_tails):
            return None
        counts = self.pool.references()
        if num_evicted:
            counts -= np.bincount(self.rows[:, :num_evicted].ravel(), minlength=len(counts))
        to_copy = self._shared_tails(counts, copies) if writes_tails and not self._owns_tails else _NONE
        free = np.flatnonzero(counts == 0)
        need = len(counts) - len(free) + batch_size // copies * num_missing + len(to_copy)
        if self.pool.num_pages is not None and need > self.pool.num_pages:
            raise OutOfPagesError(
                f"{new_length} tokens a sequence need {need} pages of {self.page_size} tokens, but "
                f"num_pages={self.pool.num_pages}; pass num_pages={need} or more, or store less (crop, reset, a "
                "smaller batch)"
            )
        return _Step(first_page, num_evicted, num_missing, new_length, to_copy, free, need)

    def _take(self, step: _Step, num_groups: int, copies: int) -> None:
        """Let go of old pages, copy shared ones that will be written, and take new ones."""
        old_size, self._num_coming = self.pool.size, num_groups
        self.pool.grow(step.need)  # the part that can run out of memory comes before anything is changed
        if step.num_evicted:  # before others are written in their place, lest an interrupt leaves them here
            self._set_rows(self.rows[:, step.num_evicted :], self.length, step.first_page)
        free = np.concatenate([step.free, np.arange(old_size, self.pool.size)])  # low ones first: pools stay dense
        num_copied = len(step.to_copy)
        targets, new = free[:num_copied], free[num_copied : num_copied + num_groups * step.num_missing]
        new = new.reshape(num_groups, step.num_missing)
        rows = self.rows[::copies] if len(self.rows) else np.zeros((num_groups, 0), dtype=np.int64)
        if num_copied:
            rows = rows.copy()
            self.pool.copy(rows[step.to_copy, -1], targets)
            rows[step.to_copy, -1] = targets
        self.pool.clear(new.ravel())
        tables, num_kept = self._tables, rows.shape[1] - (num_copied > 0)
        rows = np.repeat(np.concatenate([rows, new], axis=1), copies, axis=0)
        self._set_rows(rows, step.new_length, step.first_page)
        self._owns_tails = copies == 1
        if not step.first_page:  # what is on a device already stays there
            last = rows[:, num_kept:]
            self._tables = {d: torch.cat([table[:, :num_kept], _on(d, last)], dim=1) for d, table in tables.items()}
        self.pool.shrink()  # a window has let go of pages, or a fork was dropped since

    def _oldest_page(self, length: int) -> int:
        """The oldest page that tokens after the first `length` can see."""
        return self.first_page if self.keeps_past else self._oldest_visible(length)

    def _oldest_visible(self, length: int) -> int:
        return oldest_needed(length, self.window) // self.page_size

    def _shared_tails(self, counts: np.ndarray, copies: int) -> np.ndarray:
        """Groups of `copies` rows whose last page is about to be written but belongs to another row as well."""
        tails = self.rows[:, -1]
        here = np.bincount(tails, minlength=len(counts))
        # One of the rows that share a page keeps it, if nobody outside this table has it.
        keeps = np.zeros(len(tails), dtype=bool)
        keeps[np.unique(tails, return_index=True)[1]] = True
        keeps &= counts[tails] == here[tails]
        return np.flatnonzero(~keeps[::copies])

    def renumber(self, numbers: np.ndarray) -> None:
        """Page p is now page numbers[p]."""
        owns_tails = self._owns_tails
        self._set_rows(numbers[self.rows], self.length, self.first_page)
        self._owns_tails = owns_tails


def oldest_needed(length: int, window: int | None) -> int:
    """The oldest token that tokens after the first `length` need."""
    # A window of one token sees nothing old, but the newest page is still being filled.
    return 0 if window is None else max(min(length - (window - 1), length - 1), 0)


def _on(device: torch.device, pages: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pages.astype(np.int32)).to(device, non_blocking=True)


class PageTables:
    """The growing page tables of a cache: one per window, for the layers that have it.

    Args:
        page_size, expected_length: as for `PageTable`.
        num_pages: most pages of each table's pool.
    """

    def __init__(self, page_size: int, num_pages: int | None, expected_length: int | None) -> None:
        self._options = (page_size, num_pages, expected_length)
        self._tables: dict[int | None, PageTable] = {}

    def for_window(self, window: int | None) -> PageTable:
        """The table of layers with this window (None: full attention)."""
        if window not in self._tables:
            page_size, num_pages, length = self._options
            if window is not None and length is not None:
                length = min(length, window + page_size)
            others = list(self._tables.values())
            self._tables[window] = table = PageTable(page_size, window, PagePool(num_pages), length)
            if others:
                table.join(others[0])
        return self._tables[window]
