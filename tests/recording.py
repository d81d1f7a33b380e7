"""CUDA graphs for devices that have none: what was done to tensors is done again, without the Python around it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operators that a host waits for: what they make, or how much of it, depends on numbers on the device.
_HOST_READS = {
    "_local_scalar_dense", "is_nonzero", "item", "equal", "nonzero", "masked_select", "_unique2", "unique_dim",
    "unique_consecutive", "repeat_interleave",
}  # fmt: skip


class Recording(TorchDispatchMode):
    """Keeps every operation with the tensors that it read and made.

    As on a GPU nothing has been computed when recording ends: tensors are as they were before, and what was made in
    the meantime is NaN, or -1.

    Attributes:
        num_replays: how often it was done again.
        is_kept: whether nobody has let go of it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_replays = 0
        self.is_kept = True
        self._done: list[tuple[Any, Any, Any, Any]] = []
        self._made: dict[int, torch.Tensor] = {}  # by where they lie
        self._written: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # with what they were before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        _check_stays_on_device(func, args)
        kwargs = kwargs or {}
        self._keep_what_is_written(func, args, kwargs)
        found = func(*args, **kwargs)
        self._done.append((func, args, kwargs, found))
        read = {_memory(x) for x in _tensors((args, kwargs))}
        self._made |= {_memory(x): x for x in _tensors(found) if _memory(x) not in read}
        return found

    def _keep_what_is_written(self, func: Any, args: Any, kwargs: Any) -> None:
        for index, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            for x in _tensors(args[index] if index < len(args) else kwargs.get(argument.name)):
                if _memory(x) not in self._made.keys() | self._written.keys():
                    self._written[_memory(x)] = _bytes_of(x), _bytes_of(x).clone()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        with torch.inference_mode():
            for x, before in self._written.values():
                x.copy_(before)
            for x in self._made.values():
                _bytes_of(x).fill_(0xFF)
        self._written.clear()
        self._made.clear()

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
        self.is_kept = False
        self._done.clear()


def _check_stays_on_device(func: Any, args: Any) -> None:
    name = func._schema.name.split("::")[1]
    # A mask as an index is looked for, too.
    chooses = name.startswith(("index", "_index")) and any(x.dtype == torch.bool for x in _tensors(args[1:2]))
    if name in _HOST_READS or chooses:
        raise RuntimeError(f"{name} reads from a device that is recording")


def _tensors(x: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(x) if isinstance(leaf, torch.Tensor)]


def _memory(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _bytes_of(x: torch.Tensor) -> torch.Tensor:
    """All of what a tensor lies in."""
    return torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())


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
