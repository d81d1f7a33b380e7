"""Ascend's C8, of msmodelslim: int8 with `<attention>.k_proj.kv_cache_scale` and `.kv_cache_offset`, also for `v_proj`.

One number or one per channel, head by head; the offset is in steps of the scale, `x = (q - offset) * scale`. Declared
by `kv_cache_type` or `kv_quant_type` in quant_model_description*.json. Source: the vllm-ascend project.
"""

from __future__ import annotations

from .files import CheckpointFiles
from .found import Declared, NoUsableScalesError
from .names import Producer


def declared(files: CheckpointFiles) -> Declared | None:
    """What the description of the quantized model says."""
    for file, content in files.settings("quant_model_description*.json"):
        kind = content.get("kv_cache_type") or content.get("kv_quant_type")
        if kind == "C8":
            return Declared("ascend", file, "int8")
        if kind:
            raise NoUsableScalesError(
                f"{files.path}: {file} declares a KV cache of type {kind!r}, which is not supported; supported is "
                "'C8'; scales='dynamic' works with any model"
            )
    return None


PRODUCER = Producer(
    "ascend",
    {
        r"(?P<module>.+)\.(?P<side>[kv])_proj\.kv_cache_scale": "{side}_scale",
        r"(?P<module>.+)\.(?P<side>[kv])_proj\.kv_cache_offset": "{side}_zero_point",
    },
    declared,
    implied="int8",
)
