"""Steps of continuous batching that are recorded: played again, they say what the steps themselves say."""

from __future__ import annotations

from itertools import product
from random import Random
from typing import Any

import pytest
import torch
from batches import (
    INT8,
    KINDS,
    NUM_NEW,
    OPTIONS,
    PROMPTS,
    STATIC,
    UNQUANTIZED,
    all_alone,
    batched,
    build,
    collect,
    kept,
    known,
    lossless,
    poison,
    running,
    tokens_of,
)
from recording import Recording, record_instead

from hf_kvquant import LayerScales
from hf_kvquant.batching.step import Group, Request
from hf_kvquant.batching.tables import DecodeTables

pytestmark = known

# Most numbers clip.
_SHIFTED = LayerScales(torch.tensor([0.004]), torch.tensor([0.003, 0.005]), k_zero=torch.tensor([0.75, -0.75]))
CLIPPING: dict[str, dict[str, Any]] = {
    "fp8": {"kv_cache_dtype": "fp8", "scales": LayerScales(torch.tensor([0.0005]), torch.tensor([0.0004]))},
    "int8-zeros": {"kv_cache_dtype": "int8", "scales": _SHIFTED},
}


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[Recording]:
    return record_instead(monkeypatch)


def with_padding(kind: str, factor: float) -> Any:
    """A model in which padding, which is tokens of id 0, is so many times as large as the next token."""
    model = build(kind)
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        weight[0] = weight[1] * factor
    return model


def recorded(model: Any, options: Any = None, **batching: Any) -> list[list[int]]:
    """With recordings for 1, 2, 4 and 8 requests, so that there is padding."""
    return batched(model, options, **{"use_cuda_graph": True, "max_requests_per_batch": 8, **batching})


def test_what_is_recorded_is_computed_later() -> None:
    """And takes nothing from the host: the recordings of these tests are as strict as a GPU's."""
    x, total = torch.ones(3), torch.zeros(3)
    with Recording() as recording:
        doubled = x * 2
        total += doubled
    assert total.tolist() == [0, 0, 0]
    assert doubled.isnan().all()
    x += 1
    recording.replay()
    assert total.tolist() == [4, 4, 4]
    with pytest.raises(RuntimeError, match="reads"), Recording():
        x.sum().item()


def test_tables_know_what_is_in_them() -> None:
    """Filled again and again they are as new ones: requests come, grow, change places and leave."""
    groups, random = [Group("full", 4, 6), Group("sliding", 4, 2, window=10)], Random(0)
    spare = {"full": 7, "sliding": 9}

    def new_tables() -> DecodeTables:
        return DecodeTables(groups, spare, num_rows=8, num_columns=16, device=torch.device("cpu"))

    tables, requests = new_tables(), []
    for _ in range(200):
        requests = random.sample(requests, random.randint(0, len(requests)) if random.random() < 0.2 else len(requests))
        if len(requests) < 8:
            requests.append(Request(random.randrange(40), 1, {group.name: [] for group in groups}))
        requests = [request._replace(past=request.past + 1) for request in requests if request.past < 60]
        for request, group in product(requests, groups):
            blocks, needed = request.blocks[group.name], request.past // 4 + 1
            needed = needed if group.num_columns is None else min(needed, group.num_columns)
            blocks += [random.randrange(100) for _ in range(needed - len(blocks))]
        expected = new_tables()
        for each in (tables, expected):
            each.fill(requests)
        for group in groups:
            found, new = tables.places[group.name], expected.places[group.name]
            for field in ("pages", "lengths", "is_padding"):
                assert torch.equal(getattr(found, field), getattr(new, field))
            counts = [len(request.blocks[group.name]) for request in requests] + [1] * (8 - len(requests))
            for row, new_row, count in zip(found.parts[0].page_table, new.parts[0].page_table, counts, strict=True):
                assert torch.equal(row[:count], new_row[:count])
            assert set(found.pages[len(requests) :, 0].tolist()) <= {spare[group.name] * group.stride}


