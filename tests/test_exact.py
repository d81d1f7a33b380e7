"""Tokens that are kept in the model's dtype beside the pages: `sink_tokens` and `recent_tokens`.

What attention must give is computed token by token: for every query from the keys and values that it has to see as the
model made them, and from those that pages hold for all others.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import llama_config, prompt, tiny_llama
from test_cache import sliding_model

from hf_kvquant import KVQuantConfig, QuantizedPagedCache, ops, parts
from hf_kvquant.exact import SLACK
from hf_kvquant.ops import PagedTensor

HEADS, GROUPS, HEAD_DIM, PAGE = 2, 2, 16, 4


def make_cache(window: int | None = None, num_layers: int = 1, **options: Any) -> QuantizedPagedCache:
    config = llama_config(num_hidden_layers=num_layers)
    if window is not None:
        config.layer_types = ["sliding_attention"] * num_layers
        config.sliding_window = window
    config._attn_implementation = "kvquant"
    options = {"kv_cache_dtype": "fp8", "scales": "unit", "page_size": PAGE, **options}
    return QuantizedPagedCache(config, KVQuantConfig(**options))


@dataclasses.dataclass
class Model:
    """All tokens of a layer twice: as they came, and as pages give them back.

    Attributes:
        key, value: `[2, B, H, L, D]`.
        lost: the first token that is still held as it came, but for the first ones.
    """

    num_first: int
    num_recent: int
    num_held: int
    key: torch.Tensor
    value: torch.Tensor
    lost: int = 0

    @classmethod
    def of(cls, batch_size: int, num_first: int, num_recent: int, num_held: int) -> Model:
        return cls(num_first, num_recent, num_held, *torch.zeros(2, 2, batch_size, HEADS, 0, HEAD_DIM))

    @property
    def length(self) -> int:
        return self.key.shape[3]

    def add(self, key: torch.Tensor, value: torch.Tensor) -> None:
        def both(x: torch.Tensor) -> torch.Tensor:
            return torch.stack([x, x.to(torch.float8_e4m3fn).to(x.dtype)])

        self.key, self.value = torch.cat([self.key, both(key)], dim=3), torch.cat([self.value, both(value)], dim=3)

    def forget_old(self) -> None:
        self.lost = max(self.lost, self.length - self.num_held)

    def crop(self, num_tokens: int) -> None:
        self.key, self.value = self.key[:, :, :, :-num_tokens], self.value[:, :, :, :-num_tokens]
        self.lost = min(self.lost, self.length)

    def select(self, indices: list[int]) -> None:
        self.key, self.value = self.key[:, indices], self.value[:, indices]

    def is_exact(self, query: int) -> torch.Tensor:
        """Which tokens a query at this place sees as they came, `[L]`."""
        positions = torch.arange(self.length)
        recent = (positions > query - self.num_recent) & (positions >= self.lost)
        return recent | (positions < self.num_first)

    def attend(
        self,
        query: torch.Tensor,
        window: int | None,
        mask: torch.Tensor | None,
        sinks: torch.Tensor | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """`[B, Hq, T, D]` in float64; `mask` is about all tokens."""
        num_queries, outputs = query.shape[2], []
        for row in range(num_queries):
            position = self.length - num_queries + row
            exact = self.is_exact(position)[:, None]
            key, value = (
                torch.where(exact, x[0], x[1]).repeat_interleave(GROUPS, dim=1).double() for x in (self.key, self.value)
            )
            logits = torch.einsum("bhd,bhld->bhl", query[:, :, row].double(), key) * HEAD_DIM**-0.5
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            age = position - torch.arange(self.length)
            seen = age >= 0
            if window is not None:
                seen = seen & (age < window)
            if mask is not None:
                seen = seen & mask[:, :, row] if mask.dtype == torch.bool else seen
                logits = logits if mask.dtype == torch.bool else logits + mask[:, :, row]
            logits = logits.masked_fill(~seen, -math.inf)
            if sinks is not None:
                logits = torch.cat([logits, sinks.double()[None, :, None].expand(len(logits), -1, 1)], dim=2)
            weights = torch.softmax(logits, dim=2).nan_to_num(0.0)[..., : self.length]
            outputs.append(torch.einsum("bhl,bhld->bhd", weights, value))
        return torch.stack(outputs, dim=2)


def step(
    cache: QuantizedPagedCache, model: Model, num_new: int, seed: int, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """New tokens in the cache and in the model of it, and the attention of both."""
    generator = torch.Generator().manual_seed(seed)

    def random(num_heads: int) -> torch.Tensor:
        return torch.randn(model.key.shape[1], num_heads, num_new, HEAD_DIM, generator=generator)

    query, key, value = random(HEADS * GROUPS) * 2, random(HEADS), random(HEADS)
    layer: Any = cache.layers[0]
    was_empty = layer.is_empty
    handle, _ = cache.update(key, value, 0)
    model.add(key, value)
    if was_empty:  # attention over a fresh prompt does not read the cache
        layer.settle()
        model.forget_old()
        return torch.zeros(0), torch.zeros(0)
    mask = options.pop("mask", None)
    mask = None if mask is None else make_mask(mask, len(key), num_new, model.length, layer.window)
    given = mask
    if mask is not None:  # as the host makes them: of what a growing layer holds, or of all that is reserved
        width = layer.shape_of("k", num_new)[2]
        given = mask[..., -width:] if layer.knows_length else torch.nn.functional.pad(mask, (0, width - mask.shape[3]))
    got = layer.attend(
        query, num_new, given, exact=handle.exact, softmax_scale=HEAD_DIM**-0.5, causal=mask is None,
        sinks=options.get("sinks"), softcap=options.get("softcap"),
    )  # fmt: skip
    expected = model.attend(query, layer.window, mask, **options)
    model.forget_old()
    return got, expected


def make_mask(kind: str, batch_size: int, num_new: int, length: int, window: int | None) -> torch.Tensor:
    """Padding on the left of the last sequence, causality and the window; as bool, or as numbers with a bias."""
    mask = torch.ones(batch_size, 1, num_new, length, dtype=torch.bool).tril(length - num_new)
    if window is not None:
        mask = mask.triu(length - num_new - window + 1)
    mask[-1, :, :, : min(7, length - num_new)] = False
    if kind == "bool":
        return mask
    bias = torch.randn(1, HEADS * GROUPS, num_new, length, generator=torch.Generator().manual_seed(length))
    return bias.masked_fill(~mask, -math.inf)


def check(got: torch.Tensor, expected: torch.Tensor) -> None:
    """To within the rounding of fp32: of logits and weights, and of sums over at most 200 tokens of values below 5."""
    if expected.numel():
        assert (got.double() - expected).abs().max() < (200 + HEAD_DIM) * 2.0**-24 * 5


STEPS = (33, 1, 1, 5, 1, 70, 1, 2, 1)


@pytest.mark.parametrize("mask", [None, "bool", "float"])
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("exact", [(0, 1), (0, 6), (3, 0), (5, 6), (64, 0), (8, 130), (1, 1000)], ids=str)
@pytest.mark.parametrize("kind", ["growing", "fixed"])
def test_attention(kind: str, exact: tuple[int, int], window: int | None, mask: str | None) -> None:
    """Every query sees the first and its newest tokens as they came, others from pages, in turns of any kind."""
    options = {"max_cache_len": 200} if kind == "fixed" else {}
    cache = make_cache(window, sink_tokens=exact[0], recent_tokens=exact[1], **options)
    num_first = -(-exact[0] // PAGE) * PAGE if window is None else 0
    model = Model.of(2, num_first, exact[1], exact[1] + (SLACK if kind == "fixed" else 0))
    more = {"sinks": torch.randn(HEADS * GROUPS), "softcap": 3.0} if exact == (5, 6) else {}
    for seed, num_new in enumerate(STEPS):
        check(*step(cache, model, num_new, seed, mask=mask, **more))


@pytest.mark.parametrize("kind", ["growing", "fixed"])
def test_the_report_and_the_bytes_say_it(kind: str) -> None:
    cache = make_cache(sink_tokens=3, recent_tokens=6, **({"max_cache_len": 64} if kind == "fixed" else {}))
    plain = make_cache(**({"max_cache_len": 64} if kind == "fixed" else {}))
    for each in (cache, plain):
        each.update(*torch.randn(2, 2, HEADS, 33, HEAD_DIM), 0)
    num_exact = 4 + 6 + (SLACK if kind == "fixed" else 0)
    expected = 2 * 2 * HEADS * num_exact * HEAD_DIM * 4
    assert cache.nbytes - plain.nbytes == cache.nbytes_allocated - plain.nbytes_allocated == expected
    assert "sink_tokens=3, recent_tokens=6" in str(cache.report())
    assert "sink_tokens" not in str(plain.report())


@pytest.mark.parametrize("kind", ["growing", "fixed"])
def test_a_layer_with_a_window_keeps_no_more_than_that(kind: str) -> None:
    """Nobody sees more; the layer without one keeps all."""
    model = sliding_model(window=12)
    options = {} if kind == "growing" else {"max_cache_len": 64}
    few, many = (QuantizedPagedCache.from_model(model, recent_tokens=number, **options) for number in (12, 30))
    for cache in (few, many):
        model.generate(prompt(), past_key_values=cache, max_new_tokens=12, do_sample=False)
    sliding, full = zip(
        *((cache.layers[0].exact_nbytes, cache.layers[1].exact_nbytes) for cache in (few, many)), strict=True
    )
    assert sliding[0] == sliding[1]
    assert full[0] < full[1]


def test_layers_that_are_not_quantized_keep_nothing_twice() -> None:
    cache = make_cache(num_layers=2, skip_layers=(0,), sink_tokens=3, recent_tokens=6)
    assert cache.layers[0].exact is None
    assert cache.layers[1].exact is not None
    assert make_cache(kv_cache_dtype="model", scales="auto", recent_tokens=6).layers[0].exact is None
    assert make_cache(window=8, sink_tokens=3).layers[0].exact is None


@pytest.mark.parametrize("value", [-1, 1.5, True, "8"])
@pytest.mark.parametrize("name", ["sink_tokens", "recent_tokens"])
def test_numbers_that_are_none(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}="):
        KVQuantConfig(**{name: value})


# -- operations --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("record", [False, True], ids=["", "record"])
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("kind", ["growing", "fixed"])
def test_tokens_taken_back(kind: str, window: int | None, record: bool) -> None:
    """What was held and is still there stays exact; what comes back into the last ones is read from the pages."""
    cache = make_cache(window, sink_tokens=5, recent_tokens=6, **({"max_cache_len": 200} if kind == "fixed" else {}))
    num_first = 8 if window is None else 0
    model = Model.of(2, num_first, 6, 6 + (SLACK if kind == "fixed" or record else 0))
    if record:
        cache.activate_past_recording()
    step(cache, model, 33, 0)
    # With a window, a growing layer that does not record has little that could be taken back.
    crops = (1, 2, 3) if window is not None and not record else (1, 4, 9, 2, 12)
    for seed, num_tokens in enumerate(crops, start=1):
        check(*step(cache, model, 9, 2 * seed))
        cache.crop(-num_tokens)
        model.crop(num_tokens)
        check(*step(cache, model, 1 + 3 * (seed % 2), 2 * seed + 1))


@pytest.mark.parametrize("num_first", [8, 0])
@pytest.mark.parametrize("kind", ["growing", "fixed"])
def test_cropped_to_the_first_tokens_and_filled_again(kind: str, num_first: int) -> None:
    cache = make_cache(sink_tokens=num_first, recent_tokens=6, **({"max_cache_len": 200} if kind == "fixed" else {}))
    model = Model.of(1, num_first, 6, 6 + (SLACK if kind == "fixed" else 0))
    step(cache, model, 33, 0)
    cache.crop(-28)
    model.crop(28)
    for seed, num_new in enumerate((1, 7, 1, 30, 1), start=1):
        check(*step(cache, model, num_new, seed))


@pytest.mark.parametrize("kind", ["growing", "fixed"])
def test_sequences_that_change_places(kind: str) -> None:
    cache = make_cache(sink_tokens=5, recent_tokens=6, **({"max_cache_len": 200} if kind == "fixed" else {}))
    model = Model.of(3, 8, 6, 6 + (SLACK if kind == "fixed" else 0))
    step(cache, model, 33, 0)
    for seed, order in enumerate(([2, 0, 0], [1, 2, 1], [0, 0, 0]), start=1):
        cache.reorder_cache(torch.tensor(order))
        model.select(order)
        check(*step(cache, model, 1, seed))
    if kind == "growing":
        cache.batch_repeat_interleave(2)
        model.select([0, 0, 1, 1, 2, 2])
        check(*step(cache, model, 2, 8))
        cache.batch_select_indices(torch.tensor([4, 1]))
        model.select([4, 1])
        check(*step(cache, model, 1, 9))


@pytest.mark.parametrize("how", ["fork", "deepcopy"])
@pytest.mark.parametrize("kind", ["growing", "fixed"])
def test_copies_go_their_own_ways(kind: str, how: str) -> None:
    cache = make_cache(sink_tokens=40, recent_tokens=6, **({"max_cache_len": 200} if kind == "fixed" else {}))
    model = Model.of(2, 40, 6, 6 + (SLACK if kind == "fixed" else 0))
    step(cache, model, 33, 0)
    other = cache.fork() if how == "fork" else copy.deepcopy(cache)
    other_model = copy.deepcopy(model)
    for seed in range(1, 6):
        check(*step(cache, model, 3, seed))
        check(*step(other, other_model, 2, 10 + seed))
    other.crop(-8)
    other_model.crop(8)
    check(*step(cache, model, 1, 20))
    check(*step(other, other_model, 1, 21))


@pytest.mark.parametrize("kind", ["growing", "fixed"])
def test_a_cache_begun_anew(kind: str) -> None:
    cache = make_cache(sink_tokens=5, recent_tokens=6, **({"max_cache_len": 200} if kind == "fixed" else {}))
    for seed in range(2):
        model = Model.of(2, 8, 6, 6 + (SLACK if kind == "fixed" else 0))
        step(cache, model, 33, seed)
        check(*step(cache, model, 1, 10 + seed))
        cache.reset()


def test_replaced_keys_and_values() -> None:
    """As tools that prune a cache do it: the new first and newest tokens are kept as they were given."""
    cache = make_cache(sink_tokens=5, recent_tokens=6)
    model = Model.of(2, 8, 6, 6)
    step(cache, model, 33, 0)
    layer = cache.layers[0]
    kept = [0, 1, 5, 6, 9, 10, *range(12, 30), 32]
    keys, values = layer.keys[:, :, kept], layer.values[:, :, kept]
    assert torch.equal(keys[:, :, :4], model.key[0][:, :, [0, 1, 5, 6]])
    assert torch.equal(keys[:, :, 5:18], model.key[1][:, :, kept[5:18]])
    layer.keys, layer.values = keys, values
    model = Model.of(2, 8, 6, 6)
    model.add(keys, values)
    model.forget_old()
    check(*step(cache, model, 1, 1))
    check(*step(cache, model, 3, 2))


@pytest.mark.parametrize("num_recent", [5, 7])
@pytest.mark.parametrize("num_tokens", [5, 9])
def test_what_a_window_has_passed_outlives_a_replacement(num_tokens: int, num_recent: int) -> None:
    """A crop brings it back."""
    cache, whole = (make_cache(window=5, recent_tokens=num_recent) for _ in range(2))
    key, value = torch.randn(2, 1, HEADS, num_tokens, HEAD_DIM)
    for each in (cache, whole):
        each.activate_past_recording()
        each.update(key, value, 0)
    layer = cache.layers[0]
    layer.values = layer.values * 1.0
    layer.settle()
    for each in (cache, whole):
        each.crop(-1)
    for side in ("k", "v"):
        assert torch.equal(layer.read(side, 0), whole.layers[0].read(side, 0))


@pytest.mark.parametrize("kind", ["growing", "fixed"])
def test_dense_tensors_have_them(kind: str) -> None:
    """For attention that takes dense tensors, and for whoever reads the cache."""
    cache = make_cache(sink_tokens=5, recent_tokens=6, **({"max_cache_len": 64} if kind == "fixed" else {}))
    model = Model.of(2, 8, 6, 6 + (SLACK if kind == "fixed" else 0))
    step(cache, model, 33, 0)
    for num_new in (1, 4):
        x = torch.randn(2, 2, HEADS, num_new, HEAD_DIM)
        handle, _ = cache.update(*x, 0)
        model.add(*x)
        exact = model.is_exact(model.length - num_new)  # of the oldest query, which the newest see as well
        expected = torch.where(exact[:, None], *model.key)
        assert torch.equal(handle.dense("a test")[:, :, : model.length], expected)
        model.forget_old()
    exact = model.is_exact(model.length - 1)
    for dense, both in zip(next(iter(cache))[:2], (model.key, model.value), strict=True):
        assert torch.equal(dense[:, :, : model.length], torch.where(exact[:, None], *both))


@pytest.mark.parametrize("kind", ["growing", "fixed"])
def test_first_tokens_alone_leave_the_newest_rounded(kind: str) -> None:
    """Also where several come at once."""
    cache = make_cache(sink_tokens=PAGE, **({"max_cache_len": 64} if kind == "fixed" else {}))
    tokens = torch.randn(2, 1, HEADS, 12, HEAD_DIM)
    for start, end in ((0, 8), (8, 12)):
        handles = cache.update(*tokens[:, :, :, start:end], 0)
    expected = tokens.to(torch.float8_e4m3fn).to(tokens.dtype)
    expected[:, :, :, :PAGE] = tokens[:, :, :, :PAGE]
    for handle, of_side in zip(handles, expected, strict=True):
        assert torch.equal(handle.dense("a test")[:, :, :12], of_side)


# -- generate ----------------------------------------------------------------------------------------------------------


def generate(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    options = {"max_new_tokens": 20, "do_sample": False, "attention_mask": torch.ones_like(ids), **options}
    return model.generate(ids, **options)


ALL = {"kv_cache_dtype": "fp8", "scales": "unit", "recent_tokens": 400}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "top_k": 0},
    "prompt_lookup": {"prompt_lookup_num_tokens": 4},
    "chunks": {"prefill_chunk_size": 5},
    "returned": {"return_dict_in_generate": True},
}


@pytest.mark.parametrize("attention", ["kvquant", "sdpa"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", [tiny_llama, sliding_model], ids=["full", "sliding"])
def test_a_cache_of_recent_tokens_only_is_lossless(make: Any, way: str, attention: str) -> None:
    """Where all tokens count as recent, the 8-bit pages play no part: the tokens are those of the host's own cache."""
    model = make()
    ids = prompt(1 if way == "prompt_lookup" else 2, 21)
    mask = torch.ones_like(ids)
    if len(ids) > 1:
        mask[1, :5] = 0
    outputs = []
    for implementation, options in (
        ("sdpa", {}), (attention, {"cache_implementation": "kvquant", "cache_config": ALL}),
    ):  # fmt: skip
        model.set_attn_implementation(implementation)
        torch.manual_seed(0)
        output = generate(model, ids, attention_mask=mask, **WAYS[way], **options)
        outputs.append(output if isinstance(output, torch.Tensor) else output.sequences)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_speculation_does_not_change_the_tokens(padded: bool) -> None:
    model = tiny_llama()
    ids = prompt(1, 21)
    mask = torch.ones_like(ids)
    mask[0, : 4 * padded] = 0
    options: dict[str, Any] = {
        "cache_implementation": "kvquant", "attention_mask": mask, "max_new_tokens": 60,
        "cache_config": {"kv_cache_dtype": "fp8", "scales": "unit", "recent_tokens": 3, "sink_tokens": 2},
    }  # fmt: skip
    expected = generate(model, ids, **options)
    lengths: list[int] = []
    hook = model.model.embed_tokens.register_forward_hook(lambda _, args, __: lengths.append(args[0].shape[1]))
    assert torch.equal(generate(model, ids, prompt_lookup_num_tokens=4, **options), expected)
    hook.remove()
    assert max(lengths[1:]) > 1, "nothing was drafted"
    assert len(lengths) < 60, "no draft was accepted"
    assert sum(lengths) > 21 + 60, "no draft was taken back"


