"""Calling the C++ kernels: tensors to the records that kernels.cpp reads."""

from __future__ import annotations

import ctypes
import os
import struct

import torch

from ...formats import get_format

# Records of kernels.cpp, all of whose members are eight bytes: two sides, tables, and the rest.
_SIDE, _TABLES = "10q", "8q"
_WRITE = struct.Struct(f"={_SIDE}{_SIDE}{_TABLES}5q5q3q")
_READ = struct.Struct(f"={_SIDE}7q2q")
_ABSMAX = struct.Struct("=5q5qq2qqq")
_ATTENTION = struct.Struct(f"={_SIDE}{_SIDE}{_TABLES}5q4q7q3q2d")

_CODES = {"fp8_e4m3": 0, "fp8_e5m2": 1, "int8": 2}
_NUMBERS = {torch.float32: 3, torch.bfloat16: 4, torch.float16: 5}

# GNU's OpenMP does not survive a fork; a forked process works on one thread.
_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)

Side = tuple[torch.Tensor, str, "torch.Tensor | None", "torch.Tensor | None", "torch.Tensor | None"]


def _format_code(name: str, pages: torch.Tensor) -> int | None:
    name = get_format(name).name
    return _NUMBERS.get(pages.dtype) if name == "model" else _CODES.get(name)


def _strides(tensor: torch.Tensor) -> list[int]:
    """Zero where one element serves all."""
    return [stride if size > 1 else 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]


def _scales(tensor: torch.Tensor | None) -> tuple[int, int, int]:
    """Of scales or zeros `[1 | H, 1 | D]`."""
    if tensor is None:
        return 0, 0, 0
    (num_heads, num_channels), (head, channel) = tensor.shape, tensor.stride()
    return tensor.data_ptr(), head if num_heads > 1 else 0, channel if num_channels > 1 else 0


def _side(side: Side) -> tuple[int, ...] | None:
    pages, name, scale, zero, token_scale = side
    code = _CODES.get(name)
    if code is None:
        code = _format_code(name, pages)
    if code is None or not pages.is_contiguous() or not (token_scale is None or token_scale.is_contiguous()):
        return None
    return (
        pages.data_ptr(), code, pages.shape[3], *_scales(scale), *_scales(zero),
        0 if token_scale is None else token_scale.data_ptr(),
    )  # fmt: skip


def _tables(page_table: torch.Tensor, seq_lens: torch.Tensor, pages: torch.Tensor) -> tuple[int, ...]:
    num_pages, num_heads, page_size, _ = pages.shape
    return (
        page_table.data_ptr(), seq_lens.data_ptr(), page_table.shape[1], num_pages, page_size, page_table.shape[0],
        num_heads, _num_threads(),
    )  # fmt: skip


def _num_threads() -> int:
    return 1 if _forked else torch.get_num_threads()


def _check(status: int, page_table: torch.Tensor, pages: torch.Tensor) -> None:
    if status:
        raise outside("page_table", page_table, pages)


def outside(name: str, page_ids: torch.Tensor, pages: torch.Tensor) -> ValueError:
    """What is raised if `page_ids` name a page that is not among `pages`."""
    return ValueError(f"{name} names a page outside 0 ... {pages.shape[0] - 1}: {page_ids.tolist()}")


def write_kv(
    library: ctypes.CDLL,
    key: torch.Tensor,
    value: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    k: Side,
    v: Side,
    clipped: torch.Tensor | None,
) -> bool:
    """As the operator; returns False, with nothing done, if the kernel does not serve these dtypes and layouts."""
    dtype = key.dtype
    code = _NUMBERS.get(dtype)
    k_side, v_side = _side(k), _side(v)
    if code is None or value.dtype != dtype or k_side is None or v_side is None:
        return False
    for pages, name in ((k[0], k_side[1]), (v[0], v_side[1])):
        if name > 2 and pages.dtype != dtype:
            return False
    page_table, seq_lens = page_table.contiguous(), seq_lens.contiguous()
    record = _WRITE.pack(
        *k_side, *v_side, *_tables(page_table, seq_lens, k[0]),
        key.data_ptr(), *key.stride(), value.data_ptr(), *value.stride(),
        code, key.shape[2], 0 if clipped is None else clipped.data_ptr(),
    )  # fmt: skip
    _check(library.hf_kvquant_write_kv(record), page_table, k[0])
    return True


