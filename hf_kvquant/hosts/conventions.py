"""How models and caches are called by the installed version of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers
from packaging.version import Version

# What models and `generate` have called their cache, the newest name first; from 5.24 on there is only that.
CACHE_NAMES = ("cache", "past_key_values", "cache_params")
CACHE_NAME = "cache" if Version(transformers.__version__) >= Version("5.24.dev0") else "past_key_values"


def with_cache(cache: Any) -> dict[str, Any]:
    """Arguments of a model's call that let it go on from `cache`."""
    return {CACHE_NAME: cache, "use_cache": True}


def tokens_to_take_back(tokens_to_remove: int, get_seq_length: Callable[[], Any]) -> int:
    """What `crop`'s argument means to the installed transformers.

    Raises ValueError for a positive number from transformers 5.18 on, as transformers' own caches do.
    """
    if tokens_to_remove <= 0:
        return -tokens_to_remove
    if Version(transformers.__version__) >= Version("5.18"):
        raise ValueError(f"crop({tokens_to_remove}): pass a negative number, the tokens to take back")
    return max(int(get_seq_length()) - tokens_to_remove, 0)
