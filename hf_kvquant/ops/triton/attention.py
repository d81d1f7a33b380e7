"""`paged_attention` as kernels: one that reads pages, for any number of new tokens, and one that merges its splits.

Rows are query tokens times the query heads of a group, so that K and V are read once for all of them. Logits are
computed transposed, [tokens, rows]: tokens of the past are many and fill the 64 or 16 rows of a matrix instruction, a
few queries fill its 8 columns. K and V are then its first operand, which comes from registers, where codes are
converted.

Tiles of BLOCK_N tokens are taken from the pages, which are smaller or larger; the ids of the next tile's pages are
loaded while this one is computed, since a load whose address waits for another load cannot be started ahead.

Nothing is scaled inside the loop but logits: a K scale per tensor, head or channel is in the query, a V scale in the
output. A token's own V scale weighs its probability. Its power of two goes into the exponent, 2^(logit + e), with the
running maximum of that sum, so that what is rounded to fp16 for the tensor cores is at most 2 whatever the scales are;
the sum of probabilities takes it out again.

The sequence is split over programs. Each works out its part from the true length, read on the device, so that one grid
serves every length.
"""

import triton
import triton.language as tl
from packaging.version import Version

from .codes import MODEL, bf16_bits_to_fp32, decode_factor, decode_pair
from .write import load_scale

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST_BIAS = tl.constexpr(-(2.0**127))  # times LOG2_E it is finite
LN_2 = tl.constexpr(0.6931471805599453)
# Triton 3.4 keeps one sum where two begin alike and add different results of the same assembly
# (triton-lang/triton#7338).
BEGIN_APART = tl.constexpr(Version(triton.__version__) < Version("3.5"))


