"""Text for people: aligned columns, sizes in bytes."""

from __future__ import annotations

from collections.abc import Sequence


def printable(text: str) -> str:
    """`text`, lines and letters of all languages as they are, with escapes for what would command a terminal."""
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() or letter == "\n" else letter.encode("unicode_escape").decode()
        for letter in text
    )


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of as many cells each, in columns; the first row is the header."""
    rows = [[printable(cell).replace("\n", "\\n") for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def size(nbytes: float) -> str:
    """`nbytes` in the largest binary unit that leaves at least one."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024 or unit == "GiB":
            break
        nbytes /= 1024
    return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"


def pair(values: tuple[object, object]) -> str:
    """What K and V have, once if it is the same."""
    one, other = (str(value) for value in values)
    if one == other:
        return one
    module = one.rpartition(".")[0] + "."  # of two tensors of one module the module is named once
    return f"{one} / {other.removeprefix(module)}"
