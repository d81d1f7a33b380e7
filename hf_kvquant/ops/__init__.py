"""The operations of the cache, as torch operators: every backend implements these signatures, torch picks one.

Shapes: B sequences, Hq query heads, H key/value heads, T new tokens, D head_dim (K and V may differ), P pages,
S page_size, N columns of the page table.

A sequence has seen `seq_lens[b]` tokens. Token p lies in page `page_table[b, (p // S) % N]`, at slot `p % S`: the table
is a ring, so a layer with a sliding window holds only the pages of its window, and for any other layer N is large
enough that nothing wraps. (There is no separate slot_mapping: it is what these two tensors say.)

    x ≈ code * scale * token_scale + zero

`scale` and `zero` are fp32 `[1 | H, 1 | D]`; `token_scale` is bf16 `[P, H, S]`, one number a token and head. Any may be
missing. Inside attention: q·k · softmax_scale -> softcap -> mask -> softmax with sinks -> ·v.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..formats import get_format
from . import cpu, gpu, reference


@dataclass(eq=False)
class PagedTensor:
    """K or V of one layer in pages.

    Attributes:
        pages: `[P, H, S, D]`, uint8 for the 8-bit formats, the model's dtype for `model`.
        format: name of the storage format.
        scale, zero: fp32 `[1 | H, 1 | D]` or None.
        token_scale: bf16 `[P, H, S]` for dynamic quantization, else None.
    """

    pages: torch.Tensor
    format: str
    scale: torch.Tensor | None = None
    zero: torch.Tensor | None = None
    token_scale: torch.Tensor | None = None


_LIBRARY = torch.library.Library("hf_kvquant", "DEF")
_LIBRARY.define(
    "write_kv(Tensor key, Tensor value, Tensor page_table, Tensor seq_lens,"
    " Tensor(a!) k_pages, str k_format, Tensor? k_scale, Tensor? k_zero, Tensor(b!)? k_token_scale,"
    " Tensor(c!) v_pages, str v_format, Tensor? v_scale, Tensor? v_zero, Tensor(d!)? v_token_scale,"
    " Tensor(e!)? clipped) -> ()"
)
_LIBRARY.define(
    "paged_attention(Tensor query, Tensor page_table, Tensor seq_lens,"
    " Tensor k_pages, str k_format, Tensor? k_scale, Tensor? k_zero, Tensor? k_token_scale,"
    " Tensor v_pages, str v_format, Tensor? v_scale, Tensor? v_zero, Tensor? v_token_scale,"
    " Tensor? attn_mask, int mask_start, Tensor? sinks, float softmax_scale, float? softcap, int? window, bool causal)"
    " -> Tensor"
)
_LIBRARY.define(
    "read_pages(Tensor page_ids, Tensor pages, str format, Tensor? scale, Tensor? zero, Tensor? token_scale,"
    " ScalarType dtype) -> Tensor"
)
_LIBRARY.impl("write_kv", reference.write_kv, "CompositeExplicitAutograd")
_LIBRARY.impl("paged_attention", reference.paged_attention, "CompositeExplicitAutograd")
_LIBRARY.impl("read_pages", reference.read_pages, "CompositeExplicitAutograd")
_LIBRARY.impl("write_kv", cpu.write_kv, "CPU")
_LIBRARY.impl("paged_attention", cpu.paged_attention, "CPU")
_LIBRARY.impl("write_kv", gpu.write_kv, "CUDA")
_LIBRARY.impl("paged_attention", gpu.paged_attention, "CUDA")
_LIBRARY.impl("read_pages", gpu.read_pages, "CUDA")


@torch.library.register_fake("hf_kvquant::write_kv")
def _(*args: object) -> None:
    return None


@torch.library.register_fake("hf_kvquant::paged_attention")
def _(query: torch.Tensor, page_table: object, seq_lens: object, *args: object) -> torch.Tensor:
    v_pages = args[5]
    assert isinstance(v_pages, torch.Tensor)  # noqa: S101 - position in the schema above
    return query.new_empty(*query.shape[:3], v_pages.shape[-1])


@torch.library.register_fake("hf_kvquant::read_pages")
def _(
    page_ids: torch.Tensor, pages: torch.Tensor, format: object, scale: object, zero: object, token_scale: object,
    dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    _, num_heads, page_size, head_dim = pages.shape
    return pages.new_empty(page_ids.shape[0], num_heads, page_ids.shape[1] * page_size, head_dim, dtype=dtype)


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    k: PagedTensor,
    v: PagedTensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    clipped: torch.Tensor | None = None,
) -> None:
    """Quantize the newest T tokens of every sequence and scatter them into their pages, in place.

    Args:
        key, value: `[B, H, T, D]`, any strides; they are tokens `seq_lens[b] - T ... seq_lens[b] - 1`.
        k, v: where they go; pages, and dynamic token scales, are written.
        page_table: int32 `[B, N]`.
        seq_lens: int32 `[B]`, lengths that already count the new tokens.
        clipped: int64 `[2]`, incremented by how many numbers of K and V did not fit under static scales, NaN among
            them; or None.

    Raises ValueError naming the argument for shapes and dtypes that do not go together.
    """
    _check_write(key, value, k, v, page_table, seq_lens, clipped)
    torch.ops.hf_kvquant.write_kv(
        key, value, page_table, seq_lens,
        k.pages, k.format, k.scale, k.zero, k.token_scale,
        v.pages, v.format, v.scale, v.zero, v.token_scale,
        clipped,
    )  # fmt: skip


def paged_attention(
    query: torch.Tensor,
    k: PagedTensor,
    v: PagedTensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    softmax_scale: float,
    attn_mask: torch.Tensor | None = None,
    mask_start: int = 0,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
    window: int | None = None,
    causal: bool = True,
) -> torch.Tensor:
    """Attention of the newest T tokens of every sequence over all its pages; returns `[B, Hq, T, Dv]` in query's dtype.

    Args:
        query: `[B, Hq, T, Dk]`, Hq a multiple of H; tokens `seq_lens[b] - T ... seq_lens[b] - 1`.
        k, v, page_table, seq_lens: as written by `write_kv`.
        softmax_scale: factor on q·k.
        attn_mask: bool (True attends) or float (added), `[1 | B, 1 | Hq, T, M]`; column j is token `mask_start + j`;
            tokens outside its columns are not attended to.
        sinks: `[Hq]`, a logit per head that takes part in the softmax and has no value.
        softcap: logits become `softcap * tanh(logits / softcap)` before the mask.
        window: a token attends to itself and the `window - 1` before it; earlier pages are not read.
        causal: whether later tokens are hidden; applies on top of the mask.

    Raises ValueError naming the argument for shapes and dtypes that do not go together.
    """
    _check_attention(query, k, v, page_table, seq_lens, attn_mask, sinks)
    return torch.ops.hf_kvquant.paged_attention(
        query, page_table, seq_lens,
        k.pages, k.format, k.scale, k.zero, k.token_scale,
        v.pages, v.format, v.scale, v.zero, v.token_scale,
        attn_mask, mask_start, sinks, softmax_scale, softcap, window, causal,
    )  # fmt: skip


def read_pages(side: PagedTensor, page_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The pages `page_ids` `[B, N]` as dense numbers `[B, H, N * S, D]`; slots never written give anything.

    Raises ValueError for page ids of another shape or dtype.
    """
    if page_ids.ndim != 2 or page_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"page_ids is {page_ids.dtype} {list(page_ids.shape)}; expected int32 or int64 [B, N]")
    return torch.ops.hf_kvquant.read_pages(
        page_ids, side.pages, side.format, side.scale, side.zero, side.token_scale, dtype
    )


