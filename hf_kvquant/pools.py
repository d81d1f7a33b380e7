"""Pools: pages that the sequences of several page tables may share.

A pool knows how many pages there are. Which of them are free is what its tables do not refer to, so a table that is
dropped gives its pages back by that alone. The bytes lie in stores (`stores.py`), which register with the pool and are
told to grow, clear or copy pages.
"""

from __future__ import annotations

import weakref
from typing import Protocol

import numpy as np
import torch

# Pools grow to this multiple of the need while their final size is not known, and shrink when they exceed the second
# multiple: together they bound what is allocated beside what is used.
_GROWTH, _SLACK = 1.2, 1.25


class OutOfPagesError(RuntimeError):
    """A sequence needs more pages than `num_pages` allows, or more than were reserved; nothing was changed."""


class PageUser(Protocol):
    """What a pool asks of those whose bytes lie in its pages; indices are int64 tensors on the user's device."""

    @property
    def index_device(self) -> torch.device:
        """Where indices are wanted."""

    def resize(self, num_pages: int) -> None:
        """Have pages 0 ... num_pages - 1; those that existed stay, new ones are zero. Fewer are had without memory."""

    def clear(self, pages: torch.Tensor) -> None:
        """Zero these pages."""

    def copy(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Copy page sources[i] to targets[i]."""


class PageReferrer(Protocol):
    """What a pool asks of a page table."""

    rows: np.ndarray

    @property
    def expected_pages(self) -> int | None:
        """Pages that its sequences will need at most, if known."""

    def renumber(self, numbers: np.ndarray) -> None:
        """Page p is now page numbers[p]."""


class PagePool:
    """Pages and who refers to them.

    Args:
        num_pages: most pages there may be, None for no bound.
        size: pages that the users to come already hold.
    """

    def __init__(self, num_pages: int | None = None, size: int = 0) -> None:
        self.num_pages = num_pages
        self.size = size  # pages that every user holds
        self._fresh = size  # pages from here on are as they were made: zero
        # Stores and tables hold their pool and not the other way round: memory goes with the last reference to a cache,
        # without waiting for a garbage collection that a full GPU does not trigger.
        self._users: list[weakref.ref[PageUser]] = []
        self._tables: list[weakref.ref[PageReferrer]] = []

    @property
    def users(self) -> list[PageUser]:
        """Those whose bytes lie in the pages."""
        return [user for reference in self._users if (user := reference()) is not None]

    @property
    def tables(self) -> list[PageReferrer]:
        """The page tables that refer to pages."""
        return [table for reference in self._tables if (table := reference()) is not None]

    def add_user(self, user: PageUser) -> None:
        """Give `user` as many pages as the others have."""
        user.resize(self.size)
        self._users = [*(reference for reference in self._users if reference() is not None), weakref.ref(user)]

    def add_table(self, table: PageReferrer) -> None:
        """Count the pages of `table` as used."""
        self._tables = [*(reference for reference in self._tables if reference() is not None), weakref.ref(table)]

    def remove_table(self, table: PageReferrer) -> None:
        """No longer count the pages of `table`."""
        self._tables = [reference for reference in self._tables if reference() not in (None, table)]

    def references(self) -> np.ndarray:
        """int64 `[size]`: how often each page is referred to."""
        counts = np.zeros(self.size, dtype=np.int64)
        for table in self.tables:
            counts += np.bincount(table.rows.ravel(), minlength=self.size)
        return counts

    def hold(self, num_pages: int) -> None:
        """Have `num_pages` pages, all of which hold something."""
        self.grow(num_pages)
        self._fresh = max(self._fresh, num_pages)

    def grow(self, need: int) -> None:
        """Have at least `need` pages."""
        if need <= self.size:
            return
        size = self._target_size(need)
        try:
            for user in self.users:
                user.resize(size)
        except BaseException:  # no memory, or an interrupt: as before
            for user in self.users:
                user.resize(self.size)
            raise
        self.size = size

    def shrink(self) -> None:
        """Give memory back when much more is allocated than used; pages are renumbered."""
        in_use = self.references() > 0
        num_kept = int(np.count_nonzero(in_use))
        size = self._target_size(num_kept)
        if self.size <= size or self.size <= num_kept * _SLACK:
            return
        # The last pages move into the holes between the first, and stay where they were as well until all tables have
        # followed: a failure on the way loses nothing.
        moved, holes = num_kept + np.flatnonzero(in_use[num_kept:]), np.flatnonzero(~in_use[:num_kept])
        try:
            self.copy(moved, holes)
        except torch.OutOfMemoryError:
            return
        numbers = np.arange(self.size)
        numbers[moved] = holes
        for table in self.tables:
            table.renumber(numbers)
        self.size = size
        for user in self.users:
            user.resize(size)
        self._fresh = min(self._fresh, size)

    def clear(self, pages: np.ndarray) -> None:
        """Zero these pages, which will be written."""
        used = pages[pages < self._fresh]
        if len(used):
            for user, index in self._indexed(used):
                user.clear(index[0])
        self._fresh = max(self._fresh, int(pages.max(initial=-1)) + 1)

    def copy(self, sources: np.ndarray, targets: np.ndarray) -> None:
        """Copy page sources[i] to targets[i]."""
        if len(sources):
            for user, index in self._indexed(sources, targets):
                user.copy(index[0], index[1])
            self._fresh = max(self._fresh, int(targets.max()) + 1)

    def _indexed(self, *indices: np.ndarray) -> list[tuple[PageUser, torch.Tensor]]:
        """Every user with the indices on its device, `[len(indices), n]`; one transfer per device."""
        stacked = torch.from_numpy(np.stack(indices).astype(np.int64))
        moved: dict[torch.device, torch.Tensor] = {}
        pairs = []
        for user in self.users:
            device = user.index_device
            if device not in moved:
                moved[device] = stacked.to(device, non_blocking=True)
            pairs.append((user, moved[device]))
        return pairs

    def _target_size(self, need: int) -> int:
        size = int(need * _GROWTH)
        expected = [table.expected_pages for table in self.tables]
        total = sum(pages for pages in expected if pages is not None)
        if expected and None not in expected and need <= total:  # else more came than was expected
            size = min(size, total)
        if self.num_pages is not None:
            size = min(size, self.num_pages)
        return max(size, need)
