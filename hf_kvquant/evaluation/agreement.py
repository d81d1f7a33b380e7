"""What a model predicts over a cache, against what it predicts over the unquantized one."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Agreement:
    """What a model predicts over a cache, against what it predicts over the unquantized one.

    Attributes:
        perplexity: per token.
        kl_divergence: mean over tokens of KL(unquantized || this cache), in nats. Probabilities are fp32: 1e-7 of
            either sign is nothing.
        top1_agreement: share of tokens whose most likely successor is the same.
    """

    perplexity: float
    kl_divergence: float
    top1_agreement: float


class AgreementSums:
    """Sums over tokens, in double precision on the CPU."""

    def __init__(self) -> None:
        self._loss = self._divergence = 0.0
        self._same = self._count = 0

    def add(self, following: torch.Tensor, dense: torch.Tensor, logits: torch.Tensor) -> None:
        """Add tokens: what follows them `[T]`, and the logits `[T, vocabulary]` over the unquantized cache and ours."""
        expected, seen = dense.log_softmax(dim=-1), logits.log_softmax(dim=-1)
        weights = expected.exp()
        # Where a model rules a token out, both are minus infinity, and their difference is not a number.
        terms = torch.where(weights > 0, weights * (expected - seen), 0)
        self._divergence += terms.sum(dim=-1).cpu().double().sum().item()
        self._loss -= seen.gather(-1, following[:, None]).cpu().double().sum().item()
        self._same += int((dense.argmax(dim=-1) == logits.argmax(dim=-1)).sum())
        self._count += len(following)

    def agreement(self) -> Agreement:
        """The means. Raises ArithmeticError where the model's predictions are no numbers."""
        loss, divergence = self._loss / self._count, self._divergence / self._count
        if not math.isfinite(divergence) or not loss < math.log(sys.float_info.max):
            raise ArithmeticError(f"the predictions are no numbers: mean loss {loss}, KL divergence {divergence}")
        return Agreement(math.exp(loss), divergence, self._same / self._count)
