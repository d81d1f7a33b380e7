"""Which implementation serves a GPU: the Triton kernels, or, where they cannot, the reference."""

from __future__ import annotations

import functools
import logging
from types import ModuleType
from typing import Any

import torch

from . import reference

logger = logging.getLogger(__name__)


def write_kv(key: torch.Tensor, value: torch.Tensor, *args: Any) -> None:
    """`write_kv` of the dispatch key CUDA (NVIDIA and AMD)."""
    k_pages, v_pages = args[2], args[7]
    _implementation(key, k_pages, v_pages).write_kv(key, value, *args)


def paged_attention(query: torch.Tensor, *args: Any) -> torch.Tensor:
    """`paged_attention` of the dispatch key CUDA (NVIDIA and AMD)."""
    k_pages, v_pages = args[2], args[7]
    return _implementation(query, k_pages, v_pages).paged_attention(query, *args)


def read_pages(page_ids: torch.Tensor, pages: torch.Tensor, *args: Any) -> torch.Tensor:
    """`read_pages` of the dispatch key CUDA (NVIDIA and AMD)."""
    dtype = args[-1]
    return _choose(pages.device, dtype, pages.shape[3], pages.shape[3]).read_pages(page_ids, pages, *args)


def _implementation(x: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor) -> ModuleType:
    return _choose(x.device, x.dtype, k_pages.shape[3], v_pages.shape[3])


@functools.lru_cache(maxsize=256)
def _choose(device: torch.device, dtype: torch.dtype, k_dim: int, v_dim: int) -> ModuleType:
    try:
        from . import triton
    except ImportError as error:
        reason: str | None = f"Triton cannot be imported ({error})"
    else:
        reason = triton.why_not(device, dtype, k_dim, v_dim)
        if reason is None:
            return triton
    logger.warning("The KV cache uses plain torch on %s, which is slow: %s.", device, reason)
    return reference
