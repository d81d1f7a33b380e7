"""Text as a cache is judged on: windows of equal length, and the chunks in which one is read."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import torch
from transformers import PreTrainedModel

from ..calibration_data import batches_of
from ..hosts.devices import input_device

# Text in chunks begins with few tokens, as a conversation does: a cache that takes its scales from the first tokens has
# to live with them.
_CHUNKS = (8, 24, 32, 64, 128)
_LATER_CHUNKS = 256


def read_windows(
    data: Any, model: PreTrainedModel, tokenizer: Any, context: int, num_windows: int, num_tokens: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Windows of the data, and its pieces up to the first `num_tokens` tokens: both at once, as data may be read once.

    Returns the first `num_windows` windows, or fewer if there are not as many, as token ids `[context]` on the model's
    device; and pieces `[T]`, too short for a window or not, of at least `num_tokens` tokens together without the first
    of each, or all there are.

    Raises ValueError for no data, data shorter than `context`, and data without token ids; TypeError for data of an
    unknown kind.
    """
    windows: list[torch.Tensor] = []
    pieces: list[torch.Tensor] = []
    longest = num_read = 0
    # Short texts do not count, so how many have to be read is not known.
    for batch in batches_of(data, model, tokenizer, sys.maxsize, context, 1):
        if "input_ids" not in batch.inputs:
            raise ValueError("compare() needs token ids to predict; these batches have only inputs_embeds")
        ids = batch.inputs["input_ids"]
        masks: Any = itertools.repeat(slice(None)) if batch.mask is None else batch.mask
        for row, mask in zip(ids, masks, strict=False):
            tokens = row[mask]
            longest = max(longest, len(tokens))
            windows += [piece for piece in tokens.split(context) if len(piece) == context]
            if num_read < num_tokens:
                pieces.append(tokens)
            num_read += max(len(tokens) - 1, 0)  # the first may only say that a text begins
        if len(windows) >= num_windows and num_read >= num_tokens:
            break
    if not windows:
        raise ValueError(
            f"the data is shorter than the context: its longest text has {longest} tokens, and windows are of "
            f"context={context}; give longer texts, or a smaller context"
        )
    device = input_device(model)
    return [window.to(device) for window in windows[:num_windows]], pieces


def chunk_sizes(num_tokens: int) -> list[int]:
    """How many tokens come at a time when text is read in chunks: few, then more; they sum to `num_tokens`."""
    sizes: list[int] = []
    for size in itertools.chain(_CHUNKS, itertools.repeat(_LATER_CHUNKS)):
        left = num_tokens - sum(sizes)
        if left <= size:
            return [*sizes, left] if left else sizes
        sizes.append(size)
    return sizes
