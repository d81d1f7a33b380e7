"""One layer of the cache: it writes new tokens into its pages and attends over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    CacheLayerMixin,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from . import ops
from .handle import PagedKV
from .hosts import is_fused
from .ops import reference
from .pages import PageTable, StaticPageTable
from .policy import LayerPlan
from .rotary import RotaryLayout
from .stores import PageStore

# With a window and fixed addresses: how many tokens one attention call may add. More are taken in pieces.
_STATIC_SLACK = 64


@dataclass
class SharedState:
    """What all layers of a cache have in common.

    Attributes:
        model_config: the text model's; its attention implementation may change between calls.
        page_size: tokens per page.
        max_cache_len: capacity of a cache with fixed addresses, None for one that grows.
        rotary: how the model turns keys.
        padding_mask: `[B, T]` of the first prompt (True is a token), when `generate` knows it.
    """

    model_config: PreTrainedConfig
    page_size: int
    max_cache_len: int | None = None
    rotary: RotaryLayout = field(default_factory=RotaryLayout)
    padding_mask: torch.Tensor | None = None

    @property
    def is_fused(self) -> bool:
        """Whether the model's attention reads the pages itself."""
        return is_fused(self.model_config)


class PagedLayer(CacheLayerMixin):
    """Keys and values of one layer in pages.

    Args:
        index: of the layer in the cache.
        layer_type: the host's name for it, for the report.
        plan: formats and scales.
        shared: what the layers of the cache have in common.
        table: the page table it shares with the layers that see the same tokens; None for fixed addresses.
        window: of sliding or chunked attention.
    """

    is_croppable = True

    def __init__(
        self,
        index: int,
        layer_type: str,
        plan: LayerPlan,
        shared: SharedState,
        table: PageTable | None,
        window: int | None = None,
    ) -> None:
        self.index = index
        self.layer_type = layer_type
        self.plan = plan
        self.shared = shared
        self.window = window
        self.is_sliding = window is not None
        self.is_compileable = table is None
        self.table: PageTable | StaticPageTable | None = table
        self.length = 0  # tokens written; with fixed addresses only the device knows
        self.is_empty = True
        self.is_initialized = False
        self.dense_reasons: dict[str, None] = {}
        self._pending: tuple[torch.Tensor, torch.Tensor] | None = None
        self._record_past = False

    # -- setting up ------------------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take shapes, dtype and device from the first keys and values.

        Raises ValueError if static scales do not fit them; the layer is then as before.
        """
        batch_size, num_heads = key_states.shape[:2]
        dtype, device = key_states.dtype, key_states.device

        def store(side: str, head_dim: int) -> PageStore:
            where = f"layer {self.index}: {side}"
            plan, rotary = getattr(self.plan, side), self.shared.rotary if side == "k" else None
            return PageStore(plan, num_heads, head_dim, self.shared.page_size, dtype, device, where, rotary)

        k, v = store("k", key_states.shape[-1]), store("v", value_states.shape[-1])
        self.k, self.v = k, v
        self.num_heads, self.dtype, self.device = num_heads, dtype, device
        self.clipped = torch.zeros(2, dtype=torch.int64, device=device)
        if isinstance(self.table, PageTable):
            self.table.users.append(self)
            self.resize_pages(self.table.pool_size)
        else:
            self._reserve(batch_size)
        self.is_initialized = True

    def _reserve(self, batch_size: int) -> None:
        capacity = self.shared.max_cache_len
        assert capacity is not None  # noqa: S101 - a layer without a table is made with a capacity
        table = StaticPageTable(batch_size, self.shared.page_size, capacity, self.device, self.window, _STATIC_SLACK)
        self.table = table
        self.resize_pages(table.pool_size)
        if not torch.compiler.is_compiling():
            stores = (self.k.paged, self.v.paged)
            fixed = [*table.tensors, self.clipped, *(s.pages for s in stores), *(s.token_scale for s in stores)]
            for tensor in fixed:
                if tensor is not None:
                    torch._dynamo.mark_static_address(tensor)

    # -- the two hops ----------------------------------------------------------------------------------------------

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Write new tokens `[B, H, T, D]` and return what attention reads: handles, or dense tensors.

        Raises ValueError for shapes of another model and OutOfPagesError if there is no room; nothing is written.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._check_shapes(key_states, value_states)
        num_new = key_states.shape[2]
        was_empty = self.is_empty
        self._advance(num_new, key_states.shape[0])
        self.is_empty = False

        raw = (key_states, value_states)
        observes = self.k.needs_tokens or self.v.needs_tokens
        in_pieces = not was_empty and isinstance(self.table, StaticPageTable) and num_new > self.table.most_at_once
        self._pending = raw if observes or in_pieces else None
        if self._pending is None:
            self._write(*raw)
        elif not self.shared.is_fused:
            # Another attention never comes back to this layer, so its padding can only be known from `generate`.
            self.settle(None)
        key, value = (
            PagedKV(self, side, num_new, tensor if was_empty else None)
            for side, tensor in zip(("key", "value"), raw, strict=True)
        )
        if self.shared.is_fused:
            return key, value
        reason = f"attention {self.shared.model_config._attn_implementation!r} takes dense tensors"
        return key.dense(reason), value.dense(reason)

    def attend(
        self,
        query: torch.Tensor,
        num_new: int,
        *,
        softmax_scale: float,
        attn_mask: torch.Tensor | None,
        sinks: torch.Tensor | None,
        softcap: float | None,
        causal: bool,
    ) -> torch.Tensor:
        """`[B, Hq, T, D]` over everything that is stored; the mask's columns are those of `shape_of`."""
        table = self._live_table()
        seq_lens = table.seq_lens(self.device)
        is_static = isinstance(table, StaticPageTable)
        mask_start = 0 if is_static else self._view_start(num_new)
        # A mask says all, the window too; a host mask without it lets new tokens see whatever the host would hold.
        window = self.window if is_static or attn_mask is None else None

        def call(rows: slice, lens: torch.Tensor) -> torch.Tensor:
            return ops.paged_attention(
                query[:, :, rows], self.k.paged, self.v.paged, table.page_table(self.device), lens,
                softmax_scale=softmax_scale, attn_mask=None if attn_mask is None else attn_mask[:, :, rows],
                mask_start=mask_start, sinks=sinks, softcap=softcap, window=window, causal=causal,
            )  # fmt: skip

        if self._pending is None:
            return call(slice(None), seq_lens)
        if not isinstance(table, StaticPageTable) or num_new <= table.most_at_once:
            self.settle(None)
            return call(slice(None), seq_lens)
        # A window at fixed addresses has no room for all of these tokens: write and read some at a time.
        key, value = self._pending
        self._pending = None
        outputs = []
        for start in range(0, num_new, table.most_at_once):
            stop = min(start + table.most_at_once, num_new)
            lens = seq_lens - (num_new - stop)
            self._write(key[:, :, start:stop], value[:, :, start:stop], lens)
            outputs.append(call(slice(start, stop), lens))
        return torch.cat(outputs, dim=2)

    def settle(self, valid: torch.Tensor | None) -> None:
        """Write tokens that were held back, taking scales from them where none are known yet.

        `valid` `[B, T]` is False where a token is padding; without it the mask that `generate` gave is used.
        """
        if self._pending is None:
            return
        key, value = self._pending
        self._pending = None
        if valid is None:
            valid = self._padding_of(key)
        for store, tensor in ((self.k, key), (self.v, value)):
            if store.needs_tokens:
                store.observe(tensor.detach(), valid)
        self._write(key, value)

    def _padding_of(self, key: torch.Tensor) -> torch.Tensor | None:
        mask = self.shared.padding_mask
        if mask is None or mask.shape[1] != key.shape[2] or key.shape[0] % mask.shape[0]:
            return None
        return mask.to(key.device).repeat_interleave(key.shape[0] // mask.shape[0], dim=0)

    def _write(self, key: torch.Tensor, value: torch.Tensor, seq_lens: torch.Tensor | None = None) -> None:
        table = self._live_table()
        # A window does not keep the beginning of a long prompt.
        if isinstance(table, StaticPageTable):
            num_kept = table.page_table(self.device).shape[1] * self.shared.page_size
        else:
            num_kept = self.length - table.first_position
        ops.write_kv(
            key.detach()[:, :, -num_kept:], value.detach()[:, :, -num_kept:], self.k.paged, self.v.paged,
            table.page_table(self.device), table.seq_lens(self.device) if seq_lens is None else seq_lens, self.clipped,
        )  # fmt: skip

    def _advance(self, num_new: int, batch_size: int) -> None:
        table = self._live_table()
        if isinstance(table, StaticPageTable):
            table.append(num_new)
            return
        if self.length == table.length:
            table.append(num_new, batch_size)
        elif self.length + num_new != table.length or table.batch_size != batch_size:
            self.leave_table()
            table = self._live_table()
            assert isinstance(table, PageTable)  # noqa: S101 - leave_table makes one
            table.append(num_new, batch_size)
        self.length += num_new

    def _check_shapes(self, key: torch.Tensor, value: torch.Tensor) -> None:
        expected = ((self.num_heads, self.k.paged.pages.shape[3]), (self.num_heads, self.v.paged.pages.shape[3]))
        got = ((key.shape[1], key.shape[3]), (value.shape[1], value.shape[3]))
        if got != expected:
            raise ValueError(
                f"layer {self.index}: keys and values of {got[0]} and {got[1]} (heads, head_dim) do not fit this "
                f"cache, which holds {expected[0]} and {expected[1]}; it was made for another model, make a new one "
                "with from_model()"
            )
        table = self.table
        if isinstance(table, StaticPageTable) and table.batch_size != key.shape[0]:
            raise ValueError(
                f"layer {self.index}: the cache holds {table.batch_size} sequence(s) at fixed addresses but got "
                f"{key.shape[0]}; make a new cache for another batch size"
            )

    def _live_table(self) -> PageTable | StaticPageTable:
        assert self.table is not None  # noqa: S101 - set by lazy_initialization
        return self.table

    # -- reading as dense tensors ----------------------------------------------------------------------------------

    def read(self, side: str, num_new: int, raw: torch.Tensor | None) -> torch.Tensor:
        """The dense keys or values `[B, H, L, D]` that the host's mask is made for."""
        self.settle(None)
        if raw is not None:
            return raw
        store = self.k if side == "key" else self.v
        table = self._live_table()
        page_table, seq_lens = table.page_table(self.device), table.seq_lens(self.device)
        if isinstance(table, StaticPageTable):
            return self._read_static(store, table)
        positions = reference.read_positions(page_table, seq_lens, self.shared.page_size)
        first = self._view_start(num_new) - table.first_position
        return store.read(page_table, positions)[:, :, first : self.length - table.first_position]

    def _read_static(self, store: PageStore, table: StaticPageTable) -> torch.Tensor:
        """Every token in its absolute place, zeros where none is held."""
        page_table, seq_lens = table.tensors
        positions = reference.read_positions(page_table, seq_lens, self.shared.page_size)
        values = store.read(page_table, positions)
        absolute = torch.arange(table.capacity, device=self.device)
        source = absolute - positions[0, 0]
        held = (source >= 0) & (absolute < seq_lens[0])
        values = values.index_select(2, source.clamp(0, positions.shape[1] - 1))
        return values.masked_fill(~held[:, None], 0)

    def shape_of(self, side: str, num_new: int, raw: torch.Tensor | None) -> torch.Size:
        """Shape of what `read` returns."""
        if raw is not None:
            return raw.shape
        table, pages = self._live_table(), (self.k if side == "key" else self.v).paged.pages
        length = table.capacity if isinstance(table, StaticPageTable) else self.length - self._view_start(num_new)
        return torch.Size((table.batch_size or 0, pages.shape[1], length, pages.shape[3]))

    def _view_start(self, num_new: int) -> int:
        """The oldest token that the newest `num_new` see, as the host counts it."""
        return 0 if self.window is None else max(self.length - num_new - (self.window - 1), 0)

    def note_dense(self, reason: str) -> None:
        self.dense_reasons[reason] = None

    @property
    def keys(self) -> Any:
        """What is stored, as `update` would return it; None before the first token."""
        return self._stored("key")

    @property
    def values(self) -> Any:
        return self._stored("value")

    def _stored(self, side: str) -> Any:
        if self.is_empty:
            return None
        handle = PagedKV(self, side, 0, None)
        return handle if self.shared.is_fused else handle.dense(f"layer.{side}s is read")

    # -- what the host asks ----------------------------------------------------------------------------------------

    def get_seq_length(self) -> Any:
        if self.is_empty:
            return 0
        if isinstance(self.table, StaticPageTable):
            return self.table.seq_lens(self.device)[0].long()
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.is_empty:
            return query_length, 0
        if isinstance(self.table, StaticPageTable):
            return self.table.capacity, 0
        start = 0 if self.window is None else max(self.length - (self.window - 1), 0)
        return self.length + query_length - start, start

    def get_max_length(self) -> int:
        if self.shared.max_cache_len is not None and self.is_compileable:
            return self.shared.max_cache_len
        return -1 if self.window is None else self.window

    @property
    def batch_size(self) -> int:
        """Sequences held; -1 while there are none."""
        size = self.table.batch_size if self.table is not None else None
        return -1 if size is None else size

    # -- operations ------------------------------------------------------------------------------------------------

    # An operation on one layer first stops sharing the table. The cache changes each table once and then has its layers
    # follow.

    def reset(self) -> None:
        """Forget all tokens and give the pages back; frozen scales stay."""
        self._own_table()
        if self.table is not None:
            self.table.clear()
        self.follow_reset()

    def follow_reset(self) -> None:
        self._pending = None
        self.length = 0
        self.is_empty = True
        if self.is_initialized:
            self.clipped.zero_()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens (a positive number is the final length before 5.18)."""
        num_tokens = tokens_to_take_back(tokens_to_remove, self.get_seq_length)
        self._own_table()
        if self.table is not None and num_tokens:
            self.table.crop(num_tokens)
        self.follow_crop(num_tokens)

    def follow_crop(self, num_tokens: int) -> None:
        if isinstance(self.table, PageTable):
            self.length = max(self.length - num_tokens, 0)
            self.is_empty = self.length == 0

    def select(self, indices: Sequence[int]) -> None:
        """Sequence i becomes a copy of sequence `indices[i]`."""
        if self.is_empty:
            return
        self._own_table()
        if isinstance(self.table, PageTable):
            self.table.select(indices)
        self.follow_select(indices)

    def follow_select(self, indices: Sequence[int]) -> None:
        table = self.table
        if not isinstance(table, StaticPageTable):
            return
        if len(indices) != table.batch_size:
            raise ValueError(
                f"layer {self.index}: a cache at fixed addresses keeps its {table.batch_size} sequence(s); "
                f"it cannot be changed to {len(indices)}"
            )
        order = torch.tensor(list(indices), dtype=torch.int64)
        for store in (self.k, self.v):
            store.select_rows(order, len(indices))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.select([index for index in range(max(self.batch_size, 0)) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.select(torch.arange(max(self.batch_size, 0))[indices.cpu()].tolist())

    def activate_past_recording(self) -> None:
        """Keep tokens that leave the window until `crop` has been called."""
        self.record_past = True

    @property
    def record_past(self) -> bool:
        return self._record_past

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self._record_past = value
        if isinstance(self.table, PageTable):
            self.table.keeps_past = value

    def offload(self) -> None:
        raise NotImplementedError("offloading of 8-bit pages is not supported; use a cache without offloading")

    prefetch = offload

    # -- what the page table asks (pages.PageUser) -----------------------------------------------------------------

    def resize_pages(self, num_pages: int) -> None:
        for store in (self.k, self.v) if hasattr(self, "k") else ():
            store.resize(num_pages)

    def clear_pages(self, pages: Sequence[int]) -> None:
        for store in (self.k, self.v):
            store.clear(pages)

    def copy_pages(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        for store in (self.k, self.v):
            store.copy(sources, targets)

    def keep_pages(self, pages: Sequence[int], num_pages: int) -> None:
        for store in (self.k, self.v):
            store.keep(pages, num_pages)

    def leave_table(self) -> None:
        table = self.table
        assert isinstance(table, PageTable)  # noqa: S101 - only growing tables are shared
        table.users.remove(self)
        self.table = table.detached(self)

    def _own_table(self) -> None:
        """Before an operation on this layer alone: stop sharing."""
        if isinstance(self.table, PageTable) and self.is_initialized and len(self.table.users) > 1:
            self.leave_table()

    # -- sizes -----------------------------------------------------------------------------------------------------

    @property
    def stored_nbytes(self) -> int:
        """Bytes of the pages in use and of the scales."""
        if not self.is_initialized or self.table is None:
            return 0
        stores = (self.k, self.v)
        return sum(self.table.pages_in_use * store.page_nbytes + store.scale_nbytes for store in stores)

    @property
    def model_dtype_nbytes(self) -> int:
        """Bytes that the host's own cache would need for the same tokens."""
        if not self.is_initialized or self.is_empty:
            return 0
        num_tokens = int(self.get_seq_length())
        if self.window is not None:
            num_tokens = min(num_tokens, self.window - 1)
        per_token = self.num_heads * (self.k.paged.pages.shape[3] + self.v.paged.pages.shape[3]) * self.dtype.itemsize
        return self.batch_size * num_tokens * per_token

    @property
    def allocated_nbytes(self) -> int:
        if not self.is_initialized:
            return 0
        return sum(store.nbytes_allocated + store.scale_nbytes for store in (self.k, self.v))


def tokens_to_take_back(tokens_to_remove: int, get_seq_length: Callable[[], Any]) -> int:
    """What `crop`'s argument means to the installed host.

    Raises ValueError for a positive number from transformers 5.18 on, as the host's own caches do.
    """
    if tokens_to_remove <= 0:
        return -tokens_to_remove
    if Version(transformers.__version__) >= Version("5.18"):
        raise ValueError(f"crop({tokens_to_remove}): pass a negative number, the tokens to take back")
    return max(int(get_seq_length()) - tokens_to_remove, 0)


class HybridPagedLayer(PagedLayer, LinearAttentionAndFullAttentionLayer):
    """A layer with both attention and a linear-attention state: paged keys and values, the host's own state."""

    def __init__(self, *args: Any, number_of_states: int = 1, **kwargs: Any) -> None:
        PagedLayer.__init__(self, *args, **kwargs)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        # The host calls it with two positional arguments for attention, by keyword for the linear state.
        if args:
            PagedLayer.lazy_initialization(self, *args)
        else:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        return LinearAttentionCacheLayerMixin.is_croppable.fget(self)

    def follow_reset(self) -> None:
        LinearAttentionLayer.reset(self)
        PagedLayer.follow_reset(self)

    def follow_crop(self, num_tokens: int) -> None:
        LinearAttentionLayer.crop(self, -num_tokens)
        PagedLayer.follow_crop(self, num_tokens)

    def follow_select(self, indices: Sequence[int]) -> None:
        LinearAttentionLayer.reorder_cache(self, torch.tensor(list(indices), dtype=torch.int64))
        PagedLayer.follow_select(self, indices)


class HybridSlidingPagedLayer(HybridPagedLayer, LinearAttentionAndSlidingWindowAttentionLayer):
    """The same with a sliding window."""
