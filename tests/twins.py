"""Outlier twins: the same function in full precision, with the outliers in its cache that break 8-bit storage.

A factor moves from the queries to the keys, or from the output projection to the values. Rotary embedding turns
channels d and d + D/2 together, so a pair scaled alike commutes with it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from transformers import LlamaForCausalLM

FACTOR = 48.0


def _scaled_twin(model: LlamaForCausalLM, scale_layer: Callable[[torch.nn.Module, int, int], None]) -> LlamaForCausalLM:
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for layer in twin.model.layers:
            attention = layer.self_attn
            scale_layer(attention, attention.head_dim, attention.num_key_value_groups)
    return twin


def _rows(weight: torch.Tensor, head: int, channels: slice | list[int], head_dim: int) -> torch.Tensor:
    return torch.arange(head * head_dim, (head + 1) * head_dim)[channels]


def _scale_key(attention: torch.nn.Module, head_dim: int, groups: int, channels: slice | list[int]) -> None:
    attention.k_proj.weight[_rows(attention.k_proj.weight, 0, channels, head_dim)] *= FACTOR
    for query_head in range(groups):  # the queries that read key/value head 0
        attention.q_proj.weight[_rows(attention.q_proj.weight, query_head, channels, head_dim)] /= FACTOR


def _scale_value(attention: torch.nn.Module, head_dim: int, groups: int, channels: slice | list[int]) -> None:
    attention.v_proj.weight[_rows(attention.v_proj.weight, 0, channels, head_dim)] *= FACTOR
    for query_head in range(groups):
        attention.o_proj.weight[:, _rows(attention.o_proj.weight, query_head, channels, head_dim)] /= FACTOR


def key_pair(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Two rotary channels of one key head are large."""
    return _scaled_twin(model, lambda a, d, g: _scale_key(a, d, g, [d // 4, d // 4 + d // 2]))


def key_head(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """One key head is large."""
    return _scaled_twin(model, lambda a, d, g: _scale_key(a, d, g, slice(None)))


def value_head(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """One value head is large."""
    return _scaled_twin(model, lambda a, d, g: _scale_value(a, d, g, slice(None)))


def value_channel(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """One channel of one value head is large."""
    return _scaled_twin(model, lambda a, d, g: _scale_value(a, d, g, [d // 3]))


TWINS: dict[str, Callable[[LlamaForCausalLM], LlamaForCausalLM]] = {
    "plain": lambda model: model,
    "key_pair": key_pair,
    "key_head": key_head,
    "value_head": value_head,
    "value_channel": value_channel,
}
