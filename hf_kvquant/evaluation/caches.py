"""The caches that stand side by side in a measurement: ours, and transformers' unquantized and quantized ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, QuantizedCache, StaticCache
from transformers.cache_utils import Cache

from ..cache import QuantizedPagedCache
from ..config import KVQuantConfig
from ..options import options_for

DENSE = "DynamicCache"
STATIC = "StaticCache"
DEFAULT_FORMATS = ("fp8_e4m3", "fp8_e5m2", "int8")
Format = str | torch.dtype
Formats = Iterable[Format | tuple[Format, Format]] | Mapping[str, Mapping[str, Any] | KVQuantConfig]
# transformers' quantized caches; of the bits that a backend offers, the default and, if there is one, 8.
HOST_CACHES: dict[str, dict[str, Any]] = {
    "transformers fp8": {"backend": "fp8"},
    "transformers quanto 4 bit": {"backend": "quanto", "nbits": 4},
    "transformers hqq 8 bit": {"backend": "hqq", "nbits": 8},
    "transformers hqq 4 bit": {"backend": "hqq", "nbits": 4},
}


@dataclass(frozen=True)
class Candidate:
    """A cache of a measurement.

    Attributes:
        name: of its row.
        options: what it is made with, as JSON.
        make: makes an empty one, given the tokens that a sequence will reach at most. Raises ImportError where a
            package that it needs is not installed.
        ours: whether it is this package's.
    """

    name: str
    options: dict[str, Any]
    make: Callable[[int], Cache]
    ours: bool = False


def candidates(model: PreTrainedModel, formats: Formats = DEFAULT_FORMATS, reserved: bool = False) -> list[Candidate]:
    """transformers' unquantized cache, ours in each format, and transformers' quantized ones, installed or not.

    Args:
        model: whose caches they are.
        formats: values of `kv_cache_dtype`; or the names of rows and their options, the fields of `KVQuantConfig`.
        reserved: ours at fixed addresses, as `generate` makes them where it compiles; then transformers' unquantized
            cache of that kind is there too.

    Raises TypeError for formats that are no list and rows that are no options, ValueError for options that are unknown
    and names that are taken.
    """
    text_config = model.config.get_text_config(decoder=True)
    if isinstance(formats, str):
        raise TypeError(f"formats={formats!r} is text; give a list such as [{formats!r}], or names and their options")
    if not isinstance(formats, Iterable):
        raise TypeError(f"formats={formats!r}; give a list such as ['int8'], or names and their options")
    rows: Mapping[str, Any] = (
        formats if isinstance(formats, Mapping) else {_row_name(each): {"kv_cache_dtype": each} for each in formats}
    )
    for name, options in rows.items():
        if not isinstance(options, Mapping | KVQuantConfig):
            raise TypeError(f"formats[{name!r}]={options!r}; give its options, such as {{'kv_cache_dtype': 'int8'}}")

    def dense(_: int) -> Cache:
        return DynamicCache(config=text_config)

    def ours(options: Any, fixed: bool, length: int) -> Cache:
        # As in `generate`, which knows how long a sequence can get: no memory beyond that.
        return QuantizedPagedCache.for_generation(
            model, options, expected_length=length, max_cache_len=length if fixed else None
        )

    def static(length: int) -> Cache:
        return StaticCache(config=text_config, max_cache_len=length)

    def hosts(options: dict[str, Any], _: int) -> Cache:
        return QuantizedCache(config=text_config, **options)

    found = [Candidate(DENSE, {}, dense)]
    if reserved:
        found.append(Candidate(STATIC, {}, static))
    for name, options in rows.items():
        if name in HOST_CACHES or any(name == other.name for other in found if not other.ours):
            raise ValueError(f"formats: {name!r} is the name of a cache of transformers, which has a row anyway")
        config = options_for(model, options)
        fixed = reserved and not config.offload and config.num_pages is None
        # Made with what was given: in a config an `auto` that was asked for looks like one that was not.
        make = partial(ours, options, fixed)
        found.append(Candidate(name, json.loads(json.dumps(config.to_dict())), make, ours=True))
    return found + [Candidate(name, options, partial(hosts, options)) for name, options in HOST_CACHES.items()]


def _row_name(formats: Any) -> str:
    """`kvquant`, and the format or those of K and V; torch's dtypes are names too."""
    each = formats if isinstance(formats, list | tuple) else [formats]
    return f"kvquant {' / '.join(str(name).removeprefix('torch.') for name in each)}"


def held_bytes(cache: Cache) -> int:
    """Bytes that a cache holds: for ours also pages that are not in use yet, for theirs every tensor."""
    if isinstance(cache, QuantizedPagedCache):
        return cache.nbytes_allocated
    storages: dict[int, int] = {}
    for layer in cache.layers:
        _add_storages(list(vars(layer).values()), storages)
    return sum(storages.values())


def _add_storages(value: Any, storages: dict[int, int]) -> None:
    """Address -> bytes of the memory behind the tensors in `value`, of which they may be a part.

    Quantized data comes as containers, or as tensors around others.
    """
    if isinstance(value, torch.Tensor):
        if hasattr(value, "__tensor_flatten__"):
            value = [getattr(value, name) for name in value.__tensor_flatten__()[0]]
        else:
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            return
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            _add_storages(item, storages)
