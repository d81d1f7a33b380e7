"""One layer under continuous batching: it writes a step's tokens into its pages, and attends over them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

import torch

from .. import ops
from ..dense import DenseOptions, attend_long_turn, dense_attention, is_long_turn
from ..policy import LayerPlan
from ..query import round_query
from ..stores import PageStore
from .step import Group, Part, Places, Step


class BatchedLayer:
    """Keys and values of one layer of all requests.

    Args:
        index: of the layer.
        plan: formats and scales.
        group: of its attention.
        k, v: pages, of which requests have those that transformers has given them.
    """

    def __init__(self, index: int, plan: LayerPlan, group: Group, k: PageStore, v: PageStore) -> None:
        self.index = index
        self.plan = plan
        self.group = group
        self.k, self.v = k, v
        self.clipped = torch.zeros(2, dtype=torch.int64, device=k.device)
        scale = None if plan.q is None else plan.q.scale
        self._q_scale = None if scale is None else scale.to(k.device)

    def update(self, key: torch.Tensor, value: torch.Tensor, step: Step) -> tuple[BatchedKV, BatchedKV]:
        """Write the new tokens `[1, H, T, D]` of a step; returns what its attention reads."""
        self._check(key, value, step)
        sides = ((self.k, key), (self.v, value))
        for store, x in sides:
            if store.needs_tokens:
                store.observe(x.detach(), None)
        places = step.places(self.group, key.device)
        # Before the new tokens come to lie where the past of a window lies now.
        pasts = [[_read_past(store, part) for part in places.parts] for store, _ in sides]
        rows = [self._rows(store, x.detach(), places) for store, x in sides]
        new_key, new_value = (x[0].transpose(0, 1)[:, :, None] for x in rows)  # tokens as sequences of one
        ops.write_kv(new_key, new_value, self.k.paged, self.v.paged, places.pages, places.lengths, self.clipped)
        return BatchedKV(self, key, pasts[0], places), BatchedKV(self, value, pasts[1], places)

    @staticmethod
    def _rows(store: PageStore, x: torch.Tensor, places: Places) -> torch.Tensor:
        """Those of the new tokens `[1, H, T, D]` that are written."""
        if places.is_padding is not None and store.paged.token_scale is None:  # what clips is counted
            zero = store.paged.zero
            fill = 0 if zero is None else zero[:, None].to(x.dtype)
            return torch.where(places.is_padding != 0, fill, x)
        return x if places.kept is None else x.index_select(2, places.kept)

    def _check(self, key: torch.Tensor, value: torch.Tensor, step: Step) -> None:
        expected = [(1, self.k.num_heads, step.num_tokens, store.head_dim) for store in (self.k, self.v)]
        got = [tuple(key.shape), tuple(value.shape)]
        if got != expected:
            raise ValueError(
                f"layer {self.index}: keys and values are {got}, but this cache has made room for {expected} "
                "([1, H, T, D]), as the model's configuration and the step's requests say; continuous batching takes "
                "no models whose layers, or whose K and V, are of different shapes: use `generate` for those"
            )

    def attend(self, query: torch.Tensor, key: BatchedKV, value: BatchedKV, options: DenseOptions) -> torch.Tensor:
        """Attention of a step's tokens, each to its own request: `[1, Hq, T, D]` to `[1, T, Hq, D]`.

        A fresh prompt attends to itself as the model made it, and so do several tokens at once under a window, over
        what the window holds before them; all others read the pages.
        """
        parts = key.places.parts
        outputs = [self._attend(query, key, value, index, options) for index in range(len(parts))]
        if len(parts) == 1:
            return outputs[0]
        whole = torch.empty(1, query.shape[2], *outputs[0].shape[2:], dtype=query.dtype, device=query.device)
        for part, output in zip(parts, outputs, strict=True):
            whole[:, part.tokens] = output
        return whole

    def _attend(
        self, query: torch.Tensor, key: BatchedKV, value: BatchedKV, index: int, options: DenseOptions
    ) -> torch.Tensor:
        part = key.places.parts[index]
        query = query[:, :, part.tokens]
        if not part.past or part.past_slots is not None:
            return dense_attention(query, key.dense(index), value.dense(index), part.mask, None, options)
        is_single = part.new == 1
        rows = self._rounded(query.transpose(0, 2) if is_single else query)
        if is_long_turn(rows) and options.sinks is None and options.softcap is None:
            k, v = (store.read(part.page_table)[:, :, : part.past + part.new] for store in (self.k, self.v))
            return attend_long_turn(rows, k, v, options.scaling)
        output = ops.paged_attention(
            rows, self.k.paged, self.v.paged, part.page_table, part.seq_lens,
            softmax_scale=options.scaling, sinks=options.sinks, softcap=options.softcap, window=self.group.window,
            causal=True,
        )  # fmt: skip
        return output.permute(2, 0, 1, 3) if is_single else output.transpose(1, 2)

    def _rounded(self, query: torch.Tensor) -> torch.Tensor:
        q = self.plan.q
        return query if q is None else round_query(query, q.format, self._q_scale, f"layer {self.index}")


class BatchedKV:
    """The keys or the values of a step, of one layer: what `update` returns in place of a tensor.

    Args:
        layer: whose pages have the tokens.
        new: the step's own `[1, H, T, D]`, as the model made them.
        pasts: for each part of the step what dense attention needs of the tokens before it.
        places: the parts.
    """

    def __init__(
        self, layer: BatchedLayer, new: torch.Tensor, pasts: list[torch.Tensor | None], places: Places
    ) -> None:
        self.layer = layer
        self.new = new
        self.places = places
        self._pasts = pasts

    def dense(self, index: int) -> torch.Tensor:
        """What part `index` sees, `[1, H, L, D]`."""
        new, past = self.new[:, :, self.places.parts[index].tokens], self._pasts[index]
        return new if past is None else torch.cat([past, new], dim=2)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse(f"the model reads .{name}")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> NoReturn:
        handle = next(x for x in _flat((args, kwargs or {})) if isinstance(x, cls))
        handle._refuse(f"the model calls {getattr(func, '__name__', func)}")

    def __getitem__(self, item: Any) -> NoReturn:
        self._refuse("the model takes a part of them")

    def _refuse(self, what: str) -> NoReturn:
        raise ValueError(
            f"layer {self.layer.index}: {what} of keys or values, which under continuous batching lie in the pages of "
            "many requests; use `generate` for this model, or attn_implementation='sdpa' and transformers' own cache"
        )


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, (tuple, list)):
        yield value
        return
    for item in value:
        yield from _flat(item)


def _read_past(store: PageStore, part: Part) -> torch.Tensor | None:
    if part.past_slots is None or not part.past:
        return None
    return store.read(part.page_table).index_select(2, part.past_slots)
