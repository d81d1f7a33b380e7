"""How many tokens caches at fixed addresses are made for, so that calls of many lengths share a graph.

A length of its own may be another graph, and is another CUDA graph. Kernels only read the tokens there are, so a longer
reservation costs memory and no time. (transformers keeps the longest of all for its static caches.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

_MOST_AHEAD = 2  # times as long a reservation as a call needs


@dataclass
class Reservation:
    """How many layers have got the pages that were asked for."""

    num_layers: int = 0


# Of each model, by the number of sequences and the length: what was reserved, and for how many layers it was to be.
_reserved: WeakKeyDictionary[Any, dict[int, dict[int, tuple[Reservation, int]]]] = WeakKeyDictionary()


def length_to_reserve(model: Any, num_sequences: int, length: int) -> int:
    """As many tokens as an earlier call had reserved, if that is enough for `length` and not too much."""
    lengths = list(_reserved.get(model, {}).get(num_sequences, {}).items())  # other threads may add to them
    fitting = [
        reserved
        for reserved, (reservation, num_layers) in lengths
        if reservation.num_layers >= num_layers and length <= reserved <= _MOST_AHEAD * length
    ]
    return min(fitting, default=length)


def remember(model: Any, num_sequences: int, length: int, reservation: Reservation, num_layers: int) -> None:
    """Offer `length` to later calls, once `reservation` says that all layers have it."""
    lengths = _reserved.setdefault(model, {}).setdefault(num_sequences, {})
    before, wanted = lengths.get(length, (Reservation(), 1))
    if before.num_layers < wanted:
        lengths[length] = (reservation, num_layers)
