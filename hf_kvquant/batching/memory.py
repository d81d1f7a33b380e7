"""How many blocks fit into memory, and how many of them a request takes: transformers' planning, for our pages."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from transformers.generation.continuous_batching import cache as host
from transformers.generation.continuous_batching.cache_allocators import (
    FullAttentionCacheAllocator,
    SlidingAttentionCacheAllocator,
)

from .step import Group, columns_of
from .tables import bytes_of_row


class SlidingAllocator(SlidingAttentionCacheAllocator):
    """Blocks for a ring of whole pages."""

    def _compute_blocks_needed(self, allocated_blocks: int, past_length: int, query_length: int) -> int:
        needed = -(-(past_length + query_length) // self.tokens_per_page)
        return max(0, min(needed, columns_of(self.sliding_window, self.tokens_per_page)) - allocated_blocks)


# By transformers' name for the kind of attention.
ALLOCATORS = {allocator.layer_type: allocator for allocator in (FullAttentionCacheAllocator, SlidingAllocator)}


class MemoryHandler(host.PagedAttentionMemoryHandler):  # type: ignore[misc]
    """What fits: without masks, and without a copy of all keys and values, which transformers' attention needs.

    With tables for steps that are recorded, of the largest size: a request may have all pages.
    """

    def __init__(self, num_kv_heads: int, scales_per_byte: float, groups: Collection[Group], **kwargs: Any) -> None:
        self.scales_per_byte, self._groups = scales_per_byte, groups
        super().__init__(**kwargs)
        self.num_attention_masks = 0
        self.kv_heads_at_peak = 2 * num_kv_heads

    @property
    def bytes_per_cache_token(self) -> int:
        return int(self.io_multiplier * self.num_groups * torch.int64.itemsize)  # read indices, which are reserved

    @property
    def bytes_per_cache_sector(self) -> int:
        sector = int(self.bytes_per_sector * (1 + self.scales_per_byte))
        num_pages = self.tokens_per_sector // self.cb_config.page_size
        tables = self._table_bytes(num_pages) - self._table_bytes(0)
        return sector + int(self.tokens_per_sector) * self.bytes_per_cache_token + tables

    @property
    def fixed_overhead_bytes(self) -> int:
        return int(super().fixed_overhead_bytes) + self._table_bytes(0)

    def _table_bytes(self, num_pages: int) -> int:
        is_used = self.cb_config.cuda_graph_booleans[1]
        return is_used * int(self.cb_config.max_requests_per_batch) * bytes_of_row(self._groups, num_pages)
