"""Kernels compiled for a device that is not there, through the functions that would launch them on it."""

from __future__ import annotations

import collections
import contextlib
import functools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

from hf_kvquant.ops import triton as kernels
from hf_kvquant.ops.triton import tuning
from hf_kvquant.ops.triton.launch import Launcher

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
CUOBJDUMP = TOOLS / "cuobjdump"


@dataclass(frozen=True)
class Device:
    """What a launch asks of a device; sizes in bytes, of one multiprocessor. AMD has no `capability`.

    `most_shared` is the shared memory that one program may have.
    """

    target: GPUTarget
    cores: int
    most_shared: int
    capability: tuple[int, int] | None = None
    shared: int = 0
    registers: int = 65536


DEVICES = {
    "sm_80": Device(GPUTarget("cuda", 80, 32), 108, 163 * 1024, (8, 0), shared=164 * 1024),
    "sm_89": Device(GPUTarget("cuda", 89, 32), 128, 99 * 1024, (8, 9), shared=100 * 1024),
    "sm_90": Device(GPUTarget("cuda", 90, 32), 132, 227 * 1024, (9, 0), shared=228 * 1024),
    "sm_100": Device(GPUTarget("cuda", 100, 32), 148, 227 * 1024, (10, 0), shared=228 * 1024),
    "sm_120": Device(GPUTarget("cuda", 120, 32), 188, 99 * 1024, (12, 0), shared=100 * 1024),
    "gfx942": Device(GPUTarget("hip", "gfx942", 64), 304, 64 * 1024),
    "gfx950": Device(GPUTarget("hip", "gfx950", 64), 256, 160 * 1024),
}


# What `tuning` asks of a device.
_FACTS = (
    "instruction_set", "can_chain", "least_rows", "has_tensor_memory", "num_multiprocessors", "shared_memory",
)  # fmt: skip


class CompiledOnly:
    """In place of a Triton kernel: compiles what it is asked to launch."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.compiled: list[Any] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def compile_(*arguments: Any, **options: Any) -> None:
            compiled = self.kernel.warmup(*arguments, grid=grid, **options)
            self.compiled.append(compiled)
            self.run(compiled, grid, arguments)

        return compile_

    def run(self, compiled: Any, grid: tuple[int, int, int], arguments: tuple[Any, ...]) -> None:
        """What is done with a kernel once it is compiled."""


@contextlib.contextmanager
def compiling(device: Device, kernel_type: type = CompiledOnly) -> Iterator[dict[str, list[Any]]]:
    """Calls of `hf_kvquant.ops.triton` compile for `device`; yields what they compiled.

    With a `kernel_type` that does no more, tensors may be on `meta`.
    """
    major_minor = device.capability
    with contextlib.ExitStack() as stack:
        patch = lambda *args: stack.enter_context(mock.patch.object(*args))  # noqa: E731
        patch(torch.version, "hip", None if major_minor else "6.4")
        patch(torch.cuda, "get_device_capability", lambda *_: major_minor)
        patch(torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(multi_processor_count=device.cores))
        driver = SimpleNamespace(
            get_current_target=lambda: device.target,
            # Triton keeps kernels by this number: no other test's, and another one for every device.
            get_current_device=lambda: 1000 + list(DEVICES.values()).index(device),
            get_current_stream=lambda _: 0,
            utils=SimpleNamespace(get_device_properties=lambda _: {"max_shared_mem": device.most_shared}),
        )
        config = triton.runtime.driver
        active = "_active" if hasattr(config, "_active") else "active"  # Triton 3.4
        before = getattr(config, active)
        config.set_active(driver)
        stack.callback(setattr, config, active, before)
        for name in _FACTS:
            answer = getattr(tuning, name).__wrapped__(torch.device("cuda"))
            patch(tuning, name, lambda _, answer=answer: answer)
        launched = {}
        for name in ("_attention", "_merge", "_write", "_read"):
            kernel = kernel_type(getattr(kernels, name).kernel)
            launched[name.strip("_")] = kernel.compiled
            patch(kernels, name, Launcher(kernel))
        for name in ("_attention_plans", "_write_plans"):
            patch(kernels, name, {})
        yield launched


# -- what is compiled -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A call of `paged_attention` with 8 key/value heads and pages of 16 tokens."""

    device: str = "sm_90"
    format: str = "fp8_e4m3"
    is_dynamic: bool = False
    num_tokens: int = 1
    head_dim: int = 128
    groups: int = 4
    mask: str | None = None  # key, bool or float
    options: bool = False  # softcap, sinks, zeros, a window and the log-sum-exp
    dtype: torch.dtype = torch.bfloat16  # of queries, and of pages in the format `model`

    def __str__(self) -> str:
        words = [self.device, self.format, "dynamic" if self.is_dynamic else "static", f"t{self.num_tokens}"]
        words += [f"d{self.head_dim}", self.mask or "", "options" if self.options else ""]
        words.append("" if self.dtype == torch.bfloat16 else str(self.dtype).removeprefix("torch."))
        return "-".join(word for word in words if word)

    @property
    def element_size(self) -> int:
        return self.dtype.itemsize if self.format == "model" else 1

    @property
    def padded_dim(self) -> int:
        """Channels of a tile."""
        return 1 << (self.head_dim - 1).bit_length()


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def a_side(shape: Shape) -> list[Any]:
    """K or V in a pool of more than 2^31 elements: pages, format, scale, zero, token_scale."""
    num_pages, num_heads, page_size = 2**18, 8, 16
    is_quantized = shape.format != "model"
    dtype = torch.uint8 if is_quantized else shape.dtype
    numbers = empty(num_heads, 1, dtype=torch.float32) if is_quantized else None
    return [
        empty(num_pages, num_heads, page_size, shape.head_dim, dtype=dtype),
        shape.format,
        None if shape.is_dynamic else numbers,
        numbers if shape.options else None,
        empty(num_pages, num_heads, page_size, dtype=torch.bfloat16) if shape.is_dynamic else None,
    ]


