"""A page table at fixed addresses, for caches that are compiled."""

from __future__ import annotations

import numpy as np
import torch

from .pools import OutOfPagesError


class StaticPageTable:
    """A page table with every page reserved, as tensors at fixed addresses: a step needs no bookkeeping on the CPU.

    Args:
        batch_size: sequences.
        capacity: tokens that a sequence may reach.
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
        self._first_kept = 0  # tokens before it were overwritten before the last crop
        self._table = torch.arange(batch_size * num_columns, dtype=torch.int32, device=device).view(batch_size, -1)
        self._shares = False
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

    # What a growing table holds as well; read from the device.

    @property
    def length(self) -> int:
        """Tokens of every sequence."""
        return int(self._seq_lens[0])

    @property
    def first_page(self) -> int:
        """Number of the oldest page that is held."""
        return max(-(-self.length // self.page_size) - self._table.shape[1], 0)

    @property
    def rows(self) -> np.ndarray:
        """int64 `[B, N]`: the pages that hold tokens, oldest first."""
        numbers = np.arange(self.first_page, -(-self.length // self.page_size))
        return self._table.cpu().numpy().astype(np.int64)[:, numbers % self._table.shape[1]]

    @property
    def first_position(self) -> int:
        """The oldest token that was not overwritten, not even by tokens that have been taken back."""
        return self._first_position(self.length)

    def _first_position(self, length: int) -> int:
        return max(self._first_kept, length - self._table.shape[1] * self.page_size)

    def lose(self, first_position: int) -> None:
        """Take the tokens before `first_position` for overwritten. Raises ValueError if there are none from it on."""
        if not 0 <= first_position <= self.length:
            raise ValueError(f"the oldest token that is held is {first_position}, of {self.length}")
        self._first_kept = max(self._first_kept, first_position)

    def restore(self, rows: np.ndarray, length: int, first_page: int) -> np.ndarray:
        """Hold sequences of `length` tokens; returns the pages `[B, N]`, oldest first, that are to hold them.

        Raises ValueError if they are not as many as `rows` has.
        """
        self._seq_lens.fill_(length)
        self._first_kept = first_page * self.page_size
        if self.rows.shape != rows.shape or self.first_page != first_page or length > self.capacity:
            raise ValueError(f"{length} tokens in pages {rows.shape} do not fit tables of {self._table.shape}")
        return self.rows

    def append(self, num_tokens: int) -> None:
        """Count `num_tokens` more tokens.

        Raises OutOfPagesError beyond the capacity; in a graph, and on a GPU, it is an assertion of the device instead,
        which fails when the device gets there.
        """
        problem = "more tokens per sequence than max_cache_len; make the cache with a larger max_cache_len"
        fits = self._seq_lens[0] + num_tokens <= self.capacity
        if torch.compiler.is_compiling() or self._seq_lens.device.type != "cpu":
            torch._assert_async(fits, problem)
        else:
            try:
                torch._assert_async(fits, problem)
            except RuntimeError as error:
                raise OutOfPagesError(problem) from error
        self._seq_lens += num_tokens

    def crop(self, num_tokens: int) -> None:
        """Take the last `num_tokens` tokens back. Raises RuntimeError if a window has moved past what remains."""
        self.check_crop(num_tokens)
        self._seq_lens.sub_(num_tokens).clamp_(min=0)

    # Beams. Every column has as many pages as there are sequences: each has one of its own there, and writes into that
    # one only; its older pages may be another's.

    @property
    def _own(self) -> torch.Tensor:
        return torch.arange(self._table.numel(), dtype=torch.int32, device=self._table.device).view_as(self._table)

    @property
    def wraps(self) -> bool:
        """Whether the columns are fewer than the capacity needs and are used again and again."""
        return self._table.shape[1] * self.page_size < self.capacity

    def select(self, order: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sequence i goes on as a copy of sequence `order[i]` (int64 `[B]`), sharing its full pages.

        Returns which pages have to be copied onto which, `[B]` each. Not for a table that `wraps`.
        """
        self._table.copy_(self._table[order])
        self._shares = True
        return self.write_into_own()

    def write_into_own(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Give every sequence its own page to write the next token in; returns pages and copies as `select` does."""
        own = self._own
        column = (self._seq_lens[:1].long() // self.page_size).clamp(max=own.shape[1] - 1)
        sources, targets = (pages.index_select(1, column)[:, 0].long() for pages in (self._table, own))
        is_old = torch.arange(own.shape[1], device=column.device) < column
        self._table.copy_(torch.where(is_old, self._table, own))
        return sources, targets

    @property
    def shares(self) -> bool:
        """Whether a page may belong to several sequences."""
        return self._shares

    def check_crop(self, num_tokens: int) -> None:
        """Raise what `crop` would raise; reads the lengths from the device where there is a window."""
        if self.window is not None:
            length = self.length
            oldest = self._first_position(length)
            if max(length - num_tokens - (self.window - 1), 0) < oldest:
                raise RuntimeError(
                    f"cannot take back {num_tokens} tokens: a layer with a sliding window of {self.window} at fixed "
                    f"addresses keeps only the tokens from {oldest} on"
                )
            self._first_kept = oldest

    def clear(self) -> None:
        self._seq_lens.zero_()
        self._table.copy_(self._own)
        self._shares = False
        self._first_kept = 0
