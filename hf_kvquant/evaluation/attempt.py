"""Trying what may fail, so that one measurement's failure does not end the others."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


def attempt(measure: Callable[[], Result]) -> tuple[Result | None, str]:
    """What `measure` gives and "", or None and the exception that ended it, in a line.

    Memory that the failed measurement held, the device's too, is given back. An interruption is not a failure.
    """
    try:
        return measure(), ""
    except Exception as error:  # whatever it is, the others can still be measured
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    # Here, not above: what the failed measurement held is let go of with the exception.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None, reason
