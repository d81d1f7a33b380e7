"""`compare` and `hf-kvquant eval`: the numbers against ones computed in other ways, and rows that fail."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import weakref
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import write
from helpers import prompt, tiny_llama
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

import hf_kvquant
from hf_kvquant import Comparison, ComparisonRow, KVQuantConfig, LayerScales, compare, read_scales
from hf_kvquant.cli import main
from hf_kvquant.evaluation.attempt import attempt
from hf_kvquant.evaluation.caches import DENSE
from hf_kvquant.evaluation.quality import Quality
from hf_kvquant.evaluation.retrieval import DEPTHS, TASKS
from hf_kvquant.evaluation.windows import chunk_sizes

TINY = Path(__file__).parents[1] / "examples" / "tiny-python-lm"
TEXT = Path(hf_kvquant.__file__).parent.joinpath("cache.py").read_text(encoding="utf-8")
CONTEXT, NEW_TOKENS = 63, 15
HEAD_DIM = 64
# Dynamic scales are rounded up to bf16, by at most this factor.
SCALE_ROUNDING = 1 + 2**-7


@cache
def trained_model() -> PreTrainedModel:
    config = AutoConfig.from_pretrained(TINY)
    del config.quantization_config
    return AutoModelForCausalLM.from_pretrained(TINY, config=config, dtype=torch.float32, attn_implementation="sdpa")


def compared(model: PreTrainedModel, data: Any = None, **options: Any) -> Comparison:
    """With few tokens."""
    options = {"context": CONTEXT, "new_tokens": NEW_TOKENS, "num_windows": 2, "formats": [], **options}
    return compare(model, [TEXT[:2000]] if data is None else data, **options)


FORMATS: dict[str, dict[str, Any]] = {
    "model": {"kv_cache_dtype": "model"},
    "int8": {"kv_cache_dtype": "int8", "scales": "dynamic"},
    "plain int8": {"kv_cache_dtype": "int8", "scales": "dynamic", "equalize": False},
    "fp8": {"kv_cache_dtype": "fp8", "scales": "dynamic"},
    "clipping": {"kv_cache_dtype": "fp8", "scales": LayerScales(torch.tensor([1e-6]), torch.tensor([1e-6]))},
    "too small": {"kv_cache_dtype": "int8", "num_pages": 1},
}


@cache
def result() -> Comparison:
    return compared(trained_model(), formats=FORMATS)


def windows() -> list[torch.Tensor]:
    """The tokens that `result` is about: of a text's pieces each begins with the start token."""
    ids = AutoTokenizer.from_pretrained(TINY)(TEXT[:2000], return_tensors="pt").input_ids[0]
    return [ids[:CONTEXT], torch.cat([ids[:1], ids[CONTEXT : 2 * CONTEXT - 1]])]


def quality(comparison: Comparison, name: str) -> Quality:
    row = next(row for row in comparison.rows if row.cache == name)
    assert row.quality is not None, row.failed
    return row.quality


# -- the numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [DENSE, "model"])
def test_what_is_not_quantized_is_exact(name: str) -> None:
    """Under an attention that takes dense tensors, unquantized pages give the same bits."""
    found, dense = quality(result(), name), quality(result(), DENSE)
    for part in (found.steps, found.chunks):
        assert (part.kl_divergence, part.top1_agreement) == (0.0, 1.0)
    assert (found.steps, found.chunks) == (dense.steps, dense.chunks)
    assert (found.greedy_match, found.first_divergence) == (1.0, [None, None])
    assert found.k_error == found.v_error == found.attention_error == [0.0] * 4


def test_perplexity_is_that_of_a_forward_pass() -> None:
    model = trained_model()
    losses = []
    with torch.no_grad():
        for window in windows():
            logits = model(window[None], use_cache=False).logits[0, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits, window[1:], reduction="none"))
    found = quality(result(), DENSE)
    # The other order of sums in attention: fp32 logits differ in their last bits.
    assert found.chunks.perplexity == pytest.approx(math.exp(torch.cat(losses).mean()), rel=1e-4)
    for steps, comparison in ((32, result()), (7, compared(model, steps=7))):
        expected = math.exp(torch.cat([loss[-steps:] for loss in losses]).mean())
        assert quality(comparison, DENSE).steps.perplexity == pytest.approx(expected, rel=1e-4)


