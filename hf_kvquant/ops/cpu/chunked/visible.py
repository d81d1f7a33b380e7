"""Which tokens the queries of a step may see, and in which pages they lie."""

from __future__ import annotations

import torch

from ... import reference


class Visible:
    """The columns of a step's logits: of each sequence the tokens that some query may see, and where they lie.

    Attributes:
        pages: `[B, N]`, oldest first.
        start_slot: the slot of the first column in the first page.
        length: how many columns there are, at least one.
        is_full: whether every query sees every column.
        written: bool `[B, length]`, whether a column holds a token (only if not `is_full`).
        positions: `[B, length]`, which token that is (only if not `is_full`).
    """

    def __init__(
        self,
        page_table: torch.Tensor,
        seq_lens: torch.Tensor,
        page_size: int,
        num_tokens: int,
        window: int | None,
        causal: bool,
        is_masked: bool,
    ) -> None:
        self.window, self.causal = window, causal
        # Columns are counted from the oldest page of each sequence.
        capacity, lens = page_table.shape[1] * page_size, seq_lens.tolist()
        oldest = [max(-(-n // page_size) * page_size - capacity, 0) for n in lens]
        held = [n - first for n, first in zip(lens, oldest, strict=True)]
        stop = max(1, *held)
        start = 0 if window is None else min(max(min(held) - num_tokens - window + 1, 0), stop - 1)
        pages = reference.by_age(page_table, seq_lens, page_size)[0] if any(oldest) else page_table
        self.pages = pages[:, start // page_size : -(-stop // page_size)]
        self.start_slot, self.length = start % page_size, stop - start
        sees_all = num_tokens == 1 and window != 0 or not (causal or window is not None)
        self.is_full = sees_all and min(held) == stop and not is_masked
        if not self.is_full:
            cpu = seq_lens.device  # whatever the program's default device is
            self.positions = torch.tensor(oldest, device=cpu)[:, None] + torch.arange(start, stop, device=cpu)
            self.written = self.positions < seq_lens[:, None]
            self.queries = seq_lens[:, None].long() - num_tokens + torch.arange(num_tokens, device=cpu)

    def hidden(self, tokens: slice) -> torch.Tensor:
        """What some of the queries do not see, bool `[B, T', length]`."""
        ahead = self.queries[:, tokens, None] - self.positions[:, None, :]
        hidden = ~self.written[:, None]
        if self.causal:
            hidden = hidden | (ahead < 0)
        if self.window is not None:
            hidden = hidden | (ahead >= self.window)
        return hidden
