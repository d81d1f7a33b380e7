"""The files of a checkpoint: its configuration, the names of its tensors, and the few tensors that are asked for."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from ..config import SCALE_SOURCES
from .names import looks_like_kv_scale
from .safetensors_file import SafetensorsFile

INDEX = "model.safetensors.index.json"
# Configuration and scales that are no safetensors; small files all.
_SMALL_FILES = ("*.json", "key_stats.pth", "value_stats.pth", "*.past_kv_scale.*.weight")
# More layers or heads than any model has, and more bytes than any index.
MAX_COUNT = 2**16
_MAX_BYTES = 2**28
# Hub ids and revisions whose small files this process has asked for.
_ASKED: set[tuple[str, str | None]] = set()
# Weights in any format.
WEIGHTS = (
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.npz", "*.onnx*", "*.ot",
    "*.tflite",
)  # fmt: skip


def check_name(source: Any) -> None:
    """Raise TypeError or ValueError for what names no checkpoint: an empty name would be the working directory."""
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"{type(source).__name__} is no name of a checkpoint; give a directory, a file or a hub id")
    if not os.fspath(source):
        raise ValueError("the name of a checkpoint is empty; give a directory, a file or a hub id")


@dataclass(frozen=True)
class CheckpointFiles:
    """A checkpoint directory, or one file of it.

    Attributes:
        path: the directory.
        config: the contents of config.json, {} if there is none.
        tensors: name of each tensor of the checkpoint -> file in the directory that holds it.
        extras: the same of safetensors files that lie beside the checkpoint but are not part of it.
        broken: extra files that cannot be read, and why.
        only: the one file that was asked for, or None.
    """

    path: str
    config: dict[str, Any]
    tensors: dict[str, str]
    extras: dict[str, str] = field(default_factory=dict)
    broken: tuple[str, ...] = ()
    only: str | None = None

    @classmethod
    def find(
        cls,
        source: str | os.PathLike[str],
        revision: str | None = None,
        fetch: bool = True,
        *,
        only_scales: bool = False,
    ) -> CheckpointFiles:
        """The files of a directory or hub id, or one file; with `only_scales` weights without scales may be missing.

        Raises ValueError if there is no such thing or a file of the checkpoint is broken, TypeError for what is no
        name, and FileNotFoundError if it is not on this machine and must not be fetched.
        """
        check_name(source)
        path = Path(source)
        if path.is_file():
            return cls._of_file(path)
        if path.is_dir():
            return cls._of_directory(path)
        return cls._of_hub(str(source), revision, fetch, looks_like_kv_scale if only_scales else lambda name: True)

    @classmethod
    def _of_file(cls, path: Path) -> CheckpointFiles:
        tensors = dict.fromkeys(_names_in(path), path.name) if path.suffix == ".safetensors" else {}
        return cls(str(path.parent), _read_config(path.parent), tensors, only=path.name)

    @classmethod
    def _of_directory(cls, path: Path) -> CheckpointFiles:
        config = _read_config(path)
        if (path / INDEX).exists():
            tensors = _read_index(path / INDEX)
            part = set(tensors.values())
        else:
            single = path / "model.safetensors"
            files = [single] if single.exists() else sorted(path.glob("*.safetensors"))
            tensors = {name: file.name for file in files for name in _names_in(file)}
            part = {file.name for file in files}
        extras: dict[str, str] = {}
        broken = []
        for file in sorted(path.glob("*.safetensors")):
            if file.name in part:
                continue
            try:  # nothing says that this file belongs to the checkpoint, so it cannot break it
                extras.update({name: file.name for name in _names_in(file) if name not in tensors})
            except ValueError as error:
                broken.append(f"{error}; it is not part of the checkpoint and is left out")
        return cls(str(path), config, tensors, extras, tuple(broken))

    @classmethod
    def _of_hub(cls, repo: str, revision: str | None, fetch: bool, is_wanted: Callable[[str], bool]) -> CheckpointFiles:
        here = None
        try:
            here = cls._of_directory(_snapshot(repo, revision, ("config.json",), local_files_only=True))
            if missing := here._missing(is_wanted):
                raise LocalEntryNotFoundError(f"{missing[0]} is missing")
            # What from_pretrained fetches is without files that have scales alone, so the hub is asked once.
            if not fetch or (here._holds_anything() and (repo, revision) in _ASKED):
                return here
        except (LocalEntryNotFoundError, HFValidationError) as error:
            here = None
            if not fetch:
                raise FileNotFoundError(f"{repo} is not on this machine, or not as a whole") from error
            if isinstance(error, HFValidationError):
                raise ValueError(_nothing(repo)) from error
        try:
            path = _fetch(repo, revision, is_wanted)
        except ValueError:
            raise
        except Exception as error:  # of what a network can raise there is no end
            if here is not None and here._holds_anything():
                return here
            raise ValueError(f"{_nothing(repo)}, or it cannot be fetched: {error}") from error
        _ASKED.add((repo, revision))
        return cls._of_directory(path)

    def _missing(self, is_wanted: Callable[[str], bool]) -> list[str]:
        """Files with wanted tensors that the index names, but that are not there."""
        wanted = {file for name, file in self.tensors.items() if is_wanted(name)}
        return sorted(file for file in wanted if not (Path(self.path) / file).exists())

    def _holds_anything(self) -> bool:
        """Whether there is more than a configuration."""
        return bool(self.tensors) or any(True for pattern in _SMALL_FILES[1:] for _ in Path(self.path).glob(pattern))

    @property
    def names(self) -> Collection[str]:
        """The names of all tensors, the checkpoint's first."""
        return {**self.tensors, **self.extras}.keys()

    def file_of(self, name: str) -> str:
        return self.tensors.get(name) or self.extras[name]

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The tensors called `names`, on the CPU; only these are read.

        Raises ValueError if a file lacks its own, or if one is far too large for a scale.
        """
        opened: dict[str, SafetensorsFile] = {}
        values = {}
        for name in names:
            file = self.file_of(name)
            if file not in opened:
                opened[file] = SafetensorsFile(Path(self.path) / file)
            values[name] = opened[file].read(name)
        return values

    def documents(self, *names: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """The JSON files called `names` that are there, or the one JSON file that was asked for."""
        if self.only is not None:
            names = (self.only,) if self.only.endswith(".json") else ()
        for name in names:
            if (Path(self.path) / name).is_file():
                yield name, read_json(Path(self.path) / name)

    def settings(self, pattern: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """The JSON files of this name that say how the model was quantized."""
        for file in sorted(Path(self.path).glob(pattern)):
            yield file.name, read_json(file)

    def load(self, name: str) -> Any:
        """What torch saved in the file `name`: tensors in plain containers, nothing else is unpickled."""
        file = Path(self.path) / name
        _check_size(file)
        try:
            _check_unpacked_size(file)
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # of what a broken pickle can raise there is no end
            raise ValueError(f"{file} cannot be read as tensors saved by torch: {error}") from error

    def quantizations(self) -> Iterator[dict[str, Any]]:
        """Every quantization configuration in config.json."""
        return (holder[key] for holder, key in quantization_places(self.config))

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The part of config.json that is about the decoder."""
        return text_config_of(self.config)

    def number(self, *keys: str) -> int | None:
        """The first of these of the decoder's configuration that is a positive integer, of no absurd size."""
        for key in keys:
            value = self.text_config.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                if value > MAX_COUNT:
                    raise ValueError(f"{Path(self.path) / 'config.json'}: {key} is beyond {MAX_COUNT}")
                return value
        return None


