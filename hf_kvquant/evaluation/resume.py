"""Measurements in a JSON file that is written after every row, so that an interrupted run can be taken up."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ..atomic_write import atomic_write

Row = TypeVar("Row")


def read_rows(
    path: str | os.PathLike[str] | None, setup: Mapping[str, Any], row_of: Callable[[Mapping[str, Any]], Row]
) -> list[Row]:
    """The rows of an earlier run; none if there is no file.

    Args:
        path: what `write_json` wrote: an object with the entries `setup` and `rows`; None for a run that is not saved.
        setup: what the numbers depend on, as JSON. That of the file must be the same.
        row_of: makes a row of its JSON; may raise ValueError, TypeError and KeyError.

    Raises ValueError if the file's setup is another, and if it is no such file.
    """
    if path is None or not Path(path).exists():
        return []
    path = Path(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        differing = [name for name in setup if found["setup"][name] != setup[name]]
        rows = [] if differing else [row_of(row) for row in found["rows"]]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path} is not a saved measurement ({error!r}); name another file, or remove it") from error
    if differing:
        raise ValueError(
            f"{path} holds a measurement that differs in {', '.join(differing)}; name another file, or remove it"
        )
    return rows


def check_place(path: str | os.PathLike[str] | None) -> None:
    """Raise ValueError if a file could not be written there."""
    if path is not None and not Path(path).parent.is_dir():
        raise ValueError(f"{path}: there is no directory {Path(path).parent} to save to")


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write the whole file or, if interrupted, leave the one before.

    Raises ValueError for numbers that are none (NaN, infinity).
    """
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    with atomic_write(Path(path)) as partial:
        partial.write_text(text, encoding="utf-8")
