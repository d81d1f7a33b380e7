"""`hf-kvquant`: inspect, doctor, plan, eval, bench, report, calibrate, convert and serve from a terminal."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from transformers.utils import logging

from .arguments import parser
from .commands import COMMANDS
from .saying import escape_foreign_letters, remark
from .serving import serve

__all__ = ["main"]

_WITHOUT_COMPRESSED_TENSORS = (
    "`pip install 'hf-kvquant[demo]'` brings compressed-tensors; in Python, a model whose cache alone it quantized "
    "loads without it after `del config.quantization_config`, as the README shows"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 130 if interrupted, 1 with a line on standard error otherwise."""
    arguments = sys.argv[1:] if arguments is None else arguments
    escape_foreign_letters()
    if arguments and arguments[0] == "serve":  # whose arguments are transformers' own
        return _status(partial(serve, arguments[1:]))
    return _status(partial(_run, parser().parse_args(arguments)))


def _run(options: argparse.Namespace) -> None:
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            COMMANDS[options.command](options)
    finally:
        logging.set_verbosity(verbosity)


def _status(command: Callable[[], None]) -> int:
    try:
        command()
    except (ValueError, TypeError, OSError, ImportError) as error:
        remark(f"hf-kvquant: {error}")
        if isinstance(error, ImportError) and "compressed" in str(error):  # transformers names the package alone
            remark(_WITHOUT_COMPRESSED_TENSORS)
        return 1
    except KeyboardInterrupt:
        remark("hf-kvquant: interrupted")
        return 130
    return 0


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    remark(f"warning: {message}")
