"""Models that are spread over processes (tensor and pipeline parallelism): which part is this process's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


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


def head_shard(model: torch.nn.Module) -> HeadShard | None:
    """Under tensor parallelism this process's place; else None."""
    mesh: Any = getattr(model, "_device_mesh", None)
    dims = [dim for dim, name in enumerate(_names(mesh)) if name == "tp"]
    if not dims or mesh.shape[dims[0]] == 1:
        return None
    return HeadShard(mesh.get_local_rank(dims[0]), mesh.shape[dims[0]], mesh.get_group(dims[0]))


def part_of_model(model: torch.nn.Module) -> tuple[int, int]:
    """Which part of each token's keys and values this process has, and how many parts there are.

    `(0, 1)` unless transformers has spread heads or layers over processes (tensor and pipeline parallelism).
    """
    mesh: Any = getattr(model, "_device_mesh", None)
    part, num_parts = 0, 1
    for dim, name in enumerate(_names(mesh)):
        if name in ("pp", "tp"):
            size = mesh.shape[dim]
            part, num_parts = part * size + mesh.get_local_rank(dim), num_parts * size
    return part, num_parts


def _names(mesh: Any) -> Sequence[str]:
    """What each dimension of a mesh of processes is for; older versions make tensor parallelism's without names."""
    if mesh is None:
        return ()
    return mesh.mesh_dim_names or ("tp",) * mesh.ndim
