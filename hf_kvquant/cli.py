"""`hf-kvquant`: inspect, doctor, plan, eval, bench, report, calibrate and convert from a terminal."""

from __future__ import annotations

import argparse
import json
import re
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import is_accelerate_available, logging

from . import __version__
from .calibration import ESTIMATORS, STATIC_FORMATS, calibrate
from .calibration_data import batches_of
from .checkpoints.layouts import JSON_LAYOUTS, LAYOUTS
from .doctor import diagnose
from .evaluation import ComparisonRow, compare
from .evaluation.benchmark import bench
from .evaluation.caches import DEFAULT_FORMATS
from .evaluation.capacity import CapacityRow, check_capacity, measure_capacity
from .evaluation.comparison import check_comparison
from .evaluation.generating import check_generating
from .evaluation.random_weights import random_model
from .evaluation.reporting import write_report
from .evaluation.speed import BenchRow
from .exporting import WrittenScales, check_export, write_scales
from .formats import get_format
from .inspection import inspect_scales
from .planning import plan_memory
from .reading import read_scales
from .scales import GRANULARITIES
from .skeleton import model_skeleton

_UNITS = {"": 2**30, "MB": 10**6, "MIB": 2**20, "GB": 10**9, "GIB": 2**30, "TB": 10**12, "TIB": 2**40}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 130 if interrupted, 1 with a line on standard error otherwise."""
    options = _parser().parse_args(arguments)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            options.run(options)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"hf-kvquant: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("hf-kvquant: interrupted", file=sys.stderr)
        return 130
    finally:
        logging.set_verbosity(verbosity)
    return 0


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-kvquant",
        description="8-bit KV caches for transformers: inspect scales, plan memory, measure quality and speed, "
        "calibrate.",
    )
    parser.add_argument("--version", action="version", version=f"hf-kvquant {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        added.set_defaults(run=run)
        return added

    inspect = command("inspect", _inspect, "show the KV scales of a checkpoint and what is odd about them")
    inspect.add_argument("path", help="directory, file or hub id")
    inspect.add_argument("--model", help="directory or hub id of the model, if the path has no config.json")

    doctor = command("doctor", _doctor, "say what the cache will do with a model, without loading it")
    doctor.add_argument("model", help="directory or hub id")
    doctor.add_argument(
        "--device", type=_device, help="where it is to run, such as cpu or cuda (default: what this machine has)"
    )
    doctor.add_argument(
        "--kv-cache-dtype", default="auto", type=_kv_cache_dtype,
        help="as in cache_config; K,V for a pair (default: auto)",
    )  # fmt: skip
    doctor.add_argument("--scales", default="auto", help="as in cache_config (default: auto)")

    plan = command("plan", _plan, "show what a model's cache takes by batch and format, and what fits")
    plan.add_argument("model", help="directory or hub id")
    plan.add_argument("--context", type=int, help="tokens of a sequence (default: what the model is made for)")
    plan.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 128], help="sequences (default: 1 8 32 128)")
    plan.add_argument("--memory", type=_bytes, help="memory of the device, such as 24GiB or 80GB; a bare number is GiB")

    for added in (inspect, doctor, plan):
        added.add_argument("--json", action="store_true", help="print JSON")

    eval_ = command("eval", _eval, "compare what caches cost a model in quality, ours and those of transformers")
    eval_.add_argument("model", help="directory or hub id")
    eval_.add_argument(
        "--formats", nargs="+", type=_kv_cache_dtype, default=list(DEFAULT_FORMATS), metavar="FORMAT",
        help=f"formats of our cache; K,V for a pair (default: {' '.join(DEFAULT_FORMATS)})",
    )  # fmt: skip
    eval_.add_argument("--context", type=int, default=1024, help="tokens of a window (default: 1024)")
    eval_.add_argument("--num-windows", type=int, default=8, help="number of windows to read, at most (default: 8)")
    eval_.add_argument(
        "--new-tokens", type=int, default=64, help="tokens to generate in each greedy continuation (default: 64)"
    )
    eval_.add_argument("--steps", type=int, help="tokens of a window read one by one (default: half of it)")
    eval_.add_argument("--attention", default="kvquant", help="attention implementation (default: kvquant)")
    eval_.add_argument(
        "--retrieval", nargs="+", type=int, default=[], metavar="LENGTH",
        help="also look for facts in contexts of so many tokens",
    )  # fmt: skip
    eval_.add_argument(
        "--speculation", nargs="?", const=True, default=False, metavar="ASSISTANT",
        help="also count accepted drafts: of prompt lookup and, with a directory or hub id, of that model",
    )  # fmt: skip

    bench_ = command("bench", _bench, "time generation over each cache, ours and those of transformers, by size")
    bench_.add_argument("model", help="directory or hub id")
    bench_.add_argument(
        "--formats", nargs="+", type=_kv_cache_dtype, default=list(DEFAULT_FORMATS), metavar="FORMAT",
        help=f"formats of our cache; K,V for a pair (default: {' '.join(DEFAULT_FORMATS)})",
    )  # fmt: skip
    bench_.add_argument(
        "--context", type=int, nargs="+", help="tokens of a prompt (default: 1024 4096; with --largest 8192)"
    )
    bench_.add_argument("--batch", type=int, nargs="+", default=[1], help="sequences at a time (default: 1)")
    bench_.add_argument("--new-tokens", type=int, default=32, help="tokens to generate after each prompt (default: 32)")
    bench_.add_argument("--rounds", type=int, default=3, help="how often each cache is measured (default: 3)")
    bench_.add_argument(
        "--random-weights", action="store_true", help="read the model's configuration only, and make its weights up"
    )
    bench_.add_argument(
        "--largest", action="store_true", help="instead, on a GPU: the largest batch and context that its memory holds"
    )

    report = command("report", _report_on, "make tables and pictures of what eval and bench saved, as one HTML file")
    report.add_argument("files", nargs="+", metavar="FILE", help="written by eval --save or bench --save")
    report.add_argument("--output", required=True, metavar="DIR", help="directory for report.html and its pictures")

    calibrate_ = command("calibrate", _calibrate, "measure scales on text and write them into a checkpoint")
    calibrate_.add_argument("model", help="directory or hub id")
    calibrate_.add_argument(
        "--kv-cache-dtype", default="fp8", choices=["fp8", *STATIC_FORMATS], help="storage format (default: fp8)"
    )
    calibrate_.add_argument(
        "--granularity", default="tensor", choices=GRANULARITIES,
        help="one scale per tensor, head or channel (default: tensor)",
    )  # fmt: skip
    calibrate_.add_argument(
        "--estimator", default="absmax", choices=ESTIMATORS,
        help="how the range is chosen: the largest number, a percentile, or the least squared error (default: absmax)",
    )  # fmt: skip
    calibrate_.add_argument(
        "--percentile", type=float, default=99.99, help="percentile of --estimator percentile (default: 99.99)"
    )
    calibrate_.add_argument("--asymmetric", action="store_true", help="put a zero in the middle of the range")
    calibrate_.add_argument("--q-scale", action="store_true", help="measure scales of the queries as well")
    calibrate_.add_argument(
        "--num-samples", type=int, default=512, help="number of sequences to read, at most (default: 512)"
    )
    calibrate_.add_argument("--max-length", type=int, default=2048, help="tokens of a sequence (default: 2048)")
    calibrate_.add_argument("--batch-size", type=int, default=1, help="sequences in a forward pass (default: 1)")
    for added in (eval_, calibrate_):
        added.add_argument(
            "--data", required=True, help="text, JSON or JSONL file, or name[:config][:split] of a data set"
        )
    for added in (eval_, bench_):
        added.add_argument(
            "--save", metavar="FILE", help="save after every row; if the file is there, what it lacks is measured"
        )
    for added in (eval_, bench_, calibrate_):
        added.add_argument(
            "--device", default="auto", type=_device, help="cpu, cuda, ..., or auto: whatever there is (default)"
        )
        added.add_argument("--dtype", default="auto", type=_dtype, help="dtype to load the model in (default: its own)")

    convert = command("convert", _convert, "take the scales of one checkpoint or file into another")
    convert.add_argument("source", help="where the scales are: directory, file or hub id")
    convert.add_argument("model", help="directory or hub id of the model that gets them")

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
    for added in (inspect, doctor, plan, eval_, bench_):
        added.add_argument("--revision", help="branch, tag or commit, if the model is a hub id")
    return parser


def _kv_cache_dtype(text: str) -> str | tuple[str, str]:
    """A format, or those of K and V."""
    key, comma, value = text.partition(",")
    return (key, value) if comma else key


def _bytes(text: str) -> int:
    match = re.fullmatch(r"([\d.]+)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 24GiB, 80GB or a number of GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _device(text: str) -> str:
    try:
        return text if text == "auto" else str(torch.device(text))
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no device; write cpu, cuda, cuda:1, ...") from error


def _dtype(text: str) -> torch.dtype | str:
    """`auto`, or a dtype that weights can have."""
    dtype = getattr(torch, text.removeprefix("torch."), None)
    if text != "auto" and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise argparse.ArgumentTypeError(f"{text!r} is no dtype of weights; write auto, bfloat16, float16 or float32")
    return dtype or text


def _show(result: Any, as_json: bool) -> None:
    print(json.dumps(result.to_dict(), indent=2) if as_json else result)


def _inspect(options: argparse.Namespace) -> None:
    _show(inspect_scales(options.path, model=options.model, revision=options.revision), options.json)


def _doctor(options: argparse.Namespace) -> None:
    wanted = {"kv_cache_dtype": options.kv_cache_dtype, "scales": options.scales}
    asked = {name: value for name, value in wanted.items() if value != "auto"}
    _show(diagnose(options.model, asked, device=options.device, revision=options.revision), options.json)


def _plan(options: argparse.Namespace) -> None:
    planned = plan_memory(
        options.model,
        context=options.context,
        batches=options.batch,
        memory=options.memory,
        revision=options.revision,
    )
    _show(planned, options.json)


def _place(options: argparse.Namespace) -> torch.device:
    """The device that is asked for. Raises ValueError if this machine does not have it."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if options.device == "auto":
        return accelerator or torch.device("cpu")
    device = torch.device(options.device)
    count = torch.accelerator.device_count() if accelerator is not None else 0
    there = [str(torch.device(accelerator.type, index)) for index in range(count)] if accelerator is not None else []
    if device.type != "cpu" and str(torch.device(device.type, device.index or 0)) not in there:
        raise ValueError(f"--device {device}: torch finds no such device here; there is {', '.join(['cpu', *there])}")
    return device


