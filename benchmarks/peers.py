"""Attention of others over contiguous bf16 keys and values, and over their own pages where they are installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from .results import NotInstalled

Call = Callable[[], torch.Tensor]
sdpa = torch.nn.functional.scaled_dot_product_attention


def sdpa_decode(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Call:
    """What a torch user writes: grouped heads left to SDPA. `[B, Hq, 1, D]`, `[B, H, L, D]`."""
    return lambda: sdpa(query, key, value, enable_gqa=True)


def sdpa_packed(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Call:
    """The query heads of a group as rows of one head, so that K and V are read once."""
    batch, _, _, head_dim = query.shape
    packed = query.reshape(batch, key.shape[1], -1, head_dim)
    return lambda: sdpa(packed, key, value)


def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()  # after a few shapes it would no longer compile for another
    return torch.compile(flex_attention, dynamic=False)


def flex_decode(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Call:
    """FlexAttention, compiled for the shape."""
    if query.device.type == "cpu":
        raise NotInstalled("FlexAttention is measured on GPUs only")
    query, flex = query.contiguous(), _compiled_flex()
    return lambda: flex(query, key, value, enable_gqa=True)


def flex_prefill(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Call:
    """FlexAttention over a past, causal, compiled for the shape."""
    if query.device.type == "cpu":
        raise NotInstalled("FlexAttention is measured on GPUs only")
    from torch.nn.attention.flex_attention import create_block_mask

    query, flex = query.contiguous(), _compiled_flex()
    past = key.shape[2] - query.shape[2]
    mask = create_block_mask(
        lambda b, h, q, kv: kv <= q + past, None, None, query.shape[2], key.shape[2], device=query.device
    )
    return lambda: flex(query, key, value, block_mask=mask, enable_gqa=True)


def flashinfer_decode(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dtype: torch.dtype) -> Call:
    """FlashInfer's batch decode over pages of 16 tokens in `dtype`. Raises NotInstalled without the package."""
    if importlib.util.find_spec("flashinfer") is None:
        raise NotInstalled("flashinfer is not installed")
    import flashinfer

    batch, num_kv_heads, length, head_dim = key.shape
    device, page_size = key.device, 16
    columns = length // page_size
    pages = torch.stack([key, value], dim=2)  # [B, H, 2, L, D]
    pages = pages.view(batch, num_kv_heads, 2, columns, page_size, head_dim).permute(0, 3, 2, 1, 4, 5)
    pages = pages.reshape(batch * columns, 2, num_kv_heads, page_size, head_dim).to(dtype).contiguous()
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(512 << 20, dtype=torch.uint8, device=device), kv_layout="HND", use_tensor_cores=True
    )
    wrapper.plan(
        torch.arange(batch + 1, dtype=torch.int32, device=device) * columns,
        torch.randperm(batch * columns, device=device).to(torch.int32),
        torch.full((batch,), page_size, dtype=torch.int32, device=device),
        query.shape[1], num_kv_heads, head_dim, page_size, q_data_type=query.dtype, kv_data_type=dtype,
    )  # fmt: skip
    rows = query[:, :, 0].contiguous()
    return lambda: wrapper.run(rows, pages)


def vllm_decode(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dtype: torch.dtype) -> Call:
    """vLLM's Triton decode kernel. Raises NotInstalled without the package."""
    if importlib.util.find_spec("vllm") is None:
        raise NotInstalled("vllm is not installed")
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    batch, num_kv_heads, length, head_dim = key.shape
    num_q_heads, device, page_size = query.shape[1], key.device, 32
    columns = length // page_size
    shape = (batch * columns, page_size, num_kv_heads, head_dim)
    k_pages, v_pages = (x.transpose(1, 2).reshape(shape).to(dtype).contiguous() for x in (key, value))
    table = torch.randperm(batch * columns, device=device).to(torch.int32).view(batch, columns)
    rows = query[:, :, 0].contiguous()
    out = torch.empty_like(rows)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=device)
    lengths = torch.full((batch,), length, dtype=torch.int32, device=device)
    one = torch.ones(batch, num_kv_heads, device=device)
    # As vLLM itself splits short batches.
    splits, most_split = 16, 128 // num_kv_heads
    sizes = (most_split, num_q_heads, splits)
    partial = torch.empty(*sizes, head_dim, device=device)
    highest, total = (torch.empty(sizes, device=device) for _ in range(2))

    def call() -> torch.Tensor:
        unified_attention(
            q=rows, k=k_pages, v=v_pages, out=out, cu_seqlens_q=starts, max_seqlen_q=1, seqused_k=lengths,
            max_seqlen_k=length, softmax_scale=head_dim**-0.5, causal=True, window_size=(-1, -1), block_table=table,
            softcap=0, q_descale=None, k_descale=one, v_descale=one, seq_threshold_3D=most_split,
            num_par_softmax_segments=splits, softmax_segm_output=partial, softmax_segm_max=highest,
            softmax_segm_expsum=total,
        )  # fmt: skip
        return out

    return call


def sdpa_prefill(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> dict[str, Call]:
    """The ways to have SDPA attend causally over a past, by name; K and V of the heads repeated beforehand where said.

    Masks are aligned to the end: the last query sees every key.
    """
    group = query.shape[1] // key.shape[1]
    num_tokens, length = query.shape[2], key.shape[2]
    query = query.contiguous()
    bias = causal_lower_right(num_tokens, length)
    calls: dict[str, Call] = {"lower_right, enable_gqa": lambda: sdpa(query, key, value, bias, enable_gqa=True)}
    if group > 1:
        keys, values = (x.repeat_interleave(group, dim=1) for x in (key, value))
        calls["lower_right, repeated"] = lambda: sdpa(query, keys, values, bias)
    if num_tokens == length:
        calls["is_causal, enable_gqa"] = lambda: sdpa(query, key, value, is_causal=True, enable_gqa=True)

        def cudnn() -> torch.Tensor:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return sdpa(query, key, value, is_causal=True, enable_gqa=True)

        if query.device.type == "cuda":
            calls["is_causal, cuDNN"] = cudnn
    return calls


def attends_to_all(call: Call, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether a causal result is aligned to the end, judged by its first and last token in float32."""
    num_tokens, length = query.shape[2], key.shape[2]
    got = call()[:1]
    group = query.shape[1] // key.shape[1]
    for token in (0, num_tokens - 1):
        seen = length - num_tokens + token + 1
        keys, values = (x[:1, :, :seen].float().repeat_interleave(group, dim=1) for x in (key, value))
        expected = sdpa(query[:1, :, token : token + 1].float(), keys, values)
        error = (got[:, :, token : token + 1].float() - expected).norm() / expected.norm()
        if not error < 2.0**-5:  # bf16 rounds to 2**-9; another alignment is wrong by its whole size
            return False
    return True
