"""Beams and several answers to one prompt: shared pages, the tokens of a dense cache, one graph when compiled."""

from __future__ import annotations

import functools
import logging
from typing import Any

import families
import pytest
import torch
from helpers import pages_in_use, prompt, tiny_llama
from test_cache import CountSyncs, contents, make_cache, sliding_model
from torch._dynamo.utils import counters
from transformers import DPRConfig, DPRQuestionEncoder, RagTokenForGeneration

from hf_kvquant import QuantizedPagedCache
from hf_kvquant.encoder_decoder import QuantizedEncoderDecoderCache

UNQUANTIZED = {"kv_cache_dtype": "model", "page_size": 4}


def generate(model: Any, input_ids: torch.Tensor, padded: bool = False, **options: Any) -> Any:
    mask = torch.ones_like(input_ids)
    if padded:
        mask[0, : input_ids.shape[1] // 3] = 0
    options = {"max_new_tokens": 14, "do_sample": False, "return_dict_in_generate": True, **options}
    torch.manual_seed(0)
    return model.generate(input_ids=input_ids, attention_mask=mask, **options)


WAYS = {
    "beams": {"num_beams": 4, "num_return_sequences": 2},
    "beam-sampling": {"num_beams": 3, "do_sample": True},
    "answers": {"num_return_sequences": 3, "do_sample": True},
    "chunks": {"num_beams": 3, "prefill_chunk_size": 6},
}


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("make_model", [tiny_llama, sliding_model], ids=["full", "sliding"])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_tokens_equal_a_dense_caches(way: dict[str, Any], make_model: Any, padded: bool) -> None:
    model = make_model()
    expected = generate(model, prompt(), padded, cache_implementation="dynamic", **way).sequences
    for attention in ("kvquant", "eager"):
        model.set_attn_implementation(attention)
        out = generate(model, prompt(), padded, cache_implementation="kvquant", cache_config=UNQUANTIZED, **way)
        assert torch.equal(out.sequences, expected)
        dense = [layer.dense for layer in out.past_key_values.report().layers]
        assert all(reasons == () for reasons in dense) == (attention == "kvquant")


@pytest.mark.parametrize("way", [{"num_beams": 8}, {"num_return_sequences": 8, "do_sample": True}], ids=str)
def test_eight_beams_take_little_more_than_one(way: dict[str, Any]) -> None:
    model = tiny_llama("kvquant", max_position_embeddings=5000)
    ids = prompt(1, 4000)
    one, eight = (generate(model, ids, max_new_tokens=50, **w).past_key_values for w in ({}, way))
    assert eight.batch_size == 8
    assert eight.nbytes < (1.045 if "num_beams" in way else 1.2) * one.nbytes  # the README says 1.04 of beams
    assert eight.nbytes_allocated < 1.2 * 1.2 * one.nbytes_allocated


@pytest.mark.parametrize("chunk", [None, 6, 8])
def test_a_prompts_pages_are_shared_from_the_start(chunk: int | None) -> None:
    """Two prompts of 21 tokens, three beams each: five full pages per prompt, and one to write in for each beam."""
    model = tiny_llama("kvquant")
    out = generate(model, prompt(), num_beams=3, max_new_tokens=3, cache_config=UNQUANTIZED, prefill_chunk_size=chunk)
    table = out.past_key_values.layers[0].table
    assert table.batch_size == 6
    assert table.pages_in_use <= 2 * (5 + 3)


def test_sequences_share_nothing_they_were_not_promised_to() -> None:
    """What `generate` said of its first prompt is no longer true of a cache that is used again."""
    model = tiny_llama("kvquant")
    for reuse in (
        lambda cache: cache.reset(),
        lambda cache: cache.crop(-int(cache.get_seq_length())),
        lambda cache: [layer.reset() for layer in cache.layers],
    ):
        cache = generate(model, prompt(), num_beams=2, cache_config=UNQUANTIZED).past_key_values
        reuse(cache)
        with torch.no_grad():
            model(prompt(4, 9), past_key_values=cache)
            expected = QuantizedPagedCache.from_model(model, **UNQUANTIZED)
            model(prompt(4, 9), past_key_values=expected)
        for one, other in zip(contents(cache), contents(expected), strict=True):
            assert torch.equal(one[0], other[0])


@pytest.mark.parametrize("max_new_tokens", [1, 12])
def test_answers_to_one_prompt_go_on_with_turns_of_their_own(max_new_tokens: int) -> None:
    """The prompt of the second turn is as long for all of them, and another one for each."""
    model = tiny_llama("kvquant", initializer_range=0.5)
    way = {"num_return_sequences": 2, "do_sample": True, "max_new_tokens": max_new_tokens}
    answers = {}
    for name, options in {"ours": {"cache_config": UNQUANTIZED}, "dense": {"cache_implementation": "dynamic"}}.items():
        first = generate(model, prompt(1), **way, **options)
        turn = torch.cat([first.sequences, prompt(2, 4, seed=7)], dim=1)
        answers[name] = generate(model, turn, past_key_values=first.past_key_values).sequences
    assert torch.equal(answers["ours"], answers["dense"])


def test_answers_that_are_cropped_go_on_alone() -> None:
    model = tiny_llama("kvquant")
    way = {"num_return_sequences": 2, "do_sample": True, "max_new_tokens": 1}
    caches = [
        generate(model, prompt(1), **way, **options).past_key_values
        for options in ({"cache_config": UNQUANTIZED}, {"cache_implementation": "dynamic"})
    ]
    logits = []
    for cache in caches:
        cache.crop(-6)
        with torch.no_grad():
            logits.append(model(prompt(2, 5), past_key_values=cache).logits)
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)


