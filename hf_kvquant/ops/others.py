"""The operators on devices without kernels of their own (MPS, XPU, ...): the reference, which is told once."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch

from . import reference

# CPUs and GPUs come here for what needs no kernel there, and meta tensors have no numbers.
_TOLD_ELSEWHERE = frozenset({"cpu", "cuda", "meta"})

logger = logging.getLogger(__name__)


def write_kv(key: torch.Tensor, *args: Any) -> None:
    """`write_kv` of all other dispatch keys."""
    _tell(key)
    reference.write_kv(key, *args)


def paged_attention(query: torch.Tensor, *args: Any) -> torch.Tensor:
    """`paged_attention` of all other dispatch keys."""
    _tell(query)
    return reference.paged_attention(query, *args)


def read_pages(page_ids: torch.Tensor, *args: Any) -> torch.Tensor:
    """`read_pages` of all other dispatch keys."""
    _tell(page_ids)
    return reference.read_pages(page_ids, *args)


def _tell(tensor: torch.Tensor) -> None:
    if tensor.device.type not in _TOLD_ELSEWHERE:
        _warn(tensor.device.type)


@functools.cache
def _warn(device_type: str) -> None:
    logger.warning(
        "The KV cache uses plain torch on %s, which is slow: there are no kernels for such devices.", device_type
    )
