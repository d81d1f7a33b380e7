"""What is checked at the operators' boundary, before anything runs.

These run in every layer of every step: messages are only put together when they are needed, and a side of the cache
that has passed is not looked at again until one of its tensors is another.
"""

from __future__ import annotations

from typing import Protocol

import torch

from ..formats import get_format


class Paged(Protocol):
    """What is needed of `ops.PagedTensor`."""

    pages: torch.Tensor
    format: str
    scale: torch.Tensor | None
    zero: torch.Tensor | None
    token_scale: torch.Tensor | None
    checked: tuple[object, ...] | None


def _check_dtype(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        raise ValueError(f"{name} is {tensor.dtype}; expected {dtype}")


def _check_shape(name: str, tensor: torch.Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name} is {list(tensor.shape)}; expected {list(expected)}")


def _check_paged(name: str, side: Paged, num_heads: int, head_dim: int) -> None:
    if torch.compiler.is_compiling():  # a graph has no use for what passed
        return _check_parts(name, side, num_heads, head_dim)
    if (passed := side.checked) is not None:
        pages, scale, zero, token_scale, *shape = passed
        is_same = pages is side.pages and scale is side.scale and zero is side.zero and token_scale is side.token_scale
        if is_same and shape == [num_heads, head_dim]:
            return
    _check_parts(name, side, num_heads, head_dim)
    side.checked = (side.pages, side.scale, side.zero, side.token_scale, num_heads, head_dim)


def _check_parts(name: str, side: Paged, num_heads: int, head_dim: int) -> None:
    row, pages = get_format(side.format), side.pages
    if pages.ndim != 4 or pages.shape[1] != num_heads or pages.shape[3] != head_dim:
        raise ValueError(f"{name}.pages is {list(pages.shape)}; expected [P, {num_heads}, S, {head_dim}]")
    if row.storage_dtype is not None and pages.dtype != row.storage_dtype:
        raise ValueError(f"{name}.pages is {pages.dtype}; {row.name} is stored as {row.storage_dtype}")
    for field in ("scale", "zero"):
        tensor = getattr(side, field)
        if tensor is None:
            continue
        if tensor.ndim != 2 or tensor.shape[0] not in (1, num_heads) or tensor.shape[1] not in (1, head_dim):
            expected = f"[1 or {num_heads}, 1 or {head_dim}]"
            raise ValueError(f"{name}.{field} is {list(tensor.shape)}; expected {expected}")
        _check_dtype(f"{name}.{field}", tensor, torch.float32)
        _check_device(f"{name}.{field}", tensor, pages.device)
    if side.token_scale is not None:
        _check_shape(f"{name}.token_scale", side.token_scale, tuple(pages.shape[:3]))
        _check_dtype(f"{name}.token_scale", side.token_scale, torch.bfloat16)
        _check_device(f"{name}.token_scale", side.token_scale, pages.device)


def _check_device(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}; the pages it belongs to are on {device}")


def _check_pair(k: Paged, v: Paged) -> None:
    if k.pages.shape[:3] != v.pages.shape[:3]:
        shapes = f"k.pages is {list(k.pages.shape)} and v.pages is {list(v.pages.shape)}"
        raise ValueError(f"{shapes}; both must be [P, H, S, D]")
    _check_device("v.pages", v.pages, k.pages.device)


def _check_table(batch_size: int, page_table: torch.Tensor, seq_lens: torch.Tensor, device: torch.device) -> None:
    if page_table.ndim != 2 or page_table.shape[0] != batch_size:
        raise ValueError(f"page_table is {list(page_table.shape)}; expected [{batch_size}, N]")
    _check_shape("seq_lens", seq_lens, (batch_size,))
    _check_dtype("page_table", page_table, torch.int32)
    _check_dtype("seq_lens", seq_lens, torch.int32)
    _check_device("page_table", page_table, device)
    _check_device("seq_lens", seq_lens, device)


def check_write(
    key: torch.Tensor,
    value: torch.Tensor,
    k: Paged,
    v: Paged,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    clipped: torch.Tensor | None,
) -> None:
    if key.ndim != 4 or value.ndim != 4 or key.shape[:3] != value.shape[:3]:
        raise ValueError(f"key is {list(key.shape)} and value is {list(value.shape)}; both must be [B, H, T, D]")
    _check_paged("k", k, key.shape[1], key.shape[3])
    _check_paged("v", v, value.shape[1], value.shape[3])
    _check_pair(k, v)
    _check_table(key.shape[0], page_table, seq_lens, k.pages.device)
    _check_device("key", key, k.pages.device)
    _check_device("value", value, k.pages.device)
    if clipped is not None:
        _check_shape("clipped", clipped, (2,))
        _check_dtype("clipped", clipped, torch.int64)


def check_attention(
    query: torch.Tensor,
    k: Paged,
    v: Paged,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    attn_mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    lse: torch.Tensor | None,
) -> None:
    for name, tensor in (("query", query), ("k.pages", k.pages), ("v.pages", v.pages)):
        if tensor.ndim != 4:
            raise ValueError(f"{name} is {list(tensor.shape)}; expected four dimensions")
    batch_size, num_q_heads, num_tokens, head_dim = query.shape
    num_kv_heads = k.pages.shape[1]
    if num_q_heads % num_kv_heads:
        heads = f"its heads do not divide over {num_kv_heads} of keys and values"
        raise ValueError(f"query is {list(query.shape)}; {heads}")
    _check_paged("k", k, num_kv_heads, head_dim)
    _check_paged("v", v, num_kv_heads, v.pages.shape[3])
    _check_pair(k, v)
    _check_table(batch_size, page_table, seq_lens, k.pages.device)
    _check_device("query", query, k.pages.device)
    if attn_mask is not None:
        fits = (
            attn_mask.ndim == 4
            and attn_mask.shape[0] in (1, batch_size)
            and attn_mask.shape[1] in (1, num_q_heads)
            and attn_mask.shape[2] == num_tokens
        )
        if not fits:
            expected = f"[1 or {batch_size}, 1 or {num_q_heads}, {num_tokens}, M]"
            raise ValueError(f"attn_mask is {list(attn_mask.shape)}; expected {expected}")
        if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
            raise ValueError(f"attn_mask is {attn_mask.dtype}; expected bool (True attends) or float (added)")
    if sinks is not None:
        _check_shape("sinks", sinks, (num_q_heads,))
    if lse is not None:
        _check_shape("lse", lse, (batch_size, num_q_heads, num_tokens))
        _check_dtype("lse", lse, torch.float32)
        _check_device("lse", lse, k.pages.device)
        if not lse.is_contiguous():
            raise ValueError(f"lse has strides {lse.stride()}; expected a contiguous tensor")


def check_page_table(
    page_table: torch.Tensor, seq_lens: torch.Tensor, num_pages: int, page_size: int, window: int | None = None
) -> None:
    """Read a page table from its device and look for entries that no kernel may follow; for debugging.

    Args:
        page_table, seq_lens: as the operators take them.
        num_pages: of the pool.
        window: without one the table must have room for every token.

    Raises ValueError naming the first sequence and page that is wrong.
    """
    num_columns = page_table.shape[1]
    for sequence, (row, length) in enumerate(zip(page_table.tolist(), seq_lens.tolist(), strict=True)):
        used = -(-length // page_size)
        if window is None and used > num_columns:
            raise ValueError(
                f"sequence {sequence} has {length} tokens, but its {num_columns} pages of {page_size} tokens hold "
                f"{num_columns * page_size}; give the table more columns, or the window that it serves"
            )
        for column in range(min(used, num_columns)):
            if not 0 <= row[column] < num_pages:
                raise ValueError(f"page_table[{sequence}, {column}] is {row[column]}; there are {num_pages} pages")