def test_greedy_continuations_are_those_of_generate() -> None:
    """A cache of noise: where its tokens begin to differ from the unquantized cache's, by `generate`."""
    model = trained_model()
    found = quality(result(), "clipping")
    places, same = [], 0
    for window in windows():
        options = {"do_sample": False, "min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
        start = window[None, : CONTEXT // 2]
        tokens = [
            model.generate(start, attention_mask=torch.ones_like(start), **options, **ours)[0, CONTEXT // 2 :]
            for ours in ({}, {"cache_implementation": "kvquant", "cache_config": FORMATS["clipping"]})
        ]
        equal = (tokens[0] == tokens[1]).tolist()
        same += sum(equal)
        places.append(None if all(equal) else equal.index(False))
    assert found.first_divergence == places
    assert any(place is not None for place in places)
    assert found.greedy_match == pytest.approx(same / (2 * NEW_TOKENS))


def test_errors_are_within_what_the_formats_allow() -> None:
    # int8: half a step of amax / 127, and the largest of D numbers is at most sqrt(D) times their RMS.
    int8_bound = math.sqrt(HEAD_DIM) / 127 / 2 * SCALE_ROUNDING
    # e4m3: three bits of mantissa; numbers below its normal range are off by 2**-10 of 448 = amax at most.
    fp8_bound = 2**-4 + math.sqrt(HEAD_DIM) * 2**-10 / 448 * SCALE_ROUNDING
    for name, bound in (("plain int8", int8_bound), ("int8", int8_bound), ("fp8", fp8_bound)):
        found = quality(result(), name)
        errors = [error for error in (*found.k_error, *found.v_error) if error is not None]
        assert len(errors) == 8
        assert all(0 < error <= bound for error in errors), (name, errors)
        assert found.clipped == [0] * 4
        assert 0 < found.steps.kl_divergence < 0.01  # a hundredth of a nat; clipping (below) is far beyond
    assert quality(result(), "int8").steps.kl_divergence < 1e-3


def test_clipping_is_counted() -> None:
    found = quality(result(), "clipping")
    # 448 * 1e-6 is all that is left of a number.
    assert found.clipped is not None
    assert all(count > 0.9 * 2 * 2 * 2 * (CONTEXT - 1) * HEAD_DIM for count in found.clipped)
    assert all(0.9 < error <= 1 for error in found.k_error if error is not None)
    assert found.steps.kl_divergence > 0.1
    assert found.steps.top1_agreement < 1
    assert found.scales == ["given"]
    assert (quality(result(), DENSE).clipped, quality(result(), DENSE).scales) == (None, None)


def test_bytes() -> None:
    config = trained_model().config
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * HEAD_DIM * (CONTEXT - 1)
    assert quality(result(), DENSE).bytes_held == 4 * numbers
    # Whole pages, and for int8 a bf16 scale per token and head and an fp32 equalizer; nothing ahead of its use.
    pages = numbers * 64 / (CONTEXT - 1)
    held = pages * (1 + 2 / HEAD_DIM) + numbers / (CONTEXT - 1) * 4
    assert quality(result(), "int8").bytes_held == pytest.approx(held, rel=0.01)  # and small tables


def test_windows_that_slide() -> None:
    """What has left the window is compared by nobody; the host's quantized caches refuse such layers."""
    torch.manual_seed(0)
    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, sliding_window=17, initializer_range=0.2, max_position_embeddings=128,
        )
    ).eval()  # fmt: skip
    model.set_attn_implementation("sdpa")
    found = compared(model, prompt(1, CONTEXT), formats=["model", "int8"])
    assert quality(found, "kvquant model").k_error == quality(found, "kvquant model").v_error == [0.0, 0.0]
    assert quality(found, "kvquant model").attention_error == [0.0, 0.0]
    assert quality(found, "kvquant model").steps.kl_divergence == 0.0
    assert all(error is not None and 0 < error < 0.05 for error in quality(found, "kvquant int8").v_error)
    assert next(row for row in found.rows if row.cache == "transformers fp8").failed.startswith("ValueError: ")


def test_attention_over_pages() -> None:
    """The same storage, read by our attention: arithmetic differs, not what is stored."""
    model = tiny_llama("kvquant").eval()
    found = compared(model, prompt(2, CONTEXT), formats=["model", ("int8", "fp8_e5m2")])
    pages = quality(found, "kvquant model")
    assert pages.k_error == pages.v_error == [0.0, 0.0]
    assert pages.steps.kl_divergence == pytest.approx(0, abs=1e-5)  # sums of fp32 in another order
    mixed = quality(found, "kvquant int8 / fp8_e5m2")
    assert mixed.k_error[0] is not None and mixed.v_error[0] is not None  # noqa: PT018
    assert mixed.k_error[0] < mixed.v_error[0] / 2


def test_formats_by_torchs_names_and_scales_that_were_read(tmp_path: Path) -> None:
    model = tiny_llama("kvquant").eval()
    found = compared(model, prompt(1, CONTEXT), formats=[torch.int8, (torch.int8, "model")])
    rows = {row.cache: row.options for row in found.rows}
    assert rows["kvquant int8"] == {"kv_cache_dtype": "int8"}
    assert rows["kvquant int8 / model"] == {"kv_cache_dtype": ["int8", "model"]}
    scales = read_scales(write(tmp_path), model)
    asked = {"path": {"scales": tmp_path}, "read": {"scales": scales}, "config": KVQuantConfig(scales=scales)}
    found = compared(model, prompt(1, CONTEXT), formats=asked)
    assert quality(found, "path").steps == quality(found, "read").steps == quality(found, "config").steps


def test_attention_that_stores_a_format_of_its_own() -> None:
    """What is asked for comes first, `auto` too."""
    model = tiny_llama("kvquant_fp8").eval()
    asked = {"auto": {"kv_cache_dtype": "auto"}, "nothing": {}, "int8": {"kv_cache_dtype": "int8"}}
    found = compared(model, prompt(2, CONTEXT), formats=asked | {"fp8": {"kv_cache_dtype": "fp8"}})
    assert quality(found, "auto").k_error == quality(found, "int8").k_error
    assert quality(found, "nothing").k_error == quality(found, "fp8").k_error != quality(found, "int8").k_error
    options = {row.cache: row.options for row in found.rows}
    assert options["auto"] != options["nothing"] == options["fp8"]  # numbers of one are not taken for the other's


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 8, 9, 31, 33, 257, 1000, 1024])
def test_chunks(num_tokens: int) -> None:
    sizes = chunk_sizes(num_tokens)
    assert sum(sizes) == num_tokens
    assert all(size > 0 for size in sizes)
    assert max(sizes, default=0) <= 256


