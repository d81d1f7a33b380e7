"""What calibration keeps of any number of tokens, in bounded memory."""

from __future__ import annotations

import torch

from ..sharding import HeadShard


class Statistics:
    """What is kept of one side of one layer: the range of every channel, and a uniform sample of tokens."""

    def __init__(self, sample_tokens: int) -> None:
        self.low = torch.tensor(torch.inf, device="cpu")  # [H, D] with the first tokens
        self.high = torch.tensor(-torch.inf, device="cpu")
        self.num_unusable: torch.Tensor | int = 0
        self.sample: torch.Tensor | None = None  # [S, H, D], on the CPU
        self._sample_tokens = sample_tokens
        # The tokens with the largest of random numbers drawn one per token are a uniform sample of all that came by.
        self._draws = torch.empty(0, device="cpu")
        self._generator = torch.Generator().manual_seed(0)

    @property
    def num_heads(self) -> int:
        return self.largest.shape[0]

    @property
    def head_dim(self) -> int:
        return self.largest.shape[1]

    @property
    def largest(self) -> torch.Tensor:
        """The largest absolute value of every channel, `[H, D]`."""
        return torch.maximum(-self.low, self.high)

    def add(self, x: torch.Tensor) -> None:
        """`[N, H, D]` of N tokens."""
        usable = x.isfinite()
        self.num_unusable = self.num_unusable + (~usable).sum()  # read back once, at the end
        x = torch.where(usable, x, 0)
        low, high = (bound.to(torch.float32) for bound in x.aminmax(dim=0))
        self.low = torch.minimum(self.low.to(low.device), low)
        self.high = torch.maximum(self.high.to(high.device), high)
        if self._sample_tokens:
            self._add_to_sample(x)

    def join(self, shard: HeadShard) -> None:
        """Put the heads of all processes beside each other, each of which has seen the same tokens."""
        self.low, self.high = (shard.gather(bound, dim=0) for bound in (self.low, self.high))
        self.num_unusable = int(shard.gather(torch.as_tensor(self.num_unusable, device=self.low.device)[None], 0).sum())
        if self.sample is not None:
            self.sample = shard.gather(self.sample.to(self.low.device), dim=1).cpu()

    def _add_to_sample(self, x: torch.Tensor) -> None:
        draws = torch.cat([self._draws, torch.rand(x.shape[0], generator=self._generator, device="cpu")])
        num_old = len(self._draws)
        kept = draws.topk(min(self._sample_tokens, len(draws))).indices.sort().values
        new = x[(kept[kept >= num_old] - num_old).to(x.device)].cpu()
        self.sample = new if self.sample is None else torch.cat([self.sample[kept[kept < num_old]], new])
        self._draws = draws[kept]
