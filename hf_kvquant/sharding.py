"""Models that are spread over processes (tensor and pipeline parallelism): which part is this process's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch

T = TypeVar("T")


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


def head_shard(model: torch.nn.Module) -> HeadShard | None:
    """Under tensor parallelism this process's place; else None."""
    place = _place(model, "tp")
    return None if place is None else HeadShard(*place)


def part_of_model(model: torch.nn.Module) -> tuple[int, int]:
    """Which part of each token's keys and values this process has, and how many parts there are.

    `(0, 1)` unless transformers has spread heads or layers over processes (tensor and pipeline parallelism).
    """
    part, num_parts = 0, 1
    for kind in ("pp", "tp"):
        rank, size, _ = _place(model, kind) or (0, 1, None)
        part, num_parts = part * size + rank, num_parts * size
    return part, num_parts


def of_all_stages(model: torch.nn.Module, layers: list[T | None]) -> list[T | None]:
    """`layers` with what other processes know of theirs (pipeline parallelism). All of them have to call this."""
    place = _place(model, "pp")
    if place is None:
        return layers
    _, size, group = place
    known: list[Any] = [None] * size
    torch.distributed.all_gather_object(known, layers, group=group)
    return [next((layer for layer in same if layer is not None), None) for same in zip(*known, strict=True)]


def _place(model: torch.nn.Module, kind: str) -> tuple[int, int, Any] | None:
    """Rank, number and group of the processes along one dimension (`tp`, `pp`); None where there is one process."""
    mesh: Any = getattr(model, "_device_mesh", None)
    names = () if mesh is None else mesh.mesh_dim_names or ("tp",)  # the deprecated `tp_plan=` gives it no name
    if kind not in names:
        return None
    dim = names.index(kind)
    return None if mesh.shape[dim] == 1 else (mesh.get_local_rank(dim), mesh.shape[dim], mesh.get_group(dim))
