"""The cache by itself: memory, operations, report, and what it refuses."""

from __future__ import annotations

import copy
import gc
import operator
import weakref
from typing import Any

import families
import pytest
import torch
from helpers import llama_config, prompt, tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, Gemma3ForCausalLM, Gemma3TextConfig, LlamaForCausalLM, PreTrainedConfig

from hf_kvquant import KVQuantConfig, LayerScales, OutOfPagesError, QuantizedPagedCache
from hf_kvquant.hosts.conventions import with_cache
from hf_kvquant.risks import large_key_biases


def make_cache(config: PreTrainedConfig | None = None, **options: Any) -> QuantizedPagedCache:
    return QuantizedPagedCache(config or llama_config(), KVQuantConfig(**{"scales": "dynamic", **options}))


def keys_and_values(
    num_tokens: int, batch_size: int = 1, num_heads: int = 2, head_dim: int = 16, seed: int = 0, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, batch_size, num_heads, num_tokens, head_dim)
    key, value = torch.randn(shape, generator=generator) * scale
    return key, value


def add(cache: Any, num_tokens: int, **shape: Any) -> None:
    for index in range(len(cache.layers)):
        cache.update(*keys_and_values(num_tokens, seed=index, **shape), index)


def contents(cache: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(keys, values) for keys, values, _ in cache]


def sliding_model(window: int = 12, **overrides: Any) -> Gemma3ForCausalLM:
    torch.manual_seed(0)
    options = llama_config().to_dict()
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    layer_types = overrides.pop("layer_types", ["sliding_attention", "full_attention"])
    config = Gemma3TextConfig(
        **{name: options[name] for name in names},
        num_hidden_layers=len(layer_types),
        layer_types=layer_types,
        sliding_window=window,
        initializer_range=0.2,
        eos_token_id=None,
        pad_token_id=0,
        **overrides,
    )
    model = Gemma3ForCausalLM(config).eval()
    model.set_attn_implementation("kvquant")
    return model


# -- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("head_dim", "bound"), [(64, 0.53), (128, 0.52)], ids=["head_dim64", "head_dim128"])
@pytest.mark.parametrize("dtype", ["int8", "fp8", "fp8_e5m2"])
def test_half_the_bytes_of_bf16_from_1024_tokens_on(dtype: str, head_dim: int, bound: float) -> None:
    config = llama_config(head_dim=head_dim)
    for first in (1024, 1025, 1039, 1500):
        cache = make_cache(config, kv_cache_dtype=dtype)
        add(cache, first, head_dim=head_dim)
        in_bf16 = 2 * 2 * 2 * 2 * head_dim * first
        assert cache.nbytes <= bound * in_bf16, first
        assert cache.nbytes_allocated <= 1.25 * cache.nbytes + 2**20


def test_allocated_memory_follows_use() -> None:
    config = llama_config(head_dim=64, num_key_value_heads=4)
    cache = make_cache(config)
    shape = {"num_heads": 4, "head_dim": 64}
    add(cache, 4000, **shape)
    largest = cache.nbytes_allocated
    for _ in range(200):
        add(cache, 7, **shape)
        assert cache.nbytes <= cache.nbytes_allocated <= 1.25 * cache.nbytes + 2**18
    cache.crop(-5000)
    assert cache.get_seq_length() == 400
    assert cache.nbytes_allocated <= 1.25 * cache.nbytes + 2**18 < largest / 4
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.nbytes_allocated <= 4096


def test_pages_that_have_moved_are_gone_at_once() -> None:
    cache = make_cache(llama_config())
    add(cache, 100)
    pages = [weakref.ref(getattr(layer, side).paged.pages) for layer in cache.layers for side in ("k", "v")]
    cache.update(*keys_and_values(1000, seed=0), 0)  # the pages of all layers grow with the first
    assert all(page() is None for page in pages)


def test_generate_sizes_the_pool_by_its_maximum() -> None:
    model = tiny_llama("kvquant")
    options = {"max_new_tokens": 60, "do_sample": False, "return_dict_in_generate": True}
    cache = model.generate(prompt(3, 100), cache_config={"page_size": 8}, **options).past_key_values
    assert cache.layers[0].table.pool.size == 3 * 20  # 159 tokens per sequence, in pages of 8
    assert cache.nbytes == cache.nbytes_allocated


