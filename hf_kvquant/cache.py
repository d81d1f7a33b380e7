"""`QuantizedPagedCache`: a transformers cache whose attention layers store 8-bit pages."""

from __future__ import annotations

import copy
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    StaticCache,
)
from transformers.utils import logging

from . import sessions
from .broken import take_back_broken_step
from .checkpoint_scales import CheckpointScales
from .config import KVQuantConfig
from .fixed import FixedLayer
from .growing import GrowingLayer, move_to_own_pool
from .hosts.configuration import layer_type_names
from .hosts.conventions import tokens_to_take_back
from .hosts.fake_quantization import disable_fake_quantization
from .hosts.wrappers import without_wrapper
from .hybrid import HybridFixedLayer, HybridGrowingLayer
from .layers import PagedLayer
from .options import find_checkpoint, options_for
from .pages import PageTable, PageTables
from .policy import ROUNDED_QUERIES, SAFER, asks_for_checkpoint, minds_key_biases, plan_layers
from .report import CacheReport, LayerReport
from .risks import large_key_biases
from .rotary import rotary_layouts
from .sharding import head_shard, part_of_model
from .shared import SharedState
from .sides import SIDES

logger = logging.get_logger(__name__)

# transformers' layer class -> ours, growing and fixed. Whatever is not here (linear attention, convolutions, dummies,
# indexers of sparse attention) stays transformers' own.
_PAGED: dict[type, tuple[type[GrowingLayer], type[FixedLayer]]] = {
    DynamicLayer: (GrowingLayer, FixedLayer),
    DynamicSlidingWindowLayer: (GrowingLayer, FixedLayer),
    LinearAttentionAndFullAttentionLayer: (HybridGrowingLayer, HybridFixedLayer),
    LinearAttentionAndSlidingWindowAttentionLayer: (HybridGrowingLayer, HybridFixedLayer),
}


