"""Attention over keys and values as the model made them: fresh prompts, and whatever cannot go over pages."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.autograd.forward_ad import unpack_dual
from torch.nn.attention.bias import causal_lower_right
from transformers.integrations.sdpa_attention import create_position_bias_mask, sdpa_attention_forward

from .ops import PagedTensor, cpu, paged_attention, reference

# New tokens from which on a GPU the past is dequantized for them: attention then takes much longer than that.
_LONG_TURN = 64
# Queries whose weights are formed at a time, as they take as many numbers as there are queries, keys and heads.
_BLOCK = 256


class DenseOptions(NamedTuple):
    """What attention over dense tensors is to do; names as of `kvquant_attention`."""

    module: torch.nn.Module
    scaling: float
    is_causal: bool
    softcap: float | None
    sinks: torch.Tensor | None
    dropout: float
    others: dict[str, Any]


def dense_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    position_bias: torch.Tensor | None,
    options: DenseOptions,
) -> torch.Tensor:
    """What `sdpa` computes, `[B, T, Hq, D]`, and softcap and sinks, which it lacks.

    Without a mask queries are the last tokens, where `sdpa` takes fewer of them than keys for the first.
    On a CPU the kernels for pages do it where they are faster; what neither can do is done in plain torch.
    """
    module, scaling, is_causal, softcap, sinks, dropout, others = options
    dropout = dropout if module.training else 0.0
    if _suits_kernels(query, key, value, (mask, position_bias), sinks, dropout):
        return _in_kernels(query, key, value, mask, position_bias, options)
    is_plain = softcap is None and sinks is None
    if mask is None and is_causal and query.shape[2] > 1 and not (is_plain and query.shape[2] >= key.shape[2]):
        mask = causal_mask(query, key.shape[2])
    if is_plain:
        return sdpa_attention_forward(
            module, query, key, value, mask,
            dropout=dropout, scaling=scaling, is_causal=is_causal, position_bias=position_bias, **others,
        )[0]  # fmt: skip
    mask = with_bias(mask, position_bias)
    outputs = [
        reference.attend(
            query[:, :, rows], key, value, scaling, softcap, None, _rows_of(mask, rows), _rows_of(sinks, rows),
            dropout=dropout,
        )
        for rows in _blocks(query.shape[2])
    ]  # fmt: skip
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


def _blocks(num_tokens: int) -> list[slice]:
    """Queries whose weights are formed at a time; a graph would be of one number of tokens."""
    if torch.compiler.is_compiling():
        return [slice(None)]
    return [slice(start, start + _BLOCK) for start in range(0, max(num_tokens, 1), _BLOCK)]


def _rows_of(x: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    """Of masks `[B, H, T, L]`, and of sinks that differ between tokens, those of some queries."""
    return x if x is None or x.ndim < 4 or x.shape[2] == 1 else x[:, :, rows]


def is_long_turn(query: torch.Tensor) -> bool:
    """Whether it pays to dequantize the past once and give it to the dense attention kernel (see docs/design.md)."""
    return (
        query.device.type == "cuda" and query.dtype in (torch.float16, torch.bfloat16) and query.shape[2] >= _LONG_TURN
    )


def attend_long_turn(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """`[B, T, Hq, D]`: queries that are the last of many tokens."""
    output = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=causal_lower_right(query.shape[2], key.shape[2]), scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return output.transpose(1, 2).contiguous()


def _suits_kernels(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    masks: tuple[torch.Tensor | None, ...],
    sinks: torch.Tensor | None,
    dropout: float,
) -> bool:
    """Whether the CPU's kernels can attend, and would be faster than torch."""
    if query.device.type != "cpu" or torch.compiler.is_exporting():  # a graph for others has torch's own operators
        return False
    batch_size, num_heads, num_tokens, _ = query.shape
    shapes = {(1, 1), (1, num_heads), (batch_size, 1), (batch_size, num_heads)}  # of masks, but for tokens
    return (
        query.dtype == key.dtype == value.dtype
        and (batch_size, num_tokens) == (key.shape[0], key.shape[2])
        and key.shape[:3] == value.shape[:3]
        and num_tokens > 1
        and num_heads % key.shape[1] == 0
        and all(
            mask is None or mask.ndim == 4 and mask.shape[:2] in shapes and mask.shape[2:] == (num_tokens, num_tokens)
            for mask in masks
        )
        and (sinks is None or sinks.ndim == 1)
        and not dropout
        and not _is_watched(query, key, value, *masks, sinks)
        and cpu.outruns_torch(query.dtype)
    )


def _is_watched(*tensors: torch.Tensor | None) -> bool:
    """Whether somebody wants more than numbers: gradients, another dtype, a trace, a transform."""
    given = [x for x in tensors if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in given) or torch.is_autocast_enabled("cpu"):
        return True
    return not torch.compiler.is_compiling() and (
        torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or any(unpack_dual(x).tangent is not None for x in given)
    )


def _in_kernels(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    position_bias: torch.Tensor | None,
    options: DenseOptions,
) -> torch.Tensor:
    """The keys and values of a sequence are one page."""
    batch_size, _, length, _ = key.shape
    output = paged_attention(
        query,
        PagedTensor(key.contiguous(), "model"),
        PagedTensor(value.contiguous(), "model"),
        torch.arange(batch_size, dtype=torch.int32, device=key.device)[:, None],
        torch.full((batch_size,), length, dtype=torch.int32, device=key.device),
        softmax_scale=options.scaling,
        attn_mask=with_bias(mask, position_bias),
        sinks=options.sinks,
        softcap=options.softcap,
        causal=options.is_causal and mask is None,
    )
    return output.transpose(1, 2).contiguous()


def with_bias(mask: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor | None:
    """Mask and learned position bias as one additive mask."""
    if bias is None:
        return mask
    return bias if mask is None else create_position_bias_mask(bias, mask, False, bias, bias)


def causal_mask(query: torch.Tensor, length: int) -> torch.Tensor:
    """`[1, 1, T, L]` for queries that are the last T of L tokens."""
    num_tokens = query.shape[2]
    return torch.ones(num_tokens, length, dtype=torch.bool, device=query.device).tril(length - num_tokens)[None, None]