# -- rows that fail, runs that end -------------------------------------------------------------------------------------


def test_a_row_that_fails_is_a_row() -> None:
    rows = {row.cache: row for row in result().rows}
    assert list(rows)[: len(FORMATS) + 1] == [DENSE, *FORMATS]
    assert rows["too small"].quality is None
    assert rows["too small"].failed.startswith("OutOfPagesError: ")
    assert {"transformers fp8", "transformers quanto 4 bit", "transformers hqq 8 bit"} <= set(rows)
    if importlib.util.find_spec("hqq") is None:
        assert rows["transformers hqq 8 bit"].failed.startswith("ImportError: ")
    assert all((row.quality is None) == bool(row.failed) for row in rows.values())
    text = str(result())
    assert f"too small: not measured: {rows['too small'].failed}" in text
    assert len([line for line in text.splitlines() if line.startswith(DENSE)]) == 1


def test_a_model_that_fails_everywhere_leaves_its_state() -> None:
    model = tiny_llama().train()
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    found = compared(model, prompt(1, CONTEXT), formats=["int8"])
    assert all(row.quality is None for row in found.rows)
    assert found.rows[0].failed.startswith("ArithmeticError: ")
    assert str(found)
    assert model.training


def test_resume(tmp_path: Path) -> None:
    model, data, path = tiny_llama(), prompt(2, CONTEXT), tmp_path / "numbers.json"
    options = {"formats": {"one": FORMATS["int8"], "small": FORMATS["too small"], "two": FORMATS["fp8"]}, "save": path}

    def stop(row: ComparisonRow) -> None:
        if row.cache == "small":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compared(model, data, **options, on_row=stop)
    saved = json.loads(path.read_text())
    assert [row["cache"] for row in saved["rows"]] == [DENSE, "one", "small"]
    saved["rows"][1]["quality"]["clipped"] = [17, 0]  # to know it again
    path.write_text(json.dumps(saved))

    found = compared(model, data, **options)
    assert quality(found, "one").clipped == [17, 0]
    assert quality(found, "two").clipped == [0, 0]
    assert [row.cache for row in found.rows[:4]] == [DENSE, "one", "small", "two"]
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == found.to_dict()
    assert [ComparisonRow.from_dict(dataclasses.asdict(row)) for row in found.rows] == found.rows
    assert list(tmp_path.iterdir()) == [path]

    # A row of that name, made with other options, is another.
    again = compared(model, data, formats={"one": FORMATS["fp8"]}, save=path)
    assert quality(again, "one").clipped == [0, 0]


