"""What `Cache.update` returns instead of dense keys and values.

The attention function of this package takes the handle apart and reads the pages. Anybody else who touches it (a model
that expands, slices or multiplies K before attention) gets the dense tensor the moment it asks.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from .sides import TENSOR_NAMES, Side

if TYPE_CHECKING:
    from .exact import ExactStep
    from .layers import PagedLayer


class PagedKV:
    """The keys or the values of one layer as a step's attention sees them.

    Args:
        layer: whose pages they are.
        side: which of the two.
        new: the tokens that this step has added, as the model made them; None if it only reads.
        is_all: whether nothing else is in the cache (a fresh prompt).
        keeps_new: whether the dense tensor has the new tokens as the model made them.
        exact: tokens that this step's attention reads as the model made them, if the layer keeps any.
    """

    def __init__(
        self,
        layer: PagedLayer,
        side: Side,
        new: torch.Tensor | None = None,
        is_all: bool = False,
        keeps_new: bool = False,
        exact: ExactStep | None = None,
    ) -> None:
        self.layer = layer
        self.side = side
        self.num_new = 0 if new is None else new.shape[2]
        self.raw = new if is_all else None
        self.exact = exact
        self._new = new if keeps_new else None
        self._dense: torch.Tensor | None = None

    def dense(self, reason: str) -> torch.Tensor:
        """`[B, H, L, D]` in the model's dtype; `reason` goes into the report."""
        self.layer.note_dense(reason)
        if self.raw is not None:
            self.layer.settle()
            return self.raw
        if self._dense is None:
            self._dense = self.layer.read(self.side, self.num_new, self.exact)
            if self._new is not None:
                self._dense = self.layer.with_new(self._dense, self._new)
        return self._dense

    # What can be answered without reading a page.

    @property
    def shape(self) -> torch.Size:
        known = self.raw if self.raw is not None else self._dense
        return self.layer.shape_of(self.side, self.num_new) if known is None else known.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.layer.dtype

    @property
    def device(self) -> torch.device:
        return self.layer.device

    @property
    def ndim(self) -> int:
        return 4

    def dim(self) -> int:
        return 4

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        return self.shape.numel()

    def to(self, *args: Any, **kwargs: Any) -> Any:
        here = torch.empty(0, dtype=self.dtype, device=self.device)
        if here.to(*args, **kwargs) is here:
            return self
        return self.dense("the model reads .to").to(*args, **kwargs)

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"PagedKV({TENSOR_NAMES[self.side]} of cache layer {self.layer.index}, shape={list(self.shape)})"

    # Everything else is the dense tensor's.

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dense(f"the model reads .{name}"), name)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        reason = f"the model calls {getattr(func, '__name__', func)}"
        return func(*_densified(args, reason), **_densified(kwargs or {}, reason))


def _densified(value: Any, reason: str) -> Any:
    if isinstance(value, PagedKV):
        return value.dense(reason)
    if isinstance(value, dict):
        return {key: _densified(item, reason) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_densified(item, reason) for item in value)
    return value


def _forward_operator(name: str) -> Callable[..., Any]:
    function = getattr(operator, name)

    def forward(self: PagedKV, *args: Any) -> Any:
        reason = f"the model uses {name}"
        return function(self.dense(reason), *_densified(args, reason))

    return forward


def _forward_reflected(name: str) -> Callable[..., Any]:
    function = getattr(operator, name)
    return lambda self, other: function(other, self.dense(f"the model uses {name}"))


# Python looks operators up on the class, so __getattr__ does not see them.
for _name in (
    "getitem",
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "matmul",
    "neg",
    "abs",
    "pow",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
):
    setattr(PagedKV, f"__{_name}__", _forward_operator(_name))
for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "matmul", "pow"):
    setattr(PagedKV, f"__r{_name}__", _forward_reflected(_name))
PagedKV.__hash__ = object.__hash__  # type: ignore[method-assign]
