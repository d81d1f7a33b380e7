"""The operations as Triton kernels, for NVIDIA GPUs from compute capability 8.0 on and AMD GPUs.

This package imports Triton; `ops` imports it on the first call with tensors of such a device, asks `why_not` whether
the kernels serve the call, and takes the reference if they do not.

Small calls are bound by the CPU: what does not change from step to step is worked out once, into a plan.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TypeVar

import torch
import triton.language as tl

from ...formats import get_format
from . import tuning
from .attention import attention_kernel, merge_kernel
from .codes import CODE_OF
from .launch import LARGEST, Launcher, Prepared, why_no_driver
from .read import read_kernel
from .write import write_kernel

_write = Launcher(write_kernel)
_attention = Launcher(attention_kernel)
_merge = Launcher(merge_kernel)
_read = Launcher(read_kernel)

_ELEMENTS_PER_PROGRAM = 4096  # of programs that write or read pages
_ALIGNMENT = 16  # bytes that a thread loads at once
_MOST_PLANS = 4096  # they are small; a table that grows makes a new one with every page
_Grid = tuple[int, int, int]
_T = TypeVar("_T")


def why_not(device: torch.device, dtype: torch.dtype, k_dim: int, v_dim: int, dense: bool = True) -> str | None:
    """Why the kernels do not serve queries or keys like these, or pages that are not `dense`; None if they do."""
    if device.type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"its compute capability {major}.{minor} is below 8.0"
    if not dense:
        return "the kernels serve contiguous pages and token scales"
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"the kernels do not compute in {dtype}"
    for head_dim in (k_dim, v_dim):
        if head_dim > 256 or head_dim % 2:
            return f"the kernels serve even head_dim up to 256, not {head_dim}"
    return why_no_driver() if device.type == "cuda" else None


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    k_pages: torch.Tensor,
    k_format: str,
    k_scale: torch.Tensor | None,
    k_zero: torch.Tensor | None,
    k_token_scale: torch.Tensor | None,
    v_pages: torch.Tensor,
    v_format: str,
    v_scale: torch.Tensor | None,
    v_zero: torch.Tensor | None,
    v_token_scale: torch.Tensor | None,
    clipped: torch.Tensor | None,
) -> None:
    if key.numel() == 0:
        return
    key = key if key.stride(3) == 1 else key.contiguous()
    value = value if value.stride(3) == 1 else value.contiguous()
    page_table = _with_dense_rows(page_table)
    strides = (*key.stride()[:3], *value.stride()[:3])
    is_known = (
        not any(stride % _ALIGNMENT for stride in strides)
        and max(strides) <= LARGEST
        and _is_aligned(key, value, k_pages, v_pages)
    )
    plan_key = (
        key.shape, value.shape[3], key.dtype, value.dtype, key.device, k_pages.shape[2], k_pages.dtype, v_pages.dtype,
        k_format, _kind(k_scale), _kind(k_zero), k_token_scale is None,
        v_format, _kind(v_scale), _kind(v_zero), v_token_scale is None, clipped is None, is_known,
    )  # fmt: skip
    plan = _write_plans.get(plan_key)
    if plan is None:
        plan = _remember(_write_plans, plan_key, _plan_write(*plan_key))
    grid, kernel = plan
    kernel(
        grid,
        (
            key, value, page_table, seq_lens.contiguous(),
            k_pages, k_scale, k_zero, k_token_scale, v_pages, v_scale, v_zero, v_token_scale, clipped,
            *strides, key.shape[2], page_table.stride(0), page_table.shape[1],
        ),
    )  # fmt: skip


_write_plans: dict[Hashable, tuple[_Grid, Prepared]] = {}


def _plan_write(
    shape: torch.Size, v_dim: int, k_dtype: torch.dtype, v_dtype: torch.dtype, device: torch.device, page_size: int,
    k_pages_dtype: torch.dtype, v_pages_dtype: torch.dtype,
    k_format: str, k_scale: int, k_zero: int, k_static: bool,
    v_format: str, v_scale: int, v_zero: int, v_static: bool, uncounted: bool, is_known: bool,
) -> tuple[_Grid, Prepared]:  # fmt: skip
    batch_size, num_heads, num_tokens, k_dim = shape
    k_block, v_block = _padded(k_dim), _padded(v_dim)
    block_t = min(_padded(num_tokens, 1), max(1, _ELEMENTS_PER_PROGRAM // max(k_block, v_block)))
    constants = (
        num_heads, page_size, block_t, tuning.instruction_set(device),
        _code_of(k_format), k_dim, k_block, k_scale, k_zero, not k_static,
        _code_of(v_format), v_dim, v_block, v_scale, v_zero, not v_static,
        not uncounted and (k_static or v_static),
    )  # fmt: skip
    types = (k_dtype, v_dtype, k_pages_dtype, v_pages_dtype, uncounted) if is_known else None
    kernel = _write.prepare(device, constants, (("num_warps", 4 if block_t * k_block >= 1024 else 1),), types)
    return (-(-num_tokens // block_t) * num_heads, batch_size, 1), kernel


def paged_attention(
    query: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    k_pages: torch.Tensor,
    k_format: str,
    k_scale: torch.Tensor | None,
    k_zero: torch.Tensor | None,
    k_token_scale: torch.Tensor | None,
    v_pages: torch.Tensor,
    v_format: str,
    v_scale: torch.Tensor | None,
    v_zero: torch.Tensor | None,
    v_token_scale: torch.Tensor | None,
    attn_mask: torch.Tensor | None,
    mask_start: int,
    sinks: torch.Tensor | None,
    softmax_scale: float,
    softcap: float | None,
    window: int | None,
    causal: bool,
    lse: torch.Tensor | None = None,
    tiles: tuning.Tiles | None = None,
    splits: int | None = None,
) -> torch.Tensor:
    """As `ops.paged_attention`; `tiles` and `splits` override the table, for tests and benchmarks."""
    output = query.new_empty(*query.shape[:3], v_pages.shape[3])
    if query.numel() == 0:
        return output
    query = query if query.stride(3) == 1 else query.contiguous()
    sinks = None if sinks is None else sinks.contiguous()
    page_table = _with_dense_rows(page_table)
    num_columns = page_table.shape[1]
    mask_kind, mask_dtype, mask_len = 0, None, 0
    mask_strides: tuple[int, ...] = (0, 0, 0, 0)
    if attn_mask is not None:
        mask_dtype, mask_len = attn_mask.dtype, attn_mask.shape[3]
        mask_strides = tuple(
            0 if size == 1 else stride for size, stride in zip(attn_mask.shape, attn_mask.stride(), strict=True)
        )
        by_key = mask_strides[1] == mask_strides[2] == 0
        mask_kind = 3 if mask_dtype != torch.bool else 1 if by_key else 2
    sizes = (
        *query.stride()[:3], *mask_strides,
        mask_start, mask_len, 0 if window is None else window, query.shape[2], page_table.stride(0), num_columns,
    )  # fmt: skip
    is_known = max(sizes) <= LARGEST and _is_aligned(k_pages, v_pages)
    plan_key = (
        query.shape, query.dtype, query.device, num_columns, k_pages.shape[1:], k_pages.dtype, v_pages.shape[3],
        v_pages.dtype, k_format, _kind(k_scale), _kind(k_zero), k_token_scale is None,
        v_format, _kind(v_scale), _kind(v_zero), v_token_scale is None,
        mask_kind, mask_dtype, None if sinks is None else sinks.dtype, softcap is None, window is None, causal,
        lse is not None, is_known, tiles, splits,
    )  # fmt: skip

    def arguments(partial: torch.Tensor | torch.dtype | None, splits: int) -> tuple[object, ...]:
        return (
            query, output, page_table, seq_lens.contiguous(),
            k_pages, k_scale, k_zero, k_token_scale, v_pages, v_scale, v_zero, v_token_scale,
            attn_mask, sinks, partial, lse,
            # Integers would become constants of the kernel, which is kept for other numbers.
            float(softmax_scale), 0.0 if softcap is None else float(softcap), *sizes, splits,
        )  # fmt: skip

    plan = _attention_plans.get(plan_key)
    if plan is None:
        plan = _remember(_attention_plans, plan_key, _plan_attention(*plan_key, arguments))
    partial = query.new_empty(plan.partial_size, dtype=torch.float32) if plan.merge is not None else None
    plan.kernel(plan.grid, arguments(partial, plan.splits))
    if plan.merge is not None:
        plan.merge(plan.merge_grid, (output, lse, partial, v_scale, v_zero, sinks, query.shape[2], plan.splits))
    return output


@dataclass(frozen=True)
class _AttentionPlan:
    """How a call is served. `partial_size` in numbers; `merge` is None where sequences are not split."""

    grid: _Grid
    kernel: Prepared
    splits: int
    partial_size: int
    merge_grid: _Grid
    merge: Prepared | None


_attention_plans: dict[Hashable, _AttentionPlan] = {}


def _plan_attention(
    query_shape: torch.Size, dtype: torch.dtype, device: torch.device, num_columns: int,
    page_shape: torch.Size, k_dtype: torch.dtype, v_dim: int, v_dtype: torch.dtype,
    k_format: str, k_scale: int, k_zero: int, k_static: bool,
    v_format: str, v_scale: int, v_zero: int, v_static: bool,
    mask_kind: int, mask_dtype: torch.dtype | None, sinks_dtype: torch.dtype | None,
    no_softcap: bool, no_window: bool, causal: bool, has_lse: bool, is_known: bool,
    tiles: tuning.Tiles | None, splits: int | None,
    arguments: Callable[[torch.Tensor | torch.dtype | None, int], tuple[object, ...]],
) -> _AttentionPlan:  # fmt: skip
    batch_size, num_q_heads, num_tokens, k_dim = query_shape
    num_heads, page_size, _ = page_shape
    group = num_q_heads // num_heads
    num_rows = num_tokens * group
    all_rows = batch_size * num_heads * num_rows
    k_block, v_block = _padded(k_dim), _padded(v_dim)
    if tiles is None:
        element_size = max(k_dtype.itemsize, v_dtype.itemsize, 4 if dtype == torch.float32 else 1)
        bias_size = 0 if mask_dtype is None or mask_dtype == torch.bool else mask_dtype.itemsize
        device_facts = tuning.least_rows(device), tuning.has_tensor_memory(device), tuning.shared_memory(device)
        tiles = tuning.attention_tiles(num_rows, max(k_dim, v_dim), element_size, bias_size, *device_facts)
    num_programs = -(-num_rows // tiles.block_m) * num_heads * batch_size
    max_tiles = max(1, -(-num_columns * page_size // tiles.block_n))
    tile_bytes = tiles.block_n * (k_dim * k_dtype.itemsize + v_dim * v_dtype.itemsize)
    partial_bytes = 4 * all_rows * (v_block + 2)
    num_cores = tuning.num_multiprocessors(device)
    given = splits
    if splits is None:
        splits = tuning.num_splits(num_programs, max_tiles, tile_bytes, partial_bytes, tiles.programs, num_cores)
    chained = splits > 1 and tuning.can_chain(device)
    constants = (
        num_heads, group, page_size, tiles.block_m, tiles.block_n,
        _code_of(k_format), k_dim, k_block, k_scale, k_zero, not k_static,
        _code_of(v_format), v_dim, v_block, v_scale, v_zero, not v_static,
        causal, not no_window, mask_kind, not no_softcap, sinks_dtype is not None, has_lse, splits > 1,
        chained, tuning.instruction_set(device), tl.float32 if dtype == torch.float32 else tl.float16, tiles.num_stages,
    )  # fmt: skip
    types = (dtype, k_dtype, v_dtype, mask_dtype, sinks_dtype)
    options = (("num_warps", tiles.num_warps), ("num_stages", tiles.num_stages))
    kernel = _attention.prepare(device, constants, options, types if is_known else None)
    merge = None
    if splits > 1:
        programs = None if given else kernel.programs_at_once(arguments(torch.float32, splits))
        if programs is not None:  # what the compiler made of the kernel says it better than the table
            splits = tuning.num_splits(num_programs, max_tiles, tile_bytes, partial_bytes, programs, num_cores)
            splits = max(2, splits)
        block_s = min(_padded(splits, 1), max(1, 8192 // v_block))
        merge_constants = (
            num_heads, group, v_dim, v_block, v_format != "model", v_scale, v_zero, sinks_dtype is not None, has_lse,
            block_s, chained,
        )  # fmt: skip
        merge_options = (("num_warps", 4), *((("launch_pdl", 1),) if chained else ()))
        merge = _merge.prepare(device, merge_constants, merge_options, types)
    return _AttentionPlan(
        (num_programs // batch_size * splits, batch_size, 1), kernel, splits,
        splits * partial_bytes // 4, (all_rows, 1, 1), merge,
    )  # fmt: skip


def read_pages(
    page_ids: torch.Tensor,
    pages: torch.Tensor,
    format_name: str,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    token_scale: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    batch_size, num_columns = page_ids.shape
    _, num_heads, page_size, head_dim = pages.shape
    num_tokens = num_columns * page_size
    output = pages.new_empty(batch_size, num_heads, num_tokens, head_dim, dtype=dtype)
    if output.numel() == 0:
        return output
    block = _padded(head_dim)
    block_t = max(1, _ELEMENTS_PER_PROGRAM // block)
    constants = (
        num_heads, page_size, block_t, tuning.instruction_set(pages.device),
        _code_of(format_name), head_dim, block, _kind(scale), _kind(zero), token_scale is not None,
    )  # fmt: skip
    types = (page_ids.dtype, pages.dtype, dtype) if _is_aligned(pages) else None
    kernel = _read.prepare(pages.device, constants, (("num_warps", 4),), types)
    kernel(
        (-(-num_tokens // block_t) * num_heads, batch_size, 1),
        (output, page_ids.contiguous(), pages, scale, zero, token_scale, num_columns),
    )
    return output


def _remember(plans: dict[Hashable, _T], key: Hashable, plan: _T) -> _T:
    if len(plans) >= _MOST_PLANS:
        plans.clear()
    plans[key] = plan
    return plan


def _with_dense_rows(page_table: torch.Tensor) -> torch.Tensor:
    """The table as kernels take it: the entries of a row one after the other, any stride from row to row."""
    return page_table if page_table.stride(1) == 1 else page_table.contiguous()


def _is_aligned(*tensors: torch.Tensor) -> bool:
    return not any(tensor.data_ptr() % _ALIGNMENT for tensor in tensors)


def _padded(number: int, least: int = 32) -> int:
    """The next power of two; at least 32, pairs of channels then fill a matrix instruction."""
    return max(least, 1 << (number - 1).bit_length())


def _code_of(format_name: str) -> int:
    return CODE_OF[get_format(format_name).name]


def _kind(scale: torch.Tensor | None) -> int:
    """How a scale `[1 | H, 1 | D]` is indexed; see `write_kernel`."""
    if scale is None:
        return 0
    per_head, per_channel = scale.shape[0] > 1, scale.shape[1] > 1
    return (3 if per_head else 4) if per_channel else (2 if per_head else 1)
