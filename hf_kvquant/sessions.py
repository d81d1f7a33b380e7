"""Caches on disk: the live pages with their scales and page tables, in one safetensors file.

`kv_cache.safetensors` holds, for every page table t, the page numbers of its sequences, oldest first (`tables.{t}`
`[B, N]`), for every paged layer i its `layers.{i}.k.pages` and `.v.pages` `[P, H, S, D]` with their `.token_scale`,
`.scale` and `.zero` and what is kept in the model's dtype beside them (`.exact`), and the states that layers of
transformers keep. Everything else is JSON in its header, under the name `hf_kvquant`. Where tensor or pipeline
parallelism has spread the model over processes, each writes its heads and layers into a file of its own,
`kv_cache-0-of-2.safetensors` and so on.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.cache_utils import LinearAttentionLayer
from transformers.utils import logging

from ._version import __version__
from .atomic_write import atomic_write
from .broken import take_back_broken_step
from .config import KVQuantConfig
from .exact import SLACK, ExactTokens
from .growing import GrowingLayer
from .hosts.devices import layer_devices
from .identity import compare_weights, config_facts, weights_facts
from .layers import PagedLayer
from .pages import PageTable, oldest_needed
from .policy import QueryPlan, SidePlan
from .pools import PagePool
from .saved_header import ENTRIES, PAGED_LAYER, PLAN, QUERY, WEIGHTS, check, check_numbers, check_plan, dtype_of
from .sharding import part_of_model
from .static_pages import StaticPageTable
from .stores import PageStore, keep_in_place, mutable_everywhere

if TYPE_CHECKING:
    from .cache import QuantizedPagedCache

FILE = "kv_cache.safetensors"
_HEADER = "hf_kvquant"
_VERSION = 2
_PAGED, _SCALES = ("pages", "token_scale"), ("scale", "zero")

logger = logging.get_logger(__name__)


def _file_of(part: int, num_parts: int) -> str:
    return FILE if num_parts == 1 else f"kv_cache-{part}-of-{num_parts}.safetensors"


# -- writing -------------------------------------------------------------------------------------------------------


def save(cache: QuantizedPagedCache, directory: str | os.PathLike[str]) -> None:
    """Write `cache` into `directory`. Raises ValueError if it is empty, or if its model has added layers to it."""
    if len(cache.layers) != cache.num_model_layers:
        raise ValueError(
            f"the model has made {len(cache.layers)} layers of the cache's {cache.num_model_layers} while it ran; a "
            "new cache would not have them, so this one cannot be saved"
        )
    take_back_broken_step(cache)
    model = cache.shared.model() if cache.shared.model is not None else None
    part = cache.shared.part
    tensors: dict[str, torch.Tensor] = {}
    tables: dict[int, int] = {}  # id of each table -> its number
    header: dict[str, Any] = {
        "version": _VERSION,
        "written_by": __version__,
        "transformers": transformers.__version__,
        "part": part,
        "options": cache.kvquant.to_dict(),
        "config": config_facts(cache.shared.model_config),
        "weights": None if model is None else weights_facts(model),
        "notes": cache.notes,
        "tables": [],
        "layers": [],
    }
    for index, layer in enumerate(cache.layers):
        where = f"layers.{index}"
        entry: dict[str, Any] = {"kind": type(layer).__name__, "state": _state_of(layer, where, tensors)}
        header["layers"].append(entry)
        if not isinstance(layer, PagedLayer) or layer.is_empty:
            continue
        entry["q"] = _query_entry(layer.plan.q)
        layer.settle()
        if isinstance(layer, GrowingLayer) and layer.length != layer.table.length:
            layer.leave_table()  # a step broke off before it came here, and in several processes it is not taken back
        table = layer.table
        pages, numbers = np.unique(table.rows, return_inverse=True)
        numbers = numbers.reshape(table.rows.shape)
        if id(table) not in tables:
            tables[id(table)] = len(tables)
            tensors[f"tables.{tables[id(table)]}"] = torch.from_numpy(numbers)
            facts = {"length": table.length, "first_page": table.first_page}
            if isinstance(table, StaticPageTable):  # what it has lost before a crop, the pages that are left do not say
                facts["first_position"] = table.first_position
            header["tables"].append(facts)
        if layer.exact is not None and layer.exact.held is not None:
            entry["num_first"] = layer.exact.num_first
            for side, tensor in zip("kv", layer.exact.held, strict=True):
                tensors[f"{where}.{side}.exact"] = tensor.cpu().contiguous()
        entry.update(table=tables[id(table)], dtype=str(layer.dtype), clipped=layer.clipped.tolist())
        for side, store in (("k", layer.k), ("v", layer.v)):
            _save_store(store, f"{where}.{side}", pages, np.unique(numbers[:, -1]), table.length, tensors)
            plan = {name: getattr(store.plan, name) for name in PLAN}
            entry[side] = {"plan": plan, "source": store.source, "needs_tokens": store.needs_tokens}
    if not tensors:
        raise ValueError("the cache is empty; there is nothing to save")
    path = Path(directory) / _file_of(*part)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        save_file(tensors, partial, {_HEADER: json.dumps(header)})


def _query_entry(plan: QueryPlan | None) -> dict[str, Any] | None:
    if plan is None:
        return None
    return {**vars(plan), "scale": None if plan.scale is None else plan.scale.tolist()}


def _save_store(
    store: PageStore, where: str, pages: np.ndarray, tails: np.ndarray, length: int, tensors: dict[str, torch.Tensor]
) -> None:
    paged = store.with_pages(torch.from_numpy(pages).to(store.index_device)).at_rest
    if filled := length % paged.pages.shape[2]:  # what was written behind the end and taken back stays here
        paged.pages[tails, :, filled:] = 0
        if paged.token_scale is not None:
            paged.token_scale[tails, :, filled:] = 0
    for name in (*_PAGED, *_SCALES):
        if (tensor := getattr(paged, name)) is not None:
            tensor = tensor.cpu().contiguous()
            # Layers may have been given one scale for all of them; the file wants each tensor's own memory.
            tensors[f"{where}.{name}"] = tensor.clone() if name in _SCALES else tensor


def _state_of(layer: Any, where: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What a layer of transformers keeps: tensors go to `tensors`, numbers and flags are returned."""
    state = {}
    for name in _state_names(layer):
        value = getattr(layer, name)
        entries = value.items() if isinstance(value, dict) else [(None, value)]
        for key, entry in entries:
            path = name if key is None else f"{name}.{key}"
            if isinstance(entry, torch.Tensor):
                tensors[f"{where}.state.{path}"] = entry.detach().cpu().contiguous()
            elif isinstance(entry, (bool, int, float, str)):
                state[path] = entry
    return state


