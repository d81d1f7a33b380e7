"""Files that are as they were or whole, whenever a program breaks off or another one looks."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A new, empty file beside `path` to write to, which takes its place at the end; after an error nothing is left.

    A link at `path` is replaced, not followed.
    """
    # A new file: under a name that is known before, a link might lie there and be written through.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        yield partial
        with partial.open("rb+") as file:  # Windows flushes only what it may write to
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
