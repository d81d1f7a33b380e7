"""Page tables: which pages a sequence's tokens lie in.

The tables know ids, reference counts and lengths; the bytes lie in pools (`stores.py`) that register with a table and
are told to grow, clear or copy pages. Layers that see the same tokens share one `PageTable`, so a step edits one table,
not one a layer. Token p of a sequence is in its page `p // page_size`, column `(p // page_size) % N` of the table (see
`ops`): with a sliding window only the pages of the window exist.

This table grows with the tokens and lives on the host; `static_pages.py` has the one that is reserved at once and
lives on the device.
"""

from __future__ import annotations

import heapq
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch

# Pools grow to this multiple of the need while their final size is not known, and shrink when they exceed the second
# multiple: together they bound what is allocated beside what is used.
_GROWTH, _SLACK = 1.2, 1.25


class OutOfPagesError(RuntimeError):
    """A sequence needs more pages than `num_pages` allows, or more than were reserved; nothing was changed."""


class PageUser(Protocol):
    """What a table asks of those whose pages it manages."""

    def resize_pages(self, num_pages: int) -> None:
        """Make room for pages 0 ... num_pages - 1; those that existed stay, new ones are zero."""

    def clear_pages(self, pages: Sequence[int]) -> None:
        """Zero these pages."""

    def copy_pages(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy page sources[i] to targets[i]."""

    def keep_pages(self, pages: Sequence[int], num_pages: int) -> None:
        """Page pages[i] becomes page i, of `num_pages` in all."""

    def leave_table(self) -> None:
        """The user has not followed the table's last step; it must go on with a table of its own."""

    @property
    def length(self) -> int:
        """How many tokens a sequence of the user has written."""


class _Step(NamedTuple):
    """What an append will do to each row, and how many more pages that takes in all."""

    first_page: int
    num_evicted: int
    num_missing: int
    to_copy: list[int]
    num_more: int


class PageTable:
    """The page table of a batch of sequences of equal length, with reference counts and copy on write.

    Args:
        page_size: tokens per page.
        window: only the last `window - 1` tokens are needed by later ones; pages before them are given back.
        num_pages: most pages there may be, None for no bound.
        expected_length: tokens a sequence is known to reach at most; bounds how far ahead pools grow.
    """

    def __init__(
        self,
        page_size: int,
        window: int | None = None,
        num_pages: int | None = None,
        expected_length: int | None = None,
    ) -> None:
        self.page_size = page_size
        self.window = window
        self.num_pages = num_pages
        self.expected_length = expected_length
        self.keeps_past = False  # while speculation may take tokens back, pages before the window stay
        self._users: list[weakref.ref[PageUser]] = []
        self.siblings: tuple[PageTable, ...] = ()  # an append that one of these has no room for is refused by all
        self.clear()

    # Users hold their table and not the other way round: a cache is freed when the last reference to it goes, without
    # waiting for a garbage collection that a full GPU does not trigger.

    @property
    def users(self) -> list[PageUser]:
        """Those whose pages this table manages."""
        return [user for reference in self._users if (user := reference()) is not None]

    def add_user(self, user: PageUser) -> None:
        self._users.append(weakref.ref(user))

    def remove_user(self, user: PageUser) -> None:
        self._users = [reference for reference in self._users if reference() is not user]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_users": self.users}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._users = [weakref.ref(user) for user in state["_users"]]

    def clear(self) -> None:
        """Forget all sequences and give all pages back."""
        for user in self.users:
            user.resize_pages(0)
        self.length = 0
        self.first_page = 0  # number of the oldest page of each row
        self.rows: list[list[int]] = []
        self._counts: list[int] = []  # references to each page
        self._free: list[int] = []  # a heap: low ids first, so that pools stay dense
        self._forget_tensors()

    # -- what operators read ---------------------------------------------------------------------------------------

    def page_table(self, device: torch.device) -> torch.Tensor:
        """int32 `[B, N]` on `device`."""
        if device not in self._tables:
            num_columns = len(self.rows[0])
            turn = -self.first_page % num_columns  # column of the oldest page is first_page % N
            rows = [row[turn:] + row[:turn] for row in self.rows]
            self._tables[device] = torch.tensor(rows, dtype=torch.int32).to(device, non_blocking=True)
        return self._tables[device]

    def seq_lens(self, device: torch.device, length: int | None = None) -> torch.Tensor:
        """int32 `[B]` on `device`: the table's length, or what a user has written of it."""
        length = self.length if length is None else length
        if (device, length) not in self._seq_lens:
            lens = torch.full((len(self.rows),), length, dtype=torch.int32, device=device)
            self._seq_lens[device, length] = lens
        return self._seq_lens[device, length]

    def _forget_tensors(self) -> None:
        self._tables: dict[torch.device, torch.Tensor] = {}
        self._seq_lens: dict[tuple[torch.device, int], torch.Tensor] = {}

    # -- sizes -----------------------------------------------------------------------------------------------------

    @property
    def batch_size(self) -> int | None:
        return len(self.rows) or None

    @property
    def pool_size(self) -> int:
        """Pages that every pool of this table holds."""
        return len(self._counts)

    @property
    def pages_in_use(self) -> int:
        """Distinct pages that some sequence refers to."""
        return len(self._counts) - len(self._free)

    @property
    def nbytes(self) -> int:
        """Bytes of the device copies."""
        return sum(t.nbytes for t in (*self._tables.values(), *self._seq_lens.values()))

    @property
    def first_position(self) -> int:
        """The oldest token that is still held."""
        return self.first_page * self.page_size

    # -- changing --------------------------------------------------------------------------------------------------

    def append(self, num_tokens: int, batch_size: int) -> None:
        """Make room for `num_tokens` more tokens of every sequence.

        Raises OutOfPagesError if `num_pages` does not suffice and ValueError if the batch size is not the table's; the
        table is then as before.
        """
        if self.rows and len(self.rows) != batch_size:
            raise ValueError(
                f"the cache holds {len(self.rows)} sequence(s) but got keys and values of {batch_size}; use a new "
                "cache, reset() this one, or batch_repeat_interleave / batch_select_indices to change its batch size"
            )
        for table in (self, *self.siblings):
            if table.length == self.length:
                table._check_room(num_tokens, batch_size)
        for user in [user for user in self.users if user.length != self.length]:
            user.leave_table()

        step = self._plan(num_tokens, batch_size)
        self._grow(step.num_more)  # the part that can run out of memory comes before anything is changed
        if step.num_evicted:
            self._release([page for row in self.rows for page in row[: step.num_evicted]])
            self.rows = [row[step.num_evicted :] for row in self.rows]
        if step.to_copy:
            self._copy_tails(step.to_copy)
        self.rows = self.rows or [[] for _ in range(batch_size)]
        for row in self.rows:
            row.extend(self._take(step.num_missing))
        self.first_page = step.first_page
        self.length += num_tokens
        self._seq_lens.clear()
        if step.num_missing or step.num_evicted or step.to_copy:
            self._tables.clear()
        if step.num_evicted:
            self._shrink()

    def crop(self, num_tokens: int) -> None:
        """Take the last `num_tokens` tokens back. Raises RuntimeError if a window has moved past what remains."""
        self.check_crop(num_tokens)
        new_length = max(self.length - num_tokens, 0)
        # What a window has left behind was only kept for this.
        oldest = max(self.first_page, self._oldest_visible(new_length))
        held = slice(oldest - self.first_page, max(-(-new_length // self.page_size) - self.first_page, 0))
        self._release([page for row in self.rows for page in (*row[: held.start], *row[held.stop :])])
        self.rows = [row[held] for row in self.rows]
        self.first_page = oldest
        self.length = new_length
        self._shrink()
        self._forget_tensors()

    def check_crop(self, num_tokens: int) -> None:
        """Raise what `crop` would raise."""
        new_length = max(self.length - num_tokens, 0)
        if self.window is not None and self.first_position > max(new_length - (self.window - 1), 0):
            raise RuntimeError(
                f"cannot take back {num_tokens} tokens: a layer with a sliding window of {self.window} keeps only the "
                f"tokens from {self.first_position} on; call activate_past_recording() before the tokens are added"
            )

    def select(self, indices: Sequence[int]) -> None:
        """Sequence i becomes a copy of sequence `indices[i]`; pages are shared, not copied."""
        if not self.rows:
            return
        rows = [list(self.rows[index]) for index in indices]
        for row in rows:
            for page in row:
                self._counts[page] += 1
        self._release([page for row in self.rows for page in row])
        self.rows = rows
        self._shrink()
        self._forget_tensors()

    def detached(self, user: PageUser) -> PageTable:
        """A table of its own for a user that went another way, with the tokens that the user has written."""
        other = PageTable(self.page_size, self.window, self.num_pages, self.expected_length)
        other.keeps_past = self.keeps_past
        other.add_user(user)
        if not user.length:
            user.resize_pages(0)
            return other
        other.length, other.first_page = self.length, self.first_page
        other.rows = [list(row) for row in self.rows]
        other._counts, other._free = list(self._counts), list(self._free)
        if user.length < self.length:
            other.crop(self.length - user.length)
        return other

    # -- pages -----------------------------------------------------------------------------------------------------

    def _plan(self, num_tokens: int, batch_size: int) -> _Step:
        new_length = self.length + num_tokens
        num_held = len(self.rows[0]) if self.rows else 0
        # Tokens of a first prompt see each other as they came; only what later tokens see has to be stored.
        first_page = max(self.first_page, self._oldest_page(self.length or new_length))
        num_evicted = min(first_page - self.first_page, num_held)
        num_missing = -(-new_length // self.page_size) - first_page - (num_held - num_evicted)
        to_copy = self._shared_tails(num_evicted) if self.length % self.page_size else []
        freed = self._num_last_references([page for row in self.rows for page in row[:num_evicted]])
        num_more = batch_size * num_missing + len(to_copy) - freed
        return _Step(first_page, num_evicted, num_missing, to_copy, num_more)

    def _oldest_page(self, length: int) -> int:
        """The oldest page that tokens after the first `length` can see."""
        return self.first_page if self.keeps_past else self._oldest_visible(length)

    def _oldest_visible(self, length: int) -> int:
        if self.window is None:
            return self.first_page
        # A window of one token sees nothing old, but the newest page is still being filled.
        return max(min(length - (self.window - 1), length - 1), 0) // self.page_size

    def _shared_tails(self, num_evicted: int) -> list[int]:
        """Rows whose last page is about to be written but belongs to another row as well."""
        counts: dict[int, int] = {}
        shared = []
        for index, row in enumerate(self.rows):
            if len(row) <= num_evicted:
                continue
            left = counts.setdefault(row[-1], self._counts[row[-1]])
            if left > 1:  # the last of those that share a page keeps it
                counts[row[-1]] = left - 1
                shared.append(index)
        return shared

    def _copy_tails(self, indices: list[int]) -> None:
        sources = [self.rows[index][-1] for index in indices]
        targets = self._take(len(indices))
        for user in self.users:
            user.copy_pages(sources, targets)
        for index, target in zip(indices, targets, strict=True):
            self.rows[index][-1] = target
        self._release(sources)

    def _num_last_references(self, pages: Sequence[int]) -> int:
        """How many pages would become free if these references were dropped."""
        dropped: dict[int, int] = {}
        for page in pages:
            dropped[page] = dropped.get(page, 0) + 1
        return sum(self._counts[page] == count for page, count in dropped.items())

    def _check_room(self, num_tokens: int, batch_size: int) -> None:
        if self.num_pages is None:
            return
        need = self.pages_in_use + self._plan(num_tokens, batch_size).num_more
        if need > self.num_pages:
            raise OutOfPagesError(
                f"{self.length + num_tokens} tokens a sequence need {need} pages of {self.page_size} tokens, but "
                f"num_pages={self.num_pages}; pass num_pages={need} or more, or store less (crop, reset, a smaller "
                "batch)"
            )

    def _release(self, pages: Sequence[int]) -> None:
        for page in pages:
            self._counts[page] -= 1
            if self._counts[page] == 0:
                heapq.heappush(self._free, page)

    def _take(self, num: int) -> list[int]:
        """`num` zeroed pages, referred to once; `_grow` has seen to it that they are there."""
        pages = [heapq.heappop(self._free) for _ in range(num)]
        for page in pages:
            self._counts[page] = 1
        if pages:
            for user in self.users:
                user.clear_pages(pages)
        return pages

    def _grow(self, num_more: int) -> None:
        """Have `num_more` free pages, beside those that become free in this step."""
        missing = num_more - len(self._free)
        if missing <= 0:
            return
        size = self._target_size(self.pool_size + missing)
        for user in self.users:
            user.resize_pages(size)
        self._free.extend(range(self.pool_size, size))
        heapq.heapify(self._free)
        self._counts.extend([0] * (size - len(self._counts)))

    def _target_size(self, need: int) -> int:
        size = int(need * _GROWTH)
        if self.expected_length is not None:
            size = min(size, max(len(self.rows), 1) * -(-self.expected_length // self.page_size))
        if self.num_pages is not None:
            size = min(size, self.num_pages)
        return max(size, need)

    def _shrink(self) -> None:
        """Give memory back when much more is allocated than used; pages are renumbered."""
        size = self._target_size(self.pages_in_use)
        if self.pool_size <= size or self.pool_size <= self.pages_in_use * _SLACK:
            return
        kept = [page for page, count in enumerate(self._counts) if count]
        renumbered = {page: index for index, page in enumerate(kept)}
        self.rows = [[renumbered[page] for page in row] for row in self.rows]
        self._counts = [self._counts[page] for page in kept] + [0] * (size - len(kept))
        self._free = list(range(len(kept), size))
        self._tables.clear()
        for user in self.users:
            user.keep_pages(kept, size)


class PageTables:
    """The growing page tables of a cache: one a window, for the layers that have it.

    Args:
        page_size, num_pages, expected_length: as for `PageTable`.
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
            self._tables[window] = PageTable(page_size, window, num_pages, length)
            tables = tuple(self._tables.values())
            for table in tables:
                table.siblings = tuple(other for other in tables if other is not table)
        return self._tables[window]
