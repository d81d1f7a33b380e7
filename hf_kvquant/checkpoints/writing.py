"""Putting scales into the files of a checkpoint, so that a crash at any moment leaves one with all its weights.

Every file is written beside its place and then put there at once; what declares the scales comes last. transformers
takes a `model.safetensors` before any index, and the tensors of all shards whatever the index says: a single file gets
another name when an index comes, and no shard keeps a scale that another one has.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ..atomic_write import atomic_write
from ..scales import LayerScales
from . import sidecar, vllm
from .files import INDEX, CheckpointFiles, read_json, whole_directory
from .found import ModelLayers
from .layouts import (
    JSON_LAYOUTS,
    check_holds,
    choose_layout,
    declared_in,
    limits,
    quantization_of,
    tensors_of,
    vllm_json,
)
from .matching import find_layers
from .names import MAX_LENGTH, looks_like_kv_scale
from .safetensors_file import SafetensorsFile

# Sorts behind every shard of weights: who asks a checkpoint for its dtype looks into the first file.
_SHARD = "model-kv-scales.safetensors"
_SINGLE = "model.safetensors"
_SINGLE_IN_INDEX = "model-00001-of-00001.safetensors"
_CONFIG = "config.json"
_MODELOPT_CONFIG = "hf_quant_config.json"


class HasScales(Protocol):
    """What can be written: what `calibrate` and `read_scales` return."""

    @property
    def kv_cache_dtype(self) -> str | None: ...
    @property
    def layers(self) -> Sequence[LayerScales | None]: ...


@dataclass(frozen=True)
class PreparedScales:
    """Scales that can be written: everything that may be refused has been looked at, and nothing is written yet."""

    path: str
    layout: str
    notes: list[str]
    write: Callable[[], list[str]]


def prepare_checkpoint(
    scales: HasScales,
    model: ModelLayers,
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    layout: str = "auto",
    settings: Mapping[str, Any] | None = None,
    revision: str | None = None,
) -> PreparedScales:
    """Get ready to write scales of the layers of `model`; see `hf_kvquant.write_scales`.

    `settings` say how the scales were made. Raises ValueError for whatever would be refused.
    """
    dtype = scales.kv_cache_dtype
    if dtype is None:
        raise ValueError("these scales do not say which format they are for; they cannot be written")
    if len(model) != len(scales.layers):
        raise ValueError(f"there are scales of {len(scales.layers)} layers, but this model has {len(model)}")
    files = CheckpointFiles.find(checkpoint, revision)
    by_prefix = _by_prefix(scales, model, files)
    if not by_prefix:
        raise ValueError("there are no scales to write")
    layout = choose_layout(layout, files.config, files.path)
    check_holds(layout, dtype, by_prefix)
    target = Path(files.path if output is None else output)

    def prepared(write: Callable[[], list[str]], *more: str) -> PreparedScales:
        notes = limits(layout, dtype, by_prefix, files.config, files.tensors)
        return PreparedScales(str(target), layout, [*notes, *more], write)

    if layout in JSON_LAYOUTS:
        if layout == "sidecar":
            name, content = sidecar.FILE, sidecar.content(dtype, by_prefix, settings or {})
        else:
            _check_not_shadowed(target)
            name, content = vllm.FILE, vllm_json(by_prefix, files.config)
        return prepared(lambda: _put_json(target / name, content))
    _check_complete(scales, model, files)
    declarations = {_CONFIG: declared_in(layout, dtype, by_prefix, files.config)}
    if layout == "modelopt" and (beside := Path(files.path) / _MODELOPT_CONFIG).exists():
        declarations[_MODELOPT_CONFIG] = _with_modelopts_own(beside)
    addition = _Addition(tensors_of(layout, by_prefix), declarations, list(by_prefix))
    if output is None:
        if not Path(checkpoint).is_dir():
            raise ValueError(f"{checkpoint} is not a directory; give an output directory for the new checkpoint")
        _check_in_place(files, addition)
        return prepared(lambda: _add(files, addition))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists and is not empty; give a new directory")
    left = [f"{sidecar.FILE} of {files.path} is not copied: it would come before the new scales"]
    left = left if (Path(files.path) / sidecar.FILE).exists() else []
    if links := sorted(str(link.relative_to(files.path)) for link in _stray_links(Path(files.path), files)):
        left.append(
            f"{', '.join(links)} of {files.path}: links to directories, or to files elsewhere that hold no tensors, "
            "are not copied; copy what they lead to yourself if it belongs to the checkpoint"
        )
    return prepared(lambda: _add_to_copy(whole_directory(checkpoint, files), files, addition, target), *left)


def _by_prefix(scales: HasScales, model: ModelLayers, files: CheckpointFiles) -> dict[str, LayerScales]:
    """The scales by their module's path as the checkpoint spells it, which may be another than the model's."""
    parts = [name.split(".") for name in files.tensors if len(name) <= MAX_LENGTH]
    modules = (".".join(of_name[:end]) for of_name in parts for end in range(1, len(of_name)))
    by_prefix = {}
    for index, (layer, paths, spelled) in enumerate(
        zip(scales.layers, model.paths, find_layers(modules, model.paths), strict=True)
    ):
        if layer is None:
            continue
        if not paths:
            raise ValueError(
                f"there are scales of layer {index}, but no attention module of this model is for that layer alone, so "
                "a checkpoint has no place for them; give them to the cache as they are, scales=..."
            )
        by_prefix[spelled[-1] if spelled else paths[0]] = layer  # the last one is the innermost
    return by_prefix


def _check_complete(scales: HasScales, model: ModelLayers, files: CheckpointFiles) -> None:
    """Raise ValueError if what is declared for all attention modules would be missing in some, or without weights."""
    missing = [
        i for i, (layer, paths) in enumerate(zip(scales.layers, model.paths, strict=True)) if paths and not layer
    ]
    if missing:
        raise ValueError(
            f"layers {missing} have no scales, and readers fill the gaps with whatever is in memory; calibrate with "
            "more data, or use layout='sidecar'"
        )
    if not files.config:
        raise ValueError(f"{files.path} has no config.json to declare scales in; use layout='sidecar'")
    if not files.tensors:
        raise ValueError(f"{files.path} has no safetensors files; save the model as safetensors first")
    if absent := sorted(file for file in set(files.tensors.values()) if not (Path(files.path) / file).exists()):
        raise ValueError(f"{files.path} lacks {', '.join(absent)}; load the model once, which fetches all of it")


# -- files -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Addition:
    """What a checkpoint gets: tensors, new declarations by file, and the modules whose old scales go."""

    tensors: dict[str, torch.Tensor]
    declarations: dict[str, dict[str, Any]]
    prefixes: list[str]


def _add_to_copy(directory: Path, files: CheckpointFiles, addition: _Addition, target: Path) -> list[str]:
    """Copy a checkpoint and add to the copy; `target` is there as a whole or not at all."""
    partial = target.parent / f".{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    links = set(_stray_links(directory, files))

    def left_out(where: str, names: list[str]) -> set[str]:
        """What is of other tools (.git, .cache), this copy itself, links, and what would come before new scales."""
        here = [Path(where) / name for name in names]
        folders = {path.name for path in here if path.is_dir() and (path.name.startswith(".") or path == target)}
        # Links to nothing too; shutil's own way takes a link's path for one from the working directory.
        strays = {path.name for path in here if path in links or not path.exists()}
        return folders | strays | ({sidecar.FILE} if Path(where) == directory else set())

    try:
        shutil.copytree(directory, partial, ignore=left_out)
        changed = _add(CheckpointFiles.find(partial), addition)
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return changed


def _stray_links(directory: Path, files: CheckpointFiles) -> Iterator[Path]:
    """Links in a checkpoint that a copy must not follow: whoever made it could have any file of this machine copied.

    Those to directories, which may go round in circles, and those out of it; weights may lie elsewhere. Raises
    ValueError if what the checkpoint names as weights is something else.
    """
    for where, folders, names in os.walk(directory):
        yield from (Path(where, name) for name in folders if os.path.islink(Path(where, name)))
        folders[:] = [name for name in folders if not name.startswith(".")]
        for link in (Path(where, name) for name in names):
            if link.is_symlink() and link.exists() and not _stays_in(directory, link) and link != directory / INDEX:
                is_weights = Path(where) == directory and link.name in files.tensors.values()
                if not _holds_tensors(link, is_weights):
                    yield link


def _stays_in(directory: Path, link: Path) -> bool:
    """Whether a link leads to a file of the checkpoint that is no other tool's, or into the hub's cache of it."""
    root, target = Path(os.path.realpath(directory)), Path(os.path.realpath(link))
    if root.parent.name == "snapshots" and target.parent == root.parent.parent / "blobs":
        return True
    return target.is_relative_to(root) and not any(
        part.startswith(".") for part in target.relative_to(root).parent.parts
    )


def _holds_tensors(file: Path, is_weights: bool) -> bool:
    try:
        if not file.is_file():
            raise ValueError(f"{file} leads to something that is no file; remove it")
        SafetensorsFile(file)
    except ValueError:
        if is_weights:
            raise
        return False
    return True


def _check_in_place(files: CheckpointFiles, addition: _Addition) -> None:
    """Raise ValueError for what could not be done without a moment at which the checkpoint is wrong."""
    advice = "give an output directory for a checkpoint with the new ones"
    _check_not_shadowed(Path(files.path))
    if stale := _stale(files, addition):
        raise ValueError(f"{files.path} has KV scales among the weights of {', '.join(sorted(stale))}; {advice}")
    before = quantization_of(files.config).get("kv_cache_scheme")
    after = quantization_of(addition.declarations[_CONFIG]).get("kv_cache_scheme")
    if before not in (None, after) and _SHARD in files.tensors.values():
        raise ValueError(f"{files.path} has KV scales for {before}, the new ones are for {after}; {advice}")


def _check_not_shadowed(directory: Path) -> None:
    """Raise ValueError if there are scales that come before whatever else is written."""
    if (directory / sidecar.FILE).exists():
        raise ValueError(
            f"{directory} has scales in {sidecar.FILE}, which come before the new ones; remove it, write with "
            "layout='sidecar', or give an output directory"
        )


def _stale(files: CheckpointFiles, addition: _Addition) -> dict[str, set[str]]:
    """Old scales of the same modules, by the file they are in."""
    modules = tuple(f"{prefix}." for prefix in addition.prefixes)
    stale: dict[str, set[str]] = {}
    for name, file in files.tensors.items():
        if file != _SHARD and name.startswith(modules) and looks_like_kv_scale(name):
            stale.setdefault(file, set()).add(name)
    return stale


def _add(files: CheckpointFiles, addition: _Addition) -> list[str]:
    """Put an addition into a checkpoint's directory; returns the files that are new or changed."""
    directory = Path(files.path)
    weight_map = {name: file for name, file in files.tensors.items() if file != _SHARD}
    changed = []
    for file, names in _stale(files, addition).items():
        _remove_tensors(directory / file, names)
        weight_map = {name: where for name, where in weight_map.items() if name not in names}
        changed.append(file)
    with atomic_write(directory / _SHARD) as partial:
        save_file(addition.tensors, partial, {"format": "pt"})

    index = read_json(directory / INDEX) if (directory / INDEX).exists() else {}
    single = directory / _SINGLE
    sizes = [(directory / file).stat().st_size for file in {*weight_map.values(), _SHARD}]
    becomes_sharded = single.exists()
    if becomes_sharded:
        weight_map = {name: _SINGLE_IN_INDEX if file == _SINGLE else file for name, file in weight_map.items()}
    metadata = index.get("metadata")
    index["metadata"] = {**(metadata if isinstance(metadata, dict) else {}), "total_size": sum(sizes)}
    index["weight_map"] = weight_map | dict.fromkeys(addition.tensors, _SHARD)
    if becomes_sharded:
        _link(single, directory / _SINGLE_IN_INDEX)
    _put_json(directory / INDEX, index)
    changed += [_SHARD, INDEX]
    if becomes_sharded:  # until now it came before the index
        if (directory / _SINGLE_IN_INDEX).exists():
            os.remove(single)
        else:
            single.rename(directory / _SINGLE_IN_INDEX)
        changed.append(_SINGLE_IN_INDEX)
    for file, content in reversed(addition.declarations.items()):  # config.json comes last
        changed += _put_json(directory / file, content)
    return sorted(set(changed) - ({_SINGLE} if becomes_sharded else set()))


def _with_modelopts_own(file: Path) -> dict[str, Any]:
    """The content of hf_quant_config.json with its declaration of the scales."""
    content = read_json(file)
    if not isinstance(quantization := content.setdefault("quantization", {}), dict):
        raise ValueError(f"{file}: quantization is {quantization!r}, not an object; correct or remove the file")
    quantization["kv_cache_quant_algo"] = "FP8"
    return content


def _link(file: Path, name: Path) -> None:
    """Give a file a second name, where the file system can."""
    try:
        os.link(file, name)
    except FileExistsError:  # by a run that was killed
        if not name.samefile(file):
            raise
    except OSError:
        pass


def _remove_tensors(file: Path, names: set[str]) -> None:
    with safe_open(file, framework="pt") as handle:
        metadata = handle.metadata()
    with atomic_write(file) as partial:
        save_file({name: value for name, value in load_file(file).items() if name not in names}, partial, metadata)


def _put_json(file: Path, content: Mapping[str, Any]) -> list[str]:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as partial:
        partial.write_text(text, encoding="utf-8")
    return [file.name]
