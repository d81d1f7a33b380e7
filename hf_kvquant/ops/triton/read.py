"""`read_pages` as a kernel: codes to numbers, each read and written once."""

import triton
import triton.language as tl

from .codes import MODEL, bf16_bits_to_fp32, decode_factor, decode_pair
from .write import load_scale


@triton.jit(
    do_not_specialize=["num_columns"],
    do_not_specialize_on_alignment=["page_ids_ptr", "scale_ptr", "zero_ptr", "token_scale_ptr"],
)
def read_kernel(
    output_ptr, page_ids_ptr, pages_ptr, scale_ptr, zero_ptr, token_scale_ptr, num_columns,
    H: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_T: tl.constexpr, ISA: tl.constexpr,
    FORMAT: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
    SCALE: tl.constexpr, ZERO: tl.constexpr, DYNAMIC: tl.constexpr,
):  # fmt: skip
    """A program reads BLOCK_T tokens of one head into the output `[B, H, N * S, D]`. Grid: token blocks * H, B."""
    head = tl.program_id(0) % H
    sequence = tl.program_id(1).to(tl.int64)
    tokens = tl.program_id(0) // H * BLOCK_T + tl.arange(0, BLOCK_T)
    num_tokens = num_columns * PAGE_SIZE
    inside = tokens < num_tokens
    pages = tl.load(page_ids_ptr + sequence * num_columns + tokens // PAGE_SIZE, mask=inside, other=0).to(tl.int64)
    slots = (pages * H + head) * PAGE_SIZE + tokens % PAGE_SIZE
    channels = tl.arange(0, BLOCK)
    if FORMAT == MODEL:
        mask = inside[:, None] & (channels < DIM)[None, :]
        x = tl.load(pages_ptr + slots[:, None] * DIM + channels[None, :], mask=mask)
    else:
        pairs = tl.arange(0, BLOCK // 2)
        pointers = pages_ptr.to(tl.pointer_type(tl.uint16)) + slots[:, None] * (DIM // 2) + pairs[None, :]
        codes = tl.load(pointers, mask=inside[:, None] & (pairs < DIM // 2)[None, :], other=0)
        even, odd = decode_pair(codes, FORMAT, ISA)
        x = tl.reshape(tl.join(even, odd), [BLOCK_T, BLOCK]).to(tl.float32) * decode_factor(FORMAT, ISA)
        if DYNAMIC:
            bits = tl.load(token_scale_ptr.to(tl.pointer_type(tl.int16)) + slots, mask=inside, other=0)
            x = x * bf16_bits_to_fp32(bits)[:, None]
        if SCALE:
            x = x * load_scale(scale_ptr, head, channels, DIM, SCALE)[None, :]
        if ZERO:
            x = x + load_scale(zero_ptr, head, channels, DIM, ZERO)[None, :]
        if output_ptr.dtype.element_ty == tl.float16:
            x = tl.where(tl.abs(x) > 65504.0, tl.where(x > 0, 65504.0, -65504.0), x)  # a NaN stays
    targets = output_ptr + ((sequence * H + head) * num_tokens + tokens)[:, None] * DIM + channels[None, :]
    tl.store(targets, x.to(output_ptr.dtype.element_ty), mask=inside[:, None] & (channels < DIM)[None, :])