def _load(options: argparse.Namespace, path: str | None = None, **further: Any) -> Any:
    """The model where it is asked for, in evaluation mode; or another one, by its path."""
    device = _place(options)
    spread = options.device == "auto" and device.type != "cpu" and is_accelerate_available()
    placed: dict[str, Any] = {"device_map": "auto"} if spread else {}
    model = AutoModelForCausalLM.from_pretrained(path or options.model, dtype=options.dtype, **placed, **further)
    return model if spread else model.to(device)


def _random_model(options: argparse.Namespace, device: torch.device) -> PreTrainedModel:
    # Writing takes a checkpoint as it is now, so what writes has no option for it.
    return random_model(options.model, options.dtype, device, getattr(options, "revision", None))


def _skeleton(options: argparse.Namespace) -> PreTrainedModel:
    """The model that will be loaded, without weights: enough to refuse other arguments before the loading.

    Raises ValueError for a device that is not here.
    """
    _place(options)
    model = _random_model(options, torch.device("meta"))
    model.config._name_or_path = options.model
    return model


def _check_data(options: argparse.Namespace, model: PreTrainedModel, length: int) -> None:
    """Raise ValueError or TypeError if not even the first piece of the data can be read."""
    next(batches_of(options.data, model, None, 1, length, 1), None)


