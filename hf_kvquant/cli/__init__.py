"""`hf-kvquant`: inspect, doctor, plan, eval, bench, report, calibrate, convert and serve from a terminal."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any

from transformers.utils import logging

from .arguments import parser
from .commands import COMMANDS
from .saying import remark
from .serving import serve

__all__ = ["main"]

_WITHOUT_COMPRESSED_TENSORS = (
    "`pip install 'hf-kvquant[demo]'` brings compressed-tensors; in Python, a model whose cache alone it quantized "
    "loads without it after `del config.quantization_config`, as the README shows"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 130 if interrupted, 1 with a line on standard error otherwise."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] == "serve":  # whose arguments are transformers' own
        return _serve(arguments[1:])
    options = parser().parse_args(arguments)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            COMMANDS[options.command](options)
    except (ValueError, TypeError, OSError, ImportError) as error:
        remark(f"hf-kvquant: {error}")
        if isinstance(error, ImportError) and "compressed" in str(error):  # transformers names the package alone
            remark(_WITHOUT_COMPRESSED_TENSORS)
        return 1
    except KeyboardInterrupt:
        remark("hf-kvquant: interrupted")
        return 130
    finally:
        logging.set_verbosity(verbosity)
    return 0


def _serve(arguments: Sequence[str]) -> int:
    try:
        serve(arguments)
    except ImportError as error:
        remark(f"hf-kvquant: {error}")
        return 1
    return 0


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    remark(f"warning: {message}")
