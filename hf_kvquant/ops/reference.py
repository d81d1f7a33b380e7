"""The specification: all operations in plain torch, written to be read. Kernels are held to these, bytes and values.

It runs on any device. Shapes and words are those of the package docstring.
"""

from __future__ import annotations

import torch

from ..formats import TINY_SCALE, StorageFormat, get_format

# Query rows per block: bounds the logits that live at once when many tokens attend to a long past.
_QUERY_BLOCK = 256


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
    pages, slots = newest_slots(page_table, seq_lens, key.shape[2], k_pages.shape[2])
    sides = (
        (key, k_pages, k_format, k_scale, k_zero, k_token_scale),
        (value, v_pages, v_format, v_scale, v_zero, v_token_scale),
    )
    for side, (x, store, format_name, scale, zero, token_scale) in enumerate(sides):
        codes, token_scales, num_clipped = quantize(x, format_name, scale, zero, token_scale is not None)
        store[pages, :, slots] = codes.to(store.dtype).transpose(1, 2)
        if token_scale is not None and token_scales is not None:
            token_scale[pages, :, slots] = token_scales.transpose(1, 2)
        elif clipped is not None and num_clipped is not None:
            clipped[side] += num_clipped


def newest_slots(
    page_table: torch.Tensor, seq_lens: torch.Tensor, num_tokens: int, page_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pages and slots `[B, T]` of the newest tokens."""
    positions = seq_lens[:, None].long() - num_tokens + torch.arange(num_tokens, device=seq_lens.device)
    pages = page_table.gather(1, (positions // page_size) % page_table.shape[1]).long()
    return pages, positions % page_size


def quantize(
    x: torch.Tensor, format_name: str, scale: torch.Tensor | None, zero: torch.Tensor | None, dynamic: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """`[B, H, T, D]` to codes of the same shape; bf16 token scales `[B, H, T]` if `dynamic`, else how many clipped.

    Multiplications by fp32 reciprocals, in this order, are part of the specification: they decide the bytes.
    """
    row = get_format(format_name)
    if not row.is_quantized:
        return x, None, None
    y = in_code_units(x, scale, zero)
    if dynamic:
        return *quantize_tokens(y, row), None
    return row.encode(y), None, (~(y.abs() <= row.clip_limit)).sum()  # a NaN counts as well


def in_code_units(x: torch.Tensor, scale: torch.Tensor | None, zero: torch.Tensor | None) -> torch.Tensor:
    """Numbers `[B, H, T, D]` as fp32 multiples of `scale` from `zero`."""
    y = x.to(torch.float32)
    if zero is not None:
        y = y - zero[:, None, :]
    if scale is not None:
        y = y * scale.reciprocal()[:, None, :]
    return y


def quantize_tokens(y: torch.Tensor, row: StorageFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers fp32 `[..., D]` to codes of the same shape and bf16 token scales `[...]`."""
    # As with a NaN, nothing of a token is left beside an infinity: 0 * inf is NaN.
    largest = y.abs().amax(dim=-1).nan_to_num(nan=torch.nan, posinf=torch.nan)
    token_scales = round_up_to_bf16((largest * (1.0 / row.qmax)).clamp(min=TINY_SCALE))
    return row.encode(y * token_scales.to(torch.float32).reciprocal()[..., None]), token_scales


def round_up_to_bf16(x: torch.Tensor) -> torch.Tensor:
    """The smallest bfloat16 that is not below x (positive fp32; NaN stays)."""
    # The bits of some NaN would overflow into those of zero.
    bits = x.nan_to_num(nan=torch.nan, posinf=torch.inf).view(torch.int32)
    return ((bits + 0xFFFF) & ~0xFFFF).view(torch.float32).to(torch.bfloat16)


def dequantize(
    codes: torch.Tensor,
    format_name: str,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    token_scale: torch.Tensor | None,
) -> torch.Tensor:
    """Codes `[B, H, L, D]` and token scales `[B, H, L]` to numbers: fp32, or as stored for unquantized pages."""
    x = get_format(format_name).decode(codes)
    if token_scale is not None:
        x = x * token_scale.to(torch.float32)[..., None]
    if scale is not None:
        x = x * scale[:, None, :]
    if zero is not None:
        x = x + zero[:, None, :]
    return x


def by_age(page_table: torch.Tensor, seq_lens: torch.Tensor, page_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each sequence's pages `[B, N]`, oldest first, and which token each of their slots is for, `[B, N * S]`.

    Slots may be for tokens that have not come yet.
    """
    num_columns = page_table.shape[1]
    last_page = (seq_lens.long() - 1).clamp(min=0) // page_size
    first_page = (last_page - num_columns + 1).clamp(min=0)[:, None]
    columns = (first_page + torch.arange(num_columns, device=page_table.device)) % num_columns
    positions = first_page * page_size + torch.arange(num_columns * page_size, device=page_table.device)
    return page_table.gather(1, columns).long(), positions


def gather(store: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    """The pages `[B, N]` of `store` `[P, H, S, ...]` as `[B, H, N * S, ...]`."""
    return store[pages].transpose(1, 2).flatten(2, 3)


def read_pages(
    page_ids: torch.Tensor,
    pages: torch.Tensor,
    format_name: str,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    token_scale: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    codes = gather(pages, page_ids)
    token_scale = None if token_scale is None else gather(token_scale, page_ids)
    x = dequantize(codes, format_name, scale, zero, token_scale).to(dtype)
    if dtype == torch.float16 and get_format(format_name).is_quantized:
        # fp16 ends where activations may be, and with scales rounded up its largest numbers come back larger.
        x.clamp_(-torch.finfo(dtype).max, torch.finfo(dtype).max)  # a NaN stays
    return x


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
) -> torch.Tensor:
    compute_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    num_tokens = query.shape[2]
    pages, kv_positions = by_age(page_table, seq_lens, k_pages.shape[2])  # [B, N], [B, L]
    q_positions = seq_lens[:, None].long() - num_tokens + torch.arange(num_tokens, device=query.device)  # [B, T]

    key = read_pages(pages, k_pages, k_format, k_scale, k_zero, k_token_scale, compute_dtype)
    value = read_pages(pages, v_pages, v_format, v_scale, v_zero, v_token_scale, compute_dtype)
    # Slots that hold no token yet may hold anything, NaN included, and 0 · NaN is NaN: hide them from V too.
    written = kv_positions < seq_lens[:, None]
    value = value.masked_fill(~written[:, None, :, None], 0.0)

    outputs = []
    for start in range(0, num_tokens, _QUERY_BLOCK):
        rows = slice(start, start + _QUERY_BLOCK)
        visible = written[:, None, None, :]
        relative = q_positions[:, None, rows, None] - kv_positions[:, None, None, :]
        if causal:
            visible = visible & (relative >= 0)
        if window is not None:
            visible = visible & (relative < window)
        bias = None
        if attn_mask is not None:
            bias = mask_at(attn_mask[:, :, rows], mask_start, kv_positions)
        outputs.append(
            attend(
                query[:, :, rows].to(compute_dtype), key, value, softmax_scale, softcap, visible, bias, sinks,
                lse=None if lse is None else lse[:, :, rows],
            )
        )  # fmt: skip
    return torch.cat(outputs, dim=2).to(query.dtype)


def mask_at(mask: torch.Tensor, mask_start: int, kv_positions: torch.Tensor) -> torch.Tensor:
    """The columns of `mask` that belong to `kv_positions` `[B, L]`; tokens outside its columns are hidden."""
    columns = kv_positions - mask_start
    outside = (columns < 0) | (columns >= mask.shape[-1])
    columns = columns.clamp(0, mask.shape[-1] - 1)
    batch_size, length = columns.shape
    mask = mask.expand(batch_size, -1, -1, -1)
    index = columns[:, None, None, :].expand(-1, mask.shape[1], mask.shape[2], length)
    hidden = False if mask.dtype == torch.bool else float("-inf")
    return mask.gather(3, index).masked_fill(outside[:, None, None, :], hidden)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    softmax_scale: float,
    softcap: float | None = None,
    visible: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    dropout: float = 0.0,
    lse: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention over dense K and V: `[B, Hq, T, Dk]`, `[B, H, L, Dk]`, `[B, H, L, Dv]` -> `[B, Hq, T, Dv]`.

    `visible` is bool and `mask` bool (True attends) or float (added), both broadcastable to `[B, Hq, T, L]`;
    `sinks` are `[Hq]` or `[B, Hq, T, 1]`. A row that sees nothing gives zeros. `lse` `[B, Hq, T]` is overwritten with
    the logarithm of each row's sum of exponentials.
    """
    batch_size, num_q_heads, num_tokens, _ = query.shape
    num_kv_heads, length = key.shape[1], key.shape[2]
    packed = query.reshape(batch_size, num_kv_heads, -1, query.shape[-1])  # the query heads of a group are more rows
    logits = (packed @ key.transpose(2, 3)) * softmax_scale
    logits = logits.reshape(batch_size, num_q_heads, num_tokens, length)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is not None:
        if mask.dtype == torch.bool:
            visible = mask if visible is None else visible & mask
        else:
            logits = logits + mask
    if visible is not None:
        logits = logits.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        sinks = sinks.reshape(1, -1, 1, 1) if sinks.ndim == 1 else sinks
        sink_logits = sinks.to(logits.dtype).expand(batch_size, -1, num_tokens, 1)
        logits = torch.cat([logits, sink_logits], dim=-1)
    # A row of -inf only would be NaN; its maximum is replaced so that every weight comes out as zero.
    highest = logits.amax(dim=-1, keepdim=True)
    weights = torch.exp(logits - highest.masked_fill(highest == float("-inf"), 0.0))
    total = weights.sum(dim=-1, keepdim=True)
    if lse is not None:
        lse.copy_((highest + total.log())[..., 0])
    weights = weights / total.clamp(min=torch.finfo(weights.dtype).tiny)
    weights = torch.nn.functional.dropout(weights, dropout, training=dropout > 0)
    weights = weights[..., :length].to(value.dtype).reshape(batch_size, num_kv_heads, -1, length)
    return (weights @ value).reshape(batch_size, num_q_heads, num_tokens, value.shape[-1])


def channel_absmax(x: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    size = x.nan_to_num(0.0, 0.0, 0.0).abs()
    if valid is not None:
        size = size * valid[:, None, :, None]
    return size.amax(dim=(0, 2)).to(torch.float32)