def compile_attention(shape: Shape, tiles: tuning.Tiles | None = None) -> tuple[Any, tuple[Any, ...], tuning.Tiles]:
    """The attention kernel for a call, those that merge its splits, and its tiles: the table's, or `tiles`."""
    batch_size, num_columns, num_q_heads = 8, 512, 8 * shape.groups
    mask = None
    if shape.mask is not None:
        dtype = torch.float32 if shape.mask == "float" else torch.bool
        size = (batch_size, 1, 1 if shape.mask == "key" else shape.num_tokens, num_columns * 16)
        mask = empty(*size, dtype=dtype).expand(-1, -1, shape.num_tokens, -1)
    used: list[tuning.Tiles] = []
    table = tuning.attention_tiles

    def look_up(*arguments: Any) -> tuning.Tiles:
        used.append(tiles or table(*arguments))
        return used[-1]

    with compiling(DEVICES[shape.device]) as compiled, mock.patch.object(tuning, "attention_tiles", look_up):
        kernels.paged_attention(
            empty(batch_size, num_q_heads, shape.num_tokens, shape.head_dim, dtype=shape.dtype),
            empty(batch_size, num_columns, dtype=torch.int32), empty(batch_size, dtype=torch.int32),
            *a_side(shape), *a_side(shape),
            mask, 0, empty(num_q_heads, dtype=torch.float32) if shape.options else None,
            0.1, 30.0 if shape.options else None, 1000 if shape.options else None, True,
            empty(batch_size, num_q_heads, shape.num_tokens, dtype=torch.float32) if shape.options else None,
        )  # fmt: skip
    return compiled["attention"][0], tuple(compiled["merge"]), used[0]


# -- what came out -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Code:
    """A kernel, or a loop of it, for NVIDIA: one string an instruction."""

    instructions: tuple[str, ...]

    @functools.cached_property
    def counts(self) -> collections.Counter[str]:
        """How often each operation stands there, without predicates and operands."""
        return collections.Counter(re.sub(r"^@!?U?P\w+ ", "", text).split(" ")[0] for text in self.instructions)

    def count(self, pattern: str) -> int:
        return sum(number for name, number in self.counts.items() if re.match(pattern, name))


@dataclass(frozen=True)
class Binary:
    """A kernel for NVIDIA as the hardware runs it; `threads` of a program, its `registers` a thread, `shared` bytes."""

    threads: int
    registers: int
    shared: int
    code: Code
    loops: tuple[Code, ...]

    def programs(self, device: Device) -> int:
        """How many run on one multiprocessor of `device` at once."""
        by_registers = device.registers // (-(-self.registers // 8) * 8 * self.threads)
        return min(by_registers, device.shared // (self.shared + 1024))  # the driver keeps a kilobyte of each


def disassemble(compiled: Any) -> Binary:
    """The code of a kernel compiled for NVIDIA. Its loops are what lies between a backward branch and its target."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        dump = functools.partial(subprocess.run, capture_output=True, text=True, check=True)
        usage = dump([CUOBJDUMP, "-res-usage", file.name])
        listing = dump([CUOBJDUMP, "-sass", file.name]).stdout
    registers = re.search(r"REG:(\d+)", usage.stdout + usage.stderr)
    assert registers, usage
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*?)\s*;", listing)
    code = [(int(address, 16), text) for address, text in found]
    loops = []
    for address, text in code:
        branch = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        if branch and int(branch[1], 16) < address:  # a branch to itself pads the end
            loops.append(Code(tuple(text for at, text in code if int(branch[1], 16) <= at <= address)))
    threads = 32 * compiled.metadata.num_warps
    whole = Code(tuple(text for _, text in code))
    return Binary(threads, int(registers[1]), compiled.metadata.shared, whole, tuple(loops))


def buffers(compiled: Any, rows: int, columns: int, bits: int) -> list[int]:
    """How many tiles each buffer of `[rows, columns]` elements holds in shared memory."""
    pattern = rf"ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x{rows}x{columns}x[a-z]+{bits}(?:E\w+)?,"
    return [int(number) for number in re.findall(pattern, compiled.asm["ttgir"])]
