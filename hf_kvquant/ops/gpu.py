"""Which implementation serves a GPU: the Triton kernels, or, where they cannot, the reference."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from . import reference

logger = logging.getLogger(__name__)


def write_kv(key: torch.Tensor, value: torch.Tensor, *args: Any) -> None:
    """`write_kv` of the dispatch key CUDA (NVIDIA and AMD)."""
    _implementation(key, args[2:7], args[7:12]).write_kv(key, value, *args)


def paged_attention(query: torch.Tensor, *args: Any) -> torch.Tensor:
    """`paged_attention` of the dispatch key CUDA (NVIDIA and AMD)."""
    return _implementation(query, args[2:7], args[7:12]).paged_attention(query, *args)


def read_pages(page_ids: torch.Tensor, pages: torch.Tensor, *args: Any) -> torch.Tensor:
    """`read_pages` of the dispatch key CUDA (NVIDIA and AMD)."""
    dtype, head_dim = args[-1], pages.shape[3]
    return _choose(pages.device, dtype, head_dim, head_dim, _is_dense((pages, *args[:4]))).read_pages(
        page_ids, pages, *args
    )


def _implementation(x: torch.Tensor, k: Sequence[Any], v: Sequence[Any]) -> ModuleType:
    """`k`, `v`: pages, format, scale, zero and token scale."""
    return _choose(x.device, x.dtype, k[0].shape[3], v[0].shape[3], _is_dense(k) and _is_dense(v))


def _is_dense(side: Sequence[Any]) -> bool:
    return all(tensor is None or tensor.is_contiguous() for tensor in (side[0], *side[2:]))


@functools.lru_cache(maxsize=256)
def _choose(device: torch.device, dtype: torch.dtype, k_dim: int, v_dim: int, dense: bool) -> ModuleType:
    try:
        from . import triton
    except ImportError as error:
        reason: str | None = f"Triton cannot be imported ({error})"
    else:
        reason = triton.why_not(device, dtype, k_dim, v_dim, dense)
        if reason is None:
            return triton
    logger.warning("The KV cache uses plain torch on %s, which is slow: %s.", device, reason)
    return reference