# Messages are only put together when they are needed: these run in every layer of every step.


def _check_dtype(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        raise ValueError(f"{name} is {tensor.dtype}; expected {dtype}")


def _check_shape(name: str, tensor: torch.Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name} is {list(tensor.shape)}; expected {list(expected)}")


def _check_paged(name: str, side: PagedTensor, num_heads: int, head_dim: int) -> None:
    row, pages = get_format(side.format), side.pages
    if pages.ndim != 4 or pages.shape[1] != num_heads or pages.shape[3] != head_dim:
        raise ValueError(f"{name}.pages is {list(pages.shape)}; expected [P, {num_heads}, S, {head_dim}]")
    if row.storage_dtype is not None and pages.dtype != row.storage_dtype:
        raise ValueError(f"{name}.pages is {pages.dtype}; {row.name} is stored as {row.storage_dtype}")
    for field in ("scale", "zero"):
        tensor = getattr(side, field)
        if tensor is None:
            continue
        if tensor.ndim != 2 or tensor.shape[0] not in (1, num_heads) or tensor.shape[1] not in (1, head_dim):
            expected = f"[1 or {num_heads}, 1 or {head_dim}]"
            raise ValueError(f"{name}.{field} is {list(tensor.shape)}; expected {expected}")
        _check_dtype(f"{name}.{field}", tensor, torch.float32)
    if side.token_scale is not None:
        _check_shape(f"{name}.token_scale", side.token_scale, tuple(pages.shape[:3]))
        _check_dtype(f"{name}.token_scale", side.token_scale, torch.bfloat16)


def _check_pair(k: PagedTensor, v: PagedTensor) -> None:
    if k.pages.shape[:3] != v.pages.shape[:3]:
        shapes = f"k.pages is {list(k.pages.shape)} and v.pages is {list(v.pages.shape)}"
        raise ValueError(f"{shapes}; both must be [P, H, S, D]")


def _check_table(batch_size: int, page_table: torch.Tensor, seq_lens: torch.Tensor) -> None:
    if page_table.ndim != 2 or page_table.shape[0] != batch_size:
        raise ValueError(f"page_table is {list(page_table.shape)}; expected [{batch_size}, N]")
    _check_shape("seq_lens", seq_lens, (batch_size,))
    _check_dtype("page_table", page_table, torch.int32)
    _check_dtype("seq_lens", seq_lens, torch.int32)


def _check_write(
    key: torch.Tensor,
    value: torch.Tensor,
    k: PagedTensor,
    v: PagedTensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    clipped: torch.Tensor | None,
) -> None:
    if key.ndim != 4 or value.ndim != 4 or key.shape[:3] != value.shape[:3]:
        raise ValueError(f"key is {list(key.shape)} and value is {list(value.shape)}; both must be [B, H, T, D]")
    _check_paged("k", k, key.shape[1], key.shape[3])
    _check_paged("v", v, value.shape[1], value.shape[3])
    _check_pair(k, v)
    _check_table(key.shape[0], page_table, seq_lens)
    if clipped is not None:
        _check_shape("clipped", clipped, (2,))
        _check_dtype("clipped", clipped, torch.int64)


def _check_attention(
    query: torch.Tensor,
    k: PagedTensor,
    v: PagedTensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    attn_mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> None:
    for name, tensor in (("query", query), ("k.pages", k.pages), ("v.pages", v.pages)):
        if tensor.ndim != 4:
            raise ValueError(f"{name} is {list(tensor.shape)}; expected four dimensions")
    batch_size, num_q_heads, num_tokens, head_dim = query.shape
    num_kv_heads = k.pages.shape[1]
    if num_q_heads % num_kv_heads:
        heads = f"its heads do not divide over {num_kv_heads} of keys and values"
        raise ValueError(f"query is {list(query.shape)}; {heads}")
    _check_paged("k", k, num_kv_heads, head_dim)
    _check_paged("v", v, num_kv_heads, v.pages.shape[3])
    _check_pair(k, v)
    _check_table(batch_size, page_table, seq_lens)
    if attn_mask is not None:
        fits = (
            attn_mask.ndim == 4
            and attn_mask.shape[0] in (1, batch_size)
            and attn_mask.shape[1] in (1, num_q_heads)
            and attn_mask.shape[2] == num_tokens
        )
        if not fits:
            expected = f"[1 or {batch_size}, 1 or {num_q_heads}, {num_tokens}, M]"
            raise ValueError(f"attn_mask is {list(attn_mask.shape)}; expected {expected}")
        if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
            raise ValueError(f"attn_mask is {attn_mask.dtype}; expected bool (True attends) or float (added)")
    if sinks is not None:
        _check_shape("sinks", sinks, (num_q_heads,))
