"""compressed-tensors, as written by llm-compressor and AutoRound: `<attention>.k_scale`, `<attention>.v_scale`.

Declared by `quantization_config.kv_cache_scheme` in config.json, or by a group (`config_groups`; AutoRound:
`attention_input_activations`) that quantizes the inputs of attention modules. Strategy `tensor` has scales of shape
[1], `attn_head` [num_kv_heads, 1, 1] (AutoRound: [num_kv_heads]); zero points are in steps of the scale. Up to version
0.5 the scales are `k_proj.output_scale` and `v_proj.output_scale`, measured before the rotary embedding. Where
`transform_config` transforms what is cached (SpinQuant's R3), they are those of transformed numbers.
Source: the compressed-tensors project, `quantization/quant_args.py`, `modeling/kvcache.py` and `transform`.
"""

from __future__ import annotations

from typing import Any

from .files import CheckpointFiles
from .found import Declared, NoUsableScalesError, not_transformed
from .names import Producer

_STATIC_STRATEGIES = (None, "tensor", "attn_head")
_DYNAMIC_STRATEGIES = (None, "tensor", "token", "attn_head")
# Where a transform is applied -> whose numbers it changes.
_LOCATIONS = {"k_cache": "k", "v_cache": "v", "q_attn": "q"}


def declared(files: CheckpointFiles) -> Declared | None:
    """The scheme of the KV cache in config.json, with the defaults of compressed-tensors' QuantizationArgs."""
    for quantization in files.quantizations():
        scheme = quantization.get("kv_cache_scheme")
        scheme = scheme if isinstance(scheme, dict) else _of_attention(quantization)
        if scheme is not None:
            name, dynamic = read_scheme(scheme, files.path)
            transformed = {} if dynamic else _transformed(quantization)
            dynamic = dynamic or {"k", "v"} <= transformed.keys()
            return Declared("compressed-tensors", "config.json", name, dynamic, unused=transformed)
    return None


def _transformed(quantization: dict[str, Any]) -> dict[str, str]:
    """What is transformed on its way to the cache or to its keys, as `Declared.unused`."""
    config = quantization.get("transform_config")
    groups = config.get("config_groups") if isinstance(config, dict) else None
    locations = set()
    for group in groups.values() if isinstance(groups, dict) else ():
        applied = group.get("apply") if isinstance(group, dict) else None
        for entry in applied if isinstance(applied, list) else ():
            if isinstance(entry, dict):
                locations.add(str(entry.get("location")))
    return {
        side: not_transformed(side, f"transform_config: {location}")
        for location, side in _LOCATIONS.items()
        if location in locations
    }


def _of_attention(quantization: dict[str, Any]) -> dict[str, Any] | None:
    """How the inputs of attention modules are quantized, which keys and values then are too."""
    groups = quantization.get("config_groups")
    candidates = list(groups.values()) if isinstance(groups, dict) else []
    for group in [*candidates, quantization.get("attention_input_activations")]:
        if not isinstance(group, dict) or group.get("weights") is not None:
            continue
        targets, scheme = group.get("targets"), group.get("input_activations")
        names = targets if isinstance(targets, list) else []
        if any(_is_attention(str(name)) for name in names) and isinstance(scheme, dict):
            return scheme
    return None


def _is_attention(target: str) -> bool:
    """Whether a target is the name of a class of attention, or a pattern of its paths: `re:.*(self_attn|attention)$`.

    Patterns are compared as text: one that comes from a file may be broken, or take forever.
    """
    text = target.lower().removesuffix("$").removesuffix(".*")
    ends = text[text.rfind("(") + 1 : -1].split("|") if text.endswith(")") else [text]
    return any(end.endswith(("attention", "attn")) for end in ends)


def read_scheme(scheme: dict[str, Any], path: str) -> tuple[str, bool]:
    """Format, and whether scales are dynamic. Raises NoUsableScalesError for what cannot be stored."""
    bits, kind, strategy = scheme.get("num_bits", 8), scheme.get("type", "int"), scheme.get("strategy")
    dynamic = bool(scheme.get("dynamic", False))
    strategies = _DYNAMIC_STRATEGIES if dynamic else _STATIC_STRATEGIES
    if bits != 8 or kind not in ("float", "int") or strategy not in strategies:
        raise NoUsableScalesError(
            f"{path}: kv_cache_scheme with num_bits={bits}, type={kind!r}, strategy={strategy!r} is not supported; "
            "supported are 8 bits, float or int, static per tensor or attn_head, or dynamic per token; "
            "scales='dynamic' with kv_cache_dtype='fp8' or 'int8' works with any model"
        )
    return ("fp8_e4m3" if kind == "float" else "int8"), dynamic


PRODUCER = Producer(
    "compressed-tensors",
    {
        # vLLM's own parameters have one more `attn` in their path; matching knows it.
        r"(?P<module>.+)\.(?P<side>[qkv])_scale": "{side}_scale",
        r"(?P<module>.+)\.(?P<side>[qkv])_zero_point": "{side}_zero_point",
    },
    declared,
)
