"""`CheckpointScales`: what the files of a checkpoint say of its KV scales, as `read_scales` gives it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from .scales import LayerScales


@dataclass(frozen=True)
class ScaleSource:
    """Where one value was read: the file inside the checkpoint's directory, and the tensor or entry in it."""

    file: str
    key: str


@dataclass(frozen=True)
class CheckpointScales:
    """KV scales of a checkpoint, which `scales=` takes as it takes the path, and `write_scales` writes elsewhere.

    Attributes:
        path: the directory or file they were read from.
        producer: whose format it is, such as `compressed-tensors` or `modelopt`.
        kv_cache_dtype: the format they are made for (`fp8_e4m3`, `int8`), or None if nothing says.
        dynamic: the checkpoint asks for scales that are computed at run time (`layers` then holds None only).
        layers: one entry per cache layer, None where there are none.
        sources: for each layer where its values come from: `{"k_scale": ScaleSource(file, key), ...}`, {} without any.
        notes: what the reader had to decide or found suspicious, for the report.
        ignored: tensors and files that look like KV scales, but are of no layer of the model or of no known format.
    """

    path: str
    producer: str
    kv_cache_dtype: str | None
    dynamic: bool
    layers: list[LayerScales | None] = field(repr=False)
    sources: list[dict[str, ScaleSource]] = field(repr=False)
    notes: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> CheckpointScales:
        """What `to_dict` gave. Raises ValueError for what it cannot have given."""
        kinds = {
            "path": str,
            "producer": str,
            "kv_cache_dtype": str | None,
            "dynamic": bool,
            "notes": list,
            "ignored": list,
        }
        wrong = [name for name, kind in kinds.items() if not isinstance(entries.get(name), kind)]
        if wrong or set(entries) != FIELDS:
            raise ValueError(f"saved checkpoint scales are malformed: {', '.join(wrong) or sorted(entries)}")
        try:
            layers = [None if layer is None else LayerScales.from_dict(layer) for layer in entries["layers"]]
            sources = [{name: ScaleSource(**where) for name, where in of.items()} for of in entries["sources"]]
        except (AttributeError, TypeError) as error:
            raise ValueError(f"layers or sources of saved checkpoint scales are malformed: {error}") from error
        if len(layers) != len(sources):
            raise ValueError(f"saved checkpoint scales have {len(layers)} layers, but sources of {len(sources)}")
        return cls(**{**entries, "layers": layers, "sources": sources})

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON, as a saved generation configuration has it; `scales=` takes it back."""
        layers = [None if layer is None else layer.to_dict() for layer in self.layers]
        sources = [{name: asdict(where) for name, where in of.items()} for of in self.sources]
        return {**vars(self), "layers": layers, "sources": sources, "notes": [*self.notes], "ignored": [*self.ignored]}


FIELDS = frozenset(f.name for f in fields(CheckpointScales))