def _state_names(layer: Any) -> list[str]:
    """Names of attributes with transformers' state of `layer`, or its linear-attention state if the rest is paged."""
    if not isinstance(layer, PagedLayer):
        return list(vars(layer))
    if not isinstance(layer, LinearAttentionLayer):
        return []
    return [name for name in vars(LinearAttentionLayer()) if name not in ("device", "dtype", "number_of_states")]


# -- reading -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SavedCache:
    """A cache in a directory.

    Attributes:
        path: the file.
        header: what was written beside the tensors.
        file: the open file.
    """

    path: Path
    header: dict[str, Any]
    file: Any

    @classmethod
    def open(cls, directory: str | os.PathLike[str], model: PreTrainedModel) -> SavedCache:
        """The one of this process. Raises ValueError if there is none for `model`, or one of another version."""
        part = part_of_model(model)
        path = Path(directory) / _file_of(*part)
        try:
            file = safe_open(path, framework="pt")
            header = json.loads((file.metadata() or {})[_HEADER])
        except FileNotFoundError as error:
            message = f"{directory} holds no saved cache: there is no {path.name}"
            if others := sorted(other.name for other in Path(directory).glob("kv_cache*.safetensors")):
                message = (
                    f"{directory} has {', '.join(others)} but no {path.name}: a cache is read by as many processes as "
                    f"have written it, each its own file, and this is process {part[0]} of {part[1]}"
                )
            raise ValueError(message) from error
        except (SafetensorError, OSError, KeyError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not a cache that save_pretrained() has written: {error}") from error
        if not isinstance(header, dict):
            raise ValueError(f"{path} is not a cache that save_pretrained() has written: its header is no dict")
        if header.get("version") != _VERSION:
            raise ValueError(
                f"{path} is of version {header.get('version')} (written by hf_kvquant {header.get('written_by')}), "
                f"this hf_kvquant {__version__} reads version {_VERSION}; compute the text again"
            )
        saved = cls(path, header, file)
        with saved._naming_damage():
            saved._check_header()
        if tuple(header["part"]) != part:
            raise ValueError(
                f"{path} was written by process {header['part'][0]} of {header['part'][1]}, and this is process "
                f"{part[0]} of {part[1]}, with other heads or layers; files keep the names that they were given"
            )
        return saved

    @contextlib.contextmanager
    def _naming_damage(self) -> Iterator[None]:
        """Whatever goes wrong with what the file says is a ValueError that names the file."""
        try:
            yield
        except torch.OutOfMemoryError:  # not the file's fault
            raise
        except (
            ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, SafetensorError,
        ) as error:  # fmt: skip
            raise ValueError(
                f"{self.path} is damaged, or was not written by save_pretrained(): {error}. Compute the text again"
            ) from error

    def _check_header(self) -> None:
        """What can be known without the model's layers."""
        check(self.header, ENTRIES, "")
        if len(self.header["part"]) != 2:
            raise ValueError(f"part is {self.header['part']}, not two numbers")
        if (weights := self.header["weights"]) is not None:
            check(weights, WEIGHTS, "weights")
            for name, facts in weights["weights"].items():
                if not isinstance(facts, list) or len(facts) != 4:
                    raise ValueError(f"weights.weights.{name} is not a list of 4")
        for options in (self.header["options"], self.options):
            KVQuantConfig.parse(options)

    @property
    def _names(self) -> list[str]:
        return list(self.file.keys())

    def _own(self, name: str) -> torch.Tensor:
        """A tensor of the file that is to be kept: a view of the mapped file would keep it open, in use on Windows."""
        return self.file.get_tensor(name).clone()

    @property
    def options(self) -> dict[str, Any]:
        """Options to make the cache with; scales, and how queries are rounded, come from the file."""
        of_scales = ("scales", "granularity", "margin", "q_dtype")
        kept = {name: value for name, value in self.header["options"].items() if name not in of_scales}
        return {**kept, "scales": "dynamic"}

    def check_model(self, model: PreTrainedModel) -> list[str]:
        """Notes on what could not be checked. Raises ValueError if the cache was written with another model."""
        saved, given = self.header["config"], config_facts(model.config.get_text_config(decoder=True))
        if differing := sorted(n for n in saved.keys() | given.keys() if saved.get(n) != given.get(n)):
            facts = ", ".join(f"{name} {saved.get(name)!r} (here {given.get(name)!r})" for name in differing)
            raise ValueError(
                f"{self.path} was written with a model of another configuration: {facts} (written under transformers "
                f"{self.header['transformers']}, this is {transformers.__version__})"
            )
        if self.header["weights"] is None:  # a cache that no model made
            return []
        weights = weights_facts(model)
        is_same, num_unknown = compare_weights(self.header["weights"], weights)
        if not is_same:
            raise ValueError(
                f"{self.path} was written with other weights than those of this model (another checkpoint, precision, "
                "adapter or quantization); its keys and values would be wrong here. Compute the text again"
            )
        if num_unknown:
            note = (
                f"{self.path}: whether it was written with the weights of this model could not be checked for "
                f"{num_unknown} of {len(weights['weights'])} (offloaded, spread over processes in another way than "
                "they were, or in tensors of another library); with others its keys and values are wrong"
            )
            logger.warning_once(f"{note}.")
            return [note]
        return []

    def fill(self, cache: QuantizedPagedCache, model: PreTrainedModel) -> None:
        """Put what is saved into `cache`, which was made for `model` with `options` and is empty.

        Raises ValueError if the file does not fit.
        """
        entries = self.header["layers"]
        saved, here = [entry["kind"] for entry in entries], [type(layer).__name__ for layer in cache.layers]
        if saved != here:
            raise ValueError(f"{self.path} holds layers of the kinds {saved}, but this model has {here}")
        tables: dict[int, PageTable] = {}
        devices = layer_devices(model, len(entries))
        with self._naming_damage(), mutable_everywhere():
            for index, (layer, entry) in enumerate(zip(cache.layers, entries, strict=True)):
                if "table" in entry:
                    self._fill_layer(layer, f"layers.{index}", entry, devices[index], tables)
                self._fill_state(layer, f"layers.{index}.state", entry["state"], devices[index])
        # Tables of another length are those of layers that went their own way.
        for table in cache._tables:
            table.siblings = [other for other in cache._tables if other is not table and other.length == table.length]
        cache.kvquant = KVQuantConfig.parse(self.header["options"])
        cache.notes = list(dict.fromkeys([*self.header["notes"], *cache.notes, f"restored from {self.path}"]))

    def _fill_layer(
        self, layer: PagedLayer, where: str, entry: dict[str, Any], device: torch.device, tables: dict[int, PageTable]
    ) -> None:
        if not isinstance(layer, PagedLayer):
            raise ValueError(f"{where} has a table, but a {type(layer).__name__} has no pages")
        check(entry, PAGED_LAYER, where)
        rows = self._rows(entry["table"], layer)
        table = self.header["tables"][entry["table"]]
        num_pages = int(rows.max()) + 1
        shapes = self._page_shapes(where, num_pages, layer.shared.page_size)
        dtype = dtype_of(entry["dtype"], f"{where}.dtype")
        k, v = (self._plan(f"{where}.{side}", entry[side]) for side in "kv")
        layer.plan = replace(layer.plan, k=k, v=v, q=self._query_plan(f"{where}.q", entry["q"], k.format))
        if isinstance(layer, GrowingLayer):
            layer.table = _table_for(layer, entry["table"], tables)
            layer.length = table["length"]
        layer.lazy_initialization(
            *[
                torch.empty(len(rows), heads, 0, head_dim, dtype=dtype, device=device)
                for _, heads, _, head_dim in shapes
            ]
        )
        places = layer.table.restore(rows, table["length"], table["first_page"])  # type: ignore[union-attr]
        if isinstance(layer.table, StaticPageTable) and "first_position" in table:  # older files do not have it
            check(table, {"first_position": int}, f"tables.{entry['table']}")
            layer.table.lose(table["first_position"])
        # Sequences that share a page in the file may have one each here.
        places, first = np.unique(places, return_index=True)
        pages = rows.ravel()[first]
        for side, store in (("k", layer.k), ("v", layer.v)):
            self._fill_pages(store, f"{where}.{side}", num_pages, torch.from_numpy(pages), torch.from_numpy(places))
            store.source, store.needs_tokens = entry[side]["source"], entry[side]["needs_tokens"]
        if layer.exact is not None:
            self._fill_exact(layer, layer.exact, where, entry, len(rows), device)
        if len(entry["clipped"]) != 2 or min(entry["clipped"]) < 0:
            raise ValueError(f"{where}.clipped is {entry['clipped']}, not two counts")
        layer.clipped += torch.tensor(entry["clipped"], device=device)
        layer.is_empty = False

    def _rows(self, number: int, layer: PagedLayer) -> np.ndarray:
        """The pages `[B, N]` of the sequences of a table. Raises ValueError if no table of `layer` is like it."""
        where, page_size = f"tables.{number}", layer.shared.page_size
        if not 0 <= number < len(self.header["tables"]):
            raise ValueError(f"layers.{layer.index}.table is {number}, but there are {len(self.header['tables'])}")
        length, first_page = (self.header["tables"][number][name] for name in ("length", "first_page"))
        if not 0 < length < 2**31:
            raise ValueError(f"{where}.length is {length}; it must be positive and below 2**31")
        # A window lets go of pages that no later token sees, but not before.
        oldest = oldest_needed(length, layer.window) // page_size
        if not 0 <= first_page <= oldest:
            raise ValueError(f"{where}.first_page is {first_page}; with {length} tokens it must be from 0 to {oldest}")
        rows = self._own(where)
        held = -(-length // page_size) - first_page
        if rows.dtype != torch.int64 or rows.ndim != 2 or not len(rows) or rows.shape[1] != held:
            raise ValueError(
                f"{where} is {rows.dtype} {list(rows.shape)}, not torch.int64 [B, {held}], for {length} tokens"
            )
        used = rows.unique()
        if used[0] != 0 or used[-1] != len(used) - 1:
            raise ValueError(f"{where} has {len(used)} pages, numbered {used[0]} ... {used[-1]} and not from 0 on")
        return rows.numpy()

    def _page_shapes(self, where: str, num_pages: int, page_size: int) -> list[list[int]]:
        """`[P, H, S, D]` of K and V."""
        shapes = [self.file.get_slice(f"{where}.{side}.pages").get_shape() for side in "kv"]
        for side, shape in zip("kv", shapes, strict=True):
            # Pages without numbers take no bytes in the file, so there could be any number of them.
            if len(shape) != 4 or min(shape) < 1 or (shape[0], shape[2]) != (num_pages, page_size):
                raise ValueError(f"{where}.{side}.pages is {shape}, not [{num_pages}, H, {page_size}, D]")
        if shapes[0][1] != shapes[1][1]:
            raise ValueError(f"{where}.k.pages has {shapes[0][1]} heads and {where}.v.pages {shapes[1][1]}")
        return shapes

    def _plan(self, where: str, entry: dict[str, Any]) -> SidePlan:
        names, plan = self._names, entry["plan"]
        scales: dict[str, Any] = {name: self._own(f"{where}.{name}") for name in _SCALES if f"{where}.{name}" in names}
        check_plan(plan, f"{where}.plan")
        is_measured = plan["kind"] == "first_batch" or plan["equalize"]
        if entry["needs_tokens"] and not is_measured:
            raise ValueError(f"{where}.needs_tokens is true, but its scales are {plan['kind']}")
        if ("scale" in scales) != (plan["kind"] == "static" or is_measured and not entry["needs_tokens"]):
            raise ValueError(f"{where}.scale is {'not expected' if scales else 'missing'} by {where}.plan")
        if "zero" in scales and plan["kind"] != "static":
            raise ValueError(f"{where}.zero is not expected by {where}.plan")
        for name, tensor in scales.items():
            if tensor.dtype != torch.float32 or tensor.ndim != 2 or not tensor.numel():
                raise ValueError(f"{where}.{name} is {tensor.dtype} {list(tensor.shape)}, not torch.float32 [H, D]")
            check_numbers(tensor, f"{where}.{name}", positive=name == "scale")
        return SidePlan(**plan, **{name: t[:, 0] if t.shape[1] == 1 else t for name, t in scales.items()})

    def _query_plan(self, where: str, entry: dict[str, Any] | None, k_format: str) -> QueryPlan | None:
        if entry is None:
            return None
        check(entry, QUERY, where)
        if entry["format"] != self.header["options"].get("q_dtype") or entry["format"] != k_format:
            raise ValueError(f"{where}.format is {entry['format']!r}, not that of the keys and of the option q_dtype")
        if entry["scale"] is None:
            return QueryPlan(entry["format"], entry["source"])
        check(entry["scale"], [float], f"{where}.scale")
        scale = torch.tensor(entry["scale"], dtype=torch.float32, device="cpu")
        check_numbers(scale, f"{where}.scale", positive=True)
        return QueryPlan(entry["format"], entry["source"], scale)

    def _fill_exact(
        self,
        layer: PagedLayer,
        exact: ExactTokens,
        where: str,
        entry: dict[str, Any],
        batch_size: int,
        device: torch.device,
    ) -> None:
        """The tokens that are kept in the model's dtype."""
        check(entry, {"num_first": int}, where)
        num_first, least = entry["num_first"], exact.num_recent + (SLACK if exact.in_place else 0)
        if num_first < 0 or num_first % layer.shared.page_size:
            raise ValueError(f"{where}.num_first is {num_first}; it must be whole pages of {layer.shared.page_size}")
        held: list[torch.Tensor] = []
        for side, store in (("k", layer.k), ("v", layer.v)):
            tensor = self.file.get_tensor(f"{where}.{side}.exact")
            size = tensor.shape[2] if tensor.ndim == 4 else 0
            fits = num_first + least <= size <= num_first + exact.num_recent + SLACK
            expected = (batch_size, layer.num_heads, size, store.head_dim)
            if tensor.dtype != layer.dtype or tensor.shape != expected or not fits or held and size != held[0].shape[2]:
                raise ValueError(
                    f"{where}.{side}.exact is {tensor.dtype} {list(tensor.shape)}, not {layer.dtype} [{batch_size}, "
                    f"{layer.num_heads}, {num_first} + {least} or more, {store.head_dim}]"
                )
            held.append(tensor.to(device))
        exact.restore(held[0], held[1], num_first)

    def _fill_pages(
        self, store: PageStore, where: str, num_pages: int, pages: torch.Tensor, places: torch.Tensor
    ) -> None:
        """Page `pages[i]` of the file's `num_pages` becomes page `places[i]` of `store`."""
        for name in _PAGED:
            if (target := getattr(store.at_rest, name)) is not None:
                saved = self.file.get_tensor(f"{where}.{name}")
                expected = [num_pages, *target.shape[1:]]
                if saved.dtype != target.dtype or list(saved.shape) != expected:
                    raise ValueError(
                        f"{where}.{name} is {saved.dtype} {list(saved.shape)}, not {target.dtype} {expected}"
                    )
                target.index_copy_(0, places.to(target.device), saved[pages].to(target.device))

    def _fill_state(self, layer: Any, where: str, state: dict[str, Any], device: torch.device) -> None:
        names = _state_names(layer)
        prefix = f"{where}."
        tensors = {name.removeprefix(prefix): name for name in self._names if name.startswith(prefix)}
        for path, value in {**state, **tensors}.items():
            name, _, key = path.partition(".")
            if name not in names:
                raise ValueError(f"{where} has {path}, which {type(layer).__name__} has not")
            if path not in tensors and type(value) not in (bool, int, float, str):
                raise ValueError(f"{where}.{path} is {value!r}, neither a number nor a text")
            if path in tensors:
                value = self._own(value).to(device)
                if not isinstance(layer, PagedLayer) and getattr(layer, "device", None) is None:
                    layer.dtype, layer.device = value.dtype, device
                if layer.is_compileable:
                    keep_in_place(value)
            if key:
                getattr(layer, name)[int(key) if key.isdecimal() else key] = value
            else:
                setattr(layer, name, value)


def _table_for(layer: GrowingLayer, number: int, tables: dict[int, PageTable]) -> PageTable:
    """Table `number` of the file: the one that `layer` has, or a new one if that stands for another already."""
    if number not in tables:
        table = layer.table
        if any(table is other for other in tables.values()):
            table = PageTable(table.page_size, table.window, PagePool(table.pool.num_pages))
        tables[number] = table
    if tables[number].window != layer.window:
        raise ValueError(f"layers.{layer.index}.table is {number}, which is that of layers with another window")
    return tables[number]
