"""Tasks of the lm-evaluation-harness over this cache, as its model `kvquant`; the package lm-eval is needed.

    python -m hf_kvquant.evaluation.harness --model kvquant \\
        --model_args pretrained=MODEL,kv_cache_dtype=int8 --tasks hellaswag,gsm8k

takes the arguments of `lm_eval`. The harness's own `hf` model scores a text in one forward pass without a cache: keys
and values are never stored, and quantizing them could not show.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch

from ..cache import QuantizedPagedCache
from ..config import KVQuantConfig
from ..hosts.conventions import with_cache
from .windows import chunk_sizes

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError("the lm-evaluation-harness is not installed: pip install 'hf-kvquant[eval]'") from error

# A text so short is read token by token: at once it would attend to itself, and to nothing that is stored.
_SHORT = 8


@register_model("kvquant")
class KVQuantLM(HFLM):
    """The harness's `hf` model, which reads what it scores, and generates, over a `QuantizedPagedCache`.

    A text to score is read in pieces, each over what is stored of those before it: 8 tokens, then more and more up to
    256 at a time, as in `hf_kvquant.compare`.

    Args:
        pretrained: as for `hf`: directory or hub id, or a model that is loaded.
        chunk: tokens of a piece; 1 is as in generation, and slow. None for growing pieces.
        attn_implementation: for a model that is to be loaded.
        arguments: those of `hf`, and the fields of `KVQuantConfig`. `kv_cache_dtype="model"` scores over unquantized
            pages, to compare with.

    Raises ValueError for options that are unknown or do not fit, and for encoder-decoder models.
    """

    def __init__(
        self, pretrained: Any, *, chunk: int | None = None, attn_implementation: str = "kvquant", **arguments: Any
    ) -> None:
        if chunk is not None and (not isinstance(chunk, int) or chunk < 1):
            raise ValueError(f"chunk={chunk!r}; it must be a number of tokens")
        names = [each.name for each in fields(KVQuantConfig)]
        self._cache_config = {name: arguments.pop(name) for name in names if name in arguments}
        KVQuantConfig.parse(self._cache_config)
        self._chunk = chunk
        if isinstance(pretrained, str):
            arguments["attn_implementation"] = attn_implementation
        super().__init__(pretrained, **arguments)
        if self.backend != "causal":
            raise ValueError("the harness's model kvquant is for decoders; encoder-decoder models are not served")

    def _model_call(self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None) -> torch.Tensor:
        """Logits `[B, T, vocabulary]` of token ids `[B, T]`, which are padded at the end."""
        num_tokens = inps.shape[1]
        pieces: Any = self._chunk or ([1] * num_tokens if num_tokens <= _SHORT else chunk_sizes(num_tokens))
        cache = QuantizedPagedCache.for_generation(self.model, self._cache_config, expected_length=num_tokens)
        dtype = self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            logits = [self.model(input_ids=piece, **with_cache(cache)).logits for piece in inps.split(pieces, dim=1)]
        return torch.cat(logits, dim=1)

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **generation_kwargs: Any) -> torch.Tensor:
        ours = {"cache_implementation": "kvquant", "cache_config": self._cache_config}
        return super()._model_generate(context, max_length, stop, **{**generation_kwargs, **ours})

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results: the cache's options as well."""
        return {**super().get_model_info(), "cache_config": self._cache_config, "chunk": self._chunk}


if __name__ == "__main__":
    cli_evaluate()
