"""TensorRT-LLM's checkpoints: `transformer.layers.N.attention.kv_cache_scaling_factor` in rank*.safetensors.

One number for K and V, or `k_cache_scaling_factor` and `v_cache_scaling_factor`. config.json has
`quantization.kv_cache_quant_algo`, INT8 or FP8. A tensor-parallel rank has its own group of heads; in a pipeline a rank
counts its layers anew. Source: the TensorRT-LLM documentation of its checkpoint format.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from ..checkpoint_scales import ScaleSource
from .files import CheckpointFiles, tensors_in
from .found import Declared, Found, NoUsableScalesError, Value, Wanted
from .spellings import ALGORITHMS, names_a_format

_NAME = re.compile(r".*\blayers\.(\d{1,5})\.attention\.(kv|k|v)_cache_scaling_factor")


def read(files: CheckpointFiles, wanted: Wanted) -> Found | None:
    """The scales of all ranks, or None if there are none under these names."""
    ranks = sorted(Path(files.path).glob("rank*.safetensors"), key=lambda file: (len(file.name), file.name))
    if files.only is not None or not any(_NAME.fullmatch(name) for name in files.names) or not ranks:
        return None
    quantization, mapping = files.config.get("quantization"), files.config.get("mapping")
    algorithm = quantization.get("kv_cache_quant_algo") if isinstance(quantization, dict) else None
    algorithm = algorithm if names_a_format(algorithm) else None
    if algorithm is not None and str(algorithm) not in ALGORITHMS:
        raise NoUsableScalesError(
            f"{files.path}: config.json declares a KV cache of format {algorithm!r}, which is not supported; supported "
            "are FP8 and INT8; scales='dynamic' works with any model"
        )
    if isinstance(mapping, dict) and mapping.get("pp_size", 1) != 1:
        raise ValueError(f"{files.path} is split into pipeline stages; convert it with pp_size 1")
    of_ranks = [tensors_in(file, lambda name: _NAME.fullmatch(name) is not None) for file in ranks]
    if any(tensors.keys() != of_ranks[0].keys() for tensors in of_ranks):
        raise ValueError(f"{files.path}: its rank files have scales of different layers; the checkpoint is broken")
    by_number: dict[int, dict[str, Value]] = {}
    for name in of_ranks[0]:
        match = _NAME.fullmatch(name)
        if match is not None:
            file = ranks[0].name if len(ranks) == 1 else "rank*.safetensors"
            values = torch.cat([tensors[name].to(torch.float32).flatten() for tensors in of_ranks])
            by_number.setdefault(int(match[1]), {})[f"{match[2]}_scale"] = (ScaleSource(file, name), values)
    notes = [] if algorithm else [f"{files.path} declares no KV cache format; its scales are taken to be for fp8_e4m3"]
    declared = Declared("tensorrt-llm", "config.json" if algorithm else None, ALGORITHMS[str(algorithm or "FP8")])
    return Found(declared, by_number=by_number, ranks=len(ranks) > 1, notes=notes)
