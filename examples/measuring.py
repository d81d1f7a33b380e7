"""What the examples share: loading a model, text as windows of tokens, and measuring a cache."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from hf_kvquant.evaluation.windows import chunk_sizes
from hf_kvquant.hosts.conventions import with_cache

TINY_MODEL = Path(__file__).parent / "tiny-python-lm"
WINDOW = 1024
CHUNKS = chunk_sizes(WINDOW)


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
    """`[count, WINDOW]` token ids, spread over the text; each row begins with the start token if there is one."""
    ids = encode(tokenizer, text, device)[0]
    starts = torch.linspace(0, len(ids) - WINDOW, count).long().tolist()
    cut = torch.stack([ids[start : start + WINDOW] for start in starts])
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
            logits = model(input_ids=chunk[None], **with_cache(cache)).logits[0].float()
            losses.append(torch.nn.functional.cross_entropy(logits, expected, reduction="none"))
            choices.append(logits.argmax(dim=-1))
        losses[-1] = losses[-1][:-1]  # nothing follows the last token
    mean = torch.cat(losses).mean().item()
    return Reading(math.exp(mean), torch.cat(choices).view(texts.shape), cache)


def print_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """A name, then numbers in columns; a row of two cells is a name and a remark."""
    full = [row for row in (header, *rows) if len(row) == len(header)]
    widths = [max(len(row[column]) for row in full) for column in range(len(header))]
    for name, *cells in (header, *rows):
        aligned = cells if len(cells) < len(widths) - 1 else map(str.rjust, cells, widths[1:])
        print("  ".join([name.ljust(widths[0]), *aligned]))
