"""The model `kvquant` of the lm-evaluation-harness, over the real one where it is installed and over a stand-in."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import prompt, tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_kvquant import QuantizedPagedCache, ops

MODULE = "hf_kvquant.evaluation.harness"
TINY = Path(__file__).parents[1] / "examples" / "tiny-python-lm"
IS_INSTALLED = importlib.util.find_spec("lm_eval") is not None
INT8 = {"kv_cache_dtype": "int8", "scales": "dynamic", "equalize": False}


class StandInHFLM:
    """As much of the harness's class as ours builds on."""

    def __init__(self, pretrained: Any, device: str = "cpu", batch_size: int = 1, tokenizer: Any = None, **rest: Any):
        is_path = isinstance(pretrained, str)
        self.model = AutoModelForCausalLM.from_pretrained(pretrained, **rest) if is_path else pretrained
        self.device = torch.device(device)
        self.backend = "seq2seq" if self.model.config.is_encoder_decoder else "causal"
        self.mixed_precision_dtype = None

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **kwargs: Any) -> Any:
        return self.model.generate(input_ids=context, max_length=max_length, **kwargs)

    def get_model_info(self) -> dict[str, Any]:
        return {"model_dtype": self.model.dtype}


@cache
def real_module() -> ModuleType:
    return importlib.import_module(MODULE)


