"""`KVQuantConfig`: aliases, defaults and every refusal."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import llama_config
from test_cache import sliding_model

from hf_kvquant import CheckpointScales, KVQuantConfig, LayerScales, QuantizedPagedCache
from hf_kvquant.checkpoints import ScaleSource
from hf_kvquant.formats import FORMATS

SCALES = LayerScales(torch.ones(1), torch.ones(1))
READ = CheckpointScales(
    "somewhere", "modelopt", "fp8_e4m3", False, [SCALES, None], [{"k_scale": ScaleSource("a", "b")}, {}]
)
KEYS = [field.name for field in dataclasses.fields(KVQuantConfig)]


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ("auto", "auto"),
        ("fp8", "fp8_e4m3"),
        ("fp8_e4m3fn", "fp8_e4m3"),
        ("fp8_e5m2", "fp8_e5m2"),
        ("int8", "int8"),
        ("model", "model"),
        (("fp8", "int8"), ("fp8_e4m3", "int8")),
        (["model", "fp8_e5m2"], ("model", "fp8_e5m2")),
    ],
)
def test_dtype_names(given: Any, stored: Any) -> None:
    assert KVQuantConfig(kv_cache_dtype=given).kv_cache_dtype == stored


@pytest.mark.parametrize(
    "given", ["fp4", "FP8", "", None, 8, torch.bfloat16, ("fp8",), ("fp8", "int8", "int8"), ("auto", "fp8"), {}]
)
def test_bad_dtype_lists_the_formats(given: Any) -> None:
    with pytest.raises(ValueError, match="fp8_e4m3") as error:
        KVQuantConfig(kv_cache_dtype=given)
    assert all(name in str(error.value) for name in FORMATS)


@pytest.mark.parametrize(
    ("given", "stored"), [(None, None), ("fp8", "fp8_e4m3"), ("fp8_e4m3", "fp8_e4m3"), ("fp8_e4m3fn", "fp8_e4m3")]
)
def test_q_dtype(given: Any, stored: Any) -> None:
    assert KVQuantConfig(q_dtype=given).q_dtype == stored


@pytest.mark.parametrize(
    "given", ["fp8_e5m2", "int8", "model", "auto", "FP8", "", True, 8, ("fp8", "fp8"), ["fp8"], {}]
)
def test_bad_q_dtype(given: Any) -> None:
    with pytest.raises(ValueError, match="q_dtype=.*choose 'fp8'"):
        KVQuantConfig(q_dtype=given)


@pytest.mark.parametrize(
    ("given", "equalized"),
    [
        ("auto", {"int8"}),
        (True, set(FORMATS)),
        (False, set()),
        ("fp8", {"fp8_e4m3"}),
        (("int8", "fp8_e5m2"), {"int8", "fp8_e5m2"}),
        (["fp8"], {"fp8_e4m3"}),
        ((), set()),
    ],
)
def test_equalize(given: Any, equalized: set[str]) -> None:
    config = KVQuantConfig(equalize=given)
    assert {name for name in FORMATS if config.equalizes(name)} == equalized


@pytest.mark.parametrize("given", ["fp4", ("int8", "fp4"), None, 1, 0.5, {"int8": True}])
def test_bad_equalize_lists_the_formats(given: Any) -> None:
    with pytest.raises(ValueError, match="int8"):
        KVQuantConfig(equalize=given)


@pytest.mark.parametrize(
    "given",
    [
        "auto",
        "checkpoint",
        "dynamic",
        "first_batch",
        "unit",
        "org/model",
        Path("/x"),
        SCALES,
        [SCALES],
        (SCALES, None),
        {1: SCALES},
        READ,
    ],
    ids=str,
)
def test_scales(given: Any) -> None:
    assert KVQuantConfig(scales=given).scales is given


@pytest.mark.parametrize(
    "given", [None, 1.0, torch.ones(1), [], {}, [torch.ones(1)], ["dynamic"], {"0": SCALES}, {0: 1.0}, b"x"], ids=repr
)
def test_bad_scales_list_the_choices(given: Any) -> None:
    with pytest.raises(TypeError, match="choose one of auto, checkpoint, dynamic, first_batch, unit, a path"):
        KVQuantConfig(scales=given)


def test_what_read_scales_gives_for_nothing_is_named() -> None:
    with pytest.raises(TypeError, match="scales=None .read_scales gives that for files without scales."):
        KVQuantConfig(scales=None)


@pytest.mark.parametrize("given", ["token", "", None, 1, ["head"]])
def test_bad_granularity(given: Any) -> None:
    with pytest.raises(ValueError, match="choose one of tensor, head, channel"):
        KVQuantConfig(granularity=given)


@pytest.mark.parametrize("given", [{"granularity": "head"}, {"margin": 2.0}], ids=str)
@pytest.mark.parametrize("scales", ["auto", "dynamic", "checkpoint", SCALES], ids=str)
def test_what_only_a_first_batch_asks_for(scales: Any, given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="is for scales='first_batch'"):
        KVQuantConfig(scales=scales, **given)
    assert KVQuantConfig(scales="first_batch", **given)


@pytest.mark.parametrize("given", [0, 0.99, -1, math.nan, math.inf, -math.inf, "1.5", None, [1.5]])
def test_bad_margin(given: Any) -> None:
    with pytest.raises(ValueError, match="margin=.*at least 1.0"):
        KVQuantConfig(margin=given)


@pytest.mark.parametrize("name", ["page_size", "num_pages", "max_cache_len"])
@pytest.mark.parametrize("given", [0, -1, 16.0, "16", True, math.inf])
def test_bad_sizes(name: str, given: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}=.*positive integer"):
        KVQuantConfig(**{name: given})


def test_numbers_of_numpy() -> None:
    """They come out of arrays and loops, and must not reach JSON as they are."""
    config = KVQuantConfig(
        page_size=np.int64(8),  # type: ignore[arg-type]
        max_cache_len=np.int32(99),  # type: ignore[arg-type]
        skip_layers=np.arange(2),  # type: ignore[arg-type]
        scales={np.int64(1): SCALES},
    )
    assert config.skip_layers == (0, 1)
    assert json.loads(json.dumps(config.to_dict()))["page_size"] == 8
    assert KVQuantConfig.parse(config.to_dict()).max_cache_len == 99
    margin = KVQuantConfig(scales="first_batch", margin=np.float32(2.0)).margin  # type: ignore[arg-type]
    assert json.dumps(margin) == "2.0"
    cache = QuantizedPagedCache(llama_config(), KVQuantConfig("fp8", scales={np.int64(1): SCALES}))
    assert [row.scales[0] for row in cache.report().layers] == ["dynamic", "given"]
    assert KVQuantConfig(num_pages=np.uint8(4)).num_pages == 4  # type: ignore[arg-type]
    for skip, stored in ((np.int64(-1), (-1,)), ({np.int16(3)}, (3,)), ([0, np.int64(1)], (0, 1))):
        assert KVQuantConfig(skip_layers=skip).skip_layers == stored  # type: ignore[arg-type]


def test_page_size_may_not_be_none() -> None:
    with pytest.raises(ValueError, match="page_size=None"):
        KVQuantConfig(page_size=None)  # type: ignore[arg-type]
    assert KVQuantConfig(num_pages=None, max_cache_len=None).num_pages is None


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ((), ()),
        (None, ()),
        (0, (0,)),
        (-1, (-1,)),
        ([0, -1], (0, -1)),
        ("full_attention", ("full_attention",)),
        ({2}, (2,)),
        (["0", "1"], (0, 1)),
    ],
)
def test_skip_layers(given: Any, stored: tuple[int | str, ...]) -> None:
    assert KVQuantConfig(skip_layers=given).skip_layers == stored


def test_sliding_layers_by_another_name() -> None:
    config = sliding_model().config
    for name in ("sliding_attention", "sliding_window"):
        report = QuantizedPagedCache(config, KVQuantConfig(skip_layers=[name])).report()
        assert [layer.kv_cache_dtype[0] for layer in report.layers] == ["model", "int8"], name


@pytest.mark.parametrize("given", [True, [False], [0.5], 0.5, [None], [[0]]])
def test_bad_skip_layers(given: Any) -> None:
    with pytest.raises(ValueError, match="give layer indices or layer types"):
        KVQuantConfig(skip_layers=given)


@pytest.mark.parametrize("given", [2, -3, [0, 7]])
def test_skip_layers_beyond_the_model(given: Any) -> None:
    with pytest.raises(ValueError, match="skip_layers names layer .* has 2 cache layers"):
        QuantizedPagedCache(llama_config(), KVQuantConfig(skip_layers=given))


def test_skip_layers_of_an_unknown_type_lists_the_types() -> None:
    with pytest.raises(ValueError, match="'conv'; this model's layer types: full_attention"):
        QuantizedPagedCache(llama_config(), KVQuantConfig(skip_layers="conv"))


@pytest.mark.parametrize(
    "scales",
    [
        "first_batch",
        Path("somewhere"),
        LayerScales(torch.tensor([0.1, 1 / 3]), torch.rand(2, 5) + 0.1, k_zero=torch.tensor([-0.7])),
        LayerScales(None, torch.tensor([0.1, 1 / 3]), v_zero=torch.tensor([-0.7])),
        {3: SCALES, 0: SCALES},
        [SCALES, None, SCALES],
        READ,
    ],
    ids=["name", "path", "scales", "one_side", "dict", "list", "read"],
)
def test_a_config_survives_json(scales: Any) -> None:
    options = {
        "kv_cache_dtype": ("fp8", "int8"), "scales": scales, "skip_layers": (0, "sliding_attention"), "q_dtype": "fp8",
    }  # fmt: skip
    config = KVQuantConfig(page_size=7, **options)
    assert KVQuantConfig().to_dict() == {}
    assert set(config.to_dict()) == {*options, "page_size"}
    back = KVQuantConfig.parse(json.loads(json.dumps(config.to_dict())))
    assert back.to_dict() == config.to_dict()
    plain = [f.name for f in dataclasses.fields(KVQuantConfig) if f.name != "scales"]
    assert all(getattr(back, name) == getattr(config, name) for name in plain)
    if isinstance(scales, LayerScales):
        for name in (f.name for f in dataclasses.fields(LayerScales)):
            given, kept = getattr(scales, name), getattr(back.scales, name)
            assert kept is None if given is None else torch.equal(kept, given)
    elif not isinstance(scales, (str, Path)):
        assert type(back.scales) is type(scales)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"k_scale": None}, "needs k_scale or v_scale"),
        ({"v_scale": [1.0], "k_zero": [1.0]}, "k_zero, but no k_scale"),
        ({"k_scale": [1.0], "v": [1.0]}, "unknown entry v .*v_scale"),
        ({**READ.to_dict(), "layers": [5, None]}, "layers or sources of saved checkpoint scales are malformed"),
        ({**READ.to_dict(), "sources": [{}]}, "have 2 layers, but sources of 1"),
        ({**READ.to_dict(), "dynamic": "maybe", "notes": 7}, "saved checkpoint scales are malformed: dynamic, notes"),
    ],
)
def test_entries_that_are_no_scales(entries: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KVQuantConfig(scales=entries)


@pytest.mark.parametrize(
    "scales", [[SCALES], [SCALES] * 3, {2: SCALES}, {-1: SCALES}], ids=["short", "long", "high", "negative"]
)
def test_scales_for_another_number_of_layers(scales: Any) -> None:
    with pytest.raises(ValueError, match="scales are given for .* this model has 2 cache layers"):
        QuantizedPagedCache(llama_config(), KVQuantConfig(scales=scales))


def test_unknown_keys_are_listed_with_the_right_ones() -> None:
    with pytest.raises(ValueError, match="unknown cache_config") as error:
        KVQuantConfig.parse({"dtype": "fp8", "page_size": 8, "backend": "quanto"})
    unknown, known = str(error.value).split("known: ")
    assert "backend (here: kv_cache_dtype), dtype;" in unknown
    assert "page_size" not in unknown
    assert known.split(", ") == KEYS


@pytest.mark.parametrize(
    ("key", "here"),
    [
        ("block_size", "page_size"),
        ("calculate_kv_scales", "scales='first_batch'"),
        ("kv_cache_dtype_skip_layers", "skip_layers"),
        ("quant_policy", "kv_cache_dtype"),
        ("quantization_param_path", "scales"),
        ("nbits", "kv_cache_dtype"),
        ("residual_length", "recent_tokens"),
    ],
)
def test_what_others_call_an_option(key: str, here: str) -> None:
    with pytest.raises(ValueError, match=f"unknown cache_config.*{key} \\(here: {here}"):
        KVQuantConfig.parse({key: 1})


@pytest.mark.parametrize(("name", "stored"), [("int8_per_token_head", "int8"), ("fp8_per_token_head", "fp8_e4m3")])
def test_formats_with_dynamic_scales_by_one_name(name: str, stored: str) -> None:
    config = KVQuantConfig(name)
    assert (config.kv_cache_dtype, config.scales) == (stored, "dynamic")
    assert KVQuantConfig(name, scales="dynamic") == config == KVQuantConfig.parse(config.to_dict())
    for scales in ("unit", "checkpoint", SCALES):
        with pytest.raises(ValueError, match=f"{name}' has dynamic scales"):
            KVQuantConfig(name, scales=scales)


def test_dtypes_of_torch_are_names() -> None:
    assert KVQuantConfig(torch.float8_e5m2).formats == ("fp8_e5m2", "fp8_e5m2")
    assert KVQuantConfig((torch.int8, torch.float8_e4m3fn)).formats == ("int8", "fp8_e4m3")
    assert json.loads(json.dumps(KVQuantConfig(torch.int8).to_dict())) == {"kv_cache_dtype": "int8"}


@pytest.mark.parametrize("key", [1, None, ("kv_cache_dtype",)], ids=repr)
def test_keys_that_are_not_strings(key: Any) -> None:
    with pytest.raises(ValueError, match="unknown cache_config"):
        KVQuantConfig.parse({key: "fp8"})


@pytest.mark.parametrize("options", ["int8", ["int8"], 8, SCALES], ids=["str", "list", "int", "scales"])
def test_options_of_another_type(options: Any) -> None:
    with pytest.raises(TypeError, match="must be a dict or a KVQuantConfig"):
        KVQuantConfig.parse(options)


def test_what_the_user_gives_wins_over_defaults() -> None:
    defaults = {"kv_cache_dtype": "fp8", "max_cache_len": 64}
    assert KVQuantConfig.parse(None, **defaults) == KVQuantConfig("fp8", max_cache_len=64)
    assert KVQuantConfig.parse({"kv_cache_dtype": "int8"}, **defaults) == KVQuantConfig("int8", max_cache_len=64)


def test_defaults_reach_a_config_object_where_it_says_nothing() -> None:
    config = KVQuantConfig(page_size=8, num_pages=3)
    merged = KVQuantConfig.parse(config, kv_cache_dtype="fp8", num_pages=9)
    assert merged == KVQuantConfig("fp8", page_size=8, num_pages=3)
    assert KVQuantConfig.parse(config) is config


def test_never_changes_what_the_user_gave() -> None:
    options = {"kv_cache_dtype": ["fp8", "int8"], "skip_layers": [0, -1], "equalize": ["fp8"], "page_size": 8}
    before = copy.deepcopy(options)
    config = KVQuantConfig.parse(options, max_cache_len=5)
    assert options == before
    options["skip_layers"].append(1)  # type: ignore[attr-defined]
    assert config.skip_layers == (0, -1)


def test_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        KVQuantConfig().page_size = 3  # type: ignore[misc]
