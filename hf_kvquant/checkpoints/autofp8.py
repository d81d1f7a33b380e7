"""AutoFP8 and what followed it: `quant_method: "fp8"` with `kv_cache_scheme: "static"`, and TGI's key in config.json.

Until July 2024 one scale `<attention>.kv_scale` serves K and V, then there are `k_scale` and `v_scale`. Quark's export
for vLLM and AngelSlim declare themselves in the same way. TGI's branch for fp8 caches has `kv_cache_torch_dtype` (or
`kv_cache_dtype`) instead, which may be e4m3fnuz: its scales are taken as they are, since e4m3fn reaches farther.
Source: the AutoFP8 project; text-generation-inference pull request 2028.
"""

from __future__ import annotations

from .files import CheckpointFiles
from .found import Declared, NoUsableScalesError
from .names import Producer

_TGI = {"float8_e4m3fn": "fp8_e4m3", "float8_e4m3fnuz": "fp8_e4m3", "float8_e5m2": "fp8_e5m2"}


def declared(files: CheckpointFiles) -> Declared | None:
    """What config.json says in either way. Raises NoUsableScalesError for other formats."""
    for quantization in files.quantizations():
        scheme = quantization.get("kv_cache_scheme")
        if quantization.get("quant_method") == "fp8" and isinstance(scheme, str):
            if scheme not in ("static", "dynamic"):
                raise NoUsableScalesError(
                    f"{files.path}: kv_cache_scheme {scheme!r} is not supported; supported are 'static' and 'dynamic'; "
                    "scales='dynamic' with kv_cache_dtype='fp8' or 'int8' works with any model"
                )
            return Declared(
                "autofp8", "config.json", "fp8_e4m3", dynamic=scheme == "dynamic", before_rotation=scheme == "static"
            )
    for key in ("kv_cache_torch_dtype", "kv_cache_dtype"):
        value = str(files.config.get(key, "")).removeprefix("torch.")
        if value in _TGI:
            # Whoever asks for e5m2 needs no scales.
            return Declared("tgi", "config.json", _TGI[value], means_one=_TGI[value] == "fp8_e5m2")
        if value.startswith("float8"):
            raise NoUsableScalesError(
                f"{files.path}: {key} {value!r} is not supported; supported are {', '.join(_TGI)}; "
                "scales='dynamic' works with any model"
            )
    return None


PRODUCER = Producer("autofp8", {r"(?P<module>.+)\.kv_scale": "kv_scale"}, declared)
