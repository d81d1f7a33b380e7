"""What is checked at the operators' boundary, before anything runs.

Every layer of every step comes by. Messages are only put together when they are needed, and an eager call that is like
the last one which has passed, over sides of the cache that have not changed since, passes at once.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from ..formats import get_format

_NUMBERS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class Paged(Protocol):
    """What is needed of `ops.PagedTensor`."""

    pages: torch.Tensor
    format: str
    scale: torch.Tensor | None
    zero: torch.Tensor | None
    token_scale: torch.Tensor | None
    passed: dict[str, Any]


def _check_tensor(
    name: str,
    tensor: torch.Tensor,
    device: torch.device,
    dtype: torch.dtype | None = None,
    shape: tuple[int, ...] | None = None,
) -> None:
    if shape is not None and tensor.shape != shape:
        raise ValueError(f"{name} is {list(tensor.shape)}; expected {list(shape)}")
    if dtype is not None and tensor.dtype != dtype:
        raise ValueError(f"{name} is {tensor.dtype}; expected {dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}; the pages it belongs to are on {device}")


def _check_paged(name: str, side: Paged, num_heads: int, head_dim: int) -> None:
    row, pages = get_format(side.format), side.pages
    if pages.ndim != 4 or pages.shape[1] != num_heads or pages.shape[3] != head_dim:
        raise ValueError(f"{name}.pages is {list(pages.shape)}; expected [P, {num_heads}, S, {head_dim}]")
    if not pages.shape[1] or not pages.shape[2]:
        raise ValueError(f"{name}.pages is {list(pages.shape)}; it needs at least one head and one token a page")
    if row.storage_dtype is not None and pages.dtype != row.storage_dtype:
        raise ValueError(f"{name}.pages is {pages.dtype}; {row.name} is stored as {row.storage_dtype}")
    for field in ("scale", "zero"):
        tensor = getattr(side, field)
        if tensor is None:
            continue
        if not row.is_quantized:
            raise ValueError(f"{name}.{field} is given, but unquantized pages have none")
        if tensor.ndim != 2 or tensor.shape[0] not in (1, num_heads) or tensor.shape[1] not in (1, head_dim):
            expected = f"[1 or {num_heads}, 1 or {head_dim}]"
            raise ValueError(f"{name}.{field} is {list(tensor.shape)}; expected {expected}")
        _check_tensor(f"{name}.{field}", tensor, pages.device, torch.float32)
    if side.token_scale is not None:
        _check_tensor(f"{name}.token_scale", side.token_scale, pages.device, torch.bfloat16, pages.shape[:3])


def _check_pair(k: Paged, v: Paged) -> None:
    if k.pages.shape[:3] != v.pages.shape[:3]:
        shapes = f"k.pages is {list(k.pages.shape)} and v.pages is {list(v.pages.shape)}"
        raise ValueError(f"{shapes}; both must be [P, H, S, D]")
    _check_tensor("v.pages", v.pages, k.pages.device)


def _check_table(batch_size: int, page_table: torch.Tensor, seq_lens: torch.Tensor, device: torch.device) -> None:
    if page_table.ndim != 2 or page_table.shape[0] != batch_size:
        raise ValueError(f"page_table is {list(page_table.shape)}; expected [{batch_size}, N]")
    if batch_size and not page_table.shape[1]:
        raise ValueError(f"page_table is {list(page_table.shape)}; it needs at least one column")
    _check_tensor("page_table", page_table, device, torch.int32)
    _check_tensor("seq_lens", seq_lens, device, torch.int32, (batch_size,))


def _looked_at(tensor: torch.Tensor | None) -> tuple[object, ...] | None:
    return None if tensor is None else (tensor.shape, tensor.dtype, tensor.device, tensor.is_contiguous())


def _is_known(operator: str, k: Paged, v: Paged, asked: tuple[object, ...]) -> bool:
    """Whether the last call that has passed with this pair, since either changed, was like this one."""
    passed = k.passed.get(operator)
    return passed is not None and passed is v.passed.get(operator) and passed == asked


def check_write(
    key: torch.Tensor,
    value: torch.Tensor,
    k: Paged,
    v: Paged,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    clipped: torch.Tensor | None,
    is_eager: bool,
) -> None:
    asked = None
    if is_eager:  # a graph would be guarded on what is remembered, and on how much room there is
        asked = (
            key.shape, key.dtype, key.device, value.shape, value.dtype, value.device,
            page_table.shape, page_table.dtype, page_table.device, seq_lens.shape, seq_lens.dtype, seq_lens.device,
            _looked_at(clipped),
        )  # fmt: skip
        if _is_known("write", k, v, asked):
            return
    if key.ndim != 4 or value.ndim != 4 or key.shape[:3] != value.shape[:3]:
        raise ValueError(f"key is {list(key.shape)} and value is {list(value.shape)}; both must be [B, H, T, D]")
    if key.dtype not in _NUMBERS or value.dtype not in _NUMBERS:
        raise ValueError(f"key is {key.dtype}, value is {value.dtype}; expected among {_NUMBERS}")
    _check_paged("k", k, key.shape[1], key.shape[3])
    _check_paged("v", v, value.shape[1], value.shape[3])
    _check_pair(k, v)
    device = k.pages.device
    _check_table(key.shape[0], page_table, seq_lens, device)
    _check_tensor("key", key, device)
    _check_tensor("value", value, device)
    if clipped is not None:
        _check_tensor("clipped", clipped, device, torch.int64, (2,))
        if not clipped.is_contiguous():
            raise ValueError(f"clipped has strides {clipped.stride()}; expected a contiguous tensor")
    if asked is not None:
        if key.shape[2] > page_table.shape[1] * k.pages.shape[2]:
            raise ValueError(
                f"key has {key.shape[2]} tokens, but {page_table.shape[1]} pages of {k.pages.shape[2]} tokens have no "
                "room for as many; write the newest of them"
            )
        k.passed["write"] = v.passed["write"] = asked


def check_attention(
    query: torch.Tensor,
    k: Paged,
    v: Paged,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    attn_mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    window: int | None,
    lse: torch.Tensor | None,
    is_eager: bool,
) -> None:
    asked = None
    if is_eager:
        asked = (
            query.shape, query.dtype, query.device, page_table.shape, page_table.dtype, page_table.device,
            seq_lens.shape, seq_lens.dtype, seq_lens.device, _looked_at(attn_mask), _looked_at(sinks), window,
            _looked_at(lse),
        )  # fmt: skip
        if _is_known("attention", k, v, asked):
            return
    for name, tensor in (("query", query), ("k.pages", k.pages), ("v.pages", v.pages)):
        if tensor.ndim != 4:
            raise ValueError(f"{name} is {list(tensor.shape)}; expected four dimensions")
    if query.dtype not in _NUMBERS:
        raise ValueError(f"query is {query.dtype}; expected among {_NUMBERS}")
    batch_size, num_q_heads, num_tokens, head_dim = query.shape
    num_kv_heads = k.pages.shape[1]
    if num_kv_heads and num_q_heads % num_kv_heads:
        heads = f"its heads do not divide over {num_kv_heads} of keys and values"
        raise ValueError(f"query is {list(query.shape)}; {heads}")
    _check_paged("k", k, num_kv_heads, head_dim)
    _check_paged("v", v, num_kv_heads, v.pages.shape[3])
    _check_pair(k, v)
    device = k.pages.device
    _check_table(batch_size, page_table, seq_lens, device)
    _check_tensor("query", query, device)
    if attn_mask is not None:
        fits = (
            attn_mask.ndim == 4
            and attn_mask.shape[0] in (1, batch_size)
            and attn_mask.shape[1] in (1, num_q_heads)
            and attn_mask.shape[2] == num_tokens
            and attn_mask.shape[3] > 0
        )
        if not fits:
            expected = f"[1 or {batch_size}, 1 or {num_q_heads}, {num_tokens}, M]"
            raise ValueError(f"attn_mask is {list(attn_mask.shape)}; expected {expected}")
        if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
            raise ValueError(f"attn_mask is {attn_mask.dtype}; expected bool (True attends) or float (added)")
        _check_tensor("attn_mask", attn_mask, device)
    if window is not None and window < 0:
        raise ValueError(f"window is {window}; expected 1 or more, 0 to see nothing, or None for no window")
    if sinks is not None:
        _check_tensor("sinks", sinks, device, shape=(num_q_heads,))
    if lse is not None:
        _check_tensor("lse", lse, device, torch.float32, (batch_size, num_q_heads, num_tokens))
        if not lse.is_contiguous():
            raise ValueError(f"lse has strides {lse.stride()}; expected a contiguous tensor")
    if asked is not None:
        k.passed["attention"] = v.passed["attention"] = asked


def check_read(side: Paged, page_ids: torch.Tensor, is_eager: bool) -> None:
    asked = (page_ids.ndim, page_ids.dtype, page_ids.device)
    if is_eager and side.passed.get("read") == asked:
        return
    pages = side.pages
    if page_ids.ndim != 2 or page_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"page_ids is {page_ids.dtype} {list(page_ids.shape)}; expected int32 or int64 [B, N]")
    if pages.ndim != 4:
        raise ValueError(f"side.pages is {list(pages.shape)}; expected four dimensions")
    _check_paged("side", side, pages.shape[1], pages.shape[3])
    _check_tensor("page_ids", page_ids, pages.device)
    if is_eager:
        side.passed["read"] = asked


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
