"""`calibrate`: static scales from real tokens, with the statistics of any number of them in bounded memory.

The numbers are those that reach the cache: keys after rotation and norms, values as they are stored. Padding does not
count.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, overload

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from .attention import kvquant_attention, kvquant_mask
from .calibration_data import Batch, batches_of
from .checkpoints import ModelLayers
from .formats import StorageFormat, get_format
from .hosts import (
    attention_by_part,
    disable_fake_quantization,
    layer_type_names,
    model_layers,
    uses_attention_interface,
)
from .ops import reference
from .rotary import RotaryLayout, rotary_layouts
from .scales import GRANULARITIES, LayerScales

ESTIMATORS = ("absmax", "percentile", "mse")
FORMATS = ("fp8_e4m3", "int8")

# Tokens kept of each layer for `percentile` and `mse`: a million numbers a layer of 8 heads of 128 channels.
_SAMPLE_TOKENS = 1024
# A channel that calibration hardly moved counts for at least this share of its head's largest: later text may move it,
# and rounding it coarser than that costs nothing beside its neighbours.
_SHARE_OF_LARGEST = 1 / 64
# How many times as large as others channels or heads may be where they share an int8 scale: beyond that those others
# have fewer than four bits.
_CROWDED = 16
_NOT_TURNED = RotaryLayout("none")
# Shares of the full range that the search for the smallest squared error tries.
_SHRINKS = tuple(1.0 - step / 40 for step in range(29))

logger = logging.get_logger(__name__)


@dataclass(frozen=True, eq=False)
class Calibration(Sequence["LayerScales | None"]):
    """Calibrated scales: a sequence with one entry a cache layer, as `scales=` takes it; `write_scales` saves it.

    Attributes:
        kv_cache_dtype: the format they are made for.
        layers: one entry a cache layer; None where no token reached one, or where there is no K and V.
        model_layers: which modules of the model these layers are.
        num_tokens: tokens seen, without padding.
        settings: how they were made, in words, for files and reports.
        notes: what a user should know.
    """

    kv_cache_dtype: str
    layers: list[LayerScales | None] = field(repr=False)
    model_layers: ModelLayers = field(repr=False)
    num_tokens: int
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @overload
    def __getitem__(self, index: int) -> LayerScales | None: ...
    @overload
    def __getitem__(self, index: slice) -> list[LayerScales | None]: ...
    def __getitem__(self, index: int | slice) -> Any:
        return self.layers[index]

    def __len__(self) -> int:
        return len(self.layers)


def calibrate(
    model: PreTrainedModel,
    data: Any,
    *,
    tokenizer: Any = None,
    kv_cache_dtype: str = "fp8",
    granularity: str = "tensor",
    estimator: str = "absmax",
    symmetric: bool = True,
    percentile: float = 99.99,
    q_scale: bool = False,
    num_samples: int = 512,
    max_length: int = 2048,
    batch_size: int = 1,
    progress: bool = True,
) -> Calibration:
    """Static scales for K and V of every cache layer of `model`, from the tokens of `data`.

    Args:
        model: a loaded model, on any device or devices. Where compressed-tensors rounds K and V inside it, that is
            switched off for the life of the model.
        data: a text, JSON or JSONL file; `name`, `name:split` or `name:config:split` of a data set of the `datasets`
            package; texts or conversations in a sequence; token ids `[T]` or `[B, T]`, or a sequence of such; or
            batches from a DataLoader, `{"input_ids": [B, T], "attention_mask": [B, T], ...}`.
        tokenizer: for text; by default the one that lies beside the model.
        kv_cache_dtype: `fp8` (= `fp8_e4m3`) or `int8`.
        granularity: one scale per `tensor`, `head` or `channel`.
        estimator: `absmax`: nothing that was seen clips. `percentile`: the rest beyond `percentile` does. `mse`: the
            range with the smallest squared error. The last two judge by a uniform sample of the tokens.
        symmetric: False adds a zero in the middle of the range; not for keys that a rotary embedding turns, whose
            middle is another one at every position.
        percentile: share of numbers in percent that do not clip.
        q_scale: scales of the queries as well, per tensor or, with a finer granularity, per query head.
        num_samples, max_length: most texts or sequences, and most tokens of each.
        batch_size: sequences in a forward pass; batches of a DataLoader are taken as they are.
        progress: show a bar.

    An interrupt (ctrl-C) ends the gathering; the result is made of what was seen until then, and its notes say so.

    Raises ValueError naming the option for values that do not exist, data without tokens, and models that cannot be
    calibrated; TypeError for data of another kind.
    """
    row = get_format(kv_cache_dtype)
    if row.name not in FORMATS:
        raise ValueError(f"kv_cache_dtype={kv_cache_dtype!r} has no static scales; choose fp8 or int8")
    for name, value, known in (("granularity", granularity, GRANULARITIES), ("estimator", estimator, ESTIMATORS)):
        if value not in known:
            raise ValueError(f"{name}={value!r}; choose one of {', '.join(known)}")
    if not 50 < percentile <= 100:
        raise ValueError(f"percentile={percentile!r}; it is the share of numbers that fit, above 50 and at most 100")
    for name, number in (("num_samples", num_samples), ("max_length", max_length), ("batch_size", batch_size)):
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"{name}={number!r}; it must be a positive integer")

    batches = batches_of(data, model, tokenizer, num_samples, max_length, batch_size)
    gatherer = _Gatherer(model, sample_tokens=0 if estimator == "absmax" else _SAMPLE_TOKENS)
    notes = disable_fake_quantization(model)
    if interrupted := gatherer.run(batches, q_scale, progress):
        notes.append(f"interrupted after {gatherer.num_tokens:,} tokens; the scales are those of what was seen")
        logger.warning(notes[-1])
    if gatherer.num_tokens == 0:
        raise ValueError("no token was seen" + (" before the interrupt" if interrupted else "; the data is empty"))

    estimate = _Estimate(row, granularity, estimator, symmetric, percentile)
    layers = [gatherer.scales_of(index, estimate) for index in range(gatherer.num_layers)]
    if unseen := [index for index in gatherer.attention_layers if layers[index] is None]:
        notes.append(f"no token reached the cache in layers {unseen}; they have no scales")
        warnings.warn(notes[-1], stacklevel=2)
    if gatherer.num_unusable:
        notes.append(f"{gatherer.num_unusable:,} numbers were NaN or infinite; they are left out")
        warnings.warn(notes[-1], stacklevel=2)
    # A float keeps its relative precision whatever shares its scale.
    crowded = [index for index in range(gatherer.num_layers) if gatherer.is_crowded(index, granularity)]
    if row.name == "int8" and crowded:
        notes.append(
            f"layers {crowded} have channels or heads more than {_CROWDED} times as large as others under the "
            "same scale, which leaves these few codes of int8; granularity='channel', or dynamic scales, keep them"
        )
        warnings.warn(notes[-1], stacklevel=2)
    settings: dict[str, Any] = {"granularity": granularity, "estimator": estimator, "symmetric": symmetric}
    settings |= {"percentile": percentile} if estimator == "percentile" else {}
    settings |= {"tokens": gatherer.num_tokens, "sequences": gatherer.num_sequences, "max_length": max_length}
    return Calibration(row.name, layers, model_layers(model), gatherer.num_tokens, settings, notes)


# -- gathering ---------------------------------------------------------------------------------------------------------


class _Statistics:
    """What is kept of one side of one layer: the range of every channel, and a uniform sample of tokens."""

    def __init__(self, sample_tokens: int) -> None:
        self.low = torch.tensor(torch.inf)  # [H, D] with the first tokens
        self.high = torch.tensor(-torch.inf)
        self.num_unusable: torch.Tensor | int = 0
        self.sample: torch.Tensor | None = None  # [S, H, D], on the CPU
        self._sample_tokens = sample_tokens
        # The tokens with the largest of random numbers drawn one a token are a uniform sample of all that came by.
        self._draws = torch.empty(0)
        self._generator = torch.Generator().manual_seed(0)

    @property
    def head_dim(self) -> int:
        return self.largest.shape[1]

    @property
    def largest(self) -> torch.Tensor:
        """The largest absolute value of every channel, `[H, D]`."""
        return torch.maximum(-self.low, self.high)

    def add(self, x: torch.Tensor) -> None:
        """`[N, H, D]` of N tokens."""
        usable = x.isfinite()
        self.num_unusable = self.num_unusable + (~usable).sum()  # read back once, at the end
        x = torch.where(usable, x, 0)
        low, high = (bound.to(torch.float32) for bound in x.aminmax(dim=0))
        self.low = torch.minimum(self.low.to(low.device), low)
        self.high = torch.maximum(self.high.to(high.device), high)
        if self._sample_tokens:
            self._add_to_sample(x)

    def _add_to_sample(self, x: torch.Tensor) -> None:
        draws = torch.cat([self._draws, torch.rand(x.shape[0], generator=self._generator)])
        num_old = len(self._draws)
        kept = draws.topk(min(self._sample_tokens, len(draws))).indices.sort().values
        new = x[(kept[kept >= num_old] - num_old).to(x.device)].cpu()
        self.sample = new if self.sample is None else torch.cat([self.sample[kept[kept < num_old]], new])
        self._draws = draws[kept]


class _Gatherer:
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
        self._statistics: dict[tuple[int, str], _Statistics] = {}
        self._valid: torch.Tensor | None = None  # [B, T] of the batch, None where all are tokens
        self._attending: int | None = None  # the layer whose keys have just come, until its attention has run
        self.num_tokens = 0
        self.num_sequences = 0

    @property
    def num_unusable(self) -> int:
        return sum(int(statistics.num_unusable) for statistics in self._statistics.values())

    def run(self, batches: Iterator[Batch], queries: bool, progress: bool) -> bool:
        """Gather from all batches; returns whether that was interrupted."""
        parameters = inspect.signature(self._model.forward).parameters
        was_training = self._model.training
        self._model.eval()
        try:
            with (
                self._watched_queries() if queries else nullcontext(),
                torch.inference_mode(),
                logging.tqdm(desc="calibrating", unit=" tokens", unit_scale=True, disable=not progress) as bar,
            ):
                for batch in batches:
                    self._forward(batch, parameters)
                    bar.update(batch.num_tokens)
            return False
        except KeyboardInterrupt:
            return True
        finally:
            self._model.train(was_training)

    def _forward(self, batch: Batch, parameters: Any) -> None:
        inputs: dict[str, Any] = {name: value.to(self._model.device) for name, value in batch.inputs.items()}
        mask = batch.mask
        self._valid = None if mask is None or bool(mask.all()) else mask
        if mask is not None and self._valid is not None and not bool(mask[:, 0].all()) and "position_ids" in parameters:
            # Tokens count from their own beginning, as `generate` has it.
            positions = (mask.long().cumsum(dim=-1) - 1).clamp(min=0)
            inputs.setdefault("position_ids", positions.to(self._model.device))
        if "logits_to_keep" in parameters:
            inputs["logits_to_keep"] = 1
        cache: Any = _WatchedCache(self._text_config, self)
        if self._model.config.is_encoder_decoder:
            cache = EncoderDecoderCache(cache, DynamicCache(config=self._text_config))
        self._model(**inputs, past_key_values=cache, use_cache=True)
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
            self._statistics.setdefault((layer, side), _Statistics(self._sample_tokens)).add(x)

    def see_cached(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        self._attending = layer
        self.see(layer, "k", key)
        self.see(layer, "v", value)

    @contextmanager
    def _watched_queries(self) -> Iterator[None]:
        """Attention that passes each layer's queries by; the model's own comes back afterwards."""
        if not uses_attention_interface(self._model.config):
            raise ValueError("q_scale=True: this model computes its attention itself, its queries cannot be seen")
        name = "kvquant_calibration"

        def attention(module: torch.nn.Module, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            # What attends to nothing in this cache (a vision tower, cross-attention) has put no keys into it.
            if self._attending is not None:
                self.see(self._attending, "q", query)
                self._attending = None
            return kvquant_attention(module, query, *args, **kwargs)

        before = attention_by_part(self._model)
        ALL_ATTENTION_FUNCTIONS[name] = attention
        ALL_MASK_ATTENTION_FUNCTIONS[name] = kvquant_mask
        try:
            self._model.set_attn_implementation(name)
            yield
        finally:
            self._model.set_attn_implementation(before)
            del ALL_ATTENTION_FUNCTIONS[name], ALL_MASK_ATTENTION_FUNCTIONS[name]

    def is_crowded(self, layer: int, granularity: str) -> bool:
        """Whether numbers of very different size share a scale: outlier channels, or loud and quiet heads."""
        for side in "kv":
            if granularity == "channel" or (layer, side) not in self._statistics:
                continue
            largest = self._statistics[layer, side].largest
            of_head = largest.amax(dim=1)
            heard = of_head[of_head > 0]
            if (of_head > _CROWDED * largest.median(dim=1).values).any():
                return True
            if granularity == "tensor" and len(heard) and heard.max() > _CROWDED * heard.min():
                return True
        return False

    def scales_of(self, layer: int, estimate: _Estimate) -> LayerScales | None:
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
    """The host's cache, which tells what it is given."""

    def __init__(self, config: Any, gatherer: _Gatherer) -> None:
        super().__init__(config=config)
        self._gatherer = gatherer

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        self._gatherer.see_cached(layer_idx, key_states, value_states)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


