"""What the commands do."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import is_accelerate_available

from ..calibration import calibrate, check_calibrating
from ..calibration_data import batches_of
from ..doctor import diagnose
from ..evaluation import ComparisonRow, compare
from ..evaluation.benchmark import bench
from ..evaluation.capacity import CapacityRow, check_capacity, measure_capacity
from ..evaluation.comparison import check_comparison
from ..evaluation.generating import check_generating
from ..evaluation.random_weights import random_model
from ..evaluation.reporting import write_report
from ..evaluation.speed import BenchRow
from ..exporting import WrittenScales, check_export, write_scales
from ..formats import get_format
from ..inspection import inspect_scales
from ..planning import plan_memory
from ..reading import read_scales
from ..skeleton import model_skeleton
from .saying import remark, say


def _show(result: Any, as_json: bool) -> None:
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))  # which has escapes of its own
    else:
        say(result)


def _inspect(options: argparse.Namespace) -> None:
    _show(inspect_scales(options.path, model=options.model, revision=options.revision), options.json)


def _doctor(options: argparse.Namespace) -> None:
    asked = {"kv_cache_dtype": options.kv_cache_dtype, "scales": options.scales}
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
    if options.device is None:
        return accelerator or torch.device("cpu")
    device = torch.device(options.device)
    count = torch.accelerator.device_count() if accelerator is not None else 0
    there = [str(torch.device(accelerator.type, index)) for index in range(count)] if accelerator is not None else []
    if device.type != "cpu" and str(torch.device(device.type, device.index or 0)) not in there:
        raise ValueError(f"--device {device}: torch finds no such device here; there is {', '.join(['cpu', *there])}")
    return device


def _load(options: argparse.Namespace, assistant: str | None = None, **further: Any) -> Any:
    """The model where it is asked for, in evaluation mode; or its assistant."""
    device = _place(options)
    spread = options.device is None and device.type != "cpu" and is_accelerate_available()
    placed: dict[str, Any] = {"device_map": "auto"} if spread else {}
    source, revision = (options.model, options.revision) if assistant is None else (assistant, None)
    model = AutoModelForCausalLM.from_pretrained(source, revision=revision, dtype=options.dtype, **placed, **further)
    if revision is not None:
        model.config._commit_hash = revision  # its scales and tokenizer are of this one, too
    return model if spread else model.to(device)


def _random_model(options: argparse.Namespace, device: torch.device) -> PreTrainedModel:
    return random_model(options.model, options.dtype, device, options.revision)


def _skeleton(options: argparse.Namespace) -> PreTrainedModel:
    """The model that will be loaded, without weights: enough to refuse other arguments before the loading.

    Raises ValueError for a device that is not here.
    """
    _place(options)
    model = _random_model(options, torch.device("meta"))
    model.config._name_or_path, model.config._commit_hash = options.model, options.revision
    return model


def _check_data(options: argparse.Namespace, model: PreTrainedModel, length: int) -> None:
    """Raise ValueError or TypeError if not even the first piece of the data can be read."""
    next(batches_of(options.data, model, None, 1, length, 1), None)


def _eval(options: argparse.Namespace) -> None:
    def tell(row: ComparisonRow) -> None:
        if not sys.stderr.isatty():  # there is a progress bar
            remark(f"{row.cache}: {row.failed or 'done'}")

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
    speculation = options.speculation if isinstance(options.speculation, bool) else load(options.speculation)
    say(compare(load(), options.data, **measured, speculation=speculation, on_row=tell))


def _bench(options: argparse.Namespace) -> None:
    def tell(row: BenchRow | CapacityRow) -> None:
        if not sys.stderr.isatty():  # there is a progress bar
            remark(f"{row}: {row.failed or 'done'}")

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
    model = _random_model(options, device) if options.random_weights else _load(options)
    name = f"{options.model}{', random weights' if options.random_weights else ''}"
    say((measure_capacity if options.largest else bench)(model, **measured, name=name, on_row=tell))


def _report(options: argparse.Namespace) -> None:
    page, *pictures = write_report(options.files, options.output)
    say(f"{page}; beside it {len(pictures)} files of its pictures")


def _calibrate(options: argparse.Namespace) -> None:
    measured = {
        "kv_cache_dtype": options.kv_cache_dtype,
        "granularity": options.granularity,
        "estimator": options.estimator,
        "symmetric": not options.asymmetric,
        "percentile": options.percentile,
        "q_scale": options.q_scale,
        "num_samples": options.num_samples,
        "max_length": options.max_length,
        "batch_size": options.batch_size,
    }
    check_calibrating(**measured)
    # Hours of calibration must not end in a refusal.
    check_export(
        options.model,
        options.output,
        layout=options.layout,
        kv_cache_dtype=get_format(options.kv_cache_dtype).name,
        granularity=options.granularity,
        symmetric=not options.asymmetric,
        q_scale=options.q_scale,
        revision=options.revision,
    )
    _check_data(options, _skeleton(options), options.max_length)
    model = _load(options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are among the notes
        scales = calibrate(model, options.data, **measured)
    for note in scales.notes:
        remark(f"note: {note}")
    say(f"{scales.num_tokens:,} tokens seen")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they came before
        written = write_scales(scales, options.model, options.output, layout=options.layout, revision=options.revision)
    _tell_written(written)


def _convert(options: argparse.Namespace) -> None:
    model = model_skeleton(options.model, options.revision)
    scales = read_scales(
        options.source,
        model,
        revision=options.source_revision,
        kv_cache_dtype=options.kv_cache_dtype,
        granularity=options.granularity,
    )
    if scales is None:
        raise ValueError(f"{options.source} has no KV scales")
    for note in scales.notes:
        remark(f"note: {note}")
    if scales.dynamic:
        raise ValueError(f"{options.source} asks for dynamic scales; there are none to convert")
    written = write_scales(
        scales, options.model, options.output, layout=options.layout, model=model, revision=options.revision
    )
    _tell_written(written)


def _tell_written(written: WrittenScales) -> None:
    say(f"{written.path}: scales written as {written.layout} ({', '.join(written.files)})")


COMMANDS = {
    "inspect": _inspect,
    "doctor": _doctor,
    "plan": _plan,
    "eval": _eval,
    "bench": _bench,
    "report": _report,
    "calibrate": _calibrate,
    "convert": _convert,
}