def test_first_tokens_behind_padding_are_found() -> None:
    """`sink_tokens` counts from the first token of each sequence where `generate` knows what is padding."""
    model = tiny_llama()
    ids = prompt(2, 40)
    mask = torch.ones_like(ids)
    mask[1, :18] = 0
    options = {"kv_cache_dtype": "fp8", "scales": "unit", "sink_tokens": 2, "page_size": PAGE}
    output = generate(
        model, ids, attention_mask=mask, cache_implementation="kvquant", cache_config=options,
        return_dict_in_generate=True,
    )  # fmt: skip
    cache = output.past_key_values
    assert cache.layers[0].exact.num_first == 20
    cache.reset()  # and with it what was padding
    with torch.no_grad():
        model(ids, past_key_values=cache)
    assert cache.layers[0].exact.num_first == PAGE


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_model_goes_on_as_an_eager_one(backend: str) -> None:
    model = tiny_llama()
    ids = prompt(2, 21)
    cache_config = {"kv_cache_dtype": "fp8", "scales": "unit", "sink_tokens": 2, "recent_tokens": 5}
    cache_config |= {"max_cache_len": 64, "page_size": PAGE}
    outputs = []
    for compiled in (False, True):
        torch.compiler.reset()
        cache = QuantizedPagedCache.from_model(model, **cache_config)
        forward = torch.compile(model, fullgraph=True, backend=backend) if compiled else model
        logits = [model(ids, past_key_values=cache).logits[:, -1]]
        for _ in range(8):
            logits.append(forward(logits[-1].argmax(-1, keepdim=True), past_key_values=cache).logits[:, -1])
        outputs.append(torch.stack(logits))
    torch.testing.assert_close(*outputs)


