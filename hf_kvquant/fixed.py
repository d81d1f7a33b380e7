"""A layer whose pages are reserved at fixed addresses: it can be compiled, and cannot grow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from .exact import ExactStep
from .hosts.configuration import fed_by_images
from .interface import attention_name, is_flash, uses_attention_interface
from .layers import PagedLayer
from .ops import reference
from .pools import OutOfPagesError
from .sides import SIDES, Side
from .static_pages import StaticPageTable
from .stores import PageStore, keep_in_place

if TYPE_CHECKING:
    from typing_extensions import Self

# How many tokens one call may add to a layer with a window without overwriting what they still see. More are taken in
# pieces.
_SLACK = 64


class FixedLayer(PagedLayer):
    """All pages from the start, lengths on the device: a step needs no bookkeeping on the CPU.

    Masks from transformers cover the whole capacity, so that their shape stays the same from step to step; a fresh
    prompt's covers the prompt.

    Args:
        capacity: tokens that a sequence may reach.
        num_pages: most pages that may be reserved, None for no bound.
        args, kwargs: of `PagedLayer`.
    """

    is_compileable = True
    table: StaticPageTable

    def __init__(self, *args: Any, capacity: int, num_pages: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.capacity = capacity
        self.num_pages = num_pages
        self.record_past = False

    def _reserve(self, batch_size: int) -> None:
        if self.index in fed_by_images(self.shared.model_config):
            raise ValueError(
                f"layer {self.index} holds images, and max_cache_len={self.capacity} is a length of text; leave it out"
            )
        self.table = StaticPageTable(batch_size, self.shared.page_size, self.capacity, self.device, self.window, _SLACK)
        if self.num_pages is not None and self.table.pool_size > self.num_pages:
            raise OutOfPagesError(
                f"layer {self.index}: max_cache_len={self.capacity} for {batch_size} sequence(s) takes "
                f"{self.table.pool_size} pages of {self.shared.page_size} tokens, but num_pages={self.num_pages}"
            )
        for store in (self.k, self.v):
            store.resize(self.table.pool_size)
        if not torch.compiler.is_compiling():
            self.mark_addresses()
            self.shared.reservation.num_layers += 1

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if is_flash(self.shared.model_config):  # `generate` leaves out a mask that hides nothing of the text
            raise ValueError(
                f"layer {self.index}: attention {attention_name(self.shared.model_config)!r} would see what is "
                "reserved and not written yet; leave max_cache_len out, or switch to 'kvquant' or 'sdpa'"
            )
        return super().update(key_states, value_states, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        other = super().__deepcopy__(memo)
        if other.is_initialized:
            other.mark_addresses()
        return other

    @torch.compiler.disable
    def mark_addresses(self) -> None:
        """Tell the compiler that these tensors stay where they are."""
        if self.exact is not None:
            self.exact.mark_addresses()
        stores = (self.k.paged, self.v.paged)
        fixed = [*self.table.tensors, self.clipped, *(s.pages for s in stores), *(s.token_scale for s in stores)]
        for tensor in fixed:
            if tensor is not None:
                keep_in_place(tensor)

    def _advance(self, num_new: int, batch_size: int) -> None:
        if num_new > self.capacity:  # what can be known without asking the device
            raise OutOfPagesError(f"layer {self.index}: {num_new} tokens, but max_cache_len={self.capacity}")
        self.table.append(num_new)

    def _check_shapes(self, key: torch.Tensor, value: torch.Tensor) -> None:
        super()._check_shapes(key, value)
        if self.table.batch_size != key.shape[0]:
            raise ValueError(
                f"layer {self.index}: the cache holds {self.table.batch_size} sequence(s) at fixed addresses but got "
                f"keys and values of {key.shape[0]}; make a new cache for another batch size"
            )

    @property
    def _returns_prompt(self) -> bool:
        # A model with attention of its own may make masks for the whole capacity.
        return uses_attention_interface(self.shared.model_config)

    @property
    def _num_kept(self) -> int:
        return self._page_table.shape[1] * self.shared.page_size

    # -- more new tokens than a window has room for ----------------------------------------------------------------

    def _must_hold(self, num_new: int, was_empty: bool) -> bool:
        return not was_empty and num_new > self.table.most_at_once

    def attend(
        self,
        query: torch.Tensor,
        num_new: int,
        attn_mask: torch.Tensor | None,
        exact: ExactStep | None = None,
        **options: Any,
    ) -> torch.Tensor:
        if self._held is None or num_new <= self.table.most_at_once:
            return super().attend(query, num_new, attn_mask, exact, **options)
        key, value = self._held
        self._observe(key, value)
        outputs = []
        for start in range(0, num_new, self.table.most_at_once):
            rows = slice(start, min(start + self.table.most_at_once, num_new))
            behind = num_new - rows.stop
            seq_lens = self._seq_lens - behind
            self._write(key[:, :, rows], value[:, :, rows], self._page_table, seq_lens)
            mask = None if attn_mask is None else attn_mask[:, :, rows]
            outputs.append(self._attend(query[:, :, rows], seq_lens, num_new, mask, exact, behind, **options))
        self._held = None
        return torch.cat(outputs, dim=2)

    def read(self, side: Side, num_new: int, exact: ExactStep | None = None) -> torch.Tensor:
        if self._held is None or num_new <= self.table.most_at_once:
            return super().read(side, num_new, exact)
        # Writing them would overwrite what the first of them see: they stay held until the next update.
        held = self._held[SIDES.index(side)]
        dense = self._put(self._read_at(self._store(side), self._seq_lens - num_new), held)
        return self._with_exact(dense, side, num_new, exact)

    def with_new(self, dense: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        return self._put(dense, new)

    def _put(self, dense: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """`dense` with the newest tokens in their places."""
        return dense.index_copy(2, self.places_of(new.shape[2]), new)

    # -- reading ---------------------------------------------------------------------------------------------------

    def _read(self, store: PageStore, num_new: int) -> torch.Tensor:
        return self._read_at(store, self._seq_lens)

    def _read_at(self, store: PageStore, seq_lens: torch.Tensor) -> torch.Tensor:
        """Every token in its absolute place, zeros where none is held."""
        absolute = torch.arange(self.capacity, device=self.device)
        if not self.table.wraps:
            values = store.read(self._page_table)[:, :, : self.capacity]
            return values.masked_fill((absolute >= seq_lens[0])[:, None], 0)
        pages, positions = reference.by_age(self._page_table, seq_lens, self.shared.page_size)
        source = absolute - positions[0, 0]
        held = (source >= 0) & (absolute < seq_lens[0])
        values = store.read(pages).index_select(2, source.clamp(0, positions.shape[1] - 1))
        return values.masked_fill(~held[:, None], 0)

    def _view_start(self, num_new: int) -> int:
        return 0

    def _view_length(self, num_new: int) -> int:
        return self.capacity

    def get_seq_length(self) -> Any:
        """Tokens a sequence has seen: a number on the device once there are any."""
        return 0 if self.is_empty else self._seq_lens[0].long()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and first token of transformers' mask."""
        return (query_length if self.is_empty and self._returns_prompt else self.capacity), 0

    def get_max_length(self) -> int:
        """The capacity."""
        return self.capacity

    # -- operations ------------------------------------------------------------------------------------------------

    def check_crop(self, num_tokens: int) -> None:
        if not self.is_empty:
            self.table.check_crop(num_tokens)

    def check_select(self, indices: Sequence[int]) -> None:
        super().check_select(indices)
        if len(indices) != self.table.batch_size:
            raise ValueError(
                f"layer {self.index}: a cache at fixed addresses keeps its {self.table.batch_size} sequence(s); it "
                f"cannot be changed to {len(indices)}"
            )

    def follow_select(self, indices: Sequence[int]) -> None:
        super().follow_select(indices)
        order = torch.tensor(list(indices), dtype=torch.int64, device="cpu").to(self.device, non_blocking=True)
        if self.table.wraps:  # a window, which is short
            for store in (self.k, self.v):
                store.select_rows(order, len(indices))
            return
        sources, targets = self.table.select(order)
        for store in (self.k, self.v):
            store.copy(sources, targets)

    def follow_crop(self, num_tokens: int) -> None:
        if not self.is_empty and self.table.shares:
            sources, targets = self.table.write_into_own()
            for store in (self.k, self.v):
                store.copy(sources, targets)
        super().follow_crop(num_tokens)

    def _rewrite(self, key: torch.Tensor, value: torch.Tensor) -> None:
        raise ValueError(
            f"layer {self.index}: keys and values at fixed addresses cannot be replaced; make the cache without "
            "max_cache_len"
        )

    def activate_past_recording(self) -> None:
        """Nothing to change: a fixed window keeps some tokens more than it needs, and `crop` is held to them."""
        self.record_past = True
