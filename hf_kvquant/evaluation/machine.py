"""What numbers were measured on: the device, and the commit of this package."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import torch

_CHECKOUT = Path(__file__).parents[2]


def device_name(device: torch.device) -> str:
    """The model name of a GPU or of the processor, where the system tells it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    info = Path("/proc/cpuinfo")
    return processor_name(info.read_text(encoding="utf-8") if info.exists() else "")


def processor_name(cpuinfo: str) -> str:
    """From what Linux says of the processors, or from what Python knows where that has no name.

    Virtual machines call very different processors by one name, so family and model are given as well.
    """
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in cpuinfo.splitlines())}
    name = facts.get("model name") or platform.processor() or platform.machine()
    return f"{name} (family {facts['cpu family']}, model {facts['model']})" if "cpu family" in facts else name


def git_commit() -> str | None:
    """The commit that is checked out, or GIT_COMMIT of the environment where the package lies in no checkout."""
    if not (_CHECKOUT / ".git").exists():  # the repository around a virtual environment would be somebody else's
        return os.environ.get("GIT_COMMIT")
    return output_of("git", "-C", str(_CHECKOUT), "rev-parse", "HEAD")


def output_of(*command: str) -> str | None:
    """What a command prints, None if it cannot be run or fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip() or None
