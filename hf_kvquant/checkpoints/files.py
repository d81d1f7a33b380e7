"""The files of a checkpoint: its config, the names of its tensors, and the few tensors that are asked for."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from ..config import SCALE_SOURCES
from ..scales import LayerScales

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class FoundEntry:
    """The scales of one attention module and the names of the tensors they came from."""

    scales: LayerScales
    k_key: str
    v_key: str


@dataclass(frozen=True)
class FoundScales:
    """What a reader found: by module path, before it is known which cache layer that is."""

    kv_cache_dtype: str | None
    dynamic: bool = False
    by_prefix: dict[str, FoundEntry] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class CheckpointFiles:
    """A checkpoint directory.

    Attributes:
        path: the directory.
        config: the contents of config.json, {} if there is none.
        tensors: name of each tensor -> file in the directory that holds it.
    """

    path: str
    config: dict[str, Any]
    tensors: dict[str, str]

    @classmethod
    def find(cls, source: str | os.PathLike[str], revision: str | None = None, fetch: bool = True) -> CheckpointFiles:
        """The files of a directory or hub id.

        Raises ValueError if there is no such thing or a file is broken, and FileNotFoundError if it is not on this
        machine and must not be fetched.
        """
        directory = _locate(source, revision, fetch)
        config = directory / "config.json"
        return cls(str(directory), _read_json(config) if config.exists() else {}, _tensor_files(directory))

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The tensors called `names`, on the CPU; only these are read. Raises ValueError if a file lacks its own."""
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self.tensors[name], []).append(name)
        values = {}
        for file, wanted in by_file.items():
            with _open(Path(self.path) / file) as handle:
                for name in wanted:
                    try:
                        values[name] = handle.get_tensor(name)
                    except SafetensorError as error:
                        raise ValueError(f"{self.where(name)} cannot be read: {error}") from error
        return values

    def where(self, name: str) -> str:
        """`name` with its file, for errors."""
        return f"{name} in {Path(self.path) / self.tensors[name]}"


def _locate(source: str | os.PathLike[str], revision: str | None, fetch: bool) -> Path:
    directory = Path(source)
    if directory.is_dir():
        return directory
    wanted: dict[str, Any] = {"revision": revision, "allow_patterns": ["*.json", "*.safetensors"]}
    try:
        # What from_pretrained has fetched is enough, and asks nothing of the network.
        return Path(snapshot_download(str(source), local_files_only=True, **wanted))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        if not fetch:
            raise FileNotFoundError(f"{source} is not on this machine") from error
        message = f"{source} is neither a directory nor a hub id; no KV scales can be read from it"
        message += f" (sources with a name of their own: {', '.join(SCALE_SOURCES)})"
        if not isinstance(error, LocalEntryNotFoundError):
            raise ValueError(message) from error
    try:
        return Path(snapshot_download(str(source), **wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ValueError(f"{message}, or it cannot be fetched: {error}") from error


def _tensor_files(directory: Path) -> dict[str, str]:
    index = directory / INDEX
    if index.exists():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{index} has no weight_map")
        if outside := [file for file in weight_map.values() if not _is_file_name(file)]:
            raise ValueError(f"{index} names {outside[0]!r}, which is not a file of that directory")
        return weight_map
    tensors: dict[str, str] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with _open(file) as handle:
            tensors.update(dict.fromkeys(handle.keys(), file.name))
    return tensors


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and name not in ("", "..") and Path(name).name == name


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} cannot be read as safetensors: {error}") from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, not an object")
    return content
