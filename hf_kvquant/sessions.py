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
import uuid
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
from .broken import take_back_broken_step
from .config import KVQuantConfig
from .growing import GrowingLayer
from .hosts import layer_devices
from .identity import compare_weights, config_facts, weights_facts
from .layers import PagedLayer
from .pages import PageTable
from .policy import QueryPlan, SidePlan
from .pools import PagePool
from .sharding import part_of_model
from .stores import PageStore, keep_in_place, mutable_everywhere

if TYPE_CHECKING:
    from .cache import QuantizedPagedCache

FILE = "kv_cache.safetensors"
_HEADER = "hf_kvquant"
_VERSION = 2
_PLAN = ("format", "kind", "source", "equalize", "granularity", "margin")
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
        layer.settle(None)
        if isinstance(layer, GrowingLayer) and layer.length != layer.table.length:
            layer.leave_table()  # a step broke off before it came here, and in several processes it is not taken back
        table = layer.table
        pages, numbers = np.unique(table.rows, return_inverse=True)
        numbers = numbers.reshape(table.rows.shape)
        if id(table) not in tables:
            tables[id(table)] = len(tables)
            tensors[f"tables.{tables[id(table)]}"] = torch.from_numpy(numbers)
            header["tables"].append({"length": table.length, "first_page": table.first_page})
        if layer.exact is not None and layer.exact.held is not None:
            entry["num_first"] = layer.exact.num_first
            for side, tensor in zip("kv", layer.exact.held, strict=True):
                tensors[f"{where}.{side}.exact"] = tensor.cpu().contiguous()
        entry.update(table=tables[id(table)], dtype=str(layer.dtype), clipped=layer.clipped.tolist())
        for side, store in (("k", layer.k), ("v", layer.v)):
            _save_store(store, f"{where}.{side}", pages, np.unique(numbers[:, -1]), table.length, tensors)
            plan = {name: getattr(store.plan, name) for name in _PLAN}
            entry[side] = {"plan": plan, "source": store.source, "needs_tokens": store.needs_tokens}
    if not tensors:
        raise ValueError("the cache is empty; there is nothing to save")
    _write(Path(directory) / _file_of(*part), tensors, {_HEADER: json.dumps(header)})


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


def _write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write the file beside its place and move it there, so that there is never half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        save_file(tensors, temporary, metadata)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


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
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise ValueError(f"{path} is not a cache that save_pretrained() has written: {error}") from error
        if header.get("version") != _VERSION:
            raise ValueError(
                f"{path} is of version {header.get('version')} (written by hf_kvquant {header.get('written_by')}), "
                f"this hf_kvquant {__version__} reads version {_VERSION}; compute the text again"
            )
        if tuple(header["part"]) != part:
            raise ValueError(
                f"{path} was written by process {header['part'][0]} of {header['part'][1]}, and this is process "
                f"{part[0]} of {part[1]}, with other heads or layers; files keep the names that they were given"
            )
        return cls(path, header, file)

    @property
    def _names(self) -> list[str]:
        return list(self.file.keys())

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
        try:
            with mutable_everywhere():
                for index, (layer, entry) in enumerate(zip(cache.layers, entries, strict=True)):
                    if "table" in entry:
                        self._fill_layer(layer, f"layers.{index}", entry, devices[index], tables)
                    self._fill_state(layer, f"layers.{index}.state", entry["state"], devices[index])
        except (KeyError, TypeError, IndexError, AttributeError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{self.path} is damaged: {error}") from error
        cache.kvquant = KVQuantConfig.parse(self.header["options"])
        cache.notes = list(dict.fromkeys([*self.header["notes"], *cache.notes, f"restored from {self.path}"]))

    def _fill_layer(
        self, layer: PagedLayer, where: str, entry: dict[str, Any], device: torch.device, tables: dict[int, PageTable]
    ) -> None:
        table = self.header["tables"][entry["table"]]
        rows = self.file.get_tensor(f"tables.{entry['table']}").numpy()
        if isinstance(layer, GrowingLayer):
            layer.table = _table_for(layer, entry["table"], tables)
            layer.length = table["length"]
        k, v = (self._plan(f"{where}.{side}", entry[side]["plan"]) for side in "kv")
        layer.plan = replace(layer.plan, k=k, v=v, q=_query_plan(entry["q"]))
        shapes = [self.file.get_slice(f"{where}.{side}.pages").get_shape() for side in "kv"]
        dtype = getattr(torch, entry["dtype"].removeprefix("torch."))
        layer.lazy_initialization(
            *[
                torch.empty(len(rows), heads, 0, head_dim, dtype=dtype, device=device)
                for _, heads, _, head_dim in shapes
            ]
        )
        held = -(-table["length"] // layer.shared.page_size) - table["first_page"]
        if rows.shape[1] != held or rows.min() < 0 or rows.max() >= min(shape[0] for shape in shapes):
            raise ValueError(f"{self.path} is damaged: {where} has pages {shapes} for tables of {rows.shape}")
        places = layer.table.restore(rows, table["length"], table["first_page"])  # type: ignore[union-attr]
        # Sequences that share a page in the file may have one each here.
        places, first = np.unique(places, return_index=True)
        pages = rows.ravel()[first]
        for side, store in (("k", layer.k), ("v", layer.v)):
            self._fill_pages(store, f"{where}.{side}", torch.from_numpy(pages), torch.from_numpy(places))
            store.source, store.needs_tokens = entry[side]["source"], entry[side]["needs_tokens"]
        if layer.exact is not None:
            key, value = (self.file.get_tensor(f"{where}.{side}.exact").to(device) for side in "kv")
            layer.exact.restore(key, value, entry["num_first"])
        layer.clipped += torch.tensor(entry["clipped"], device=device)
        layer.is_empty = False

    def _plan(self, where: str, plan: dict[str, Any]) -> SidePlan:
        scales = {name: self.file.get_tensor(f"{where}.{name}") for name in _SCALES if f"{where}.{name}" in self._names}
        return SidePlan(**plan, **{name: t[:, 0] if t.shape[1] == 1 else t for name, t in scales.items()})

    def _fill_pages(self, store: PageStore, where: str, pages: torch.Tensor, places: torch.Tensor) -> None:
        """Page `pages[i]` of the file becomes page `places[i]` of `store`."""
        for name in _PAGED:
            if (target := getattr(store.at_rest, name)) is not None:
                saved = self.file.get_tensor(f"{where}.{name}")
                if saved.dtype != target.dtype or saved.shape[1:] != target.shape[1:]:
                    raise ValueError(
                        f"{self.path} is damaged: {where}.{name} is {saved.dtype} {list(saved.shape)}, not "
                        f"{target.dtype} [P, {', '.join(map(str, target.shape[1:]))}]"
                    )
                target.index_copy_(0, places.to(target.device), saved[pages].to(target.device))

    def _fill_state(self, layer: Any, where: str, state: dict[str, Any], device: torch.device) -> None:
        names = _state_names(layer)
        prefix = f"{where}."
        tensors = {name.removeprefix(prefix): name for name in self._names if name.startswith(prefix)}
        for path, value in {**state, **tensors}.items():
            name, _, key = path.partition(".")
            if name not in names:
                raise ValueError(f"{self.path} is damaged: {where} has {path}, which {type(layer).__name__} has not")
            if path in tensors:
                value = self.file.get_tensor(value).to(device)
                if not isinstance(layer, PagedLayer) and getattr(layer, "device", None) is None:
                    layer.dtype, layer.device = value.dtype, device
                if layer.is_compileable:
                    keep_in_place(value)
            if key:
                getattr(layer, name)[int(key) if key.isdecimal() else key] = value
            else:
                setattr(layer, name, value)


def _query_plan(entry: dict[str, Any] | None) -> QueryPlan | None:
    if entry is None:
        return None
    scale = entry["scale"]
    return QueryPlan(entry["format"], entry["source"], None if scale is None else torch.tensor(scale, device="cpu"))


def _table_for(layer: GrowingLayer, number: int, tables: dict[int, PageTable]) -> PageTable:
    """Table `number` of the file: the one that `layer` has, or a new one if that stands for another already."""
    if number not in tables:
        table = layer.table
        if any(table is other for other in tables.values()):
            table = PageTable(table.page_size, table.window, PagePool(table.pool.num_pages))
        tables[number] = table
    return tables[number]