def module_over_a_stand_in(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    registered: dict[str, Any] = {}
    names = ("", ".__main__", ".api", ".api.registry", ".models", ".models.huggingface")
    modules: dict[str, Any] = {f"lm_eval{name}": ModuleType(f"lm_eval{name}") for name in names}
    modules["lm_eval.__main__"].cli_evaluate = lambda: None
    modules["lm_eval.models.huggingface"].HFLM = StandInHFLM
    modules["lm_eval.api.registry"].register_model = lambda name: lambda cls: registered.setdefault(name, cls)
    modules["lm_eval.api.registry"].get_model = registered.__getitem__
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    return importlib.import_module(MODULE)


@pytest.fixture(params=["stand-in", "real"] if IS_INSTALLED else ["stand-in"])
def harness(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Our module."""
    if request.param == "real":
        yield real_module()
    else:
        yield module_over_a_stand_in(monkeypatch)
        sys.modules.pop(MODULE)


def language_model(harness: Any, model: Any, **options: Any) -> Any:
    return harness.KVQuantLM(model, tokenizer=AutoTokenizer.from_pretrained(TINY), device="cpu", **options)


@torch.no_grad()
def over_pages(model: Any, ids: torch.Tensor, pieces: list[int], **options: Any) -> torch.Tensor:
    cache = QuantizedPagedCache.from_model(model, **options)
    return torch.cat([model(piece, past_key_values=cache).logits for piece in ids.split(pieces, dim=1)], dim=1)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(
    ("num_tokens", "chunk", "pieces"),
    [(63, None, [8, 24, 31]), (63, 17, [17, 17, 17, 12]), (7, None, [1] * 7), (8, 1, [1] * 8), (1, None, [1])],
)
def test_scores_come_from_the_pages(
    harness: Any, num_tokens: int, chunk: int | None, pieces: list[int], batch_size: int
) -> None:
    model = tiny_llama("kvquant")
    ids = prompt(batch_size, num_tokens)
    found = language_model(harness, model, chunk=chunk, **INT8)._model_call(ids)
    expected = over_pages(model, ids, pieces, **INT8)
    assert torch.equal(found, expected)
    # What the harness would compute: the same for what attends to itself, another thing for all that reads pages.
    plain = model(ids, use_cache=False).logits
    first = pieces[0]
    # fp32 in another order of sums; int8 is a thousand times as far.
    torch.testing.assert_close(found[:, :first], plain[:, :first], rtol=0, atol=1e-4)
    differs = (found - plain).abs().amax(dim=-1) > 1e-3
    assert differs[:, first:].all() or num_tokens == 1


def test_every_token_after_the_first_piece_reads_pages(harness: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama("kvquant")
    read = []
    paged_attention = ops.paged_attention

    def spy(query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        read.append(query.shape[2])
        return paged_attention(query, *args, **kwargs)

    monkeypatch.setattr(ops, "paged_attention", spy)
    language_model(harness, model, **INT8)._model_call(prompt(1, 63))
    assert sum(read) == model.config.num_hidden_layers * (63 - 8)


def test_unquantized_pages_give_the_harness_own_scores(harness: Any) -> None:
    model = tiny_llama("sdpa")
    ids = prompt(2, 63)
    found = language_model(harness, model, kv_cache_dtype="model")._model_call(ids)
    # fp32 sums in another order; the same in int8 is off by more than 1e-3 (test_scores_come_from_the_pages).
    torch.testing.assert_close(found, model(ids).logits, rtol=0, atol=1e-4)


def test_generation(harness: Any) -> None:
    model = tiny_llama("sdpa")
    ids = prompt(1, 21)
    mask = torch.ones_like(ids)
    caches = []
    update = QuantizedPagedCache.update
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            QuantizedPagedCache, "update", lambda self, *a, **k: (caches.append(self), update(self, *a, **k))[1]
        )
        found = language_model(harness, model, kv_cache_dtype="fp8_e5m2")._model_generate(
            ids, 36, ["never"], attention_mask=mask, do_sample=False
        )
    options = {"cache_implementation": "kvquant", "cache_config": {"kv_cache_dtype": "fp8_e5m2"}}
    expected = model.generate(ids, attention_mask=mask, do_sample=False, max_length=36, **options)
    assert torch.equal(found, expected)
    assert {cache.kvquant.kv_cache_dtype for cache in caches} == {"fp8_e5m2"}


def test_a_path_is_loaded_under_our_attention(harness: Any) -> None:
    found = language_model(harness, str(TINY), kv_cache_dtype="int8", chunk=16)
    assert found.model.config._attn_implementation == "kvquant"
    assert importlib.import_module("lm_eval.api.registry").get_model("kvquant") is harness.KVQuantLM
    info = found.get_model_info()
    assert (info["cache_config"], info["chunk"]) == ({"kv_cache_dtype": "int8"}, 16)
    assert "model_dtype" in info


def test_bad_options(harness: Any) -> None:
    with pytest.raises(ValueError, match="chunk=0; it must be a number of tokens"):
        language_model(harness, tiny_llama(), chunk=0)
    with pytest.raises(ValueError, match="unknown storage format 'int9'"):
        language_model(harness, tiny_llama(), kv_cache_dtype="int9")


@pytest.mark.skipif(IS_INSTALLED, reason="lm-eval is installed")
def test_without_the_harness() -> None:
    sys.modules.pop(MODULE, None)
    with pytest.raises(ImportError, match=r"pip install 'hf-kvquant\[eval\]'"):
        importlib.import_module(MODULE)


@pytest.mark.skipif(not IS_INSTALLED, reason="lm-eval is not installed")
@pytest.mark.parametrize("harness", ["real"], indirect=True)
def test_tasks(harness: Any, tmp_path: Path) -> None:
    """A local task of each kind, by the harness itself."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    rows = [
        {"text": f"def add_{i}(a, b):\n    return", "good": " a + b", "bad": " yield in", "label": i % 2}
        for i in range(5)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    head = (
        f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\ntest_split: test\n"
    )
    kinds = {
        "mc": 'output_type: multiple_choice\ndoc_to_text: "{{text}}"\n'
        'doc_to_choice: "{{[good, bad] if label == 0 else [bad, good]}}"\n'
        'doc_to_target: label\ntarget_delimiter: ""\nmetric_list: [{metric: acc}]\n',
        "rolling": 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}{{good}}"\n'
        "metric_list: [{metric: byte_perplexity}]\n",
        "generate": 'output_type: generate_until\ndoc_to_text: "{{text}}"\ndoc_to_target: "{{good}}"\n'
        'generation_kwargs: {until: ["\\n"], max_gen_toks: 7}\nmetric_list: [{metric: exact_match}]\n',
    }
    for name, kind in kinds.items():
        (tmp_path / f"{name}.yaml").write_text(f"task: kvquant_{name}\n{head}{kind}")
    results = {}
    for dtype in ("model", "int8", "fp8_e5m2"):
        options = {"kv_cache_dtype": dtype, "scales": "dynamic", "dtype": "float32", "batch_size": 2}
        found = lm_eval.simple_evaluate(
            language_model(harness, str(TINY), **options),
            tasks=[f"kvquant_{name}" for name in kinds],
            task_manager=TaskManager(include_path=str(tmp_path)),
            bootstrap_iters=0,
        )["results"]
        results[dtype] = found
    assert results["int8"]["kvquant_mc"]["acc,none"] == 1
    perplexities = [results[dtype]["kvquant_rolling"]["byte_perplexity,none"] for dtype in results]
    assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-2)
    assert len(set(perplexities)) == 3
