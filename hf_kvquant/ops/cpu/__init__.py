"""The operators on a CPU: C++ kernels built on first use, torch operators where that cannot be done.

What neither serves (float64, unusual layouts) goes to the reference.
"""

from __future__ import annotations

import ctypes
import threading
import warnings
from typing import Any

import torch

from .. import reference
from . import build, chunked, kernels
from .build import outlook

__all__ = ["channel_absmax", "outlook", "outruns_torch", "paged_attention", "paths", "read_pages", "use", "write_kv"]

_TORCH = "torch"

# Who knows whether the processor multiplies tiles of a dtype, as torch has it do and the kernels do not.
_TILES = {torch.float32: "", torch.bfloat16: "_is_amx_tile_supported", torch.float16: "_is_amx_fp16_supported"}

_lock = threading.Lock()
_libraries: dict[str, ctypes.CDLL | None] = {}  # by path; None: torch operators
_path: str | None = None  # None: not asked yet


def paths() -> list[str]:
    """What this machine can run the operators on, the fastest first: instruction sets of the kernels, and torch."""
    return [*build.instruction_sets(), _TORCH]


def use(path: str | None = None) -> str:
    """Run the operators on `path`, or on the fastest that works; returns its name.

    Raises ValueError for a name that is not one of `paths()`, and build.BuildError if `path` cannot be built.
    """
    global _path
    if path is not None and path not in paths():
        raise ValueError(f"path {path!r} is not one of {paths()}")
    problem = None
    with _lock:
        for candidate in [*build.instruction_sets(), _TORCH] if path is None else [path]:
            try:
                _load(candidate)
            except build.BuildError as error:  # a compiler may be too old for the widest set
                problem = error
                if path is not None:
                    raise
            else:
                break
        said, _path = _path == candidate, candidate
    library = _libraries[candidate]
    if library is not None and not said and not build.is_threaded(library, candidate):
        warnings.warn(
            f"hf_kvquant: attention on the CPU runs on one thread, because {build.NO_OPENMP}",
            RuntimeWarning,
            stacklevel=2,
        )
    if problem is not None and candidate == _TORCH and not said:
        warnings.warn(
            "hf_kvquant: attention on the CPU runs on torch operators, several times slower than its kernels, which "
            f"could not be built: {'; '.join(filter(None, (str(problem), build.remedy())))}",
            RuntimeWarning,
            stacklevel=2,
        )
    return candidate


@torch.compiler.assume_constant_result
def outruns_torch(dtype: torch.dtype) -> bool:
    """Whether the kernels attend to dense keys and values of `dtype` faster than torch does.

    Measured with AVX-512 and AVX2 (docs/log.md), which torch uses as well where the processor does not multiply tiles.
    """
    if _library() is None or _path == "default" or dtype not in _TILES:
        return False
    return not getattr(torch.cpu, _TILES[dtype], bool)()


def _load(path: str) -> None:
    if path not in _libraries:
        _libraries[path] = None if path == _TORCH else build.load(path)


def _library() -> ctypes.CDLL | None:
    return _libraries[_path if _path is not None else use()]


# Arguments as in the schemas: after the tables five of K, five of V, and the rest.


def write_kv(
    key: torch.Tensor, value: torch.Tensor, page_table: torch.Tensor, seq_lens: torch.Tensor, *args: Any
) -> None:
    """`write_kv` of the dispatch key CPU."""
    library = _library()
    if library is None:
        written = chunked.write_kv(key, value, page_table, seq_lens, args[:5], args[5:10])
    else:
        written = kernels.write_kv(library, key, value, page_table, seq_lens, args[:5], args[5:10], *args[10:])
    if not written:
        chunked.newest_slots(page_table, seq_lens, key.shape[2], args[0])  # to the reference page -1 is the last one
        reference.write_kv(key, value, page_table, seq_lens, *args)


def paged_attention(query: torch.Tensor, page_table: torch.Tensor, seq_lens: torch.Tensor, *args: Any) -> torch.Tensor:
    """`paged_attention` of the dispatch key CPU."""
    library, output = _library(), None
    if library is not None:
        output = kernels.paged_attention(library, query, page_table, seq_lens, args[:5], args[5:10], *args[10:])
    elif query.dtype != torch.float64:
        output = chunked.paged_attention(query, page_table, seq_lens, args[:5], args[5:10], *args[10:])
    if output is None:
        output = reference.paged_attention(query, page_table, seq_lens, *args)
    return output


def read_pages(page_ids: torch.Tensor, *args: Any) -> torch.Tensor:
    """`read_pages` of the dispatch key CPU."""
    library = _library()
    output = None if library is None else kernels.read_pages(library, page_ids, args[:5], args[5])
    if output is None:
        if ((page_ids < 0) | (page_ids >= args[0].shape[0])).any():  # to the reference page -1 is the last one
            raise kernels.outside("page_ids", page_ids, args[0])
        output = reference.read_pages(page_ids, *args)
    return output


def channel_absmax(x: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """`channel_absmax` of the dispatch key CPU."""
    library = _library()
    found = None if library is None else kernels.channel_absmax(library, x, valid)
    return reference.channel_absmax(x, valid) if found is None else found
