"""`paged_attention`: all logits, block by block of K; one softmax; then the sum over blocks of V."""

from __future__ import annotations

import torch

from ....formats import get_format
from ... import reference
from ..kernels import Side
from .digits import Digits, pay
from .gathering import Gathering
from .numbers import factor, numbers
from .visible import Visible
from .workspace import workspace

# Numbers of K or V at once, as codes and in fp32: in smaller blocks, starting operators costs more than what they read
# past the last cache.
_CODES, _NUMBERS = 1 << 22, 1 << 21
# Logits at once; more query tokens come some at a time.
_LOGITS = 1 << 23
# Digits of 8 bits. Two for queries of 16 bits, whose output is rounded to as many anyway; but a long row of weights may
# have most of its sum in small ones, which two digits would round away.
_PLACES_OF_QUERY = {torch.bfloat16: 2, torch.float16: 2}
_PLACES = 3
# Exponentials of less are denormal or nothing, but for a few, and torch takes 12 to 35 times as long for those.
_LOWEST, _NEXT_TO_NOTHING = -87.0, 1.7e-38


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
    batch_size, num_q_heads, num_tokens, dim = query.shape
    num_heads, page_size = k[0].shape[1:3]
    if not query.numel():
        return query.new_empty(batch_size, num_q_heads, num_tokens, v[0].shape[3])
    group = num_q_heads // num_heads
    seen = Visible(page_table, seq_lens, page_size, num_tokens, window, causal, attn_mask is not None)
    gathering = Gathering(seen.pages, num_heads)
    k_scales, v_scales = (
        None if side[4] is None else gathering.scales(side[4], seen.start_slot, seen.length) for side in (k, v)
    )
    if v_scales is not None and not seen.is_full:  # what lies in other slots may be NaN, and 0 · NaN is NaN
        v_scales = v_scales.masked_fill(~seen.written[:, None], 0.0)

    outputs, at_once = [], max(_LOGITS // (batch_size * num_q_heads * seen.length), 1)
    for first in range(0, num_tokens, at_once):
        tokens = slice(first, min(first + at_once, num_tokens))
        shape = (batch_size, num_heads, group, tokens.stop - tokens.start)
        q = query if at_once >= num_tokens else query[:, :, tokens]
        q = q.to(torch.float32).reshape(batch_size, num_heads, -1, dim)
        logits = _dot(q * softmax_scale, k, gathering, seen, _PLACES_OF_QUERY.get(query.dtype, _PLACES))
        if k_scales is not None:
            logits *= k_scales[:, :, None]
        if k[3] is not None:
            logits += (q * k[3][:, None]).sum(dim=-1, keepdim=True) * softmax_scale
        if softcap is not None:
            logits.div_(softcap).tanh_().mul_(softcap)
        if not seen.is_full:
            by_head, hidden = logits.view(*shape, seen.length), seen.hidden(tokens)[:, None, None]
            if attn_mask is not None:
                bias = reference.mask_at(attn_mask[:, :, tokens], mask_start, seen.positions)
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
        base = highest.clamp(min=torch.finfo(torch.float32).min)  # a row that sees nothing has weights of zero
        weights = torch.threshold_(logits.sub_(base).clamp_(min=_LOWEST).exp_(), _NEXT_TO_NOTHING, 0.0)
        total = summed = weights.sum(dim=-1, keepdim=True)
        if sinks is not None:
            total = summed + torch.exp(sink - base)
        if lse is not None:
            lse[:, :, tokens] = (highest + total.log()).view(batch_size, num_q_heads, -1)
        if v_scales is not None:
            weights *= v_scales[:, :, None]
        total = total.clamp(min=torch.finfo(torch.float32).tiny)
        values = _weigh(weights, v, gathering, seen) / total
        if v[3] is not None:
            values += v[3][:, None] * (summed / total)
        outputs.append(values.view(*shape, -1).flatten(1, 2).to(query.dtype))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def _dot(q: torch.Tensor, k: Side, gathering: Gathering, seen: Visible, num_places: int) -> torch.Tensor:
    """Products `[B, H, R, length]` of `q` `[B, H, R, D]` with K without its token scales and zeros."""
    store, name, scale = k[:3]
    q = q if scale is None else q * scale[:, None]
    logits = workspace("logits", torch.float32, (*q.shape[:3], seen.length))
    digits = Digits(q, num_places) if _takes_digits(q, k, seen) else None
    q = q if factor(name) == 1.0 else q * factor(name)
    for block, slots, columns in gathering.blocks(
        store, _NUMBERS if digits is None else _CODES, seen.start_slot, seen.length
    ):
        sequences, heads, _ = block
        codes = gathering.codes(store, name, block)[:, :, slots]
        if digits is not None:
            products = digits.dot(codes, sequences, heads)
        else:
            products = q[sequences, heads] @ numbers(name, codes).transpose(2, 3)
        if block == gathering.whole:
            return products
        logits[sequences, heads, :, columns] = products
    return logits


def _weigh(weights: torch.Tensor, v: Side, gathering: Gathering, seen: Visible) -> torch.Tensor:
    """Sums `[B, H, R, D]` of V without its token scales and zeros. `weights` `[B, H, R, length]` are overwritten."""
    store, name, scale = v[:3]
    values = weights.new_zeros(*weights.shape[:3], store.shape[3])
    digits = Digits(weights, _PLACES, signed=False) if _takes_digits(weights, v, seen) else None
    for block, slots, columns in gathering.blocks(
        store, _NUMBERS if digits is None else _CODES, seen.start_slot, seen.length
    ):
        sequences, heads, _ = block
        codes = gathering.codes(store, name, block)[:, :, slots]
        if digits is not None:
            products = digits.weigh(codes, sequences, heads, columns)
        else:
            x = numbers(name, codes)
            if not seen.is_full:
                x.masked_fill_(~seen.written[sequences, None, columns, None], 0.0)
            products = weights[sequences, heads, :, columns] @ x
        if block == gathering.whole:
            values = products
        else:
            values[sequences, heads].add_(products)
    values = values if factor(name) == 1.0 else values * factor(name)
    return values if scale is None else values * scale[:, None]


def _takes_digits(rows: torch.Tensor, side: Side, seen: Visible) -> bool:
    """Whether products of digits of the rows with `side` are faster than those of floats."""
    return get_format(side[1]).name == "int8" and pay(rows.shape[2], seen.length * side[0].shape[3])
