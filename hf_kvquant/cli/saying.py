"""What the commands print."""

from __future__ import annotations

import sys

from ..tables import printable


def say(text: object) -> None:
    """Print on standard output, nothing of which a terminal would take for a command."""
    print(printable(str(text)))


def remark(text: object) -> None:
    """The same on standard error."""
    print(printable(str(text)), file=sys.stderr)
