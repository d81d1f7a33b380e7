"""Facts in long contexts: the probes, and what is measured of them, against `generate` and a plain forward pass."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

import hf_kvquant
from hf_kvquant import LayerScales, QuantizedPagedCache
from hf_kvquant.evaluation.retrieval import DEPTHS, TASKS, Probe, Retrieval, make_probes, measure_retrieval

TINY = Path(__file__).parents[1] / "examples" / "tiny-python-lm"
LENGTHS = [63, 129]


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY)


@cache
def text() -> torch.Tensor:
    source = Path(hf_kvquant.__file__).parent.joinpath("cache.py").read_text(encoding="utf-8")
    return tokenizer()(source[:2000], add_special_tokens=False, return_tensors="pt").input_ids[0]


@cache
def model() -> PreTrainedModel:
    config = AutoConfig.from_pretrained(TINY)
    del config.quantization_config
    return AutoModelForCausalLM.from_pretrained(TINY, config=config, dtype=torch.float32, attn_implementation="sdpa")


def places(sequence: torch.Tensor, part: torch.Tensor) -> list[int]:
    """Where `part` is in `sequence`."""
    return (sequence.unfold(0, len(part), 1) == part).all(dim=1).nonzero().flatten().tolist()


def dense(_: int) -> Cache:
    return DynamicCache(config=model().config)


def paged(**options: Any) -> Any:
    return lambda length: QuantizedPagedCache.from_model(model(), **options)


# -- the probes --------------------------------------------------------------------------------------------------------


def test_a_probe_has_its_fact_once_at_its_depth() -> None:
    probes = make_probes(text(), tokenizer(), LENGTHS, samples=2)
    assert len(probes) == len(TASKS) * len(LENGTHS) * len(DEPTHS) * 2
    for probe in probes:
        total = sum(map(len, (probe.document, probe.question, probe.answer)))
        # Facts of the key-value task are not cut: what is left over is less than one of them.
        assert probe.length - (20 if probe.task == "key-value" else 0) <= total <= probe.length
        fact = torch.cat([probe.question, probe.answer])
        (place,) = places(probe.document, fact)
        (question,) = places(probe.document, probe.question)
        assert question == place
        share = (place - 1) / (len(probe.document) - len(fact) - 3)  # bos before, two ends of lines behind
        assert share == pytest.approx(probe.depth, abs=20 / len(probe.document))
        assert probe.document[0] == tokenizer().bos_token_id
        document = tokenizer().decode(probe.document)
        assert f"\n{tokenizer().decode(probe.question)}" in document or probe.depth == 0 or probe.task == "needle"
        assert document.endswith("\n")


def test_the_key_value_task_is_made_of_facts_that_differ() -> None:
    probe = next(p for p in make_probes(text(), tokenizer(), [129]) if p.task == "key-value")
    lines = tokenizer().decode(probe.document[1:]).strip().split("\n")
    keys, values = zip(*(line.split(" = ") for line in lines), strict=True)
    assert len(set(keys)) == len(keys) > 5
    assert all(value.isdigit() and len(value) == 5 for value in values)


def test_the_needle_is_hidden_in_the_text() -> None:
    for probe in make_probes(text(), tokenizer(), [129]):
        if probe.task == "needle":
            (place,) = places(probe.document, torch.cat([probe.question, probe.answer]))
            before = probe.document[1:place]
            assert torch.equal(before, text()[: len(before)])


def same(one: Probe, other: Probe) -> bool:
    parts = ("document", "question", "answer")
    return all(torch.equal(getattr(one, part), getattr(other, part)) for part in parts)


def test_the_same_every_time_and_no_two_alike() -> None:
    first, second = (make_probes(text(), tokenizer(), LENGTHS, samples=2) for _ in range(2))
    assert all(same(one, other) for one, other in zip(first, second, strict=True))
    assert not any(same(one, other) for i, one in enumerate(first) for other in first[:i])


@pytest.mark.parametrize(("length", "says"), [(17, "a fact and the question for it take"), (5000, "there are ")])
def test_lengths_that_do_not_fit(length: int, says: str) -> None:
    with pytest.raises(ValueError, match=f"retrieval over {length:,} tokens.*{says}"):
        make_probes(text(), tokenizer(), [length])


# -- what is measured --------------------------------------------------------------------------------------------------


def measured(probes: list[Probe], make: Any = dense) -> list[Retrieval]:
    return measure_retrieval(model().eval(), probes, make)


@torch.no_grad()
def test_the_numbers() -> None:
    """Found, as `generate` finds it; probability and rank, as in a forward pass without a cache."""
    probes = make_probes(text(), tokenizer(), LENGTHS, depths=[0.0, 1.0], samples=4)
    found = {(each.task, each.length, each.depth): each for each in measured(probes)}
    assert len(found) == len(probes) / 4
    for place, result in found.items():
        hits, probabilities, ranks = [], [], []
        for probe in probes:
            if (probe.task, probe.length, probe.depth) != place:
                continue
            prompt = torch.cat([probe.document, probe.question])[None]
            options = {"do_sample": False, "min_new_tokens": len(probe.answer), "max_new_tokens": len(probe.answer)}
            output = model().generate(prompt, attention_mask=torch.ones_like(prompt), **options)
            hits.append(torch.equal(output[0, prompt.shape[1] :], probe.answer))
            logits = model()(torch.cat([prompt[0], probe.answer])[None]).logits[0, prompt.shape[1] - 1 : -1]
            expected = logits.double().log_softmax(dim=-1)
            probabilities.append(expected.gather(1, probe.answer[:, None]).sum().item())
            order = expected.argsort(dim=-1, descending=True)
            ranks.append(1 + (order == probe.answer[:, None]).int().argmax(dim=-1).max().item())
        assert result.found == sum(hits) / 4
        # fp32: logits of some 10 are off by a few times 2**-20.
        assert result.log_probability == pytest.approx(sum(probabilities) / 4, abs=1e-3)
        assert result.rank == sum(ranks) / 4
    assert any(result.found > 0 for result in found.values())
    assert any(result.found < 1 for result in found.values())


def test_the_cache_is_read() -> None:
    probes = make_probes(text(), tokenizer(), [129], depths=[1.0], samples=2)
    expected = measured(probes)
    assert measured(probes, paged(kv_cache_dtype="model")) == expected
    int8 = measured(probes, paged(kv_cache_dtype="int8", scales="dynamic"))
    nothing = LayerScales(torch.tensor([1e-9]), torch.tensor([1e-9]))
    broken = measured(probes, paged(kv_cache_dtype="fp8", scales=nothing))
    for dense_one, int8_one, broken_one in zip(expected, int8, broken, strict=True):
        change = abs(int8_one.log_probability - dense_one.log_probability)
        assert 0 < change < 0.1 * abs(broken_one.log_probability - dense_one.log_probability)


def test_caches_are_made_for_the_length() -> None:
    lengths = []

    def make(length: int) -> Cache:
        lengths.append(length)
        return dense(length)

    measured(make_probes(text(), tokenizer(), LENGTHS, depths=[0.5], samples=1), make)
    assert sorted(lengths) == sorted(LENGTHS * len(TASKS))
