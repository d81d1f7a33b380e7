"""What all layers of a cache have in common."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from transformers import PreTrainedConfig

from .interface import is_fused
from .pages import PageTable
from .reservations import Reservation
from .rotary import RotaryLayout
from .sharding import HeadShard


@dataclass
class SharedState:
    """One object that every layer of a cache refers to.

    Attributes:
        model_config: the text model's; its attention implementation may change between calls.
        page_size: tokens per page.
        rotary: how the model turns the keys of each layer; empty if that is not known.
        shard: which heads are this process's, if others have the rest.
        part: which part of the model's heads and layers this process has, and how many parts there are.
        padding_mask: `[B, T]` of the latest prompt (True is a token), when `generate` knows it.
        copies: how many sequences in a row begin with the same prompt (beams); they share its pages.
        num_prompts: how many prompts there are, each with its copies.
        prompt_length: tokens of the latest prompt, those of earlier turns among them, when `generate` knows it; it may
            come in pieces, or with drafts behind it.
        speculates: whether `generate` has other tokens checked than those that it will keep.
        model: whose cache it is, if that is known.
        num_virtual: tokens at the start that are an adapter's, and in no text.
        reservation: what has been reserved.
        replaced: table of the layer whose contents were replaced last, for others that become as long.
    """

    model_config: PreTrainedConfig
    page_size: int
    rotary: Sequence[RotaryLayout] = ()
    shard: HeadShard | None = None
    part: tuple[int, int] = (0, 1)
    padding_mask: torch.Tensor | None = None
    copies: int = 1
    num_prompts: int = 0
    prompt_length: int = 0
    speculates: bool = False
    model: weakref.ref[torch.nn.Module] | None = None
    num_virtual: int = 0
    reservation: Reservation = field(default_factory=Reservation)
    replaced: PageTable | None = None

    def copies_of(self, length: int, num_new: int, batch_size: int) -> int:
        """How many sequences in a row get the same tokens when a layer of `length` gets `num_new` more."""
        is_prompt = length == 0 or length + num_new <= self.prompt_length
        return self.copies if is_prompt and batch_size == self.copies * self.num_prompts else 1

    @property
    def is_fused(self) -> bool:
        """Whether the model's attention reads the pages itself."""
        return is_fused(self.model_config)

    def forget_prompt(self) -> None:
        """What comes next is not what `generate` has described."""
        self.padding_mask, self.copies, self.num_prompts, self.prompt_length = None, 1, 0, 0
        self.num_virtual = 0

    def copy(self) -> SharedState:
        """For a copy of the cache: the same model's, so it has to see the configuration that the model goes by."""
        return replace(self, replaced=None)
