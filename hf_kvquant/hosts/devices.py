"""Where a model runs, and where accelerate keeps the weights that are not there."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from transformers import PreTrainedModel

from .attention_modules import attention_paths
from .wrappers import without_wrapper


def layer_devices(model: PreTrainedModel, num_layers: int) -> list[torch.device]:
    """For each cache layer the device on which its attention runs, which need not be where its weights are kept."""
    modules = dict(model.named_modules())
    usual = input_device(model)
    paths = attention_paths(model, num_layers)
    return [usual if path is None else _runs_on(modules[path]) or usual for path in paths]


def input_device(model: Any) -> torch.device:
    """The device for token ids: the model's, or where its weights are offloaded, the one on which it runs."""
    model = without_wrapper(model)
    device = model.device
    return device if device.type != "meta" else _runs_on(model) or device


def _runs_on(module: torch.nn.Module) -> torch.device | None:
    """The device on which a module runs; None if neither accelerate's hooks nor weights tell."""
    for part in module.modules():
        for hook in _hooks(part):
            device = getattr(hook, "execution_device", None)
            if device is not None and torch.device(device).type != "meta":
                return torch.device(device)
    return next((weight.device for weight in module.parameters() if weight.device.type != "meta"), None)


def _hooks(module: torch.nn.Module) -> Sequence[Any]:
    """accelerate's, by which it runs modules on other devices than their weights are kept on."""
    hook = getattr(module, "_hf_hook", None)
    return getattr(hook, "hooks", (hook,))


def kept_weight(model: torch.nn.Module, name: str) -> torch.Tensor | None:
    """What accelerate keeps of an offloaded parameter, read from the disk where it lies there; None for any other."""
    parts = name.split(".")
    # The hook is of the module that has the parameter or of one around it.
    for length in range(len(parts) - 1, -1, -1):
        for hook in _hooks(model.get_submodule(".".join(parts[:length]))):
            if weights := getattr(hook, "weights_map", None):
                with suppress(KeyError):
                    return weights[".".join(parts[length:])]
    return None
