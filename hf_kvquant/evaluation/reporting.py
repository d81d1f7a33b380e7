"""`write_report`: files of measurements as one page and its pictures."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..tables import printable
from .capacity import Capacity
from .page import page
from .parts import demo_sections, part_sections
from .pictures import plain, unused
from .quality_section import quality_section
from .rows import Comparison
from .sections import Section, capacity_section, speed_section
from .speed import Benchmark

_KINDS = "files of `hf-kvquant eval --save` and `bench --save`, and what this project's benchmarks and demo save"


def write_report(files: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str]) -> list[Path]:
    """Write `report.html`, which needs no other file, and every picture as SVG and PNG.

    Args:
        files: what `compare`, `bench` and `measure_capacity` saved, or this project's benchmarks.
        output: a directory; it is made if it is not there, and files of the same names are replaced.

    Returns the files written, the page first. Raises ValueError for a file that is none of these, ImportError without
    matplotlib, OSError for what cannot be read or written.
    """
    if not files:
        raise ValueError("there are no files to report on")
    sections: list[Section] = []
    names: set[str] = set()
    for file in map(Path, files):
        name = unused(file.stem, names)
        names.add(name)
        sections += sections_of(file, name)
    directory = Path(output)
    directory.mkdir(parents=True, exist_ok=True)
    written = [directory / "report.html"]
    written[0].write_text(page("Key-value caches, measured", sections), encoding="utf-8")
    taken: set[str] = set()
    for picture in (picture for section in sections for picture in section.pictures):
        name = unused(picture.name, taken)
        taken.add(name)
        svg, png = (directory / f"{name}.{kind}" for kind in ("svg", "png"))
        svg.write_text(picture.svg(), encoding="utf-8")
        png.write_bytes(picture.png())
        written += [svg, png]
    return written


def sections_of(file: Path, name: str) -> list[Section]:
    """What is measured in a file; `name` begins the names of its pictures. Raises ValueError for files of no kind."""
    try:
        content = _printable(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not a JSON file: {error}") from error
    make = _maker(content)
    if make is None:
        raise ValueError(f"{file} holds no measurements that are known; they can be {_KINDS}")
    try:
        return make(content, name)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, ArithmeticError) as error:
        raise ValueError(
            f"{file} is broken, or was written by another version of hf_kvquant: {type(error).__name__}: {error}"
        ) from error


def _printable(content: Any) -> Any:
    """Of JSON all texts as pages, pictures and terminals can have them."""
    if isinstance(content, str):
        return printable(content)
    if isinstance(content, list):
        return [_printable(value) for value in content]
    if isinstance(content, dict):
        return {printable(key): _printable(value) for key, value in content.items()}
    return content


def comparisons_of(record: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], Comparison]]:
    """The entries of a record of several models, and their comparisons: of its machine and commit, if not of others."""
    origin = {"machine": record["machine"], "commit": record["git_commit"]}
    found = [(entry, Comparison.from_dict(entry["comparison"])) for entry in record["models"]]
    return [
        (entry, dataclasses.replace(comparison, setup={**origin, **comparison.setup})) for entry, comparison in found
    ]


def record_sections(record: Mapping[str, Any], name: str) -> list[Section]:
    """Of a record of several models' comparisons."""
    return [
        quality_section(comparison, f"{name}-{plain(entry['name'])}", entry["name"], entry["description"])
        for entry, comparison in comparisons_of(record)
    ]


def _maker(content: Any) -> Callable[[Any, str], list[Section]] | None:
    """What makes sections of such content; None if it is of no known kind."""
    if not isinstance(content, dict):
        return None
    if "models" in content:
        return record_sections
    if "parts" in content:
        return part_sections
    if "results" in content:
        return demo_sections
    rows = content.get("rows")
    if not isinstance(rows, list) or not rows or not isinstance(rows[0], dict):
        return None
    kinds: dict[str, Callable[[Any, str], list[Section]]] = {
        "quality": lambda found, name: [quality_section(Comparison.from_dict(found), name)],
        "runs": lambda found, name: [speed_section(Benchmark.from_dict(found), name)],
        "largest": lambda found, name: [capacity_section(Capacity.from_dict(found))],
    }
    return next((make for key, make in kinds.items() if key in rows[0]), None)
