"""What is launched, with which arguments, on a device that is played: kernels are compiled for it, and not run."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402

from hf_kvquant.ops import triton as kernels  # noqa: E402

CUDA = torch.device("cuda", 0)
REGISTERS = 100  # a thread, of every kernel


class Played:
    """As much of a Triton driver as launching takes. `launches` holds (grid, arguments)."""

    def __init__(self) -> None:
        self.launches: list[tuple[tuple[int, ...], tuple[Any, ...]]] = []
        played = self

        class Launch:
            def __init__(self, src: Any, metadata: Any) -> None:
                self.parameters = list(src.signature)

            def __call__(self, x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
                # metadata and hooks, then the kernel's parameters
                played.launches.append(((x, y, z), rest[-len(self.parameters) :]))

        self.launcher_cls = Launch
        self.utils = SimpleNamespace(
            load_binary=lambda *args: (0, 0, REGISTERS, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 232448},
        )

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: SimpleNamespace(
            multi_processor_count=132, shared_memory_per_multiprocessor=233472, max_threads_per_multi_processor=2048
        ),
    )
    device = Played()
    monkeypatch.setattr(driver, "_active" if hasattr(driver, "_active") else "active", device)
    names = ("num_multiprocessors", "can_chain", "least_rows", "has_tensor_memory", "instruction_set")
    caches = [getattr(kernels.tuning, name) for name in names]
    for cache in caches:
        cache.cache_clear()
    yield device
    for cache in caches:
        cache.cache_clear()
    for launcher in (kernels._attention, kernels._merge):
        launcher._prepared.clear()


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
