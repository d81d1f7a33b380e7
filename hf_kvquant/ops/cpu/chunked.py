"""`paged_attention` in torch operators, for machines without a compiler: the reference, some pages at a time.

First all logits, chunk by chunk of K; one softmax; then the sum over chunks of V. The memory that codes are read and
turned into numbers in is kept from call to call, since fresh memory costs more than the arithmetic.
"""

from __future__ import annotations

import threading

import torch

from ...formats import get_format
from .. import reference
from .kernels import Side

# Numbers of K or V at once: in smaller pieces, starting operators costs more than reading past the last cache.
_CHUNK = 1 << 21
# Logits at once; more query tokens come block by block.
_LOGITS = 1 << 23


class _Memory(threading.local):
    def __init__(self) -> None:
        self.kept: dict[tuple[str, torch.dtype], torch.Tensor] = {}


_memory = _Memory()


def paged_attention(
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
) -> torch.Tensor:
    """As the operator, computed in fp32."""
    batch_size, num_q_heads, num_tokens, _ = query.shape
    num_heads, page_size, dim = k[0].shape[1:]
    group = num_q_heads // num_heads
    pages, positions = reference.by_age(page_table, seq_lens, page_size)
    q_positions = seq_lens[:, None].long() - num_tokens + torch.arange(num_tokens)
    # Pages that some query may see, and at least one.
    oldest = 0 if window is None else int((q_positions[:, :1] - window + 1 - positions[:, :1]).min())
    newest, all_written = int((seq_lens - positions[:, 0]).max()), int((seq_lens - positions[:, 0]).min())
    last_page = max(-(-newest // page_size), 1)
    first_page = min(max(oldest // page_size, 0), last_page - 1)
    pages = pages[:, first_page:last_page]
    positions = positions[:, first_page * page_size : last_page * page_size]
    all_written -= first_page * page_size
    length, each = positions.shape[1], max(_CHUNK // max(batch_size * num_heads * page_size * dim, 1), 1)
    chunks = [
        (pages[:, page : page + each], slice(page * page_size, min((page + each) * page_size, length)))
        for page in range(0, last_page - first_page, each)
    ]
    written = positions < seq_lens[:, None]
    k_scales, v_scales = (_token_scales(side, pages) for side in (k, v))
    if v_scales is not None:  # what lies in other slots may be NaN, and 0 · NaN is NaN
        v_scales = v_scales.masked_fill(~written[:, None], 0.0)
    query_block = min(max(_LOGITS // (batch_size * num_q_heads * length), 1), num_tokens)

    outputs = []
    for start in range(0, num_tokens, query_block):
        rows = slice(start, min(start + query_block, num_tokens))
        shape = (batch_size, num_heads, group, rows.stop - rows.start)
        q = query[:, :, rows].to(torch.float32).reshape(batch_size, num_heads, -1, dim)
        offset = None if k[3] is None else (q * k[3][:, None]).sum(dim=-1, keepdim=True) * softmax_scale
        q = q * (softmax_scale * _factor(k))
        q = q if k[2] is None else q * k[2][:, None]
        logits = _workspace("logits", torch.float32, (*q.shape[:3], length))
        for chosen, columns in chunks:
            logits[..., columns] = q @ _read(k, chosen).transpose(2, 3)
        if k_scales is not None:
            logits *= k_scales[:, :, None]
        if offset is not None:
            logits += offset
        if softcap is not None:
            logits.div_(softcap).tanh_().mul_(softcap)

        relative = q_positions[:, rows, None] - positions[:, None, :]
        hidden = ~written[:, None]
        if causal:
            hidden = hidden | (relative < 0)
        if window is not None:
            hidden = hidden | (relative >= window)
        hidden = hidden[:, None, None]
        by_head = logits.view(*shape, length)
        if attn_mask is not None:
            bias = reference.mask_at(attn_mask[:, :, rows], mask_start, positions)
            bias = bias.unflatten(1, (1, 1) if bias.shape[1] == 1 else (num_heads, group))
            if bias.dtype == torch.bool:
                hidden = hidden | ~bias
            else:
                by_head += bias
        by_head.masked_fill_(hidden, -torch.inf)

        highest = logits.amax(dim=-1, keepdim=True)
        if sinks is not None:
            sink = sinks.to(torch.float32).view(1, *shape[1:3], 1, 1).expand(*shape, 1).reshape(highest.shape)
            highest = torch.maximum(highest, sink)
        base = highest.masked_fill(highest == -torch.inf, 0.0)
        weights = logits.sub_(base).exp_()
        total = seen = weights.sum(dim=-1, keepdim=True)
        if sinks is not None:
            total = seen + torch.exp(sink - base)
        if lse is not None:
            lse[:, :, rows] = (highest + total.log()).view(batch_size, num_q_heads, -1)
        if v_scales is not None:
            weights *= v_scales[:, :, None]
        values = q.new_zeros(*q.shape[:3], v[0].shape[3])
        for chosen, columns in chunks:
            numbers = _read(v, chosen)
            if columns.stop > all_written:
                numbers.masked_fill_(~written[:, None, columns, None], 0.0)
            values += weights[..., columns] @ numbers
        reciprocal = 1.0 / total.clamp(min=torch.finfo(torch.float32).tiny)
        values = values * _factor(v) * reciprocal
        if v[2] is not None:
            values = values * v[2][:, None]
        if v[3] is not None:
            values = values + v[3][:, None] * (seen * reciprocal)
        outputs.append(values.view(*shape, -1).flatten(1, 2).to(query.dtype))
    return torch.cat(outputs, dim=2)


def _token_scales(side: Side, pages: torch.Tensor) -> torch.Tensor | None:
    """`[B, H, n * S]` of the pages `[B, n]`."""
    return None if side[4] is None else reference.gather(side[4], pages).to(torch.float32)


def _factor(side: Side) -> float:
    """What the numbers of `_read` are to be multiplied by."""
    return 256.0 if get_format(side[1]).name == "fp8_e4m3" else 1.0


def _read(side: Side, pages: torch.Tensor) -> torch.Tensor:
    """The pages `[B, n]` of `side` as fp32 numbers `[B, H, n * S, D]` in units of its scales and `_factor`.

    The numbers lie in this thread's workspace, until the next call.
    """
    store, name = side[:2]
    batch_size, num_pages = pages.shape
    ids = pages.flatten()
    codes = _workspace("codes", store.dtype, (ids.numel(), *store.shape[1:]))
    torch.index_select(store, 0, ids, out=codes)
    name = get_format(name).name
    if name == "int8":  # from offset binary to two's complement
        codes = codes.bitwise_xor_(0x80).view(torch.int8)
    codes = codes.unflatten(0, (batch_size, num_pages)).transpose(1, 2)  # [B, H, n, S, D]
    numbers = _workspace("numbers", torch.float32, tuple(codes.shape))
    if name in ("int8", "model"):
        numbers.copy_(codes)
    else:
        numbers.copy_(_as_half(name, codes))
    return numbers.flatten(2, 3)


def _as_half(name: str, codes: torch.Tensor) -> torch.Tensor:
    """fp8 codes as half precision; e4m3 as a 256th of its numbers. Several times faster than torch's own conversion."""
    bits = _workspace("half", torch.int16, tuple(codes.shape))
    bits.copy_(codes.view(torch.int8))
    if name == "fp8_e5m2":
        return bits.bitwise_left_shift_(8).view(torch.float16)
    bits.bitwise_left_shift_(7).bitwise_and_(~0x4000)
    # A NaN, and nothing else, carries into the exponent's first bit.
    bits.bitwise_or_((bits + 0x80).bitwise_and_(0x4000))
    return bits.view(torch.float16)


def _workspace(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Uninitialized memory of this thread that stays from call to call."""
    size = torch.Size(shape).numel()
    kept = _memory.kept
    if (name, dtype) not in kept or kept[name, dtype].numel() < size:
        with torch.inference_mode(False):
            kept[name, dtype] = torch.empty(size, dtype=dtype)
    return kept[name, dtype][:size].view(shape)
