"""What one layer of the cache holds: its pages and scales, how large they are, and what they are as dense tensors."""

from __future__ import annotations

import copy
from abc import abstractmethod
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import CacheLayerMixin
from transformers.utils import logging

from .assigning import Assignment
from .exact import ExactStep, ExactTokens
from .pages import PageTable
from .parts import overlay
from .policy import LayerPlan
from .rotary import RotaryLayout
from .shared import SharedState
from .sides import SIDES, Side
from .static_pages import StaticPageTable
from .stores import PageStore, mutable_everywhere

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.get_logger(__name__)


class LayerState(CacheLayerMixin):
    """Keys and values of one layer in pages, before anything is done with them.

    Args:
        index: of the layer in the cache.
        layer_type: transformers' name for it, for the report.
        plan: formats and scales.
        shared: what the layers of the cache have in common.
        window: of sliding or chunked attention.
    """

    is_croppable = True
    store_type: type[PageStore] = PageStore
    # Whether the CPU knows how many tokens there are.
    knows_length = False
    record_past: bool

    def __init__(
        self, index: int, layer_type: str, plan: LayerPlan, shared: SharedState, window: int | None = None
    ) -> None:
        self.index = index
        self.layer_type = layer_type
        self.plan = plan
        self.shared = shared
        self.window = window
        self.is_sliding = window is not None
        self.is_empty = True
        self.is_initialized = False
        self.table: PageTable | StaticPageTable | None = None
        self.num_prompt = 0  # new tokens of the last update but for those that speculation has drafted
        self.dense_reasons: dict[str, None] = {}
        self.exact: ExactTokens | None = None
        if plan.recent_tokens or plan.sink_tokens and window is None:
            num_recent = plan.recent_tokens if window is None else min(plan.recent_tokens, window)  # all it sees
            self.exact = ExactTokens(num_recent, in_place=self.is_compileable)
        # Tokens that are counted and not yet written; some wait until attention has seen them.
        self._held: tuple[torch.Tensor, torch.Tensor] | None = None
        self._held_valid: torch.Tensor | None = None  # [B, T] of them as attention has told, False for padding
        self._assigned = Assignment()

    # -- setting up ------------------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take shapes, dtype and device from the first keys and values.

        Raises ValueError if static scales do not fit them; the layer is then as before.
        """
        with mutable_everywhere():
            self._initialize(key_states, value_states)

    def _initialize(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        batch_size, num_heads = key_states.shape[:2]
        dtype, device = key_states.dtype, key_states.device

        def store(side: Side, head_dim: int) -> PageStore:
            where, plan, shard = f"layer {self.index}: {side}", getattr(self.plan, side), self.shared.shard
            if shard is not None:
                where = f"layer {self.index}, the heads of process {shard.rank} of {shard.size}: {side}"
                plan = plan.of_heads(partial(shard.own, num_heads=num_heads))
            rotary = None if side == "v" else self.shared.rotary[self.index] if self.shared.rotary else RotaryLayout()
            return self.store_type(plan, num_heads, head_dim, self.shared.page_size, dtype, device, where, rotary)

        k, v = store("k", key_states.shape[-1]), store("v", value_states.shape[-1])
        self.k, self.v = k, v
        self.num_heads, self.dtype, self.device = num_heads, dtype, device
        self.clipped = torch.zeros(2, dtype=torch.int64, device=device)
        scale = None if self.plan.q is None else self.plan.q.scale
        self.q_scale = None if scale is None else scale.to(device)
        self._reserve(batch_size)
        self.is_initialized = True

    @abstractmethod
    def _reserve(self, batch_size: int) -> None:
        """Get a page table, and pages where they are known in advance."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A layer of its own with the same tokens, of the same cache unless `memo` knows another.

        Models that go through some of their layers several times copy their cache layers for it.
        """
        for common in (self.shared, self.plan):
            memo.setdefault(id(common), common)
        memo[id(self)] = other = object.__new__(type(self))
        other.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return other

    @property
    def needs_tokens(self) -> bool:
        """Whether scales are still to be taken from real tokens, though some were written."""
        return self.is_initialized and (self.k.needs_tokens or self.v.needs_tokens)

    @property
    def holds_tokens(self) -> bool:
        """Whether there are tokens that `settle` would write."""
        return self._held is not None

    def tell_padding(self, valid: torch.Tensor | None) -> None:
        """Before tokens are written that wait for it: `valid` `[B, T]` is False for those that are padding."""
        self._held_valid = valid

    @abstractmethod
    def settle(self) -> None:
        """Write tokens that were held back."""

    def _check_shapes(self, key: torch.Tensor, value: torch.Tensor) -> None:
        expected = ((self.num_heads, self.k.head_dim), (self.num_heads, self.v.head_dim))
        got = ((key.shape[1], key.shape[3]), (value.shape[1], value.shape[3]))
        if key.shape[:3] != value.shape[:3]:
            raise ValueError(
                f"layer {self.index}: keys are {list(key.shape)} and values {list(value.shape)}; "
                "both must be [B, H, T, D]"
            )
        if got != expected:
            raise ValueError(
                f"layer {self.index}: keys and values of {got[0]} and {got[1]} (heads, head_dim) do not fit this "
                f"cache, which holds {expected[0]} and {expected[1]}; it was made for another model, make a new one "
                "with from_model()"
            )

    @property
    def _page_table(self) -> torch.Tensor:
        assert self.table is not None  # noqa: S101 - set by lazy_initialization
        return self.table.page_table(self.device)

    @property
    def _seq_lens(self) -> torch.Tensor:
        assert self.table is not None  # noqa: S101 - set by lazy_initialization
        return self.table.seq_lens(self.device)

    # -- reading as dense tensors ----------------------------------------------------------------------------------

    def read(self, side: Side, num_new: int, exact: ExactStep | None = None) -> torch.Tensor:
        """The dense keys or values `[B, H, L, D]` that transformers' mask is made for; `exact` as in `attend`."""
        if not self._assigned.is_pending:  # one of the two has been assigned, both are still what they were
            self.settle()
        return self.read_stored(side, num_new, exact)

    def read_stored(self, side: Side, num_new: int = 0, exact: ExactStep | None = None) -> torch.Tensor:
        """As `read`, without what waits to be written."""
        return self._with_exact(self._read(self._store(side), num_new), side, num_new, exact)

    def _with_exact(self, dense: torch.Tensor, side: Side, num_new: int, exact: ExactStep | None) -> torch.Tensor:
        """`dense`, from the start of the view on, with the tokens that are kept as the model made them."""
        if self.exact is None:
            return dense
        index, start, end = SIDES.index(side), self._view_start(num_new), self.get_seq_length()
        return overlay(dense, index, exact or self.exact.now(), start, end, num_new if exact else 0)

    def _read_behind(self, index: int, num_after: int, count: int) -> torch.Tensor:
        """What pages hold of K (0) or V (1) of `count` tokens `[B, H, count, D]`, `num_after` before the last."""
        page_size, page_table = self.shared.page_size, self._page_table
        order = torch.arange(count, device=self.device)
        positions = order + self.get_seq_length() - num_after - count
        pages = page_table[:, (positions.clamp(min=0) // page_size) % page_table.shape[1]]
        dense = (self.k, self.v)[index].read(pages).index_select(2, order * page_size + positions % page_size)
        return dense.masked_fill((positions < self._first_held)[:, None], 0)

    @property
    def _first_held(self) -> int:
        """The oldest token that pages hold."""
        return 0

    def with_new(self, dense: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """`dense` with its newest tokens as the model made them, so that gradients reach them."""
        start = self._view_length(new.shape[2]) - new.shape[2]
        return torch.cat([dense[:, :, :start], new], dim=2)

    @abstractmethod
    def _read(self, store: PageStore, num_new: int) -> torch.Tensor:
        """What `store` holds, as the newest `num_new` tokens see it."""

    def places_of(self, num_new: int) -> torch.Tensor:
        """Positions `[T]` of the newest tokens."""
        return torch.arange(num_new, device=self.device) + (self.get_seq_length() - num_new)

    def columns_of(self, num_new: int) -> torch.Tensor:
        """Which columns `[T]` of transformers' mask are those of the newest tokens."""
        return self.places_of(num_new) - self._view_start(num_new)

    def shape_of(self, side: Side, num_new: int) -> torch.Size:
        """Shape of what `read` returns."""
        head_dim = self._store(side).head_dim
        return torch.Size((self.batch_size, self.num_heads, self._view_length(num_new), head_dim))

    def _store(self, side: Side) -> PageStore:
        store: PageStore = getattr(self, side)
        return store

    @abstractmethod
    def _view_start(self, num_new: int) -> int:
        """The oldest token in transformers' mask when the newest `num_new` look back."""

    @abstractmethod
    def _view_length(self, num_new: int) -> int:
        """How many tokens transformers' mask covers."""

    def note_dense(self, reason: str) -> None:
        """Remember for the report that the layer was read as dense tensors."""
        if torch.compiler.is_compiling():  # a graph would be guarded on what is known; its prompt ran eagerly
            return
        self.dense_reasons[reason] = None
        if self.plan.q is not None:
            logger.warning_once(
                f"q_dtype has no effect on attention over dense keys ({reason}); the report names the layers."
            )

    # -- sizes -----------------------------------------------------------------------------------------------------

    @property
    def batch_size(self) -> int:
        """Sequences held; -1 while there are none."""
        size = self.table.batch_size if self.table is not None else None
        return -1 if size is None else size

    @property
    def stored_nbytes(self) -> int:
        """Bytes of the pages in use and of the scales."""
        if not self.is_initialized or self.table is None:
            return 0
        pages_in_use = self.table.pages_in_use
        paged = sum(pages_in_use * store.page_nbytes + store.scale_nbytes for store in (self.k, self.v))
        return paged + self.exact_nbytes + self.state_nbytes

    @property
    def exact_nbytes(self) -> int:
        """Bytes of the tokens that are kept as the model made them, beside the pages."""
        return 0 if self.exact is None else self.exact.nbytes

    @property
    def state_nbytes(self) -> int:
        """Bytes of what a layer holds beside pages."""
        return 0

    @property
    def model_dtype_nbytes(self) -> int:
        """Bytes that transformers' own cache would need for the same tokens."""
        if not self.is_initialized or self.is_empty:
            return 0
        num_tokens = int(self.get_seq_length())
        if self.window is not None:
            num_tokens = min(num_tokens, self.window - 1)
        per_token = self.num_heads * (self.k.head_dim + self.v.head_dim) * self.dtype.itemsize
        return self.batch_size * num_tokens * per_token + self.state_nbytes

    @property
    def allocated_nbytes(self) -> int:
        """Bytes held, used or not."""
        if not self.is_initialized:
            return 0
        paged = sum(store.nbytes_allocated + store.scale_nbytes for store in (self.k, self.v))
        return paged + self.exact_nbytes + self.state_nbytes
