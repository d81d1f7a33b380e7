"""`write_kv` of dynamically quantized K and V, both at once."""

from __future__ import annotations

import torch

from ....formats import get_format
from ... import reference
from ..kernels import Side


def write_kv(
    key: torch.Tensor, value: torch.Tensor, page_table: torch.Tensor, seq_lens: torch.Tensor, k: Side, v: Side
) -> bool:
    """As the operator, bit for bit; returns False, with nothing done, if K and V do not go through one quantization."""
    if key.shape != value.shape or get_format(k[1]) != get_format(v[1]) or k[4] is None or v[4] is None:
        return False
    y = torch.stack([reference.in_code_units(key, *k[2:4]), reference.in_code_units(value, *v[2:4])])
    codes, token_scales = reference.quantize_tokens(y, get_format(k[1]))
    pages, slots = reference.newest_slots(page_table, seq_lens, key.shape[2], k[0].shape[2])
    if not 0 <= int(pages.min()) <= int(pages.max()) < len(k[0]):
        raise ValueError(f"page_table names a page outside 0 ... {len(k[0]) - 1}: {page_table.tolist()}")
    for store, scales, x, x_scales in zip((k[0], v[0]), (k[4], v[4]), codes, token_scales, strict=True):
        store[pages, :, slots] = x.transpose(1, 2)
        scales[pages, :, slots] = x_scales.transpose(1, 2)
    return True