def paged_attention(
    library: ctypes.CDLL,
    query: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    k: Side,
    v: Side,
    attn_mask: torch.Tensor | None,
    mask_start: int,
    sinks: torch.Tensor | None,
    softmax_scale: float,
    softcap: float | None,
    window: int | None,
    causal: bool,
    lse: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """As the operator; None if the kernel does not serve these dtypes and layouts."""
    code = _NUMBERS.get(query.dtype)
    k_side, v_side = _side(k), _side(v)
    if code is None or k_side is None or v_side is None:
        return None
    batch_size, num_q_heads, num_tokens, _ = query.shape
    output = query.new_empty(batch_size, num_q_heads, num_tokens, v_side[2])
    if not output.numel():
        return output
    if query.stride(3) != 1:
        query = query.contiguous()
    page_table, seq_lens = page_table.contiguous(), seq_lens.contiguous()
    if sinks is not None:
        sinks = sinks.to(torch.float32).contiguous()
    mask: tuple[int, ...] = (0, 0, 0, 0, 0, 0, mask_start)
    if attn_mask is not None:
        if attn_mask.dtype not in (torch.bool, torch.float32, torch.bfloat16):
            attn_mask = attn_mask.to(torch.float32)
        if attn_mask.stride(3) != 1:
            attn_mask = attn_mask.contiguous()
        mask_code = -1 if attn_mask.dtype == torch.bool else _NUMBERS[attn_mask.dtype]
        mask = (attn_mask.data_ptr(), mask_code, *_strides(attn_mask)[:3], attn_mask.shape[3], mask_start)
    record = _ATTENTION.pack(
        *k_side, *v_side, *_tables(page_table, seq_lens, k[0]),
        query.data_ptr(), code, *query.stride()[:3],
        output.data_ptr(), 0 if lse is None else lse.data_ptr(), num_q_heads, num_tokens,
        *mask,
        0 if sinks is None else sinks.data_ptr(), -1 if window is None else window, causal,
        softmax_scale, softcap or 0.0,
    )  # fmt: skip
    _check(library.hf_kvquant_paged_attention(record), page_table, k[0])
    return output


def read_pages(library: ctypes.CDLL, page_ids: torch.Tensor, side: Side, dtype: torch.dtype) -> torch.Tensor | None:
    """As the operator; None if the kernel does not serve these dtypes and layouts."""
    code, record = _NUMBERS.get(dtype), _side(side)
    if code is None or record is None:
        return None
    num_pages, num_heads, page_size, head_dim = side[0].shape
    batch_size, num_columns = page_ids.shape
    output = side[0].new_empty(batch_size, num_heads, num_columns * page_size, head_dim, dtype=dtype)
    if output.numel():
        page_ids = page_ids.long().contiguous()
        status = library.hf_kvquant_read_pages(
            _READ.pack(
                *record, page_ids.data_ptr(), batch_size, num_columns, num_pages, num_heads, page_size,
                _num_threads(), output.data_ptr(), code,
            )
        )  # fmt: skip
        if status:
            raise outside("page_ids", page_ids, side[0])
    return output


def channel_absmax(library: ctypes.CDLL, x: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor | None:
    """As the operator; None if the kernel does not serve this dtype and layout."""
    code = _NUMBERS.get(x.dtype)
    if code is None or x.stride(3) != 1:
        return None
    out = x.new_empty(x.shape[1], x.shape[3], dtype=torch.float32)
    mask = (0, 0, 0) if valid is None else (valid.data_ptr(), *valid.stride())
    library.hf_kvquant_channel_absmax(
        _ABSMAX.pack(x.data_ptr(), *x.stride(), code, *x.shape, *mask, out.data_ptr(), _num_threads())
    )
    return out