@pytest.mark.parametrize("page_size", [4, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_equal_the_models_own(kind: str, page_size: int, recordings: list[Recording]) -> None:
    """Five requests, so that three rows are padding."""
    assert recorded(build(kind), UNQUANTIZED, page_size=page_size, num_blocks=256) == lossless(kind)
    assert sum(recording.num_replays for recording in recordings) >= NUM_NEW - 3


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", ["llama", "gemma3", "sinks"])
def test_tokens_equal_those_of_generate(kind: str, options: dict[str, Any], recordings: list[Recording]) -> None:
    model = build(kind)
    assert recorded(model, options) == all_alone(model, options)
    assert recordings


def test_requests_that_end_leave_rows_to_padding(recordings: list[Recording]) -> None:
    """One graph for 5 to 8 requests, then those for 4, for 2 and for 1; each begins where the last one ended."""
    model = build("gemma3")
    lengths = [4, 8, 12, 16, 20]
    batching = {"use_cuda_graph": True, "max_requests_per_batch": 8}
    with running(model, UNQUANTIZED, max_new_tokens=20, **batching) as manager:
        for text, length in zip(PROMPTS, lengths, strict=True):
            manager.add_request(text, max_new_tokens=length)
        results = collect(manager, len(PROMPTS))
    expected = all_alone(model, UNQUANTIZED, max_new_tokens=20)
    found = tokens_of(sorted(results.values(), key=lambda result: len(result.generated_tokens)))
    assert found == [tokens[:length] for tokens, length in zip(expected, lengths, strict=True)]
    assert len(recordings) == 4
    assert all(recording.num_replays for recording in recordings)


def test_requests_that_outgrow_a_table(monkeypatch: pytest.MonkeyPatch, recordings: list[Recording]) -> None:
    """Other tables have other graphs, of which a short request finds the small one again."""
    monkeypatch.setattr("hf_kvquant.batching.cache._FEWEST_RECORDED", 16)
    model = build("llama")
    prompts = [PROMPTS[1], PROMPTS[1][:3]]
    expected = all_alone(model, INT8, prompts, max_new_tokens=40)
    options = {"generation": {"max_new_tokens": 40}, "max_requests_per_batch": 1}
    found = [recorded(model, INT8, prompts=[text], **options)[0] for text in prompts]
    assert found == expected
    assert len(recordings) == 6  # tables for 16, 32 and 64 tokens, of two managers


def test_only_so_many_sizes_are_kept(monkeypatch: pytest.MonkeyPatch, recordings: list[Recording]) -> None:
    """Those used last; others are recorded anew."""
    monkeypatch.setattr("hf_kvquant.batching.cache._MOST_TABLES", 2)
    model = build("gemma3")
    expected = all_alone(model, INT8)
    with kept(model, INT8, warmup=False) as session:
        for _ in range(2):
            assert session(PROMPTS) == expected
            assert session(PROMPTS[:1]) == expected[:1]
            assert session(PROMPTS[:2]) == expected[:2]
            assert sum(recording.is_kept for recording in recordings) == 2
    assert len(recordings) == 6


def test_tables_fit_into_the_memory(monkeypatch: pytest.MonkeyPatch, recordings: list[Recording]) -> None:
    """Of as many requests as there may be, one of which has all pages."""
    from transformers.generation.continuous_batching import cache as host

    available, most = 2**26, 1024
    monkeypatch.setattr(host, "get_device_and_memory_breakdown", lambda: (torch.device("cpu"), available, 0, 0))
    options = {"num_blocks": None, "max_batch_tokens": most, "max_memory_percent": 1.0, "max_requests_per_batch": most}
    with running(build("llama", head_dim=128).bfloat16(), INT8, use_cuda_graph=True, **options) as manager:
        cache = manager.batch_processor.cache
        num_bytes = cache.nbytes_allocated + most * cache.num_blocks * torch.int32.itemsize
    assert 0.9 * available < num_bytes <= available


@pytest.mark.parametrize("options", CLIPPING.values(), ids=CLIPPING)
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_padding_is_not_counted(kind: str, options: dict[str, Any], recordings: list[Recording]) -> None:
    """What clips is counted as without recordings, and not what was made up to have them."""
    counts, batching = [], {"allow_block_sharing": False, "max_requests_per_batch": 8}
    for use_graphs in (False, True):
        with running(with_padding(kind, 1), options, use_cuda_graph=use_graphs, **batching) as manager:
            manager.add_requests(PROMPTS)
            collect(manager, len(PROMPTS))
            counts.append([row.clipped for row in manager.batch_processor.cache.report().layers])
    assert recordings[-1].num_replays
    assert min(min(row) for row in counts[0]) > 0
    assert counts[0] == counts[1]


@pytest.mark.parametrize("kind", ["llama", "window17", "gemma3", "sinks"])
@pytest.mark.parametrize("options", [UNQUANTIZED, INT8, STATIC], ids=["model", "int8", "fp8"])
def test_what_lay_in_the_memory_before(options: dict[str, Any], kind: str, recordings: list[Recording]) -> None:
    """Prompts in chunks among requests that decode; pages are copied for a second answer."""
    model = build(kind)
    batching = {"page_size": 4, "max_batch_tokens": 64, "num_blocks": 300, "use_cuda_graph": True}
    found = []
    for before in (lambda cache: None, poison):
        with running(model, options, before, 2, **batching) as manager:
            manager.add_requests(PROMPTS[1:])
            results = collect(manager, 2 * len(PROMPTS[1:]))
        found.append(tokens_of([results[name] for name in sorted(results)]))
    assert found[0] == found[1]
    assert recordings


@pytest.mark.parametrize("scales", ["dynamic", "first_batch"])
def test_scales_that_come_with_the_first_tokens(scales: str, recordings: list[Recording]) -> None:
    """Nothing is recorded before scales are known, and padding has no say in them; prompts here are of one token."""
    options = {"kv_cache_dtype": "int8", "scales": scales, "equalize": scales == "dynamic"}
    prompts = [[5], [6], [7]]
    found = []
    for use_graphs in (False, True):
        # Without a norm before them keys and values are as large as what is embedded.
        model = with_padding("llama", 50)
        for layer in model.model.layers:
            layer.input_layernorm = torch.nn.Identity()
        found.append(batched(model, options, prompts, use_cuda_graph=use_graphs))
    assert found[0] == found[1]
    assert recordings


def test_a_manager_that_is_kept_keeps_its_recordings(recordings: list[Recording]) -> None:
    model = build("gemma3")
    with kept(model, INT8) as session:
        assert session(PROMPTS) == session(PROMPTS) == all_alone(model, INT8)
    assert len(recordings) == 4  # before the first request
    assert recordings[-1].num_replays >= 2 * (NUM_NEW - 3)


def test_sessions_in_and_out_of_inference_mode(recordings: list[Recording]) -> None:
    """Recorded in one of them, played in the other."""
    model = build("llama")
    expected = all_alone(model, INT8)
    with kept(model, INT8, warmup=False) as session:
        assert session(PROMPTS[:1]) == expected[:1]
        with torch.inference_mode():
            assert session(PROMPTS[1:]) == expected[1:]
        assert session(PROMPTS[1:]) == expected[1:]
    assert len(recordings) == 2


@pytest.mark.parametrize("options", [INT8, STATIC], ids=["int8", "fp8"])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_model_that_cannot_be_recorded(
    kind: str, options: dict[str, Any], recordings: list[Recording], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it looks at a number in every step; all of them run as they are, also that which was to be recorded."""
    warned: list[str] = []
    monkeypatch.setattr("hf_kvquant.batching.graphs.logger.warning_once", warned.append)
    model = build(kind)
    model.model.layers[-1].register_forward_hook(lambda module, args, output: output.sum().item() and None)
    with running(model, options, use_cuda_graph=True) as manager:
        names = manager.add_requests(PROMPTS)
        results = collect(manager, len(PROMPTS))
    assert tokens_of([results[name] for name in names]) == all_alone(model, options)
    assert len(recordings) == 1
    assert not recordings[0].num_replays
    assert len(warned) == 1
    assert "_local_scalar_dense" in warned[0]


def test_a_step_that_fails_fails(recordings: list[Recording], monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it is recorded, and then it is not about recording."""
    warned: list[str] = []
    monkeypatch.setattr("hf_kvquant.batching.graphs.logger.warning_once", warned.append)
    model = build("llama")

    def fail(module: Any, args: Any, output: torch.Tensor) -> None:
        if output.shape[1] == 8:
            raise RuntimeError("no more")

    model.model.layers[-1].register_forward_hook(fail)
    with running(model, INT8, use_cuda_graph=True, max_requests_per_batch=8) as manager:
        manager.add_requests(PROMPTS)
        results = collect(manager, len(PROMPTS))
    assert {result.error for result in results.values()} == {"no more"}
    assert len(recordings) == 3  # of 1, 2 and 4
    assert not warned


@pytest.mark.parametrize("asked", [None, False, (True, False)])
def test_nothing_is_recorded_unless_it_is_asked_for(asked: Any, recordings: list[Recording]) -> None:
    model = build("llama")
    assert batched(model, INT8, use_cuda_graph=asked) == all_alone(model, INT8)
    assert not recordings


def test_a_device_without_graphs() -> None:
    model = build("llama")
    assert recorded(model, INT8) == all_alone(model, INT8)


def test_transformers_own_runner_for_other_attention(recordings: list[Recording]) -> None:
    """Which records, too, here, over its own cache."""
    assert batched(build("llama", "sdpa"), use_cuda_graph=True, max_batch_tokens=64) == lossless("llama")
    assert recordings
