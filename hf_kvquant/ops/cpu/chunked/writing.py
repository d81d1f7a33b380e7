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
    if all(factor is None for factor in (*k[2:4], *v[2:4])):
        y = torch.cat((key, value)).to(torch.float32)
    else:
        y = torch.cat((reference.in_code_units(key, *k[2:4]), reference.in_code_units(value, *v[2:4])))
    codes, token_scales = reference.quantize_tokens(y, get_format(k[1]))
    pages, slots = newest_slots(page_table, seq_lens, key.shape[2], k[0])
    for store, x in zip((k[0], v[0], k[4], v[4]), (*codes.chunk(2), *token_scales.chunk(2)), strict=True):
        store[pages, :, slots] = x.transpose(1, 2)
    return True


def newest_slots(
    page_table: torch.Tensor, seq_lens: torch.Tensor, num_tokens: int, store: torch.Tensor
) -> tuple[torch.Tensor | int, torch.Tensor | int]:
    """Pages and slots `[B, T]`; of a single token as numbers, which take no operators.

    Raises ValueError for pages that `store` does not have.
    """
    num_pages, page_size = store.shape[0], store.shape[2]
    if len(page_table) == num_tokens == 1:
        position = int(seq_lens[0]) - 1
        page = int(page_table[0, position // page_size % page_table.shape[1]])
        newest: tuple[torch.Tensor | int, torch.Tensor | int] = page, position % page_size
        lowest = highest = page
    else:
        newest = pages, _ = reference.newest_slots(page_table, seq_lens, num_tokens, page_size)
        lowest, highest = (int(x) for x in pages.aminmax())
    if not 0 <= lowest <= highest < num_pages:
        raise ValueError(f"page_table names a page outside 0 ... {num_pages - 1}: {page_table.tolist()}")
    return newest