def text_config_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a configuration that is about the decoder."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def quantization_places(config: Mapping[str, Any]) -> Iterator[tuple[Any, str]]:
    """Where a configuration says how the model was quantized: the object, and under which name."""
    for holder in (config, config.get("text_config")):
        for key in ("quantization_config", "compression_config"):
            if isinstance(holder, dict) and isinstance(holder.get(key), dict):
                yield holder, key


def whole_directory(source: str | os.PathLike[str], files: CheckpointFiles) -> Path:
    """The directory of `files`, which were found at `source`, with what is no weights too: tokenizer, code."""
    if Path(source).exists():
        return Path(files.path)
    try:
        return _snapshot(str(source), Path(files.path).name, None, ignore_patterns=list(WEIGHTS))
    except OfflineModeIsEnabled:
        return Path(files.path)
    except Exception as error:  # of what a network can raise there is no end
        raise ValueError(
            f"the tokenizer and other small files of {source} cannot be fetched: {error}; name {files.path} instead of "
            "it to copy what is on this machine"
        ) from error


def read_bytes(file: Path, limit: int = _MAX_BYTES) -> bytes:
    """At most `limit` bytes of a file. Raises ValueError that names it if it cannot be read."""
    try:
        with file.open("rb") as opened:
            return opened.read(limit)
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def tensors_in(file: Path, is_wanted: Callable[[str], bool]) -> dict[str, torch.Tensor]:
    """The small tensors of one safetensors file whose names are wanted."""
    opened = SafetensorsFile(file)
    return {name: opened.read(name) for name in opened.names if is_wanted(name)}


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError that names the file if there is none."""
    _check_size(file)
    try:
        content = json.loads(read_bytes(file))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, not an object")
    return content


def _read_config(directory: Path) -> dict[str, Any]:
    return read_json(directory / "config.json") if (directory / "config.json").exists() else {}


def _read_index(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index} has no weight_map")
    if outside := [file for file in weight_map.values() if not _is_file_name(file)]:
        raise ValueError(f"{index} names {outside[0]!r}, which is not a file of that directory")
    return weight_map


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and name not in ("", "..") and "\0" not in name and Path(name).name == name


def _names_in(file: Path) -> list[str]:
    return SafetensorsFile(file).names


def _check_size(file: Path) -> None:
    try:
        size = file.stat().st_size
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if size > _MAX_BYTES:
        raise ValueError(f"{file} has {size} bytes; no such file of a checkpoint is that large")


def _check_unpacked_size(file: Path) -> None:
    """Raise ValueError if a zip archive, which is what torch saves, holds far more than its own size says."""
    if read_bytes(file, 4) != b"PK\x03\x04":  # as torch tells
        return
    with zipfile.ZipFile(file) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
    if size > _MAX_BYTES:
        raise ValueError(f"unpacked it has {size} bytes; no such file of a checkpoint is that large")


def _fetch(repo: str, revision: str | None, is_wanted: Callable[[str], bool]) -> Path:
    """The small files of a hub id, and of a checkpoint in many files only those with tensors that are wanted."""
    path = _snapshot(repo, revision, _SMALL_FILES)
    index = _read_index(path / INDEX) if (path / INDEX).exists() else {}
    shards = {file for name, file in index.items() if is_wanted(name)}
    wanted = {*shards, "*kv*scales*.safetensors"} if index else {"*.safetensors"}
    return _snapshot(repo, revision, (*_SMALL_FILES, *wanted))


def _snapshot(repo: str, revision: str | None, patterns: Iterable[str] | None, **options: Any) -> Path:
    patterns = None if patterns is None else list(patterns)
    return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, **options))


def _nothing(source: str) -> str:
    return (
        f"{source} is neither a file, a directory nor a hub id; no KV scales can be read from it "
        f"(sources with a name of their own: {', '.join(SCALE_SOURCES)})"
    )
