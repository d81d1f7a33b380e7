"""vLLM's `kv_cache_scales.json`, of `--quantization-param-path`, which SGLang reads too.

`{"model_type": "llama", "kv_cache": {"dtype": "float8_e4m3fn", "scaling_factor": {rank: {layer: number}}}}`: one number
for K and V. A tensor-parallel rank has its own group of heads. Source: the documentation of vLLM 0.6.6.
"""

from __future__ import annotations

from .files import CheckpointFiles
from .found import Declared, Found, NoUsableScalesError, Wanted
from .parse import check_model_type, indexed, number, numbers_at, object_at

FILE = "kv_cache_scales.json"


def read(files: CheckpointFiles, wanted: Wanted) -> Found | None:
    """The scales of the file, or None if there is none of this format."""
    for file, content in files.documents(FILE):
        cache = content.get("kv_cache")
        if not isinstance(cache, dict) or "scaling_factor" not in cache:
            continue
        where = f"{files.path}/{file}"
        if cache.get("dtype") != "float8_e4m3fn":
            raise NoUsableScalesError(
                f"{where}: dtype {cache.get('dtype')!r} is not supported; supported is 'float8_e4m3fn'; "
                "scales='dynamic' works with any model"
            )
        check_model_type(content.get("model_type"), wanted.model, files, where)
        ranks = indexed(object_at(cache, "scaling_factor", where), f"{where}: scaling_factor")
        layers = [indexed(ranks[rank], f"{where}: scaling_factor[{rank}]") for rank in range(len(ranks))]
        if any(rank.keys() != layers[0].keys() for rank in layers):
            raise ValueError(f"{where}: the ranks of scaling_factor have different layers; the file is broken")
        by_number = {}
        for layer in layers[0]:
            key = f"scaling_factor[{'*' if len(layers) > 1 else 0}][{layer}]"
            values = [number(rank[layer], f"{key} in {where}") for rank in layers]
            by_number[layer] = {"kv_scale": numbers_at(file, key, values)}
        return Found(Declared("vllm", file, "fp8_e4m3"), by_number=by_number, ranks=len(layers) > 1)
    return None