# Sizes change from call to call: one compiled kernel has to serve them all.
_SIZES = [
    "query_stride_b", "query_stride_h", "query_stride_t",
    "mask_stride_b", "mask_stride_h", "mask_stride_t", "mask_stride_n",
    "mask_start", "mask_len", "window", "num_tokens", "table_stride", "num_columns", "num_splits",
]  # fmt: skip
_SMALL_TENSORS = [
    "query_ptr", "output_ptr", "page_table_ptr", "seq_lens_ptr", "k_scale_ptr", "k_zero_ptr", "k_token_scale_ptr",
    "v_scale_ptr", "v_zero_ptr", "v_token_scale_ptr", "mask_ptr", "sinks_ptr", "partial_ptr", "lse_ptr",
]  # fmt: skip


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_SMALL_TENSORS)
def attention_kernel(
    query_ptr, output_ptr, page_table_ptr, seq_lens_ptr,
    k_ptr, k_scale_ptr, k_zero_ptr, k_token_scale_ptr,
    v_ptr, v_scale_ptr, v_zero_ptr, v_token_scale_ptr,
    mask_ptr, sinks_ptr, partial_ptr, lse_ptr,
    softmax_scale, softcap,
    query_stride_b, query_stride_h, query_stride_t, mask_stride_b, mask_stride_h, mask_stride_t, mask_stride_n,
    mask_start, mask_len, window, num_tokens, table_stride, num_columns, num_splits,
    H: tl.constexpr, GROUP: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    K_FORMAT: tl.constexpr, K_DIM: tl.constexpr, K_BLOCK: tl.constexpr,
    K_SCALE: tl.constexpr, K_ZERO: tl.constexpr, K_DYNAMIC: tl.constexpr,
    V_FORMAT: tl.constexpr, V_DIM: tl.constexpr, V_BLOCK: tl.constexpr,
    V_SCALE: tl.constexpr, V_ZERO: tl.constexpr, V_DYNAMIC: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr,
    LSE: tl.constexpr, SPLIT: tl.constexpr, CHAINED: tl.constexpr, ISA: tl.constexpr, DOT_DTYPE: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """A program attends BLOCK_M rows of one key/value head to one part of one sequence. The output is `[B, Hq, T, D]`.

    Grid: row blocks * H * num_splits, B. MASK: 0 none, 1 bool by key alone, 2 bool, 3 added.
    K_BLOCK and V_BLOCK are head_dim padded to a power of two. DOT_DTYPE is what quantized operands are multiplied in.
    LSE: the logarithm of every row's sum is asked for. CHAINED: the kernel that merges the splits may be launched while
    this one runs; it waits by itself.
    """
    OFFSET: tl.constexpr = K_ZERO > 0 and (SOFTCAP or SINKS or LSE)
    num_rows = num_tokens * GROUP
    split = tl.program_id(0) % num_splits
    head = (tl.program_id(0) // num_splits) % H
    # The last rows see the longest past: they begin first.
    block = tl.cdiv(num_rows, BLOCK_M) - 1 - tl.program_id(0) // (num_splits * H)
    sequence = tl.program_id(1)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    row_inside = rows < num_rows
    row_token = tl.minimum(rows // GROUP, num_tokens - 1)
    row_head = head * GROUP + rows % GROUP

    # Loads first, used later: a call for one short sequence takes as long as its loads wait for each other.
    length = tl.load(seq_lens_ptr + sequence)
    query_ptr += sequence.to(tl.int64) * query_stride_b
    query_offsets = row_head.to(tl.int64) * query_stride_h + row_token.to(tl.int64) * query_stride_t
    if K_FORMAT == MODEL:
        channels = tl.arange(0, K_BLOCK)
        q_mask = (channels < K_DIM)[:, None] & row_inside[None, :]
        q_even = tl.load(query_ptr + query_offsets[None, :] + channels[:, None], mask=q_mask, other=0.0)
        q_odd = q_even
    else:
        pairs = tl.arange(0, K_BLOCK // 2)
        q_mask = (2 * pairs < K_DIM)[:, None] & row_inside[None, :]
        q_pointers = query_ptr + query_offsets[None, :] + 2 * pairs[:, None]
        q_even = tl.load(q_pointers, mask=q_mask, other=0.0)
        q_odd = tl.load(q_pointers + 1, mask=q_mask, other=0.0)

    # Which tokens: written and still held; seen by any row; seen by all rows.
    first_held = tl.maximum((length - 1) // PAGE_SIZE - num_columns + 1, 0) * PAGE_SIZE
    positions = length - num_tokens + row_token
    first_position = length - num_tokens + tl.minimum(block * BLOCK_M // GROUP, num_tokens - 1)
    last_position = length - num_tokens + tl.minimum((block * BLOCK_M + BLOCK_M - 1) // GROUP, num_tokens - 1)
    begin = first_held
    end = length
    all_begin = first_held
    all_end = length
    if CAUSAL:
        end = last_position + 1
        all_end = first_position + 1
    if WINDOW:
        begin = tl.maximum(begin, first_position - window + 1)
        all_begin = tl.maximum(begin, last_position - window + 1)
    if MASK:
        begin = tl.maximum(begin, mask_start)
        end = tl.minimum(end, mask_start + mask_len)
        all_begin = tl.maximum(all_begin, begin)
        all_end = tl.minimum(all_end, end) if MASK == 1 else begin

    # This program's tiles, and those among them that need no mask.
    first_tile = begin // BLOCK_N
    num_tiles = tl.maximum(tl.cdiv(end, BLOCK_N) - first_tile, 0)
    tiles_per_split = tl.cdiv(num_tiles, num_splits)
    tile_begin = first_tile + tl.minimum(split * tiles_per_split, num_tiles)
    tile_end = first_tile + tl.minimum((split + 1) * tiles_per_split, num_tiles)
    full_begin = tl.minimum(tl.maximum(tl.cdiv(all_begin, BLOCK_N), tile_begin), tile_end)
    full_end = tl.maximum(tl.minimum(all_end // BLOCK_N, tile_end), full_begin)

    # The first pages. What lies in the table behind the last one need not be a page: nothing is looked up there.
    table_ptr = page_table_ptr + sequence.to(tl.int64) * table_stride
    in_tile = tl.arange(0, BLOCK_N)
    columns = (full_begin * BLOCK_N + in_tile) // PAGE_SIZE % num_columns
    columns = tl.where(full_begin < full_end, columns, 0)
    pages = tl.where(full_begin < full_end, tl.load(table_ptr + columns), 0)

    # The query [D, rows]: channels in pairs for 8-bit pages, with K's scale per channel, made at most 2 by a power of
    # two per row.
    logit_offset = tl.zeros([BLOCK_M], tl.float32)
    if K_FORMAT == MODEL:
        q_even = q_even.to(k_ptr.dtype.element_ty)
        q_odd = q_even
        logit_scale = tl.zeros([BLOCK_M], tl.float32) + softmax_scale
    else:
        q_even = q_even.to(tl.float32)
        q_odd = q_odd.to(tl.float32)
        if OFFSET:
            # The same number for every token of a row: softmax drops it, but for softcap and sinks.
            zero_even = load_scale(k_zero_ptr, head, 2 * pairs, K_DIM, K_ZERO)[:, None]
            zero_odd = load_scale(k_zero_ptr, head, 2 * pairs + 1, K_DIM, K_ZERO)[:, None]
            logit_offset = tl.sum(q_even * zero_even + q_odd * zero_odd, axis=0) * softmax_scale
        if K_SCALE:
            q_even = q_even * load_scale(k_scale_ptr, head, 2 * pairs, K_DIM, K_SCALE)[:, None]
            q_odd = q_odd * load_scale(k_scale_ptr, head, 2 * pairs + 1, K_DIM, K_SCALE)[:, None]
        largest = tl.max(tl.maximum(tl.abs(q_even), tl.abs(q_odd)), axis=0)
        exponent = tl.minimum(tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 1), 253)
        q_even = (q_even * ((254 - exponent) << 23).to(tl.float32, bitcast=True)[None, :]).to(DOT_DTYPE)
        q_odd = (q_odd * ((254 - exponent) << 23).to(tl.float32, bitcast=True)[None, :]).to(DOT_DTYPE)
        logit_scale = (exponent << 23).to(tl.float32, bitcast=True) * (softmax_scale * decode_factor(K_FORMAT, ISA))
    if not SOFTCAP:
        logit_scale = logit_scale * LOG2_E
        logit_offset = logit_offset * LOG2_E

    V_PAIRS: tl.constexpr = V_BLOCK if V_FORMAT == MODEL else V_BLOCK // 2
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    even = tl.zeros([V_PAIRS, BLOCK_M], tl.float32)
    odd = tl.zeros([V_PAIRS, BLOCK_M], tl.float32)
    if BEGIN_APART:
        odd = tl.where(num_splits < 1, 1.0, odd)  # which never holds

    # Tiles that all rows see whole, but for keys hidden from all of them. Their pages are distinct: a column past the
    # end of the ring wraps once.
    PAGES_PER_TILE: tl.constexpr = BLOCK_N // PAGE_SIZE
    if MASK <= 1:
        mask_row_ptr = mask_ptr
        if MASK:
            mask_row_ptr += sequence.to(tl.int64) * mask_stride_b - mask_start.to(tl.int64) * mask_stride_n
        slots = _slots(pages, head, full_begin * BLOCK_N + in_tile, H, PAGE_SIZE)
        shown = _load_visible(mask_row_ptr, full_begin * BLOCK_N + in_tile, full_end * BLOCK_N, mask_stride_n, MASK)
        k_token_scale = _load_token_scale(k_token_scale_ptr, slots, None, K_DYNAMIC)
        v_token_scale = _load_token_scale(v_token_scale_ptr, slots, None, V_DYNAMIC)
        for tile in tl.range(full_begin, full_end, num_stages=NUM_STAGES):
            slots = _slots(pages, head, tile * BLOCK_N + in_tile, H, PAGE_SIZE)
            next_tile = tl.minimum(tile + 1, full_end - 1)
            if BLOCK_N % PAGE_SIZE == 0:
                columns += (next_tile - tile) * PAGES_PER_TILE
                columns = tl.where(columns >= num_columns, columns - num_columns, columns)
            else:
                columns = (next_tile * BLOCK_N + in_tile) // PAGE_SIZE % num_columns
            pages = tl.load(table_ptr + columns)
            highest, total, even, odd = _attend_tile(
                q_even, q_odd, logit_scale, logit_offset, softcap, highest, total, even, odd,
                slots, None, shown, None, k_ptr, k_token_scale, v_ptr, v_token_scale,
                BLOCK_M, BLOCK_N, K_FORMAT, K_DIM, K_BLOCK, K_DYNAMIC, V_FORMAT, V_DIM, V_BLOCK, V_DYNAMIC,
                False, MASK == 1, False, OFFSET, SOFTCAP, ISA, DOT_DTYPE,
            )  # fmt: skip
            # After the computation, while which the ids have come.
            shown = _load_visible(mask_row_ptr, next_tile * BLOCK_N + in_tile, full_end * BLOCK_N, mask_stride_n, MASK)
            slots = _slots(pages, head, next_tile * BLOCK_N + in_tile, H, PAGE_SIZE)
            k_token_scale = _load_token_scale(k_token_scale_ptr, slots, None, K_DYNAMIC)
            v_token_scale = _load_token_scale(v_token_scale_ptr, slots, None, V_DYNAMIC)

    # Those at the edges, or all of them under a mask.
    num_before = full_begin - tile_begin
    for index in tl.range(0, num_before + tile_end - full_end, num_stages=NUM_STAGES):
        tile = tl.where(index < num_before, tile_begin + index, full_end + index - num_before)
        tokens = tile * BLOCK_N + in_tile
        written = (tokens >= first_held) & (tokens < length)
        pages = tl.load(table_ptr + tokens // PAGE_SIZE % num_columns, mask=written, other=0)
        slots = _slots(pages, head, tokens, H, PAGE_SIZE)
        visible = (written & (tokens < end))[:, None] & row_inside[None, :]
        if CAUSAL:
            visible = visible & (tokens[:, None] <= positions[None, :])
        if WINDOW:
            visible = visible & (tokens[:, None] > positions[None, :] - window)
        bias = None
        if MASK:
            key = tokens - mask_start
            in_mask = written & (key >= 0) & (key < mask_len)
            mask_offsets = sequence.to(tl.int64) * mask_stride_b + key.to(tl.int64) * mask_stride_n
            if MASK == 1:
                allowed = tl.load(mask_ptr + mask_offsets, mask=in_mask, other=0)
                visible = visible & (allowed != 0)[:, None]
            else:
                row_offsets = row_head.to(tl.int64) * mask_stride_h + row_token.to(tl.int64) * mask_stride_t
                pointers = mask_ptr + mask_offsets[:, None] + row_offsets[None, :]
                in_mask = in_mask[:, None] & row_inside[None, :]
                if MASK == 2:
                    visible = visible & (tl.load(pointers, mask=in_mask, other=0) != 0)
                else:
                    bias = tl.load(pointers, mask=in_mask, other=float("-inf")).to(tl.float32)
        highest, total, even, odd = _attend_tile(
            q_even, q_odd, logit_scale, logit_offset, softcap, highest, total, even, odd,
            slots, written, visible, bias,
            k_ptr, _load_token_scale(k_token_scale_ptr, slots, written, K_DYNAMIC),
            v_ptr, _load_token_scale(v_token_scale_ptr, slots, written, V_DYNAMIC),
            BLOCK_M, BLOCK_N, K_FORMAT, K_DIM, K_BLOCK, K_DYNAMIC, V_FORMAT, V_DIM, V_BLOCK, V_DYNAMIC,
            True, True, MASK == 3, OFFSET, SOFTCAP, ISA, DOT_DTYPE,
        )  # fmt: skip

    if CHAINED:
        tl.extra.cuda.gdc_launch_dependents()
    v_channels = tl.arange(0, V_PAIRS)
    even = even * decode_factor(V_FORMAT, ISA)
    odd = odd * decode_factor(V_FORMAT, ISA)
    if SPLIT:
        # Which row of which sequence; then its splits; then even channels before odd ones. Behind them all, the highest
        # logit and the sum of each.
        stats_ptr = partial_ptr + tl.num_programs(1).to(tl.int64) * (H * V_BLOCK) * num_rows * num_splits
        partial_rows = ((sequence * H + head).to(tl.int64) * num_rows + rows) * num_splits + split
        tl.store(stats_ptr + partial_rows * 2, highest, mask=row_inside)
        tl.store(stats_ptr + partial_rows * 2 + 1, total, mask=row_inside)
        if tile_begin < tile_end:
            targets = partial_ptr + partial_rows[None, :] * V_BLOCK + v_channels[:, None]
            tl.store(targets, even, mask=row_inside[None, :])
            if V_FORMAT != MODEL:
                tl.store(targets + V_PAIRS, odd, mask=row_inside[None, :])
    else:
        share, ratio, lse = _normalize(highest, total, sinks_ptr, row_head, SINKS)
        output_rows = (sequence.to(tl.int64) * (H * GROUP) + row_head) * num_tokens + row_token
        if LSE:
            tl.store(lse_ptr + output_rows, lse, mask=row_inside)
        even = tl.trans(even * share[None, :])
        if V_FORMAT == MODEL:
            result = even
        else:
            result = tl.reshape(tl.join(even, tl.trans(odd * share[None, :])), [BLOCK_M, V_BLOCK])
        channels = tl.arange(0, V_BLOCK)
        if V_SCALE:
            result = result * load_scale(v_scale_ptr, head, channels, V_DIM, V_SCALE)[None, :]
        if V_ZERO:
            result = result + load_scale(v_zero_ptr, head, channels, V_DIM, V_ZERO)[None, :] * ratio[:, None]
        tl.store(
            output_ptr + output_rows[:, None] * V_DIM + channels[None, :],
            result.to(output_ptr.dtype.element_ty),
            mask=row_inside[:, None] & (channels < V_DIM)[None, :],
        )


@triton.jit
def _slots(pages, head, tokens, H: tl.constexpr, PAGE_SIZE: tl.constexpr):
    """Where tokens lie, counted in tokens of one head over all pages: 32 bits count more than a GPU can hold."""
    return (pages * H + head) * PAGE_SIZE + tokens % PAGE_SIZE


@triton.jit
def _attend_tile(
    q_even, q_odd, logit_scale, logit_offset, softcap, highest, total, even, odd, slots, written, visible, bias,
    k_ptr, k_token_scale, v_ptr, v_token_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    K_FORMAT: tl.constexpr, K_DIM: tl.constexpr, K_BLOCK: tl.constexpr, K_DYNAMIC: tl.constexpr,
    V_FORMAT: tl.constexpr, V_DIM: tl.constexpr, V_BLOCK: tl.constexpr, V_DYNAMIC: tl.constexpr,
    PARTIAL: tl.constexpr, MASKED: tl.constexpr, BIASED: tl.constexpr, OFFSET: tl.constexpr,
    SOFTCAP: tl.constexpr, ISA: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over BLOCK_N tokens, which lie at `slots`.

    PARTIAL: only `written` slots may be read. MASKED: rows attend where `visible` `[BLOCK_N, 1 or BLOCK_M]` says.
    BIASED: `bias` is added.
    """
    k = _load_tile(k_ptr, slots, written, K_FORMAT, K_DIM, K_BLOCK, PARTIAL, False)
    v = _load_tile(v_ptr, slots, written, V_FORMAT, V_DIM, V_BLOCK, PARTIAL, True)
    if K_FORMAT == MODEL:
        logits = tl.dot(k, q_even, input_precision="ieee")
    else:
        k_even, k_odd = decode_pair(k, K_FORMAT, ISA)
        logits = tl.dot(k_even.to(DOT_DTYPE), q_even, input_precision="ieee")
        logits = tl.dot(k_odd.to(DOT_DTYPE), q_odd, logits, input_precision="ieee")
    if K_DYNAMIC:
        logits = logits * bf16_bits_to_fp32(k_token_scale)[:, None]
    logits = logits * logit_scale[None, :]
    if OFFSET:
        logits = logits + logit_offset[None, :]
    if SOFTCAP:
        # tanh by way of the logistic function
        logits = (2.0 / (1.0 + tl.exp2(logits * (-2.0 * LOG2_E / softcap))) - 1.0) * (softcap * LOG2_E)
    if BIASED:
        # The lowest number of a float hides nothing where a row has no other.
        logits = logits + tl.where(bias > float("-inf"), tl.maximum(bias, LOWEST_BIAS), bias) * LOG2_E
    if MASKED:
        logits = tl.where(visible, logits, float("-inf"))
    if V_DYNAMIC:
        # scale = 2^exponent * mantissa
        bits = v_token_scale.to(tl.int32)
        exponent = bits >> 7
        logits = logits + (exponent - 127).to(tl.float32)[:, None]
    new_highest = tl.maximum(highest, tl.max(logits, axis=0))
    base = new_highest
    if MASKED:
        base = tl.where(new_highest == float("-inf"), 0.0, new_highest)  # a row that has seen nothing yet
    weights = tl.exp2(logits - base[None, :])
    decay = tl.exp2(highest - base)
    if V_DYNAMIC:
        total = total * decay + tl.sum(weights * ((254 - exponent) << 23).to(tl.float32, bitcast=True)[:, None], axis=0)
        mantissa = ((bits << 16) & 0x7F0000 | 0x3F800000).to(tl.float32, bitcast=True)
        mantissa = tl.where(exponent == 255, float("nan"), mantissa)
        weights = weights * mantissa[:, None]
    else:
        total = total * decay + tl.sum(weights, axis=0)
    even = even * decay[None, :]
    if V_FORMAT == MODEL:
        even = tl.dot(v, weights.to(v.dtype), even, input_precision="ieee")
    else:
        odd = odd * decay[None, :]
        v_even, v_odd = decode_pair(v, V_FORMAT, ISA)
        weights = weights.to(DOT_DTYPE)
        even = tl.dot(v_even.to(DOT_DTYPE), weights, even, input_precision="ieee")
        odd = tl.dot(v_odd.to(DOT_DTYPE), weights, odd, input_precision="ieee")
    return new_highest, total, even, odd


@triton.jit
def _load_tile(
    ptr, slots, written,
    FORMAT: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, PARTIAL: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """`[tokens, BLOCK]` elements of unquantized pages, or `[tokens, BLOCK / 2]` pairs of codes; or their transpose."""
    if FORMAT == MODEL:
        WIDTH: tl.constexpr = DIM
        COLUMNS: tl.constexpr = BLOCK
    else:
        WIDTH: tl.constexpr = DIM // 2
        COLUMNS: tl.constexpr = BLOCK // 2
        ptr = ptr.to(tl.pointer_type(tl.uint16))
    token_axis: tl.constexpr = 1 if TRANSPOSED else 0
    columns = tl.expand_dims(tl.arange(0, COLUMNS), token_axis)
    pointers = ptr + tl.expand_dims(slots, 1 - token_axis).to(tl.int64) * WIDTH + columns
    # Slots that hold no token may hold a NaN, and so may whatever lies behind the last channel.
    if PARTIAL:
        return tl.load(pointers, mask=tl.expand_dims(written, 1 - token_axis) & (columns < WIDTH), other=0)
    elif WIDTH < COLUMNS:
        return tl.load(pointers, mask=columns < WIDTH, other=0)
    else:
        return tl.load(pointers)


@triton.jit
def _load_token_scale(ptr, slots, written, DYNAMIC: tl.constexpr):
    """The bits of bfloat16 scales, 1 where none is written."""
    if not DYNAMIC:
        return slots  # not used
    elif written is None:
        return tl.load(ptr.to(tl.pointer_type(tl.int16)) + slots)
    else:
        return tl.load(ptr.to(tl.pointer_type(tl.int16)) + slots, mask=written, other=0x3F80)


@triton.jit
def _load_visible(mask_row_ptr, tokens, end, mask_stride_n, MASK: tl.constexpr):
    """`[BLOCK_N, 1]`: which keys the mask by key alone shows."""
    if MASK:
        return (tl.load(mask_row_ptr + tokens.to(tl.int64) * mask_stride_n, mask=tokens < end, other=0) != 0)[:, None]
    else:
        return tokens  # not used


@triton.jit
def _normalize(highest, total, sinks_ptr, row_head, SINKS: tl.constexpr):
    """What a row's weighted values are multiplied by, which share of its weight lies on values, not on its sink, and
    the logarithm of its sum, its sink included."""
    base = highest
    denominator = total
    if SINKS:
        sink = tl.load(sinks_ptr + row_head).to(tl.float32) * LOG2_E
        base = tl.maximum(highest, sink)
        base = tl.where(base == float("-inf"), 0.0, base)
        scale = tl.exp2(highest - base)
        denominator = total * scale + tl.exp2(sink - base)
        share = tl.where(denominator > 0, scale / denominator, 0.0)
    else:
        share = tl.where(total > 0, 1.0 / total, 0.0)
    return share, share * total, (base + tl.log2(denominator)) * LN_2


@triton.jit(
    do_not_specialize=["num_tokens", "num_splits"],
    do_not_specialize_on_alignment=["lse_ptr", "v_scale_ptr", "v_zero_ptr", "sinks_ptr"],
)
def merge_kernel(
    output_ptr, lse_ptr, partial_ptr, v_scale_ptr, v_zero_ptr, sinks_ptr,
    num_tokens, num_splits,
    H: tl.constexpr, GROUP: tl.constexpr, V_DIM: tl.constexpr, V_BLOCK: tl.constexpr, PAIRED: tl.constexpr,
    V_SCALE: tl.constexpr, V_ZERO: tl.constexpr, SINKS: tl.constexpr, LSE: tl.constexpr, BLOCK_S: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """A program merges the splits of one row: one token of one query head. Grid: B * H * T * GROUP.

    CHAINED: it was launched while the kernel before it still ran, and waits for that one's results here.
    """
    if CHAINED:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0)
    num_rows = num_tokens * GROUP
    token = (row % num_rows) // GROUP
    head = (row // num_rows) % H
    row_head = head * GROUP + row % GROUP
    sequence = row // (num_rows * H)

    stats_ptr = partial_ptr + tl.num_programs(0).to(tl.int64) * V_BLOCK * num_splits
    columns = tl.arange(0, V_BLOCK)  # even channels before odd ones
    highest = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    result = tl.zeros([V_BLOCK], tl.float32)
    for start in range(0, num_splits, BLOCK_S):
        splits = start + tl.arange(0, BLOCK_S)
        places = row.to(tl.int64) * num_splits + splits
        split_highest = tl.load(stats_ptr + places * 2, mask=splits < num_splits, other=float("-inf"))
        split_total = tl.load(stats_ptr + places * 2 + 1, mask=splits < num_splits, other=0.0)
        values = tl.load(
            partial_ptr + places[:, None] * V_BLOCK + columns[None, :], mask=(splits < num_splits)[:, None]
        )
        values = tl.where((split_total != 0)[:, None], values, 0.0)  # not written if there were no tokens; NaN is
        new_highest = tl.maximum(highest, tl.max(split_highest, axis=0))
        base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        weights = tl.exp2(split_highest - base)
        decay = tl.exp2(highest - base)
        total = total * decay + tl.sum(weights * split_total, axis=0)
        result = result * decay + tl.sum(weights[:, None] * values, axis=0)
        highest = new_highest

    share, ratio, lse = _normalize(highest, total, sinks_ptr, row_head, SINKS)
    output_row = (sequence.to(tl.int64) * (H * GROUP) + row_head) * num_tokens + token
    if LSE:
        tl.store(lse_ptr + output_row, lse)
    result = result * share
    channels = columns
    if PAIRED:
        channels = (columns % (V_BLOCK // 2)) * 2 + columns // (V_BLOCK // 2)
    if V_SCALE:
        scale = load_scale(v_scale_ptr, head, channels, V_DIM, V_SCALE)
        result = result * scale
    if V_ZERO:
        zero = load_scale(v_zero_ptr, head, channels, V_DIM, V_ZERO)
        result = result + zero * ratio
    targets = output_ptr + output_row * V_DIM + channels
    tl.store(targets, result.to(output_ptr.dtype.element_ty), mask=channels < V_DIM)