def test_num_pages_bounds_the_cache_and_nothing_is_corrupted() -> None:
    cache = make_cache(kv_cache_dtype="int8", page_size=4, num_pages=10)
    add(cache, 17, batch_size=2)
    before = contents(cache)
    with pytest.raises(OutOfPagesError, match=r"21 tokens a sequence need 12 pages of 4 tokens.*num_pages=10"):
        add(cache, 4, batch_size=2)
    assert cache.get_seq_length() == 17
    after = contents(cache)
    assert all(torch.equal(x, y) for old, new in zip(before, after, strict=True) for x, y in zip(old, new, strict=True))
    add(cache, 3, batch_size=2)
    assert cache.get_seq_length() == 20


def test_no_layer_advances_when_a_later_one_has_no_room() -> None:
    """The sliding layer comes first and would fit; the full one behind it would not."""
    model = sliding_model()
    cache = QuantizedPagedCache.from_model(model, kv_cache_dtype="int8", page_size=4, num_pages=8)
    with torch.no_grad():
        model(prompt(1, 30), past_key_values=cache)
        lengths = [layer.get_seq_length() for layer in cache.layers]
        with pytest.raises(OutOfPagesError, match="num_pages=8"):
            model(prompt(1, 5), past_key_values=cache)
    assert [layer.get_seq_length() for layer in cache.layers] == lengths == [30, 30]


