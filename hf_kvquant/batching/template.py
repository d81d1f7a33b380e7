"""The cache that a manager of continuous batching takes options, formats and scales from."""

from __future__ import annotations

from transformers import PreTrainedConfig
from transformers.cache_utils import DummyLayer
from transformers.generation.continuous_batching import cache as host

from ..cache import QuantizedPagedCache
from ..formats import get_format
from ..layers import PagedLayer
from ..policy import LayerPlan
from ..scales import as_head_channel
from ..sides import SIDES

_NOT_FOR_BATCHING = ("sink_tokens", "recent_tokens", "offload", "num_pages", "max_cache_len")


def check_template(template: QuantizedPagedCache, config: PreTrainedConfig) -> None:
    """Raise ValueError if the options, scales or layers of a cache are not for continuous batching of a model."""
    options = template.kvquant.to_dict()  # those that are not the default's
    for name in _NOT_FOR_BATCHING:
        if name in options:
            raise ValueError(
                f"cache_config[{name!r}]={options[name]!r} is not for continuous batching, whose blocks transformers "
                "counts; leave it out, or use `generate`"
            )
    if "page_size" in options:
        raise ValueError("cache_config['page_size'] is ContinuousBatchingConfig(page_size=...) in continuous batching")
    plans = plans_of(template)
    for index, layer in enumerate(template.layers):
        if index not in plans and not isinstance(layer, DummyLayer):
            raise ValueError(
                f"layer {index} is a {type(layer).__name__}, and continuous batching takes layers of attention only; "
                "use `generate` for this model"
            )
    if template.shared.shard is not None:
        raise ValueError("continuous batching over 8-bit pages takes no tensor parallelism; use `generate`")
    if len({get_format(side.format).is_quantized for plan in plans.values() for side in (plan.k, plan.v)}) > 1:
        raise ValueError(
            "continuous batching takes pages of one size, and some layers are kept in 8 bits and others are not; leave "
            "skip_layers out, or use `generate`"
        )
    shape = host.find_num_key_value_heads(config), host.find_head_dim(config)
    for index, plan in plans.items():  # before any memory is taken
        for side in SIDES:
            for name in ("scale", "zero"):
                if (tensor := getattr(getattr(plan, side), name)) is not None:
                    as_head_channel(tensor, *shape, f"layer {index}: {side}_{name}")


def plans_of(template: QuantizedPagedCache) -> dict[int, LayerPlan]:
    """Formats and scales of the layers that store something; others attend to what one of these has."""
    return {index: layer.plan for index, layer in enumerate(template.layers) if isinstance(layer, PagedLayer)}
