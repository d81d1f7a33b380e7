"""Page tables: which pages a sequence's tokens lie in.

The tables know ids, reference counts and lengths; the bytes lie in pools (`stores.py`) that register with a table and
are told to grow, clear or copy pages. Layers that see the same tokens share one `PageTable`, so a step edits one table,
not one a layer. Token p of a sequence is in its page `p // page_size`, column `(p // page_size) % N` of the table (see
`ops`): with a sliding window only the pages of the window exist.

`PageTable` grows with the tokens and lives on the host. `StaticPageTable` reserves everything at once, lives on the
device, and can be compiled.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Protocol

import torch

# Pools grow to this multiple of the need while their final size is not known, and shrink when they exceed the second
# multiple: together they bound what is allocated beside what is used.
_GROWTH, _SLACK = 1.2, 1.25


class OutOfPagesError(RuntimeError):
    """A sequence needs more pages than `num_pages` or `max_cache_len` allow; nothing was changed."""


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
        self.users: list[PageUser] = []
        self.clear()

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

    def seq_lens(self, device: torch.device) -> torch.Tensor:
        """int32 `[B]` on `device`."""
        if device not in self._seq_lens:
            self._seq_lens[device] = torch.full((len(self.rows),), self.length, dtype=torch.int32, device=device)
        return self._seq_lens[device]

    def _forget_tensors(self) -> None:
        self._tables: dict[torch.device, torch.Tensor] = {}
        self._seq_lens: dict[torch.device, torch.Tensor] = {}

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
        return sum(t.nbytes for tensors in (self._tables, self._seq_lens) for t in tensors.values())

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
        for user in [user for user in self.users if user.length != self.length]:
            user.leave_table()

        rows = self.rows or [[] for _ in range(batch_size)]
        new_length = self.length + num_tokens
        # Tokens of a first prompt see each other as they came; only what later tokens see has to be stored.
        first_page = max(self.first_page, self._oldest_page(self.length or new_length))
        num_evicted = min(first_page - self.first_page, len(rows[0]))
        evicted = [page for row in rows for page in row[:num_evicted]]
        num_missing = -(-new_length // self.page_size) - first_page - (len(rows[0]) - num_evicted)
        to_copy = self._shared_tails(num_evicted) if self.length % self.page_size else []
        self._check_room(len(rows) * num_missing + len(to_copy) - self._num_last_references(evicted), new_length)

        self.rows = [row[num_evicted:] for row in rows]
        self._release(evicted)
        self._shrink()
        if to_copy:
            self._copy_tails(to_copy)
        for row in self.rows:
            row.extend(self._take(num_missing))
        if num_missing or num_evicted or to_copy:
            self._tables.clear()
        self.first_page = first_page
        self.length = new_length
        self._seq_lens.clear()

    def crop(self, num_tokens: int) -> None:
        """Take the last `num_tokens` tokens back. Raises RuntimeError if a window has moved past what remains."""
        self.check_crop(num_tokens)
        new_length = max(self.length - num_tokens, 0)
        kept = max(-(-new_length // self.page_size) - self.first_page, 0)
        self._release([page for row in self.rows for page in row[kept:]])
        self.rows = [row[:kept] for row in self.rows]
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
        other.users.append(user)
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

    def _oldest_page(self, length: int) -> int:
        """The oldest page that tokens after the first `length` can see."""
        if self.window is None or self.keeps_past:
            return self.first_page
        return max(length - (self.window - 1), 0) // self.page_size

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

    def _check_room(self, num_more: int, new_length: int) -> None:
        need = self.pages_in_use + num_more
        if self.num_pages is not None and need > self.num_pages:
            raise OutOfPagesError(
                f"{new_length} tokens a sequence need {need} pages of {self.page_size} tokens, but num_pages="
                f"{self.num_pages}; pass num_pages={need} or more, or store less (crop, reset, a smaller batch)"
            )

    def _release(self, pages: Sequence[int]) -> None:
        for page in pages:
            self._counts[page] -= 1
            if self._counts[page] == 0:
                heapq.heappush(self._free, page)

    def _take(self, num: int) -> list[int]:
        """`num` zeroed pages, referred to once."""
        if not num:
            return []
        recycled = [heapq.heappop(self._free) for _ in range(min(num, len(self._free)))]
        if recycled:
            for user in self.users:
                user.clear_pages(recycled)
        if missing := num - len(recycled):
            size = self._target_size(self.pool_size + missing)
            for user in self.users:
                user.resize_pages(size)
            new = range(self.pool_size, size)
            self._counts.extend([0] * len(new))
            recycled += new[:missing]
            self._free.extend(new[missing:])
            heapq.heapify(self._free)
        for page in recycled:
            self._counts[page] = 1
        return recycled

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


class StaticPageTable:
    """A page table with every page reserved, as tensors at fixed addresses: nothing of a step happens on the host.

    Args:
        batch_size: sequences.
        capacity: tokens a sequence may reach.
        slack: with a window, how many tokens may be written at once beside the window's.
    """

    def __init__(
        self, batch_size: int, page_size: int, capacity: int, device: torch.device, window: int | None, slack: int
    ) -> None:
        self.page_size = page_size
        self.capacity = capacity
        self.window = window
        self.most_at_once = capacity
        num_columns = -(-capacity // page_size)
        if window is not None:
            # The pages of the window, of the new tokens, and one because neither begins at the start of a page.
            ring = -(-(window - 1 + slack) // page_size) + 1
            if ring < num_columns:
                num_columns, self.most_at_once = ring, slack
        self._table = torch.arange(batch_size * num_columns, dtype=torch.int32, device=device).view(batch_size, -1)
        self._seq_lens = torch.zeros(batch_size, dtype=torch.int32, device=device)

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._table, self._seq_lens

    def page_table(self, device: torch.device) -> torch.Tensor:
        return self._table

    def seq_lens(self, device: torch.device) -> torch.Tensor:
        return self._seq_lens

    @property
    def batch_size(self) -> int:
        return self._table.shape[0]

    @property
    def pool_size(self) -> int:
        return self._table.numel()

    @property
    def pages_in_use(self) -> int:
        """Pages that hold tokens; reads the lengths from the device."""
        pages = -(-self._seq_lens.long() // self.page_size)
        return int(pages.clamp(max=self._table.shape[1]).sum())

    @property
    def nbytes(self) -> int:
        return self._table.nbytes + self._seq_lens.nbytes

    def append(self, num_tokens: int) -> None:
        self._seq_lens += num_tokens

    def crop(self, num_tokens: int) -> None:
        self._seq_lens.sub_(num_tokens).clamp_(min=0)

    def clear(self) -> None:
        self._seq_lens.zero_()