def test_training_shares_nothing() -> None:
    """Dropout makes the copies of a prompt differ."""
    model = tiny_llama("kvquant", attention_dropout=0.5)
    model.train()
    options = {"num_return_sequences": 3, "do_sample": True, "max_new_tokens": 2}
    keys = contents(generate(model, prompt(), cache_config=UNQUANTIZED, **options).past_key_values)[1][0]
    assert not torch.equal(keys[0, :, :21], keys[1, :, :21])


@pytest.mark.parametrize("model_type", ["t5", "bart"])
def test_encoder_decoders(model_type: str) -> None:
    """What the encoder says is stored once for all beams."""
    model = families.build(model_type)
    ids = prompt(2, 30, vocab_size=90)
    options = {"num_beams": 3, "min_new_tokens": 8, "max_new_tokens": 8}
    expected = generate(model, ids, cache_implementation="dynamic", **options).sequences
    out = generate(model, ids, cache_implementation="kvquant", cache_config=UNQUANTIZED, **options)
    assert torch.equal(out.sequences, expected)
    cross = out.past_key_values.cross_attention_cache
    assert cross.batch_size == 6
    assert cross.layers[0].table.pages_in_use == 2 * 8


@pytest.mark.parametrize(("num_docs", "num_beams"), [(2, 2), (3, 2)])
def test_a_model_that_counts_its_sequences_in_its_own_way(num_docs: int, num_beams: int) -> None:
    """RAG reads a prompt beside several documents, each in as many rows as there are beams."""
    torch.manual_seed(0)
    options = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = DPRQuestionEncoder(DPRConfig(**options, intermediate_size=32))
    model = RagTokenForGeneration(question_encoder=encoder, generator=families.build("bart")).eval()
    model.generation_config.update(bos_token_id=1, eos_token_id=2, pad_token_id=0, decoder_start_token_id=3)
    model.config.decoder_start_token_id = 3
    given = {
        "context_input_ids": prompt(2 * num_docs, 9, vocab_size=90),
        "context_attention_mask": torch.ones(2 * num_docs, 9, dtype=torch.long),
        "doc_scores": torch.randn(2, num_docs),
        "n_docs": num_docs, "num_beams": num_beams, "num_return_sequences": num_beams, "max_length": 10,
    }  # fmt: skip
    got = model.generate(**given, cache_implementation="kvquant", cache_config=UNQUANTIZED)
    assert torch.equal(got, model.generate(**given))


def test_a_pair_that_a_model_makes_of_dense_tensors_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """As RAG does where beams change places."""
    logging.Logger.warning_once.cache_clear()  # type: ignore[attr-defined]
    layer = tuple(torch.randn(2, 2, 5, 16) for _ in range(4))
    cache = QuantizedEncoderDecoderCache([layer, layer])
    assert cache.get_seq_length() == 5
    assert "in the model's dtype from here on" in caplog.text


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_quantized_beams_are_those_of_the_stored_numbers(dtype: str) -> None:
    """Prompts that are stored once give what prompts that every beam stores for itself give."""
    model = tiny_llama("kvquant")
    options = {"kv_cache_dtype": dtype, "page_size": 4, "equalize": False}
    shared = generate(model, prompt(), num_beams=4, cache_config=options)
    given = QuantizedPagedCache.from_model(model, **options)
    alone = generate(model, prompt(), num_beams=4, past_key_values=given)
    assert torch.equal(shared.sequences, alone.sequences)
    for one, other in zip(contents(shared.past_key_values), contents(given), strict=True):
        torch.testing.assert_close(one[0], other[0])


