"""Both operations as Triton kernels, for NVIDIA GPUs from compute capability 8.0 on and AMD GPUs.

This package imports Triton; `ops` imports it on the first call with tensors of such a device. `supports` says whether
the kernels serve a call; the reference serves the others.
"""

from __future__ import annotations

import torch

from . import tuning
from .attention import attention_kernel, merge_kernel
from .codes import CODE_OF
from .launch import Launcher
from .read import read_kernel
from .write import write_kernel

_write = Launcher(write_kernel)
_attention = Launcher(attention_kernel)
_merge = Launcher(merge_kernel)
_read = Launcher(read_kernel)

_ELEMENTS_PER_PROGRAM = 4096  # of programs that write or read pages


def why_not(device: torch.device, dtype: torch.dtype, k_dim: int, v_dim: int) -> str | None:
    """Why the kernels do not serve queries or keys like these, or None if they do."""
    if device.type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"its compute capability {major}.{minor} is below 8.0"
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"the kernels do not compute in {dtype}"
    for head_dim in (k_dim, v_dim):
        if head_dim > 256 or head_dim % 2:
            return f"the kernels serve even head_dim up to 256, not {head_dim}"
    return None


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
    batch_size, num_heads, num_tokens, k_dim = key.shape
    if key.numel() == 0:
        return
    v_dim = value.shape[3]
    key = key if key.stride(3) == 1 else key.contiguous()
    value = value if value.stride(3) == 1 else value.contiguous()
    k_strides, v_strides = key.stride()[:3], value.stride()[:3]
    k_block, v_block = _padded(k_dim), _padded(v_dim)
    block_t = min(_padded(num_tokens, 1), max(1, _ELEMENTS_PER_PROGRAM // max(k_block, v_block)))
    pointers = (key, value, k_pages, v_pages)
    is_aligned = not any(number % 16 for number in k_strides + v_strides) and not any(
        tensor.data_ptr() % 16 for tensor in pointers
    )
    static = k_token_scale is None or v_token_scale is None
    constants = (
        num_heads, k_pages.shape[2], block_t, tuning.instruction_set(key.device),
        CODE_OF[k_format], k_dim, k_block, _kind(k_scale), _kind(k_zero), k_token_scale is not None,
        CODE_OF[v_format], v_dim, v_block, _kind(v_scale), _kind(v_zero), v_token_scale is not None,
        clipped is not None and static,
    )  # fmt: skip
    _write(
        (-(-num_tokens // block_t) * num_heads, batch_size, 1),
        (
            key, value, page_table.contiguous(), seq_lens,
            k_pages, k_scale, k_zero, k_token_scale, v_pages, v_scale, v_zero, v_token_scale, clipped,
            *k_strides, *v_strides, num_tokens, page_table.shape[1],
        ),
        constants,
        (("num_warps", 4 if block_t * k_block >= 1024 else 1),),
        (key.dtype, value.dtype, k_pages.dtype, v_pages.dtype, clipped is None) if is_aligned else None,
    )  # fmt: skip


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
    tiles: tuning.Tiles | None = None,
    splits: int | None = None,
) -> torch.Tensor:
    """As `ops.paged_attention`; `tiles` and `splits` override the table, for tests and benchmarks."""
    batch_size, num_q_heads, num_tokens, k_dim = query.shape
    num_heads, page_size, v_dim = k_pages.shape[1], k_pages.shape[2], v_pages.shape[3]
    device = query.device
    output = query.new_empty(batch_size, num_q_heads, num_tokens, v_dim)
    if query.numel() == 0:
        return output
    query = query if query.stride(3) == 1 else query.contiguous()
    page_table = page_table.contiguous()
    num_columns = page_table.shape[1]
    group = num_q_heads // num_heads
    num_rows = num_tokens * group
    is_exact = query.dtype == torch.float32
    element_size = max(k_pages.element_size(), v_pages.element_size())
    k_block, v_block = _padded(k_dim), _padded(v_dim)
    if tiles is None:
        tiles = tuning.attention_tiles(num_rows, max(k_block, v_block), element_size, is_exact)
    num_programs = -(-num_rows // tiles.block_m) * num_heads * batch_size
    if splits is None:
        max_tiles = -(-num_columns * page_size // tiles.block_n)
        splits = tuning.num_splits(num_programs, max_tiles, tiles, tuning.num_multiprocessors(device))
    partial = stats = None
    if splits > 1:
        partial = query.new_empty(batch_size * num_heads * num_rows, splits, v_block, dtype=torch.float32)
        stats = query.new_empty(batch_size * num_heads * num_rows, splits, 2, dtype=torch.float32)

    mask_kind, mask_strides, mask_len = 0, (0, 0, 0, 0), 0
    if attn_mask is not None:
        mask_len = attn_mask.shape[3]
        mask_strides = tuple(
            0 if size == 1 else stride for size, stride in zip(attn_mask.shape, attn_mask.stride(), strict=True)
        )
        by_key = mask_strides[1] == mask_strides[2] == 0
        mask_kind = 3 if attn_mask.dtype != torch.bool else 1 if by_key else 2
    chained = splits > 1 and tuning.can_chain(device)
    v_kinds = (_kind(v_scale), _kind(v_zero))
    constants = (
        num_heads, group, page_size, tiles.block_m, tiles.block_n,
        CODE_OF[k_format], k_dim, k_block, _kind(k_scale), _kind(k_zero), k_token_scale is not None,
        CODE_OF[v_format], v_dim, v_block, *v_kinds, v_token_scale is not None,
        causal, window is not None, mask_kind, softcap is not None, sinks is not None,
        splits > 1, chained, tuning.instruction_set(device), _dot_dtype(is_exact), tiles.num_stages,
    )  # fmt: skip
    is_aligned = k_pages.data_ptr() % 16 == 0 and v_pages.data_ptr() % 16 == 0
    dtypes = (
        query.dtype, k_pages.dtype, v_pages.dtype,
        None if attn_mask is None else attn_mask.dtype, None if sinks is None else sinks.dtype,
    )  # fmt: skip
    _attention(
        (num_programs // batch_size * splits, batch_size, 1),
        (
            query, output, page_table, seq_lens,
            k_pages, k_scale, k_zero, k_token_scale, v_pages, v_scale, v_zero, v_token_scale,
            attn_mask, sinks, partial, stats,
            softmax_scale, 0.0 if softcap is None else softcap,
            *query.stride()[:3], *mask_strides,
            mask_start, mask_len, 0 if window is None else window, num_tokens, num_columns, splits,
        ),
        constants,
        (("num_warps", tiles.num_warps), ("num_stages", tiles.num_stages)),
        dtypes if is_aligned else None,
    )  # fmt: skip
    if partial is not None:
        block_s = min(_padded(splits, 1), max(1, 8192 // v_block))
        _merge(
            (batch_size * num_heads * num_rows, 1, 1),
            (output, partial, stats, v_scale, v_zero, sinks, num_tokens, splits),
            (num_heads, group, v_dim, v_block, v_format != "model", *v_kinds, sinks is not None, block_s, chained),
            (("num_warps", 4), ("launch_pdl", True)) if chained else (("num_warps", 4),),
            dtypes,
        )
    return output


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
    is_aligned = pages.data_ptr() % 16 == 0
    _read(
        (-(-num_tokens // block_t) * num_heads, batch_size, 1),
        (output, page_ids.contiguous(), pages, scale, zero, token_scale, num_columns),
        (
            num_heads, page_size, block_t, tuning.instruction_set(pages.device),
            CODE_OF[format_name], head_dim, block, _kind(scale), _kind(zero), token_scale is not None,
        ),
        (("num_warps", 4),),
        (page_ids.dtype, pages.dtype, dtype) if is_aligned else None,
    )  # fmt: skip
    return output


def _padded(number: int, least: int = 32) -> int:
    """The next power of two; at least 32, pairs of channels then fill a matrix instruction."""
    return max(least, 1 << (number - 1).bit_length())


def _kind(scale: torch.Tensor | None) -> int:
    """How a scale `[1 | H, 1 | D]` is indexed; see `write_kernel`."""
    if scale is None:
        return 0
    per_head, per_channel = scale.shape[0] > 1, scale.shape[1] > 1
    return (3 if per_head else 4) if per_channel else (2 if per_head else 1)


def _dot_dtype(is_exact: bool) -> object:
    import triton.language as tl

    return tl.float32 if is_exact else tl.float16
