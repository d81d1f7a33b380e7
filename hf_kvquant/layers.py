"""One layer of the cache: it writes new tokens into its pages, and attends over them.

What is the same for pages that grow with the tokens (`growing.py`) and for pages at fixed addresses (`fixed.py`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from . import ops
from .exact import ExactStep
from .handle import PagedKV
from .hosts.conventions import tokens_to_take_back
from .interface import attention_name, uses_attention_interface
from .layer_state import LayerState
from .pages import PageTable
from .parts import attend_in_parts
from .query import round_query


class PagedLayer(LayerState):
    """Keys and values of one layer in pages. Arguments as of `LayerState`."""

    # -- writing and attending -------------------------------------------------------------------------------------

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Write new tokens `[B, H, T, D]` and return what attention reads: handles, or dense tensors.

        Raises ValueError for shapes of another model, or if attention cannot do what was asked, and OutOfPagesError if
        there is no room; nothing is written.
        """
        if self.plan.q is not None:
            self._check_attention()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._check_shapes(key_states, value_states)
        self.settle()  # tokens that no attention has asked for
        num_new, was_empty, raw = key_states.shape[2], self.is_empty, (key_states, value_states)
        if torch.compiler.is_compiling():
            self._count_and_hold(*raw)
        else:
            num_prompt = self.num_prompt
            try:
                self._count_and_hold(*raw)
            except BaseException:  # they are not counted
                self._held, self.num_prompt, self.is_empty = None, num_prompt, was_empty
                if self.exact is not None:
                    self.exact.lacks = None
                raise
        exact = self._keep_exact(*raw)
        if not (self.k.needs_tokens or self.v.needs_tokens or self._must_hold(num_new, was_empty)):
            self._write(*raw, self._page_table, self._seq_lens)
            self._held = None
        is_all = was_empty and self._returns_prompt
        key = PagedKV(self, "k", key_states, is_all, was_empty or key_states.requires_grad, exact)
        value = PagedKV(self, "v", value_states, is_all, was_empty or value_states.requires_grad, exact)
        if self.shared.is_fused:
            return key, value
        reason = f"attention {self.shared.model_config._attn_implementation!r} takes dense tensors"
        return key.dense(reason), value.dense(reason)

    def _count_and_hold(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Count new tokens, which are held until they are written, and kept exactly.

        Counting is the last that is done: tokens that are counted are never lost, whatever breaks in.
        """
        num_new, prompt_length = key.shape[2], self.shared.prompt_length
        drafts_follow = self.is_empty and 0 < prompt_length < num_new and self.record_past
        self.num_prompt = prompt_length if drafts_follow else num_new
        self._held = (key, value)
        if self.exact is not None:
            self.exact.lacks = self.is_empty
        self.is_empty = False
        self._advance(num_new, key.shape[0])

    def _keep_exact(self, key: torch.Tensor, value: torch.Tensor) -> ExactStep | None:
        """Keep the newest tokens as the model made them, if that is to be done; returns what their attention sees."""
        if self.exact is None:
            return None
        if self.exact.lacks is None:
            self.exact.finish()
            return None
        if self.exact.lacks:
            self.exact.reserve(key, value, self._num_first)
        return self.exact.append(key, value, self.get_seq_length() - key.shape[2], self.record_past)

    @property
    def _num_first(self) -> int:
        """How many tokens from the start of every sequence are kept as the model made them: whole pages."""
        if not self.plan.sink_tokens or self.window is not None:
            return 0
        mask, padding = self.shared.padding_mask, 0
        if mask is not None:
            padding = int((~mask).cumprod(dim=1).sum(dim=1).max())
        page_size = self.shared.page_size
        return -(-(self.plan.sink_tokens + padding) // page_size) * page_size

    def attend(
        self,
        query: torch.Tensor,
        num_new: int,
        attn_mask: torch.Tensor | None,
        exact: ExactStep | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """`[B, Hq, T, D]` over everything that is stored.

        Args:
            query: `[B, Hq, T, D]`, the newest `num_new` tokens (0: they are not tokens of this cache).
            attn_mask: `[1 | B, 1 | Hq, T, L]`, its columns those of `shape_of`.
            exact: what the handles of the step have of tokens as the model made them.
            options: of `ops.paged_attention`.
        """
        self.settle()
        return self._attend(query, self._seq_lens, num_new, attn_mask, exact, **options)

    def _attend(
        self,
        query: torch.Tensor,
        seq_lens: torch.Tensor,
        num_new: int,
        attn_mask: torch.Tensor | None,
        exact: ExactStep | None,
        behind: int = 0,
        **options: Any,
    ) -> torch.Tensor:
        """`behind` new tokens come after those of `query`."""
        options.update(
            attn_mask=attn_mask, mask_start=self._view_start(num_new), window=self._attended_window(attn_mask)
        )
        pages = (self.k.paged, self.v.paged, self._page_table, seq_lens)
        if self.exact is None:
            return ops.paged_attention(self.rounded(query), *pages, **options)
        return attend_in_parts(
            query, self.rounded(query), *pages, exact or self.exact.now(), length=self.get_seq_length() - behind,
            behind=behind, adds_tokens=num_new > 0, **options,
        )  # fmt: skip

    def rounded(self, query: torch.Tensor) -> torch.Tensor:
        """`query` `[B, Hq, T, D]` as it meets the keys in pages, in 8 bits if `q_dtype` says so."""
        if self.plan.q is None:
            return query
        scale, shard = self.q_scale, self.shared.shard
        if scale is not None and shard is not None:
            scale = shard.own(scale, query.shape[1])
        return round_query(query, self.plan.q.format, scale, f"layer {self.index}")

    def _check_attention(self) -> None:
        config = self.shared.model_config
        if self.shared.is_fused and uses_attention_interface(config):
            return
        own = "of the model's own" if self.shared.is_fused else repr(attention_name(config))
        raise ValueError(
            f"layer {self.index}: q_dtype rounds the query inside attn_implementation='kvquant', but this attention is "
            f"{own} and takes dense keys; switch to 'kvquant' where the model allows it, or leave q_dtype out"
        )

    def _attended_window(self, attn_mask: torch.Tensor | None) -> int | None:
        """The window that attention has to keep to."""
        return self.window

    def settle(self) -> None:
        """Write tokens that were held back, taking scales from them where none are known yet.

        What is padding among them attention has told, or else the mask that `generate` gave.
        """
        self._assigned.finish(self)
        if self._held is None:
            return
        key, value = self._held
        self._keep_exact(key, value)
        self._observe(key, value)
        self._write(key, value, self._page_table, self._seq_lens)
        self._held = None

    def _observe(self, key: torch.Tensor, value: torch.Tensor) -> None:
        if not self.needs_tokens:
            return
        valid = self._held_valid if self._held_valid is not None else self._padding_of(key)
        self._held_valid = None
        key, value = key[:, :, : self.num_prompt], value[:, :, : self.num_prompt]  # drafts may be rejected
        valid = None if valid is None else valid[:, : self.num_prompt]
        # The tokens of a padded prompt in pieces are to come. A graph cannot ask, and padding alone equalizes nothing.
        if valid is not None and not torch.compiler.is_compiling() and not valid.any():
            return
        for store, tensor in ((self.k, key), (self.v, value)):
            if store.needs_tokens:
                store.observe(tensor.detach(), valid)

    def _padding_of(self, key: torch.Tensor) -> torch.Tensor | None:
        """`[B, T]` for the newest tokens by the mask that `generate` gave; whatever comes behind it is a token."""
        mask = self.shared.padding_mask
        # The mask of an encoder, whose prompt has no length here, says nothing about a decoder's tokens.
        if mask is None or not self.shared.prompt_length or key.shape[0] % mask.shape[0]:
            return None
        positions = self.places_of(key.shape[2])
        valid = mask.to(key.device).index_select(1, positions.clamp(max=mask.shape[1] - 1))
        return (valid | (positions >= mask.shape[1])).repeat_interleave(key.shape[0] // mask.shape[0], dim=0)

    def _write(self, key: torch.Tensor, value: torch.Tensor, page_table: torch.Tensor, seq_lens: torch.Tensor) -> None:
        if key.requires_grad or value.requires_grad:
            key, value = key.detach(), value.detach()
        if key.shape[2] > self._num_kept:  # a window does not keep the beginning of a long prompt
            key, value = key[:, :, -self._num_kept :], value[:, :, -self._num_kept :]
        ops.write_kv(key, value, self.k.paged, self.v.paged, page_table, seq_lens, self.clipped)

    @abstractmethod
    def _advance(self, num_new: int, batch_size: int) -> None:
        """Count `num_new` more tokens of every sequence and have room for them."""

    def _must_hold(self, num_new: int, was_empty: bool) -> bool:
        """Whether new tokens may only be written piece by piece while attention reads."""
        return False

    @property
    def _returns_prompt(self) -> bool:
        """Whether a fresh prompt is all that its own attention gets to see."""
        return True

    @property
    @abstractmethod
    def _num_kept(self) -> int:
        """How many of the newest tokens there is room for."""

    # -- replacing what is stored ------------------------------------------------------------------------------------

    @property
    def keys(self) -> Any:
        """What is stored `[B, H, L, D]`, as `update` would return it; None before the first token.

        Tools that prune a cache assign to it, and to `values`: what is stored is then replaced, quantized again, and
        the sequences are as long as the new tensors. (Changing the tensor in place changes nothing in the cache.)
        """
        return self._assigned.read(self, "k")

    @keys.setter
    def keys(self, keys: Any) -> None:
        self._assigned.take(self, "k", keys)

    @property
    def values(self) -> Any:
        """As `keys`."""
        return self._assigned.read(self, "v")

    @values.setter
    def values(self, values: Any) -> None:
        self._assigned.take(self, "v", values)

    def replace(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store these keys and values `[B, H, L, D]` and nothing else. Raises ValueError if they do not fit."""
        self._check_shapes(key, value)
        self._rewrite(key, value)
        if self.exact is None:
            return
        num_before = self.get_seq_length() - key.shape[2]
        if num_before:  # tokens that a window has passed stay, as a crop may bring them back
            self.exact.drop(key.shape[2])
        else:
            self.exact.reserve(key, value, self._num_first)
        self.exact.append(key, value, num_before)

    @abstractmethod
    def _rewrite(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store these keys and values `[B, H, L, D]` and nothing else."""

    # -- operations ------------------------------------------------------------------------------------------------
    # An operation on one layer first stops sharing its table. The cache changes each table once and has its layers
    # follow.

    def reset(self) -> None:
        """Forget all tokens and give the pages back; frozen scales stay."""
        self._own_table(keeps_length=False)
        if self.is_initialized and self.table is not None:  # else the table is that of other layers
            self.table.clear()
        self.follow_reset()

    def follow_reset(self) -> None:
        self._held = self._held_valid = None
        self._assigned.forget()
        self.is_empty = True
        if self.exact is not None:
            self.exact.clear()
        if self.is_initialized:
            self.clipped.zero_()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens (a positive number is the final length before 5.18)."""
        num_tokens = tokens_to_take_back(tokens_to_remove, self.get_seq_length)
        self.settle()
        self.check_crop(num_tokens)
        self._own_table(keeps_length=not num_tokens)
        if self.is_initialized and self.table is not None:
            self.table.crop(num_tokens)
        self.follow_crop(num_tokens)

    def check_crop(self, num_tokens: int) -> None:
        """Raise what a crop would raise beside its table, before anything changes."""

    def check_select(self, indices: Sequence[int]) -> None:
        """Raise what a selection of sequences would raise, before anything changes."""
        if wrong := [index for index in indices if not 0 <= index < self.batch_size]:
            raise ValueError(
                f"layer {self.index}: there is no sequence {wrong[0]} among the {self.batch_size} that it holds; they "
                "are counted from 0"
            )

    def follow_crop(self, num_tokens: int) -> None:
        """Follow the table, which has been cropped."""
        if self.exact is not None and not self.is_empty:
            self.exact.crop(num_tokens, self._read_behind)

    def select(self, indices: Sequence[int]) -> None:
        """Sequence i becomes a copy of sequence `indices[i]`."""
        if self.is_empty:
            return
        self.settle()
        self.check_select(indices)
        self._own_table()
        if isinstance(self.table, PageTable):
            self.table.select(indices)
        self.follow_select(indices)

    def follow_select(self, indices: Sequence[int]) -> None:
        """Follow the table, whose sequences have been selected."""
        if self.exact is not None:
            self.exact.select(indices)

    def _own_table(self, keeps_length: bool = True) -> None:
        """Stop sharing the table with other layers, which will be as long as this one still, or not."""

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorder sequences for beam search."""
        self.select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence becomes `repeats`."""
        self.select([index for index in range(max(self.batch_size, 0)) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only these sequences."""
        if self.is_empty:
            return
        self.select(torch.arange(max(self.batch_size, 0), device="cpu")[indices.cpu()].tolist())

    def offload(self) -> None:
        """Let the pages rest in host memory until attention needs them."""
        raise ValueError(
            f"layer {self.index}: its pages are on the device; make the cache with cache_config={{'offload': True}}"
        )

    def prefetch(self) -> None:
        """Start to bring pages that rest in host memory; these are on the device."""
