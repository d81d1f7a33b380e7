"""Mistral's own checkpoints (`consolidated.safetensors`): `layers.N.attention.k_fake_quantizer.qscale_act`.

One for K, V and the query each, or `kv_fake_quantizer.qscale_act` for K and V together. config.json says nothing of it.
Source: vLLM's mapping of Mistral's names.
"""

from __future__ import annotations

from .names import Producer, undeclared

PRODUCER = Producer(
    "mistral", {r"(?P<module>.+)\.(?P<side>[qkv]|kv)_fake_quantizer\.qscale_act": "{side}_scale"}, undeclared
)
