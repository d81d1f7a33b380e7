"""Heads that are shared out over processes (tensor parallelism): which of them are this process's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class HeadShard:
    """The place of this process among those that share the heads of every layer.

    Attributes:
        rank, size: which of how many; heads follow each other in the order of ranks.
        group: of `torch.distributed`.
    """

    rank: int
    size: int
    group: Any

    def own(self, scale: torch.Tensor, num_heads: int) -> torch.Tensor:
        """Of a scale of all heads, `[H]` or `[H, D]`, that of the `num_heads` that this process has."""
        return scale.chunk(self.size)[self.rank] if len(scale) == num_heads * self.size else scale

    def gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """`x` of every process, one behind the other. All of them have to call this."""
        parts = [torch.empty_like(x) for _ in range(self.size)]
        torch.distributed.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts, dim=dim)

    def __deepcopy__(self, memo: dict[int, Any]) -> HeadShard:
        return self


def head_shard(model: PreTrainedModel) -> HeadShard | None:
    """Where a model was loaded with a `tp_plan`, this process's place; else None."""
    size = getattr(model, "_tp_size", None) or 1
    if size == 1:
        return None
    mesh: Any = model._device_mesh
    if "tp" in (mesh.mesh_dim_names or ()):
        mesh = mesh["tp"]
    return HeadShard(mesh.get_local_rank(), size, mesh.get_group())