def _eval(options: argparse.Namespace) -> None:
    def tell(row: ComparisonRow) -> None:
        print(f"{row.cache}: {row.failed or 'done'}", file=sys.stderr)

    measured = {
        "formats": options.formats,
        "context": options.context,
        "num_windows": options.num_windows,
        "new_tokens": options.new_tokens,
        "steps": options.steps,
        "retrieval": options.retrieval,
        "save": options.save,
    }
    skeleton = _skeleton(options)
    check_comparison(skeleton, **measured)
    _check_data(options, skeleton, options.context)
    load = partial(_load, options, attn_implementation=options.attention)
    tokenizer = None  # the one beside the model
    if options.revision is not None:
        tokenizer = AutoTokenizer.from_pretrained(options.model, revision=options.revision)
    speculation = options.speculation if isinstance(options.speculation, bool) else load(path=options.speculation)
    model = load(revision=options.revision)
    print(compare(model, options.data, **measured, tokenizer=tokenizer, speculation=speculation, on_row=tell))


def _bench(options: argparse.Namespace) -> None:
    def tell(row: BenchRow | CapacityRow) -> None:
        if not sys.stderr.isatty():  # there is a progress bar
            print(f"{row}: {row.failed or 'done'}", file=sys.stderr)

    device = _place(options)
    measured = {
        "formats": options.formats,
        "contexts": options.context,
        "batches": options.batch,
        "save": options.save,
    }
    if options.largest:
        check_capacity(_skeleton(options), device, **measured)
    else:
        measured |= {"new_tokens": options.new_tokens, "rounds": options.rounds}
        check_generating(_skeleton(options), **measured)
    model = _random_model(options, device) if options.random_weights else _load(options, revision=options.revision)
    name = f"{options.model}{', random weights' if options.random_weights else ''}"
    print((measure_capacity if options.largest else bench)(model, **measured, name=name, on_row=tell))


