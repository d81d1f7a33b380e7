"""What a cache does to speculation: how many drafted tokens are accepted, and whether the tokens stay the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from ..hosts.conventions import CACHE_NAME, with_cache
from ..hosts.wrappers import without_wrapper

# As many tokens as prompt lookup may draft at a time.
_LOOKED_UP = 10
PLACES = ("target", "assistant", "both")


@dataclass(frozen=True)
class Acceptance:
    """Greedy generation with drafts, all prompts together.

    Attributes:
        drafts: whose they are: "prompt lookup" or "assistant".
        place: where this cache is: on the "target", on the "assistant" or on "both"; the other has the unquantized one.
        proposed: tokens that were drafted.
        accepted: those of them that the target kept.
        same_tokens: share of tokens that are, place by place, those of the target with the same cache and no drafts.
            Speculation promises 1; where two tokens are all but equally likely, other sums may decide otherwise.
    """

    drafts: str
    place: str
    proposed: int
    accepted: int
    same_tokens: float


@dataclass
class _Counts:
    proposed: int = 0
    accepted: int = 0
    tokens: list[torch.Tensor] = field(default_factory=list)


class AcceptanceRun:
    """Measures one cache after the other on the same prompts.

    Args:
        model: the target, in evaluation mode.
        assistant: which drafts; None for prompt lookup alone.
        prompts: token ids `[T]` each.
        new_tokens: that are generated for each; the end of a text does not end it.

    Raises ValueError for an assistant with another vocabulary.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        assistant: PreTrainedModel | None,
        prompts: Sequence[torch.Tensor],
        new_tokens: int,
    ) -> None:
        if assistant is not None:
            sizes = [m.config.get_text_config(decoder=True).vocab_size for m in (model, assistant)]
            if sizes[0] != sizes[1]:
                raise ValueError(
                    f"the assistant has a vocabulary of {sizes[1]:,} tokens and the model one of {sizes[0]:,}; take an "
                    "assistant with the model's tokenizer"
                )
        self._model = model
        self._assistant = assistant
        self._prompts = prompts
        self._new_tokens = new_tokens

    @torch.no_grad()
    def measure(
        self, make: Callable[[int], Cache], make_of_assistant: Callable[[int], Cache] | None, places: Sequence[str]
    ) -> list[Acceptance]:
        """Prompt lookup with the caches that `make` makes, then the assistant with this cache at each of the `places`.

        Args:
            make: makes a cache of the target for a number of tokens.
            make_of_assistant: the same of the assistant; None without one.
            places: of `PLACES`.
        """
        plain = {True: self._generate(make).tokens}
        found = [self._compared("prompt lookup", "target", self._generate(make, looks_up=True), plain[True])]
        for place in places if make_of_assistant is not None else ():
            on_target, on_assistant = place != "assistant", place != "target"
            if on_target not in plain:
                plain[on_target] = self._generate(self._dense).tokens
            drafter = make_of_assistant if on_assistant else self._dense_of_assistant
            counts = self._generate(make if on_target else self._dense, drafter)
            found.append(self._compared("assistant", place, counts, plain[on_target]))
        return found

    def _dense(self, _: int) -> Cache:
        return DynamicCache(config=self._model.config.get_text_config(decoder=True))

    def _dense_of_assistant(self, _: int) -> Cache:
        assert self._assistant is not None  # noqa: S101 - asked for only where there is one
        return DynamicCache(config=self._assistant.config.get_text_config(decoder=True))

    def _compared(self, drafts: str, place: str, counts: _Counts, plain: list[torch.Tensor]) -> Acceptance:
        equal = [(one == other).float().mean().item() for one, other in zip(counts.tokens, plain, strict=True)]
        return Acceptance(drafts, place, counts.proposed, counts.accepted, sum(equal) / len(equal))

    def _generate(
        self,
        make: Callable[[int], Cache],
        make_of_assistant: Callable[[int], Cache] | None = None,
        looks_up: bool = False,
    ) -> _Counts:
        counts = _Counts()
        for prompt in self._prompts:
            length = len(prompt) + self._new_tokens
            drafts: dict[str, Any] = {"prompt_lookup_num_tokens": _LOOKED_UP} if looks_up else {}
            cache_of_assistant = None
            if make_of_assistant is not None:
                drafts["assistant_model"] = self._assistant
                cache_of_assistant = make_of_assistant(length)
            with _watched_drafts(self._model, self._assistant, cache_of_assistant, counts):
                output = self._model.generate(
                    prompt[None],
                    attention_mask=torch.ones_like(prompt[None]),
                    **with_cache(make(length)),
                    do_sample=False,
                    num_beams=1,
                    min_new_tokens=self._new_tokens,
                    max_new_tokens=self._new_tokens,
                    return_dict_in_generate=False,
                    **drafts,
                )
            counts.tokens.append(output[0, len(prompt) :])
        return counts


@contextmanager
def _watched_drafts(
    model: PreTrainedModel, assistant: PreTrainedModel | None, cache_of_assistant: Cache | None, counts: _Counts
) -> Iterator[None]:
    """Count what transformers' candidate generator drafts and what was accepted; give it a cache to draft with."""
    core = without_wrapper(model)
    make_generator = core._get_candidate_generator

    def watched_generator(*args: Any, **kwargs: Any) -> Any:
        generator: Any = make_generator(*args, **kwargs)
        get_candidates, update_strategy = generator.get_candidates, generator.update_candidate_strategy

        def counted_candidates(input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            candidates = get_candidates(input_ids, *args, **kwargs)
            counts.proposed += candidates[0].shape[1] - input_ids.shape[1]
            return candidates

        def counted_matches(input_ids: torch.Tensor, scores: torch.Tensor, num_matches: int) -> Any:
            counts.accepted += int(num_matches)
            return update_strategy(input_ids, scores, num_matches)

        generator.get_candidates, generator.update_candidate_strategy = counted_candidates, counted_matches
        if cache_of_assistant is not None:
            if hasattr(cache_of_assistant, "activate_past_recording"):
                cache_of_assistant.activate_past_recording()
            generator.assistant_kwargs[CACHE_NAME] = cache_of_assistant
        return generator

    # transformers adapts the number of drafted tokens and keeps it with the assistant, for the next prompt and cache.
    drafted = None if assistant is None else assistant.generation_config.num_assistant_tokens
    core._get_candidate_generator = watched_generator
    try:
        yield
    finally:
        del core._get_candidate_generator
        if assistant is not None:
            assistant.generation_config.num_assistant_tokens = drafted
