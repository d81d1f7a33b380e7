"""What 8-bit storage costs trained models and their outlier twins, in perplexity on text they have not seen."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Cache, DynamicCache, PreTrainedModel

from benchmarks.twins import TWINS, twins_of
from hf_kvquant import LayerScales, QuantizedPagedCache
from hf_kvquant.evaluation.reporting import comparisons_of

EXAMPLES = Path(__file__).parents[1] / "examples"
# Of one tokenizer.
LLAMA, QK_NORM, KEY_BIAS = "tiny-python-lm", "tiny-python-qk-norm", "tiny-python-key-bias"
WINDOW = 1024
# As a chat arrives: a few tokens first, then more and more over what is stored.
CHUNKS = (8, 24, 32, 64, 128, 256, 512)
NUM_WINDOWS, FEW_WINDOWS = 12, 4
# Of perplexity, in percent, and KL divergence, in nats a token. The text is that of the Python that runs this: with
# another one fp8's perplexity moves by as much as it loses, its divergence by a tenth.
BOUNDS = {
    "int8 dynamic": (0.05, 1e-4),
    "fp8 dynamic": (0.2, 2e-3),
    "fp8 per tensor": (0.3, 2.5e-3),
    "int8 per channel": (0.1, 4e-4),
}
# fp8 moves the probability of each token by a few percent, up or down; over few windows that does not even out.
FEW_BOUNDS = BOUNDS | {"fp8 dynamic": (0.5, 2e-3)}
UNCALIBRATED = {
    "int8 dynamic": {"kv_cache_dtype": "int8", "scales": "dynamic"},
    "fp8 dynamic": {"kv_cache_dtype": "fp8", "scales": "dynamic"},
}


@cache
def tokens(source: str) -> torch.Tensor:
    sys.path.insert(0, str(EXAMPLES))
    import stdlib_text

    text = getattr(stdlib_text, source)()
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLES / LLAMA)
    tokenizer.model_max_length = sys.maxsize
    return tokenizer(text, return_tensors="pt").input_ids[0]


@cache
def trained_model(name: str = LLAMA) -> PreTrainedModel:
    path = EXAMPLES / name
    config = AutoConfig.from_pretrained(path)
    del config.quantization_config  # full precision to compare with: nothing rounds K and V on their way
    return AutoModelForCausalLM.from_pretrained(
        path, config=config, dtype=torch.float32, attn_implementation="kvquant"
    ).eval()


class Change(NamedTuple):
    """Between the predictions over a cache and those over the dense one."""

    percent: float  # of perplexity
    standard_error: float  # of `percent`: how far it moves with the choice of tokens
    divergence: float  # KL, nats a token


@torch.no_grad()
def predictions(model: PreTrainedModel, windows: torch.Tensor, past: Cache) -> torch.Tensor:
    """Log probabilities of every token but the first of each window."""
    logits, start = [], 0
    for size in CHUNKS:
        logits.append(model(windows[:, start : start + size], past_key_values=past).logits)
        start += size
    return torch.cat(logits, dim=1)[:, :-1].log_softmax(-1)


def of_next(predicted: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
    return predicted.gather(2, windows[:, 1:, None])[..., 0].double()


def perplexity(model: PreTrainedModel, make_cache: Callable[[], Cache], num_windows: int = NUM_WINDOWS) -> float:
    windows = tokens("held_out_text")[: num_windows * WINDOW].view(-1, WINDOW)
    seen = [of_next(predictions(model, batch, make_cache()), batch) for batch in windows.split(4)]
    return math.exp(-torch.cat(seen).mean())


def changes(
    model: PreTrainedModel, options: dict[str, dict[str, Any]], num_windows: int = NUM_WINDOWS
) -> dict[str, Change]:
    lost: dict[str, list[torch.Tensor]] = {name: [] for name in options}
    divergences: dict[str, list[torch.Tensor]] = {name: [] for name in options}
    for batch in tokens("held_out_text")[: num_windows * WINDOW].view(-1, WINDOW).split(4):
        dense = predictions(model, batch, DynamicCache(config=model.config))
        for name, given in options.items():
            found = predictions(model, batch, QuantizedPagedCache.from_model(model, **given))
            lost[name].append(of_next(dense, batch) - of_next(found, batch))
            divergences[name].append((dense.exp() * (dense - found)).sum(-1).double())
    results = {}
    for name in options:
        nats = torch.cat(lost[name])
        error = nats.std() / math.sqrt(nats.numel())
        divergence = torch.cat(divergences[name]).mean()
        results[name] = Change(100 * math.expm1(nats.mean()), 100 * error.item(), divergence.item())
        print(f"{name} {results[name]}")
    return results


def beyond(bounds: dict[str, tuple[float, float]], found: dict[str, Change]) -> dict[str, Change]:
    """What a bound does not allow: a mean that the choice of tokens alone cannot have moved there."""
    return {
        name: change
        for name, change in found.items()
        if abs(change.percent) - 2 * change.standard_error > bounds[name][0] or change.divergence > bounds[name][1]
    }


@torch.no_grad()
def calibrated(model: PreTrainedModel, qmax: float, granularity: str) -> list[LayerScales]:
    """Scales from the absolute maxima over other text."""
    windows = tokens("calibration_text")[: 16 * WINDOW].view(-1, WINDOW)
    largest: list[list[torch.Tensor]] = []
    for batch in windows.split(4):
        dense = DynamicCache(config=model.config)
        model(batch, past_key_values=dense)
        seen = [[x.abs().amax(dim=(0, 2)) for x in (layer.keys, layer.values)] for layer in dense.layers]
        largest = seen if not largest else [
            [torch.maximum(*pair) for pair in zip(*layers, strict=True)] for layers in zip(largest, seen, strict=True)
        ]  # fmt: skip
    if granularity == "tensor":
        largest = [[x.amax().reshape(1) for x in layer] for layer in largest]
    return [LayerScales(k_scale=k / qmax, v_scale=v / qmax) for k, v in largest]


@pytest.mark.parametrize("twin", TWINS)
def test_perplexity_stays(twin: str) -> None:
    model = TWINS[twin](trained_model())
    options = UNCALIBRATED | {
        "fp8 per tensor": {"kv_cache_dtype": "fp8", "scales": calibrated(model, 448, "tensor")},
        "int8 per channel": {"kv_cache_dtype": "int8", "scales": calibrated(model, 127, "channel")},
    }
    assert beyond(BOUNDS, changes(model, options)) == {}


@pytest.mark.parametrize("twin", ["plain", "key_pair", "value_head", "value_channel"])
def test_perplexity_stays_where_keys_are_normalized(twin: str) -> None:
    model = TWINS[twin](trained_model(QK_NORM))
    assert beyond(FEW_BOUNDS, changes(model, UNCALIBRATED, FEW_WINDOWS)) == {}


def test_large_key_biases() -> None:
    """They are too much for fp8, whatever its scales; `auto` takes the checkpoint's where there are none."""
    model = trained_model(KEY_BIAS)
    fp8 = {name: {"kv_cache_dtype": "fp8", "scales": name} for name in ("unit", "dynamic", "checkpoint")}
    found = changes(model, fp8 | {"auto": {}, "int8": {"scales": "dynamic"}}, FEW_WINDOWS)
    assert all(found[name].percent > 2 for name in fp8)
    assert all(abs(found[name].percent) < 1 for name in ("auto", "int8"))
    report = QuantizedPagedCache.from_model(model).report()
    formats = [layer.kv_cache_dtype for layer in report.layers]
    assert formats == [("int8", "fp8_e4m3"), ("fp8_e4m3", "fp8_e4m3"), ("fp8_e4m3", "fp8_e4m3"), ("int8", "fp8_e4m3")]
    for layer in (0, 3):
        assert any(f"layer {layer}: K in fp8_e4m3: the bias of its projection" in note for note in report.notes)


