"""Whether a model still finds a fact far back in its context: the tasks, by length and depth, and measuring them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ..dtypes import to_float64
from ..hosts.conventions import with_cache
from ..hosts.devices import input_device

TASKS = ("key-value", "needle")
# Where the fact is: 0 at the beginning of the document, 1 right before the question.
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


@dataclass(frozen=True)
class Probe:
    """A document with a fact in it, and the question for it.

    Attributes:
        task: "key-value": the document is facts of one kind; "needle": it is text with one fact in it.
        length: tokens of all three parts.
        depth: place of the fact in the document, from 0 to 1.
        document: token ids `[T]`, as the others.
        question: the fact's beginning.
        answer: what follows it in the fact.
    """

    task: str
    length: int
    depth: float
    document: torch.Tensor
    question: torch.Tensor
    answer: torch.Tensor


@dataclass(frozen=True)
class Retrieval:
    """What was found at one length and depth, means over several probes.

    Attributes:
        task: see `Probe`, as `length` and `depth`.
        found: share of answers that greedy decoding gives, all tokens right.
        log_probability: of the whole answer, in nats. A small model finds nothing over any cache; how far this is from
            the unquantized cache's still says what storage costs.
        rank: of the answer's least likely token among the whole vocabulary; 1 is the most likely.
    """

    task: str
    length: int
    depth: float
    found: float
    log_probability: float
    rank: float


def make_probes(
    text: torch.Tensor,
    tokenizer: Any,
    lengths: Iterable[int],
    depths: Iterable[float] = DEPTHS,
    samples: int = 4,
) -> list[Probe]:
    """Probes of both tasks, the same ones every time.

    Facts are lines such as `bakoru = 48213`: made-up words that no text has, and numbers.

    Args:
        text: token ids `[T]` of any text, which hides the needle; as many as the longest probe has.
        tokenizer: of the model.
        lengths: tokens of a probe.
        depths: places of the fact, from 0 to 1.
        samples: probes of each task, length and depth.

    Raises ValueError if the text is shorter than a probe, and for a length that has no room for a fact and a question.
    """
    return [
        _probe(task, length, depth, _Facts(tokenizer, f"{task} {length} {depth} {sample}"), text, tokenizer)
        for task, length, depth, sample in itertools.product(TASKS, list(lengths), list(depths), range(samples))
    ]


@torch.no_grad()
def measure_retrieval(model: PreTrainedModel, probes: Sequence[Probe], make: Callable[[int], Cache]) -> list[Retrieval]:
    """What a model finds over the caches that `make` makes for a number of tokens: one entry per task, length, depth.

    The document is read as a prompt; question and answer come after it, over what is stored.
    """
    found: dict[tuple[str, int, float], list[tuple[int, float]]] = {}
    for probe in probes:
        score = _score(model, probe, make(probe.length))
        found.setdefault((probe.task, probe.length, probe.depth), []).append(score)
    return [
        Retrieval(
            *place,
            found=_mean(rank == 1 for rank, _ in scores),
            log_probability=_mean(log_probability for _, log_probability in scores),
            rank=_mean(rank for rank, _ in scores),
        )
        for place, scores in found.items()
    ]


def _score(model: PreTrainedModel, probe: Probe, cache: Cache) -> tuple[int, float]:
    """The worst rank of the answer's tokens, and the log probability of all of them."""
    device = input_device(model)
    document, question, answer = (ids[None].to(device) for ids in (probe.document, probe.question, probe.answer))
    # Nothing is predicted from the document; its logits would take more memory than all else.
    only_last = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
    model(input_ids=document, **with_cache(cache), **only_last)
    # Greedy decoding gives the answer just if each of its tokens is the best one after those before it.
    asked = torch.cat([question, answer[:, :-1]], dim=1)
    logits = model(input_ids=asked, **with_cache(cache)).logits[0, question.shape[1] - 1 :]
    scores = logits.float().log_softmax(dim=-1)
    right = scores.gather(-1, answer[0, :, None].to(scores.device))
    return int((scores > right).sum(dim=-1).max()) + 1, to_float64(right).sum().item()


def _mean(values: Iterable[float]) -> float:
    all_values = list(values)
    return sum(all_values) / len(all_values)


class _Facts:
    """Facts that are all different, in an order that the seed decides."""

    def __init__(self, tokenizer: Any, seed: str) -> None:
        self._tokenizer = tokenizer
        self._random = random.Random(seed)
        self._words: set[str] = set()

    def next(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token ids of a key and the equals sign, of the value, and of the end of the line.

        Each on its own, so that the question has the very tokens that the fact has.
        """
        word = ""
        while not word or word in self._words:
            word = "".join(self._random.choice(_CONSONANTS) + self._random.choice(_VOWELS) for _ in range(3))
        self._words.add(word)
        return self._ids(f"{word} ="), self._ids(f" {self._random.randrange(10_000, 100_000)}"), self._ids("\n")

    def _ids(self, text: str) -> torch.Tensor:
        return torch.tensor(self._tokenizer(text, add_special_tokens=False).input_ids, dtype=torch.int64, device="cpu")


def _probe(task: str, length: int, depth: float, facts: _Facts, text: torch.Tensor, tokenizer: Any) -> Probe:
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    question, answer, end = facts.next()
    fact = torch.cat([question, answer, end])
    # The question begins a line of its own.
    room = length - len(start) - len(fact) - len(end) - len(question) - len(answer)
    if room < 0:
        raise ValueError(f"retrieval over {length:,} tokens: a fact and the question for it take {length - room}")
    if task == "needle":
        around = text.cpu()[:room]
        if len(around) < room:
            raise ValueError(
                f"retrieval over {length:,} tokens needs as many tokens of data, and there are {len(text):,}; "
                "give more data, or smaller lengths"
            )
        before = int(depth * room)
        document = [around[:before], fact, around[before:]]
    else:
        others = list(_fitting(facts, room))
        # A fact is not cut: its place is between two of the others.
        before = round(depth * len(others))
        document = [*others[:before], fact, *others[before:]]
    document = [torch.tensor(start, dtype=torch.int64, device="cpu"), *document, end]
    return Probe(task, length, depth, torch.cat(document), question, answer)


def _fitting(facts: _Facts, room: int) -> Iterator[torch.Tensor]:
    """Facts of `room` tokens at most."""
    while True:
        fact = torch.cat(facts.next())
        room -= len(fact)
        if room < 0:
            return
        yield fact