class QuantizedPagedCache(DynamicCache):
    """A cache in 8-bit pages, for `past_key_values` (`cache` from transformers 5.24 on); it can be reused over calls.

    Usually made by `from_model`, or by `generate(cache_implementation="kvquant")`.

    Args:
        config: the model's configuration; tells which layers there are.
        kvquant: options, see `KVQuantConfig`; None for the defaults.
        checkpoint: scales to use, from `read_scales`; None for none but those that `kvquant` holds. Nothing is read.
        notes: lines for the report.
        expected_length: tokens that a sequence will reach at most, if known; memory is then not allocated beyond it.
        key_biases: layers whose keys have a bias too large for static scales, and how large.

    Raises ValueError for options that do not fit the model.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        kvquant: KVQuantConfig | None = None,
        *,
        checkpoint: CheckpointScales | None = None,
        notes: Iterable[str] = (),
        expected_length: int | None = None,
        key_biases: Mapping[int, float] | None = None,
    ) -> None:
        self.kvquant: KVQuantConfig = kvquant or KVQuantConfig()
        kvquant = self.kvquant
        if checkpoint is None and isinstance(kvquant.scales, CheckpointScales):
            checkpoint = kvquant.scales
        if checkpoint is None and kvquant.scales != "auto" and asks_for_checkpoint(kvquant):
            raise ValueError(
                f"scales={kvquant.scales!r}: a cache reads files for a model only; make it with from_model(), or give "
                "checkpoint=read_scales(...)"
            )
        if checkpoint is not None and not isinstance(checkpoint, CheckpointScales):
            raise TypeError(
                f"checkpoint is a {type(checkpoint).__name__}, not what read_scales returned; other scales are an "
                "option, KVQuantConfig(scales=...)"
            )
        text_config = config.get_text_config(decoder=True)
        template = list(DynamicCache(config=text_config).layers)
        names = layer_type_names(text_config, template)
        plans, plan_notes = plan_layers(kvquant, names, checkpoint, key_biases)
        if ROUNDED_QUERIES in plan_notes:
            logger.warning_once(f"{ROUNDED_QUERIES}.")
        if warned := [note for note in plan_notes if SAFER in note]:
            logger.warning_once(f"{warned[0]}; `report()` has all notes ({len(warned)} such).")
        self.notes: list[str] = [*notes, *(checkpoint.notes if checkpoint is not None else ()), *plan_notes]
        self._layer_types = names
        self.shared: SharedState = SharedState(text_config, kvquant.page_size)
        capacity = kvquant.max_cache_len
        others = template if capacity is None else _fixed_layers(text_config, capacity)
        tables = PageTables(kvquant.page_size, kvquant.num_pages, expected_length)
        layers: list[Any] = []
        for index, host_layer in enumerate(template):
            if type(host_layer) not in _PAGED:
                layers.append(others[index])
                continue
            growing, fixed = _PAGED[type(host_layer)]
            window = getattr(host_layer, "sliding_window", None)
            arguments = (index, names[index], plans[index], self.shared, window)
            states = getattr(host_layer, "number_of_states", None)
            options = {} if states is None else {"number_of_states": states}
            if capacity is None:
                offloads = kvquant.offload and window is None
                layers.append(growing(*arguments, table=tables.for_window(window), offloads=offloads, **options))
            else:
                layers.append(fixed(*arguments, capacity=capacity, num_pages=kvquant.num_pages, **options))
        # Layers whose pages rest in host memory, in their order, and which of them was used last.
        self._offloaded = [layer.index for layer in layers if isinstance(layer, GrowingLayer) and layer.offloads]
        self._last_used: int | None = None
        if self._offloaded:
            self.notes.append(f"offload: the pages of {len(self._offloaded)} layer(s) rest in host memory")
        if any(isinstance(layer, PagedLayer) and layer.exact is not None for layer in layers):
            self.notes.append(
                f"sink_tokens={kvquant.sink_tokens}, recent_tokens={kvquant.recent_tokens}: kept in the model's dtype, "
                "beside the pages"
            )
        Cache.__init__(self, layers=layers)

    @classmethod
    def from_model(cls, model: PreTrainedModel, **options: Any) -> QuantizedPagedCache:
        """A cache for `model`, with scales from its checkpoint where it has any.

        Args:
            model: a loaded transformers model.
            options: the fields of `KVQuantConfig`. Where compressed-tensors rounds K and V inside the model, that is
                switched off for the life of the model. Without a `kv_cache_dtype` the model's attention implementation
                decides (`kvquant_fp8`, ...), then its checkpoint.

        Raises ValueError or TypeError for options that are unknown or do not fit the model.
        """
        return cls.for_generation(model, options)

    @classmethod
    def for_generation(
        cls,
        model: PreTrainedModel,
        options: KVQuantConfig | Mapping[str, Any] | None,
        expected_length: int | None = None,
        max_cache_len: int | None = None,
    ) -> QuantizedPagedCache:
        """`from_model`, with what `generate` knows beside the user's `options`.

        Args:
            model, options: as of `from_model`; None for no options.
            expected_length: tokens that a sequence will reach at most; memory is not allocated beyond it.
            max_cache_len: as the option, where the user has given none.

        Raises ValueError or TypeError for options that are unknown or do not fit the model.
        """
        model = without_wrapper(model)
        kvquant = options_for(model, options, max_cache_len)
        notes: list[str] = []
        checkpoint = find_checkpoint(model, kvquant, notes) if asks_for_checkpoint(kvquant) else None
        biases = large_key_biases(model) if checkpoint is not None or minds_key_biases(kvquant) else None
        cache = cls(
            model.config, kvquant, checkpoint=checkpoint, notes=notes, expected_length=expected_length,
            key_biases=biases,
        )  # fmt: skip
        cache.shared.rotary = rotary_layouts(model, cache._layer_types)
        cache.shared.shard, cache.shared.part = head_shard(model), part_of_model(model)
        cache.shared.model = weakref.ref(model)
        cache.notes += disable_fake_quantization(model)
        if kvquant.max_cache_len is not None and not model._can_compile_fullgraph:
            note = (
                f"max_cache_len: transformers does not say that {type(model).__name__} works over a cache at fixed "
                "addresses (_can_compile_fullgraph), and with some such models tokens are others; leave it out, or "
                "compare with a cache that grows"
            )
            cache.notes.append(note)
            logger.warning_once(f"{note}.")
        return cache

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write the cache to disk: its live pages, scales and page tables, in one file that is complete or not there.

        The text is not in it: keep the token ids, `generate` wants all of them. Forks are saved one by one. Where the
        model is spread over processes (tensor and pipeline parallelism) each calls this and writes a file of its own.

        Raises ValueError if it is empty.
        """
        sessions.save(self, directory)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str], model: PreTrainedModel) -> QuantizedPagedCache:
        """A cache that `save_pretrained` has written, on the devices of `model`, and in as many processes.

        That an adapter has learned another prompt or prefix since is not noticed: those in the cache stay.

        Raises ValueError if it was written with a model of another configuration or of other weights, and if the file
        is missing, damaged or of another version.
        """
        model = without_wrapper(model)
        saved = sessions.SavedCache.open(directory, model)
        notes = saved.check_model(model)
        cache = cls.for_generation(model, saved.options)
        saved.fill(cache, model)
        cache.notes += notes
        return cache

    # -- transformers' operations, each table once -----------------------------------------------------------------

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Write the new keys and values of a layer; returns what its attention reads (see `PagedLayer.update`).

        Raises ValueError if the cache was made for another model, OutOfPagesError if there is no room.
        """
        if layer_idx >= len(self.layers):
            raise ValueError(
                f"layer {layer_idx} does not exist in this cache of {len(self.layers)} layers; it was made for another "
                "model, make a new one with from_model()"
            )
        if layer_idx not in self._offloaded:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if self._last_used is not None and self._last_used != layer_idx:
            self.layers[self._last_used].offload()
        self._last_used = layer_idx
        result = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        following = self._offloaded.index(layer_idx) + 1
        self.layers[self._offloaded[following % len(self._offloaded)]].prefetch()
        return result

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens a sequence has seen; at fixed addresses a tensor, as transformers' static caches have it."""
        return super().get_seq_length(self._layer_to_ask(layer_idx))

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and first token of the mask that a layer needs for the next `query_length` tokens."""
        return super().get_mask_sizes(query_length, self._layer_to_ask(layer_idx))

    def _layer_to_ask(self, layer_idx: int) -> int:
        """Which layer knows how many tokens `layer_idx` has seen.

        That is itself, unless it and all before it are empty and a later one is not: where a model's layers are spread
        over processes (pipeline parallelism), those of earlier processes hold nothing here.
        """
        if layer_idx >= len(self.layers) or _is_filled(self.layers[layer_idx]):
            return layer_idx
        asked = self.layers[layer_idx]
        if layer_idx == 0:  # where it has a state only, transformers means the first with attention
            asked = next((layer for layer in self.layers if isinstance(layer, CacheLayerMixin)), asked)
        if not isinstance(asked, PagedLayer) or not asked.is_empty:
            return layer_idx
        if any(_is_filled(layer) for layer in self.layers[:layer_idx]):
            return layer_idx  # attention to something that is not there, as a text model's to images
        later = [index for index in range(layer_idx, len(self.layers)) if _is_filled(self.layers[index])]
        alike = [index for index in later if self.layers[index].window == asked.window]
        return (alike or later or [layer_idx])[0]

    @property
    def batch_size(self) -> int:
        """Sequences held, -1 while there are none. Raises ValueError where layers hold different numbers of them."""
        sizes = {getattr(layer, "batch_size", -1) for layer in self.layers} - {-1}
        if len(sizes) > 1:
            raise ValueError(f"the layers hold different numbers of sequences: {sorted(sizes)}")
        return sizes.pop() if sizes else -1

    @property
    def num_model_layers(self) -> int:
        """Layers as the cache was made; models that go through some of them several times add copies."""
        return len(self._layer_types)

    @property
    def _paged_layers(self) -> list[PagedLayer]:
        return [layer for layer in self.layers if isinstance(layer, PagedLayer)]

    @property
    def _tables(self) -> list[PageTable]:
        """The growing page tables, each once."""
        tables = [layer.table for layer in self.layers if isinstance(layer, GrowingLayer)]
        return list({id(table): table for table in tables}.values())

    def reset(self) -> None:
        """Forget all tokens and give the memory back; frozen scales stay."""
        self.shared.forget_prompt()
        for table in self._tables:
            table.clear()
        for layer in self.layers:
            if isinstance(layer, GrowingLayer):
                layer.follow_reset()
            else:
                layer.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens. Raises RuntimeError where a window has moved on."""
        num_tokens = tokens_to_take_back(tokens_to_remove, self.get_seq_length)
        num_tokens = max(num_tokens - take_back_broken_step(self, is_between_calls=False), 0)
        self._settle()
        # Whoever may refuse comes first, so that a refusal leaves the cache as it was.
        for table in self._tables:
            table.check_crop(num_tokens)
        for layer in self.layers:
            if isinstance(layer, PagedLayer):
                layer.check_crop(num_tokens)
        for layer in self.layers:
            if not isinstance(layer, PagedLayer):
                layer.crop(-num_tokens)
        for table in self._tables:
            table.crop(num_tokens)
        for layer in self._paged_layers:
            if isinstance(layer, GrowingLayer):
                layer.follow_crop(num_tokens)
            else:
                layer.crop(-num_tokens)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Sequence i becomes a copy of sequence `beam_idx[i]`: page tables change, pages are shared."""
        self._select(beam_idx.tolist(), lambda layer: layer.reorder_cache(beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence becomes `repeats` that share its pages."""
        indices = [index for index in range(max(self.batch_size, 0)) for _ in range(repeats)]
        self._select(indices, lambda layer: layer.batch_repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only these sequences."""
        # Without paged layers that hold something nobody asks which they are.
        kept = torch.arange(self.batch_size, device="cpu")[indices.cpu()].tolist() if self.batch_size > 0 else []
        self._select(kept, lambda layer: layer.batch_select_indices(indices))

    def _select(self, indices: Sequence[int], change_host_layer: Any) -> None:
        self._settle()
        filled = [layer for layer in self._paged_layers if not layer.is_empty]
        for layer in filled:
            layer.check_select(indices)
        for layer in self.layers:
            if not isinstance(layer, PagedLayer) and _host_tensors(layer):
                change_host_layer(layer)
        for table in self._tables:
            table.select(indices)
        for layer in filled:
            layer.follow_select(indices)

    # -- copies ----------------------------------------------------------------------------------------------------

    def fork(self) -> QuantizedPagedCache:
        """A cache with the same tokens that goes its own way from here, sharing every page with this one.

        Nothing is copied now: both caches hold the same pool of pages, and a page that one of them is about to write
        while another still refers to it is copied then. Neither ever sees what the other writes, crops, reorders or
        resets, and a page becomes free when the last cache that refers to it lets go of it or is dropped; forks may
        outlive the cache they come from. Static scales and equalizers are shared, since the shared bytes need them;
        `num_pages` bounds all caches of a pool together, and `nbytes_allocated` of each is the whole pool. A cache at
        fixed addresses, scales that wait for their first real tokens, and the states of linear attention are copied.

        Forks of one cache change the same pool: use them from one thread at a time (`copy.deepcopy` shares nothing).
        """
        self._settle()
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.notes = list(self.notes)
        other.shared, other._last_used = self.shared.copy(), None
        tables = {id(table): table.fork() for table in self._tables}
        for table in self._tables:
            tables[id(table)].siblings = [tables[id(t)] for t in table.siblings if id(t) in tables]
        memo: dict[int, Any] = {id(self.shared): other.shared, **tables}
        growing = [layer for layer in self.layers if isinstance(layer, GrowingLayer)]
        for layer in growing:
            if layer.is_initialized:
                memo[id(layer.k)], memo[id(layer.v)] = layer.k, layer.v
        other.layers = copy.deepcopy(self.layers, memo)
        if any(layer.needs_tokens for layer in growing):
            other._share_nothing()
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedPagedCache:
        memo[id(self)] = other = self.fork()
        other._share_nothing()
        return other

    def _share_nothing(self) -> None:
        for table in self._tables:
            move_to_own_pool(table)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "a QuantizedPagedCache is not pickled; use fork() or copy.deepcopy() for a copy in this process, and "
            "save_pretrained() for one on disk"
        )

    def _settle(self) -> None:
        self.shared.copies = 1  # sequences may differ from here on
        for layer in self._paged_layers:
            layer.settle()

    def __iter__(self) -> Iterator[tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]]:
        """Keys, values and window (None for full attention) of every layer as dense tensors."""
        for layer in self.layers:
            if not isinstance(layer, PagedLayer):
                keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
                yield keys, values, getattr(layer, "_sliding_window_tensor", None)
                continue
            keys, values = (None, None) if layer.is_empty else (layer.read(side, 0) for side in SIDES)
            if layer.index in self._offloaded:
                layer.offload()
            yield keys, values, None if layer.window is None else torch.tensor(layer.window, device="cpu")

    # -- what it holds ---------------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes in use: distinct pages, scales and page tables (and what layers of transformers store)."""
        return sum(self._stored_nbytes(layer) for layer in self.layers) + self._table_nbytes

    @property
    def nbytes_allocated(self) -> int:
        """Bytes held, used or not."""
        return sum(self._allocated_nbytes(layer) for layer in self.layers) + self._table_nbytes

    @property
    def _table_nbytes(self) -> int:
        tables = {id(layer.table): layer.table for layer in self._paged_layers if layer.table is not None}
        return sum(table.nbytes for table in tables.values())

    @staticmethod
    def _stored_nbytes(layer: Any) -> int:
        return layer.stored_nbytes if isinstance(layer, PagedLayer) else _host_nbytes(layer)

    @staticmethod
    def _allocated_nbytes(layer: Any) -> int:
        return layer.allocated_nbytes if isinstance(layer, PagedLayer) else _host_nbytes(layer)

    def report(self) -> CacheReport:
        """What is stored how; `print` it for a table. Reads a few numbers back from the device."""
        rows = []
        for index, layer in enumerate(self.layers):
            if isinstance(layer, PagedLayer):
                rows.append(_paged_report(layer))
            elif nbytes := _host_nbytes(layer):
                largest = max(_host_tensors(layer), key=lambda tensor: tensor.nbytes)
                dtype = str(largest.dtype).removeprefix("torch.")
                name = self._layer_types[index] if index < self.num_model_layers else type(layer).__name__
                sources = ("kept by transformers",) * 2
                rows.append(LayerReport(index, name, (dtype, dtype), sources, nbytes, nbytes, (0, 0)))
        total = sum(row.model_dtype_bytes for row in rows)
        return CacheReport(rows, list(self.notes), self.nbytes, self.nbytes_allocated, total)


def _is_filled(layer: Any) -> bool:
    return isinstance(layer, PagedLayer) and not layer.is_empty


def _fixed_layers(config: PreTrainedConfig, capacity: int) -> list[Any]:
    """transformers' layers at fixed addresses. Raises ValueError if it has none for a type of layer."""
    try:
        return list(StaticCache(config=config, max_cache_len=capacity).layers)
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"max_cache_len={capacity}: transformers {transformers.__version__} has no layers at fixed addresses for "
            f"{config.model_type} ({error!r}); leave max_cache_len out"
        ) from error


