"""A model by its configuration alone, with random weights: its times are those of the real one."""

from __future__ import annotations

import os

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..skeleton import building, read_configuration


def random_model(
    source: str | os.PathLike[str],
    dtype: torch.dtype | str = "auto",
    device: str | torch.device = "cpu",
    revision: str | None = None,
) -> PreTrainedModel:
    """The model of a directory or hub id as its configuration describes it, the same random weights every time.

    Args:
        source: where the configuration is; no weights are read, and no scales of a checkpoint will be.
        dtype: of the weights, or its name; "auto" for the configuration's.
        device: where they are made.
        revision: branch, tag or commit, if the source is a hub id.

    Raises ValueError for a source without a configuration that transformers knows, or none that makes a model.
    """
    config = read_configuration(source, revision)
    chosen = (config.dtype or torch.float32) if dtype == "auto" else getattr(torch, str(dtype).removeprefix("torch."))
    config._name_or_path = ""
    with building(source), torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=chosen)
    return model.eval().requires_grad_(False)
