"""Where continuous batching has to know this package: what attention it takes, and which cache it makes.

transformers has no registry for either. The hooks are made once, on import, and leave every other model alone.
"""

from __future__ import annotations

import functools
from typing import Any

from transformers.utils import logging

from ..cache import QuantizedPagedCache
from ..interface import is_fused

_TEMPLATE = "_hf_kvquant"  # on the configuration of a manager, which has a copy of its own

logger = logging.get_logger(__name__)


def is_known() -> bool:
    """Whether the installed transformers has continuous batching of a form that this package knows (from 5.20 on)."""
    try:
        from transformers.generation.continuous_batching import cache_allocators, continuous_api
    except ImportError:
        return False
    names = ("PagedAttentionCache", "ContinuousBatchingManager")
    return (
        all(hasattr(continuous_api, name) for name in names)
        and hasattr(continuous_api.ContinuousBatchingManager, "switch_to_cb_friendly_attn")
        and hasattr(cache_allocators, "CachePool")
    )


def register() -> None:
    """Make the hooks, where they are known. Calling it again does nothing."""
    if not is_known():
        return
    from transformers.generation.continuous_batching import continuous_api

    manager = continuous_api.ContinuousBatchingManager
    if not getattr(manager.switch_to_cb_friendly_attn, "_is_kvquant", False):
        manager.switch_to_cb_friendly_attn = _keeping_ours(manager.switch_to_cb_friendly_attn)
        continuous_api.PagedAttentionCache = _choosing(continuous_api.PagedAttentionCache)


def _keeping_ours(switch: Any) -> Any:
    @functools.wraps(switch)
    def switch_attention(self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        if not has_our_attention(model):
            switch(self, model, *args, **kwargs)

    switch_attention._is_kvquant = True  # type: ignore[attr-defined]
    return switch_attention


def _choosing(host_class: Any) -> Any:
    """Makes the cache of a manager: ours if it has a template for it."""

    @functools.wraps(host_class, updated=())
    def make_cache(*, continuous_batching_config: Any, **kwargs: Any) -> Any:
        template = getattr(continuous_batching_config, _TEMPLATE, None)
        if template is None:
            return host_class(continuous_batching_config=continuous_batching_config, **kwargs)
        from .cache import QuantizedBatchCache

        return QuantizedBatchCache(template, continuous_batching_config=continuous_batching_config, **kwargs)

    return make_cache


def has_our_attention(model: Any) -> bool:
    return is_fused(model.config.get_text_config(decoder=True))


def prepare(manager: Any, model: Any, options: Any) -> None:
    """Have a new manager make 8-bit pages. Raises ValueError or TypeError for options or a model that do not fit."""
    from .cache import check_options

    config = manager.continuous_batching_config
    if hasattr(config, _TEMPLATE):  # a manager that was kept
        return
    template = QuantizedPagedCache.for_generation(model, options)
    check_options(template)
    setattr(config, _TEMPLATE, template)
    # Steps have other shapes every time, which neither graphs nor compilers take.
    if any(config.cuda_graph_booleans):
        logger.info("Continuous batching over 8-bit pages uses no CUDA graphs and is not compiled.")
    config.use_cuda_graph, config.use_async_batching = (False, False), False
    config.varlen_compile_config = config.decode_compile_config = None
    config.max_blocks_per_request = 0
    if config.cpu_offload_space != 0:
        logger.warning_once(
            "cpu_offload_space has no effect over 8-bit pages: where they run out, requests begin again later."
        )
        config.cpu_offload_space = 0.0
