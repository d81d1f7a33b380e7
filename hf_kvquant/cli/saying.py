"""What the commands print."""

from __future__ import annotations

import sys
from io import TextIOWrapper

from ..tables import printable


def escape_foreign_letters() -> None:
    """Have standard output escape what its encoding lacks, as standard error does, where it would raise an error.

    On Windows a pipe takes the letters of one code page.
    """
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def say(text: object) -> None:
    """Print on standard output, nothing of which a terminal would take for a command."""
    print(printable(str(text)))


def remark(text: object) -> None:
    """The same on standard error."""
    print(printable(str(text)), file=sys.stderr)
