"""The cache of continuous batching: transformers' scheduler and block tables, our pages and scales.

transformers has one tensor of bytes for all layers. It is cut into sectors, which a kind of attention takes as it needs
them, a sector into blocks, and a block into a page of K and one of V for every layer of that kind. All pages have one
shape, so a layer has that tensor from its own first page on, and its page table counts in pages of any layer. Scales of
tokens lie beside, a number for every token and head of every page.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from math import lcm
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.generation.continuous_batching import cache as host
from transformers.generation.continuous_batching.cache_allocators import CachePool
from transformers.utils import logging

from ..cache import QuantizedPagedCache
from ..formats import get_format
from ..interface import is_fused
from ..policy import LayerPlan
from ..report import CacheReport, LayerReport
from ..rotary import RotaryLayout
from ..stores import PageStore, mutable_everywhere
from .layer import BatchedKV, BatchedLayer
from .memory import ALLOCATORS, MemoryHandler
from .step import Group, Request, Step
from .tables import DecodeTables
from .template import plans_of

logger = logging.get_logger(__name__)

_MOST_SLOTS = 1 << 31  # kernels count tokens of all heads and pages in 32 bits
_MOST_BATCH_TOKENS = 65535  # the most sequences of a launch
_FEWEST_RECORDED = 2048  # tokens of a request that every recorded step has room for
_MOST_TABLES = 32  # sizes of recorded steps


class QuantizedBatchCache(host.PagedAttentionCache):  # type: ignore[misc]
    """8-bit pages for the requests of continuous batching; made by `ContinuousBatchingManager`.

    Args:
        template: a cache of the model: its options, formats and scales are taken, it stays empty.
        config, ...: as of transformers' own cache.

    Raises ValueError for a model or options that do not fit.
    """

    def __init__(
        self,
        template: QuantizedPagedCache,
        config: PreTrainedConfig,
        continuous_batching_config: Any,
        device: torch.device | str,
        distributed_helper: Any,
        dtype: torch.dtype = torch.float16,
        model_supports_logits_to_keep: bool = False,
    ) -> None:
        if distributed_helper.tp_size > 1:
            raise ValueError("continuous batching over 8-bit pages takes no tensor parallelism; use `generate`")
        self.template = template
        self.config, self.dtype, self.device = config, dtype, torch.device(device)
        # More than 0 has transformers know steps that only decode; its own block tables, of this width, stay empty.
        self.max_blocks_per_request = int(continuous_batching_config.cuda_graph_booleans[1])
        self.allow_block_sharing = continuous_batching_config.allow_block_sharing
        self._step, self._has_begun, self._has_scales = Step(), False, False
        self._tables: dict[tuple[int, int], DecodeTables] = {}

        page_size, num_heads = continuous_batching_config.page_size, host.find_num_key_value_heads(config)
        self._page_shape = (num_heads, page_size, host.find_head_dim(config))
        sides = [side for plan in plans_of(template).values() for side in (plan.k, plan.v)]
        storage_dtype = get_format(sides[0].format).storage_dtype or dtype  # all are of one size
        is_scaled = any(side.kind == "dynamic" for side in sides)
        scales_per_byte = torch.bfloat16.itemsize / (self._page_shape[2] * storage_dtype.itemsize) if is_scaled else 0.0
        self._make_allocators(storage_dtype)
        self._size(continuous_batching_config, scales_per_byte, model_supports_logits_to_keep)
        with mutable_everywhere():
            self._allocate(storage_dtype, is_scaled)
            self._layers = self._make_layers(plans_of(template))

    def _make_allocators(self, storage_dtype: torch.dtype) -> None:
        num_heads, page_size, _ = self._page_shape
        self.cache_allocators: dict[str, Any] = {}
        self.layer_to_allocator: dict[int, Any] = {}
        self._groups: dict[str, Group] = {}
        for index, (name, layers) in enumerate(host.group_layers_by_attn_type(self.config).items()):
            if name not in ALLOCATORS:
                raise ValueError(
                    f"layer {layers[0]} has {name}, which continuous batching over 8-bit pages does not know"
                )
            allocator = ALLOCATORS[name](
                index=index, config=self.config, num_key_value_heads=num_heads, cache_dtype=storage_dtype,
                page_size=page_size, layer_indices=layers, allow_block_sharing=self.allow_block_sharing,
            )  # fmt: skip
            self.cache_allocators[name] = allocator
            self.layer_to_allocator |= dict.fromkeys(layers, allocator)
            self._groups[name] = Group(name, page_size, 2 * len(layers), getattr(allocator, "sliding_window", None))

    def _size(self, config: Any, scales_per_byte: float, slices_logits: bool) -> None:
        num_heads, page_size, _ = self._page_shape
        allocators = list(self.cache_allocators.values())
        self.bytes_per_sector = lcm(*(allocator.bytes_per_block for allocator in allocators), 128)
        self.tokens_per_sector = max(
            self.bytes_per_sector // allocator.bytes_per_block * page_size for allocator in allocators
        )
        # Of all layers, as num_blocks counts.
        self._bytes_per_block = len(self.layer_to_allocator) * allocators[0].bytes_per_page
        memory = MemoryHandler(
            num_heads, scales_per_byte, self._groups.values(), config=self.config, cb_config=config, dtype=self.dtype,
            bytes_per_sector=self.bytes_per_sector, tokens_per_sector=self.tokens_per_sector,
            bytes_per_block=self._bytes_per_block, attn_types=list(self.cache_allocators),
            model_supports_logits_to_keep=slices_logits,
        )  # fmt: skip
        self.max_batch_tokens, self.num_sectors = memory.infer_max_batch_tokens_and_num_sectors()
        if self.max_batch_tokens > _MOST_BATCH_TOKENS:
            raise ValueError(f"max_batch_tokens={self.max_batch_tokens}; at most {_MOST_BATCH_TOKENS} over 8-bit pages")
        slots_per_sector = self.bytes_per_sector // allocators[0].bytes_per_page * 2 * num_heads * page_size
        most = _MOST_SLOTS // slots_per_sector - 3
        if self.num_sectors > most:
            share = most / self.num_sectors
            logger.warning_once(
                f"Kernels can count {share:.0%} of the blocks that there is room for; the others are left out."
            )
            self.num_sectors = most

    def _allocate(self, storage_dtype: torch.dtype, is_scaled: bool) -> None:
        num_bytes = self.num_sectors * self.bytes_per_sector
        # The first two sectors are for padding.
        self.cache_tensor = torch.zeros(num_bytes + 2 * self.bytes_per_sector, dtype=torch.uint8, device=self.device)
        self._pages = self.cache_tensor.view(storage_dtype)
        self._token_scales = None
        if is_scaled:
            num_scales = len(self._pages) // self._page_shape[2]
            self._token_scales = torch.zeros(num_scales, dtype=torch.bfloat16, device=self.device)
        self.pool = CachePool(self.num_sectors, len(self.cache_allocators))
        for allocator in self.cache_allocators.values():
            allocator.register_cache_tensor(self.bytes_per_sector, num_bytes, self.cache_tensor, self.pool)
        shares = all(allocator.use_block_sharing for allocator in self.cache_allocators.values())
        self.use_prefix_sharing = shares and self.allow_block_sharing
        self.num_blocks = num_bytes // self._bytes_per_block
        self.read_cache_limit = self._infer_read_cache_limit()
        self.max_tokens_read = max(ca.tokens_per_page * ca.num_blocks for ca in self.cache_allocators.values())

    def _make_layers(self, plans: dict[int, LayerPlan]) -> dict[int, BatchedLayer]:
        num_heads, page_size, head_dim = self._page_shape
        rotary = self.template.shared.rotary

        def store(index: int, side: str, first: int, num_pages: int) -> PageStore:
            plan, where = getattr(plans[index], side), f"layer {index}: {side}"
            layout = None if side == "v" else rotary[index] if rotary else RotaryLayout()
            made = PageStore(plan, num_heads, head_dim, page_size, self.dtype, self.device, where, layout)
            pages = slice(first, first + num_pages)
            made.paged.pages = self._pages.view(-1, num_heads, page_size, head_dim)[pages]
            if made.paged.token_scale is not None and self._token_scales is not None:
                made.paged.token_scale = self._token_scales.view(-1, num_heads, page_size)[pages]
            return made

        layers = {}
        for name, allocator in self.cache_allocators.items():
            for number, index in enumerate(allocator.layer_indices):
                if index not in plans:
                    continue
                first = 2 * number
                num_pages = self._pages.numel() // self._numbers_per_page - (first + 1)  # both sides need as many
                k, v = store(index, "k", first, num_pages), store(index, "v", first + 1, num_pages)
                layers[index] = BatchedLayer(index, plans[index], self._groups[name], k, v)
        return layers

    # -- a step ----------------------------------------------------------------------------------------------------

    def extend_read_and_write_indices(
        self, request_id: str, past_length: int, query_length: int, read_index: Any, write_index: Any
    ) -> None:
        """Take note of one request of the next step; the indices are for transformers' own pages, and stay empty."""
        self._note(request_id, past_length, query_length)

    def fill_block_table(self, request_id: str, past_length: int, query_length: int, block_table: Any) -> None:
        """Take note of one request of a step that only decodes; the table is for FlashAttention, and stays empty."""
        self._note(request_id, past_length, query_length)

    def _note(self, request_id: str, past_length: int, query_length: int) -> None:
        if self._has_begun:
            self._step, self._has_begun = Step(), False
        if not query_length:  # a prompt that is known but for the token that a copy of it will compute
            return
        # These lists stay as they are until the step is done.
        blocks = {name: ca.block_table[request_id] for name, ca in self.cache_allocators.items()}
        self._step.requests.append(Request(past_length, query_length, blocks))

    @property
    def max_decode_fast_path_length(self) -> int:
        """The longest request for which a step may be recorded: any, once all scales are known."""
        self._has_scales = self._has_scales or not any(
            store.needs_tokens for layer in self._layers.values() for store in (layer.k, layer.v)
        )
        return self.max_tokens_read if self._has_scales else 0

    def begin_decoding(self, num_tokens: int) -> DecodeTables:
        """Bring the tables of a step that only decodes to where its graph reads them; a graph lasts as they do."""
        self._begin()
        requests, page_size = self._step.requests, self._page_shape[1]
        unbounded = [name for name, group in self._groups.items() if group.num_columns is None]
        longest = max((len(request.blocks[name]) for request in requests for name in unbounded), default=1)
        most = max((self.cache_allocators[name].num_blocks for name in unbounded), default=1)
        num_columns = min(_power_of_2(max(longest, _FEWEST_RECORDED // page_size)), most)
        tables = self._tables_of(num_tokens, num_columns)
        tables.fill(requests)
        self._step.lies_in(tables.places, num_tokens)
        return tables

    def _tables_of(self, num_rows: int, num_columns: int) -> DecodeTables:
        size = num_rows, num_columns
        tables = self._tables.pop(size, None)
        if tables is None:
            with mutable_everywhere():  # the next session of a manager that is kept may be in another mode
                tables = DecodeTables(self._groups.values(), self._spare_blocks(), *size, self.device)
        self._tables[size] = tables
        if len(self._tables) > _MOST_TABLES:
            del self._tables[next(iter(self._tables))]  # not used for longest
        return tables

    def _spare_blocks(self) -> dict[str, int]:
        """Of each group the first block of the second sector, where transformers has padding written."""
        return {name: allocator.blocks_per_sector for name, allocator in self.cache_allocators.items()}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, kwargs: Any = None
    ) -> tuple[BatchedKV, BatchedKV]:
        """Write a layer's keys and values `[1, H, T, D]` of a step; returns what its attention reads.

        Raises ValueError if they are not of the requests that were scheduled, or if attention is not this package's.
        """
        if not self._has_begun:
            self._begin()
        return self._layers[layer_idx].update(key_states, value_states, self._step)

    def _begin(self) -> None:
        self._has_begun = True
        if not is_fused(self.template.shared.model_config):
            raise ValueError(
                "the model's attention is not kvquant any more, which this cache was made for; switch back with "
                "model.set_attn_implementation('kvquant'), or make a new manager "
                "(model.destroy_cached_continuous_batching_manager())"
            )

    # -- requests --------------------------------------------------------------------------------------------------

    def perform_cache_copy(self, copy_src_and_dst: dict[str, tuple[list[int], list[int]]]) -> None:
        """Copy blocks, with their scales."""
        super().perform_cache_copy(copy_src_and_dst)
        if self._token_scales is None:
            return
        num_heads, page_size, _ = self._page_shape
        for name, (sources, targets) in copy_src_and_dst.items():
            blocks = self._token_scales.view(-1, self._groups[name].stride * num_heads * page_size)
            source, target = (torch.tensor(ids, dtype=torch.int64, device=self.device) for ids in (sources, targets))
            blocks[target] = blocks[source]

    def free_all_requests(self, clear_ledgers: bool = False) -> None:
        """Let go of all requests, and of a step that was scheduled and has not been computed."""
        super().free_all_requests(clear_ledgers)
        self._step, self._has_begun = Step(), False

    @contextlib.contextmanager
    def as_it_was(self) -> Iterator[None]:
        """Afterwards there are no requests, and nothing has been counted of those that there were meanwhile."""
        clipped = [layer.clipped.clone() for layer in self._layers.values()]
        try:
            yield
        finally:
            for layer, count in zip(self._layers.values(), clipped, strict=True):
                layer.clipped.copy_(count)
            self.reset()

    # -- what it holds ---------------------------------------------------------------------------------------------

    @property
    def nbytes_allocated(self) -> int:
        """Bytes held, used or not."""
        token_scales = 0 if self._token_scales is None else self._token_scales.nbytes
        return (
            self.cache_tensor.nbytes
            + token_scales
            + sum(store.scale_nbytes for layer in self._layers.values() for store in (layer.k, layer.v))
        )

    def report(self) -> CacheReport:
        """What is stored how; bytes are those of the requests that are under way."""
        rows = [self._report(layer) for _, layer in sorted(self._layers.items())]
        nbytes = sum(row.stored_bytes for row in rows)
        total = sum(row.model_dtype_bytes for row in rows)
        return CacheReport(rows, list(self.template.notes), nbytes, self.nbytes_allocated, total)

    def _report(self, layer: BatchedLayer) -> LayerReport:
        in_use = {block for blocks in self.cache_allocators[layer.group.name].block_table.values() for block in blocks}
        k, v = layer.k, layer.v
        stored = len(in_use) * (k.page_nbytes + v.page_nbytes) + k.scale_nbytes + v.scale_nbytes
        dense = len(in_use) * 2 * self._numbers_per_page * self.dtype.itemsize
        q = layer.plan.q
        clipped = layer.clipped.tolist()
        return LayerReport(
            layer.index, layer.group.name, (k.plan.format, v.plan.format), (k.source, v.source), stored, dense,
            (clipped[0], clipped[1]), (), *((None, "") if q is None else (q.format, q.source)),
        )  # fmt: skip

    @property
    def _numbers_per_page(self) -> int:
        return torch.Size(self._page_shape).numel()


def _power_of_2(number: int) -> int:
    """The least that is not below `number`."""
    return 1 << (number - 1).bit_length()
