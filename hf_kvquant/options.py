"""What a user's options mean for a model: defaults from its attention, and whose checkpoint has its scales."""

from __future__ import annotations

import reprlib
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging

from .checkpoint_scales import CheckpointScales
from .checkpoints import NoUsableScalesError
from .config import KVQuantConfig
from .hosts.files import checkpoint_of
from .interface import attention_name
from .reading import read_scales

logger = logging.get_logger(__name__)


def options_for(model: PreTrainedModel, options: Any, max_cache_len: int | None = None) -> KVQuantConfig:
    """The user's `options` over what the model's attention implementation says."""
    defaults: dict[str, Any] = {}
    implementation = attention_name(model.config.get_text_config(decoder=True))
    if implementation.startswith("kvquant_"):
        defaults["kv_cache_dtype"] = implementation.removeprefix("kvquant_")
    if max_cache_len is not None:
        defaults["max_cache_len"] = max_cache_len
    return KVQuantConfig.parse(options, **defaults)


def missing_options(options: Any, made_with: KVQuantConfig) -> str:
    """Of the user's `options` those that a cache was made without, as `name=value`; empty where there are none."""
    asked, has = KVQuantConfig.parse(options).to_dict(), made_with.to_dict()
    return ", ".join(f"{name}={reprlib.repr(value)}" for name, value in asked.items() if has.get(name) != value)


def find_checkpoint(model: PreTrainedModel, kvquant: KVQuantConfig, notes: list[str]) -> CheckpointScales | None:
    """The checkpoint whose scales are asked for. Raises ValueError if one is asked for by name and has none."""
    if isinstance(kvquant.scales, CheckpointScales):
        return kvquant.scales
    own = isinstance(kvquant.scales, str) and kvquant.scales in ("auto", "checkpoint")
    source = model if own else kvquant.scales
    try:  # with `auto` nobody asked for a download, and a model may outlive the directory it came from
        wanted = kvquant.kv_cache_dtype
        dtype = wanted if isinstance(wanted, str) and wanted not in ("auto", "model") else "int8"
        found = read_scales(source, model, fetch=kvquant.scales != "auto", kv_cache_dtype=dtype)
    except FileNotFoundError as error:
        if kvquant.scales != "auto":
            raise
        notes.append(f"no KV scales were looked for: {error}; name a checkpoint with scales=... if it has some")
        return None
    except NoUsableScalesError as error:
        # Nobody asked for it: a format that is not supported, or what a model declares still that was saved without it.
        if kvquant.scales != "auto":
            raise
        note = f"{error}; what it declares is not used, scales are dynamic now"
        logger.warning_once(f"{note}.")
        notes.append(note)
        return None
    if found is None and kvquant.scales != "auto":
        where = (checkpoint_of(model)[0] or "a model that was not loaded from files") if own else source
        raise ValueError(
            f"scales={kvquant.scales!r}, but {where} has no KV scales; "
            "use scales='dynamic' (no calibration needed), or name a checkpoint that has some"
        )
    return found
