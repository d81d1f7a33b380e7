"""What the compiler makes of our decode kernel and of published ones over 8-bit pages: no GPU is needed.

    python -m benchmarks.published                      # ours
    python -m benchmarks.published --vllm FILE --lmdeploy FILE --sglang FILE

FILE is, of a checkout or an installed package:

- vLLM 0.33: vllm/v1/attention/ops/triton_unified_attention.py, with triton_attention_helpers.py beside it;
- LMDeploy of August 2026: lmdeploy/pytorch/kernels/cuda/pagedattention.py;
- SGLang 0.5.23: sglang/kernels/ops/attention/decode_attention.py.

Nothing else of theirs is needed: what they import of their own packages is replaced. Their launchers are called, with
tensors of the layouts and types that they would get, so tiles, warps, stages and splits are their choice: 8 sequences
of 32k tokens, 32 query heads over 8 key/value heads, 128 channels, queries in bf16.

"loop" is how many instructions its loop over tiles has, "a number" those of all threads for one number of K or V,
"bits" how wide K and V are loaded, "bytes" how many accesses of a thread to shared memory are of one byte. "splits" and
"us" are for an H200; "us" is the estimate of `benchmarks.estimate`, and in brackets, where copies do not run ahead of
what is computed, what it would be if they did. Its constants were found by measuring our kernel.
"""

from __future__ import annotations

import argparse
import collections
import enum
import functools
import importlib.util
import itertools
import logging
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton.compiler.errors import CompilationError

from benchmarks.estimate import Call, estimate, of_code

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from kernel_compiler import DEVICES, Shape, buffers, compile_attention, compiling, disassemble, empty  # noqa: E402

BATCH, CONTEXT, Q_HEADS, KV_HEADS, HEAD_DIM = 8, 32768, 32, 8, 128
BF16, FP32, E4M3 = torch.bfloat16, torch.float32, torch.float8_e4m3fn
COLUMNS = (
    "kernel", "tokens x warps x stages", "registers", "spills", "shared", "programs", "loop", "a number", "bits",
    "bytes", "splits", "us",
)  # fmt: skip
ints = functools.partial(empty, dtype=torch.int32)
query = functools.partial(empty, BATCH, Q_HEADS, HEAD_DIM, dtype=BF16)


