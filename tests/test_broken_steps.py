"""A step breaks off, or memory runs out, in the middle: what the cache then holds is right, or using it is refused."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import families
import pytest
import torch
from helpers import prompt, tiny_llama
from test_cache import add, contents, keys_and_values, sliding_model
from transformers import PreTrainedModel

from hf_kvquant import PrefixCache, QuantizedPagedCache, fixed, huge_pages, ops
from hf_kvquant.broken import take_back_broken_step
from hf_kvquant.exact import ExactTokens
from hf_kvquant.pools import PagePool

NUM_LAYERS, NUM_NEW = 3, 14


def full(attention: str = "kvquant") -> PreTrainedModel:
    return tiny_llama(attention, num_hidden_layers=NUM_LAYERS)


def sliding(attention: str = "kvquant", **overrides: Any) -> PreTrainedModel:
    """One layer with a window, one without: two page tables."""
    model = sliding_model(**overrides)
    model.set_attn_implementation(attention)
    return model


MODELS: dict[str, Callable[..., PreTrainedModel]] = {"full": full, "sliding": sliding}


@contextmanager
def interrupted(module: Any, call: int) -> Iterator[None]:
    """Ctrl-C before `module` is called for the `call`-th time."""
    num_calls = 0

    def hook(*_: Any) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls == call:
            raise KeyboardInterrupt

    handle = module.register_forward_pre_hook(hook)
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        handle.remove()


def logits(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, past_key_values=cache).logits


class Seen:
    """A streamer that remembers."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        """Nothing is left to be said."""


def generate(model: Any, ids: torch.Tensor, cache: Any, num_new: int = NUM_NEW, **options: Any) -> torch.Tensor:
    return model.generate(ids, past_key_values=cache, max_new_tokens=num_new, do_sample=False, **options)


def broken(model: Any, cache: Any, layer: int | None, call: int, **options: Any) -> torch.Tensor:
    """The text `[1, T]` as far as it is known when `generate` over `cache` breaks off before a layer's attention.

    Without a layer it is before the logits.
    """
    module = model.lm_head if layer is None else model.model.layers[layer].self_attn
    seen = Seen()
    with interrupted(module, call):
        generate(model, prompt(1), cache, streamer=seen, **options)
    return torch.tensor([seen.tokens])


OPTIONS: dict[str, dict[str, Any]] = {
    "growing": {},
    "fixed": {"max_cache_len": 64},
    "offload": {"offload": True},
}


@pytest.mark.parametrize(("layer", "call"), [(0, 5), (1, 5), (-1, 5), (-1, 1), (None, 5), (None, 1)])
@pytest.mark.parametrize("attention", ["kvquant", "sdpa"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_generate_goes_on(name: str, options: str, attention: str, layer: int | None, call: int) -> None:
    model = MODELS[name](attention)
    given = {"kv_cache_dtype": "model", **OPTIONS[options]}
    expected = generate(model, prompt(1), QuantizedPagedCache.from_model(model, **given))
    cache = QuantizedPagedCache.from_model(model, **given)
    known = broken(model, cache, layer, call)
    got = generate(model, known, cache, expected.shape[1] - known.shape[1])
    assert torch.equal(got, expected)
    lacked = layer not in (0, None)
    assert any("broke off" in note for note in cache.report().notes) == lacked


@pytest.mark.parametrize("layer", [1, None])
def test_speculation_goes_on(layer: int | None) -> None:
    model = full()
    expected = generate(model, prompt(1), QuantizedPagedCache.from_model(model, kv_cache_dtype="model"))
    cache = QuantizedPagedCache.from_model(model, kv_cache_dtype="model")
    known = broken(model, cache, layer, 5)
    got = generate(model, known, cache, expected.shape[1] - known.shape[1], prompt_lookup_num_tokens=2)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("name", MODELS)
def test_a_further_turn_after_it(name: str) -> None:
    """What the next turn brings is not taken for what the step has left undone."""
    model = MODELS[name]()
    cache = QuantizedPagedCache.from_model(model, kv_cache_dtype="model")
    known = torch.cat([broken(model, cache, 1, 5), prompt(1, 9, seed=3)], dim=1)
    got = generate(model, known, cache)
    whole = QuantizedPagedCache.from_model(model, kv_cache_dtype="model")
    assert torch.equal(got, generate(model, known, whole))


@pytest.mark.parametrize("way", ["crop", "fork", "save"])
def test_operations_after_it(way: str, tmp_path: Path) -> None:
    model = full()
    cache = QuantizedPagedCache.from_model(model, kv_cache_dtype="model")
    known = broken(model, cache, 1, 5)
    length = known.shape[1] - 1
    if way == "crop":
        cache.crop(-1)  # of the first layer's tokens, the one that the others lack
    elif way == "fork":
        cache = cache.fork()
    else:
        cache.save_pretrained(tmp_path)
        cache = QuantizedPagedCache.from_pretrained(tmp_path, model)
    if way != "fork":  # which stays as it is until it is used
        assert [layer.get_seq_length() for layer in cache.layers] == [length] * NUM_LAYERS
    expected = generate(model, prompt(1), QuantizedPagedCache.from_model(model, kv_cache_dtype="model"))
    assert torch.equal(generate(model, known, cache, expected.shape[1] - known.shape[1]), expected)


def test_what_is_kept_of_it_is_whole() -> None:
    model = full()
    prefixes = PrefixCache(model, 1 << 30, kv_cache_dtype="model", page_size=4)
    cache = prefixes.cache_for(prompt(1))
    known = broken(model, cache, 2, 5)
    assert prefixes.keep(known, cache)
    request = torch.cat([known, prompt(1, 9, seed=3)], dim=1)
    got = generate(model, request, prefixes.cache_for(request))
    assert prefixes.hits == 1
    assert torch.equal(got, generate(model, request, QuantizedPagedCache.from_model(model, kv_cache_dtype="model")))


@pytest.mark.parametrize("num_tokens", [3, 20])
def test_what_a_layer_that_lacks_it_holds_can_be_read(num_tokens: int) -> None:
    """Its table has moved on."""
    model = sliding(layer_types=["sliding_attention"] * 2)
    cache, whole = (QuantizedPagedCache.from_model(model, kv_cache_dtype="model", page_size=4) for _ in range(2))
    for each in (cache, whole):
        logits(model, prompt(1, 30), each)
    with interrupted(model.model.layers[1].self_attn, 1):
        logits(model, prompt(1, num_tokens, seed=2), cache)
    for got, expected in zip(list(cache)[1][:2], list(whole)[1][:2], strict=True):
        assert torch.equal(got, expected)


def test_a_state_that_has_moved_on_is_refused() -> None:
    """Of linear attention; every layer of this model has one beside its keys and values."""
    model = families.build("falcon_h1")
    model.set_attn_implementation("kvquant")
    cache = QuantizedPagedCache.from_model(model)
    known = broken(model, cache, 1, 5)
    with pytest.raises(RuntimeError, match=r"broke off.*reset\(\)"):
        generate(model, known, cache)
    cache.reset()
    whole = QuantizedPagedCache.from_model(model)
    assert torch.equal(generate(model, prompt(1), cache), generate(model, prompt(1), whole))


@pytest.mark.parametrize("options", [{}, {"max_cache_len": 64}], ids=["growing", "fixed"])
def test_tokens_that_were_counted_and_not_written_are_written(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the last layer nothing tells that they are not there."""
    model = full()
    cache, whole = (QuantizedPagedCache.from_model(model, kv_cache_dtype="model", **options) for _ in range(2))
    write, pages = ops.write_kv, []

    def failing(key: Any, value: Any, k: Any, *args: Any) -> None:
        pages.append(k)
        if len(pages) == 2 * NUM_LAYERS:  # the last layer's second step
            raise KeyboardInterrupt
        write(key, value, k, *args)

    ids = prompt(1, 30)
    with torch.no_grad():
        model(ids[:, :20], past_key_values=whole)
        model(ids[:, 20:21], past_key_values=whole)
        expected = model(ids[:, 21:], past_key_values=whole).logits
        with monkeypatch.context() as patch:
            patch.setattr(ops, "write_kv", failing)
            model(ids[:, :20], past_key_values=cache)
            with pytest.raises(KeyboardInterrupt):
                model(ids[:, 20:21], past_key_values=cache)
        assert torch.equal(model(ids[:, 21:], past_key_values=cache).logits, expected)


def test_tokens_that_were_counted_and_not_kept_exactly_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = full()
    options = {"kv_cache_dtype": "int8", "recent_tokens": 8, "sink_tokens": 3}
    cache, whole = (QuantizedPagedCache.from_model(model, **options) for _ in range(2))
    append, calls = ExactTokens.append, []

    def failing(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2 * NUM_LAYERS:
            raise KeyboardInterrupt
        return append(*args)

    ids = prompt(1, 30)
    for part in (ids[:, :20], ids[:, 20:21]):
        logits(model, part, whole)
    with monkeypatch.context() as patch:
        patch.setattr(ExactTokens, "append", failing)
        logits(model, ids[:, :20], cache)
        with pytest.raises(KeyboardInterrupt):
            logits(model, ids[:, 20:21], cache)
    assert torch.equal(logits(model, ids[:, 21:], cache), logits(model, ids[:, 21:], whole))


class Interrupt:
    """Ctrl-C before the `number`-th line of the package that this thread comes to, counted from 0."""

    def __init__(self, number: int) -> None:
        self.left = number

    def trace(self, frame: Any, event: str, _: Any) -> Any:
        if event == "call" and Path(frame.f_code.co_filename).parent != Path(ops.__file__).parents[1]:
            return None
        if event == "line":
            self.left -= 1
            if self.left == -1:
                raise KeyboardInterrupt
        return self.trace

    def __enter__(self) -> None:
        self.before = sys.gettrace()
        sys.settrace(self.trace)

    def __exit__(self, *_: Any) -> None:
        sys.settrace(self.before)


@pytest.mark.parametrize("num_before", [0, 30])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("full", {}),
        ("full", {"sink_tokens": 3, "recent_tokens": 5}),
        ("full", {"sink_tokens": 3, "recent_tokens": 5, "max_cache_len": 64}),
        ("sliding", {"recent_tokens": 5}),
        ("sliding", {"max_cache_len": 64}),
    ],
    ids=["full", "exact", "exact_fixed", "sliding", "fixed"],
)
def test_an_interrupt_anywhere_in_a_step(name: str, options: dict[str, Any], num_before: int) -> None:
    """Afterwards all layers have the step, or none has. (Before every fifth line, which takes a fifth of the time.)"""
    model = MODELS[name]("sdpa")
    cache = QuantizedPagedCache.from_model(model, kv_cache_dtype="int8", page_size=4, **options)
    if num_before:
        add(cache, num_before)
    num_layers, num_new = len(cache.layers), 20
    steps = [keys_and_values(num_new, seed=10 + index) for index in range(num_layers)]

    def after(num_updates: int) -> QuantizedPagedCache:
        other = copy.deepcopy(cache)
        for index in range(num_updates):
            other.update(*steps[index], index)
        take_back_broken_step(other)
        return other

    # What is taken back comes from the pages where it was kept exactly.
    with_step, without = [contents(after(num_layers))], [contents(after(num)) for num in range(num_layers)]
    number, is_done = 0, False
    while not is_done:
        other = copy.deepcopy(cache)
        try:
            with Interrupt(number):
                for index, step in enumerate(steps):
                    other.update(*step, index)
            is_done = True
        except KeyboardInterrupt:
            number += 5
        take_back_broken_step(other)
        lengths = {int(layer.get_seq_length()) for layer in other.layers}
        assert lengths in ({num_before}, {num_before + num_new}), number
        expected = without if lengths == {num_before} else with_step
        for got, *ways in zip(contents(other), *expected, strict=True):
            assert any(_are_equal(got, way) for way in ways), number
    assert number > 100


def test_pages_that_a_window_has_left_are_gone_before_others_take_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A crop cannot bring back what an interrupted step has cleared."""
    cache = QuantizedPagedCache.from_model(sliding_model(2), kv_cache_dtype="model", page_size=4)
    for num_tokens in (5, 30):
        add(cache, num_tokens)
    cache.fork().crop(-20)  # until then it could
    clear = PagePool.clear

    def interrupted_after(pool: PagePool, pages: Any) -> None:
        clear(pool, pages)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PagePool, "clear", interrupted_after)
        with pytest.raises(KeyboardInterrupt):
            add(cache, 9)
    with pytest.raises(RuntimeError, match="keeps only the tokens from 32 on"):
        cache.crop(-20)
    assert all(layer.get_seq_length() == 35 for layer in cache.layers)


def _are_equal(one: Any, other: Any) -> bool:
    return one[0] is other[0] is None or all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize("copied", [copy.deepcopy, QuantizedPagedCache.fork], ids=["deepcopy", "fork"])
def test_a_layer_that_could_not_be_set_up_is_copied_as_an_empty_one(
    copied: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = full()
    options = {"kv_cache_dtype": "int8", "max_cache_len": 64}
    cache, whole = (QuantizedPagedCache.from_model(model, **options) for _ in range(2))
    with monkeypatch.context() as patch:
        patch.setattr(fixed, "StaticPageTable", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            logits(model, prompt(1), cache)
    expected = logits(model, prompt(1), whole)
    for each in (copied(cache), cache):
        assert torch.equal(logits(model, prompt(1), each), expected)


def test_a_model_that_was_cut_short_is_not_broken(tmp_path: Path) -> None:
    """Its cache has layers that nothing will ever come to."""
    model = full()
    model.model.layers = model.model.layers[:2]
    cache, whole = (QuantizedPagedCache.from_model(model, kv_cache_dtype="model") for _ in range(2))
    text = generate(model, prompt(1), cache, num_new=1)
    cache.save_pretrained(tmp_path)
    assert cache.get_seq_length() == text.shape[1] - 1
    got = generate(model, text, cache)
    assert torch.equal(got, generate(model, text, whole))
    assert not any("broke off" in note for note in cache.report().notes)


def test_a_last_layer_for_images_that_are_not_there_is_not_broken() -> None:
    text = families.build("mllama").config.text_config
    own = {name: value for name, value in text.to_dict().items() if name not in ("layer_types", "model_type")}
    model = families.build("mllama", {"text_config": {**own, "cross_attention_layers": [text.num_hidden_layers - 1]}})
    cache, whole = (QuantizedPagedCache.from_model(model, kv_cache_dtype="model") for _ in range(2))
    ids = prompt(1, 15)
    logits(model, ids[:, :12], cache)
    assert cache.layers[-1].is_empty
    assert torch.equal(generate(model, ids, cache), generate(model, ids, whole))
    assert not any("broke off" in note for note in cache.report().notes)


@pytest.mark.parametrize("name", ["bamba", "qwen3_next"])
def test_a_state_of_all_tokens_is_computed_anew(name: str) -> None:
    """It cannot be taken back by the one token that would do."""
    model = families.build(name)
    model.set_attn_implementation("kvquant")
    cache, whole = (QuantizedPagedCache.from_model(model, kv_cache_dtype="model") for _ in range(2))
    known = broken(model, cache, None, 5)
    assert torch.equal(generate(model, known, cache), generate(model, known, whole))


# -- memory --------------------------------------------------------------------------------------------------------


@contextmanager
def no_memory(monkeypatch: pytest.MonkeyPatch, allocation: int) -> Iterator[list[int]]:
    """The `allocation`-th tensor of pages cannot be had; yields how many were asked for."""
    empty, asked = huge_pages.empty, [0]

    def failing(*args: Any) -> torch.Tensor:
        asked[0] += 1
        if asked[0] == allocation:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return empty(*args)

    with monkeypatch.context() as patch:
        patch.setattr(huge_pages, "empty", failing)
        yield asked


@pytest.mark.parametrize("allocation", range(1, 2 * NUM_LAYERS + 1))
def test_giving_memory_back_needs_none(allocation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = full()
    ids, following = prompt(2, 160), prompt(2, 4, seed=3)

    def filled() -> QuantizedPagedCache:
        cache = QuantizedPagedCache.from_model(model, kv_cache_dtype="model")
        logits(model, ids, cache)
        return cache

    expected = filled()
    expected.crop(-64)
    cache = filled()
    fork = cache.fork()
    fork.crop(-96)
    del cache  # its pages are those that go
    with no_memory(monkeypatch, allocation) as asked:
        fork.crop(-1)
    assert asked[0] >= allocation
    expected.crop(-33)
    assert torch.equal(logits(model, following, fork), logits(model, following, expected))


@pytest.mark.parametrize("allocation", range(1, 2 * NUM_LAYERS + 1))
def test_a_pool_that_cannot_grow_is_as_before(allocation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others whose pages lie in it go on."""
    model = full()
    base, twin = (QuantizedPagedCache.from_model(model, kv_cache_dtype="model") for _ in range(2))
    for cache in (base, twin):
        logits(model, prompt(1, 50), cache)
    fork = base.fork()
    with no_memory(monkeypatch, allocation) as asked, pytest.raises(torch.OutOfMemoryError):
        logits(model, prompt(1, 200, seed=3), fork)
    assert asked[0] >= allocation
    del fork  # else the base takes a page of its own, and the pool grows again
    following = prompt(1, 4, seed=4)
    assert torch.equal(logits(model, following, base), logits(model, following, twin))