def test_sliding_layers_keep_their_window_only() -> None:
    model = sliding_model(window=12)
    cache = QuantizedPagedCache.from_model(model, page_size=4)
    with torch.no_grad():
        model(prompt(1, 100), past_key_values=cache)
        for seed in range(10):
            model(prompt(1, 3, seed=seed), past_key_values=cache)
            assert cache.layers[0].table.pages_in_use <= 5  # 11 tokens before, 3 new ones, pages of 4
    assert cache.layers[1].table.pages_in_use == -(-130 // 4)
    sliding, full = cache.report().layers
    assert sliding.layer_type == "sliding_attention"
    assert sliding.stored_bytes < full.stored_bytes / 4


class CountSyncs(TorchDispatchMode):
    """Counts the numbers that the host reads back from tensors, each a wait for the device on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"max_cache_len": 200}], ids=["growing", "fixed"])
@pytest.mark.parametrize("dtype", ["int8", "fp8", "model"])
def test_a_decode_step_reads_nothing_back(dtype: str, options: dict[str, Any]) -> None:
    for model in (tiny_llama("kvquant"), sliding_model()):
        cache = QuantizedPagedCache.from_model(model, kv_cache_dtype=dtype, page_size=4, **options)
        with torch.no_grad():
            model(prompt(2, 30), past_key_values=cache)
            with CountSyncs() as syncs:
                for step in range(9):  # new pages among them
                    model(prompt(2, 1, seed=step), past_key_values=cache)
        assert syncs.count == 0
        with CountSyncs() as syncs:
            int(cache.get_seq_length() + torch.ones(1))
        assert syncs.count == 1  # the counter counts


@pytest.mark.parametrize(
    "options", [{}, {"max_cache_len": 64}, {"recent_tokens": 3}], ids=["growing", "fixed", "recent"]
)
@pytest.mark.parametrize("copied_when", ["empty", "filled"])
def test_a_layer_that_its_model_copies_goes_its_own_way(copied_when: str, options: dict[str, Any]) -> None:
    """Models that go through some layers several times copy the cache layers of those, in the middle of a step too."""
    cache = QuantizedPagedCache.from_model(tiny_llama("kvquant"), kv_cache_dtype="int8", page_size=4, **options)
    if copied_when == "filled":
        for layer in cache.layers:
            layer.update(*torch.randn(2, 2, 2, 21, 16))
    cache.layers.append(copy.deepcopy(cache.layers[1]))
    one, other = cache.layers[1:]
    assert other.shared is one.shared
    kept: dict[int, Any] = {}
    for layer in (cache.layers[0], one, other, one, other, other):  # the last one is ahead of the others
        layer.update(*torch.randn(2, 2, 2, 5, 16))
        kept[id(layer)] = [layer.read(side, 0).clone() for side in ("k", "v")]
        for each in (one, other):
            if id(each) in kept:
                for side, dense in zip(("k", "v"), kept[id(each)], strict=True):
                    assert torch.equal(each.read(side, 0), dense)
    length = 21 if copied_when == "filled" else 0
    assert [int(layer.get_seq_length()) for layer in cache.layers] == [length + 5, length + 10, length + 15]


# -- operations -----------------------------------------------------------------------------------------------------


def test_crop_then_continue_equals_never_having_gone_there() -> None:
    model = tiny_llama("kvquant")
    with torch.no_grad():
        straight = QuantizedPagedCache.from_model(model, kv_cache_dtype="int8", page_size=4)
        detour = QuantizedPagedCache.from_model(model, kv_cache_dtype="int8", page_size=4)
        for cache in (straight, detour):
            model(prompt(), past_key_values=cache)
        model(prompt(length=13, seed=4), past_key_values=detour)
        detour.crop(-13)
        new = prompt(length=6, seed=5)
        expected, got = (model(new, past_key_values=cache).logits for cache in (straight, detour))
    assert torch.equal(got, expected)


def test_crop_beyond_a_window_is_refused_unless_the_past_is_recorded() -> None:
    model = sliding_model(window=12)
    with torch.no_grad():
        straight = DynamicCache(config=model.config)
        for new in (prompt(1, 40), prompt(1, 4, seed=0)):
            model(new, past_key_values=straight)
        expected = model(prompt(1, 4, seed=9), past_key_values=straight).logits
        for records in (False, True):
            cache = QuantizedPagedCache.from_model(model, kv_cache_dtype="model", page_size=4)
            model(prompt(1, 40), past_key_values=cache)
            if records:
                cache.activate_past_recording()
            for seed in range(6):
                model(prompt(1, 4, seed=seed), past_key_values=cache)
            if not records:
                with pytest.raises(RuntimeError, match="sliding window of 12"):
                    cache.crop(-20)
                assert [layer.get_seq_length() for layer in cache.layers] == [64, 64]
                continue
            cache.crop(-20)
            torch.testing.assert_close(model(prompt(1, 4, seed=9), past_key_values=cache).logits, expected)


@pytest.mark.parametrize("recent_tokens", [0, 3])
def test_a_refused_crop_of_a_window_of_one_token_leaves_the_cache_as_it_was(recent_tokens: int) -> None:
    model = sliding_model(window=1)
    options = {"kv_cache_dtype": "int8", "page_size": 2, "recent_tokens": recent_tokens}
    straight, refused = (QuantizedPagedCache.from_model(model, **options) for _ in range(2))
    with torch.no_grad():
        for cache in (straight, refused):
            model(prompt(1, 20), past_key_values=cache)
        with pytest.raises(RuntimeError, match="sliding window of 1 keeps only the tokens from 18 on"):
            refused.crop(-2)
        assert [(layer.length, layer.table.length) for layer in refused.layers] == [(20, 20)] * 2
        refused.crop(-1)
        straight.crop(-1)
        expected, got = (model(prompt(1, 4, seed=9), past_key_values=cache).logits for cache in (straight, refused))
    assert torch.equal(got, expected)


def test_beams_share_pages() -> None:
    cache = make_cache(kv_cache_dtype="int8", page_size=4)
    add(cache, 40)
    alone = cache.nbytes
    cache.batch_repeat_interleave(8)
    assert cache.layers[0].table.pages_in_use == 10
    add(cache, 1, batch_size=8)
    assert cache.layers[0].table.pages_in_use == 10 + 8  # each writes a page of its own
    assert cache.nbytes < 2 * alone
    cache.reorder_cache(torch.tensor([3, 3, 3, 3, 0, 0, 0, 7]))
    assert cache.layers[0].table.pages_in_use == 10 + 3
    cache.batch_select_indices(torch.tensor([0, 4]))
    assert cache.batch_size == 2
    assert cache.layers[0].table.pages_in_use == 10 + 2


@pytest.mark.parametrize("options", [{}, {"max_cache_len": 64}], ids=["growing", "fixed"])
def test_memory_goes_with_the_last_reference(options: dict[str, Any]) -> None:
    """Not with the next garbage collection: a full GPU does not trigger one."""
    gc.disable()
    try:
        model = sliding_model()
        cache = QuantizedPagedCache.from_model(model, **options)
        with torch.no_grad():
            model(prompt(), past_key_values=cache)
        pages = [weakref.ref(layer.k.paged.pages) for layer in cache.layers]
        assert all(reference() is not None for reference in pages)
        del cache
        assert all(reference() is None for reference in pages)
    finally:
        gc.enable()


def test_a_copy_is_independent() -> None:
    cache = make_cache(kv_cache_dtype="int8", page_size=4)
    add(cache, 10)
    other = copy.deepcopy(cache)
    before = contents(cache)
    add(other, 10)
    other.crop(-15)
    assert (cache.get_seq_length(), other.get_seq_length()) == (10, 5)
    after = contents(cache)
    assert all(torch.equal(x, y) for old, new in zip(before, after, strict=True) for x, y in zip(old, new, strict=True))


def test_a_layer_that_is_skipped_goes_its_own_way() -> None:
    """Layers share a page table while they see the same tokens, and only then."""
    cache = make_cache(kv_cache_dtype="model", page_size=4)
    dense = DynamicCache(config=llama_config())
    for step, layers in enumerate([(0, 1), (0,), (0, 1), (0,), (1,), (0, 1)]):
        for index in layers:
            new = keys_and_values(3 + step, seed=10 * step + index)
            for each in (cache, dense):
                each.update(*new, index)
    assert [layer.get_seq_length() for layer in cache.layers] == [layer.get_seq_length() for layer in dense.layers]
    for one, other in zip(contents(cache), contents(dense), strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def both_contents_equal(one: Any, other: Any) -> bool:
    pairs = zip(contents(one), contents(other), strict=True)
    return all(torch.equal(x, y) for old, new in pairs for x, y in zip(old, new, strict=True))


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_copies_of_sequences_keep_their_scales(dtype: str) -> None:
    """Copying a shared page, renumbering pages and reordering fixed ones move token scales with the codes."""
    expected = []
    for row in (0, 1):
        alone = make_cache(kv_cache_dtype=dtype, page_size=4, equalize=False)
        for step in range(3):
            for index in range(2):
                key, value = keys_and_values(5, batch_size=2, seed=10 * step + index, scale=10.0**step)
                alone.update(key[row : row + 1], value[row : row + 1], index)
        expected.append(contents(alone))
    for options in ({}, {"max_cache_len": 40}):
        cache = make_cache(kv_cache_dtype=dtype, page_size=4, equalize=False, **options)
        for step in range(3):
            for index in range(2):
                cache.update(*keys_and_values(5, batch_size=2, seed=10 * step + index, scale=10.0**step), index)
            cache.reorder_cache(torch.tensor([1, 0]))
        for index, (keys, values) in enumerate(contents(cache)):
            # After steps 0, 1, 2 and three swaps, row 0 holds row 1's last tokens; earlier ones were swapped too.
            for position, row in ((4, 1), (9, 0), (14, 1)):
                assert torch.equal(keys[0, :, position], expected[row][index][0][0, :, position])
                assert torch.equal(values[0, :, position], expected[row][index][1][0, :, position])
        if not options:
            cache.batch_repeat_interleave(6)
            add(cache, 1, batch_size=12)
            cache.batch_select_indices(torch.tensor([0]))  # pages are renumbered
            assert torch.equal(contents(cache)[0][0][0, :, 14], expected[1][0][0][0, :, 14])


def test_tokens_that_attention_never_asked_for_are_written() -> None:
    """Equalized int8 waits for attention to see the first tokens; filling a prefix by hand must not lose them."""
    results = []
    for attention in ("kvquant", "sdpa"):
        model = tiny_llama(attention)
        cache = QuantizedPagedCache.from_model(model, kv_cache_dtype="int8", page_size=4)
        add(cache, 10)
        cache.crop(-4)
        add(cache, 5)
        cache.batch_repeat_interleave(2)
        add(cache, 1, batch_size=2)
        results.append(cache)
    assert both_contents_equal(*results)
    keys = keys_and_values(10)[0]
    assert (contents(results[0])[0][0][:1, :, :6] - keys[:, :, :6]).abs().max() < 0.05


def hybrid_model() -> Any:
    model = families.build("qwen3_next")
    model.set_attn_implementation("kvquant")
    return model


def test_a_hybrid_follows_crop_and_reset() -> None:
    model = hybrid_model()
    cache, dense = QuantizedPagedCache.from_model(model, kv_cache_dtype="model"), DynamicCache(config=model.config)
    with torch.no_grad():
        for each in (cache, dense):
            model(prompt(1, 9, vocab_size=90), past_key_values=each)
        with pytest.raises(RuntimeError):
            cache.crop(-2)
        logits = [model(prompt(1, 3, 90, seed=2), past_key_values=each).logits for each in (cache, dense)]
        torch.testing.assert_close(*logits)  # the refusal changed nothing
        cache.reset()
        dense = DynamicCache(config=model.config)
        logits = [model(prompt(1, 5, 90, seed=3), past_key_values=each).logits for each in (cache, dense)]
        torch.testing.assert_close(*logits)


def test_a_fixed_window_refuses_what_it_has_overwritten() -> None:
    model = sliding_model(window=12)
    fixed = QuantizedPagedCache.from_model(model, kv_cache_dtype="model", page_size=4, max_cache_len=300)
    straight = DynamicCache(config=model.config)
    with torch.no_grad():
        for each in (fixed, straight):
            model(prompt(1, 200), past_key_values=each)
        model(prompt(1, 20, seed=2), past_key_values=fixed)
        with pytest.raises(RuntimeError, match="sliding window of 12 at fixed addresses"):
            fixed.crop(-150)
        assert [int(layer.get_seq_length()) for layer in fixed.layers] == [220, 220]
        fixed.crop(-20)
        with pytest.raises(RuntimeError, match="sliding window of 12"):
            fixed.crop(-60)  # what was overwritten stays lost
        logits = [model(prompt(1, 3, seed=4), past_key_values=each).logits for each in (fixed, straight)]
    torch.testing.assert_close(*logits)


@pytest.mark.parametrize("attention", ["kvquant", "sdpa"])
def test_a_fixed_window_takes_long_turns(attention: str) -> None:
    model = sliding_model(window=12)
    model.set_attn_implementation(attention)
    fixed = QuantizedPagedCache.from_model(model, kv_cache_dtype="model", page_size=4, max_cache_len=300)
    dense = DynamicCache(config=model.config)
    with torch.no_grad():
        for length in (30, 100, 1):
            new = prompt(2, length, seed=length)
            logits = [model(new, past_key_values=each).logits for each in (fixed, dense)]
            torch.testing.assert_close(*logits)


def test_recorded_past_is_given_back_by_crop() -> None:
    model = sliding_model(window=12)
    cache = QuantizedPagedCache.from_model(model, kv_cache_dtype="model", page_size=4)
    with torch.no_grad():
        model(prompt(1, 20), past_key_values=cache)
        cache.activate_past_recording()
        for seed in range(12):
            model(prompt(1, 4, seed=seed), past_key_values=cache)
            cache.crop(-1)
            assert cache.layers[0].table.pages_in_use <= 4


def test_a_window_of_one_token() -> None:
    """Every token sees itself alone (transformers' own cache keeps everything then, so there is no twin)."""
    model = sliding_model(window=1)
    cache = QuantizedPagedCache.from_model(model, kv_cache_dtype="model", page_size=4)
    with torch.no_grad():
        for length in (8, 1, 3, 4, 1):
            assert model(prompt(1, length), past_key_values=cache).logits.isfinite().all()
    assert cache.layers[0].table.pages_in_use <= 2
    assert cache.layers[0].get_mask_sizes(1) == (1, 17)


@pytest.mark.parametrize("window", [2, 4])
def test_the_smallest_windows(window: int) -> None:
    model = sliding_model(window=window)
    cache, dense = (
        QuantizedPagedCache.from_model(model, kv_cache_dtype="model", page_size=4),
        DynamicCache(config=model.config),
    )
    with torch.no_grad():
        for length in (8, 1, 3, 4, 1, 1):
            new = prompt(1, length, seed=length)
            logits = [model(new, past_key_values=each).logits for each in (cache, dense)]
            torch.testing.assert_close(*logits)


def test_inference_mode_and_then_not() -> None:
    model = tiny_llama("kvquant")
    for options in ({}, {"max_cache_len": 64}):
        cache = QuantizedPagedCache.from_model(model, kv_cache_dtype="int8", page_size=4, **options)
        with torch.inference_mode():
            model(prompt(), past_key_values=cache)
        with torch.no_grad():
            model(prompt(length=9), past_key_values=cache)
        assert int(cache.get_seq_length()) == 30


def test_a_copy_goes_by_the_models_attention() -> None:
    model = tiny_llama("sdpa")
    cache = QuantizedPagedCache.from_model(model)
    other = copy.deepcopy(cache)
    model.set_attn_implementation("kvquant")
    with torch.no_grad():
        model(prompt(), past_key_values=other)
    assert other.report().layers[0].dense == ()


# -- scales ---------------------------------------------------------------------------------------------------------


def relative_error(options: dict[str, Any], key: torch.Tensor, value: torch.Tensor) -> float:
    """Largest error of a stored key or value beside the largest number of its side."""
    cache = make_cache(**options)
    for index in range(2):
        cache.update(key[:, :, :4], value[:, :, :4], index)
        cache.update(key[:, :, 4:], value[:, :, 4:], index)
    keys, values = contents(cache)[0]
    return max(((got - x).abs().amax() / x.abs().amax()).item() for got, x in ((keys, key), (values, value)))


@pytest.mark.parametrize("granularity", ["tensor", "head", "channel"])
@pytest.mark.parametrize("with_zero", [False, True], ids=["symmetric", "zero"])
def test_given_scales_of_every_granularity(granularity: str, with_zero: bool) -> None:
    """LMDeploy's formula with a zero: zero = (min + max) / 2, scale = (max - min) / 255."""
    key, value = keys_and_values(40)
    key, value = key + 3, value - 2
    dims = {"tensor": (0, 1, 2, 3), "head": (0, 2, 3), "channel": (0, 2)}[granularity]
    given = {}
    for side, x in (("k", key), ("v", value)):
        low, high = x.amin(dim=dims), x.amax(dim=dims)
        given[f"{side}_scale"] = (high - low) / 255 if with_zero else x.abs().amax(dim=dims) / 127
        if with_zero:
            given[f"{side}_zero"] = (low + high) / 2
    step = max(scale.max().item() for name, scale in given.items() if name.endswith("scale"))
    largest = min(key.abs().amax().item(), value.abs().amax().item())
    error = relative_error({"kv_cache_dtype": "int8", "scales": LayerScales(**given)}, key, value)
    # Half a step, and another half where the formula's largest number, 127.5 steps, is held by code 127.
    assert error <= step / largest * (1.0 if with_zero else 0.5) * (1 + 1e-5)


def test_unit_scales_and_clipping_are_counted() -> None:
    key, value = keys_and_values(10, scale=100.0)
    key[0, 0, 0, 0], key[0, 1, 3, 2], value[0, 0, 9, 9] = 1000.0, -500.0, 1e6
    cache = make_cache(kv_cache_dtype="fp8", scales="unit")
    cache.update(key, value, 0)
    report = cache.report().layers[0]
    assert report.scales == ("unit (1.0)", "unit (1.0)")
    assert report.clipped == ((key.abs() > 464).sum().item(), (value.abs() > 464).sum().item())
    assert contents(cache)[0][0].abs().max() == 448


def test_dynamic_never_clips() -> None:
    cache = make_cache(kv_cache_dtype="int8")
    for seed, scale in enumerate((1e-3, 1.0, 1e4)):
        for index in range(2):
            cache.update(*keys_and_values(5, seed=seed, scale=scale), index)
    assert all(layer.clipped == (0, 0) for layer in cache.report().layers)
    keys, _ = contents(cache)[0]
    expected = torch.cat([keys_and_values(5, seed=seed, scale=s)[0] for seed, s in enumerate((1e-3, 1.0, 1e4))], dim=2)
    assert ((keys - expected).abs().amax(dim=-1) <= expected.abs().amax(dim=-1) / 127).all()


def test_formats_of_k_and_v_may_differ() -> None:
    cache = make_cache(kv_cache_dtype=("int8", "fp8_e5m2"), scales="first_batch")
    add(cache, 9)
    assert cache.report().layers[0].kv_cache_dtype == ("int8", "fp8_e5m2")
    assert "int8 / fp8_e5m2" in str(cache.report())


def test_skip_layers_by_index_and_by_type() -> None:
    model = sliding_model()
    for skip, expected in (([-1], ["int8", "model"]), ("sliding_attention", ["model", "int8"])):
        cache = QuantizedPagedCache.from_model(model, kv_cache_dtype="int8", skip_layers=skip)
        assert [layer.kv_cache_dtype[0] for layer in cache.report().layers] == expected


# -- what it refuses ------------------------------------------------------------------------------------------------


def test_wrong_batch_and_wrong_model_leave_the_cache_as_it_was() -> None:
    cache = make_cache(kv_cache_dtype="int8")
    add(cache, 9, batch_size=2)
    before = contents(cache)
    with pytest.raises(ValueError, match=r"holds 2 sequence\(s\).*of 3.*reset"):
        cache.update(*keys_and_values(1, batch_size=3), 0)
    with pytest.raises(ValueError, match=r"layer 0.*\(2, 32\).*\(2, 16\).*another model"):
        cache.update(*keys_and_values(1, batch_size=2, head_dim=32), 0)
    with pytest.raises(ValueError, match=r"layer 2 does not exist.*2 layers.*another model"):
        cache.update(*keys_and_values(1, batch_size=2), 2)
    assert [layer.get_seq_length() for layer in cache.layers] == [9, 9]
    after = contents(cache)
    assert all(torch.equal(x, y) for old, new in zip(before, after, strict=True) for x, y in zip(old, new, strict=True))


def test_keys_and_values_of_different_lengths_are_refused() -> None:
    cache = make_cache(kv_cache_dtype="int8")
    add(cache, 5)
    key, value = keys_and_values(3)
    with pytest.raises(ValueError, match=r"layer 0: keys are \[1, 2, 3, 16\] and values \[1, 2, 2, 16\]"):
        cache.update(key, value[:, :, :2], 0)
    assert cache.get_seq_length() == 5


@pytest.mark.parametrize("name", ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"])
def test_handles_stand_in_for_tensors_on_both_sides_of_an_operator(name: str) -> None:
    config = llama_config()
    config._attn_implementation = "kvquant"
    handle, _ = make_cache(config, kv_cache_dtype="model").update(*keys_and_values(5), 0)
    dense, operate = keys_and_values(5)[0], getattr(operator, name)
    assert not isinstance(handle, torch.Tensor)
    other = dense.mT if name == "matmul" else 3.0
    torch.testing.assert_close(operate(handle, other), operate(dense, other), equal_nan=True)
    torch.testing.assert_close(operate(other, handle), operate(other, dense), equal_nan=True)


def test_fixed_addresses_have_bounds() -> None:
    with pytest.raises(OutOfPagesError, match="max_cache_len=320 for 1 .* takes 20 pages.*num_pages=2"):
        add(make_cache(num_pages=2, max_cache_len=320), 5)
    cache = make_cache(max_cache_len=16)
    with pytest.raises(OutOfPagesError, match="layer 0: 17 tokens, but max_cache_len=16"):
        add(cache, 17)
    add(cache, 16)
    with pytest.raises(OutOfPagesError, match="more tokens per sequence than max_cache_len"):
        add(cache, 1)


def test_running_out_of_memory_leaves_the_cache_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_cache(kv_cache_dtype="int8", page_size=4)
    add(cache, 17)
    before = contents(cache)

    def fail(*args: Any) -> None:
        raise torch.OutOfMemoryError("injected")

    with monkeypatch.context() as patch:
        patch.setattr("hf_kvquant.stores.PageStore.resize", fail)
        with pytest.raises(torch.OutOfMemoryError):
            add(cache, 100)
    assert [layer.get_seq_length() for layer in cache.layers] == [17, 17]
    after = contents(cache)
    assert all(torch.equal(x, y) for old, new in zip(before, after, strict=True) for x, y in zip(old, new, strict=True))
    add(cache, 100)
    assert cache.get_seq_length() == 117


def test_a_first_update_that_is_refused_leaves_an_empty_cache() -> None:
    cache = make_cache(scales=LayerScales(torch.ones(5), torch.ones(5)))
    with pytest.raises(ValueError, match="layer 1: k_scale has shape"):
        cache.update(*keys_and_values(3), 1)
    assert cache.get_seq_length() == 0
    assert cache.nbytes == 0


def test_report_is_a_table() -> None:
    model: LlamaForCausalLM = tiny_llama("kvquant_fp8", dtype=torch.bfloat16)
    out = model.generate(prompt(), max_new_tokens=12, do_sample=False, return_dict_in_generate=True)
    report = out.past_key_values.report()
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "type", "format", "scales", "stored", "model", "dtype", "clipped", "dense"]
    assert lines[1].split()[:4] == ["0", "full_attention", "fp8_e4m3", "dynamic"]
    assert report.model_dtype_bytes == 2 * 2 * 2 * 2 * 16 * 2 * 32  # layers, K and V, heads, channels, sequences...
    assert report.nbytes == out.past_key_values.nbytes
    assert f"({report.nbytes / report.model_dtype_bytes:.3f} of it)" in lines[3]


FUSED = {
    "bloom": ("bloom", {}),
    "ctrl": ("ctrl", {"dff": 64}),
    "falcon": ("falcon", {"new_decoder_architecture": False, "multi_query": False, "bias": True}),
    "falcon_one_kv_head": ("falcon", {"new_decoder_architecture": False, "multi_query": True, "bias": True}),
    "falcon_two_kv_heads": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}),
    "gpt2": ("gpt2", {}),
    "gpt2_cross": ("gpt2", {"add_cross_attention": True}),
    "gpt_bigcode": ("gpt_bigcode", {"multi_query": False}),
    "gpt_bigcode_one_kv_head": ("gpt_bigcode", {"multi_query": True}),
    "gpt_neox": ("gpt_neox", {}),
    "persimmon": ("persimmon", {"qk_layernorm": False}),
}


