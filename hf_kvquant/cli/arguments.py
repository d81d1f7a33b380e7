"""What the commands can be told."""

from __future__ import annotations

import argparse
import re

import torch

from .. import __version__
from ..calibration import ESTIMATORS, STATIC_FORMATS
from ..checkpoints.layouts import JSON_LAYOUTS, LAYOUTS
from ..evaluation.caches import DEFAULT_FORMATS
from ..scales import GRANULARITIES

_UNITS = {"": 2**30, "MB": 10**6, "MIB": 2**20, "GB": 10**9, "GIB": 2**30, "TB": 10**12, "TIB": 2**40}


def parser() -> argparse.ArgumentParser:
    """The parser; what it parses has the name of its command in `command`."""
    parser = argparse.ArgumentParser(
        prog="hf-kvquant",
        description="8-bit KV caches for transformers: inspect scales, plan memory, measure quality and speed, "
        "calibrate.",
    )
    parser.add_argument("--version", action="version", version=f"hf-kvquant {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command", dest="command")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")

    inspect = command("inspect", "show the KV scales of a checkpoint and what is odd about them")
    inspect.add_argument("path", help="directory, file or hub id")
    inspect.add_argument("--model", help="directory or hub id of the model, if the path has no config.json")

    doctor = command("doctor", "say what the cache will do with a model, without loading it")
    doctor.add_argument("model", help="directory or hub id")
    doctor.add_argument(
        "--kv-cache-dtype", default="auto", type=_kv_cache_dtype,
        help="as in cache_config; K,V for a pair (default: %(default)s)",
    )  # fmt: skip
    doctor.add_argument("--scales", default="auto", help="as in cache_config (default: %(default)s)")

    plan = command("plan", "show what a model's cache takes by batch and format, and what fits")
    plan.add_argument("model", help="directory or hub id")
    plan.add_argument("--context", type=int, help="tokens of a sequence (default: what the model is made for)")
    plan.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 128], help="sequences (default: 1 8 32 128)")
    plan.add_argument("--memory", type=_bytes, help="memory of the device, such as 24GiB or 80GB; a bare number is GiB")

    for added in (inspect, doctor, plan):
        added.add_argument("--json", action="store_true", help="print JSON")

    eval_ = command("eval", "compare what caches cost a model in quality, ours and those of transformers")
    eval_.add_argument("model", help="directory or hub id")
    eval_.add_argument("--context", type=int, default=1024, help="tokens of a window (default: %(default)s)")
    eval_.add_argument(
        "--num-windows", type=int, default=8, help="number of windows to read, at most (default: %(default)s)"
    )
    eval_.add_argument(
        "--new-tokens", type=int, default=64,
        help="tokens to generate in each greedy continuation (default: %(default)s)",
    )  # fmt: skip
    eval_.add_argument("--steps", type=int, help="tokens of a window read one by one (default: half of it)")
    eval_.add_argument("--attention", default="kvquant", help="attention implementation (default: %(default)s)")
    eval_.add_argument(
        "--retrieval", nargs="+", type=int, default=[], metavar="LENGTH",
        help="also look for facts in contexts of so many tokens",
    )  # fmt: skip
    eval_.add_argument(
        "--speculation", nargs="?", const=True, default=False, metavar="ASSISTANT",
        help="also count accepted drafts: of prompt lookup and, with a directory or hub id, of that model",
    )  # fmt: skip

    bench_ = command("bench", "time generation over each cache, ours and those of transformers, by size")
    bench_.add_argument("model", help="directory or hub id")
    bench_.add_argument(
        "--context", type=int, nargs="+",
        help="tokens of a prompt (default: 1024 4096, with --largest 8192, if the model is made for them; if for none, "
        "half of what it is made for)",
    )  # fmt: skip
    bench_.add_argument("--batch", type=int, nargs="+", default=[1], help="sequences at a time (default: 1)")
    bench_.add_argument(
        "--new-tokens", type=int, default=32, help="tokens to generate after each prompt (default: %(default)s)"
    )
    bench_.add_argument("--rounds", type=int, default=3, help="how often each cache is measured (default: %(default)s)")
    bench_.add_argument(
        "--random-weights", action="store_true", help="read the model's configuration only, and make its weights up"
    )
    bench_.add_argument(
        "--largest", action="store_true", help="instead, on a GPU: the largest batch and context that its memory holds"
    )

    report = command("report", "make tables and pictures of what eval and bench saved, as one HTML file")
    report.add_argument("files", nargs="+", metavar="FILE", help="written by eval --save or bench --save")
    report.add_argument("--output", required=True, metavar="DIR", help="directory for report.html and its pictures")

    calibrate_ = command("calibrate", "measure scales on text and write them into a checkpoint")
    calibrate_.add_argument("model", help="directory or hub id")
    calibrate_.add_argument(
        "--kv-cache-dtype", default="fp8", choices=["fp8", *STATIC_FORMATS],
        help="storage format (default: %(default)s)",
    )  # fmt: skip
    calibrate_.add_argument(
        "--granularity", default="tensor", choices=GRANULARITIES,
        help="one scale per tensor, head or channel (default: %(default)s)",
    )  # fmt: skip
    calibrate_.add_argument(
        "--estimator", default="absmax", choices=ESTIMATORS,
        help="how the range is chosen: the largest number, a percentile, or the least squared error "
        "(default: %(default)s)",
    )  # fmt: skip
    calibrate_.add_argument(
        "--percentile", type=float, default=99.99, help="percentile of --estimator percentile (default: %(default)s)"
    )
    calibrate_.add_argument("--asymmetric", action="store_true", help="put a zero in the middle of the range")
    calibrate_.add_argument("--q-scale", action="store_true", help="measure scales of the queries as well")
    calibrate_.add_argument(
        "--num-samples", type=int, default=512, help="number of sequences to read, at most (default: %(default)s)"
    )
    calibrate_.add_argument("--max-length", type=int, default=2048, help="tokens of a sequence (default: %(default)s)")
    calibrate_.add_argument(
        "--batch-size", type=int, default=1, help="sequences in a forward pass (default: %(default)s)"
    )
    for added in (eval_, calibrate_):
        added.add_argument(
            "--data", required=True, help="text, JSON or JSONL file, or name[:config][:split] of a data set"
        )
    for added in (eval_, bench_):
        added.add_argument(
            "--formats", nargs="+", type=_kv_cache_dtype, default=list(DEFAULT_FORMATS), metavar="FORMAT",
            help=f"formats of our cache; K,V for a pair (default: {' '.join(DEFAULT_FORMATS)})",
        )  # fmt: skip
        added.add_argument(
            "--save", metavar="FILE", help="save after every row; if the file is there, what it lacks is measured"
        )
    for added in (doctor, eval_, bench_, calibrate_):
        added.add_argument(
            "--device", default="auto", type=_device,
            help="cpu, cuda, ..., or auto: whatever there is (default: %(default)s)",
        )  # fmt: skip
    for added in (eval_, bench_, calibrate_):
        added.add_argument("--dtype", default="auto", type=_dtype, help="dtype to load the model in (default: its own)")

    convert = command("convert", "take the scales of one checkpoint or file into another")
    convert.add_argument("source", help="where the scales are: directory, file or hub id")
    convert.add_argument("--source-revision", help="branch, tag or commit, if the source is a hub id")
    convert.add_argument("model", help="directory or hub id of the model that gets them")
    convert.add_argument(
        "--kv-cache-dtype",
        default="int8",
        help="format of the scales, where the source leaves it open: LMDeploy's statistics (default: %(default)s)",
    )
    convert.add_argument(
        "--granularity", default="channel", choices=GRANULARITIES,
        help="one scale per tensor, head or channel, likewise (default: %(default)s)",
    )  # fmt: skip

    for added in (calibrate_, convert):
        target = added.add_mutually_exclusive_group(required=True)
        target.add_argument(
            "--output", help=f"new directory for the checkpoint; for {' and '.join(JSON_LAYOUTS)}, where the file goes"
        )
        target.add_argument("--in-place", action="store_true", help="add to the model's own directory")
        added.add_argument(
            "--layout", default="auto", choices=["auto", *LAYOUTS],
            help="how scales are written (default: auto, by the checkpoint's own quantization)",
        )  # fmt: skip
    # For the list of commands: what follows `serve` is not parsed here.
    command("serve", "run transformers' server over 8-bit caches; takes the arguments of `transformers serve`")

    for added in (inspect, doctor, plan, eval_, bench_, calibrate_, convert):
        added.add_argument("--revision", help="branch, tag or commit, if the model is a hub id")
    return parser


def _kv_cache_dtype(text: str) -> str | tuple[str, str]:
    """A format, or those of K and V."""
    key, comma, value = text.partition(",")
    return (key, value) if comma else key


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 24GiB, 80GB or a number of GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _device(text: str) -> str | None:
    """A device's name; None for `auto`."""
    try:
        return None if text == "auto" else str(torch.device(text))
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no device; write cpu, cuda, cuda:1, ...") from error


def _dtype(text: str) -> torch.dtype | str:
    """`auto`, or a dtype that weights can have."""
    dtype = getattr(torch, text.removeprefix("torch."), None)
    if text != "auto" and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise argparse.ArgumentTypeError(f"{text!r} is no dtype of weights; write auto, bfloat16, float16 or float32")
    return dtype or text