@pytest.mark.parametrize(
    ("what", "changed"), [("text", {"data": prompt(2, CONTEXT, seed=7)}), ("new_tokens", {"new_tokens": 7})]
)
def test_numbers_of_something_else_are_not_mixed_in(what: str, changed: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "numbers.json"
    options: dict[str, Any] = {"data": prompt(2, CONTEXT), "save": path}
    compared(tiny_llama(), **options)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"{path} holds a measurement that differs in {what}; name another"):
        compared(tiny_llama(), **{**options, **changed})
    with pytest.raises(ValueError, match="differs in weights"):
        compared(tiny_llama(seed=1), **options)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", ["", "[]", '{"rows": []}', '{"rows": [{"cache": "x"}], "setup": {}}'])
def test_a_file_that_is_no_comparison(content: str, tmp_path: Path) -> None:
    path = tmp_path / "numbers.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="is not a saved measurement"):
        compared(tiny_llama(), prompt(1, CONTEXT), save=path)
    assert path.read_text() == content


# -- what is measured beside quality -----------------------------------------------------------------------------------


def test_retrieval_and_speculation_are_parts_of_a_row(tmp_path: Path) -> None:
    """One that fails leaves the others; a run that is taken up again tries it again."""
    path, tokenizer = tmp_path / "numbers.json", AutoTokenizer.from_pretrained(TINY)
    model = tiny_llama("sdpa", vocab_size=len(tokenizer))
    formats = {"int8": FORMATS["int8"], "few pages": {"kv_cache_dtype": "int8", "num_pages": 4}}
    options = {"formats": formats, "tokenizer": tokenizer, "retrieval": [95], "speculation": True, "save": path}
    found = compared(model, **options)
    rows = {row.cache: row for row in found.rows}
    for name in (DENSE, "int8", "few pages"):
        assert rows[name].quality is not None
        assert [(each.drafts, each.place) for each in rows[name].acceptance] == [("prompt lookup", "target")]
    for name in (DENSE, "int8"):
        places = [(each.task, each.length, each.depth) for each in rows[name].retrieval]
        assert places == [(task, 95, depth) for task in TASKS for depth in DEPTHS]
    assert rows["few pages"].retrieval == []
    assert rows["few pages"].failed.startswith("retrieval: OutOfPagesError: ")
    text = str(found)
    assert f"few pages: not measured: {rows['few pages'].failed}" in text
    assert "needle, 95 tokens" in text
    assert "prompt lookup" in text

    saved = json.loads(path.read_text())
    saved["rows"][1]["retrieval"][0]["rank"] = 17.25  # to know it again
    saved["rows"][2]["acceptance"][0]["proposed"] = 171717
    path.write_text(json.dumps(saved))
    again = []
    compared(model, **options, on_row=again.append)
    assert again[1].retrieval[0].rank == 17.25
    assert again[1].acceptance == rows["int8"].acceptance
    assert again[2].acceptance[0].proposed == 171717
    assert again[2].failed == rows["few pages"].failed
    with pytest.raises(ValueError, match="differs in text, retrieval, speculation;"):
        compared(model, tokenizer=tokenizer, formats=formats, save=path)


