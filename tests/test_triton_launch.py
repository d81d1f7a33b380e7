"""What is launched, with which arguments, on a device that is played: kernels are compiled for it, and not run."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402

from hf_kvquant.ops import gpu, reference  # noqa: E402
from hf_kvquant.ops import triton as kernels  # noqa: E402

CUDA = torch.device("cuda", 0)
REGISTERS = 100  # a thread, of every kernel


class Played:
    """As much of a Triton driver as launching takes, and which device is the current one.

    `launches` holds (grid, arguments), `devices` and `sources` where they went and what had been compiled for them.
    """

    def __init__(self) -> None:
        self.launches: list[tuple[tuple[int, ...], tuple[Any, ...]]] = []
        self.devices: list[int] = []
        self.sources: list[Any] = []
        self.current = 0
        self.target = GPUTarget("cuda", 90, 32)
        played = self

        class Launch:
            def __init__(self, src: Any, metadata: Any) -> None:
                self.source, self.parameters = src, list(src.signature)

            def __call__(self, x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
                # metadata and hooks, then the kernel's parameters
                played.devices.append(played.current)
                played.sources.append(self.source)
                played.launches.append(((x, y, z), rest[-len(self.parameters) :]))

        self.launcher_cls = Launch
        self.utils = SimpleNamespace(
            load_binary=lambda *args: (0, 0, REGISTERS, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 232448},
        )

    def get_current_device(self) -> int:
        return self.current

    def get_current_stream(self, device: int) -> int:
        return 0

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device.index
        yield
        self.current = before

    def get_current_target(self) -> GPUTarget:
        return self.target


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Any:
    device = Played()
    monkeypatch.setattr(torch.cuda, "device", device.on)
    monkeypatch.setattr(torch.cuda, "current_device", device.get_current_device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: SimpleNamespace(
            multi_processor_count=132, shared_memory_per_multiprocessor=233472, max_threads_per_multi_processor=2048
        ),
    )
    monkeypatch.setattr(driver, "_active" if hasattr(driver, "_active") else "active", device)
    gpu._choose.cache_clear()
    names = (
        "num_multiprocessors", "can_chain", "least_rows", "has_tensor_memory", "instruction_set", "shared_memory",
    )  # fmt: skip
    caches = [getattr(kernels.tuning, name) for name in names]
    for cache in caches:
        cache.cache_clear()
    yield device
    for cache in caches:
        cache.cache_clear()
    for launcher in (kernels._attention, kernels._merge, kernels._write):
        launcher._prepared.clear()
    gpu._choose.cache_clear()
    kernels._attention_plans.clear()
    kernels._write_plans.clear()


def plan(batch_size: int, num_columns: int) -> tuple[Any, Any]:
    """The plan of a decode step of int8 pages, and what makes its arguments."""
    query = torch.zeros(batch_size, 32, 1, 128, dtype=torch.bfloat16)
    pages, token_scale = torch.zeros(4, 8, 16, 128, dtype=torch.uint8), torch.zeros(4, 8, 16, dtype=torch.bfloat16)
    table = torch.zeros(batch_size, num_columns, dtype=torch.int32)
    lengths = torch.ones(batch_size, dtype=torch.int32)

    def arguments(partial: Any, splits: int) -> tuple[Any, ...]:
        return (
            query, query, table, lengths, pages, None, None, token_scale, pages, None, None, token_scale, None, None,
            partial, None, 0.1, 0.0, *query.stride()[:3], 0, 0, 0, 0, 0, 0, 0, 1, num_columns, num_columns, splits,
        )  # fmt: skip

    side = ("int8", 0, 0, False)
    made = kernels._plan_attention(
        query.shape, query.dtype, CUDA, num_columns, pages.shape[1:], pages.dtype, 128, pages.dtype, *side, *side,
        0, None, None, True, True, True, False, True, None, None, arguments,
    )  # fmt: skip
    return made, arguments


def test_a_kernel_is_launched_with_addresses_and_sizes(played: Played) -> None:
    made, arguments = plan(1, 64)
    partial = torch.zeros(made.partial_size)
    for _ in range(2):  # as compiled in advance, and again
        made.kernel(made.grid, arguments(partial, made.splits))
    made.merge(made.merge_grid, (partial, None, partial, None, None, None, 1, made.splits))
    (grid, passed), again, (merge_grid, _) = played.launches
    assert (grid, passed) == again
    expected = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments(partial, made.splits)]
    assert list(passed[: len(expected)]) == expected
    assert grid == (8 * made.splits, 1, 1)
    assert merge_grid == (32, 1, 1)


@pytest.mark.skipif(not kernels.tuning._IS_3_5, reason="other tiles")
@pytest.mark.parametrize(("batch_size", "context"), [(1, 1024), (1, 32768), (8, 32768), (12, 8192), (64, 8192)])
def test_splits_fill_the_device_once(played: Played, batch_size: int, context: int) -> None:
    """No second wave of programs, and none without a tile."""
    made, _ = plan(batch_size, context // 16)
    threads, block_n = 64, 64
    programs = min(65536 // (-(-REGISTERS // 8) * 8 * threads), 2048 // threads)
    assert made.grid[0] * made.grid[1] <= 132 * programs
    assert made.grid[0] * made.grid[1] > 132 * programs // 4 or made.splits * block_n >= context
    assert made.splits * block_n <= max(context, block_n)
    assert (made.merge is None) == (made.splits == 1)


def choose() -> Any:
    return gpu._choose(CUDA, torch.bfloat16, 128, 128, True)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("no C compiler"), subprocess.CalledProcessError(1, "gcc"), FileNotFoundError("ldconfig"),
     AssertionError("libcuda.so"), ImportError("libcuda.so")],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_where_triton_has_no_driver_the_reference_serves(
    played: Played, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    assert choose() is kernels
    gpu._choose.cache_clear()

    def utils(self: Played) -> None:
        raise error

    monkeypatch.setattr(Played, "utils", property(utils, lambda self, value: None), raising=False)
    assert choose() is choose() is reference
    (record,) = caplog.records
    assert f"plain torch on cuda:0, which is slow: Triton cannot make its driver ({error})" in record.getMessage()


class OnDevice(torch.Tensor):
    """A tensor without memory that says that it lies on a GPU."""

    device = CUDA

    def new_empty(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return empty(*shape, dtype=dtype or self.dtype)


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta").as_subclass(OnDevice)


def side(num_pages: int) -> list[Any]:
    """K or V in int8 pages."""
    pages, token_scale = (num_pages, 8, 16, 128), (num_pages, 8, 16)
    return [empty(*pages, dtype=torch.uint8), "int8", None, None, empty(*token_scale, dtype=torch.bfloat16)]


def attend(
    num_pages: int = 64, mask: torch.Tensor | None = None, softmax_scale: float = 0.1, softcap: float | None = None
) -> None:
    """A decode step of two sequences whose past is not split."""
    kernels.paged_attention(
        empty(2, 32, 1, 128, dtype=torch.bfloat16), empty(2, 4, dtype=torch.int32), empty(2, dtype=torch.int32),
        *side(num_pages), *side(num_pages), mask, 0, None, softmax_scale, softcap, None, True, splits=1,
    )  # fmt: skip


def write(num_pages: int = 64, long_rows: bool = False) -> None:
    new = empty(2, 8, 1, 128, dtype=torch.bfloat16)
    if long_rows:
        new = new.as_strided(new.shape, (2**31, 128, 128, 1))
    tables = empty(2, 4, dtype=torch.int32), empty(2, dtype=torch.int32)
    kernels.write_kv(new, new, *tables, *side(num_pages), *side(num_pages), None)


def test_a_kept_kernel_is_launched_on_another_device(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OnDevice, "device", torch.device("cuda", 1))
    write()
    monkeypatch.setattr(type(kernels._write.kernel), "run", lambda *args, **options: pytest.fail("is bound again"))
    write()
    assert played.devices == [1, 1]


def test_integers_for_floats_are_no_constants(played: Played) -> None:
    attend(softmax_scale=1, softcap=1)
    assert [played.sources[0].signature[name] for name in ("softmax_scale", "softcap")] == ["fp32", "fp32"]


def test_strides_of_more_than_32_bits_take_another_kernel(played: Played) -> None:
    for length in (64, 2**31, 64):
        attend(mask=empty(2, 1, 1, length, dtype=torch.bool))
    assert [source.signature["mask_stride_b"] for source in played.sources] == ["i32", "i64", "i32"]
    played.sources.clear()
    for long_rows in (False, True, False):
        write(long_rows=long_rows)
    assert [source.signature["key_stride_b"] for source in played.sources] == ["i32", "i64", "i32"]


def test_pools_beyond_32_bits_take_another_kernel_on_amd(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(OnDevice, "device", torch.device("cuda", 2))  # Triton keeps one target for a number
    played.current, played.target = 2, GPUTarget("hip", "gfx942", 64)
    for call in (write, attend):
        played.sources.clear()
        for num_pages in (64, 2**18, 64):
            call(num_pages=num_pages)
        in_32_bits = [
            [["tt.pointer_range", 32] in attributes for attributes in source.attrs.values()]
            for source in played.sources
        ]
        assert in_32_bits[0] == in_32_bits[2]
        assert sum(in_32_bits[0]) - sum(in_32_bits[1]) == 2  # pages of K and of V
