"""What measurements of `generate` share: the caches, the model's attention while they have their turn, the prompt."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from ..generation import compiles_unasked
from ..hosts.configuration import longest_sequence
from ..hosts.devices import input_device
from ..hosts.modes import evaluating
from ..hosts.wrappers import without_wrapper
from ..interface import attention_by_part, attention_name, is_fused, uses_attention_interface
from .caches import Candidate, Formats, candidates
from .machine import git_commit
from .memory import peak_kind
from .resume import check_place
from .setup import model_setup
from .timing import SETTLING

Item = TypeVar("Item")
_OURS, _HOSTS = "kvquant", "sdpa"


def check_amounts(model: PreTrainedModel, amounts: Mapping[str, Sequence[int]], least: int = 1) -> None:
    """Raise ValueError for a model that does not generate text from left to right, and for amounts below `least`.

    TypeError for amounts that are no list.
    """
    if model.config.is_encoder_decoder or not model.can_generate():
        raise ValueError(f"{type(model).__name__} is not a causal language model, over whose cache text is generated")
    for name, values in amounts.items():
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise TypeError(f"{name}={values!r}; give a list, such as [{values}]")
        if not values:
            raise ValueError(f"{name} is empty; give at least one")
        for value in values:
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}: {value!r}; it must be an integer of at least {least}")


def check_generating(
    model: PreTrainedModel,
    formats: Formats,
    contexts: Sequence[int] | None,
    batches: Sequence[int],
    new_tokens: int,
    rounds: int,
    save: str | os.PathLike[str] | None,
) -> None:
    """Raise what `bench` raises for arguments that do not fit; `model` may be on the meta device."""
    check_amounts(model, {"contexts": contexts or [1], "batches": batches, "rounds": [rounds]})
    check_amounts(model, {"new_tokens": [new_tokens]}, least=SETTLING + 2)
    if contexts:
        check_length(model, max(contexts) + new_tokens)
    candidates(model, formats)
    check_place(save)


def check_length(model: PreTrainedModel, num_tokens: int) -> None:
    """Raise ValueError if the model is not made for so many tokens."""
    longest = longest_sequence(model.config)
    if longest is not None and num_tokens > longest:
        raise ValueError(
            f"context and new tokens are {num_tokens:,} together, but the model is made for {longest:,} "
            "(max_position_embeddings)"
        )


def usual_contexts(model: PreTrainedModel, usual: Sequence[int], new_tokens: int) -> list[int]:
    """Those that the model is made for; if it is for none, half of what it is made for.

    Raises ValueError if not even that leaves room for the new tokens.
    """
    longest = longest_sequence(model.config)
    contexts = [each for each in usual if longest is None or each + new_tokens <= longest] or [(longest or 0) // 2]
    check_length(model, max(contexts) + new_tokens)
    return contexts


def generating_candidates(model: PreTrainedModel, formats: Formats) -> list[Candidate]:
    """The caches as `generate` would have them on the model's device."""
    fused = uses_attention_interface(model.config.get_text_config(decoder=True))
    return candidates(model, formats, reserved=fused and compiles_unasked(model.device))


def generating_setup(model: PreTrainedModel, name: str | None, new_tokens: int) -> dict[str, Any]:
    """What times depend on, as JSON. Weights are not among it."""
    device = input_device(model)
    setup = {key: value for key, value in model_setup(model).items() if key != "weights"}
    return {
        **setup,
        **({} if name is None else {"model": name}),
        "attention": _hosts_attention(model),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "peak_memory": peak_kind(device),
        "commit": git_commit(),
        "new_tokens": new_tokens,
    }


def _hosts_attention(model: PreTrainedModel) -> str:
    config = model.config.get_text_config(decoder=True)
    return _HOSTS if is_fused(config) else attention_name(config)


@contextmanager
def as_generating(model: PreTrainedModel) -> Iterator[Callable[[Candidate], None]]:
    """The model in evaluation mode; what is yielded gives it the attention that goes with a cache. All is undone.

    What is there before is not searched for garbage meanwhile, which would take longer than many a step.
    """
    inner = without_wrapper(model)
    config = inner.config.get_text_config(decoder=True)
    before, hosts = attention_by_part(inner), _hosts_attention(inner)

    def attend(candidate: Candidate) -> None:
        if uses_attention_interface(config):
            inner.set_attn_implementation(_OURS if candidate.ours else hosts)

    gc.collect()
    gc.freeze()
    try:
        with evaluating(model):
            yield attend
    finally:
        gc.unfreeze()
        if attention_by_part(inner) != before:
            inner.set_attn_implementation(before)


def random_ids(model: PreTrainedModel, batch: int, context: int) -> torch.Tensor:
    """The same token ids `[B, T]` in every run, without those that the configuration has a name for (images, ...)."""
    config = model.config
    named = {
        value
        for each in (config, config.get_text_config(decoder=True))
        for name, value in each.to_dict().items()
        if name.endswith(("_token_id", "_token_index")) and isinstance(value, int)
    }
    vocabulary = config.get_text_config(decoder=True).vocab_size
    usual = torch.tensor([token for token in range(vocabulary) if token not in named], device="cpu")
    places = torch.randint(len(usual), (batch, context), generator=torch.Generator().manual_seed(0), device="cpu")
    return usual[places].to(input_device(model))


def starting_at(index: int, items: Sequence[Item]) -> list[Item]:
    """All of them in turn, beginning with another in every round: whoever is next finds what the one before left."""
    first = index % len(items)
    return [*items[first:], *items[:first]]
