"""On a GPU: `read_pages` gives the numbers of the reference, and many new tokens attend over what it reads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import QUANTIZED
from test_gpu_models import model_of
from test_ops import KINDS, empty_side, on, random_scales

from hf_kvquant import QuantizedPagedCache, dense
from hf_kvquant.formats import get_format
from hf_kvquant.ops import read_pages, reference

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 112, 128, 256])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", QUANTIZED)
def test_read(name: str, kind: str, head_dim: int) -> None:
    """All codes but NaN; pages in any order and more than once."""
    rng, num_heads = np.random.default_rng(0), 3
    dynamic = kind in ("dynamic", "equalized")
    fields = random_scales(rng, kind, num_heads, head_dim, 0.05)
    side = empty_side(name, 11, num_heads, 16, head_dim, dynamic=dynamic, **fields)
    decoded = get_format(name).decode(torch.arange(256, dtype=torch.uint8))
    codes = decoded.isfinite().nonzero().flatten().numpy()
    side.pages.copy_(torch.from_numpy(rng.choice(codes, side.pages.shape).astype(np.uint8)))
    if side.token_scale is not None:
        side.token_scale.copy_(torch.from_numpy(rng.uniform(0.001, 2.0, side.token_scale.shape)))
    page_ids = torch.from_numpy(rng.integers(0, 11, (2, 7)).astype(np.int64))
    expected = reference.read_pages(
        page_ids, side.pages, side.format, side.scale, side.zero, side.token_scale, torch.float32
    )
    for dtype, eps in ((torch.float32, 2.0**-22), (torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-10)):
        got = read_pages(on(side, "cuda"), page_ids.cuda(), dtype).cpu().float()
        inside = expected.abs() < torch.finfo(dtype).max
        assert got.shape == expected.shape
        # A product and a sum rounded once or twice: relative to the larger of what is added.
        largest = expected.abs() + (0 if side.zero is None else side.zero.abs().max())
        floor = 2.0**-24 if dtype == torch.float16 else 0.0  # numbers below its normal range
        assert ((got - expected).abs() <= eps * largest + floor)[inside].all()


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_a_long_turn_is_what_the_kernel_gives(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ways to attend to the same pages: their outputs differ by the rounding of bf16."""
    model = model_of(64).cuda().to(torch.bfloat16)
    ids = torch.randint(3, 90, (2, 300), device="cuda")

    def logits() -> torch.Tensor:
        cache = QuantizedPagedCache.from_model(model, kv_cache_dtype=kind)
        with torch.no_grad():
            model(ids[:, :171], past_key_values=cache)
            return model(ids[:, 171:], past_key_values=cache).logits.double()

    long = logits()
    monkeypatch.setattr(dense, "_LONG_TURN", 1 << 30)
    other = logits()
    # Two layers, each rounding attention's output and what follows to 8 bits a few times.
    assert (long - other).norm() <= 8 * 2.0**-8 * other.norm()
