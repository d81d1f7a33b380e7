"""`calibrate`: static scales from real tokens, with the statistics of any number of them in bounded memory.

The numbers are those that reach the cache: keys after rotation and norms, values as they are stored. Padding does not
count.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, overload

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..calibration_data import batches_of
from ..checkpoints import ModelLayers
from ..config import is_integer
from ..formats import get_format
from ..hosts.fake_quantization import disable_fake_quantization
from ..hosts.files import model_layers
from ..hosts.wrappers import without_data_parallelism
from ..scales import LayerScales, check_granularity
from ..sharding import of_all_stages
from .estimating import Estimate
from .gathering import CROWDED, Gatherer

ESTIMATORS = ("absmax", "percentile", "mse")
# Those with static scales to calibrate.
STATIC_FORMATS = ("fp8_e4m3", "int8")
_PERCENTILE = 99.99

# Tokens kept of each layer for `percentile` and `mse`: a million numbers per layer of 8 heads of 128 channels.
_SAMPLE_TOKENS = 1024

logger = logging.get_logger(__name__)


@dataclass(frozen=True, eq=False)
class Calibration(Sequence["LayerScales | None"]):
    """Calibrated scales: a sequence with one entry per cache layer, as `scales=` takes it; `write_scales` saves it.

    Attributes:
        kv_cache_dtype: the format they are made for.
        layers: one entry per cache layer; None where no token reached one, or where there is no K and V.
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

    def to_dict(self) -> dict[str, Any]:
        """Format and scales, ready for JSON, as a saved generation configuration has them; `scales=` takes it back."""
        layers = [None if scales is None else scales.to_dict() for scales in self.layers]
        return {"kv_cache_dtype": self.kv_cache_dtype, "layers": layers}


def check_calibrating(
    *,
    kv_cache_dtype: str | torch.dtype,
    granularity: str,
    estimator: str,
    symmetric: bool,
    percentile: float,
    q_scale: bool,
    num_samples: int,
    max_length: int,
    batch_size: int,
) -> None:
    """Raise what `calibrate` raises for options that do not exist."""
    if get_format(kv_cache_dtype).name not in STATIC_FORMATS:
        raise ValueError(f"kv_cache_dtype={kv_cache_dtype!r} has no static scales; choose fp8 or int8")
    check_granularity(granularity)
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator={estimator!r}; choose one of {', '.join(ESTIMATORS)}")
    if not isinstance(percentile, Real) or not 50 < percentile <= 100:
        raise ValueError(f"percentile={percentile!r}; it is the share of numbers that fit, above 50 and at most 100")
    if percentile != _PERCENTILE and estimator != "percentile":
        raise ValueError(f"percentile={percentile!r} is for estimator='percentile', not for {estimator!r}")
    for name, flag in (("symmetric", symmetric), ("q_scale", q_scale)):
        if not isinstance(flag, bool):
            raise ValueError(f"{name}={flag!r}; it is True or False")
    for name, number in (("num_samples", num_samples), ("max_length", max_length), ("batch_size", batch_size)):
        if not is_integer(number) or number < 1:
            raise ValueError(f"{name}={number!r}; it must be a positive integer")


def calibrate(
    model: PreTrainedModel,
    data: Any,
    *,
    tokenizer: Any = None,
    kv_cache_dtype: str | torch.dtype = "fp8",
    granularity: str = "tensor",
    estimator: str = "absmax",
    symmetric: bool = True,
    percentile: float = _PERCENTILE,
    q_scale: bool = False,
    num_samples: int = 512,
    max_length: int = 2048,
    batch_size: int = 1,
    progress: bool = True,
) -> Calibration:
    """Static scales for K and V of every cache layer of `model`, from the tokens of `data`.

    Args:
        model: a loaded model, on any device or devices. Where processes share its heads or layers (tensor and pipeline
            parallelism), all of them calibrate, with the same data, and get the same scales of the whole. Where
            compressed-tensors rounds K and V inside it, that is switched off for the life of the model.
        data: a text, JSON or JSONL file; `name`, `name:split` or `name:config:split` of a data set of the `datasets`
            package; texts or conversations in a sequence; token ids `[T]` or `[B, T]`, or a sequence of such; or
            batches from a DataLoader, `{"input_ids": [B, T], "attention_mask": [B, T] or [B, 1, T, T], ...}`.
        tokenizer: for text; by default the one that lies beside the model.
        kv_cache_dtype: `fp8` (= `fp8_e4m3`) or `int8`.
        granularity: one scale per `tensor`, `head` or `channel`.
        estimator: `absmax`: nothing that was seen clips. `percentile`: the rest beyond `percentile` does. `mse`: the
            range with the smallest squared error. The last two judge by a uniform sample of the tokens.
        symmetric: False adds a zero in the middle of the range; not for keys that a rotary embedding turns, whose
            middle is another one at every position.
        percentile: share of numbers in percent that do not clip, with `estimator="percentile"`.
        q_scale: scales of the queries as well, per tensor or, with a finer granularity, per query head.
        num_samples, max_length: most texts or sequences, and most tokens of each.
        batch_size: sequences in a forward pass; batches of a DataLoader are taken as they are.
        progress: show a bar.

    An interrupt (ctrl-C) ends the gathering; the result is made of what was seen until then, and its notes say so.

    Raises ValueError naming the option for values that do not exist, data without tokens, and models that cannot be
    calibrated; TypeError for data of another kind.
    """
    check_calibrating(
        kv_cache_dtype=kv_cache_dtype, granularity=granularity, estimator=estimator, symmetric=symmetric,
        percentile=percentile, q_scale=q_scale, num_samples=num_samples, max_length=max_length, batch_size=batch_size,
    )  # fmt: skip
    row = get_format(kv_cache_dtype)
    percentile, num_samples, max_length, batch_size = (
        float(percentile), int(num_samples), int(max_length), int(batch_size),
    )  # fmt: skip
    model = without_data_parallelism(model)
    batches = batches_of(data, model, tokenizer, num_samples, max_length, batch_size)
    gatherer = Gatherer(model, sample_tokens=0 if estimator == "absmax" else _SAMPLE_TOKENS)
    notes = disable_fake_quantization(model)
    if interrupted := gatherer.run(batches, q_scale, progress):
        notes.append(f"interrupted after {gatherer.num_tokens:,} tokens; the scales are those of what was seen")
        logger.warning(notes[-1])
    if gatherer.num_tokens == 0:
        raise ValueError("no token was seen" + (" before the interrupt" if interrupted else "; the data is empty"))

    of_model = model_layers(model)
    gatherer.join(of_model.num_kv_heads)
    estimate = Estimate(row, granularity, estimator, symmetric, percentile)
    layers = of_all_stages(model, [gatherer.scales_of(index, estimate) for index in range(gatherer.num_layers)])
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
            f"layers {crowded} have channels or heads more than {CROWDED} times as large as others under the "
            "same scale, which leaves these few codes of int8; granularity='channel', or dynamic scales, keep them"
        )
        warnings.warn(notes[-1], stacklevel=2)
    settings: dict[str, Any] = {"granularity": granularity, "estimator": estimator, "symmetric": symmetric}
    settings |= {"percentile": percentile} if estimator == "percentile" else {}
    settings |= {"tokens": gatherer.num_tokens, "sequences": gatherer.num_sequences, "max_length": max_length}
    return Calibration(row.name, layers, of_model, gatherer.num_tokens, settings, notes)
