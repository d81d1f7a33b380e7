"""A session that is saved, and what comes after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from helpers import prompt

from hf_kvquant import QuantizedPagedCache
from hf_kvquant.hosts.conventions import CACHE_NAME


def six_tokens(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    return model.generate(ids, **{CACHE_NAME: cache}, max_new_tokens=6, do_sample=False)


def saved_session(model: Any, directory: Path) -> tuple[QuantizedPagedCache, torch.Tensor]:
    """A cache that went to `directory`, and its text with a further turn."""
    cache = QuantizedPagedCache.from_model(model, kv_cache_dtype="int8")
    text = six_tokens(model, prompt(1, 21), cache)
    cache.save_pretrained(directory)
    return cache, torch.cat([text, prompt(1, 5, seed=3)], dim=1)
