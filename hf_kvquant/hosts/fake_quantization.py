"""Rounding of keys and values inside a model."""

from __future__ import annotations

from transformers import PreTrainedModel


def disable_fake_quantization(model: PreTrainedModel) -> list[str]:
    """Stop compressed-tensors from rounding K and V on their way to the cache; returns a line for the report.

    Its integration quantizes and dequantizes keys and values inside the model and stores the result in the model's
    dtype. With 8-bit pages that would round twice.
    """
    modules = [
        module for module in model.modules() if hasattr(module, "quantization_scheme") and hasattr(module, "kv_cache")
    ]
    for module in modules:
        module.quantization_enabled = False
    if not modules:
        return []
    return [
        f"compressed-tensors rounded K and V of {len(modules)} layers to 8 bits but stored them in the model's dtype; "
        "that rounding is off now, and storage is really 8-bit"
    ]
