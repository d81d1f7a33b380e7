"""Where continuous batching has to know this package: what attention it takes, and which cache it makes.

transformers has no registry for either. The hooks are made once, on import, and leave every other model alone.
"""

from __future__ import annotations

import functools
from contextvars import ContextVar
from typing import Any

from transformers.utils import logging

from ..cache import QuantizedPagedCache
from ..hosts.conventions import CACHE_NAME
from ..interface import is_fused, uses_attention_interface
from ..options import missing_options

_TEMPLATE = "_hf_kvquant_template"  # of a manager
_METHODS = ("switch_to_cb_friendly_attn", "_create_batch_processor")

# Of the manager that makes its cache just now.
_template: ContextVar[QuantizedPagedCache | None] = ContextVar("template", default=None)

logger = logging.get_logger(__name__)


def is_known() -> bool:
    """Whether the installed transformers has continuous batching of the form that this package knows (from 5.24 on).

    Before, attention functions had to write into the cache themselves.
    """
    try:
        from transformers.generation.continuous_batching import cache_allocators, continuous_api
    except ImportError:
        return False
    manager = getattr(continuous_api, "ContinuousBatchingManager", None)
    return (
        CACHE_NAME == "cache"
        and all(hasattr(continuous_api, name) for name in ("PagedAttentionCache", "ModelRunner"))
        and all(hasattr(manager, name) for name in _METHODS)
        and hasattr(cache_allocators, "CachePool")
    )


def register() -> None:
    """Make the hooks, where they are known. Calling it again does nothing."""
    if not is_known():
        return
    from transformers.generation.continuous_batching import continuous_api

    manager = continuous_api.ContinuousBatchingManager
    if getattr(manager.switch_to_cb_friendly_attn, "_is_kvquant", False):
        return
    manager.switch_to_cb_friendly_attn = _keeping_ours(manager.switch_to_cb_friendly_attn)
    manager._create_batch_processor = _with_template(manager._create_batch_processor)
    continuous_api.PagedAttentionCache = _choosing(continuous_api.PagedAttentionCache, _new_cache)
    continuous_api.ModelRunner = _choosing(continuous_api.ModelRunner, _new_runner)


def _keeping_ours(switch: Any) -> Any:
    @functools.wraps(switch)
    def switch_attention(self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        if not has_our_attention(model):
            switch(self, model, *args, **kwargs)

    switch_attention._is_kvquant = True  # type: ignore[attr-defined]
    return switch_attention


def _with_template(create: Any) -> Any:
    @functools.wraps(create)
    def create_batch_processor(self: Any) -> Any:
        token = _template.set(getattr(self, _TEMPLATE, None))
        try:
            return create(self)
        finally:
            _template.reset(token)

    return create_batch_processor


def _choosing(host_class: Any, make_ours: Any) -> Any:
    """Makes what a manager needs: ours if it has a template for its cache."""

    @functools.wraps(host_class, updated=())
    def make(*args: Any, **kwargs: Any) -> Any:
        template = _template.get()
        return host_class(*args, **kwargs) if template is None else make_ours(template, host_class, *args, **kwargs)

    return make


def _new_cache(template: QuantizedPagedCache, host_class: Any, *args: Any, **kwargs: Any) -> Any:
    from .cache import QuantizedBatchCache

    return QuantizedBatchCache(template, *args, **kwargs)


def _new_runner(template: QuantizedPagedCache, host_class: Any, *args: Any, **kwargs: Any) -> Any:
    if not kwargs["cb_config"].cuda_graph_booleans[1]:
        return host_class(*args, **kwargs)
    from .graphs import GraphRunner

    return GraphRunner(*args, **kwargs)


def has_our_attention(model: Any) -> bool:
    """Whether a model attends over pages."""
    return is_fused(model.config.get_text_config(decoder=True))


def prepare(manager: Any, model: Any, options: Any) -> None:
    """Have a manager make 8-bit pages, if the model's attention is ours; it may be one that was kept.

    Raises ValueError or TypeError for options or a model that do not fit, and for a manager that has the other cache.
    """
    template = getattr(manager, _TEMPLATE, None)
    if has_our_attention(model) != (template is not None) and manager.batch_processor is not None:
        raise ValueError(
            "the manager of continuous batching that this model has kept was made for another attention; let go of it "
            "with model.destroy_cached_continuous_batching_manager()"
        )
    if not has_our_attention(model):
        return
    if template is not None:
        if missing := missing_options(options, template.kvquant):
            logger.warning_once(
                "`cache_config` is ignored: the manager of continuous batching that this model has kept was made "
                f"without {missing}; let go of it with model.destroy_cached_continuous_batching_manager()"
            )
        return
    setattr(manager, _TEMPLATE, _new_template(model, options))
    _settle(manager.continuous_batching_config)


def _new_template(model: Any, options: Any) -> QuantizedPagedCache:
    from .template import check_template

    text_config = model.config.get_text_config(decoder=True)
    if not uses_attention_interface(text_config):
        raise ValueError(
            f"{type(model).__name__} computes attention itself, whatever it is configured with, and cannot read the "
            "pages of many requests; use `generate` for this model"
        )
    template = QuantizedPagedCache.for_generation(model, options)
    check_template(template, text_config)
    return template


def _settle(config: Any) -> None:
    """Leave out what steps over 8-bit pages do not take; those that only decode are recorded if that was asked for."""
    config.use_cuda_graph, config.use_async_batching = (False, config.cuda_graph_booleans[1]), False
    config.max_blocks_per_request = 0
    if config.varlen_compile_config is not None or config.decode_compile_config is not None:
        logger.warning_once("Continuous batching over 8-bit pages is not compiled.")
        config.varlen_compile_config = config.decode_compile_config = None
    if config.cpu_offload_space != 0:
        logger.warning_once(
            "cpu_offload_space has no effect over 8-bit pages: where they run out, requests begin again later."
        )
        config.cpu_offload_space = 0.0
