"""Whether two models are the same to a cache: whether their keys and values are."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch

from .dtypes import has_dtype, to_float64
from .hosts.devices import kept_weight

# Configuration entries that say nothing about keys and values.
_IRRELEVANT = {
    "_name_or_path", "architectures", "dtype", "output_attentions", "output_hidden_states", "quantization_config",
    "return_dict", "transformers_version", "use_cache",
}  # fmt: skip
# Entries of a quantization's configuration that say nothing about weights.
_LOADING = {
    "batch_size", "cache_block_outputs", "dataset", "kv_cache_scheme", "llm_int8_enable_fp32_cpu_offload",
    "quantization_status", "run_compressed", "tokenizer",
}  # fmt: skip
_SAMPLES = 16  # numbers taken from each weight
_WRAPPERS = re.compile(r"\b(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")  # that torch puts into names


def config_facts(config: Any) -> dict[str, Any]:
    """The entries of a model's configuration that are not the default's and may matter to keys and values, as JSON."""
    entries = json.loads(json.dumps(config.to_diff_dict(), default=str))
    return {
        name: value for name, value in entries.items() if name not in _IRRELEVANT and not name.endswith("_token_id")
    }


def weights_facts(model: torch.nn.Module) -> dict[str, Any]:
    """What tells the weights of `model` from others, as JSON.

    `weights` has for each by name its dtype, the kind of tensor ("" for torch's own), which part of it this process
    holds ("" for all of it), and a digest of a few of its numbers: None where they cannot be read. Of a model with
    quantized weights only what is never packed is listed (embeddings, adapters, and tensors of one dimension): its
    kernels repack the rest as they are first used, so `quantization` says how they are quantized instead. `adapters`
    says which are active, and how much they count.
    """
    facts: dict[str, list[Any]] = {}
    samples: dict[torch.device, list[tuple[str, torch.Size, torch.Tensor]]] = {}
    for path, weight in _stable_weights(model):
        name = _WRAPPERS.sub("", path)
        numbers, part = _held_here(weight if weight.device.type != "meta" else kept_weight(model, path))
        kind = "" if type(weight.data) is torch.Tensor or hasattr(weight, "placements") else type(weight.data).__name__
        facts[name] = [str(weight.dtype).removeprefix("torch."), kind, part, None]
        if numbers is not None:
            samples.setdefault(numbers.device, []).append((name, numbers.shape, _sample(numbers)))
    for taken in samples.values():
        here = torch.cat([sample for _, _, sample in taken]).cpu()  # one transfer per device
        for (name, shape, _), sample in zip(taken, here.split([len(each) for _, _, each in taken]), strict=True):
            facts[name][3] = _short(str(tuple(shape)).encode() + sample.numpy().tobytes())
    adapters = [
        (module.active_adapters, module.disable_adapters, getattr(module, "scaling", None))
        for module in model.modules()
        if _is_adapted(module)
    ]
    return {"weights": facts, "adapters": _short(repr(adapters).encode()), "quantization": _quantization(model)}


def compare_weights(facts: Mapping[str, Any], others: Mapping[str, Any]) -> tuple[bool, int]:
    """Whether two models' `weights_facts` may be of the same weights, and of how many that is not known.

    A few that cannot be compared, such as those that FSDP has gathered meanwhile, do not count.
    """
    same = all(facts[name] == others[name] for name in ("adapters", "quantization"))
    if not same or facts["weights"].keys() != others["weights"].keys():
        return False, 0
    num_compared = num_unknown = 0
    for name, (dtype, kind, part, digest) in facts["weights"].items():
        other_dtype, other_kind, other_part, other_digest = others["weights"][name]
        if (dtype, kind) != (other_dtype, other_kind):
            return False, 0
        if digest is None and other_digest is None and not kind:
            continue  # another process has it, and looks at it
        if part != other_part or None in (digest, other_digest):
            num_unknown += 1
        elif digest != other_digest:
            return False, 0
        else:
            num_compared += 1
    return True, len(facts["weights"]) - num_compared if num_unknown >= num_compared else 0


def weights_digest(model: torch.nn.Module) -> str:
    """A digest of `weights_facts`."""
    return hashlib.sha256(json.dumps(weights_facts(model), sort_keys=True).encode()).hexdigest()


def _stable_weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    is_quantized = _quantization_entries(model) is not None
    # Offloading parts weights that are tied, so all their names count, and the one of an output layer is none of an
    # embedding.
    modules = model.named_modules(remove_duplicate=False)
    embeddings = {f"{path}.weight" for path, module in modules if isinstance(module, torch.nn.Embedding)}
    adapted = {path for path, module in model.named_modules() if _is_adapted(module)}
    for name, weight in model.named_parameters(remove_duplicate=False):
        if not is_quantized or weight.ndim == 1 or name in embeddings or _is_of_adapter(name, adapted):
            yield name, weight


def _is_adapted(module: torch.nn.Module) -> bool:
    """Whether it is a layer of peft, which keeps the layer that it was as `base_layer`."""
    return isinstance(getattr(module, "disable_adapters", None), bool)


def _is_of_adapter(name: str, adapted: Collection[str]) -> bool:
    parts = name.split(".")
    return "base_layer" not in parts and any(".".join(parts[:length]) in adapted for length in range(1, len(parts)))


def _quantization(model: torch.nn.Module) -> str:
    """A digest of how weights are quantized, without what is about loading or the cache; "" if they are not."""
    entries = _quantization_entries(model)
    if entries is None:
        return ""
    return _short(re.sub(" at 0x[0-9a-f]+", "", json.dumps(entries, sort_keys=True, default=str)).encode())


def _quantization_entries(model: torch.nn.Module) -> dict[str, Any] | None:
    """What a model's configuration says of quantized weights; None if there are none."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        return None
    config = getattr(quantizer, "quantization_config", None)
    entries = config.to_dict() if config is not None else {}
    if entries.get("config_groups") == {}:  # compressed-tensors, for the cache alone
        return None
    about_loading: dict[str, Any] = getattr(config, "get_loading_attributes", dict)()
    return {name: value for name, value in entries.items() if name not in {*about_loading, *_LOADING}}


def _held_here(weight: Any) -> tuple[torch.Tensor | None, str]:
    """The numbers of a weight in this process, None if they cannot be read, and which part of it they are."""
    part = ""
    if hasattr(weight, "placements"):  # a DTensor
        mesh = weight.device_mesh
        places = zip(weight.placements, mesh.get_coordinate() or (), mesh.shape, strict=False)
        part = ", ".join(f"{how} {place}/{size}" for how, place, size in places if not how.is_replicate())
        weight = weight.detach().to_local()
    is_readable = (
        weight is not None and type(weight.data) is torch.Tensor and weight.device.type != "meta" and weight.numel() > 0
    )
    return (weight.detach() if is_readable else None), part


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _sample(numbers: torch.Tensor) -> torch.Tensor:
    flat = numbers.reshape(-1)
    # On the device if that has float64: its places need not be those of a CPU, and saved files hold digests of them.
    where = flat.device if has_dtype(flat.device, torch.float64) else "cpu"
    places = torch.linspace(0, len(flat) - 1, min(_SAMPLES, len(flat)), dtype=torch.float64, device=where)
    return to_float64(flat[places.long()])
