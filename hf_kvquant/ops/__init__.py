"""The operations of the cache, as torch operators: every backend implements these signatures, torch picks one.

Shapes: B sequences, Hq query heads, H key/value heads, T new tokens, D head_dim (K and V may differ), P pages,
S page_size, N columns of the page table.

A sequence has seen `seq_lens[b]` tokens. Token p lies in page `page_table[b, (p // S) % N]`, at slot `p % S`: the table
is a ring, so a layer with a sliding window holds only the pages of its window, and for any other layer N is large
enough that nothing wraps. (There is no separate slot_mapping: it is what these two tensors say.)

    x ≈ code * scale * token_scale + zero

`scale` and `zero` are fp32 `[1 | H, 1 | D]`; `token_scale` is bf16 `[P, H, S]`, one number per token and head. Any may
be missing. Inside attention: q·k · softmax_scale -> softcap -> mask -> softmax with sinks -> ·v.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import torch

from .. import huge_pages
from . import cpu, gpu, others, reference
from .checks import check_attention, check_page_table, check_read, check_write


@dataclass(eq=False)
class PagedTensor:
    """K or V of one layer in pages.

    Attributes:
        pages: `[P, H, S, D]`, uint8 for the 8-bit formats, the model's dtype for `model`.
        format: name of the storage format.
        scale, zero: fp32 `[1 | H, 1 | D]` or None.
        token_scale: bf16 `[P, H, S]` for dynamic quantization, else None.
        passed: what the last calls that have passed the operators' checks were like; forgotten with every change.
    """

    pages: torch.Tensor
    format: str
    scale: torch.Tensor | None = None
    zero: torch.Tensor | None = None
    token_scale: torch.Tensor | None = None
    passed: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def __setattr__(self, name: str, value: object) -> None:
        if name in ("scale", "zero") and isinstance(value, torch.Tensor):
            value = value.contiguous()  # as kernels read them
        object.__setattr__(self, name, value)
        if name != "passed":
            object.__setattr__(self, "passed", {})

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedTensor:
        # A tensor's own copy has all the memory that its huge pages were cut from, and does not begin where one does.
        return replace(
            self,
            pages=huge_pages.copy(self.pages),
            scale=copy.deepcopy(self.scale, memo),
            zero=copy.deepcopy(self.zero, memo),
            token_scale=None if self.token_scale is None else huge_pages.copy(self.token_scale),
        )


__all__ = ["PagedTensor", "channel_absmax", "check_page_table", "paged_attention", "read_pages", "write_kv"]

_LIBRARY = torch.library.Library("hf_kvquant", "DEF")
_LIBRARY.define(
    "write_kv(Tensor key, Tensor value, Tensor page_table, Tensor seq_lens,"
    " Tensor(a!) k_pages, str k_format, Tensor? k_scale, Tensor? k_zero, Tensor(b!)? k_token_scale,"
    " Tensor(c!) v_pages, str v_format, Tensor? v_scale, Tensor? v_zero, Tensor(d!)? v_token_scale,"
    " Tensor(e!)? clipped) -> ()"
)
_ATTENTION = (
    "(Tensor query, Tensor page_table, Tensor seq_lens,"
    " Tensor k_pages, str k_format, Tensor? k_scale, Tensor? k_zero, Tensor? k_token_scale,"
    " Tensor v_pages, str v_format, Tensor? v_scale, Tensor? v_zero, Tensor? v_token_scale,"
    " Tensor? attn_mask, int mask_start, Tensor? sinks, float softmax_scale, float? softcap, int? window, bool causal)"
)
_LIBRARY.define(f"paged_attention{_ATTENTION} -> Tensor")
# Apart, because compilers take no operator that both returns a tensor and writes to one.
_LIBRARY.define(f"paged_attention_lse{_ATTENTION} -> (Tensor, Tensor)")
_LIBRARY.define(
    "read_pages(Tensor page_ids, Tensor pages, str format, Tensor? scale, Tensor? zero, Tensor? token_scale,"
    " ScalarType dtype) -> Tensor"
)
_LIBRARY.define("channel_absmax(Tensor x, Tensor? valid) -> Tensor")


def _with_lse(attend: Callable[..., torch.Tensor]) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    def paged_attention_lse(query: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        lse = query.new_empty(query.shape[:3], dtype=torch.float32)
        return attend(query, *args, lse), lse

    return paged_attention_lse


_LIBRARY.impl("write_kv", others.write_kv, "CompositeExplicitAutograd")
_LIBRARY.impl("paged_attention", others.paged_attention, "CompositeExplicitAutograd")
_LIBRARY.impl("paged_attention_lse", _with_lse(others.paged_attention), "CompositeExplicitAutograd")
_LIBRARY.impl("read_pages", others.read_pages, "CompositeExplicitAutograd")
_LIBRARY.impl("channel_absmax", reference.channel_absmax, "CompositeExplicitAutograd")
_LIBRARY.impl("write_kv", cpu.write_kv, "CPU")
_LIBRARY.impl("paged_attention", cpu.paged_attention, "CPU")
_LIBRARY.impl("paged_attention_lse", _with_lse(cpu.paged_attention), "CPU")
_LIBRARY.impl("read_pages", cpu.read_pages, "CPU")
_LIBRARY.impl("channel_absmax", cpu.channel_absmax, "CPU")
_LIBRARY.impl("write_kv", gpu.write_kv, "CUDA")
_LIBRARY.impl("paged_attention", gpu.paged_attention, "CUDA")
_LIBRARY.impl("paged_attention_lse", _with_lse(gpu.paged_attention), "CUDA")
_LIBRARY.impl("read_pages", gpu.read_pages, "CUDA")


@torch.library.register_fake("hf_kvquant::write_kv")
def _(*args: object) -> None:
    return None


@torch.library.register_fake("hf_kvquant::paged_attention")
def _(query: torch.Tensor, page_table: object, seq_lens: object, *args: object) -> torch.Tensor:
    v_pages = args[5]
    assert isinstance(v_pages, torch.Tensor)  # noqa: S101 - position in the schema above
    return query.new_empty(*query.shape[:3], v_pages.shape[-1])


@torch.library.register_fake("hf_kvquant::paged_attention_lse")
def _(query: torch.Tensor, *args: object) -> tuple[torch.Tensor, torch.Tensor]:
    v_pages = args[7]
    assert isinstance(v_pages, torch.Tensor)  # noqa: S101 - position in the schema above
    output = query.new_empty(*query.shape[:3], v_pages.shape[-1])
    return output, query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.register_fake("hf_kvquant::read_pages")
def _(
    page_ids: torch.Tensor, pages: torch.Tensor, format: object, scale: object, zero: object, token_scale: object,
    dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    _, num_heads, page_size, head_dim = pages.shape
    return pages.new_empty(page_ids.shape[0], num_heads, page_ids.shape[1] * page_size, head_dim, dtype=dtype)


@torch.library.register_fake("hf_kvquant::channel_absmax")
def _(x: torch.Tensor, valid: object) -> torch.Tensor:
    return x.new_empty(x.shape[1], x.shape[3], dtype=torch.float32)


_EAGER = {"cpu": cpu, "cuda": gpu}


def _eager(tensor: torch.Tensor) -> ModuleType | None:
    """What to call without torch's dispatcher, which costs as much as a small call where nothing listens to it."""
    if torch.compiler.is_compiling() or type(tensor) is not torch.Tensor or torch._C._len_torch_dispatch_stack():
        return None
    return _EAGER.get(tensor.device.type)


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
        page_table: int32 `[B, N]`, with room for the new tokens: T is at most N * S.
        seq_lens: int32 `[B]`, lengths that already count the new tokens.
        clipped: int64 `[2]`, contiguous, incremented by how many numbers of K and V did not fit under static scales,
            NaN among them; or None.

    Raises ValueError naming the argument for shapes and dtypes that do not go together.
    """
    implementation = _eager(key)
    check_write(key, value, k, v, page_table, seq_lens, clipped, is_eager=implementation is not None)
    write = torch.ops.hf_kvquant.write_kv if implementation is None else implementation.write_kv
    write(
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
    lse: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of the newest T tokens of every sequence over all its pages; returns `[B, Hq, T, Dv]` in query's dtype.

    Args:
        query: `[B, Hq, T, Dk]`, Hq a multiple of H; tokens `seq_lens[b] - T ... seq_lens[b] - 1`. Lengths below T, and
            below 0, mean that queries stand before the first token; if causal, those see nothing.
        k, v, page_table, seq_lens: as written by `write_kv`.
        softmax_scale: factor on q·k.
        attn_mask: bool (True attends) or float (added), `[1 | B, 1 | Hq, T, M]`; column j is token `mask_start + j`;
            tokens outside its columns are not attended to.
        sinks: `[Hq]`, a logit per head that takes part in the softmax and has no value.
        softcap: logits become `softcap * tanh(logits / softcap)` before the mask.
        window: a token attends to itself and the `window - 1` before it, with 0 to nothing; earlier pages are not read.
        causal: whether later tokens are hidden; applies on top of the mask.
        lse: fp32 `[B, Hq, T]`, contiguous; is overwritten with the natural logarithm of the sum of exp(logit) over what
            a query sees, `sinks` included, -inf if that is nothing. With it, attention over parts can be merged.

    A query that sees nothing gets zeros.

    Raises ValueError naming the argument for shapes and dtypes that do not go together.
    """
    implementation = _eager(query)
    check_attention(
        query, k, v, page_table, seq_lens, attn_mask, sinks, window, lse, is_eager=implementation is not None
    )
    arguments = (
        query, page_table, seq_lens,
        k.pages, k.format, k.scale, k.zero, k.token_scale,
        v.pages, v.format, v.scale, v.zero, v.token_scale,
        attn_mask, mask_start, sinks, softmax_scale, softcap, window, causal,
    )  # fmt: skip
    if implementation is not None:
        return implementation.paged_attention(*arguments, lse)
    if lse is None:
        return torch.ops.hf_kvquant.paged_attention(*arguments)
    output, computed = torch.ops.hf_kvquant.paged_attention_lse(*arguments)
    lse.copy_(computed)
    return output


