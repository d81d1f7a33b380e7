"""From statistics to a scale and a zero."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..formats import StorageFormat
from ..ops import reference
from ..rotary import RotaryLayout
from .statistics import Statistics

# A channel that calibration hardly moved counts for at least this share of its head's largest: later text may move it,
# and rounding it coarser than that costs nothing beside its neighbours.
_SHARE_OF_LARGEST = 1 / 64
_NOT_TURNED = RotaryLayout("none")
# Shares of the full range that the search for the smallest squared error tries.
_SHRINKS = tuple(1.0 - step / 40 for step in range(29))


@dataclass(frozen=True)
class Estimate:
    """Scale and zero from statistics: the middle of a range and half its width, per group of numbers.

    Groups are the whole tensor, a head, or a channel; ranges are `[1, 1]`, `[H, 1]` or `[H, D]`.
    """

    row: StorageFormat
    granularity: str
    estimator: str
    symmetric: bool
    percentile: float

    def __call__(
        self, statistics: Statistics, rotary: RotaryLayout = _NOT_TURNED
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        low, high = self._range(statistics)
        # Where positions turn what a key holds into other channels, its middle is 0 in the long run, and a channel
        # comes to hold what its partner did, both at positions that calibration may not have seen.
        turning = rotary.turning(statistics.head_dim)
        partners = rotary.partners(statistics.head_dim) if self.granularity == "channel" else None
        largest = torch.maximum(-low, high)
        if self.granularity != "channel":
            turning = turning.any()
        if partners:
            largest = torch.maximum(largest, largest[:, partners])
        if self.symmetric:
            middle, half = None, largest
        else:
            middle = torch.where(turning, 0.0, (low + high) / 2)
            half = torch.where(turning, largest, (high - low) / 2)
        half = self._never_zero(half)
        if self.estimator == "mse" and statistics.sample is not None:
            half = half * self._best_share(statistics.sample, half, middle, partners)
        if middle is None:
            return self._shaped(half / self.row.qmax), None
        if self.row.name != "int8":
            return self._shaped(half / self.row.qmax), self._shaped(middle)
        # Formats with integer zero points hold it exactly if it is a number of steps; half a step makes room for that.
        scale = half / (self.row.qmax - 0.5)
        return self._shaped(scale), self._shaped((middle / scale).round() * scale)

    def _range(self, statistics: Statistics) -> tuple[torch.Tensor, torch.Tensor]:
        if self.estimator == "percentile" and statistics.sample is not None:
            share = self.percentile / 100
            groups = self._grouped(statistics.sample.to(torch.float32))
            if self.symmetric:
                bound = _order_statistic(groups.abs(), share)
                return -bound, bound
            tail = (1 - share) / 2
            return -_order_statistic(-groups, 1 - tail), _order_statistic(groups, 1 - tail)
        low, high = statistics.low.cpu(), statistics.high.cpu()
        dims = {"tensor": (0, 1), "head": (1,), "channel": ()}[self.granularity]
        return (low.amin(dims, keepdim=True), high.amax(dims, keepdim=True)) if dims else (low, high)

    def _grouped(self, sample: torch.Tensor) -> torch.Tensor:
        """`[S, H, D]` as `[1 | H, 1 | D, numbers of a group]`."""
        if self.granularity == "tensor":
            return sample.flatten()[None, None]
        by_head = sample.transpose(0, 1)
        return by_head.flatten(1)[:, None] if self.granularity == "head" else by_head.transpose(1, 2)

    def _never_zero(self, half: torch.Tensor) -> torch.Tensor:
        largest = half.amax()
        if largest == 0:
            return torch.full_like(half, self.row.qmax)  # nothing but zeros: a scale of 1.0
        half = torch.where(half.amax(dim=1, keepdim=True) == 0, largest, half)
        return half.clamp(min=half.amax(dim=1, keepdim=True) * _SHARE_OF_LARGEST)

    def _best_share(
        self, sample: torch.Tensor, half: torch.Tensor, middle: torch.Tensor | None, partners: list[int] | None
    ) -> torch.Tensor:
        """Of each group, or each pair of channels, the share of `half` with the smallest squared error."""
        x = sample.to(torch.float32).transpose(0, 1)[None]  # [1, H, S, D]
        errors = []
        for share in _SHRINKS:
            scale = half * (share / self.row.qmax)
            codes, _, _ = reference.quantize(x, self.row.name, scale, middle, dynamic=False)
            difference = reference.dequantize(codes, self.row.name, scale, middle, None) - x
            of_groups = self._grouped(difference[0].transpose(0, 1)).square().sum(dim=-1)
            errors.append(of_groups + of_groups[:, partners] if partners else of_groups)
        return torch.tensor(_SHRINKS, device="cpu")[torch.stack(errors).argmin(dim=0)]

    def _shaped(self, per_group: torch.Tensor) -> torch.Tensor:
        """As `LayerScales` has it: `[1]`, `[H]` or `[H, D]`."""
        return per_group if self.granularity == "channel" else per_group.flatten()


def _order_statistic(groups: torch.Tensor, share: float) -> torch.Tensor:
    """Of the numbers in the last dimension the smallest that `share` of them do not exceed."""
    return groups.kthvalue(max(math.ceil(share * groups.shape[-1]), 1), dim=-1).values
