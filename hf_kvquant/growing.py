"""A layer whose pages grow with the tokens."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .handle import PagedKV
from .layers import PagedLayer
from .offload import OffloadedStore
from .pages import PageTable
from .pools import OutOfPagesError, PagePool
from .stores import PageStore

if TYPE_CHECKING:
    from typing_extensions import Self


class GrowingLayer(PagedLayer):
    """Pages by need, in a table that it shares with the layers that see the same tokens.

    Args:
        table: the shared one, of a table for this layer's window.
        offloads: whether the pages rest in host memory.
        args, kwargs: of `PagedLayer`.
    """

    is_compileable = False
    knows_length = True
    table: PageTable

    def __init__(self, *args: Any, table: PageTable, offloads: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.table = table
        self.offloads = offloads
        self.store_type = OffloadedStore if offloads else PageStore
        self.length = 0  # tokens that this layer has written
        self._copies = 1  # of every sequence of the last update
        self._handed_out: tuple[weakref.ref[PagedKV], ...] = ()  # by the last update

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        made = super().update(key_states, value_states, *args, **kwargs)
        if not torch.compiler.is_compiling():  # which puts objects in place of weak references
            self._handed_out = tuple(weakref.ref(side) for side in made if isinstance(side, PagedKV))
        return made

    @torch.compiler.disable  # the compiler puts objects in place of weak references
    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)

    def _reserve(self, batch_size: int) -> None:
        self.table.add_follower(self)
        for store in (self.k, self.v):
            self.table.pool.add_user(store)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        is_alone = id(self.table) not in memo  # else the whole cache is copied
        if is_alone and self.is_initialized:
            self.settle()
            memo |= {id(self.table): self.table.fork(), id(self.k): self.k, id(self.v): self.v}
        elif is_alone:  # it will see the same tokens
            memo[id(self.table)] = self.table
        other = super().__deepcopy__(memo)
        if self.is_initialized:
            other.table.add_follower(other)
            if is_alone:
                move_to_own_pool(other.table)
        return other

    def _advance(self, num_new: int, batch_size: int) -> None:
        if torch.compiler.is_compiling():
            self._count_apart(num_new, batch_size)
        else:
            self._count(num_new, batch_size)

    def _count(self, num_new: int, batch_size: int) -> None:
        self._copies = copies = self.shared.copies_of(self.length, num_new, batch_size)
        if self.length != self.table.length and not (
            (self.length + num_new, batch_size) == (self.table.length, self.table.batch_size)
            and (copies > 1 or self.table.owns_pages_since(self.length))
        ):
            self.leave_table()
        if self.length == self.table.length:
            self.table.append(num_new, batch_size, copies)
        self.length += num_new

    # Bookkeeping on the CPU: a graph would be guarded on every length. Eager steps go without what the wrapper costs.
    _count_apart = torch.compiler.disable(_count)

    def _write(self, key: torch.Tensor, value: torch.Tensor, page_table: torch.Tensor, seq_lens: torch.Tensor) -> None:
        if self._copies > 1:  # they share their pages
            key, value, page_table, seq_lens = (x[:: self._copies] for x in (key, value, page_table, seq_lens))
            page_table, seq_lens = page_table.contiguous(), seq_lens.contiguous()
        super()._write(key, value, page_table, seq_lens)
        if self.offloads:
            pages = self.table.pages_since(self.length - key.shape[2])
            for store in self._offloaded_stores:
                store.save(pages)

    def prefetch(self) -> None:
        for store in self._offloaded_stores:
            store.prefetch()

    def offload(self) -> None:
        if not self.offloads:
            super().offload()
        for store in self._offloaded_stores:
            store.release()

    @property
    def _offloaded_stores(self) -> list[OffloadedStore]:
        if not self.is_initialized:
            return []
        return [store for store in (self.k, self.v) if isinstance(store, OffloadedStore)]

    @property
    def _num_kept(self) -> int:
        return self.length - self.table.first_position

    @property
    def _seq_lens(self) -> torch.Tensor:
        # A step that broke off may have left the table ahead of this layer.
        return self.table.seq_lens(self.device, self.length)

    def _attended_window(self, attn_mask: torch.Tensor | None) -> int | None:
        # A mask says all; without the window in it, tokens see whatever transformers would hold.
        return self.window if attn_mask is None else None

    # -- reading ---------------------------------------------------------------------------------------------------

    def _read(self, store: PageStore, num_new: int) -> torch.Tensor:
        # Up to the layer's own length: a step that broke off may have left the table ahead of it.
        oldest = self.table.first_position
        dense = store.read(self.table.oldest_first(self.device))
        return dense[:, :, self._view_start(num_new) - oldest : self.length - oldest]

    def _view_start(self, num_new: int) -> int:
        return 0 if self.window is None else max(self.length - num_new - (self.window - 1), 0)

    def _view_length(self, num_new: int) -> int:
        return self.length - self._view_start(num_new)

    def get_seq_length(self) -> int:
        """Tokens a sequence has seen."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and first token of what the next `query_length` tokens see, themselves included."""
        start = self._view_start(0)
        return self.length + query_length - start, start

    def get_max_length(self) -> int:
        """The window, or -1: there is no limit."""
        return -1 if self.window is None else self.window

    # -- operations ------------------------------------------------------------------------------------------------

    def follow_reset(self) -> None:
        super().follow_reset()
        self.length = 0

    def check_crop(self, num_tokens: int) -> None:
        # An assistant that reads the keys and values of the model's last step does so when drafts have been taken back.
        for reference_to in self._handed_out:
            if (handle := reference_to()) is not None:
                handle.dense("keys and values are used after their step")
        self._handed_out = ()

    def follow_crop(self, num_tokens: int) -> None:
        self.length = max(self.length - num_tokens, 0)
        self.is_empty = self.length == 0
        super().follow_crop(num_tokens)

    @property
    def _first_held(self) -> int:
        return self.table.first_position

    def _own_table(self, keeps_length: bool = True) -> None:
        self.shared.copies = 1  # sequences may differ from here on
        if not self.is_initialized:
            return
        if len(self.table.followers) > 1:
            self.leave_table()
        if not keeps_length:
            self.table.part()

    def activate_past_recording(self) -> None:
        """Keep tokens that leave the window until `crop` has been called."""
        self.record_past = True

    @property
    def record_past(self) -> bool:
        return self.table.keeps_past

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self.table.keeps_past = value

    def _rewrite(self, key: torch.Tensor, value: torch.Tensor) -> None:
        batch_size, _, length, _ = key.shape
        view_length = self._view_length(0)
        self._copies = 1  # what is written now may differ from sequence to sequence
        if (batch_size, length) == (self.batch_size, view_length):
            if not self.table.is_exclusive:
                self._own_table()
                move_to_own_pool(self.table, shares=False)
        elif self.is_sliding:
            raise ValueError(
                f"layer {self.index}: keys and values of {batch_size} x {length} (sequences, tokens) cannot replace "
                f"{self.batch_size} x {view_length} of a sliding window; only full attention can be pruned"
            )
        else:
            self._take_empty_pages(length, batch_size)
        if length:
            self._write(key, value, self._page_table, self._seq_lens)

    def _take_empty_pages(self, length: int, batch_size: int) -> None:
        """Get pages for as many tokens, in the table of other layers that were replaced by as many if there are any."""
        table = self.shared.replaced
        if table is None or (table.length, table.batch_size) != (length, batch_size) or not table.is_exclusive:
            table = PageTable(
                self.table.page_size, None, PagePool(self.table.pool.num_pages), self.table.expected_length
            )
            table.append(length, batch_size)
        self.shared.replaced = table
        nothing = torch.zeros(0, dtype=torch.int64, device=self.k.index_device)
        self.k, self.v = self.k.with_pages(nothing), self.v.with_pages(nothing)
        self.table.remove_follower(self)
        self.table, self.length, self.is_empty = table, length, not length
        self._reserve(batch_size)

    # -- going another way than other layers and caches ------------------------------------------------------------

    def leave_table(self) -> None:
        """Go on with a table of its own, with the tokens that this layer has written."""
        table = self.table.fork()
        if self.length == self.table.length:  # else it sees other tokens than the others
            table.join(self.table)
        if self.length:
            table.crop(self.table.length - self.length)
        else:
            table.clear()
        self.table.remove_follower(self)
        table.add_follower(self)
        self.table = table
        move_to_own_pool(table)


