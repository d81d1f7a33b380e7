"""What is asked of readers and what they give: by module as files have it, by cache layer as the package uses it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..checkpoint_scales import ScaleSource
from ..formats import get_quantized_format
from ..scales import check_granularity


class NoUsableScalesError(ValueError):
    """What a checkpoint declares of its KV cache cannot be had: a format that is not supported, or scales it has not.

    Nothing is broken, so `scales="auto"` goes on without.
    """


@dataclass(frozen=True)
class ModelLayers:
    """What must be known of a model to tell which of its cache layers a scale belongs to.

    Attributes:
        paths: for each cache layer the path of its attention (`model.layers.0.self_attn`), then other names in files.
        num_kv_heads: of each cache layer; None where unknown.
        model_type: transformers' name of the architecture, or None.
    """

    paths: Sequence[Sequence[str]]
    num_kv_heads: Sequence[int | None]
    model_type: str | None = None

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True)
class Wanted:
    """What is asked of a reader.

    Attributes:
        model: the layers that scales are wanted for; None if only the files are known.
        kv_cache_dtype, granularity: what to make of statistics that leave it open.

    Raises ValueError that lists what is accepted, whether or not the files will leave it open.
    """

    model: ModelLayers | None = None
    kv_cache_dtype: str | torch.dtype = "int8"
    granularity: str = "channel"

    def __post_init__(self) -> None:
        object.__setattr__(self, "kv_cache_dtype", get_quantized_format(self.kv_cache_dtype).name)
        check_granularity(self.granularity)


@dataclass(frozen=True)
class Declared:
    """What the configuration files say of the KV cache.

    Attributes:
        producer: whose format it is.
        file: which file says so; None if nothing does and the names of the tensors had to tell.
        kv_cache_dtype: `fp8_e4m3`, `fp8_e5m2` or `int8`.
        dynamic: scales are computed at run time.
        means_one: this producer leaves scales out where it means 1.0.
        before_rotation: this producer measures keys before their rotary embedding.
        unused: `k`, `v` or `q` (the query) -> in words why static scales of it are not used; it is dynamic.
    """

    producer: str
    file: str | None
    kv_cache_dtype: str
    dynamic: bool = False
    means_one: bool = False
    before_rotation: bool = False
    unused: Mapping[str, str] = field(default_factory=dict)


def not_transformed(side: str, where: str) -> str:
    """Why static scales of `k`, `v` or `q` are not used if config.json has them transformed, as `where` says."""
    what = {"k": "K", "v": "V", "q": "the query"}[side]
    return f"config.json has {what} transformed ({where}), which transformers does not do; its scales are not used"


# A value as it lies in a file, and where.
Value = tuple[ScaleSource, torch.Tensor]
# Part -> value. Parts: `k_scale`, `v_scale`, `kv_scale` (for both), `q_scale`; `k_zero_point`, `v_zero_point`
# (subtracted, in steps of the scale); `k_zero`, `v_zero` (added, in the units of x).
Parts = Mapping[str, Value]


@dataclass(frozen=True)
class Found:
    """What a reader found, before it is known which cache layer is whose.

    Attributes:
        declared: what the files say of it.
        by_path: parts by the path of the attention module.
        by_number: parts by the number of the decoder layer, where a format has no paths.
        ranks: values are one per tensor-parallel rank, so of so many equal groups of heads.
        shaped: values are `[H, 1]` or `[H, D]`, whatever is known of the model.
        one_sided: a side without a scale is meant to be dynamic.
        notes, ignored: as in `CheckpointScales`.
    """

    declared: Declared
    by_path: Mapping[str, Parts] = field(default_factory=dict)
    by_number: Mapping[int, Parts] = field(default_factory=dict)
    ranks: bool = False
    shaped: bool = False
    one_sided: bool = False
    notes: Sequence[str] = ()
    ignored: Sequence[str] = ()
