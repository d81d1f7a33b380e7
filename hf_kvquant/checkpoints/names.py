"""Names of tensors: which module's value it is, and which one."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .files import CheckpointFiles
    from .found import Declared

# What scales and zeros of a KV cache are called by anyone, read here or not. Scales of weights and of a linear layer's
# inputs have other names.
_LOOKS = re.compile(
    r".*(?:"
    r"\b(?:q|k|v|kv|prob)_(?:\w+_)?(?:scale|zero_point|scaling_factor)"  # k_scale, k_global_scale, k_zero_point
    r"|kv_cache\w*|\b[kv]_cache[._]\w+|\bcache_?[kv]\w*\.activation\w*"  # kv_cache_scale, k_cache.scale, cachek_matmul
    r"|\b(?:q|k|v|kv|qkv|kv_[ab])_proj\w*\.output_(?:scale|zero_point)"
    r"|\b(?:query_key_value|Wqkv|wkv)\.output_(?:scale|zero_point)"
    r"|\b[kv]_proj\.[kv]_bias"
    r"|\b(?:q|k|v|kv)_fake_quantizer\.qscale_act|\bfa_[qkv]\.\w+|(?:attn|attention)\.q\.scale"
    r")"
)
# No module path is longer, and patterns take their time over names without end.
MAX_LENGTH = 500
# How every name that is read ends.
_ENDINGS = ("scale", "zero_point", "bias", "offset", "qscale_act")


def looks_like_kv_scale(name: str) -> bool:
    """Whether a tensor of this name is likely to be about quantizing queries, keys or values."""
    return len(name) <= MAX_LENGTH and _LOOKS.fullmatch(name) is not None


@dataclass(frozen=True)
class Producer:
    """A tool that puts KV scales among the tensors of a checkpoint.

    Attributes:
        name: as it is reported.
        names: pattern of a whole name -> the part it is (see `Found`). Groups: `module`, and `side` if the part has
            `{side}` in it.
        declared: what the configuration says, or None if it says nothing in this producer's way. Raises
            NoUsableScalesError for formats that are not supported.
        implied: the format where nothing is declared.
        after_rotation: whoever has these names measures keys after their rotary embedding, however it is declared.
    """

    name: str
    names: Mapping[str, str]
    declared: Callable[[CheckpointFiles], Declared | None]
    implied: str = "fp8_e4m3"
    after_rotation: bool = False


def parse(name: str, producers: tuple[Producer, ...]) -> tuple[Producer, str, str] | None:
    """Whose name this is, of which module and which part; None if it is nobody's."""
    # Of a hundred thousand tensors nearly all are weights.
    if len(name) > MAX_LENGTH or not name.endswith(_ENDINGS):
        return None
    for producer in producers:
        for pattern, part in producer.names.items():
            match = re.fullmatch(pattern, name)
            if match:
                return producer, match["module"], part.format(side=match.groupdict().get("side"))
    return None


def undeclared(files: CheckpointFiles) -> None:
    """`declared` of producers that leave the configuration alone."""
    return None
