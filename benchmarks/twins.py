"""Outlier twins: the same function in full precision, with the outliers in its cache that break 8-bit storage.

A factor moves from the queries to the keys, or from the output projection to the values. Rotary embedding turns
channels d and d + D/2 together, so a pair scaled alike commutes with it. Where keys are normalized, the factor moves
between the norms' weights: they are every head's, so there is no twin with one large key head.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from transformers import PreTrainedModel

FACTOR = 48.0


def _scaled_twin(model: PreTrainedModel, scale_layer: Callable[[torch.nn.Module, int, int], None]) -> PreTrainedModel:
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for layer in twin.model.layers:
            attention = layer.self_attn
            scale_layer(attention, attention.head_dim, attention.num_key_value_groups)
    return twin


def _rows(head: int, channels: slice | list[int], head_dim: int) -> torch.Tensor:
    return torch.arange(head * head_dim, (head + 1) * head_dim)[channels]


def _multiply(projection: torch.nn.Linear, rows: torch.Tensor, factor: float) -> None:
    projection.weight[rows] *= factor
    if projection.bias is not None:
        projection.bias[rows] *= factor


def _scale_key(attention: torch.nn.Module, head_dim: int, groups: int, channels: slice | list[int]) -> None:
    if hasattr(attention, "k_norm"):
        attention.k_norm.weight[channels] *= FACTOR
        attention.q_norm.weight[channels] /= FACTOR
        return
    _multiply(attention.k_proj, _rows(0, channels, head_dim), FACTOR)
    for query_head in range(groups):  # the queries that read key/value head 0
        _multiply(attention.q_proj, _rows(query_head, channels, head_dim), 1 / FACTOR)


def _scale_value(attention: torch.nn.Module, head_dim: int, groups: int, channels: slice | list[int]) -> None:
    _multiply(attention.v_proj, _rows(0, channels, head_dim), FACTOR)
    for query_head in range(groups):
        attention.o_proj.weight[:, _rows(query_head, channels, head_dim)] /= FACTOR


def key_pair(model: PreTrainedModel) -> PreTrainedModel:
    """Two rotary channels of one key head are large; of every head where keys are normalized."""
    return _scaled_twin(model, lambda a, d, g: _scale_key(a, d, g, [d // 4, d // 4 + d // 2]))


def key_head(model: PreTrainedModel) -> PreTrainedModel:
    """One key head is large."""
    return _scaled_twin(model, lambda a, d, g: _scale_key(a, d, g, slice(None)))


def value_head(model: PreTrainedModel) -> PreTrainedModel:
    """One value head is large."""
    return _scaled_twin(model, lambda a, d, g: _scale_value(a, d, g, slice(None)))


def value_channel(model: PreTrainedModel) -> PreTrainedModel:
    """One channel of one value head is large."""
    return _scaled_twin(model, lambda a, d, g: _scale_value(a, d, g, [d // 3]))


TWINS: dict[str, Callable[[PreTrainedModel], PreTrainedModel]] = {
    "plain": lambda model: model,
    "key_pair": key_pair,
    "key_head": key_head,
    "value_head": value_head,
    "value_channel": value_channel,
}


def twins_of(model: PreTrainedModel) -> list[str]:
    """The names of the twins that a model has."""
    normalized = hasattr(model.model.layers[0].self_attn, "k_norm")
    return [name for name in TWINS if not (normalized and name == "key_head")]
