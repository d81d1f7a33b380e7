"""`write_kv` as one kernel: K and V of a step are scaled, rounded and scattered into their pages in one launch."""

import triton
import triton.language as tl

from .codes import INT8, MODEL, bf16_bits_to_fp32, encode, round_up_to_bf16_bits


@triton.jit(
    do_not_specialize=["num_tokens", "table_stride", "num_columns"],
    do_not_specialize_on_alignment=[
        "page_table_ptr",
        "seq_lens_ptr",
        "k_scale_ptr",
        "k_zero_ptr",
        "k_token_scale_ptr",
        "v_scale_ptr",
        "v_zero_ptr",
        "v_token_scale_ptr",
        "clipped_ptr",
    ],
)
def write_kernel(
    key_ptr, value_ptr, page_table_ptr, seq_lens_ptr,
    k_ptr, k_scale_ptr, k_zero_ptr, k_token_scale_ptr,
    v_ptr, v_scale_ptr, v_zero_ptr, v_token_scale_ptr,
    clipped_ptr,
    key_stride_b, key_stride_h, key_stride_t, value_stride_b, value_stride_h, value_stride_t,
    num_tokens, table_stride, num_columns,
    H: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_T: tl.constexpr, ISA: tl.constexpr,
    K_FORMAT: tl.constexpr, K_DIM: tl.constexpr, K_BLOCK: tl.constexpr,
    K_SCALE: tl.constexpr, K_ZERO: tl.constexpr, K_DYNAMIC: tl.constexpr,
    V_FORMAT: tl.constexpr, V_DIM: tl.constexpr, V_BLOCK: tl.constexpr,
    V_SCALE: tl.constexpr, V_ZERO: tl.constexpr, V_DYNAMIC: tl.constexpr,
    COUNT_CLIPPED: tl.constexpr,
):  # fmt: skip
    """A program writes BLOCK_T tokens of one head. Grid: token blocks * H, B.

    K_SCALE, K_ZERO, ...: 0 none, 1 one number, 2 per head, 3 per head and channel, 4 per channel for all heads.
    """
    head = tl.program_id(0) % H
    block = tl.program_id(0) // H
    row = tl.program_id(1).to(tl.int64)
    tokens = block * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = tokens < num_tokens
    positions = tl.load(seq_lens_ptr + row) - num_tokens + tokens
    inside &= positions >= 0  # division here rounds towards zero: others would lie before the pages
    columns = (positions // PAGE_SIZE) % num_columns
    pages = tl.load(page_table_ptr + row * table_stride + columns, mask=inside, other=0).to(tl.int64)
    slots = (pages * H + head) * PAGE_SIZE + positions % PAGE_SIZE  # of one head's tokens, counted over all pages
    tokens = tokens.to(tl.int64)
    _write_side(
        key_ptr + row * key_stride_b + head.to(tl.int64) * key_stride_h, tokens * key_stride_t, slots, inside, head,
        k_ptr, k_scale_ptr, k_zero_ptr, k_token_scale_ptr, clipped_ptr,
        K_FORMAT, K_DIM, K_BLOCK, K_SCALE, K_ZERO, K_DYNAMIC, COUNT_CLIPPED, 0, ISA,
    )  # fmt: skip
    _write_side(
        value_ptr + row * value_stride_b + head.to(tl.int64) * value_stride_h, tokens * value_stride_t, slots, inside,
        head, v_ptr, v_scale_ptr, v_zero_ptr, v_token_scale_ptr, clipped_ptr,
        V_FORMAT, V_DIM, V_BLOCK, V_SCALE, V_ZERO, V_DYNAMIC, COUNT_CLIPPED, 1, ISA,
    )  # fmt: skip


@triton.jit
def _write_side(
    x_ptr, x_offsets, slots, inside, head,
    pages_ptr, scale_ptr, zero_ptr, token_scale_ptr, clipped_ptr,
    FORMAT: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
    SCALE: tl.constexpr, ZERO: tl.constexpr, DYNAMIC: tl.constexpr,
    COUNT_CLIPPED: tl.constexpr, SIDE: tl.constexpr, ISA: tl.constexpr,
):  # fmt: skip
    channels = tl.arange(0, BLOCK)
    mask = inside[:, None] & (channels < DIM)[None, :]
    x = tl.load(x_ptr + x_offsets[:, None] + channels[None, :], mask=mask, other=0.0)
    targets = pages_ptr + slots[:, None] * DIM + channels[None, :]
    if FORMAT == MODEL:
        tl.store(targets, x.to(pages_ptr.dtype.element_ty), mask=mask)
    else:
        # Reciprocals and their order are the reference's: they decide the bytes.
        y = x.to(tl.float32)
        if ZERO:
            y = y - load_scale(zero_ptr, head, channels, DIM, ZERO)[None, :]
        if SCALE:
            scale = load_scale(scale_ptr, head, channels, DIM, SCALE)
            y = y * tl.math.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)[None, :]
        qmax: tl.constexpr = 127.0 if FORMAT == INT8 else (448.0 if FORMAT == 1 else 57344.0)
        if DYNAMIC:
            y = tl.where(mask, y, 0.0)
            # A maximum that passes NaN on: every larger bit pattern of a positive number is a larger number.
            largest = tl.max(tl.abs(y).to(tl.int32, bitcast=True), axis=1).to(tl.float32, bitcast=True)
            token_scale = largest * (1.0 / qmax)
            token_scale = tl.where(token_scale < 2.0**-100, 2.0**-100, token_scale)
            bits = round_up_to_bf16_bits(token_scale)
            tl.store(token_scale_ptr.to(tl.pointer_type(tl.int16)) + slots, bits, mask=inside)
            token_scale = bf16_bits_to_fp32(bits)
            y = y * tl.math.div_rn(tl.full(token_scale.shape, 1.0, tl.float32), token_scale)[:, None]
        tl.store(targets, encode(y, FORMAT, ISA), mask=mask)
        if COUNT_CLIPPED and not DYNAMIC:
            limit: tl.constexpr = 127.5 if FORMAT == INT8 else (464.0 if FORMAT == 1 else 61440.0)
            fits = (tl.abs(y) <= limit) | (mask == 0)
            count = tl.sum(tl.sum((fits == 0).to(tl.int32), axis=1), axis=0)
            if count > 0:
                tl.atomic_add(clipped_ptr + SIDE, count.to(tl.int64), sem="relaxed")


@triton.jit
def load_scale(scale_ptr, head, channels, DIM: tl.constexpr, KIND: tl.constexpr):
    """A scale or zero of one head, by channel, whatever its granularity."""
    if KIND == 1:
        offsets = channels * 0
    elif KIND == 2:
        offsets = channels * 0 + head
    elif KIND == 3:
        offsets = head * DIM + channels
    else:
        offsets = channels
    return tl.load(scale_ptr + offsets, mask=channels < DIM, other=1.0)
