"""Running text through a model and watching what reaches its cache."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from transformers import AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from ..attention import kvquant_attention, kvquant_mask
from ..calibration_data import Batch
from ..hosts.configuration import config_number, layer_type_names
from ..hosts.conventions import with_cache
from ..hosts.devices import input_device
from ..hosts.modes import evaluating
from ..interface import attention_by_part, uses_attention_interface
from ..rotary import rotary_layouts
from ..scales import LayerScales
from ..sharding import head_shard
from .estimating import Estimate
from .statistics import Statistics

# How many times as large as others channels or heads may be where they share an int8 scale: beyond that those others
# have fewer than four bits.
CROWDED = 16


class Gatherer:
    """Runs batches through the model and keeps the statistics of K, V and Q of every cache layer."""

    def __init__(self, model: PreTrainedModel, sample_tokens: int) -> None:
        self._model = model
        self._sample_tokens = sample_tokens
        self._text_config = model.config.get_text_config(decoder=True)
        template = DynamicCache(config=self._text_config).layers
        types = layer_type_names(self._text_config, template)
        self.num_layers = len(template)
        self.attention_layers = [index for index, layer in enumerate(template) if isinstance(layer, DynamicLayer)]
        self._rotary = rotary_layouts(model, types)
        self._statistics: dict[tuple[int, str], Statistics] = {}
        self._valid: torch.Tensor | None = None  # [B, T] of the batch, None where all are tokens
        self._attending: int | None = None  # the layer whose keys have just come, until its attention has run
        self._logits_to_keep = 1
        self._cached: dict[int, torch.Tensor] = {}  # keys of every layer of the batch
        self.num_tokens = 0
        self.num_sequences = 0

    def join(self, num_kv_heads: Sequence[int | None]) -> None:
        """Where processes share the heads of the model, count those of all; every process comes to the same.

        Args:
            num_kv_heads: of each layer of the whole model.
        """
        shard = head_shard(self._model)
        if shard is None:
            return
        num_heads = config_number(self._text_config, "num_attention_heads")
        whole = {layer: num_kv_heads[layer] or num_heads for layer, side in self._statistics if side == "k"}
        is_shared = {layer: self._statistics[layer, "k"].num_heads * shard.size == whole[layer] for layer in whole}
        for layer, side in sorted(self._statistics):  # in the same order everywhere
            if is_shared[layer]:
                self._statistics[layer, side].join(shard)

    @property
    def num_unusable(self) -> int:
        return sum(int(statistics.num_unusable) for statistics in self._statistics.values())

    def run(self, batches: Iterator[Batch], queries: bool, progress: bool) -> bool:
        """Gather from all batches; returns whether that was interrupted."""
        parameters = inspect.signature(self._model.forward).parameters
        # Layers that use the keys of others compute only the tokens whose logits are asked for.
        if queries and config_number(self._text_config, "num_kv_shared_layers"):
            self._logits_to_keep = 0  # all
        try:
            with (
                evaluating(self._model),
                self._watched_queries() if queries else nullcontext(),
                torch.no_grad(),  # some quantized weights do not work in inference mode
                logging.tqdm(desc="calibrating", unit=" tokens", unit_scale=True, disable=not progress) as bar,
            ):
                for batch in batches:
                    self._forward(batch, parameters)
                    bar.update(batch.num_tokens)
            return False
        except KeyboardInterrupt:
            return True

    def _forward(self, batch: Batch, parameters: Any) -> None:
        device = input_device(self._model)
        inputs: dict[str, Any] = {name: value.to(device) for name, value in batch.inputs.items()}
        mask = batch.mask
        self._valid = None if mask is None or bool(mask.all()) else mask
        if mask is not None and self._valid is not None and not bool(mask[:, 0].all()) and "position_ids" in parameters:
            # Tokens count from their own beginning, as `generate` has it.
            positions = (mask.long().cumsum(dim=-1) - 1).clamp(min=0)
            inputs.setdefault("position_ids", positions.to(device))
        if "logits_to_keep" in parameters:
            inputs["logits_to_keep"] = self._logits_to_keep
        cache: Any = _WatchedCache(self._text_config, self)
        if self._model.config.is_encoder_decoder:
            cache = EncoderDecoderCache(cache, DynamicCache(config=self._text_config))
        self._model(**inputs, **with_cache(cache))
        self._cached.clear()
        self.num_tokens += batch.num_tokens
        self.num_sequences += batch.num_sequences

    def see(self, layer: int, side: str, x: torch.Tensor) -> None:
        """Count `[B, H, T, D]` of one layer."""
        x = x.detach().transpose(1, 2)
        if self._valid is not None:
            if self._valid.shape != x.shape[:2]:
                raise ValueError(
                    f"layer {layer} caches {list(x.shape[:2])} tokens of a batch whose mask is "
                    f"{list(self._valid.shape)}, so padding cannot be told from tokens; give batches without padding"
                )
            x = x[self._valid.to(x.device)]
        else:
            x = x.flatten(0, 1)
        if len(x):
            self._statistics.setdefault((layer, side), Statistics(self._sample_tokens)).add(x)

    def see_cached(self, layer: int, key: torch.Tensor, value: torch.Tensor, cached: torch.Tensor) -> None:
        """`cached` are the keys that attention gets for `key`."""
        self._attending, self._cached[layer] = layer, cached
        self.see(layer, "k", key)
        self.see(layer, "v", value)

    @contextmanager
    def _watched_queries(self) -> Iterator[None]:
        """Attention that passes each layer's queries by; the model's own comes back afterwards."""
        if not uses_attention_interface(self._model.config.get_text_config(decoder=True)):
            raise ValueError("q_scale=True: this model computes its attention itself, its queries cannot be seen")

        def attention(
            module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any
        ) -> Any:
            layer, self._attending = self._attending, None
            if layer is None:  # it may use the keys of an earlier layer
                layer = next((i for i, cached in self._cached.items() if cached.data_ptr() == key.data_ptr()), None)
            # What attends to nothing in this cache (a vision tower, cross-attention) has put no keys into it.
            if layer is not None:
                self.see(layer, "q", query)
            return kvquant_attention(module, query, key, *args, **kwargs)

        before, name = attention_by_part(self._model), f"kvquant_calibration_{id(self)}"  # not another's
        ALL_ATTENTION_FUNCTIONS[name] = attention
        AttentionMaskInterface.register(name, kvquant_mask)  # transformers makes masks for what is registered
        try:
            self._model.set_attn_implementation(name)
            yield
        finally:
            self._model.set_attn_implementation(before)
            del ALL_ATTENTION_FUNCTIONS[name], AttentionMaskInterface._global_mapping[name]

    def is_crowded(self, layer: int, granularity: str) -> bool:
        """Whether numbers of very different size share a scale: outlier channels, or loud and quiet heads."""
        for side in "kv":
            if granularity == "channel" or (layer, side) not in self._statistics:
                continue
            largest = self._statistics[layer, side].largest
            of_head = largest.amax(dim=1)
            heard = of_head[of_head > 0]
            if (of_head > CROWDED * largest.median(dim=1).values).any():
                return True
            if granularity == "tensor" and len(heard) and heard.max() > CROWDED * heard.min():
                return True
        return False

    def scales_of(self, layer: int, estimate: Estimate) -> LayerScales | None:
        """Scales of a layer from what was seen, None if nothing was."""
        if (layer, "k") not in self._statistics:
            return None
        k_scale, k_zero = estimate(self._statistics[layer, "k"], self._rotary[layer])
        v_scale, v_zero = estimate(self._statistics[layer, "v"])
        q_scale = None
        if (layer, "q") in self._statistics:
            granularity = "tensor" if estimate.granularity == "tensor" else "head"
            q_scale, _ = replace(estimate, granularity=granularity, symmetric=True)(self._statistics[layer, "q"])
        return LayerScales(k_scale, v_scale, q_scale, k_zero, v_zero)


class _WatchedCache(DynamicCache):
    """transformers' cache, which tells what it is given."""

    def __init__(self, config: Any, gatherer: Gatherer) -> None:
        super().__init__(config=config)
        self._gatherer = gatherer
        for index, layer in enumerate(self.layers):  # models that run layers several times copy these for it
            layer.counts_as = index

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        stored = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        layer = getattr(self.layers[layer_idx], "counts_as", layer_idx)
        self._gatherer.see_cached(layer, key_states, value_states, stored[0])
        return stored