def test_a_step_of_beams_makes_its_indices_once() -> None:
    """One index of what is copied serves all layers; nothing is read back but the beams' order."""
    calls = []
    cache = make_cache(kv_cache_dtype="int8", page_size=4)
    for index in range(2):
        cache.update(torch.randn(4, 2, 21, 16), torch.randn(4, 2, 21, 16), index)
    cache._settle()
    for layer in cache.layers:
        for store in (layer.k, layer.v):
            copy = store.copy
            store.copy = lambda *args, copy=copy: (calls.append(args), copy(*args))[1]
    cache.reorder_cache(torch.tensor([2, 2, 2, 0]))
    calls.clear()  # pages that are no one's any more were given back
    with CountSyncs() as syncs:
        for index in range(2):
            cache.update(torch.randn(4, 2, 1, 16), torch.randn(4, 2, 1, 16), index)
    assert syncs.count == 0
    assert len(calls) == 4
    assert len({tuple(index.data_ptr() for index in args) for args in calls}) == 1
    assert all(len(args[0]) == 2 for args in calls)


# -- fixed addresses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make_model", [tiny_llama, sliding_model], ids=["full", "sliding"])
def test_compiled_beams(make_model: Any) -> None:
    """A user who compiles the steps, as `generate` itself does for everything but beams, keeps one graph for them."""
    model = make_model()
    expected = generate(model, prompt(), num_beams=3, cache_implementation="dynamic").sequences
    torch._dynamo.reset()
    counters.clear()
    eager, compiled = model.forward, torch.compile(model.forward, backend="eager", fullgraph=True)

    @functools.wraps(eager)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return (compiled if kwargs["input_ids"].shape[1] == 1 else eager)(*args, **kwargs)

    model.forward = forward
    config = {**UNQUANTIZED, "max_cache_len": 64}
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            out = generate(model, prompt(), num_beams=3, cache_implementation="kvquant", cache_config=config)
            assert torch.equal(out.sequences, expected)
    assert all(layer.dense == () for layer in out.past_key_values.report().layers)
    assert counters["stats"]["unique_graphs"] == 1


def test_modules_in_training_that_are_not_random_do_not_matter() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = tiny_llama("kvquant")
    model.lm_head.train()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["k_proj"], lora_dropout=0.0))
    model.model.layers[0].self_attn.k_proj.train()
    options = {"num_return_sequences": 8, "do_sample": True, "max_new_tokens": 1, "cache_config": UNQUANTIZED}
    cache = generate(adapted, prompt(1, 40), **options).past_key_values
    assert pages_in_use(cache.layers[0].table.pool) == 10  # of eight sequences


@pytest.mark.parametrize("way", ["beams", "answers"])
def test_rows_that_differ_share_no_prompt(way: str) -> None:
    """Dropout that stays on, and adapters of their own, give sequences of the same tokens other keys and values."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    options = {"num_beams": 2} if way == "beams" else {"num_return_sequences": 2, "do_sample": True}
    ids = prompt()
    noisy = families.build("gpt2", {"attn_pdrop": 0.0, "resid_pdrop": 0.5, "embd_pdrop": 0.0})
    for module in noisy.modules():
        if isinstance(module, torch.nn.Dropout):
            module.train()
    config = peft.LoraConfig(target_modules=["k_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(tiny_llama("kvquant"), config).eval()
    adapted.add_adapter("other", config)
    adapters = {"adapter_names": ["default", "other"] * (1 if way == "beams" else 2)}  # peft repeats them for beams
    caches = ({"cache_implementation": "dynamic"}, {"cache_implementation": "kvquant", "cache_config": UNQUANTIZED})
    for model, more in ((noisy, {}), (adapted, adapters)):
        expected, got = (generate(model, ids, **options, **more, **cache) for cache in caches)
        assert torch.equal(got.sequences, expected.sequences)