def _report_on(options: argparse.Namespace) -> None:
    page, *pictures = write_report(options.files, options.output)
    print(f"{page}; beside it {len(pictures)} files of its pictures")


def _calibrate(options: argparse.Namespace) -> None:
    # Hours of calibration must not end in a refusal.
    check_export(
        options.model,
        options.output,
        layout=options.layout,
        kv_cache_dtype=get_format(options.kv_cache_dtype).name,
        granularity=options.granularity,
        symmetric=not options.asymmetric,
        q_scale=options.q_scale,
    )
    _check_data(options, _skeleton(options), options.max_length)
    model = _load(options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are among the notes
        scales = calibrate(
            model,
            options.data,
            kv_cache_dtype=options.kv_cache_dtype,
            granularity=options.granularity,
            estimator=options.estimator,
            symmetric=not options.asymmetric,
            percentile=options.percentile,
            q_scale=options.q_scale,
            num_samples=options.num_samples,
            max_length=options.max_length,
            batch_size=options.batch_size,
        )
    for note in scales.notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"{scales.num_tokens:,} tokens seen")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they came before
        written = write_scales(scales, options.model, options.output, layout=options.layout)
    _report(written)


def _convert(options: argparse.Namespace) -> None:
    model = model_skeleton(options.model)
    scales = read_scales(options.source, model)
    if scales is None:
        raise ValueError(f"{options.source} has no KV scales")
    for note in scales.notes:
        print(f"note: {note}", file=sys.stderr)
    if scales.dynamic:
        raise ValueError(f"{options.source} asks for dynamic scales; there are none to convert")
    _report(write_scales(scales, options.model, options.output, layout=options.layout, model=model))


def _report(written: WrittenScales) -> None:
    print(f"{written.path}: scales written as {written.layout} ({', '.join(written.files)})")