def call_vllm(module: ModuleType, mode: str, dtype: torch.dtype, query_dtype: torch.dtype = BF16) -> None:
    """As its v1/attention/backends/triton_attn.py: a token's K and V are one row, each with its scale behind it."""
    by_token, pages, one = mode.endswith("HEAD"), BATCH * CONTEXT // 16, empty(1, dtype=FP32)
    row = HEAD_DIM + 4 * by_token
    k, v = empty(pages, KV_HEADS, 16, 2 * row, dtype=dtype).transpose(1, 2).split(row, dim=-1)
    words = empty(pages, KV_HEADS, 16, row // 2, dtype=FP32).transpose(1, 2)
    parts = 128 // KV_HEADS, Q_HEADS, 16  # the most sequences that are split, heads, segments
    module.unified_attention(
        q=query(dtype=query_dtype), k=k, v=v, out=query(), cu_seqlens_q=ints(BATCH + 1), max_seqlen_q=1,
        seqused_k=ints(BATCH), max_seqlen_k=CONTEXT, softmax_scale=0.1, causal=True, window_size=(-1, -1),
        block_table=ints(BATCH, CONTEXT // 16), softcap=0, q_descale=one if query_dtype == E4M3 else None,
        k_descale=None if by_token else one, v_descale=None if by_token else one,
        k_scale_cache=words[..., HEAD_DIM // 4] if by_token else None,
        v_scale_cache=words[..., (row + HEAD_DIM) // 4] if by_token else None,
        kv_quant_mode=module.KVQuantMode[mode], seq_threshold_3D=parts[0], num_par_softmax_segments=parts[2],
        softmax_segm_output=empty(*parts, HEAD_DIM, dtype=FP32),
        softmax_segm_max=empty(*parts, dtype=FP32), softmax_segm_expsum=empty(*parts, dtype=FP32),
    )  # fmt: skip


def call_lmdeploy(module: ModuleType, policy: str, dtype: torch.dtype) -> None:
    """As its pytorch/backends/cuda/attention/default.py, with pages of 64 tokens; a token has scales and zeros."""
    size = BATCH * CONTEXT // 64, 64, KV_HEADS
    scales = empty(*size, 2, dtype=BF16) if policy == "INT8" else empty(1, dtype=FP32)
    module.flash_attn_with_kvcache(
        query(), *(empty(*size, HEAD_DIM, dtype=dtype) for _ in "kv"),
        cache_seqlens=ints(BATCH), page_table=ints(BATCH, CONTEXT // 64), max_seqlen_q=1, softmax_scale=0.1,
        quant_policy=module.QuantPolicy[policy], k_scales_zeros=scales, v_scales_zeros=scales,
    )  # fmt: skip


def call_sglang(module: ModuleType) -> None:
    """As its srt/layers/attention/triton_backend.py, with pages of one token and 8 splits."""
    partial, slots = empty(BATCH, Q_HEADS, 8, HEAD_DIM, dtype=FP32), empty(BATCH * CONTEXT, dtype=torch.int64)
    module.decode_attention_fwd(
        query(), *(empty(BATCH * CONTEXT, KV_HEADS, HEAD_DIM, dtype=E4M3) for _ in "kv"), query(),
        ints(BATCH + 1), slots, partial, empty(BATCH, Q_HEADS, 8, dtype=FP32), ints(BATCH),
        max_kv_splits=8, sm_scale=0.1, k_scale=1.0, v_scale=1.0,
    )  # fmt: skip


@dataclass(frozen=True)
class Project:
    """A published kernel in `module`, the one that merges its splits, its constant with the tokens of a tile, and the
    dimension of its grid that splits sequences.

    `imports` are what stands for them, or nothing for a file beside the module's. `formats` have a call, and the bytes
    of scales per token.
    """

    module: str
    kernel: str
    merge: str
    tokens: str
    splits: int
    imports: dict[str, dict[str, Any]]
    formats: dict[str, tuple[Callable[[ModuleType], None], int]]


_VLLM_MODES = ["NONE", "FP8_PER_TENSOR", "INT8_PER_TOKEN_HEAD", "FP8_PER_TOKEN_HEAD", "INT4_PER_TOKEN_HEAD"]
_LMDEPLOY_POLICIES = {"NONE": 0, "INT4": 4, "INT8": 8, "FP8": 16, "FP8_E5M2": 17, "TURBO_QUANT": 42}
_SGLANG_TESTS = ("is_hip", "is_gfx95_supported", "is_gfx1250_supported", "get_device_core_count")
PROJECTS = {
    "vllm": Project(
        "vllm.v1.attention.ops.triton_unified_attention", "kernel_unified_attention", "reduce_segments", "TILE_SIZE", 2,
        {
            "vllm.envs": {"VLLM_BATCH_INVARIANT": False},
            "vllm.logger": {"init_logger": logging.getLogger},
            "vllm.platforms": {"current_platform": SimpleNamespace(fp8_dtype=lambda: E4M3)},
            "vllm.triton_utils": {"tl": triton.language, "triton": triton},
            "vllm.v1.kv_cache_interface": {"KVQuantMode": enum.IntEnum("KVQuantMode", _VLLM_MODES, start=0)},
            "vllm.v1.attention.ops.triton_attention_helpers": {},
        },
        {
            "fp8_e4m3": (lambda module: call_vllm(module, "FP8_PER_TENSOR", E4M3), 0),
            "fp8_e4m3, queries too": (lambda module: call_vllm(module, "FP8_PER_TENSOR", E4M3, E4M3), 0),
            "fp8_e4m3 by token": (lambda module: call_vllm(module, "FP8_PER_TOKEN_HEAD", E4M3), 8),
            "int8 by token": (lambda module: call_vllm(module, "INT8_PER_TOKEN_HEAD", torch.int8), 8),
        },
    ),
    "lmdeploy": Project(
        "lmdeploy.pytorch.kernels.cuda.pagedattention", "_fwd_grouped_split_quant_kernel", "_reduce_split_kernel",
        "BLOCK_N", 1,
        {
            "lmdeploy.messages": {"QuantPolicy": enum.IntEnum("QuantPolicy", _LMDEPLOY_POLICIES)},
            "lmdeploy.utils": {"get_logger": logging.getLogger},
            "lmdeploy.pytorch.kernels.cuda.turbo_quant": {"hadamard_rotate": None},
            "lmdeploy.pytorch.kernels.cuda.utils": {
                "get_device_props": lambda _: vars(torch.cuda.get_device_properties(0)) | {"warps_per_sm": 64}
            },
        },
        {
            "fp8_e4m3": (lambda module: call_lmdeploy(module, "FP8", E4M3), 0),
            "int8 by token": (lambda module: call_lmdeploy(module, "INT8", torch.uint8), 8),
        },
    ),
    "sglang": Project(
        "sglang.kernels.ops.attention.decode_attention", "_fwd_grouped_kernel_stage1", "_fwd_kernel_stage2", "BLOCK_N",
        2,
        {
            "sglang.kernels.ops.attention.score_mod": {"unpack_aux_tensors": lambda *_: (None, 0, 0, 0)},
            "sglang.srt.environ": {"envs": None},
            "sglang.srt.utils": dict.fromkeys(_SGLANG_TESTS, lambda *_: False),
        },
        {"fp8_e4m3": (call_sglang, 0)},
    ),
}  # fmt: skip


def load(path: Path, project: Project) -> ModuleType:
    """The module in the file, with its imports replaced."""
    modules = {name: ModuleType(name) for name in (project.module.partition(".")[0], *project.imports)}
    with mock.patch.dict(sys.modules, modules):
        for name, values in (*project.imports.items(), (project.module, {})):
            file = path if name == project.module else path.with_name(f"{name.rpartition('.')[2]}.py")
            if values:
                vars(modules[name]).update(values)
            else:
                spec = importlib.util.spec_from_file_location(name, file)
                sys.modules[name] = module = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
    return module


class Kernel:
    """Compiles what it is asked to launch, and keeps with what."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            self.compiled = self.kernel.warmup(*arguments, grid=grid, **options)
            self.grid, self.options = grid, options

        return launch


def compile_published(path: Path, project: Project, format_: str, device: str) -> tuple[Any, int, int]:
    """The kernel as its launcher would launch it, the tokens of a tile and the splits of a sequence.

    ValueError if the file is not what is expected, CompilationError if the device has no such type.
    """
    try:
        module = load(path, project)
        kernel = Kernel(getattr(module, project.kernel))
        replaced = {project.kernel: kernel, project.merge: mock.MagicMock()}
        with compiling(DEVICES[device]), mock.patch.multiple(module, **replaced):
            project.formats[format_][0](module)
        return kernel.compiled, kernel.options[project.tokens], kernel.grid[project.splits]
    except CompilationError:
        raise
    except Exception as error:  # whatever code of another version may raise
        raise ValueError(f"{path} is not the {project.module} that is known here: {error!r}") from error


def figures(device: str, compiled: Any, tokens: int, splits: int, scale_bytes: int) -> list[object]:
    """A row of the table, but for its name."""
    binary = disassemble(compiled)
    loop = next(loop for loop in binary.loops if loop.count(r".*MMA"))
    size, tile_bytes = len(loop.instructions), tokens * 2 * HEAD_DIM
    loaded: collections.Counter[tuple[bool, int]] = collections.Counter()  # by whether it is a copy, and the bits
    for name, count in loop.counts.items():
        if re.match(r"LDG(STS)?\.", name):
            width = re.search(r"\.[US]?(8|16|64|128)(\.|$)", name)
            bits = int(width[1]) if width else 32
            loaded[name.startswith("LDGSTS"), bits] += count * binary.threads * bits // 8
    # What loads as many bytes as K and V of a tile have; the others are scales and ids of pages.
    chosen = (kinds for n in range(1, len(loaded) + 1) for kinds in itertools.combinations(sorted(loaded), n))
    of_tile = next((kinds for kinds in chosen if sum(loaded[kind] for kind in kinds) == tile_bytes), ())
    widths = " and ".join(str(bits) for _, bits in of_tile) or "?"
    # Tiles of bytes or of pairs of them, K as it lies or transposed.
    in_memory = [
        [max(buffers(compiled, *shape, bits), default=0) for shape in ((tokens, columns), (columns, tokens))]
        for bits, columns in ((8, HEAD_DIM), (16, HEAD_DIM // 2))
    ]
    ahead = max(map(min, in_memory)) > 1
    num_bytes = BATCH * KV_HEADS * CONTEXT * (2 * HEAD_DIM + scale_bytes)
    us, best = (
        of_code(size, binary, BATCH * KV_HEADS, CONTEXT // tokens, splits, num_bytes, is_ahead).total
        for is_ahead in (ahead, True)
    )
    on_h200 = [splits, f"{us:.0f}" if ahead else f"{us:.0f} ({best:.0f})"]
    return [
        f"{tokens} x {binary.threads // 32} x {compiled.metadata.num_stages}", binary.registers,
        binary.code.count("LDL|STL"), binary.shared, binary.programs(DEVICES[device]), size,
        f"{size * binary.threads / tile_bytes:.1f}", widths, loop.count(r"(LDS|STS)\..*[US]8"),
        *(on_h200 if device == "sm_90" else ("", "")),
    ]  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.published", description=__doc__.split("\n\n")[0])
    for name, project in PROJECTS.items():
        parser.add_argument(f"--{name}", type=Path, metavar="FILE", help=f"file of {project.module}")
    parser.add_argument("--device", choices=("sm_80", "sm_90"), default="sm_90")
    arguments = parser.parse_args()
    device = arguments.device

    def show(*cells: object) -> None:
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)

    show(*COLUMNS)
    show(*("---" for _ in COLUMNS))
    for format_, scales in (("fp8_e4m3", "head"), ("fp8_e4m3", "dynamic"), ("int8", "dynamic")):
        is_dynamic = scales == "dynamic"
        compiled, _, tiles = compile_attention(Shape(device, format_, is_dynamic))
        splits = estimate(Call(format_, scales)).splits
        name = f"ours, {format_}{' by token' if is_dynamic else ''}"
        show(name, *figures(device, compiled, tiles.block_n, splits, 4 * is_dynamic))
    for project_name, project in PROJECTS.items():
        path = getattr(arguments, project_name)
        for format_, (_, scale_bytes) in project.formats.items() if path else ():
            name = f"{project_name}, {format_}"
            try:
                show(name, *figures(device, *compile_published(path, project, format_, device), scale_bytes))
            except CompilationError as error:
                show(name, str(error).splitlines()[-1])
            except ValueError as error:
                sys.exit(str(error))


if __name__ == "__main__":
    main()
