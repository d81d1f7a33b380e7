"""What files call the formats of a KV cache."""

from __future__ import annotations

from typing import Any

# NVIDIA's `kv_cache_quant_algo`.
ALGORITHMS = {"FP8": "fp8_e4m3", "INT8": "int8"}
# The largest number of a format, 127 or 128 for int8.
LARGEST = {448.0: "fp8_e4m3", 127.0: "int8", 128.0: "int8"}


def names_a_format(algorithm: Any) -> bool:
    """Whether `algorithm` says anything; tools write None, "None" or "" for a cache that is not quantized."""
    return str(algorithm).lower() not in ("", "none")