def test_an_outlier_at_the_start_costs_nothing() -> None:
    """What sink tokens are for: keys far beyond fp8, which would be clipped, stay what they are."""
    errors = []
    for options in ({}, {"sink_tokens": 1}):
        cache, plain = make_cache(**options), make_cache(kv_cache_dtype="model", scales="auto")
        generator = torch.Generator().manual_seed(0)
        key, value = torch.randn(2, 1, HEADS, 40, HEAD_DIM, generator=generator)
        key[:, :, 0, 3] = 900.0
        query = torch.randn(1, HEADS * GROUPS, 1, HEAD_DIM, generator=generator)
        query[..., 3] /= 100
        outputs = []
        for each in (cache, plain):
            each.update(key, value, 0)
            handle, _ = each.update(key[:, :, -1:], value[:, :, -1:], 0)
            outputs.append(each.layers[0].attend(query, 1, None, exact=handle.exact, softmax_scale=1.0, causal=True))
        errors.append((outputs[0] - outputs[1]).norm() / outputs[1].norm())
    assert errors[1] < errors[0] / 5


def test_a_session_keeps_them(tmp_path: Path) -> None:
    model = tiny_llama()
    ids = prompt(2, 33)
    cache = QuantizedPagedCache.from_model(model, kv_cache_dtype="fp8", scales="unit", sink_tokens=2, recent_tokens=9)
    text = generate(model, ids, past_key_values=cache)
    cache.save_pretrained(tmp_path)
    loaded = QuantizedPagedCache.from_pretrained(tmp_path, model)
    for one, other in zip(cache.layers, loaded.layers, strict=True):
        assert all(torch.equal(*pair) for pair in zip(one.exact.held, other.exact.held, strict=True))
    turn = torch.cat([text, prompt(2, 5, seed=3)], dim=1)
    assert torch.equal(*(generate(model, turn, past_key_values=each) for each in (cache, loaded)))


def test_turns_of_any_length_take_pages_of_a_few_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each size is a GPU kernel to compile."""
    sizes = []

    def attention(query: torch.Tensor, k: PagedTensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if k.format == "model":
            sizes.append(k.pages.shape[2])
        return ops.paged_attention(query, k, *args, **kwargs)

    monkeypatch.setattr(parts, "paged_attention", attention)
    model = tiny_llama("kvquant")
    cache = QuantizedPagedCache.from_model(model, kv_cache_dtype="fp8", recent_tokens=8)
    with torch.no_grad():
        for length in (40, *range(1, 34)):
            model(prompt(2, length), past_key_values=cache)
    assert set(sizes) == {8, 16, 32, 64}  # 8 recent tokens, and the new ones but one
