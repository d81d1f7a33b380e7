"""Launching kernels without the compiler's own lookup in every call, which costs more than a small kernel runs."""

from __future__ import annotations

import subprocess
from collections.abc import Hashable
from typing import Any

import torch
from triton.runtime import driver

_REGISTERS = 65536  # of a multiprocessor, from compute capability 8.0 to 12.0
LARGEST = 2**31 - 1  # what Triton takes for a number of 32 bits


def why_no_driver() -> str | None:
    """Why Triton cannot launch anything on this machine; None if it can. A part of its driver is compiled on first use.

    RuntimeError is raised where there is no C compiler, as in slim containers; CalledProcessError where it has no
    headers of Python; OSError where a program or the cache's directory is missing; AssertionError where the device's
    library is not found; ImportError where what was compiled cannot be loaded.
    """
    try:
        driver.active.utils  # noqa: B018 - makes the driver
    except (RuntimeError, subprocess.CalledProcessError, OSError, AssertionError, ImportError) as error:
        return f"Triton cannot make its driver ({error})"
    return None


class Launcher:
    """A kernel, compiled once for everything that its code depends on."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._prepared: dict[Hashable, Prepared] = {}

    def prepare(
        self, device: torch.device, constants: tuple[Any, ...], options: tuple[tuple[str, int], ...], types: Hashable
    ) -> Prepared:
        """The kernel for these constants.

        Args:
            constants: the kernel's last parameters, in its order.
            options: `num_warps` and such.
            types: everything else that the code depends on: dtypes, alignment, numbers of 32 bits; None if that is not
                so, and Triton is to find out itself in every call.
        """
        if types is None:
            return Prepared(self.kernel, device, constants, options, keep=False)
        key = (device, constants, options, types)
        if key not in self._prepared:
            self._prepared[key] = Prepared(self.kernel, device, constants, options, keep=True)
        return self._prepared[key]


class Prepared:
    """A kernel with its constants, to be called with a grid and its other arguments.

    Triton binds and specializes every argument in every call, 20 to 80 microseconds of Python. Here what the first call
    compiled is launched as it is.
    """

    def __init__(
        self,
        kernel: Any,
        device: torch.device,
        constants: tuple[Any, ...],
        options: tuple[tuple[str, int], ...],
        keep: bool,
    ) -> None:
        self._kernel = kernel
        self._device = device
        self._constants = constants
        # Said aloud: what Triton does without it depends on the version.
        self._options = {"enable_fp_fusion": True, **dict(options)}
        self._keep = keep
        self._compiled: Any = None

    def programs_at_once(self, arguments: tuple[Any, ...]) -> int | None:
        """How many programs a multiprocessor runs at once, by registers and shared memory; None where not known.

        `arguments` are as in a call; nothing but types is looked at, and a dtype may stand for a tensor.
        """
        if self._device.type != "cuda" or torch.version.hip is not None or not self._keep:
            return None
        if self._compiled is None:
            with torch.cuda.device(self._device):
                self._compiled = self._kernel.warmup(*arguments, *self._constants, grid=(1, 1, 1), **self._options)
                self._compiled.run  # noqa: B018 - loads it, and then it knows its registers
        registers = getattr(self._compiled, "n_regs", None)
        if not registers:
            return None
        device = torch.cuda.get_device_properties(self._device)
        threads = 32 * self._options["num_warps"]
        by_registers = _REGISTERS // (-(-registers // 8) * 8 * threads)
        # The system keeps 1 KiB of shared memory for each.
        by_memory = device.shared_memory_per_multiprocessor // (self._compiled.metadata.shared + 1024)
        return max(1, min(by_registers, by_memory, device.max_threads_per_multi_processor // threads))

    def __call__(self, grid: tuple[int, int, int], arguments: tuple[Any, ...]) -> None:
        """Launch over `grid`, on the current stream of the tensors' device."""
        if self._device.type != "cuda":  # the interpreter
            self._kernel[grid](*arguments, *self._constants, **self._options)
        elif torch.cuda.current_device() == self._device.index:
            self._launch(grid, arguments)
        else:
            with torch.cuda.device(self._device):
                self._launch(grid, arguments)

    def _launch(self, grid: tuple[int, int, int], arguments: tuple[Any, ...]) -> None:
        keep = self._keep and not (torch.version.hip and _is_any_large(arguments))
        if keep and self._compiled is not None:
            # Addresses, not tensors: of a tensor the launcher asks the driver where it lies.
            addresses = [x.data_ptr() if type(x) is torch.Tensor else x for x in arguments]
            self._compiled[grid](*addresses, *self._constants)
        else:
            compiled = self._kernel[grid](*arguments, *self._constants, **self._options)
            if keep:
                self._compiled = compiled


def _is_any_large(arguments: tuple[Any, ...]) -> bool:
    """Whether a tensor is larger than what Triton's code for AMD addresses with 32 bits, where it knows that it may."""
    return any(isinstance(x, torch.Tensor) and x.untyped_storage().nbytes() > LARGEST for x in arguments)