def test_unquantized_pages_change_nothing() -> None:
    model = trained_model()
    dense = perplexity(model, lambda: DynamicCache(config=model.config))
    paged = perplexity(model, lambda: QuantizedPagedCache.from_model(model, kv_cache_dtype="model"))
    assert paged == pytest.approx(dense, rel=1e-6)


@pytest.mark.parametrize(("name", "num_windows"), [(LLAMA, NUM_WINDOWS), (QK_NORM, FEW_WINDOWS)])
def test_twins_compute_the_same_function(name: str, num_windows: int) -> None:
    model = trained_model(name)
    dense = {
        twin: perplexity(TWINS[twin](model), lambda: DynamicCache(config=model.config), num_windows)
        for twin in twins_of(model)
    }
    assert all(value == pytest.approx(dense["plain"], rel=1e-5) for value in dense.values()), dense


def test_equalizing_is_what_saves_int8_from_outliers() -> None:
    """The key-pair twin breaks plain dynamic int8: the bounds above can fail."""
    model = TWINS["key_pair"](trained_model())
    dense = perplexity(model, lambda: DynamicCache(config=model.config))
    plain = perplexity(model, lambda: QuantizedPagedCache.from_model(model, kv_cache_dtype="int8", equalize=False))
    assert plain / dense - 1 > 10 * BOUNDS["int8 dynamic"][0] / 100


def test_the_record_can_be_made(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    command = [sys.executable, "-m", "benchmarks.quality", "--tiny", "--json", str(path), "--work", str(tmp_path)]
    label = f"{QK_NORM}/value_channel"
    # Measured elsewhere and earlier, which stays said of it.
    other = {"name": LLAMA, "description": "", "comparison": {"setup": {}, "rows": [], "notes": []}}
    path.write_text(json.dumps({"machine": "another", "git_commit": "0123456", "models": [other]}))
    subprocess.run([*command, "--only", label], cwd=EXAMPLES.parent, check=True)
    record = json.loads(path.read_text())
    (_, kept), (entry, comparison) = comparisons_of(record)
    assert kept.setup == {"machine": "another", "commit": "0123456"}
    assert entry["name"] == label
    assert (comparison.setup["machine"], comparison.setup["commit"]) == (record["machine"], record["git_commit"])
    assert record["machine"] != "another"
    measured = {row.cache: row.quality for row in comparison.rows if not row.failed}
    assert measured["model"].chunks.kl_divergence == pytest.approx(0, abs=1e-6)


def test_pages_name_every_machine_of_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(EXAMPLES.parent / "benchmarks"))
    import quality_tables
    import readme

    record = json.loads(readme.QUALITY.read_text(encoding="utf-8"))
    record["models"][-1]["comparison"]["setup"] |= {"machine": "Another", "commit": "0123456789"}
    for page in (quality_tables.readme_table(record), quality_tables.document(record, {}).partition("##")[0]):
        assert re.search(rf"{re.escape(record['machine'])}; .*{record['git_commit'][:7]}, and Another; .*0123456", page)
