"""Pages in host memory: 8 bits per number over the bus, while the device computes other layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from .ops import PagedTensor
from .stores import PageStore

# One stream per device for all copies to it: they share a bus.
_streams: dict[torch.device, Any] = {}


class OffloadedStore(PageStore):
    """K or V of one layer whose pages rest in (pinned) host memory and visit the device for a step's attention.

    `paged` is always right: it waits, in the order of the device's work, for pages that are on their way and fetches
    those that are not. What is written there has to be saved. On a CPU the visit is a plain copy.
    """

    _rest: PagedTensor
    _here: PagedTensor | None = None
    # Recorded when the pages have arrived on the device, and when what was written there has been saved.
    _arrived: Any = None
    _saved: Any = None

    @property
    def at_rest(self) -> PagedTensor:
        return self._rest

    @property
    def paged(self) -> PagedTensor:  # type: ignore[override]
        self.prefetch()
        if self._arrived is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(self._arrived)
            self._arrived = None
            assert self._here is not None  # noqa: S101 - fetched above
            for tensor in _storage(self._here):
                tensor.record_stream(stream)  # allocated on the stream of copies, it is read on this one
        assert self._here is not None  # noqa: S101 - fetched above
        return self._here

    @paged.setter
    def paged(self, value: PagedTensor) -> None:
        self._rest, self._here, self._arrived, self._saved = replace(value), None, None, None
        self._each(lambda store: store.to("cpu"))

    @property
    def is_here(self) -> bool:
        """Whether the pages are on the device, or on their way."""
        return self._here is not None

    def prefetch(self) -> None:
        """Start to copy the pages to the device, beside what it computes."""
        if self._here is not None:
            return
        if self.device.type != "cuda":
            self._here = _moved(self._rest, self.device)
            return
        if self.device not in _streams:
            _streams[self.device] = torch.cuda.Stream(self.device)
        stream = _streams[self.device]
        with torch.cuda.stream(stream):
            if self._saved is not None:
                stream.wait_event(self._saved)
            self._here = _moved(self._rest, self.device)
            self._arrived = stream.record_event()

    def save(self, pages: np.ndarray) -> None:
        """Copy what was written into these pages (ascending) back to host memory, without waiting for it."""
        here = self.paged
        starts = np.flatnonzero(np.diff(pages, prepend=-2) != 1)  # neighbors go in one copy
        for first, last in zip(pages[starts], pages[np.append(starts[1:], len(pages)) - 1], strict=True):
            run = slice(int(first), int(last) + 1)
            for there, tensor in zip(_storage(self._rest), _storage(here), strict=True):
                there[run].copy_(tensor[run], non_blocking=True)
        if self.device.type == "cuda":
            self._saved = torch.cuda.current_stream(self.device).record_event()

    def release(self) -> None:
        """Forget the copy on the device."""
        self._here = self._arrived = None

    def set_scale(self, scale: torch.Tensor) -> None:
        self._rest.scale = scale
        if self._here is not None:
            self._here.scale = scale

    def with_pages(self, pages: torch.Tensor) -> PageStore:
        self._wait()
        return super().with_pages(pages)

    def _wait(self) -> None:
        """Before the CPU touches what the device may still be copying."""
        for event in (self._arrived, self._saved):
            if event is not None:
                event.synchronize()

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._wait()
        self.release()
        pin = self.device.type == "cuda"
        super()._each(lambda store: change(store).pin_memory() if pin else change(store))


def _storage(paged: PagedTensor) -> list[torch.Tensor]:
    return [tensor for tensor in (paged.pages, paged.token_scale) if tensor is not None]


def _moved(paged: PagedTensor, device: torch.device) -> PagedTensor:
    moved = [tensor.to(device, non_blocking=True, copy=True) for tensor in _storage(paged)]
    return replace(paged, pages=moved[0], token_scale=moved[1] if len(moved) > 1 else None)