def test_facts_are_hidden_in_all_of_the_data(tmp_path: Path) -> None:
    """Not in the windows alone, which are few; data that can be read only once will do."""
    path, tokenizer = tmp_path / "numbers.json", AutoTokenizer.from_pretrained(TINY)
    model = tiny_llama("sdpa", vocab_size=len(tokenizer))
    # The first two make a window; the last ones are too short for one.
    lines = [TEXT[:300], *(TEXT[start : start + 50] for start in range(300, 2000, 50))]
    options = {"tokenizer": tokenizer, "num_windows": 1, "retrieval": [301], "save": path}
    found = compared(model, iter(lines), **options)
    assert found.setup["windows"] == 1
    assert {each.length for each in found.rows[0].retrieval} == {301}
    with pytest.raises(ValueError, match="differs in text"):  # the window is the same
        compared(model, [*lines[:2], "another", *lines[2:]], **options)
    with pytest.raises(ValueError, match=r"retrieval over 301 tokens needs .*, and there are \d\d\d?; give more data"):
        compared(model, lines[:4], **options)


def test_an_assistant() -> None:
    model = tiny_llama("kvquant").train()
    assistant = tiny_llama("kvquant").train()
    found = compared(model, prompt(2, CONTEXT), formats=["model"], speculation=assistant)
    assert [each.place for each in found.rows[0].acceptance] == ["target", "both"]
    assert [each.place for each in found.rows[1].acceptance] == ["target", "target", "assistant", "both"]
    # It drafts what the model would say.
    assert all(each.accepted == each.proposed > 0 for each in found.rows[1].acceptance if each.drafts == "assistant")
    assert found.setup["speculation"]["weights"] == found.setup["weights"]
    assert model.training
    assert assistant.training


