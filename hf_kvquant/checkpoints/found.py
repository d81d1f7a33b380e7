"""What reading gives: scales by cache layer, and where each value comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..scales import LayerScales


@dataclass(frozen=True)
class ScaleSource:
    """Where one value was read: the file inside the checkpoint's directory, and the tensor or entry in it."""

    file: str
    key: str


@dataclass(frozen=True)
class CheckpointScales:
    """KV scales of a checkpoint.

    Attributes:
        path: the directory or file they were read from.
        producer: whose format it is, such as `compressed-tensors` or `modelopt`.
        kv_cache_dtype: the format they are made for (`fp8_e4m3`, `int8`), or None if nothing says.
        dynamic: the checkpoint asks for scales that are computed at run time (`layers` then holds None only).
        layers: one entry a cache layer, None where there are none.
        sources: for each layer where its values come from: `{"k_scale": ScaleSource(file, key), ...}`, {} without any.
        notes: what the reader had to decide or found suspicious, for the report.
        ignored: tensors and files that look like KV scales, but are of no layer of the model or of no known format.
    """

    path: str
    producer: str
    kv_cache_dtype: str | None
    dynamic: bool
    layers: list[LayerScales | None]
    sources: list[dict[str, ScaleSource]]
    notes: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ModelLayers:
    """What must be known of a model to tell which of its cache layers a scale belongs to.

    Attributes:
        paths: for each cache layer the module paths its attention may have (`model.layers.0.self_attn`).
        num_kv_heads: of each cache layer; None where unknown.
        model_type: the host's name of the architecture, or None.
    """

    paths: Sequence[Sequence[str]]
    num_kv_heads: Sequence[int | None]
    model_type: str | None = None

    def __len__(self) -> int:
        return len(self.paths)