def _paged_report(layer: PagedLayer) -> LayerReport:
    if layer.is_initialized:
        formats = (layer.k.plan.format, layer.v.plan.format)
        sources = (layer.k.source, layer.v.source)
        numbers = layer.clipped.tolist()
    else:
        formats = (layer.plan.k.format, layer.plan.v.format)
        sources, numbers = (layer.plan.k.source, layer.plan.v.source), [0, 0]
    return LayerReport(
        layer.index, layer.layer_type, formats, sources, layer.stored_nbytes, layer.model_dtype_nbytes,
        (numbers[0], numbers[1]), tuple(layer.dense_reasons), *_query_of(layer),
    )  # fmt: skip


def _query_of(layer: PagedLayer) -> tuple[str | None, str]:
    return (None, "") if layer.plan.q is None else (layer.plan.q.format, layer.plan.q.source)


def _host_tensors(layer: Any) -> list[torch.Tensor]:
    """The tensors that a layer of transformers holds."""
    held: list[Any] = []
    for value in vars(layer).values():
        held += value.values() if isinstance(value, dict) else (value,)
    return [tensor for tensor in held if isinstance(tensor, torch.Tensor)]


def _host_nbytes(layer: Any) -> int:
    return sum(tensor.nbytes for tensor in _host_tensors(layer))
