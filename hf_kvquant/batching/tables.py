"""What a step of decoding reads beside the pages, in tensors that stay where they are, so that it can be recorded."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch

from .step import Group, Part, Places, Request, slots_of


def bytes_of_row(groups: Collection[Group], num_columns: int) -> int:
    """What the tables have for one token."""
    return sum(_widths(groups, num_columns).values()) * torch.int32.itemsize


def _widths(groups: Collection[Group], num_columns: int) -> dict[str, int]:
    widths = {"length": 1, "is_padding": 1}
    for group in groups:
        columns = num_columns if group.num_columns is None else group.num_columns
        widths |= {f"{group.name} page": 1, f"{group.name} table": columns}
    return widths


class DecodeTables:
    """Tables for steps in which every request has one new token.

    Args:
        groups: of the model's layers.
        spare_blocks: of each group a block that no request has, for rows that are padding.
        num_rows: tokens of a step, those of padding included.
        num_columns: pages that the longest request may have, where its group has no bound of its own.
        device: of the pages.
    """

    def __init__(
        self,
        groups: Collection[Group],
        spare_blocks: dict[str, int],
        num_rows: int,
        num_columns: int,
        device: torch.device,
    ) -> None:
        self._groups, self._spare_blocks = groups, spare_blocks
        # What rows were filled from: most are the same from step to step.
        self._blocks: dict[str, list[list[int]]] = {group.name: [[] for _ in range(num_rows)] for group in groups}
        widths = _widths(groups, num_columns)

        def views(whole: torch.Tensor) -> dict[str, torch.Tensor]:
            parts = whole.split([num_rows * width for width in widths.values()])
            return {name: part.view(num_rows, -1) for name, part in zip(widths, parts, strict=True)}

        # All in one piece, for one copy.
        size = num_rows * sum(widths.values())
        self._host = torch.zeros(size, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._device = torch.zeros(size, dtype=torch.int32, device=device)
        self._rows = {name: part.numpy() for name, part in views(self._host).items()}
        there = views(self._device)
        lengths, is_padding = there["length"][:, 0], there["is_padding"]
        self.places = {}
        for group in groups:
            part = Part(slice(None), past=1, new=1, page_table=there[f"{group.name} table"], seq_lens=lengths)
            self.places[group.name] = Places([part], None, there[f"{group.name} page"], lengths, is_padding)

    def fill(self, requests: Sequence[Request]) -> None:
        """Bring the requests of a step to the device; rows behind them are padding: a token in a page of nobody's."""
        rows, count = self._rows, len(requests)
        rows["length"][:, 0] = 1
        rows["length"][:count, 0] = [request.past + 1 for request in requests]
        rows["is_padding"][:count], rows["is_padding"][count:] = 0, 1
        for group in self._groups:
            table, spare = rows[f"{group.name} table"], [self._spare_blocks[group.name]]
            for index, known in enumerate(self._blocks[group.name]):
                blocks = requests[index].blocks[group.name] if index < count else spare
                if known != blocks:
                    _refill(table[index], known, blocks, group)
            columns = slots_of(rows["length"] - 1, group) // group.page_size
            rows[f"{group.name} page"][:] = np.take_along_axis(table, columns, axis=1)
        self._device.copy_(self._host, non_blocking=True)


def _refill(row: np.ndarray, known: list[int], blocks: list[int], group: Group) -> None:
    """Bring a row from what is known of it to other blocks. What lies behind them is not read."""
    first = len(known) if blocks[: len(known)] == known else 0
    known[first:] = blocks[first:]
    row[first : len(blocks)] = np.array(known[first:]) * group.stride
