"""Random pages to measure the operators on."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from hf_kvquant.formats import get_format
from hf_kvquant.ops import PagedTensor


@dataclass(frozen=True)
class Shape:
    """Heads, head_dim and page size; the default is that of Llama 3 8B."""

    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16

    @property
    def key(self) -> dict[str, int]:
        return {"q_heads": self.num_q_heads, "kv_heads": self.num_kv_heads, "head_dim": self.head_dim,
                "page_size": self.page_size}  # fmt: skip


@dataclass
class Pages:
    """K and V of one layer: `batch` sequences of `length` tokens, in shuffled pages."""

    k: PagedTensor
    v: PagedTensor
    page_table: torch.Tensor
    seq_lens: torch.Tensor
    length: int
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        """Bytes that attention has to read: those of the tokens held, with their scales."""
        batch = self.page_table.shape[0]
        self.nbytes = 0
        for side in (self.k, self.v):
            _, num_heads, _, head_dim = side.pages.shape
            self.nbytes += batch * self.length * num_heads * head_dim * side.pages.element_size()
            if side.token_scale is not None:
                self.nbytes += batch * self.length * num_heads * side.token_scale.element_size()


def make_pages(
    shape: Shape,
    batch: int,
    length: int,
    format_name: str,
    scales: str,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    shuffled: bool = True,
) -> Pages:
    """Pages full of normally distributed numbers.

    Args:
        format_name: of K and V.
        scales: `dynamic`, `equalized` (dynamic over a static scale per channel), `tensor`, `head` or `channel`.
        dtype: of unquantized pages.
        shuffled: whether pages lie anywhere, or one after the other.
    """
    columns = -(-length // shape.page_size)
    pool = batch * columns
    order = torch.randperm(pool, device=device) if shuffled else torch.arange(pool, device=device)
    k, v = (_side(shape, pool, format_name, scales, device, dtype) for _ in range(2))
    seq_lens = torch.full((batch,), length, dtype=torch.int32, device=device)
    return Pages(k, v, order.to(torch.int32).view(batch, columns), seq_lens, length)


def _side(
    shape: Shape, pool: int, format_name: str, scales: str, device: torch.device, dtype: torch.dtype
) -> PagedTensor:
    row = get_format(format_name)
    sizes = (shape.num_kv_heads, shape.page_size, shape.head_dim)
    # A stretch of random numbers, as often as it takes: random numbers in fp32 would need four times the memory.
    stretch = min(pool, max(1, 2**22 // (sizes[0] * sizes[1] * sizes[2])))
    numbers = torch.randn(stretch, *sizes, device=device)
    pages = torch.empty(pool, *sizes, dtype=row.storage_dtype or dtype, device=device)
    stored = row.encode(numbers * (row.qmax / 4)) if row.is_quantized else numbers.to(dtype)
    for start in range(0, pool, stretch):
        pages[start : start + stretch] = stored[: pool - start]
    if not row.is_quantized:
        return PagedTensor(pages, format_name)
    unit = 4 / row.qmax
    side = PagedTensor(pages, format_name)
    if scales in ("dynamic", "equalized"):
        token_scale = torch.rand(pool, *sizes[:2], device=device) * unit + unit / 2
        side.token_scale = token_scale.to(torch.bfloat16)
        unit = 1.0
    if scales != "dynamic":
        heads = 1 if scales == "tensor" else shape.num_kv_heads
        channels = shape.head_dim if scales in ("channel", "equalized") else 1
        side.scale = (torch.rand(heads, channels, device=device) + 0.5) * unit
    return side


def make_query(shape: Shape, batch: int, num_tokens: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """`[B, Hq, T, D]` as a model's projection gives it: strided."""
    query = torch.randn(batch, num_tokens, shape.num_q_heads, shape.head_dim, device=device, dtype=dtype)
    return query.transpose(1, 2)
