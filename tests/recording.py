"""CUDA graphs for devices that have none: what was done to tensors is done again, without the Python around it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recording(TorchDispatchMode):
    """Keeps every operation with the tensors that it read and made.

    Attributes:
        num_replays: how often it was done again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_replays = 0
        self._done: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self._done.append((func, args, kwargs or {}, found))
        return found

    def replay(self) -> None:
        """Do it again, in whatever mode: results come to lie where those of the first time did."""
        self.num_replays += 1
        with torch.inference_mode():
            for func, args, kwargs, before in self._done:
                read = {_memory(x) for x in _tensors((args, kwargs))}
                for old, new in zip(_tensors(before), _tensors(func(*args, **kwargs)), strict=True):
                    if _memory(old) not in read:  # else it is an argument, or a view of one
                        old.copy_(new)

    def reset(self) -> None:
        self._done.clear()


def _tensors(x: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(x) if isinstance(leaf, torch.Tensor)]


def _memory(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


@contextlib.contextmanager
def _capture(graph: Recording, **_: Any) -> Iterator[None]:
    with graph:
        yield


def record_instead(monkeypatch: pytest.MonkeyPatch) -> list[Recording]:
    """Have transformers record on a CPU; returns what is recorded, as it comes."""
    from transformers.generation.continuous_batching import initialization, model_runner

    made: list[Recording] = []

    def create() -> Recording:
        made.append(Recording())
        return made[-1]

    monkeypatch.setattr(initialization, "get_accelerator_graph_name", lambda: "Recording")
    monkeypatch.setattr(model_runner, "create_accelerator_graph", create)
    monkeypatch.setattr(model_runner, "accelerator_graph_capture_context", _capture)
    monkeypatch.setattr(model_runner, "get_memory_pools", lambda: (None, None))
    monkeypatch.setattr(model_runner, "memory_pool_context", lambda pool: contextlib.nullcontext())
    return made
