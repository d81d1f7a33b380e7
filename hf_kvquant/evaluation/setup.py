"""What numbers belong to: the model, its weights, the versions."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from .._version import __version__
from ..hosts.devices import input_device
from ..identity import config_facts, weights_digest
from ..interface import attention_name
from .machine import device_name


def model_setup(model: PreTrainedModel) -> dict[str, Any]:
    """As JSON: two models with the same entries give the same numbers on the same input."""
    device = input_device(model)
    facts = json.dumps(config_facts(model.config), sort_keys=True).encode()
    return {
        "model": str(getattr(model, "name_or_path", "") or type(model).__name__),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(device),
        "machine": device_name(device),
        "attention": attention_name(model.config.get_text_config(decoder=True)),
        "config": hashlib.sha256(facts).hexdigest(),
        "weights": weights_digest(model),
        "versions": {"hf_kvquant": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }
