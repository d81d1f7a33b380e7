"""Continuous batching over 8-bit pages: `generate_batch` and its managers, against `generate` request by request."""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import families
import pytest
import torch
from batches import (
    INT8,
    KINDS,
    NUM_NEW,
    OPTIONS,
    PROMPTS,
    ROUNDED,
    STATIC,
    UNQUANTIZED,
    WITHOUT_SDPA,
    all_alone,
    alone,
    batched,
    build,
    collect,
    known,
    lossless,
    poison,
    running,
    sampling,
    sizes,
    tokens_of,
    wait_for_tokens,
)
from helpers import prompt, tiny_llama
from transformers import DynamicCache
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from hf_kvquant import KVQuantConfig, LayerScales, QuantizedPagedCache, ops
from hf_kvquant.batching import hooks


@pytest.fixture(scope="module", autouse=True)
def _little_to_collect() -> Iterator[None]:
    """A manager that stops collects garbage several times; what was there before it need not be looked at."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class RoundingCache(DynamicCache):
    """transformers' own cache, which rounds what it keeps to fp8 with the scales of STATIC.

    Fresh prompts, and several tokens at once under a window, see themselves as they are.
    """

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        layer = self.layers[layer_idx]
        is_fresh = not layer.is_initialized or layer.get_seq_length() == 0
        found = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        layer.keys, layer.values = _rounded(layer.keys, layer.values)
        is_as_made = is_fresh or (key_states.shape[2] > 1 and getattr(layer, "sliding_window", None) is not None)
        return found if is_as_made else _rounded(*found)


def _rounded(key: torch.Tensor, value: torch.Tensor) -> list[torch.Tensor]:
    scales = (STATIC["scales"].k_scale, STATIC["scales"].v_scale)
    codes = [
        (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn) for x, scale in zip((key, value), scales, strict=True)
    ]
    return [code.float() * scale for code, scale in zip(codes, scales, strict=True)]


def follow(model: Any, parts: Sequence[list[int]], new: list[int], cache: Any) -> torch.Tensor:
    """Logprobs `[N, V]` before each of the tokens `new`, which come one by one after the parts of a text."""
    with torch.no_grad():
        rows = [
            model(torch.tensor([part]), past_key_values=cache, use_cache=True).logits[0, -1]
            for part in [*parts, *([token] for token in new[:-1])]
        ]
    return torch.stack(rows[-len(new) :]).log_softmax(-1)


def assert_follows(
    output: Any, model: Any, options: Any, parts: Sequence[list[int]] = (), cache: Any = None, greedy: bool = True
) -> None:
    """The tokens and logprobs of a result are those over a cache of one text, which comes in these parts.

    fp32 sums in another order differ by less than 1e-4. They also push a number that lies at the border of two codes
    to the other one: few of thousands, which does less than a tenth of what rounding all of them does.
    """
    new, parts = output.generated_tokens, parts or [output.prompt_ids]
    assert sum(parts, []) == output.prompt_ids
    cache = QuantizedPagedCache.from_model(model, **options) if cache is None else cache
    all_rows = [follow(model, parts, new, each) for each in (cache, DynamicCache(config=model.config))]
    rows, exact = (each.gather(1, torch.tensor(new)[:, None])[:, 0] for each in all_rows)
    effect = (rows - exact).abs().max().item()
    assert (effect > 1e-3) == (options is not UNQUANTIZED)
    bound = 1e-4 + effect / 10
    torch.testing.assert_close(torch.tensor(output.logprobs), rows, rtol=0, atol=bound)
    if greedy:
        assert (rows >= all_rows[0].amax(1) - bound).all()


def parts_of(text: list[int], length: int) -> list[list[int]]:
    return [text[index : index + length] for index in range(0, len(text), length)]


def but_last(text: list[int]) -> list[list[int]]:
    """Where several answers are asked for transformers has the last token of the prompt come behind."""
    return [text[:-1], text[-1:]]


# -- a twin that loses nothing ---------------------------------------------------------------------------------------

WAYS: dict[str, dict[str, Any]] = {
    "chunks": {"page_size": 4, "max_batch_tokens": 24, "num_blocks": 160},
    "at-once": {"page_size": 16, "max_batch_tokens": 1024},
    "one-page": {"page_size": 256, "max_batch_tokens": 64, "num_blocks": 16},
}


@known
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_equal_the_models_own(kind: str, way: dict[str, Any]) -> None:
    """Prompts that fill a page not quite, just and over, in chunks among requests that decode, and all at once."""
    assert batched(build(kind), UNQUANTIZED, **way) == lossless(kind)


@known
def test_one_request_and_one_token() -> None:
    model = build("llama")
    for max_new_tokens in (1, 2):
        for text, expected in zip(PROMPTS, lossless("llama"), strict=True):
            found = batched(model, UNQUANTIZED, [text], {"max_new_tokens": max_new_tokens})
            assert found == [expected[:max_new_tokens]]
    assert model.generate_batch([]) == {}


@known
def test_an_end_of_text_ends_one_request_only() -> None:
    expected = lossless("llama")
    end = expected[2][4]
    found = batched(build("llama"), UNQUANTIZED, generation={"eos_token_id": end})
    assert found == [each[: each.index(end) + 1] if end in each else each for each in expected]
    assert len(found[2]) <= 5


# -- 8 bits ----------------------------------------------------------------------------------------------------------


_STATIC_KINDS = ("llama", "gemma3", "sinks")
_OF_CHANNELS = LayerScales(
    0.1 + torch.rand(2, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([0.1, 0.2])
)
_SHIFTED = LayerScales(torch.tensor([0.06, 0.05]), torch.tensor([0.06]), k_zero=torch.tensor([0.5, -0.25]))
_UNUSUAL: list[dict[str, Any]] = [
    ROUNDED,
    {"kv_cache_dtype": ("int8", "fp8_e5m2"), "scales": "dynamic", "equalize": False},
    {"kv_cache_dtype": "int8", "scales": {1: _OF_CHANNELS}, "equalize": False},  # layer 0 is dynamic
    {"kv_cache_dtype": "int8", "scales": _SHIFTED},
    {"kv_cache_dtype": "fp8_e5m2", "scales": "unit"},
]


@known
@pytest.mark.parametrize(
    ("kind", "options"),
    [(kind, INT8) for kind in KINDS] + [(kind, STATIC) for kind in _STATIC_KINDS] + [("llama", x) for x in _UNUSUAL],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, KVQuantConfig(**value).formats)),
)
def test_tokens_equal_those_of_generate(kind: str, options: dict[str, Any]) -> None:
    """A prompt attends to itself as the model made it, and all later tokens to the pages: in both the same bytes."""
    model = build(kind)
    config = sizes(page_size=4, num_blocks=160, return_logprobs=True)
    outputs = model.generate_batch(PROMPTS, sampling(options), continuous_batching_config=config).values()
    assert tokens_of(list(outputs)) == all_alone(model, options)
    for output in outputs:
        assert_follows(output, model, options)


@known
@pytest.mark.parametrize("name", ["kvquant_int8", "kvquant_fp8", "kvquant_fp8_e5m2"])
def test_formats_by_the_name_of_attention(name: str) -> None:
    model = build("llama", name)
    assert batched(model, {"equalize": False}) == all_alone(model, {"equalize": False})


@known
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("options", [{}, {"scales": "first_batch", "kv_cache_dtype": "fp8"}], ids=["auto", "first"])
def test_the_first_prompt_says_which_numbers_are_large(options: dict[str, Any], kind: str) -> None:
    """Scales that come from the first tokens are those of `generate` where there is one request."""
    model, config = build(kind), sizes(return_logprobs=True)
    for text in PROMPTS[1:4]:
        (output,) = model.generate_batch([text], sampling(options), continuous_batching_config=config).values()
        assert output.generated_tokens == alone(model, text, options)
        assert_follows(output, model, options)
    several = batched(model, options)
    assert [new[0] for new in several] == [new[0] for new in lossless(kind)]  # which saw no pages


@known
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_models(dtype: torch.dtype) -> None:
    """In one layer, whose keys and values are the same by both routes; what differs is the model's own rounding."""
    model = build("llama", num_hidden_layers=1).to(dtype)
    outputs = model.generate_batch(
        PROMPTS, sampling(STATIC), continuous_batching_config=sizes(return_logprobs=True)
    ).values()
    for output in outputs:
        cache = QuantizedPagedCache.from_model(model, **STATIC)
        rows = follow(model, [output.prompt_ids], output.generated_tokens, cache).float()
        found = rows.gather(1, torch.tensor(output.generated_tokens)[:, None])[:, 0]
        bound = 32 * torch.finfo(dtype).eps * rows.abs().amax().item()
        torch.testing.assert_close(torch.tensor(output.logprobs), found, rtol=0, atol=bound)


@known
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_chunks_equal_those_of_generate(options: dict[str, Any]) -> None:
    """A chunk reads what lies before it, and itself, from the pages."""
    model = build("llama")
    config = sizes(max_batch_tokens=16, return_logprobs=True)
    for text in PROMPTS[1:]:
        (output,) = model.generate_batch([text], sampling(options), continuous_batching_config=config).values()
        assert output.generated_tokens == alone(model, text, options, prefill_chunk_size=16)
        assert_follows(output, model, options, parts_of(text, 16))


@known
@pytest.mark.parametrize("page_size", [4, 16])
@pytest.mark.parametrize("kind", ["llama", "window17", "window400", "gemma3", "softcap", "sinks"])
def test_chunks_equal_those_of_rounded_keys_and_values(kind: str, page_size: int) -> None:
    """In the model's own attention; under a window a chunk sees itself as the model made it."""
    model, reference = build(kind), build(kind, "eager" if kind in WITHOUT_SDPA else "sdpa")
    config = sizes(max_batch_tokens=21, page_size=page_size, return_logprobs=True)
    for text in PROMPTS[1:]:
        (output,) = model.generate_batch([text], sampling(STATIC), continuous_batching_config=config).values()
        cache = RoundingCache(config=reference.config)
        assert_follows(output, reference, STATIC, parts_of(text, 21), cache)


@known
@pytest.mark.parametrize("options", [*OPTIONS.values(), None], ids=[*OPTIONS, "auto"])
def test_pages_hold_what_the_model_made(options: dict[str, Any] | None) -> None:
    """Each number to half a step of its scale, of requests that come in chunks among others that decode."""
    model, reference = build("llama", num_hidden_layers=1), build("llama", "sdpa", num_hidden_layers=1)
    with running(model, options, max_new_tokens=300, page_size=4, max_batch_tokens=24) as manager:
        manager.add_request(PROMPTS[3], "one", streaming=True)
        wait_for_tokens(manager, "one", 3)
        manager.add_request(PROMPTS[2], "other", streaming=True)
        wait_for_tokens(manager, "other", 3)
        with manager.pause():
            processor = manager.batch_processor
            layer = processor.cache._layers[0]
            blocks = processor.cache.cache_allocators["full_attention"].block_table
            for name in ("one", "other"):
                state = processor.scheduler.active_requests[name]
                length = state.current_len()
                with torch.no_grad():
                    ids = torch.tensor([(state.initial_tokens + state.generated_tokens)[:length]])
                    made = reference(ids, use_cache=True).past_key_values.layers[0]
                assert length >= len(state.initial_tokens) + 2
                pages = torch.tensor(blocks[name]) * layer.group.stride
                for store, x in ((layer.k, made.keys), (layer.v, made.values)):
                    error = (store.read(pages[None])[:, :, :length] - x).abs()
                    step = store.paged.scale if store.paged.scale is not None else torch.ones(1, 1)
                    if store.paged.token_scale is not None:
                        scales = store.paged.token_scale[pages].float().transpose(0, 1).flatten(1)[:, :length]
                        half = 0.5 * step[:, None] * scales[..., None]
                    else:  # fp8: 3 bits of mantissa, and the smallest numbers have a fixed step of 2 ** -9
                        half = torch.maximum(x.abs() * 2.0**-4, 2.0**-10 * step[:, None])
                    # The same sums in another order; values here are below 100.
                    assert (error <= half * 1.001 + 1e-4).all()
                    assert error.max() > 1e-3
        for name in ("one", "other"):
            manager.cancel_request(name)


# -- what transformers does with requests ----------------------------------------------------------------------------


def note_matches(found: list[int]) -> Callable[[Any], None]:
    """Have `found` get the number of tokens that each request shares with earlier ones."""

    def wrap(cache: Any) -> None:
        search = cache.search_prefix_match

        def noting(request_id: str, prompt_ids: list[int]) -> int:
            found.append(search(request_id, prompt_ids))
            return found[-1]

        cache.search_prefix_match = noting

    return wrap


@known
@pytest.mark.parametrize("options", [UNQUANTIZED, INT8, STATIC], ids=["model", "int8", "fp8"])
def test_a_beginning_that_was_seen_before(options: dict[str, Any]) -> None:
    """What a request shares with an earlier one it finds in the pages, and goes on from there."""
    model, begin = build("llama"), PROMPTS[3][:32]
    texts = [begin + PROMPTS[1], begin + PROMPTS[2], begin[:30], begin + PROMPTS[1][:1]]
    shared = [0, 32, 16, 32]
    matches: list[int] = []
    with running(model, options, note_matches(matches), return_logprobs=True) as manager:
        for text, num_shared in zip(texts, shared, strict=True):
            manager.add_request(text)
            (output,) = collect(manager, 1).values()
            parts = [text[:num_shared], text[num_shared:]]
            assert_follows(output, model, options, [part for part in parts if part])
    assert matches == shared


@known
def test_the_same_prompt_again() -> None:
    """Where its pages are full the last one is computed anew, as one token at least must be."""
    model, text = build("llama"), PROMPTS[3][:32]
    matches: list[int] = []
    with running(model, UNQUANTIZED, note_matches(matches)) as manager:
        for _ in range(3):
            manager.add_request(text)
            assert tokens_of(list(collect(manager, 1).values())) == [alone(model, text)]
    assert matches == [0, 16, 16]


@known
def test_a_manager_that_is_kept_keeps_pages() -> None:
    model, begin = build("llama"), PROMPTS[3][:48]
    matches: list[int] = []
    for ending in (PROMPTS[1], PROMPTS[2]):
        out = model.generate_batch(
            [begin + ending], sampling(UNQUANTIZED), continuous_batching_config=sizes(), persistent_manager=True
        )
        assert tokens_of(list(out.values())) == [alone(model, begin + ending, UNQUANTIZED)]
        kept = model.init_continuous_batching()
        if not matches:
            note_matches(matches)(kept.batch_processor.cache)
            matches.append(0)
    assert matches == [0, 48]
    model.destroy_cached_continuous_batching_manager()


@known
@pytest.mark.parametrize("kind", ["llama", "window17", "gemma3"])
@pytest.mark.parametrize("options", [UNQUANTIZED, INT8, STATIC], ids=["model", "int8", "fp8"])
def test_several_greedy_answers_are_one(options: dict[str, Any], kind: str) -> None:
    """They share full pages of the prompt, and each has a copy of the last one; its last token comes behind."""
    model = build(kind)
    config = sizes(num_blocks=160, page_size=4, return_logprobs=True)
    outputs = model.generate_batch(PROMPTS[1:4], sampling(options, 3), continuous_batching_config=config)
    assert len(outputs) == 9
    for output in outputs.values():
        assert len(output.generated_tokens) == NUM_NEW
        assert_follows(output, model, options, but_last(output.prompt_ids))


@known
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_several_answers_that_share_no_blocks(kind: str) -> None:
    model = build(kind)
    config = sizes(num_blocks=200, page_size=4, return_logprobs=True, allow_block_sharing=False)
    outputs = model.generate_batch(PROMPTS[1:4], sampling(INT8, 3), continuous_batching_config=config)
    assert len(outputs) == 9
    for output in outputs.values():
        assert_follows(output, model, INT8, but_last(output.prompt_ids))


@known
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_several_answers_where_one_token_is_left(kind: str) -> None:
    """A prompt of one token, and one of which all others were seen before, have no tokens in a step of others."""
    model, begin = build(kind), PROMPTS[3][:32]
    texts = [begin + PROMPTS[1], PROMPTS[0], PROMPTS[2], begin + [5], PROMPTS[1]]
    expected = all_alone(model, UNQUANTIZED, texts)
    with running(model, UNQUANTIZED, num_answers=2) as manager:
        for some in (slice(0, 1), slice(1, 3), slice(3, 5)):
            with manager.pause():  # so that they come together
                names = manager.add_requests(texts[some])
            results = collect(manager, 2 * len(names))
            for name, new in zip(names, expected[some], strict=True):
                assert tokens_of([results[name], results[f"{name}__child#0"]]) == [new] * 2


@known
@pytest.mark.parametrize("options", [UNQUANTIZED, INT8, STATIC], ids=["model", "int8", "fp8"])
def test_several_answers_go_their_own_ways(options: dict[str, Any]) -> None:
    model = build("llama")
    config = sizes(return_logprobs=True, seed=3, page_size=8)
    generation = sampling(options, 4, do_sample=True, top_k=0)
    outputs = model.generate_batch(PROMPTS[1:3], generation, continuous_batching_config=config).values()
    assert len({tuple(tokens) for tokens in tokens_of(list(outputs))}) == 8
    for output in outputs:
        assert len(output.generated_tokens) == NUM_NEW
        assert_follows(output, model, options, but_last(output.prompt_ids), greedy=False)


@known
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_requests_that_begin_again_where_blocks_run_out(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.generation.continuous_batching.requests import RequestState

    begun_again: list[str] = []
    begin = RequestState.create_equivalent_initial_request

    def noting(state: Any) -> Any:
        begun_again.append(state.request_id)
        return begin(state)

    monkeypatch.setattr(RequestState, "create_equivalent_initial_request", noting)
    texts = [prompt(1, 9 + index, seed=index)[0].tolist() for index in range(8)]
    model, generation = build(kind), {"max_new_tokens": 30}
    found = batched(model, UNQUANTIZED, texts, generation, page_size=4, num_blocks=40)
    assert begun_again
    assert found == all_alone(build(kind, "sdpa"), None, texts, max_new_tokens=30)
    begun_again.clear()
    lengths = [len(each) for each in batched(model, INT8, texts, generation, page_size=4, num_blocks=40)]
    assert begun_again
    assert lengths == [30] * 8


@known
def test_requests_come_and_go_while_others_run() -> None:
    """One is cancelled, others are added; what was given to them is free afterwards."""
    expected = lossless("llama")
    with running(build("llama"), UNQUANTIZED, page_size=4, num_blocks=300, max_batch_tokens=32) as manager:
        long = prompt(1, 9, seed=9)[0].tolist()
        manager.add_request(long, "unwanted", max_new_tokens=400, streaming=True)
        wait_for_tokens(manager, "unwanted", 4)
        names = [manager.add_request(text) for text in PROMPTS[:3]]
        manager.cancel_request("unwanted")
        names += [manager.add_request(text) for text in PROMPTS[3:]]
        results = collect(manager, len(PROMPTS))
        cache = manager.batch_processor.cache
        assert tokens_of([results[name] for name in names]) == expected
        with manager.pause():
            assert cache.report().nbytes == 0


@known
def test_streaming() -> None:
    """Every token comes by itself, and the texts grow as they do alone."""
    with running(build("llama"), UNQUANTIZED) as manager:
        manager.add_request(PROMPTS[2], "streaming", streaming=True)
        lengths = []
        for output in manager.request_id_iter("streaming"):
            lengths.append(len(output.generated_tokens))
            assert output.generated_tokens == lossless("llama")[2][: lengths[-1]]
    assert lengths == list(range(1, NUM_NEW + 1))


@known
def test_context_manager() -> None:
    model = build("llama")
    with model.continuous_batching_context_manager(
        sampling(UNQUANTIZED), continuous_batching_config=sizes()
    ) as manager:
        names = manager.add_requests(PROMPTS)
        results = collect(manager, len(PROMPTS))
    assert tokens_of([results[name] for name in names]) == lossless("llama")


@known
def test_prompts_before_tokens() -> None:
    """transformers' other order of requests."""
    found = batched(build("gemma3"), UNQUANTIZED, scheduler_type="prefill_first", max_batch_tokens=40, page_size=8)
    assert found == lossless("gemma3")


@known
@pytest.mark.parametrize("first", [True, False])
def test_inference_mode(first: bool) -> None:
    """A manager may also be made before it; transformers' own tensors forbid the other way round."""
    model, texts = build("llama"), PROMPTS[1:]
    for mode in (first, True):
        with torch.inference_mode(mode):
            outputs = model.generate_batch(
                texts, sampling(UNQUANTIZED, 2), continuous_batching_config=sizes(), persistent_manager=True
            )
        assert tokens_of(list(outputs.values())) == [new for new in lossless("llama")[1:] for _ in range(2)]
    model.destroy_cached_continuous_batching_manager()


@known
def test_two_managers_at_once() -> None:
    with (
        running(build("llama"), UNQUANTIZED, page_size=4, max_batch_tokens=24, num_blocks=160) as one,
        running(build("gemma3"), UNQUANTIZED) as other,
    ):
        names = [manager.add_requests(PROMPTS) for manager in (one, other)]
        found = [collect(manager, len(PROMPTS)) for manager in (one, other)]
    for kind, ids, results in zip(("llama", "gemma3"), names, found, strict=True):
        assert tokens_of([results[name] for name in ids]) == lossless(kind)


@known
def test_options_of_the_models_own_generation_config() -> None:
    model = build("llama")
    model.generation_config = sampling(KVQuantConfig(**INT8), cache_implementation="kvquant")
    outputs = model.generate_batch(PROMPTS[:3], continuous_batching_config=sizes())
    assert tokens_of(list(outputs.values())) == all_alone(build("llama"), INT8, PROMPTS[:3])


# -- bytes -----------------------------------------------------------------------------------------------------------


def cache_of(model: Any, options: Any = None, **batching: Any) -> Any:
    """The cache of a manager that is never started."""
    manager = model.init_continuous_batching(sampling(options), sizes(auto_switch_to_flash=False, **batching))
    manager.warmup()
    return manager.batch_processor.cache


@known
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_half_the_bytes_of_transformers_own(kind: str, head_dim: int) -> None:
    """Of bf16 models: codes of a byte, and with dynamic scales two bytes more for every token and head."""
    own = cache_of(build(kind, "sdpa", head_dim=head_dim).bfloat16())
    model = build(kind, head_dim=head_dim).bfloat16()
    static, dynamic = cache_of(model, STATIC), cache_of(model, INT8)
    num_layers = model.config.num_hidden_layers
    assert static.num_blocks == dynamic.num_blocks == own.num_blocks
    assert 2 * static.cache_tensor.nbytes == 2 * dynamic.cache_tensor.nbytes == own.cache_tensor.nbytes
    assert static.nbytes_allocated - static.cache_tensor.nbytes == num_layers * 2 * 4  # an fp32 number a side
    assert (dynamic.nbytes_allocated - dynamic.cache_tensor.nbytes) * head_dim == 2 * dynamic.cache_tensor.nbytes
    assert dynamic.nbytes_allocated <= (1 + 2 / head_dim) / 2 * own.cache_tensor.nbytes


@known
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_blocks_that_fill_the_memory(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody says how many there are: as many as fit, more than twice those of transformers' own cache.

    Twice, less the scales of tokens, is what bytes say; transformers' own attention takes copies and masks beside.
    """
    from transformers.generation.continuous_batching import cache as host

    available = 2**25
    monkeypatch.setattr(host, "get_device_and_memory_breakdown", lambda: (torch.device("cpu"), available, 0, 0))
    options = {"num_blocks": None, "max_batch_tokens": 64, "max_memory_percent": 1.0, "max_requests_per_batch": 8}
    model = build(kind, head_dim=128).bfloat16()
    own = cache_of(build(kind, "sdpa", head_dim=128).bfloat16(), **options)
    for cache in (cache_of(model, INT8, **options), cache_of(model, STATIC, **options)):
        assert 0.9 * available < cache.nbytes_allocated <= available
        assert cache.num_blocks > 2 * own.num_blocks


@known
@pytest.mark.parametrize("options", [UNQUANTIZED, INT8, ROUNDED], ids=["model", "int8", "fp8"])
def test_report(options: dict[str, Any]) -> None:
    """Formats and where scales come from as of a cache of one text; bytes of the blocks that requests have."""
    model = build("gemma3")
    expected = QuantizedPagedCache.from_model(model, **options).report()
    with running(model, options, max_new_tokens=300) as manager:
        manager.add_request(PROMPTS[3], "one", streaming=True)
        wait_for_tokens(manager, "one", 1)
        with manager.pause():
            report = manager.batch_processor.cache.report()
            length = manager.batch_processor.scheduler.active_requests["one"].current_len()
        manager.cancel_request("one")
    for field in ("layer", "layer_type", "kv_cache_dtype", "scales", "dense", "q_dtype", "q_scale"):
        assert [getattr(row, field) for row in report.layers] == [getattr(row, field) for row in expected.layers]
    num_pages = {"sliding_attention": -(-23 // 16) + 1, "full_attention": -(-length // 16)}
    num_tokens = [16 * num_pages[row.layer_type] for row in report.layers]
    model_bytes = [count * 2 * 2 * 16 * 4 for count in num_tokens]  # two sides, two heads, 16 numbers of fp32
    assert [row.model_dtype_bytes for row in report.layers] == model_bytes
    per_head = {"model": 64, "int8": 18, "fp8_e4m3": 16}[report.layers[0].kv_cache_dtype[0]]
    scale_bytes = 2 * 4 if options is ROUNDED else 0
    assert [row.stored_bytes for row in report.layers] == [
        count * 2 * 2 * per_head + scale_bytes for count in num_tokens
    ]
    assert report.nbytes == sum(row.stored_bytes for row in report.layers)
    assert report.nbytes_allocated == cache_of(model, options).nbytes_allocated
    assert report.layers[0].kv_cache_dtype[0] in str(report)


@known
def test_numbers_that_do_not_fit_are_counted() -> None:
    options = {"kv_cache_dtype": "fp8", "scales": LayerScales(torch.tensor([0.001]), torch.tensor([0.001]))}
    model = build("llama")
    expected = [0, 0]
    for text in PROMPTS:
        ids = torch.tensor([text])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, cache_config=options,
            return_dict_in_generate=True,
        )  # fmt: skip
        for row in out.past_key_values.report().layers:
            expected = [total + count for total, count in zip(expected, row.clipped, strict=True)]
    with running(model, options, max_new_tokens=4) as manager:
        manager.add_requests(PROMPTS)
        collect(manager, len(PROMPTS))
        with manager.pause():
            rows = manager.batch_processor.cache.report().layers
    assert [sum(row.clipped[side] for row in rows) for side in range(2)] == expected
    assert min(expected) > 0


# -- what is refused -------------------------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"sink_tokens": 4}, r"cache_config\['sink_tokens'\]=4 is not for continuous batching"),
    ({"recent_tokens": 8}, r"cache_config\['recent_tokens'\]=8 is not for continuous batching"),
    ({"offload": True}, r"cache_config\['offload'\]=True is not for continuous batching"),
    ({"num_pages": 9}, r"cache_config\['num_pages'\]=9 is not for continuous batching"),
    ({"max_cache_len": 99}, r"cache_config\['max_cache_len'\]=99 is not for continuous batching"),
    ({"page_size": 32}, r"cache_config\['page_size'\] is ContinuousBatchingConfig\(page_size=...\)"),
    ({"skip_layers": [0]}, "pages of one size.*skip_layers"),
    ({"kv_cache_dtype": ("int8", "model")}, "pages of one size"),
    ({"kv_cache_type": "fp8"}, "unknown cache_config key.*kv_cache_type"),
    ({"kv_cache_dtype": "int4"}, "int4"),
    ({"scales": LayerScales(torch.ones(3), torch.ones(3))}, r"k_scale.*\[3\]"),
]


@known
@pytest.mark.parametrize(("options", "message"), REFUSED, ids=lambda value: str(value)[:30])
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    """They are refused where the user calls, and the next call is as good as the first."""
    model = build("llama")
    with pytest.raises(ValueError, match=message):
        batched(model, options)
    with pytest.raises(ValueError, match=message):
        model.init_continuous_batching(sampling(options), sizes())
    assert batched(model, UNQUANTIZED, PROMPTS[:2]) == lossless("llama")[:2]
    with pytest.raises(TypeError, match="cache_config must be a dict or a KVQuantConfig"):
        batched(model, "fp8")


@known
@pytest.mark.parametrize(
    ("model_type", "message"),
    [("qwen3_next", "linear_attention"), ("lfm2", "conv")],
)
def test_models_with_other_layers(model_type: str, message: str) -> None:
    model = families.build(model_type, attn_implementation="kvquant")
    with pytest.raises(ValueError, match=message):
        model.init_continuous_batching(sampling(), sizes())


@known
def test_layers_that_share_keys_and_values() -> None:
    """The last layers attend to what an earlier one has stored."""
    model = families.build("gemma3n_text", attn_implementation="kvquant")
    found = batched(model, UNQUANTIZED, PROMPTS[:3])
    model.set_attn_implementation("sdpa")
    assert found == all_alone(model, prompts=PROMPTS[:3])


@known
def test_models_that_compute_attention_themselves() -> None:
    model = families.build("bloom", attn_implementation="kvquant")
    with pytest.raises(ValueError, match="computes attention itself.*use `generate` for this model"):
        model.init_continuous_batching(sampling(), sizes())


@known
@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("doge", "layer 0: the model reads .transpose of keys or values.*use `generate` for this model"),
        ("diffllama", "layer 0: the model calls chunk of keys or values.*use `generate` for this model"),
        ("deepseek_v3", "layer 0: keys and values are .* but this cache has made room for"),
    ],
)
def test_models_that_go_their_own_way(model_type: str, message: str) -> None:
    """That shows in the first step, and is the error of every request."""
    model = families.build(model_type, attn_implementation="kvquant")
    outputs = model.generate_batch(PROMPTS[:2], sampling(), continuous_batching_config=sizes())
    assert len(outputs) == 2
    for output in outputs.values():
        with pytest.raises(ValueError, match=message):
            raise ValueError(output.error)


@known
def test_attention_that_is_switched_under_a_manager_that_is_kept() -> None:
    model = build("llama")
    first = model.generate_batch(
        PROMPTS[:2], sampling(INT8), continuous_batching_config=sizes(), persistent_manager=True
    )
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=r"for another attention.*destroy_cached_continuous_batching_manager\(\)"):
        batched(model, None, PROMPTS[:2])
    model.destroy_cached_continuous_batching_manager()
    assert batched(model, None, PROMPTS[:2]) == lossless("llama")[:2]
    model.set_attn_implementation("kvquant")
    assert batched(model, INT8, PROMPTS[:2]) == tokens_of(list(first.values()))


@known
def test_options_that_a_manager_that_is_kept_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those are told; the same ones again, in other objects, are not, and neither are none."""
    warned: list[str] = []
    monkeypatch.setattr(hooks.logger, "warning_once", warned.append)
    model = build("llama")

    def call(options: Any) -> list[list[int]]:
        config = sizes(num_blocks=16)
        outputs = model.generate_batch(
            PROMPTS[:2], sampling(options), continuous_batching_config=config, persistent_manager=True
        )
        return tokens_of(list(outputs.values()))

    first = call(copy.deepcopy(STATIC))
    assert [call(copy.deepcopy(STATIC)), call(None)] == [first, first]
    assert warned == []
    assert call({**STATIC, "kv_cache_dtype": "fp8_e5m2"}) == first
    assert len(warned) == 1
    assert "was made without kv_cache_dtype='fp8_e5m2'; let go of it with model.destroy_cached" in warned[0]
    model.destroy_cached_continuous_batching_manager()


@known
@pytest.mark.parametrize("name", ["attention_mask", "position_bias", "is_causal"])
def test_masks_and_biases_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AttentionInterface

    from hf_kvquant.attention import kvquant_attention

    def changed(*args: Any, **kwargs: Any) -> Any:
        kwargs[name] = False if name == "is_causal" else torch.zeros(1, 1, 1, 1)
        args = args[:4] + (None,)
        if name == "attention_mask":
            args = (*args[:4], kwargs.pop(name))
        return kvquant_attention(*args, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "kvquant", changed)
    outputs = build("llama").generate_batch(PROMPTS[:1], sampling(), continuous_batching_config=sizes())
    (output,) = outputs.values()
    assert "takes causal attention without masks and position biases" in output.error


# -- others are left alone -------------------------------------------------------------------------------------------


@known
def test_other_attention_keeps_transformers_own_cache() -> None:
    from transformers.generation.continuous_batching.cache import PagedAttentionCache

    from hf_kvquant.batching.cache import QuantizedBatchCache

    assert isinstance(cache_of(build("llama")), QuantizedBatchCache)
    model = build("llama", "sdpa")
    assert type(cache_of(model)) is PagedAttentionCache
    assert batched(model) == lossless("llama")


@known
@pytest.mark.parametrize("implementation", ["static", "dynamic"])
def test_another_cache_that_is_asked_for(implementation: str) -> None:
    """It is for `generate`: transformers' own requests take no notice of it either."""
    generation = {"cache_implementation": implementation}
    assert batched(build("llama"), UNQUANTIZED, generation=generation) == lossless("llama")


@known
def test_attention_is_not_switched_to_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.generation.continuous_batching import continuous_api

    monkeypatch.setattr(continuous_api, "is_flash_attn_3_available", lambda **options: False)
    monkeypatch.setattr(continuous_api, "is_flash_attn_2_available", lambda **options: True)
    switched: list[str] = []
    for attention in ("sdpa", "kvquant", "kvquant_fp8"):
        model = build("llama", attention)
        monkeypatch.setattr(model, "set_attn_implementation", switched.append)
        model.init_continuous_batching(sampling(), sizes(auto_switch_to_flash=True))
        assert model.config._attn_implementation == attention
    assert switched == ["flash_attention_2"]  # of the first


@known
def test_no_more_than_kernels_can_count(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_kvquant.batching import cache as batching

    with pytest.raises(ValueError, match="max_batch_tokens=65536; at most 65535"):
        batched(build("llama"), max_batch_tokens=65536)
    warned: list[str] = []
    monkeypatch.setattr(batching.logger, "warning_once", warned.append)
    # Two layers, K and V, two heads: a token of all of them is eight; a sector is a block of 16.
    monkeypatch.setattr(batching, "_MOST_SLOTS", 8 * 16 * 43)
    with running(build("llama"), UNQUANTIZED) as manager:
        assert manager.batch_processor.cache.num_blocks == 40
    assert len(warned) == 1
    assert "62% of the blocks" in warned[0]


@known
def test_the_users_configurations_are_unchanged() -> None:
    model = build("llama")
    asked = {"cpu_offload_space": 0.001, "use_async_batching": True, "use_cuda_graph": False}
    config, options = sizes(**asked), copy.deepcopy(INT8)
    generation = sampling(options)
    before = copy.deepcopy((vars(config), generation.to_dict()))
    manager = model.init_continuous_batching(generation, config)
    assert (vars(config), generation.to_dict()) == before
    assert options == INT8
    assert manager.continuous_batching_config is not config
    assert not hasattr(config, "_hf_kvquant")
    outputs = model.generate_batch(PROMPTS, generation, continuous_batching_config=config)
    assert tokens_of(list(outputs.values())) == all_alone(model, INT8)
    assert (vars(config), generation.to_dict()) == before
    # And another model can go on with it.
    outputs = build("llama", "sdpa").generate_batch(PROMPTS, sampling(), continuous_batching_config=sizes())
    assert tokens_of(list(outputs.values())) == lossless("llama")


# -- nothing unwritten is read ---------------------------------------------------------------------------------------


@known
@pytest.mark.parametrize("kind", ["llama", "window17", "gemma3", "sinks"])
@pytest.mark.parametrize("options", [UNQUANTIZED, INT8, STATIC], ids=["model", "int8", "fp8"])
def test_what_lay_in_the_memory_before(options: dict[str, Any], kind: str) -> None:
    """Prompts at once and in chunks, among requests that decode; pages are copied for a second answer."""
    model = build(kind)
    found = []
    for before in (lambda cache: None, poison):
        with running(model, options, before, 2, page_size=4, max_batch_tokens=64, num_blocks=300) as manager:
            manager.add_requests(PROMPTS[1:])
            results = collect(manager, 2 * len(PROMPTS[1:]))
        found.append(tokens_of([results[name] for name in sorted(results)]))
    assert found[0] == found[1]
    assert all(len(set(new)) > 2 for new in found[1])


@known
@pytest.mark.parametrize("kind", ["llama", "window17", "gemma3"])
def test_no_place_is_written_twice_in_a_step(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of two tokens would stay is not said on every device; of more than a window has only the newest count."""
    write, twice = ops.write_kv, []

    def noting(key: Any, value: Any, k: Any, v: Any, pages: torch.Tensor, lengths: torch.Tensor, *others: Any) -> None:
        places = pages[:, 0] * 16 + (lengths - 1) % 16
        twice.append(len(places) - len(places.unique()))
        write(key, value, k, v, pages, lengths, *others)

    monkeypatch.setattr(ops, "write_kv", noting)
    assert batched(build(kind), UNQUANTIZED) == lossless(kind)
    assert len(twice) >= NUM_NEW
    assert not any(twice)


# -- versions of transformers without it -----------------------------------------------------------------------------


@pytest.mark.skipif(hooks.is_known(), reason="transformers has continuous batching of the known form")
def test_where_the_form_is_not_known(caplog: pytest.LogCaptureFixture) -> None:
    """transformers refuses the attention, and it is said what 8-bit pages take."""
    model = tiny_llama("kvquant")
    with (
        caplog.at_level(logging.WARNING, logger="transformers"),
        pytest.raises(ValueError, match="kvquant.*is not supported"),
    ):
        model.init_continuous_batching(sampling(), ContinuousBatchingConfig())
    assert "transformers >= 5.24" in caplog.text
