"""Hand-made checkpoints."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file

from hf_kvquant import LayerScales
from hf_kvquant.checkpoints import ModelLayers, files

FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
INT8 = {**FP8, "type": "int"}


def layers_at(*paths: str) -> ModelLayers:
    """A model whose cache layers have their attention at `paths` ("" for none), with two key/value heads."""
    return ModelLayers([[path] if path else [] for path in paths], [2] * len(paths))


PATHS = layers_at("model.layers.0.self_attn", "model.layers.1.self_attn")

Tensors = dict[str, torch.Tensor]


def scales_of_layers(num_layers: int = 2, prefix: str = "model.layers.{}.self_attn") -> Tensors:
    """k_scale 0.01, 0.02, ... and v_scale 0.5, 1.0, ..., `[1]`."""
    tensors = {}
    for index in range(num_layers):
        tensors[f"{prefix.format(index)}.k_scale"] = torch.tensor([0.01 * (index + 1)])
        tensors[f"{prefix.format(index)}.v_scale"] = torch.tensor([0.5 * (index + 1)])
    return tensors


def write(
    directory: Path, tensors: Tensors | None = None, scheme: dict[str, Any] | None = FP8, config: Any = None
) -> Path:
    """A checkpoint of one file."""
    directory.mkdir(exist_ok=True)
    if config is None:
        config = {"model_type": "llama"}
        if scheme is not None:
            config["quantization_config"] = {"quant_method": "compressed-tensors", "kv_cache_scheme": scheme}
    (directory / "config.json").write_text(json.dumps(config))
    # A weight, so that a checkpoint without scales is a checkpoint too.
    weight = {"model.layers.0.self_attn.k_proj.weight": torch.ones(4, 4)}
    save_file({**weight, **(scales_of_layers() if tensors is None else tensors)}, directory / "model.safetensors")
    return directory


def write_sharded(directory: Path, shards: dict[str, Tensors], index: dict[str, str] | None = None) -> Path:
    """A checkpoint of several files; `index` overrides entries of the weight map."""
    write(directory)
    (directory / "model.safetensors").unlink()
    for file, tensors in shards.items():
        save_file(tensors, directory / file)
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    content = {"metadata": {}, "weight_map": {**weight_map, **(index or {})}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(content))
    return directory


def write_statistics(directory: Path, seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    """`lmdeploy lite calibrate` of two layers; returns the numbers it saw."""
    directory.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    seen: dict[str, dict[str, torch.Tensor]] = {}
    for name in ("key", "value"):
        channels = torch.rand(16, generator=generator) * 9
        seen[name] = {
            f"model.layers.{index}": torch.randn(63, 2, 16, generator=generator) * channels + channels
            for index in range(2)
        }
        of = {layer: x.half() for layer, x in seen[name].items()}
        statistics = {
            "max": {layer: x.amax(0) for layer, x in of.items()},
            "min": {layer: x.amin(0) for layer, x in of.items()},
            "absmax": {layer: x.abs().amax(0) for layer, x in of.items()},
        }
        torch.save(statistics, directory / f"{name}_stats.pth")
    return seen


def layers_of(found: Any) -> list[LayerScales]:
    assert found is not None
    assert all(layer is not None for layer in found.layers)
    return found.layers


@dataclass
class Hub:
    """A hub with one checkpoint in a directory, and what of it is on this machine.

    Attributes:
        remote, local: the directories.
        is_reachable: whether it answers.
        num_asked: how often it was asked.
    """

    remote: Path
    local: Path
    is_reachable: bool = True
    num_asked: int = field(default=0, init=False)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(files, "snapshot_download", self._download)
        monkeypatch.setattr(files, "_ASKED", set())

    def load(self, *names: str) -> None:
        """Put these files on this machine, as loading a model does."""
        self.local.mkdir(exist_ok=True)
        for name in names:
            shutil.copy(self.remote / name, self.local)

    def present(self) -> set[str]:
        return {str(file.relative_to(self.local)) for file in self.local.rglob("*") if file.is_file()}

    def _download(
        self,
        repo: str,
        *,
        allow_patterns: list[str] | None = None,
        ignore_patterns: list[str] | None = None,
        local_files_only: bool = False,
        **_: Any,
    ) -> str:
        self.num_asked += not local_files_only
        if local_files_only or not self.is_reachable:
            if not self.local.exists():
                raise LocalEntryNotFoundError("nothing is here")
            if not local_files_only:
                raise LocalEntryNotFoundError("nobody answers")
            return str(self.local)
        for file in self.remote.rglob("*"):
            name = str(file.relative_to(self.remote))
            is_asked_for = allow_patterns is None or any(fnmatch(name, pattern) for pattern in allow_patterns)
            if file.is_file() and is_asked_for and not any(fnmatch(name, pattern) for pattern in ignore_patterns or ()):
                (self.local / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, self.local / name)
        return str(self.local)


def with_hub(monkeypatch: pytest.MonkeyPatch, cache: Path, **branches: Path | None) -> dict[str, str]:
    """Make `some-org/tiny` what a hub id is that was fetched: branches with the files of a directory, or with nothing.

    Returns the commit of each branch.
    """
    repo, commits = cache / "models--some-org--tiny", {}
    (repo / "refs").mkdir(parents=True)
    for index, (branch, directory) in enumerate(branches.items()):
        commits[branch] = f"{index}" * 40
        (repo / "refs" / branch).write_text(commits[branch])
        snapshot = repo / "snapshots" / commits[branch]
        snapshot.mkdir(parents=True)
        if directory is None:
            (snapshot / "config.json").write_text("{}")
        else:
            shutil.copytree(directory, snapshot, dirs_exist_ok=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return commits
