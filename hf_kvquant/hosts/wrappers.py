"""The transformers model inside what others have wrapped around it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel


def without_wrapper(model: Any) -> PreTrainedModel:
    """The transformers model, also where adapters (peft), `torch.compile` or data parallelism have wrapped it.

    Raises TypeError for anything else.
    """
    inner: Any = model
    while isinstance(inner, torch.nn.Module) and not isinstance(inner, PreTrainedModel):
        get_base_model = getattr(inner, "get_base_model", None)
        if callable(get_base_model):
            inner = get_base_model()
        else:
            inner = getattr(inner, "_orig_mod", getattr(inner, "module", None))
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(f"{type(model).__name__} is no transformers model; give what from_pretrained has returned")
    return inner


def without_data_parallelism(model: Any) -> Any:
    """The model to call with a cache, which data parallelism would split or wait with for others; adapters stay.

    Raises TypeError for what is no transformers model.
    """
    without_wrapper(model)
    while isinstance(model, (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)):
        model = model.module
    return model
