"""Training and evaluation mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def evaluating(*models: torch.nn.Module) -> Iterator[None]:
    """The models in evaluation mode; afterwards each of their modules is in the mode that it was in."""
    before = [(model, model.training) for model in models]
    of_modules = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model, was_training in before:
            model.train(was_training)  # which may do more than set this
        for module, was_training in of_modules:
            module.training = was_training