def test_a_failure_lets_go_of_its_memory() -> None:
    kept: list[Any] = []

    def fail() -> None:
        large = torch.zeros(17)
        kept.append(weakref.ref(large))
        raise torch.OutOfMemoryError("out of memory\nand how")

    assert attempt(fail) == (None, "OutOfMemoryError: out of memory")
    assert kept[0]() is None
    assert attempt(lambda: 17) == (17, "")

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attempt(interrupt)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "options", "says"),
    [
        ([], {}, "the data is empty"),
        (prompt(3, CONTEXT - 1), {}, f"longest text has {CONTEXT - 1} tokens, and windows are of context={CONTEXT}"),
        ("nowhere.txt", {}, "nowhere.txt is not a file"),
        (prompt(1, 17), {"context": 15}, "context: 15; it must be an integer of at least 16"),
        (prompt(1, 17), {"context": 1000}, "context: 1000; the model is made for 512 tokens"),
        (prompt(1, CONTEXT), {"new_tokens": 32}, "new_tokens=32; at most half of context=63"),
        (prompt(1, CONTEXT), {"steps": 63}, "steps=63; it must be less than context=63"),
        (prompt(1, CONTEXT), {"steps": 0}, "steps: 0; it must be an integer of at least 1"),
        (prompt(1, CONTEXT), {"num_windows": 0}, "num_windows: 0"),
        (prompt(1, CONTEXT), {"num_windows": True}, "num_windows: True"),
        (prompt(1, CONTEXT), {"retrieval": [63, 0]}, "retrieval: 0; it must be an integer of at least 16"),
        (prompt(1, CONTEXT), {"retrieval": [1000]}, "retrieval: 1000; the model is made for 512 tokens"),
        (prompt(1, CONTEXT), {"retrieval": [63]}, "text needs a tokenizer, and none is found beside the model"),
        (prompt(1, CONTEXT), {"speculation": tiny_llama(vocab_size=90)}, "the assistant has a vocabulary of 90 tokens"),
        (prompt(1, CONTEXT), {"formats": ["int9"]}, "unknown storage format 'int9'"),
        (prompt(1, CONTEXT), {"formats": {"x": {"kv_dtype": "int8"}}}, "unknown cache_config key.* kv_dtype"),
        (prompt(1, CONTEXT), {"formats": {DENSE: {}}}, "has a row anyway"),
        (prompt(1, CONTEXT), {"save": "/nowhere/at/all.json"}, "there is no directory"),
        ([{"inputs_embeds": torch.zeros(1, CONTEXT, 64)}], {}, "only inputs_embeds"),
    ],
)
def test_bad_input(data: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        compared(tiny_llama(), data, **options)


def test_wrong_types() -> None:
    with pytest.raises(TypeError, match=r"give a list such as \['int8'\]"):
        compared(tiny_llama(), prompt(1, CONTEXT), formats="int8")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"formats": None}, "formats=None; give a list such as"),
        ({"formats": {"x": "int8"}}, r"formats\['x'\]='int8'; give its options, such as"),
        ({"retrieval": 64}, r"retrieval=64; give a list, such as \[64\]"),
        ({"speculation": "assistant"}, "str is no transformers model"),
    ]
    for options, message in wrong:
        with pytest.raises(TypeError, match=message):
            compared(tiny_llama(), prompt(1, CONTEXT), **options)
    with pytest.raises(TypeError, match="data of type int"):
        compared(tiny_llama(), 17)
    encoder_decoder = T5ForConditionalGeneration(
        T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    )
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is not a causal language model"):
        compared(encoder_decoder, prompt(1, CONTEXT))


def test_padding_is_not_read_and_fewer_windows_are_said() -> None:
    ids = prompt(2, CONTEXT + 4)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    mask[1, :5] = 0  # one token short of a window
    model = tiny_llama()
    padded = compared(model, [{"input_ids": ids, "attention_mask": mask}])
    assert padded.setup["windows"] == 1
    assert padded.notes == ["only 1 of the 2 windows asked for: there is no more data"]
    assert quality(padded, DENSE) == quality(compared(model, ids[:1, 4:]), DENSE)


# -- the command -------------------------------------------------------------------------------------------------------


def test_eval(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    data, path = tmp_path / "text.txt", tmp_path / "numbers.json"
    data.write_text(TEXT[:2000], encoding="utf-8")
    arguments = ["eval", str(TINY), "--data", str(data), "--formats", "int8", "fp8,int8", "--save", str(path),
                 "--retrieval", "47", "--speculation", "--steps", "5",
                 "--context", "63", "--num-windows", "1", "--new-tokens", "7", "--device", "cpu"]  # fmt: skip
    assert main(arguments) == 0
    captured = capsys.readouterr()
    saved = json.loads(path.read_text())
    rows = saved["rows"]
    assert saved["setup"]["steps"] == 5
    assert [row["cache"] for row in rows[:3]] == [DENSE, "kvquant int8", "kvquant fp8 / int8"]
    for row in rows[:3]:
        assert f"\n{row['cache']}  " in captured.out or captured.out.startswith(f"cache  {row['cache']}")
        assert f"{row['cache']}: done" in captured.err
        assert f"{row['quality']['steps']['perplexity']:.4f}" in captured.out
        assert {found["length"] for found in row["retrieval"]} == {47}
        assert [found["drafts"] for found in row["acceptance"]] == ["prompt lookup"]
    assert main([*arguments[:-6], "--context", "1000", "--new-tokens", "7", "--device", "cpu"]) == 1
    assert "hf-kvquant: the data is shorter than the context" in capsys.readouterr().err
    data.write_text("")
    assert main(arguments) == 1
    assert "hf-kvquant: the data is empty\n" in capsys.readouterr().err
