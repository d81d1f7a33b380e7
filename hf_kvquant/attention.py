"""The attention function and the mask function behind `attn_implementation="kvquant..."`."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.utils import logging

from .batching.layer import BatchedKV
from .dense import DenseOptions, attend_long_turn, causal_mask, dense_attention, is_long_turn, with_bias
from .handle import PagedKV
from .interface import adds_masks
from .sides import SIDES

logger = logging.get_logger(__name__)

NAMES = ("kvquant", "kvquant_fp8", "kvquant_fp8_e4m3", "kvquant_fp8_e5m2", "kvquant_int8")


def register() -> None:
    """Make the names known to transformers; its own entries stay as they are. Calling it again does nothing."""
    for name in NAMES:
        AttentionInterface.register(name, kvquant_attention)
        AttentionMaskInterface.register(name, kvquant_mask)


def kvquant_mask(*args: Any, config: PreTrainedConfig | None = None, **kwargs: Any) -> torch.Tensor | None:
    """transformers' mask for this attention: boolean, or None where causality says it all.

    A model part of which computes attention itself, whatever the configuration says, adds its mask to the logits and
    needs it always: it gets the mask of `eager`.
    """
    if config is not None and adds_masks(config):
        return eager_mask(*args, config=config, **kwargs)
    # Without a mask queries are the last tokens, as a model may drop others later. transformers leaves it out as well
    # where they are the first and nothing is behind them (a prompt in its static cache).
    if kwargs["q_length"] not in (1, kwargs["kv_length"]):
        kwargs["allow_is_causal_skip"] = False
    return sdpa_mask(*args, config=config, **kwargs)


def kvquant_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: Any,
    value: Any,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    indices: torch.Tensor | None = None,
    block_indices: torch.Tensor | None = None,
    output_attentions: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over pages if `key` and `value` are handles of our cache, else over dense tensors like `sdpa`.

    Args:
        query: `[B, Hq, T, D]`.
        key, value: handles, or `[B, H, L, D]`.
        attention_mask: `[B, 1 | Hq, T, L]`, bool (True attends) or float (added), or None.
        scaling: softmax scale, by default D ** -0.5.
        is_causal: by default the module's.
        softcap, s_aux, position_bias: as transformers' models pass them; sinks may also come as `sinks`,
            one per head or, over dense tensors only, one per head and token `[B, Hq, T, 1]`.
        indices, block_indices: the only keys `[B, T, N]`, or blocks of keys, that models with an index of their own let
            a token see.
        output_attentions: asks for the weights, which are never formed; a warning says so.

    Returns `[B, T, Hq, D]` and None for the weights.
    """
    if output_attentions:
        logger.warning_once(
            "kvquant attention does not support output_attentions=True, as it forms no weights. For these take "
            "attn_implementation='eager', with cache_implementation='kvquant' if they are to be over this cache."
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    sinks = s_aux if s_aux is not None else kwargs.pop("sinks", None)
    if sinks is not None and sinks.numel() == query.shape[1]:
        sinks = sinks.flatten()
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if indices is not None or block_indices is not None:
        attention_mask = _mask_of_chosen(module, query, key, attention_mask, indices, block_indices)
    if isinstance(key, BatchedKV):
        if attention_mask is not None or position_bias is not None or not is_causal:
            raise ValueError(
                f"layer {key.layer.index}: continuous batching over 8-bit pages takes causal attention without masks "
                "and position biases; use `generate` for this model"
            )
        options = DenseOptions(module, scaling, True, softcap, sinks, 0.0, {})
        return key.layer.attend(query, key, value, options), None
    if "read_index" in kwargs:
        raise ValueError(
            "continuous batching was begun under another attention than this model's, over a cache that kvquant "
            "attention cannot read; make a new manager under this attention"
        )
    why_dense = "the model passes one of keys and values dense"
    if isinstance(key, PagedKV) and isinstance(value, PagedKV):
        if key.layer.holds_tokens and key.layer.needs_tokens:
            _tell_padding(attention_mask, key)
        why_dense = ""
        if query.requires_grad or (dropout and module.training):
            why_dense = "gradients or dropout are asked for"
        elif sinks is not None and sinks.ndim > 1:
            why_dense = "sinks differ between tokens"
        if not why_dense and key.raw is None:
            plain = is_causal and attention_mask is None and softcap is None and sinks is None and position_bias is None
            if plain and _is_long_turn(query, key):
                k, v = (key.layer.read(side, query.shape[2]) for side in SIDES)
                return attend_long_turn(key.layer.rounded(query), k, v, scaling), None
            output = key.layer.attend(
                query,
                key.num_new,
                with_bias(attention_mask, position_bias),
                softmax_scale=scaling,
                sinks=sinks,
                softcap=softcap,
                causal=is_causal and attention_mask is None and key.num_new > 0,
                exact=key.exact,
            )
            return output.transpose(1, 2).contiguous(), None
    options = DenseOptions(module, scaling, is_causal, softcap, sinks, dropout, kwargs)
    return _attend_dense(query, key, value, attention_mask, position_bias, options, why_dense), None


def _attend_dense(
    query: torch.Tensor,
    key: Any,
    value: Any,
    mask: torch.Tensor | None,
    position_bias: torch.Tensor | None,
    options: DenseOptions,
    why_dense: str,
) -> torch.Tensor:
    """Attention over dense tensors, which handles become: of a fresh prompt the raw ones, else for the reason given."""
    if isinstance(key, PagedKV) and isinstance(value, PagedKV):
        if not why_dense and key.layer.num_prompt < key.num_new:
            return _attend_with_drafts(query, key, value, mask, position_bias, options)
        if key.raw is not None:
            key, value = key.raw, value.raw
            if key.device.type == "cpu":  # kernels for pages need heads in one piece, torch's like them
                key, value = key.contiguous(), value.contiguous()
    if isinstance(key, PagedKV):
        key = key.dense(why_dense)
    if isinstance(value, PagedKV):
        value = value.dense(why_dense)
    if mask is not None and mask.shape[-1] > key.shape[-2]:
        mask = mask[..., : key.shape[-2]]  # a mask for reserved pages over a fresh prompt
    return dense_attention(query, key, value, mask, position_bias, options)


def _attend_with_drafts(
    query: torch.Tensor,
    key: PagedKV,
    value: PagedKV,
    mask: torch.Tensor | None,
    position_bias: torch.Tensor | None,
    options: DenseOptions,
) -> torch.Tensor:
    """Attention of a fresh prompt with drafted tokens behind it.

    The drafts are checked against what later steps would see, which is the pages: else a run with speculation would
    not be the run without. Queries may lack the first tokens of the prompt.
    """
    num_drafts = key.num_new - key.layer.num_prompt
    prompt, rows, drafts = slice(key.layer.num_prompt), slice(-num_drafts), slice(-num_drafts, None)
    view = slice(key.num_new - key.layer.shape_of("k", num_drafts)[2], None)

    def part(x: Any, tokens: slice, columns: slice = slice(None)) -> Any:
        return None if x is None else x[..., tokens, columns]

    of_prompt = dense_attention(
        part(query, rows), part(key.raw, prompt), part(value.raw, prompt), part(mask, rows, prompt),
        part(position_bias, rows, prompt), options,
    )  # fmt: skip
    of_drafts = key.layer.attend(
        part(query, drafts),
        num_drafts,
        with_bias(part(mask, drafts, view), part(position_bias, drafts, view)),
        softmax_scale=options.scaling,
        sinks=options.sinks,
        softcap=options.softcap,
        causal=options.is_causal and mask is None,
        exact=key.exact,
    )
    return torch.cat([of_prompt, of_drafts.transpose(1, 2)], dim=1)


def _mask_of_chosen(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: Any,
    mask: torch.Tensor | None,
    indices: torch.Tensor | None,
    block_indices: torch.Tensor | None,
) -> torch.Tensor:
    """The mask without what a model's index leaves out, which the model itself does for transformers' own attention."""
    mask = causal_mask(query, key.shape[2]) if mask is None else mask
    if block_indices is not None:  # what a block is the model knows; a mask tells it more than positions do
        build = getattr(getattr(module, "indexer", None), "build_block_mask", None)
        if build is None:
            raise ValueError(
                f"{type(module).__name__} chooses blocks of keys, and has no `indexer.build_block_mask` to tell which "
                "keys those are. Keep the model's own attention and use this cache with it: "
                "attn_implementation='sdpa', cache_implementation='kvquant'"
            )
        mask = build(block_indices, mask, key.shape[2], query.dtype, query.device, None)
    if indices is not None:
        shape = (query.shape[0], query.shape[2], key.shape[2])
        seen = torch.zeros(shape, dtype=torch.bool, device=query.device).scatter(-1, indices.long(), True)[:, None]
        mask = mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, torch.finfo(mask.dtype).min)
    return mask


def _is_long_turn(query: torch.Tensor, key: PagedKV) -> bool:
    return (
        is_long_turn(query)
        and query.shape[2] == key.num_new
        and key.layer.window is None
        and key.layer.knows_length
        and key.layer.exact is None
    )


def _tell_padding(mask: torch.Tensor | None, key: PagedKV) -> None:
    """Before scales are taken from new tokens: those that no query may see are padding."""
    valid = None
    if mask is not None and mask.shape[-1] >= key.shape[-2]:
        valid = seen_tokens(mask.index_select(-1, key.layer.columns_of(key.num_new))).expand(key.shape[0], -1)
    key.layer.tell_padding(valid)
    if key.raw is not None:  # else they are written when pages are read
        key.layer.settle()


def seen_tokens(mask: torch.Tensor) -> torch.Tensor:
    """`[B, L]`, False for tokens that no query sees by a mask `[B, H, T, L]`, whose floats are added to the logits."""
    seen = mask > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask.bool()
    return seen.any(dim=2).any(dim=1)
