"""Names of tensors: what is read is also what a checkpoint of many files is searched for."""

from __future__ import annotations

import re
from itertools import product

from hf_kvquant.checkpoints.names import looks_like_kv_scale, parse
from hf_kvquant.checkpoints.tensors import PRODUCERS

_MODULES = ("model.layers.0.self_attn", "layers.0.attention")
_HOLDERS = (
    "", "{side}_proj.", "{side}_proj.base_layer.", "qkv_proj.", "qkqkv_proj.", "query_key_value.", "Wqkv.", "wkv.",
    "{side}_cache.", "{side}_fake_quantizer.", "{side}.",
)  # fmt: skip
_ENDS = (
    "{side}_scale", "{side}_zero_point", "{side}_bias", "kv_scale", "kv_cache_scale", "kv_cache_offset",
    "output_scale", "output_zero_point", "scale", "qscale_act",
)  # fmt: skip
NAMES = {
    f"{module}.{holder}{end}".format(side=side)
    for module, holder, end, side in product(_MODULES, _HOLDERS, _ENDS, ("q", "k", "v", "kv"))
}


def test_every_name_that_is_read_looks_like_a_scale() -> None:
    read = {name for name in NAMES if parse(name, PRODUCERS) is not None}
    assert {name for name in read if not looks_like_kv_scale(name)} == set()
    patterns = [pattern for producer in PRODUCERS for pattern in producer.names]
    assert [pattern for pattern in patterns if not any(re.fullmatch(pattern, name) for name in read)] == []
