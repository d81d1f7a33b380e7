"""The query of attention over pages, rounded to fp8 as serving engines' fp8 attention rounds it (`q_dtype`).

Only the rounding is theirs: the numbers it gives go back into the query's dtype, and the operators compute with them as
with any query. It is an operator of its own, because compilers for older GPUs know no conversion to fp8.
"""

from __future__ import annotations

import torch

from .formats import TINY_SCALE, get_format

_LIBRARY = torch.library.Library("hf_kvquant", "FRAGMENT")
_LIBRARY.define("round_query(Tensor query, str format, Tensor? scale) -> Tensor")


def round_query(query: torch.Tensor, format_name: str, scale: torch.Tensor | None, where: str) -> torch.Tensor:
    """`query` `[B, Hq, T, D]` through the codes of an fp8 format and back, in its own dtype.

    Args:
        query: as the model gives it, in units of its own.
        format_name: of the codes.
        scale: fp32 `[1]` or `[Hq]`, numbers that do not fit are clamped; None for one per token and head, its largest
            number / the format's.
        where: the layer, for errors.

    Raises ValueError for a scale of another shape. Source: static scales as in vLLM (there one per KV head at most, the
    largest of its query heads') and in compressed-tensors.
    """
    if scale is not None and tuple(scale.shape) not in ((1,), (query.shape[1],)):
        raise ValueError(
            f"{where}: q_scale has shape {list(scale.shape)}, but this layer's query needs [1] or [{query.shape[1]}] "
            "(per query head); give such scales, or leave q_dtype out"
        )
    return torch.ops.hf_kvquant.round_query(query, format_name, scale)


def _round_query(query: torch.Tensor, format_name: str, scale: torch.Tensor | None) -> torch.Tensor:
    row = get_format(format_name)
    x = query.to(torch.float32)
    if scale is None:
        scale = (x.abs().amax(dim=-1, keepdim=True) * (1.0 / row.qmax)).clamp(min=TINY_SCALE)
    else:
        scale = scale[:, None, None]
    return torch.empty_like(query).copy_(row.decode(row.encode(x * (1.0 / scale))) * scale)


_LIBRARY.impl("round_query", _round_query, "CompositeExplicitAutograd")


@torch.library.register_fake("hf_kvquant::round_query")
def _(query: torch.Tensor, format_name: str, scale: object) -> torch.Tensor:
    return torch.empty_like(query)
