"""Random models of real shapes, and caches filled without running a prompt through them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.cache_utils import DynamicCache, QuantizedCache, StaticCache

import hf_kvquant  # noqa: F401 - registers the names that models are made with
from hf_kvquant import QuantizedPagedCache
from hf_kvquant.fixed import FixedLayer
from hf_kvquant.layers import PagedLayer

from .results import NotInstalled

# Llama 3.1 8B and Llama 3.2 1B; and one to try the programs with.
CONFIGS: dict[str, dict[str, Any]] = {
    "8B": {"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "head_dim": 128,
           "tie_word_embeddings": False},
    "1B": {"num_hidden_layers": 16, "hidden_size": 2048, "intermediate_size": 8192, "head_dim": 64,
           "tie_word_embeddings": True},
    "tiny": {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 128, "head_dim": 32,
             "tie_word_embeddings": True, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 99},
}  # fmt: skip
# The first tokens of a cache come alone: scales may be taken from them.
_FIRST_TOKENS = 64
_PIECE = 8192


def build_model(name: str, device: torch.device) -> PreTrainedModel:
    """A bf16 model of the shape `name` with random weights, made on the device."""
    options = {
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 1 << 20, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    config = LlamaConfig(**{**options, **CONFIGS[name]})
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    return model.eval().requires_grad_(False)


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of weights that a decode step reads: all, but of the embedding only if it is the output's as well."""
    tied = model.config.tie_word_embeddings
    skipped = 0 if tied else model.get_input_embeddings().weight.nbytes
    return sum(parameter.nbytes for parameter in model.parameters()) - skipped


@dataclass(frozen=True)
class Way:
    """One way to keep the cache: the attention that goes with it, and how the cache is made.

    `make` takes the model and how many tokens each sequence will reach.
    """

    name: str
    attention: str
    make: Callable[[PreTrainedModel, int], Any]
    compiled: bool = False
    kv_cache_dtype: str | None = None  # of ours


def _ours(kv_cache_dtype: str, fixed: bool, compiled: bool = True) -> Way:
    def make(model: PreTrainedModel, capacity: int) -> QuantizedPagedCache:
        length = capacity if fixed else None
        return QuantizedPagedCache.from_model(model, kv_cache_dtype=kv_cache_dtype, max_cache_len=length)

    label = "compiled" if fixed and compiled else "reserved" if fixed else "eager"
    return Way(f"kvquant {kv_cache_dtype} {label}", "kvquant", make, fixed and compiled, kv_cache_dtype)


def _quantized(backend: str, **options: Any) -> Callable[[PreTrainedModel, int], Any]:
    def make(model: PreTrainedModel, capacity: int) -> Any:
        try:
            return QuantizedCache(backend, config=model.config, **options)
        except (ImportError, ValueError, TypeError) as error:
            raise NotInstalled(f"not available: {error}"[:100]) from None

    return make


# How `generate` runs with our cache on a GPU comes first, then what a user has without it.
WAYS = [
    _ours("fp8", fixed=True),
    Way("DynamicCache", "sdpa", lambda model, capacity: DynamicCache(config=model.config)),
    _ours("int8", fixed=True),
    Way("StaticCache compiled", "sdpa", lambda model, capacity: StaticCache(model.config, capacity), compiled=True),
    _ours("fp8", fixed=False),
    _ours("int8", fixed=False),
    Way("transformers fp8", "sdpa", _quantized("fp8")),
    _ours("model", fixed=True),
    Way("transformers quanto int4", "sdpa", _quantized("quanto", nbits=4)),
    Way("transformers hqq int8", "sdpa", _quantized("hqq", nbits=8)),
]
CAPACITY_WAYS = [
    Way("DynamicCache", "sdpa", lambda model, capacity: DynamicCache(config=model.config)),
    _ours("fp8", fixed=True, compiled=False),
    _ours("int8", fixed=True, compiled=False),
    _ours("fp8", fixed=False),
    Way("transformers fp8", "sdpa", _quantized("fp8")),
]


@torch.no_grad()
def fill(cache: Any, model: PreTrainedModel, batch: int, length: int) -> None:
    """Give every layer `length` random tokens per sequence, as a prompt would leave them.

    All sequences and layers get the same ones, over and over, which no time depends on.
    """
    config = model.config
    layer = cache.layers[0] if cache.layers else None
    ours = isinstance(layer, PagedLayer)
    # Reserved pages are filled piece by piece, so that what they are filled with takes no room itself.
    piece = min(length, _PIECE) if isinstance(layer, FixedLayer) else length
    sizes = (1, config.num_key_value_heads, piece, config.head_dim)
    key, value = (
        torch.randn(sizes, dtype=model.dtype, device=model.device).expand(batch, -1, -1, -1) for _ in range(2)
    )
    stops = sorted(
        {*([_FIRST_TOKENS] if ours and length > _FIRST_TOKENS else []), *range(piece, length, piece), length}
    )
    for start, stop in zip([0, *stops], stops, strict=False):
        for index in range(config.num_hidden_layers):  # as in a model: a layer ahead of others leaves their table
            cache.update(key[:, :, : stop - start], value[:, :, : stop - start], index)
            if ours:
                cache.layers[index].settle()


def cache_bytes(model: PreTrainedModel, batch: int, context: int, kv_cache_dtype: str | None) -> int:
    """Bytes of K and V that a step has to read: `kv_cache_dtype` of ours with dynamic scales, or None for bf16."""
    config = model.config
    bytes_a_head = config.head_dim * 2 if kv_cache_dtype in (None, "model") else config.head_dim + 2
    return 2 * config.num_hidden_layers * config.num_key_value_heads * batch * context * bytes_a_head