def read_pages(side: PagedTensor, page_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The pages `page_ids` `[B, N]` as dense numbers `[B, H, N * S, D]`; slots never written give anything.

    Raises ValueError naming the argument for shapes and dtypes that do not go together.
    """
    implementation = _eager(side.pages)
    check_read(side, page_ids, is_eager=implementation is not None)
    read = torch.ops.hf_kvquant.read_pages if implementation is None else implementation.read_pages
    return read(page_ids, side.pages, side.format, side.scale, side.zero, side.token_scale, dtype)


def channel_absmax(x: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    """Absolute maxima fp32 `[H, D]` of `x` `[B, H, T, D]`, of finite numbers only; 0 where there are none.

    Args:
        valid: bool `[B, T]`, False where a token does not count.

    Raises ValueError for shapes and dtypes that do not go together.
    """
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} {list(x.shape)}; expected floating point [B, H, T, D]")
    if valid is not None and (valid.dtype != torch.bool or valid.shape != (x.shape[0], x.shape[2])):
        raise ValueError(f"valid is {valid.dtype} {list(valid.shape)}; expected bool [{x.shape[0]}, {x.shape[2]}]")
    if valid is not None and valid.device != x.device:
        raise ValueError(f"valid is on {valid.device}; x is on {x.device}")
    return torch.ops.hf_kvquant.channel_absmax(x, valid)
