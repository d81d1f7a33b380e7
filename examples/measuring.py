"""What the examples share: loading a model, text as windows of tokens, and measuring a cache."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

import hf_kvquant

TINY_MODEL = Path(__file__).parent / "tiny-python-lm"
# A window of 1024 tokens. It begins with few, as a conversation does: a cache that takes its scales from the first
# tokens has to live with them.
CHUNKS = (8, 24, 32, 64, 128, 256, 256, 256)


def load(path: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model (on a GPU if there is one) whose attention reads 8-bit pages, and its tokenizer."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Progress bars are for downloads; they write to standard error.
    silence = contextlib.redirect_stderr(io.StringIO()) if Path(path).is_dir() else contextlib.nullcontext()
    with silence:
        model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="kvquant", dtype="auto")
    return model.to(device).eval(), AutoTokenizer.from_pretrained(path)


def encode(tokenizer: PreTrainedTokenizerBase, text: str, device: torch.device) -> torch.Tensor:
    """Token ids `[1, T]`."""
    return tokenizer(text, return_tensors="pt", verbose=False).input_ids.to(device)


def windows(tokenizer: PreTrainedTokenizerBase, text: str, count: int, device: torch.device) -> torch.Tensor:
    """`[count, sum(CHUNKS)]` token ids, spread over the text; each row begins with the start token if there is one."""
    length = sum(CHUNKS)
    ids = encode(tokenizer, text, device)[0]
    starts = torch.linspace(0, len(ids) - length, count).long().tolist()
    cut = torch.stack([ids[start : start + length] for start in starts])
    if tokenizer.bos_token_id is not None:
        cut[:, 0] = tokenizer.bos_token_id
    return cut


@dataclass(frozen=True)
class Reading:
    """What a model predicts while text passes through a cache.

    Attributes:
        perplexity: per token.
        choices: `[windows, tokens]`, the most likely next token at every place, which greedy decoding would take.
        cache: the cache of the last window, filled.
    """

    perplexity: float
    choices: torch.Tensor
    cache: Cache

    def agreement(self, other: Reading) -> float:
        """Share of places where both choose the same token."""
        return (self.choices == other.choices).float().mean().item()


@torch.no_grad()
def read_text(model: PreTrainedModel, texts: torch.Tensor, make_cache: Callable[[], Cache]) -> Reading:
    """Feed windows of tokens to the model in chunks, each window through a new cache."""
    losses, choices = [], []
    for tokens in texts:
        cache = make_cache()
        targets = tokens.roll(-1)
        for chunk, expected in zip(tokens.split(CHUNKS), targets.split(CHUNKS), strict=True):
            logits = model(input_ids=chunk[None], past_key_values=cache).logits[0].float()
            losses.append(torch.nn.functional.cross_entropy(logits, expected, reduction="none"))
            choices.append(logits.argmax(dim=-1))
        losses[-1] = losses[-1][:-1]  # nothing follows the last token
    mean = torch.cat(losses).mean().item()
    return Reading(math.exp(mean), torch.cat(choices).view(texts.shape), cache)


def held_bytes(cache: Cache) -> int:
    """Bytes that a cache holds: for ours also pages that are not in use yet, for the host's every tensor it keeps."""
    if isinstance(cache, hf_kvquant.QuantizedPagedCache):
        return cache.nbytes_allocated
    return sum(_tensor_bytes(vars(layer).values()) for layer in cache.layers)


def _tensor_bytes(values: Iterable[Any]) -> int:
    """Bytes of the tensors among `values`, in containers too: quantized data comes as a tuple with its scale."""
    total = 0
    for value in values:
        if isinstance(value, torch.Tensor):
            total += value.nbytes
        elif isinstance(value, dict):
            total += _tensor_bytes(value.values())
        elif isinstance(value, (list, tuple)):
            total += _tensor_bytes(value)
    return total


def print_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """A name, then numbers in columns; a row of two cells is a name and a remark."""
    full = [row for row in (header, *rows) if len(row) == len(header)]
    widths = [max(len(row[column]) for row in full) for column in range(len(header))]
    for name, *cells in (header, *rows):
        aligned = cells if len(cells) < len(widths) - 1 else map(str.rjust, cells, widths[1:])
        print("  ".join([name.ljust(widths[0]), *aligned]))
