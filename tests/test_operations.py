"""Operations of a cache on its pages: forks, copies, and everything the host's `Cache` can do."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import types
import weakref
from collections import Counter
from typing import Any

import families
import pytest
import torch
from helpers import NAN_BYTE, QMAX, pages_in_use, prompt, tiny_llama
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from test_cache import add, both_contents_equal, contents, hybrid_model, keys_and_values, make_cache, sliding_model
from transformers import DynamicCache, EncoderDecoderCache

from hf_kvquant import KVQuantConfig, LayerScales, OutOfPagesError, QuantizedPagedCache

UNQUANTIZED = {"kv_cache_dtype": "model", "page_size": 4}

# -- forks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["model", "int8", "fp8"])
def test_forks_share_pages_and_never_see_each_other(dtype: str) -> None:
    model = tiny_llama("kvquant")
    with torch.no_grad():
        cache = QuantizedPagedCache.from_model(model, kv_cache_dtype=dtype, page_size=4)
        model(prompt(2, 21), past_key_values=cache)
        allocated, in_use = cache.nbytes_allocated, cache.nbytes
        forks = [cache.fork() for _ in range(3)]
        assert cache.nbytes_allocated == allocated
        assert cache.nbytes == in_use
        caches = [cache, *forks]
        logits = []
        for step, length in enumerate((1, 6)):
            logits.append([model(prompt(2, length, seed=10 * step + i), past_key_values=each).logits
                           for i, each in enumerate(caches)])  # fmt: skip
        for index, each in enumerate(caches):  # the same without forks
            alone = QuantizedPagedCache.from_model(model, kv_cache_dtype=dtype, page_size=4)
            model(prompt(2, 21), past_key_values=alone)
            for step, length in enumerate((1, 6)):
                expected = model(prompt(2, length, seed=10 * step + index), past_key_values=alone).logits
                assert torch.equal(logits[step][index], expected)
            assert both_contents_equal(each, alone)
    pool = cache.layers[0].table.pool
    # Five full pages of a row are shared by all; the sixth and seventh are everybody's own.
    assert pages_in_use(pool) == 2 * (5 + 4 * 2)


def test_operations_on_a_fork_leave_the_others_alone() -> None:
    cache = make_cache(kv_cache_dtype="int8", page_size=4)
    add(cache, 30, batch_size=2)
    before = contents(cache)

    def unchanged() -> None:
        after = contents(cache)
        for old, new in zip(before, after, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(old, new, strict=True))

    for operate in (
        lambda fork: fork.crop(-13),
        lambda fork: fork.reset(),
        lambda fork: fork.reorder_cache(torch.tensor([1, 1])),
        lambda fork: fork.batch_repeat_interleave(3),
        lambda fork: fork.batch_select_indices(torch.tensor([1])),
        lambda fork: add(fork, 50, batch_size=2),
        lambda fork: fork.layers[0].crop(-3),
    ):
        fork = cache.fork()
        operate(fork)
        unchanged()
        add(fork, 3, batch_size=fork.batch_size if fork.batch_size > 0 else 5)
        unchanged()
        del fork
    add(cache, 5, batch_size=2)
    assert pages_in_use(cache.layers[0].table.pool) == 2 * 9


def test_a_fork_outlives_its_origin_and_gives_pages_back() -> None:
    gc.disable()
    try:
        cache = make_cache(kv_cache_dtype="int8", page_size=4)
        add(cache, 40)
        fork = cache.fork()
        expected = contents(cache)
        pages = weakref.ref(cache.layers[0].k.paged.pages)
        pool = cache.layers[0].table.pool
        add(cache, 41)
        del cache
        assert pages_in_use(pool) == 10
        for old, new in zip(expected, contents(fork), strict=True):
            assert all(torch.equal(x, y) for x, y in zip(old, new, strict=True))
        add(fork, 1)
        assert pool.size <= 14  # the memory of what was dropped has come back
        del fork, expected
        assert pages() is None
    finally:
        gc.enable()


def test_num_pages_bounds_all_forks_together() -> None:
    cache = make_cache(kv_cache_dtype="int8", page_size=4, num_pages=12)
    add(cache, 30)
    fork = cache.fork()
    add(fork, 10)  # two pages and a copy of the half-filled one
    with pytest.raises(OutOfPagesError, match="43 tokens a sequence need 14 pages"):
        add(cache, 13)
    del fork
    add(cache, 13)


@pytest.mark.parametrize("options", [{}, {"max_cache_len": 100}], ids=["growing", "fixed"])
@pytest.mark.parametrize("copied", [copy.deepcopy, QuantizedPagedCache.fork], ids=["deepcopy", "fork"])
@pytest.mark.parametrize("make_model", [tiny_llama, sliding_model, hybrid_model], ids=["full", "sliding", "hybrid"])
def test_copies_go_on_like_the_original(make_model: Any, copied: Any, options: dict[str, Any]) -> None:
    model = make_model()
    with torch.no_grad():
        cache = QuantizedPagedCache.from_model(model, kv_cache_dtype="int8", page_size=4, **options)
        empty = copied(cache)
        model(prompt(2, 30, 90), past_key_values=cache)
        other = copied(cache)
        model(prompt(2, 7, 90, seed=4), past_key_values=other)
        model(prompt(2, 30, 90), past_key_values=empty)
        logits = [model(prompt(2, 5, 90, seed=9), past_key_values=each).logits for each in (cache, empty)]
        assert torch.equal(*logits)
        logits = [model(prompt(2, 5, 90, seed=9), past_key_values=each).logits for each in (cache, other)]
        assert not torch.equal(*logits)
    if copied is copy.deepcopy:
        addresses = [{layer.k.paged.pages.data_ptr() for layer in each.layers if hasattr(layer, "k")}
                     for each in (cache, other)]  # fmt: skip
        assert addresses[0].isdisjoint(addresses[1])


def test_a_fork_before_the_first_real_tokens_takes_its_own_scales() -> None:
    cache = make_cache(kv_cache_dtype="fp8", scales="first_batch")
    zeros = torch.zeros(1, 2, 5, 16)
    for index in range(2):
        cache.update(zeros, zeros, index)
    fork = cache.fork()
    for index in range(2):
        fork.update(*keys_and_values(3, scale=100.0), index)
        cache.update(*keys_and_values(3, scale=0.1), index)
    scales = [each.layers[0].k.paged.scale.item() for each in (cache, fork)]
    assert scales[1] == pytest.approx(1000 * scales[0])


@pytest.mark.parametrize("options", [{}, {"max_cache_len": 64}], ids=["growing", "fixed"])
def test_operations_on_a_layer_that_holds_nothing_leave_the_others_alone(options: dict[str, Any]) -> None:
    cache = make_cache(**UNQUANTIZED, **options)
    key, value = keys_and_values(9)
    cache.update(key, value, 0)
    for operate in (
        lambda layer: layer.reset(),
        lambda layer: layer.crop(-3),
        lambda layer: layer.reorder_cache(torch.tensor([0])),
        lambda layer: layer.batch_repeat_interleave(2),
        lambda layer: layer.batch_select_indices(torch.tensor([0])),
    ):
        operate(cache.layers[1])
        assert torch.equal(cache.layers[0].read("k", 0)[:, :, :9], key)
        assert torch.equal(cache.layers[0].read("v", 0)[:, :, :9], value)
    cache.update(key * 2, value, 1)
    assert torch.equal(cache.layers[1].read("k", 0)[:, :, :9], key * 2)


@pytest.mark.parametrize("change", ["repeat", "fork"])
def test_a_layer_writes_into_no_pages_that_came_to_be_shared_before_its_step(change: str) -> None:
    """The table has the step already, of the layer before."""
    cache = make_cache(**UNQUANTIZED)
    add(cache, 9)
    cache.update(*keys_and_values(5, seed=2), 0)
    if change == "repeat":
        cache.layers[0].batch_repeat_interleave(2)
        cache.layers[1].batch_repeat_interleave(2)
        caches, batch_size = [cache], 2
    else:
        caches, batch_size = [cache, cache.fork()], 1
    before = cache.layers[1].read("k", 0)
    new = [keys_and_values(5, batch_size, seed=3 + index) for index in range(len(caches))]
    for each, pair in zip(caches, new, strict=True):
        each.update(*pair, 1)
    for each, (key, _) in zip(caches, new, strict=True):
        assert torch.equal(each.layers[1].read("k", 0), torch.cat([before, key], dim=2))


def test_a_layer_takes_its_first_tokens_into_pages_of_its_own() -> None:
    """The layer before it has had its sequences selected already."""
    cache = make_cache(**UNQUANTIZED)
    cache.update(*keys_and_values(9), 0)
    cache.layers[0].batch_repeat_interleave(2)
    key, value = keys_and_values(9, batch_size=2)
    cache.update(key, value, 1)
    assert torch.equal(cache.layers[1].read("k", 0), key)
    assert torch.equal(cache.layers[0].read("k", 0), keys_and_values(9)[0].repeat(2, 1, 1, 1))


def test_pickling_is_refused() -> None:
    with pytest.raises(TypeError, match=r"not pickled.*fork\(\).*save_pretrained\(\)"):
        pickle.dumps(make_cache())


# -- the host's interface -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make_model", [tiny_llama, sliding_model], ids=["full", "sliding"])
def test_answers_are_those_of_the_hosts_own_cache(make_model: Any) -> None:
    model = make_model()
    caches = [QuantizedPagedCache.from_model(model, **UNQUANTIZED), DynamicCache(config=model.config)]

    def answers(cache: Any) -> list[Any]:
        sizes = [(cache.get_mask_sizes(n, i), cache.get_seq_length(i)) for n in (1, 5) for i in range(2)]
        shapes = [(keys.shape, values.shape, window) for keys, values, window in cache if keys is not None]
        assert all(window is None or isinstance(window, torch.Tensor) for _, _, window in shapes)
        return [
            sizes, shapes, len(cache), cache.is_sliding, cache.is_linear, cache.is_initialized, cache.is_croppable,
            cache.is_compileable, [cache.get_max_length(i) for i in (0, 1, None)], cache.get_query_offset(),
            [getattr(layer, "record_past", None) for layer in cache.layers if layer.is_sliding],
        ]  # fmt: skip

    with torch.no_grad():
        for length in (0, 5, 1, 30, 1):
            for cache in caches:
                if length:
                    model(prompt(2, length, seed=length), past_key_values=cache)
            ours, hosts = (answers(cache) for cache in caches)
            assert ours[2:8] == hosts[2:8]
            assert ours[:2] == hosts[:2]
            assert ours[8:] == hosts[8:]


@pytest.mark.parametrize("options", [{}, {"max_cache_len": 64}, {"offload": True}], ids=["growing", "fixed", "offload"])
def test_sequences_that_are_not_there_are_refused_and_nothing_changes(options: dict[str, Any]) -> None:
    """As by transformers' caches; a negative number is none either."""
    cache = make_cache(kv_cache_dtype="int8", page_size=4, sink_tokens=3, recent_tokens=5, **options)
    add(cache, 9, batch_size=3)
    before = contents(cache)
    for operate in (cache.reorder_cache, cache.layers[1].reorder_cache):
        for wrong in (-1, 3):
            with pytest.raises(ValueError, match=rf"layer \d: there is no sequence {wrong} among the 3 "):
                operate(torch.tensor([0, wrong, 1]))
    for old, new in zip(before, contents(cache), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(old, new, strict=True))


