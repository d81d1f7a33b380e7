"""`inspect_scales`: what KV scales a checkpoint has, layer by layer, and what is odd about them."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .checkpoint_scales import CheckpointScales
from .checkpoints import ModelLayers, names_like_scales
from .hosts.files import model_layers
from .policy import large_scale
from .reading import read_scales
from .scales import LayerScales, granularity_of
from .skeleton import model_skeleton
from .tables import pair, printable, table

_FIELDS = ("k_scale", "v_scale", "q_scale", "k_zero", "v_zero")
# A factor between scales of one model that calibration does not give.
_FAR = 1000.0


@dataclass(frozen=True)
class LayerInspection:
    """The scales of one cache layer: `ranges` has the smallest and largest of each field, `sources` where it is."""

    layer: int
    granularity: dict[str, str]
    ranges: dict[str, tuple[float, float]]
    sources: dict[str, str]


@dataclass(frozen=True)
class Inspection:
    """What KV scales a checkpoint has. `str()` is a table.

    Attributes:
        path: where they are.
        producer: whose format it is, None if there are none.
        kv_cache_dtype: the format they are for.
        dynamic: the checkpoint asks for scales that are computed at run time.
        layers: those with scales.
        suspicious: what is odd about the values.
        notes: what the reader decided.
        ignored: what looks like KV scales but is not used.
    """

    path: str
    producer: str | None = None
    kv_cache_dtype: str | None = None
    dynamic: bool = False
    layers: list[LayerInspection] = field(default_factory=list)
    suspicious: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        if self.producer is None:
            lines = [f"{self.path}: no {'usable ' if self.ignored else ''}KV scales, and none declared"]
        else:
            kind = "asks for dynamic scales" if self.dynamic else f"scales of {len(self.layers)} layers"
            dtype = self.kv_cache_dtype or "no declared format"
            lines = [f"{self.path}: {kind} for {dtype}, as {self.producer} writes them"]
        if self.layers:
            fields = [name for name in _FIELDS if any(name in layer.ranges for layer in self.layers)]
            rows: list[tuple[str, ...]] = [("layer", *fields, "per", "from")]
            for layer in self.layers:
                values = [_range(layer.ranges.get(name)) for name in fields]
                granularity = pair((layer.granularity.get("k_scale", "-"), layer.granularity.get("v_scale", "-")))
                sources = pair((layer.sources.get("k_scale", "-"), layer.sources.get("v_scale", "-")))
                rows.append((str(layer.layer), *values, granularity, sources))
            lines.append(table(rows))
        lines += [f"suspicious: {line}" for line in self.suspicious]
        lines += [f"note: {line}" for line in self.notes]
        return printable("\n".join(lines + [f"ignored: {name}" for name in self.ignored]))


def inspect_scales(
    source: str | os.PathLike[str], *, model: str | os.PathLike[str] | None = None, revision: str | None = None
) -> Inspection:
    """The KV scales of a checkpoint, with where they come from and what is odd about them.

    Args:
        source: a directory, a file or a hub id.
        model: the directory or hub id of the model, if `source` has no configuration of its own.
        revision: of a hub id.

    Raises ValueError as `read_scales` does for broken files, and for a `model` without a configuration.
    """
    layers = _layers_of(source if model is None else model, revision, needed=model is not None)
    found = read_scales(source, layers, revision=revision)
    if found is None:
        return Inspection(str(source), ignored=names_like_scales(source, revision=revision))
    return Inspection(
        found.path,
        found.producer,
        found.kv_cache_dtype,
        found.dynamic,
        [_inspect(index, layer, found) for index, layer in enumerate(found.layers) if layer is not None],
        _suspicious(found),
        list(found.notes),
        list(found.ignored),
    )


def _layers_of(source: str | os.PathLike[str], revision: str | None, needed: bool) -> ModelLayers | None:
    try:
        return model_layers(model_skeleton(source, revision))
    except ValueError:
        if needed:
            raise
        return None  # then layers go by the number in their path


def _given(layer: LayerScales) -> dict[str, torch.Tensor]:
    return {name: value for name in _FIELDS if (value := getattr(layer, name)) is not None}


def _inspect(index: int, layer: LayerScales, found: CheckpointScales) -> LayerInspection:
    values = _given(layer)
    return LayerInspection(
        index,
        {name: granularity_of(value) for name, value in values.items()},
        {name: (value.min().item(), value.max().item()) for name, value in values.items()},
        {name: f"{source.file}: {source.key}" for name, source in found.sources[index].items()},
    )


def _range(values: tuple[float, float] | None) -> str:
    if values is None:
        return "-"
    low, high = values
    return f"{low:.4g}" if low == high else f"{low:.4g} .. {high:.4g}"


def _suspicious(found: CheckpointScales) -> list[str]:
    """What a user should look at; nothing of it is an error."""
    layers = {index: layer for index, layer in enumerate(found.layers) if layer is not None}
    values = {index: torch.cat([scale.flatten() for scale in layer.of_sides]) for index, layer in layers.items()}
    if not values:
        return []
    if all(bool((scales == 1).all()) for scales in values.values()):
        return ["every scale is exactly 1.0: not measured, or raised to 1.0 by the tool (ModelOpt before 0.43)"]
    remarks = []
    if len(values) > 1 and all(torch.equal(scales, values[min(values)]) for scales in values.values()):
        remarks.append("all layers have the same scales")
    usual = torch.cat(list(values.values())).median().item()
    for index, scales in values.items():
        low, high = scales.min().item(), scales.max().item()
        for side, scale in (("K", layers[index].k_scale), ("V", layers[index].v_scale)):
            if scale is not None and (risk := large_scale(found.kv_cache_dtype, scale)):
                remarks.append(f"layer {index}: {side}: {risk}")
        if low < usual / _FAR or high > usual * _FAR:
            remarks.append(f"layer {index}: scales from {low:.3g} to {high:.3g}, where {usual:.3g} is usual")
    return remarks