def move_to_own_pool(table: PageTable, shares: bool = True) -> None:
    """Copy the pages of `table` into a pool that no other table has, for all layers that go by it.

    Unless its sequences may share pages, each gets its own. Raises OutOfPagesError if these are too many.
    """
    if shares:
        pages, rows = np.unique(table.rows, return_inverse=True)
    else:
        pages, rows = table.rows.ravel(), np.arange(table.rows.size)
    num_pages = table.pool.num_pages
    if num_pages is not None and len(pages) > num_pages:
        raise OutOfPagesError(
            f"{len(table.rows)} sequences that share no page need {len(pages)} pages of {table.page_size} tokens, but "
            f"num_pages={num_pages}; pass num_pages={len(pages)} or more, or store less (crop, reset, a smaller batch)"
        )
    layers = [layer for layer in table.followers if isinstance(layer, GrowingLayer)]
    copies = []
    for layer in layers:
        index = torch.from_numpy(pages).to(layer.k.index_device)
        copies.append((layer.k.with_pages(index), layer.v.with_pages(index)))
    pool = PagePool(num_pages, size=len(pages))
    for layer, (layer.k, layer.v) in zip(layers, copies, strict=True):
        pool.add_user(layer.k)
        pool.add_user(layer.v)
    table.move_to(pool, rows.reshape(table.rows.shape))
