"""On a GPU: steps of continuous batching say as recorded what they say one by one, and what `generate` says."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from batches import (
    INT8,
    NUM_NEW,
    OPTIONS,
    PROMPTS,
    UNQUANTIZED,
    all_alone,
    batched,
    build,
    collect,
    kept,
    known,
    lossless,
    running,
    tokens_of,
)

pytestmark = [pytest.mark.gpu, known]

WAYS: dict[str, Any] = {"model": UNQUANTIZED, **OPTIONS}
KINDS = ["llama", "window17", "gemma3", "softcap", "sinks"]


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often each graph was played."""
    counts: Counter[int] = Counter()
    replay = torch.cuda.CUDAGraph.replay

    def counted(graph: Any) -> None:
        counts[id(graph)] += 1
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)
    return counts


def on_gpu(kind: str, dtype: torch.dtype = torch.float32, experts: str = "batched_mm") -> Any:
    """A model; as they are by default its experts read numbers from the device for most dtypes."""
    model = build(kind).cuda().to(dtype)
    if kind == "sinks":
        model.set_experts_implementation(experts)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_recorded_steps(kind: str, options: dict[str, Any], dtype: torch.dtype, replays: Counter[int]) -> None:
    """Four requests, so that products are of the same shapes with and without graphs."""
    model = on_gpu(kind, dtype)
    plain = batched(model, options, PROMPTS[1:], use_cuda_graph=False)
    assert not replays
    recorded = batched(model, options, PROMPTS[1:], use_cuda_graph=True)
    assert replays.total() >= NUM_NEW - 3
    assert plain == recorded
    assert all(len(tokens) == NUM_NEW for tokens in recorded)


@pytest.mark.parametrize("kind", KINDS)
def test_padding(kind: str, replays: Counter[int]) -> None:
    """Of five requests, to eight; their tokens are the model's own, on a CPU."""
    found = batched(on_gpu(kind), UNQUANTIZED, use_cuda_graph=True, max_requests_per_batch=8)
    assert found == lossless(kind)
    assert replays.total() >= NUM_NEW - 3


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_requests_that_end_leave_rows_to_padding(kind: str, replays: Counter[int]) -> None:
    """Graphs for 8, 4, 2 and 1; tokens are those of a CPU."""
    lengths, batching = [4, 8, 12, 16, 20], {"use_cuda_graph": True, "max_requests_per_batch": 8}
    with running(on_gpu(kind), UNQUANTIZED, max_new_tokens=20, **batching) as manager:
        for text, length in zip(PROMPTS, lengths, strict=True):
            manager.add_request(text, max_new_tokens=length)
        results = collect(manager, len(PROMPTS))
    expected = all_alone(build(kind), UNQUANTIZED, max_new_tokens=20)
    found = tokens_of(sorted(results.values(), key=lambda result: len(result.generated_tokens)))
    assert found == [tokens[:length] for tokens, length in zip(expected, lengths, strict=True)]
    assert len(replays) == 4


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_requests_that_outgrow_a_table(kind: str, monkeypatch: pytest.MonkeyPatch, replays: Counter[int]) -> None:
    """Of 16, 32 and 64 tokens, each with a graph of its own."""
    monkeypatch.setattr("hf_kvquant.batching.cache._FEWEST_RECORDED", 16)
    model, generation = on_gpu(kind), {"max_new_tokens": 40}
    plain, recorded = (
        batched(model, INT8, [PROMPTS[1][:3]], generation, use_cuda_graph=asked, max_requests_per_batch=1)
        for asked in (False, True)
    )
    assert plain == recorded
    assert len(replays) == 3


def test_a_manager_that_is_kept(replays: Counter[int]) -> None:
    """It keeps its graphs, in inference mode and out of it."""
    with kept(on_gpu("gemma3"), UNQUANTIZED) as session:
        assert session(PROMPTS) == lossless("gemma3")
        with torch.inference_mode():
            assert session(PROMPTS) == lossless("gemma3")
        assert session(PROMPTS) == lossless("gemma3")
    assert replays.total() >= 3 * (NUM_NEW - 3)
    assert len(replays) <= 4


def test_a_model_that_cannot_be_recorded(replays: Counter[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """As its experts look for their tokens; its steps run as they are, and other models are recorded after it."""
    warned: list[str] = []
    monkeypatch.setattr("hf_kvquant.batching.graphs.logger.warning_once", warned.append)
    model = on_gpu("sinks", experts="eager")
    plain, unrecorded = (batched(model, INT8, PROMPTS[1:], use_cuda_graph=asked) for asked in (False, True))
    assert plain == unrecorded
    assert len(warned) == 1
    assert not replays
    assert batched(on_gpu("llama"), UNQUANTIZED, use_cuda_graph=True) == lossless("llama")
    assert replays