@pytest.mark.parametrize("name", FUSED)
def test_large_key_biases_beside_those_of_queries_and_values(name: str) -> None:
    """A large bias is found where keys become large by it, and only there."""
    model_type, overrides = FUSED[name]
    if model_type not in families.available([model_type]):
        pytest.skip(f"transformers has no {model_type}")
    model = families.build(model_type, overrides)
    names = ("query_key_value.bias", "self_attention.Wk.bias", "multi_head_attention.Wk.bias", ".attn.c_attn.bias")
    bias = next(parameter for path, parameter in model.named_parameters() if path.endswith(names))
    found = set()
    with torch.no_grad():
        for at in range(0, len(bias), 5):
            bias[at] += 500.0
            cache = DynamicCache(config=model.config)
            model(prompt(1, 3), **with_cache(cache))
            is_large = bool(cache.layers[0].keys.abs().max() > 200)
            assert list(large_key_biases(model)) == [0] * is_large, at
            found.add(is_large)
            bias[at] -= 500.0
    assert found == ({True} if model_type == "ctrl" else {True, False})


@pytest.mark.parametrize("held", ["adapter", "buffer"])
def test_large_key_biases_that_are_not_where_they_were(held: str) -> None:
    """Adapters put the projection into another module; some quantized weights keep its bias in a buffer."""
    model = families.build("qwen2")
    model.set_attn_implementation("kvquant_fp8")
    projections = [layer.self_attn.k_proj for layer in model.model.layers]
    with torch.no_grad():
        projections[1].bias[3] = 50.0
    if held == "adapter":
        peft = pytest.importorskip("peft", reason="peft is not installed")
        wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    else:
        wrapped = model
        for projection in projections:
            bias = projection.bias.detach()
            del projection.bias
            projection.register_buffer("bias", bias)
    assert large_key_biases(model) == {1: 50.0}
    output = wrapped.generate(input_ids=prompt(), max_new_tokens=2, return_dict_in_generate=True)
    assert any("layer 1" in note and "bias" in note for note in output.past_key_values.report().notes)