@pytest.mark.parametrize("options", [{}, {"max_cache_len": 64}, {"offload": True}], ids=["growing", "fixed", "offload"])
def test_early_initialization(options: dict[str, Any]) -> None:
    """Scales, heads and dtype are known before the first token; what follows is the same."""
    contents_of = []
    for early in (False, True):
        cache = make_cache(kv_cache_dtype="int8", page_size=4, **options)
        if early:
            cache.early_initialization(2, 2, 16, torch.float32, torch.device("cpu"))
            assert all(layer.is_initialized for layer in cache.layers)
            assert int(cache.get_seq_length()) == 0
        add(cache, 9, batch_size=2)
        contents_of.append(contents(cache))
    for one, other in zip(*contents_of, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def test_two_of_ours_as_an_encoder_decoder_cache() -> None:
    decoder, encoder = (make_cache(kv_cache_dtype="int8", page_size=4) for _ in range(2))
    add(decoder, 9, batch_size=2)
    add(encoder, 20, batch_size=2)
    cache = EncoderDecoderCache(decoder, encoder)
    assert cache.get_seq_length() == 9
    assert cache.is_updated == {0: True, 1: True}
    other = copy.deepcopy(cache)
    cache.batch_repeat_interleave(3)
    cache.reorder_cache(torch.tensor([5, 4, 3, 2, 1, 0]))
    cache.batch_select_indices(torch.tensor([0, 5]))
    cache.crop(-4)
    assert (decoder.batch_size, decoder.get_seq_length()) == (2, 5)
    assert (encoder.batch_size, encoder.get_seq_length()) == (2, 20)
    for one, two in zip(contents(encoder), contents(other.cross_attention_cache), strict=True):
        assert torch.equal(one[0], two[0].flip(0))
    assert len(list(cache)) == 2
    cache.reset()
    assert encoder.get_seq_length() == decoder.get_seq_length() == 0
    assert other.get_seq_length() == 9


@pytest.mark.parametrize("options", [{}, {"max_cache_len": 64}, {"offload": True}], ids=["growing", "fixed", "offload"])
def test_beams_are_saved_as_they_are(options: dict[str, Any], tmp_path: Any) -> None:
    """Sequences that share pages come back, whatever they share then."""
    model = tiny_llama("kvquant")
    cache = QuantizedPagedCache.from_model(model, page_size=4, **options)
    with torch.no_grad():
        model(prompt(3, 21), past_key_values=cache)
        cache.reorder_cache(torch.tensor([2, 2, 0]))
        model(prompt(3, 2), past_key_values=cache)
        cache.save_pretrained(tmp_path / "beams")
        loaded = QuantizedPagedCache.from_pretrained(tmp_path / "beams", model)
        for _ in range(2):
            logits = [model(prompt(3, 3, seed=3), past_key_values=each).logits for each in (cache, loaded)]
            assert torch.equal(*logits)
            for each in (cache, loaded):
                each.reorder_cache(torch.tensor([1, 0, 0]))


# -- keys and values as attributes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["kvquant", "sdpa"])
def test_pruning_by_assignment(attention: str) -> None:
    """As kvpress does it: keep some tokens of every layer, then go on; equal to doing so in a dense cache."""
    model = tiny_llama(attention)
    kept = torch.tensor([0, 1, 5, 6, 8, 13, 17, 20])
    logits = []
    for cache in (DynamicCache(config=model.config), QuantizedPagedCache.from_model(model, **UNQUANTIZED)):
        with torch.no_grad():
            model(prompt(), past_key_values=cache)
            for layer in cache.layers:
                keys, values = layer.keys, layer.values
                layer.keys = keys[:, :, kept]
                layer.values = values[:, :, kept]
            assert cache.get_seq_length() == 8
            positions = torch.arange(21, 24)[None]
            logits.append(model(prompt(length=3, seed=4), past_key_values=cache, position_ids=positions).logits)
    torch.testing.assert_close(*logits)
    assert len(cache._tables) == 1, "layers that are pruned to the same length share a table again"
    assert cache.layers[0].table.pages_in_use == 2 * 3


@pytest.mark.parametrize("dtype", ["model", "int8", "fp8"])
@pytest.mark.parametrize("make_model", [tiny_llama, sliding_model], ids=["full", "sliding"])
def test_replacing_by_as_many(make_model: Any, dtype: str) -> None:
    """Other numbers in the same places, seen by no fork and by no other beam."""
    model = make_model()
    cache = QuantizedPagedCache.from_model(model, kv_cache_dtype=dtype, page_size=4)
    with torch.no_grad():
        model(prompt(1), past_key_values=cache)
    tables = len(cache._tables)
    for layer in cache.layers:
        layer.values = layer.values * 1.0
    cache.crop(0)
    assert len(cache._tables) == tables
    cache.batch_repeat_interleave(3)
    fork = cache.fork()
    before = [(layer.keys.clone(), layer.values.clone()) for layer in fork.layers]
    factor = torch.tensor([1.0, 2.0, 4.0])[:, None, None, None]
    for layer, (_, values) in zip(cache.layers, before, strict=True):
        layer.values = values * factor
    cache.crop(0)
    for layer, (keys, values) in zip(cache.layers, before, strict=True):
        error = (layer.values - values * factor).abs().amax() / (values * factor).abs().amax()
        assert error <= {"model": 0, "int8": 1 / 127, "fp8": 1 / 16}[dtype]
        assert layer.get_seq_length() == 21
        assert layer.keys.shape == keys.shape
    for layer, (keys, values) in zip(fork.layers, before, strict=True):
        assert torch.equal(layer.keys.clone(), keys)
        assert torch.equal(layer.values.clone(), values)


@pytest.mark.parametrize("way", [{"num_beams": 3}, {"num_return_sequences": 3, "do_sample": True}], ids=str)
def test_replacing_right_after_a_prompt_that_sequences_share(way: dict[str, Any]) -> None:
    model = tiny_llama("kvquant")
    options = {"max_new_tokens": 1, "return_dict_in_generate": True, "cache_config": UNQUANTIZED, **way}
    cache = model.generate(prompt(1), **options).past_key_values
    factor = torch.tensor([1.0, 2.0, 4.0])[:, None, None, None]
    for layer in cache.layers:
        values = layer.values * factor
        layer.values = values
        layer.settle()
        assert torch.equal(layer.values * 1.0, values)


@pytest.mark.parametrize("change", ["assign", "select"])
def test_layers_with_tables_of_their_own_are_refused_room_together(change: str) -> None:
    model = sliding_model(layer_types=["sliding_attention", "full_attention", "sliding_attention"])
    cache = QuantizedPagedCache.from_model(model, **UNQUANTIZED, num_pages=10)
    with torch.no_grad():
        model(prompt(1, 20), past_key_values=cache)
        if change == "assign":
            fork = cache.fork()  # from whose pages the layers part
            for layer in cache.layers:
                layer.values = layer.values * 1.0
                layer.settle()
            del fork
        else:
            cache.layers[0].reorder_cache(torch.tensor([0]))
        assert len(cache._tables) == 3
        with pytest.raises(OutOfPagesError, match="44 tokens a sequence need 11 pages"):
            model(prompt(1, 24), past_key_values=cache)
    assert [layer.get_seq_length() for layer in cache.layers] == [20] * 3


@pytest.mark.parametrize("saved", [False, True], ids=["", "saved"])
def test_layers_that_share_more_pages_than_others_are_refused_room_with_them(saved: bool, tmp_path: Any) -> None:
    model = tiny_llama("kvquant")
    cache = QuantizedPagedCache.from_model(model, **UNQUANTIZED, num_pages=11)
    add(cache, 20)
    cache.batch_repeat_interleave(2)
    layer = cache.layers[1]
    layer.values = layer.values * 1.0
    layer.settle()
    if saved:
        cache.save_pretrained(tmp_path)
        cache = QuantizedPagedCache.from_pretrained(tmp_path, model)
    with pytest.raises(OutOfPagesError, match="24 tokens a sequence need 12 pages"):
        add(cache, 4, batch_size=2)
    assert [layer.get_seq_length() for layer in cache.layers] == [20] * 2


@pytest.mark.parametrize("how", ["crop", "prune"])
def test_a_layer_that_was_shortened_by_itself_lacks_no_step(how: str, tmp_path: Any) -> None:
    """Nor does it in a cache that was saved."""
    model = sliding_model()
    cache = QuantizedPagedCache.from_model(model, **UNQUANTIZED)
    add(cache, 21)
    layer = cache.layers[1]
    if how == "crop":
        layer.crop(-4)
    else:
        layer.keys, layer.values = layer.keys[:, :, :17], layer.values[:, :, :17]
    cache.save_pretrained(tmp_path)
    for each in (cache, QuantizedPagedCache.from_pretrained(tmp_path, model)):
        each.crop(0)
        assert [layer.get_seq_length() for layer in each.layers] == [21, 17]


def test_sequences_that_share_pages_are_not_replaced_beyond_num_pages() -> None:
    cache = make_cache(**UNQUANTIZED, num_pages=10)
    add(cache, 20)
    cache.batch_repeat_interleave(4)
    before = contents(cache)
    layer = cache.layers[1]
    layer.keys = layer.keys * 2.0
    with pytest.raises(OutOfPagesError, match="4 sequences that share no page need 20 pages of 4 tokens"):
        layer.settle()
    for old, new in zip(before, contents(cache), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(old, new, strict=True))


def test_a_layer_may_be_emptied_and_pruned_by_itself() -> None:
    cache = make_cache(kv_cache_dtype="int8", page_size=4)
    add(cache, 20)
    for layer, kept in zip(cache.layers, (0, 7), strict=True):
        keys, values = layer.keys, layer.values
        layer.keys, layer.values = keys[:, :, :kept], values[:, :, :kept]
        assert layer.get_seq_length() == kept
    add(cache, 3)
    assert [layer.get_seq_length() for layer in cache.layers] == [3, 10]


def test_replacements_that_do_not_fit_are_refused() -> None:
    cache = make_cache(kv_cache_dtype="int8", page_size=4)
    with pytest.raises(ValueError, match="layer 0: keys and values can only be replaced, once there are any"):
        cache.layers[0].keys = torch.zeros(1, 2, 5, 16)
    add(cache, 9)
    layer = cache.layers[0]
    layer.keys = torch.zeros(1, 2, 5, 16)
    with pytest.raises(ValueError, match=r"layer 0: keys are \[1, 2, 5, 16\] and values \[1, 2, 9, 16\]"):
        add(cache, 1)
    layer.keys = torch.zeros(1, 2, 5, 8)
    with pytest.raises(ValueError, match="layer 0.*another model"):
        layer.values = torch.zeros(1, 2, 5, 16)
    assert layer.get_seq_length() == 9
    fixed = make_cache(max_cache_len=32)
    add(fixed, 9)
    with pytest.raises(ValueError, match="layer 0.*fixed addresses"):
        fixed.layers[0].keys, fixed.layers[0].values = torch.zeros(2, 1, 2, 5, 16)
    model = sliding_model(window=6)
    cache = QuantizedPagedCache.from_model(model)
    with torch.no_grad():
        model(prompt(1), past_key_values=cache)
    with pytest.raises(ValueError, match="1 x 2 .* cannot replace 1 x 5 of a sliding window"):
        cache.layers[0].keys, cache.layers[0].values = torch.zeros(2, 1, 2, 2, 16)


# -- pages in host memory -------------------------------------------------------------------------------------------


def on_device(cache: QuantizedPagedCache) -> list[int]:
    """Layers whose pages are on the device."""
    return [layer.index for layer in cache.layers if layer.offloads and layer.k.is_here]


@pytest.mark.parametrize("dtype", ["model", "int8", "fp8"])
@pytest.mark.parametrize("attention", ["kvquant", "sdpa"])
@pytest.mark.parametrize("make_model", [tiny_llama, sliding_model, hybrid_model], ids=["full", "sliding", "hybrid"])
def test_offloaded_pages_give_the_same(make_model: Any, attention: str, dtype: str) -> None:
    model = make_model()
    model.set_attn_implementation(attention)
    logits = []
    for offload in (False, True):
        cache = QuantizedPagedCache.from_model(model, kv_cache_dtype=dtype, page_size=4, offload=offload)
        with torch.no_grad():
            steps = [model(prompt(2, n, 90, seed=n), past_key_values=cache).logits for n in (21, 1, 1, 9, 1)]
            cache.reorder_cache(torch.tensor([1, 1]))
            fork = cache.fork()
            steps += [model(prompt(2, n, 90, seed=n), past_key_values=cache).logits for n in (1, 30)]
            steps += [model(prompt(2, n, 90, seed=n), past_key_values=fork).logits for n in (2, 5)]
        logits.append(steps)
    for one, other in zip(*logits, strict=True):
        assert torch.equal(one, other)


def test_no_more_than_two_layers_are_on_the_device() -> None:
    model = tiny_llama("kvquant", num_hidden_layers=5)
    options = {"cache_config": {"offload": True, "page_size": 4}, "max_new_tokens": 12, "do_sample": False}
    counts = []
    layer_type = type(QuantizedPagedCache.from_model(model).layers[0])
    attend = layer_type.attend

    def counting(layer: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        counts.append(on_device(caches[0]))
        return attend(layer, *args, **kwargs)

    caches = [QuantizedPagedCache.from_model(model, **options.pop("cache_config"))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_type, "attend", counting)
        given = model.generate(prompt(), past_key_values=caches[0], **options)
    assert len(counts) == 5 * 11
    assert all(len(here) == 2 for here in counts)
    assert counts[:5] == [[0, 1], [1, 2], [2, 3], [3, 4], [0, 4]]  # the next layer's are on their way
    made = model.generate(
        prompt(), cache_config={"offload": True, "page_size": 4}, return_dict_in_generate=True, **options
    )
    assert torch.equal(made.sequences, given)
    assert torch.equal(given, model.generate(prompt(), cache_config={"page_size": 4}, **options))
    report = made.past_key_values.report()
    assert any("5 layer(s) rest in host memory" in note for note in report.notes)


def test_offloading_is_chosen_when_the_cache_is_made() -> None:
    cache = make_cache()
    add(cache, 3)
    with pytest.raises(ValueError, match="layer 0.*'offload': True"):
        cache.layers[0].offload()
    with pytest.raises(ValueError, match="offload=True and max_cache_len"):
        make_cache(offload=True, max_cache_len=10)
    with pytest.raises(ValueError, match="offload='yes'"):
        make_cache(offload="yes")


def test_a_copy_waits_for_pages_that_are_on_their_way() -> None:
    """On a GPU they go to host memory beside its work, and events tell when they are there."""
    cache = make_cache(kv_cache_dtype="fp8", page_size=4, offload=True)
    add(cache, 9)
    waited_for: list[str] = []
    for layer in cache.layers:
        for side in ("k", "v"):
            event = types.SimpleNamespace(synchronize=functools.partial(waited_for.append, f"{layer.index}{side}"))
            getattr(layer, side)._saved = event
    copy.deepcopy(cache)
    assert sorted(waited_for) == [f"{index}{side}" for index in range(len(cache.layers)) for side in ("k", "v")]


# -- random sequences of everything ---------------------------------------------------------------------------------

SCALE = 2.0**-5  # a power of two, so that dividing by it rounds nothing


def rounded(x: torch.Tensor, dtype: str) -> torch.Tensor:
    """What a dense cache holds if its numbers go through the format."""
    if dtype == "model":
        return x
    name = {"fp8": "fp8_e4m3"}.get(dtype, dtype)
    codes = (x / SCALE).clamp(-QMAX[name], QMAX[name])
    return (codes.round() if dtype == "int8" else codes.to(torch.float8_e4m3fn).float()) * SCALE


class Twin:
    """A cache and the dense keys and values `[2, B, H, L, D]` that each of its layers should hold."""

    def __init__(self, cache: QuantizedPagedCache, dense: list[torch.Tensor]) -> None:
        self.cache = cache
        self.dense = dense

    @property
    def batch_size(self) -> int:
        return self.dense[0].shape[1]

    def check(self) -> None:
        for layer, dense in zip(self.cache.layers, self.dense, strict=True):
            assert layer.get_seq_length() == dense.shape[3]
            if not dense.shape[3]:
                continue
            start = 0 if layer.window is None else max(dense.shape[3] - (layer.window - 1), 0)
            for side, expected in zip(("k", "v"), dense[:, :, :, start:], strict=True):
                assert torch.equal(layer.read(side, 0), expected)


class CacheOperations(RuleBasedStateMachine):
    """Caches that fork and are operated on, one sliding layer and one with full attention, beside dense tensors."""

    @initialize(
        dtype=st.sampled_from(["model", "int8", "fp8"]),
        page_size=st.sampled_from([1, 3, 4, 16]),
        window=st.sampled_from([2, 5, 9]),
        offload=st.booleans(),
    )
    def start(self, dtype: str, page_size: int, window: int, offload: bool) -> None:
        self.dtype = dtype
        config = sliding_model(window).config
        scales = LayerScales(torch.tensor([SCALE]), torch.tensor([SCALE]))
        options = KVQuantConfig(kv_cache_dtype=dtype, scales=scales, page_size=page_size, offload=offload)
        self.twins = [Twin(QuantizedPagedCache(config, options), [torch.zeros(2, 1, 2, 0, 16)] * 2)]
        self.current = 0
        self.seed = 0

    @property
    def twin(self) -> Twin:
        return self.twins[self.current % len(self.twins)]

    @rule(which=st.integers(0, 2))
    def switch(self, which: int) -> None:
        self.current = which

    @rule(num_tokens=st.sampled_from([1, 1, 1, 2, 5, 18]), batch_size=st.integers(1, 3))
    def update(self, num_tokens: int, batch_size: int) -> None:
        twin = self.twin
        batch_size = twin.batch_size if twin.dense[0].shape[3] else batch_size
        for index, dense in enumerate(twin.dense):
            self.seed += 1
            new = torch.stack(keys_and_values(num_tokens, batch_size=batch_size, seed=self.seed))
            twin.cache.update(*new, index)
            dense = dense if dense.shape[1] == batch_size else dense.new_zeros(2, batch_size, 2, 0, 16)
            twin.dense[index] = torch.cat([dense, rounded(new, self.dtype)], dim=3)

    @rule(num_tokens=st.integers(0, 20))
    def crop(self, num_tokens: int) -> None:
        try:
            self.twin.cache.crop(-num_tokens)
        except RuntimeError:  # the window has moved on; nothing has changed, as the invariants see
            assert self.twin.cache.layers[0].table.first_position > 0
            return
        length = max(self.twin.dense[0].shape[3] - num_tokens, 0)
        self.twin.dense = [dense[:, :, :, :length] for dense in self.twin.dense]

    @rule(data=st.data(), how=st.sampled_from(["reorder", "select", "mask", "repeat"]))
    def select(self, data: st.DataObject, how: str) -> None:
        twin, size = self.twin, self.twin.batch_size
        if not twin.dense[0].shape[3]:
            return
        if how == "repeat":
            repeats = data.draw(st.integers(1, 3 if size < 4 else 1))
            twin.cache.batch_repeat_interleave(repeats)
            order = torch.arange(size).repeat_interleave(repeats)
        elif how == "mask":
            kept = torch.tensor([True, *data.draw(st.lists(st.booleans(), min_size=size - 1, max_size=size - 1))])
            twin.cache.batch_select_indices(kept)
            order = kept.nonzero()[:, 0]
        else:
            count = size if how == "reorder" else data.draw(st.integers(1, 4))
            order = torch.tensor(data.draw(st.lists(st.integers(0, size - 1), min_size=count, max_size=count)))
            (twin.cache.reorder_cache if how == "reorder" else twin.cache.batch_select_indices)(order)
        twin.dense = [dense[:, order] for dense in twin.dense]

    @rule()
    def reset(self) -> None:
        self.twin.cache.reset()
        self.twin.dense = [dense[:, :, :, :0] for dense in self.twin.dense]

    @rule()
    def record_past(self) -> None:
        self.twin.cache.activate_past_recording()

    @precondition(lambda self: len(self.twins) < 3)
    @rule(copied=st.sampled_from([QuantizedPagedCache.fork, copy.deepcopy]))
    def fork(self, copied: Any) -> None:
        self.twins.append(Twin(copied(self.twin.cache), list(self.twin.dense)))

    @precondition(lambda self: len(self.twins) > 1)
    @rule()
    def drop(self) -> None:
        self.twins.remove(self.twin)

    @rule(scale=st.sampled_from([0.5, 2.0]))
    def replace_in_place(self, scale: float) -> None:
        """Other numbers for as many tokens."""
        for index, layer in enumerate(self.twin.cache.layers):
            if not layer.is_empty and not layer.is_sliding:
                values = layer.read("v", 0) * scale
                layer.values = values
                expected = self.twin.dense[index].clone()
                expected[1] = rounded(values, self.dtype)
                self.twin.dense[index] = expected
        self.twin.cache.crop(0)

    @invariant()
    def contents(self) -> None:
        for twin in getattr(self, "twins", ()):
            twin.check()

    @invariant()
    def pages(self) -> None:
        tables = [layer.table for twin in getattr(self, "twins", ()) for layer in twin.cache.layers]
        for pool in {table.pool for table in tables}:
            rows = [table.rows.ravel().tolist() for table in {*tables} if table.pool is pool]
            counts = Counter(page for row in rows for page in row)
            assert pool.references().tolist() == [counts[page] for page in range(pool.size)]
            free = [page for page in range(pool.size) if not counts[page]]
            for store in pool.users:
                assert len(store.at_rest.pages) == pool.size
                if hasattr(store, "release"):
                    store.release()
                store.at_rest.pages[free] = NAN_BYTE.get(store.plan.format, torch.nan)


TestCacheOperations = CacheOperations.TestCase
TestCacheOperations.settings = settings(
    max_examples=60,
    stateful_step_count=25,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("model_type", families.available(["deepseek_v32", "glm_moe_dsa"]))
def test_sequences_of_layers_that_transformers_keeps(model_type: str) -> None:
    """No layer of these models is in pages, and nobody but the operation knows which sequences there are."""
    model = families.build(model_type)
    logits = []
    for cache in (DynamicCache(config=model.config), QuantizedPagedCache.from_model(model)):
        with torch.no_grad():
            model(prompt(3, 12), past_key_values=cache, use_cache=True)
            cache.batch_select_indices(torch.tensor([2, 0]))
            logits.append(model(prompt(2, 1), past_key_values=cache, use_cache=True).logits)
    assert torch.equal(*logits)
