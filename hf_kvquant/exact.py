"""The first and the newest tokens of a layer in the model's dtype, beside its 8-bit pages.

The pages hold all tokens, these among them, so whatever happens to pages need not know of this. Attention reads them
from here instead: a token attends to the first `num_first` tokens, to itself and to the `num_recent - 1` before it as
the model made them, to all others in 8 bits, and both parts are merged by their log-sum-exp.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .stores import keep_in_place, mutable_everywhere

# How many tokens may be taken back and be followed by others without asking the pages for older ones.
SLACK = 64

_Pair = tuple[torch.Tensor, torch.Tensor]
Length = int | torch.Tensor  # of the sequences; on the device where the CPU does not know it


@dataclass(frozen=True)
class ExactStep:
    """What one step sees of these tokens.

    Attributes:
        num_first, num_recent: as of `ExactTokens`.
        held: K and V `[B, H, num_first + n, D]` after the step.
        before, new: K and V of before the step, and those of the step `[B, H, T, D]`; None if it adds none.
    """

    num_first: int
    num_recent: int
    held: _Pair
    before: _Pair | None = None
    new: _Pair | None = None

    def tokens(self, index: int, num_newest: int, behind: int = 0) -> torch.Tensor:
        """K (0) or V (1) `[B, H, num_first + num_newest, D]`, the newest but for the last `behind`."""
        held = self.held[index]
        if num_newest + self.num_first == held.shape[2] and not behind:
            return held
        newest = held[:, :, self.num_first :]
        if num_newest + behind > newest.shape[2] and self.before is not None and self.new is not None:
            newest = torch.cat([self.before[index][:, :, self.num_first :], self.new[index]], dim=2)
        end = newest.shape[2] - behind
        start = end - num_newest
        assert start >= 0  # noqa: S101 - the handles of a step know its own tokens
        return torch.cat([held[:, :, : self.num_first], newest[:, :, start:end]], dim=2)


class ExactTokens:
    """The tokens of one layer that are kept as the model made them.

    Args:
        num_recent: newest tokens, itself among them, that a token attends to.
        in_place: whether the memory stays where it is from step to step; else every step makes it anew, so that
            copies of a layer can share it.
    """

    def __init__(self, num_recent: int, in_place: bool) -> None:
        self.num_first = 0
        self.num_recent = num_recent
        self.in_place = in_place
        self.held: _Pair | None = None  # [B, H, num_first + n, D]: the first ones, and the newest at the end
        # Whether tokens that the layer has counted are still to be appended: True if they are the first.
        self.lacks: bool | None = None
        self._coming: _Pair | None = None  # what `held` is about to become where it is

    @property
    def nbytes(self) -> int:
        return 0 if self.held is None else sum(tensor.nbytes for tensor in self.held)

    def __deepcopy__(self, memo: dict[int, Any]) -> ExactTokens:
        other = copy.copy(self)
        if self.in_place and self.held is not None:
            other.held = (self.held[0].clone(), self.held[1].clone())
        return other

    def reserve(self, key: torch.Tensor, value: torch.Tensor, num_first: int) -> None:
        """Begin anew, for sequences like `key` and `value` and `num_first` tokens from their start."""
        self.num_first = num_first
        shapes = [
            (*x.shape[:2], self.num_first + self.num_recent + self.in_place * SLACK, x.shape[3]) for x in (key, value)
        ]
        if self.held is not None and self.in_place and [tuple(x.shape) for x in self.held] == shapes:
            for tensor in self.held:
                tensor.zero_()
            return
        with mutable_everywhere():
            self.held = (key.new_zeros(shapes[0]), value.new_zeros(shapes[1]))
        self.mark_addresses()

    def restore(self, key: torch.Tensor, value: torch.Tensor, num_first: int) -> None:
        """Hold what a layer of the same kind has held."""
        self.num_first = num_first
        with mutable_everywhere():
            self.held = (key.clone(), value.clone())
        self.mark_addresses()

    def mark_addresses(self) -> None:
        """Tell the compiler that memory stays where it is, if it does."""
        if self.in_place and self.held is not None and not torch.compiler.is_compiling():
            for tensor in self.held:
                keep_in_place(tensor)

    def clear(self) -> None:
        """Forget the tokens."""
        self.lacks = self._coming = None
        if not self.in_place:
            self.held = None

    def append(self, key: torch.Tensor, value: torch.Tensor, length: Length, keeps_past: bool = False) -> ExactStep:
        """Take new tokens `[B, H, T, D]` of sequences that had `length`; returns what their attention sees.

        With `keeps_past` some more of the newest are held, so that those that are taken back leave enough.
        """
        assert self.held is not None  # noqa: S101 - reserved at the first update
        new, before = (key.detach(), value.detach()), self.held
        num_held = self.num_recent + (SLACK if keeps_past or self.in_place else 0)
        key_after, value_after = (self._appended(old, x, length, num_held) for old, x in zip(before, new, strict=True))
        after = (key_after, value_after)
        if self.in_place:
            if key.shape[2] - 1 + self.num_recent > num_held:  # the step sees more than is held
                before = (before[0].clone(), before[1].clone())
            self._coming, self.lacks = after, None
            self.finish()
        else:
            self.held, self.lacks = after, None
        return ExactStep(self.num_first, self.num_recent, self.held, before, new)

    def finish(self) -> None:
        """Bring what was appended to its place, if it is not there."""
        if self._coming is not None and self.held is not None:
            for old, x in zip(self.held, self._coming, strict=True):
                old.copy_(x)
            self._coming = None

    def _appended(self, old: torch.Tensor, new: torch.Tensor, length: Length, num_held: int) -> torch.Tensor:
        first, newest = old[:, :, : self.num_first], old[:, :, self.num_first :]
        if self.num_first and not (isinstance(length, int) and length >= self.num_first):
            source = torch.arange(self.num_first, device=new.device) - length
            arrives = (source >= 0) & (source < new.shape[2])
            first = torch.where(arrives[:, None], new.index_select(2, source.clamp(0, new.shape[2] - 1)), first)
        num_kept = max(num_held - new.shape[2], 0)
        kept = newest[:, :, max(newest.shape[2] - num_kept, 0) :]
        return torch.cat([first, kept, new[:, :, max(new.shape[2] - num_held, 0) :]], dim=2)

    def now(self) -> ExactStep:
        """What attention sees that adds no tokens."""
        assert self.held is not None  # noqa: S101 - reserved at the first update
        return ExactStep(self.num_first, self.num_recent, self.held)

    # -- operations ------------------------------------------------------------------------------------------------

    def drop(self, num_tokens: int) -> None:
        """Hold the last `num_tokens` no longer; others will take their places."""
        assert self.held is not None  # noqa: S101 - reserved at the first update
        key, value = (x[:, :, : max(x.shape[2] - num_tokens, self.num_first)] for x in self.held)
        self.held = (key, value)

    def crop(self, num_tokens: int, read: Callable[[int, int, int], torch.Tensor]) -> None:
        """Forget the last `num_tokens`; what is to be held instead comes from the pages.

        `read(index, end, count)` gives K (0) or V (1) `[B, H, count, D]` of the tokens before the last `end` ones.
        """
        if self.held is None or not num_tokens:
            return

        def cropped(old: torch.Tensor, index: int) -> torch.Tensor:
            num_held = old.shape[2] - self.num_first
            num_kept = max(num_held - num_tokens, 0)
            num_wanted = num_held if self.in_place else max(num_kept, self.num_recent)
            parts = [old[:, :, : self.num_first], old[:, :, self.num_first : self.num_first + num_kept]]
            if num_wanted > num_kept:
                parts.insert(1, read(index, num_kept, num_wanted - num_kept).to(old.dtype))
            return torch.cat(parts, dim=2)

        self._replace(cropped(self.held[0], 0), cropped(self.held[1], 1))

    def select(self, indices: Sequence[int]) -> None:
        """Sequence i becomes a copy of sequence `indices[i]`."""
        if self.held is not None:
            order = torch.tensor(list(indices), dtype=torch.int64, device="cpu").to(
                self.held[0].device, non_blocking=True
            )
            self._replace(self.held[0].index_select(0, order), self.held[1].index_select(0, order))

    def _replace(self, key: torch.Tensor, value: torch.Tensor) -> None:
        if self.in_place and self.held is not None:
            with mutable_everywhere():
                self.held[0].copy_(key)
                self.held[1].copy_(value)
        else:
            self.held = (key, value)
