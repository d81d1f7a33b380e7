"""Rows of measurements: printed as they are made, and written to a file after each, so that nothing is lost."""

from __future__ import annotations

import json
import platform
import time
import traceback
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers

from hf_kvquant.atomic_write import atomic_write
from hf_kvquant.evaluation.machine import device_name, git_commit, output_of
from hf_kvquant.evaluation.memory import free


def describe(device: torch.device) -> dict[str, Any]:
    """The machine, versions and commit that numbers belong to."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    about: dict[str, Any] = {
        "device": device_name(device),
        "driver": None,
        "python": platform.python_version(),
        "versions": {
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": triton_version,
            "transformers": transformers.__version__,
        },
        "git_commit": git_commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about["memory_bytes"] = properties.total_memory
        about["multiprocessors"] = properties.multi_processor_count
        about["l2_bytes"] = properties.L2_cache_size
        about["driver"] = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return about


class Results:
    """All rows of a run, by part.

    Args:
        path: the JSON file, None to only print. Parts that it already has and that are not measured again stay; it may
            not be another device's.
        device: what is measured.
        budget: seconds after which a part starts no further row.
    """

    def __init__(self, path: Path | None, device: torch.device, budget: float) -> None:
        self.path, self.device, self.budget = path, device, budget
        self.data: dict[str, Any] = {"about": describe(device), "parts": {}}
        if path is not None and path.exists():
            self.take(path)
        self._part, self._start = "", 0.0
        self._columns: tuple[str, ...] = ()

    def take(self, path: Path) -> None:
        """Add the parts of another file that this one does not have. Raises ValueError for another device's."""
        other = json.loads(path.read_text(encoding="utf-8"))
        theirs, ours = other["about"]["device"], self.data["about"]["device"]
        if theirs != ours:
            raise ValueError(f"{path} was measured on {theirs}, not on {ours}; rows of two devices are no table")
        self.data["parts"] = {**other["parts"], **self.data["parts"]}
        self.write()

    def part(self, name: str, title: str) -> None:
        """Begin a part; its former rows are replaced."""
        self._part, self._columns, self._start = name, (), time.perf_counter()
        self.data["parts"][name] = {"title": title, "rows": [], **self._stamp()}
        print(f"\n== {name}: {title}", flush=True)

    def _stamp(self) -> dict[str, Any]:
        return {key: self.data["about"][key] for key in ("git_commit", "date")}

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The rows of a part, in this run or in the file."""
        return self.data["parts"].get(name, {}).get("rows", [])

    def row(self, key: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Measure one row; an exception becomes its `error`, and the run goes on."""
        start = time.perf_counter()
        if start - self._start > self.budget:
            values: dict[str, Any] = {"error": f"not started: the part's {self.budget:.0f} seconds are spent"}
        else:
            values = _caught(measure)
        row = key | values | {"row_seconds": round(time.perf_counter() - start, 2)}
        part = self.data["parts"][self._part]
        part["rows"].append(row)
        part["seconds"] = round(time.perf_counter() - self._start, 1)
        self._print(row)
        self.write()
        try:
            free(self.device)
        except RuntimeError as error:  # after an illegal access a process cannot use its device any more
            raise SystemExit(f"the device is lost after this row: {error}") from None
        return row

    def write(self) -> None:
        """Replace the file."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.path) as partial:
            partial.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")

    def _print(self, row: dict[str, Any]) -> None:
        error = row.get("error")
        shown = {name: _short(value) for name, value in row.items() if name not in ("error", "traceback")}
        widths = [max(len(name), 18 if isinstance(row[name], str) else 7) for name in shown]
        if tuple(shown) != self._columns and error is None:
            self._columns = tuple(shown)
            print("  ".join(f"{name:>{width}}" for name, width in zip(shown, widths, strict=True)))
        line = "  ".join(f"{value:>{width}}" for value, width in zip(shown.values(), widths, strict=True))
        print(line if error is None else f"{line}  {error}", flush=True)


def _caught(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    # The exception must be gone before memory is given back: its traceback holds the tensors.
    try:
        return measure()
    except NotInstalled as error:
        return {"error": str(error)}
    except torch.OutOfMemoryError as error:
        return {"error": "out of memory: " + str(error).split(". ")[0]}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:400], "traceback": traceback.format_exc()[-2000:]}


class NotInstalled(Exception):
    """A peer is not here to be measured."""


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)