# -- estimating --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Estimate:
    """Scale and zero from statistics: the middle of a range and half its width, per group of numbers.

    Groups are the whole tensor, a head, or a channel; ranges are `[1, 1]`, `[H, 1]` or `[H, D]`.
    """

    row: StorageFormat
    granularity: str
    estimator: str
    symmetric: bool
    percentile: float

    def __call__(
        self, statistics: _Statistics, rotary: RotaryLayout = _NOT_TURNED
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        low, high = self._range(statistics)
        # Where positions turn what a key holds into other channels, its middle is 0 in the long run, and a channel
        # comes to hold what its partner did, both at positions that calibration may not have seen.
        turning = rotary.turning(statistics.head_dim)
        largest = torch.maximum(-low, high)
        if self.granularity != "channel":
            turning = turning.any()
        elif partners := rotary.partners(statistics.head_dim):
            largest = torch.maximum(largest, largest[:, partners])
        if self.symmetric:
            middle, half = None, largest
        else:
            middle = torch.where(turning, 0.0, (low + high) / 2)
            half = torch.where(turning, largest, (high - low) / 2)
        half = self._never_zero(half)
        if self.estimator == "mse" and statistics.sample is not None:
            half = half * self._best_share(statistics.sample, half, middle)
        if middle is None:
            return self._shaped(half / self.row.qmax), None
        if self.row.name != "int8":
            return self._shaped(half / self.row.qmax), self._shaped(middle)
        # Formats with integer zero points hold it exactly if it is a number of steps; half a step makes room for that.
        scale = half / (self.row.qmax - 0.5)
        return self._shaped(scale), self._shaped((middle / scale).round() * scale)

    def _range(self, statistics: _Statistics) -> tuple[torch.Tensor, torch.Tensor]:
        if self.estimator == "percentile" and statistics.sample is not None:
            share = self.percentile / 100
            groups = self._grouped(statistics.sample.to(torch.float32))
            if self.symmetric:
                bound = _order_statistic(groups.abs(), share)
                return -bound, bound
            tail = (1 - share) / 2
            return -_order_statistic(-groups, 1 - tail), _order_statistic(groups, 1 - tail)
        low, high = statistics.low.cpu(), statistics.high.cpu()
        dims = {"tensor": (0, 1), "head": (1,), "channel": ()}[self.granularity]
        return (low.amin(dims, keepdim=True), high.amax(dims, keepdim=True)) if dims else (low, high)

    def _grouped(self, sample: torch.Tensor) -> torch.Tensor:
        """`[S, H, D]` as `[1 | H, 1 | D, numbers of a group]`."""
        if self.granularity == "tensor":
            return sample.flatten()[None, None]
        by_head = sample.transpose(0, 1)
        return by_head.flatten(1)[:, None] if self.granularity == "head" else by_head.transpose(1, 2)

    def _never_zero(self, half: torch.Tensor) -> torch.Tensor:
        largest = half.amax()
        if largest == 0:
            return torch.full_like(half, self.row.qmax)  # nothing but zeros: a scale of 1.0
        half = torch.where(half.amax(dim=1, keepdim=True) == 0, largest, half)
        return half.clamp(min=half.amax(dim=1, keepdim=True) * _SHARE_OF_LARGEST)

    def _best_share(self, sample: torch.Tensor, half: torch.Tensor, middle: torch.Tensor | None) -> torch.Tensor:
        """Of each group the share of `half` with the smallest squared error."""
        x = sample.to(torch.float32).transpose(0, 1)[None]  # [1, H, S, D]
        errors = []
        for share in _SHRINKS:
            scale = half * (share / self.row.qmax)
            codes, _, _ = reference.quantize(x, self.row.name, scale, middle, dynamic=False)
            difference = reference.dequantize(codes, self.row.name, scale, middle, None) - x
            errors.append(self._grouped(difference[0].transpose(0, 1)).square().sum(dim=-1))
        return torch.tensor(_SHRINKS)[torch.stack(errors).argmin(dim=0)]

    def _shaped(self, per_group: torch.Tensor) -> torch.Tensor:
        """As `LayerScales` has it: `[1]`, `[H]` or `[H, D]`."""
        return per_group if self.granularity == "channel" else per_group.flatten()


def _order_statistic(groups: torch.Tensor, share: float) -> torch.Tensor:
    """Of the numbers in the last dimension the smallest that `share` of them do not exceed."""
    return groups.kthvalue(max(math.ceil(share * groups.shape[-1]), 1), dim=-1).values
