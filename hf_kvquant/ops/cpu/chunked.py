"""`paged_attention` in torch operators, for machines without a compiler: the reference, some pages at a time.

Nothing of the length of the past is made but the logits of one chunk; the memory that codes are read and turned into
numbers in is kept from call to call, since fresh memory costs more than the arithmetic.
"""

from __future__ import annotations

import threading

import torch

from ...formats import get_format
from .. import reference
from .kernels import Side

# Numbers of K or V at once: they stay in the last cache.
_CHUNK = 1 << 20
_QUERY_BLOCK = 256


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
    pages, positions = reference.by_age(page_table, seq_lens, page_size)
    q_positions = seq_lens[:, None].long() - num_tokens + torch.arange(num_tokens)
    shape = (batch_size, num_heads, num_q_heads // num_heads, num_tokens, v[0].shape[3])
    each = max(_CHUNK // max(batch_size * num_heads * page_size * dim, 1), 1)
    # Pages that some query may see.
    oldest = 0 if window is None else int((q_positions[:, :1] - window + 1 - positions[:, :1]).min().clamp(min=0))
    newest = int((seq_lens - positions[:, 0]).max())
    first_page, last_page = oldest // page_size, -(-newest // page_size)

    outputs = []
    for start in range(0, num_tokens, _QUERY_BLOCK):
        rows = slice(start, min(start + _QUERY_BLOCK, num_tokens))
        block = (*shape[:3], rows.stop - rows.start)
        q = query[:, :, rows].to(torch.float32).reshape(batch_size, num_heads, -1, dim)
        offset = None if k[3] is None else (q * k[3][:, None]).sum(dim=-1, keepdim=True) * softmax_scale
        q = q * softmax_scale if k[2] is None else q * (k[2] * softmax_scale)[:, None]
        highest = q.new_full((*q.shape[:3], 1), -torch.inf)
        if sinks is not None:
            highest = sinks.to(torch.float32).view(1, *shape[1:3], 1, 1).expand(*block, 1).reshape(highest.shape)
        total = (highest > -torch.inf).to(torch.float32)
        seen = torch.zeros_like(total)
        values = q.new_zeros(*q.shape[:3], shape[4])
        for page in range(first_page, last_page, each):
            chosen = slice(page, min(page + each, last_page))
            kv_positions = positions[:, page * page_size : chosen.stop * page_size]
            written = kv_positions < seq_lens[:, None]
            relative = q_positions[:, rows, None] - kv_positions[:, None, :]
            visible = written[:, None]
            if causal:
                visible = visible & (relative >= 0)
            if window is not None:
                visible = visible & (relative < window)

            numbers, scales = _read(k, pages[:, chosen])
            logits = q @ numbers.transpose(2, 3)
            if scales is not None:
                logits *= scales[:, :, None]
            if offset is not None:
                logits += offset
            if softcap is not None:
                logits = logits.div_(softcap).tanh_().mul_(softcap)
            logits = logits.view(*block, -1)
            hidden = ~visible[:, None, None]
            if attn_mask is not None:
                bias = reference.mask_at(attn_mask[:, :, rows], mask_start, kv_positions)
                bias = bias.unflatten(1, (1, 1) if bias.shape[1] == 1 else shape[1:3])
                if bias.dtype == torch.bool:
                    hidden = hidden | ~bias
                else:
                    logits = logits + bias.to(torch.float32)
            logits = logits.masked_fill(hidden, -torch.inf).view(*q.shape[:3], -1)

            before, highest = highest, torch.maximum(highest, logits.amax(dim=-1, keepdim=True))
            base = highest.masked_fill(highest == -torch.inf, 0.0)
            weights = logits.sub_(base).exp_()
            shrink = torch.exp(before - base)
            numbers, scales = _read(v, pages[:, chosen])
            some = weights.sum(dim=-1, keepdim=True)
            total, seen = total * shrink + some, seen * shrink + some
            if not written.all():  # what lies in other slots may be NaN, and 0 · NaN is NaN
                numbers.masked_fill_(~written[:, None, :, None], 0.0)
                scales = None if scales is None else scales.masked_fill(~written[:, None], 0.0)
            if scales is not None:
                weights *= scales[:, :, None]
            values = values * shrink + weights @ numbers
        if lse is not None:
            lse[:, :, rows] = (highest + total.log()).view(batch_size, num_q_heads, -1)
        reciprocal = 1.0 / total.clamp(min=torch.finfo(torch.float32).tiny)
        values = values * reciprocal
        if v[2] is not None:
            values = values * v[2][:, None]
        if v[3] is not None:
            values = values + v[3][:, None] * (seen * reciprocal)
        outputs.append(values.view(*block, -1).flatten(1, 2).to(query.dtype))
    return torch.cat(outputs, dim=2)


def _read(side: Side, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The pages `[B, n]` of `side` as fp32 numbers `[B, H, n * S, D]` in units of the static scale, and token scales.

    The numbers lie in this thread's workspace, until the next call.
    """
    store, name, _, _, token_scale = side
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
        if name == "fp8_e4m3":
            numbers.mul_(256)
    scales = None if token_scale is None else reference.gather(token_scale, pages).to(torch.float32)
    return numbers.flatten(2, 3), scales


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
