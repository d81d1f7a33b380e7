"""On a GPU: steps of continuous batching say as recorded what they say one by one, and what `generate` says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from batches import NUM_NEW, OPTIONS, PROMPTS, UNQUANTIZED, batched, build, known, lossless

pytestmark = [pytest.mark.gpu, known]

WAYS: dict[str, Any] = {"model": UNQUANTIZED, **OPTIONS}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("kind", ["llama", "window17", "gemma3", "softcap", "sinks"])
def test_recorded_steps(kind: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    """Four requests, so that products are of the same shapes with and without graphs."""
    model = build(kind).cuda().to(dtype)
    plain, recorded = (batched(model, options, PROMPTS[1:], use_cuda_graph=asked) for asked in (False, True))
    assert plain == recorded
    assert all(len(tokens) == NUM_NEW for tokens in recorded)


@pytest.mark.parametrize("kind", ["llama", "window17", "gemma3", "softcap", "sinks"])
def test_padding(kind: str) -> None:
    """Of five requests, to eight; their tokens are the model's own, on a CPU."""
    assert batched(build(kind).cuda(), UNQUANTIZED, use_cuda_graph=True) == lossless(kind)
