"""`hf-kvquant serve`: transformers' own server, which takes this package's attentions here."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from ..attention import NAMES

_OPTION = "--attn-implementation"


def serve(arguments: Sequence[str]) -> None:
    """Run `transformers serve` with `arguments`, and with `--attn-implementation kvquant` where they name none.

    Raises ImportError where what transformers' server needs is not installed.
    """
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.transformers import app

    if not any(argument.split("=")[0] == _OPTION for argument in arguments):
        arguments = [*arguments, _OPTION, NAMES[0]]
    validate = ModelManager._validate_args
    ModelManager._validate_args = _allowing_ours(validate)
    try:
        app(args=["serve", *arguments], prog_name="hf-kvquant")
    finally:
        ModelManager._validate_args = validate


def _allowing_ours(validate: Any) -> Any:
    """The server knows a few attentions by name and refuses all others."""

    @functools.wraps(validate)
    def validate_args(self: Any) -> None:
        chosen = self.attn_implementation
        if chosen in NAMES:
            self.attn_implementation = None
        try:
            validate(self)
        finally:
            self.attn_implementation = chosen

    return validate_args
