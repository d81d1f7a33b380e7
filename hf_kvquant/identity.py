"""Whether two models are the same to a cache: whether their keys and values are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch

# Configuration entries that say nothing about keys and values.
_IRRELEVANT = {
    "_name_or_path", "architectures", "dtype", "output_attentions", "output_hidden_states", "quantization_config",
    "return_dict", "transformers_version", "use_cache",
}  # fmt: skip
_SAMPLES = 16  # numbers taken from each weight


def config_facts(config: Any) -> dict[str, Any]:
    """The entries of a model's configuration that are not the default's and may matter to keys and values, as JSON."""
    entries = json.loads(json.dumps(config.to_diff_dict(), default=str))
    return {
        name: value for name, value in entries.items() if name not in _IRRELEVANT and not name.endswith("_token_id")
    }


def weights_digest(model: torch.nn.Module) -> str:
    """A digest of the weights in their precision: of a few numbers of each, and of which adapters are active.

    Weights that were offloaded and tensors of other libraries are left out. Of a model with quantized weights only what
    is never packed is read (embeddings, and tensors of one dimension): its kernels repack the rest as they are first
    used.
    """
    digest = hashlib.sha256(str(getattr(model, "dtype", None)).encode())
    samples: dict[torch.device, list[torch.Tensor]] = {}
    for weight in _stable_weights(model):
        digest.update(str(tuple(weight.shape)).encode())
        flat = weight.detach().reshape(-1)
        places = torch.linspace(0, len(flat) - 1, min(_SAMPLES, len(flat)), dtype=torch.float64, device=flat.device)
        samples.setdefault(flat.device, []).append(flat[places.long()].to(torch.float64))
    for taken in samples.values():  # one transfer per device
        digest.update(torch.cat(taken).cpu().numpy().tobytes())
    for module in model.modules():
        if isinstance(is_off := getattr(module, "disable_adapters", None), bool):
            digest.update(repr((module.active_adapters, is_off)).encode())
    return digest.hexdigest()


def _stable_weights(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    is_quantized = getattr(model, "hf_quantizer", None) is not None
    embeddings = [module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    for weight in model.parameters():
        is_readable = type(weight.data) is torch.Tensor and weight.device.type != "meta" and weight.numel() > 0
        is_stable = weight.ndim == 1 or any(weight is embedding for embedding in embeddings)
        if is_readable and (is_stable or not is_quantized):
            yield weight
