"""Continuous batching over 8-bit pages against transformers' own, in one process, peers in turn.

    python -m benchmarks.batching --json benchmarks/results/cpu-epyc.json
    python -m benchmarks.batching --tiny  # try the program itself
    python -m benchmarks.gpu --only batching

A row is so many requests, all there from the start, through `generate_batch` of a model with random weights, on a CPU
of SmolLM2-135M's shape: seconds until the last of them has its first token, and tokens a second from then on.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig

import hf_kvquant  # noqa: F401 - registers the attentions
from hf_kvquant.batching import hooks

from .cpu import introduce
from .models import build_model
from .results import NotInstalled, Results

SHAPE = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152, "max_position_embeddings": 1 << 15,
    "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0, "tie_word_embeddings": True,
}  # fmt: skip
TINY = {"hidden_size": 72, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 99}
ROWS = ((4, 512), (16, 512), (8, 2048))  # requests, tokens of each
WAYS = ("kvquant_int8", "kvquant_fp8", "sdpa")
PAGE_SIZE = 16


class Way(NamedTuple):
    """One way to run on a GPU."""

    name: str
    attention: str
    use_cuda_graph: bool | None = None  # None: as transformers decides


GPU_WAYS = (
    Way("kvquant fp8 graphs", "kvquant_fp8", True),
    Way("flash_attention_2", "flash_attention_2"),
    Way("flash_attention_3", "flash_attention_3"),
    Way("sdpa", "sdpa"),
    Way("kvquant int8 graphs", "kvquant_int8", True),
    Way("kvquant fp8", "kvquant_fp8"),
)
GPU_ROWS = ((32, 1024), (1, 1024), (32, 8192))
_PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}


def speeds_of(
    model: PreTrainedModel,
    prompts: list[list[int]],
    new_tokens: int,
    page_size: int,
    is_kept: bool = False,
    **batching: Any,
) -> tuple[float, float]:
    """Seconds until the last request has its first token, and tokens a second from then on.

    A manager that `is_kept` serves all calls until it is let go of.
    """
    generation = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    # Twice the blocks that they need: a scheduler that is short of them lets requests wait.
    num_blocks = 2 * sum(-(-(len(prompt) + new_tokens) // page_size) for prompt in prompts)
    batching = {"page_size": page_size, "num_blocks": num_blocks, "allow_block_sharing": False, **batching}
    outputs = model.generate_batch(
        prompts,
        generation_config=generation,
        continuous_batching_config=ContinuousBatchingConfig(**batching),
        record_timestamps=True,
        persistent_manager=is_kept,
    ).values()
    if failed := [output.error for output in outputs if output.error]:
        raise RuntimeError(failed[0])
    begin, ready = min(output.created_time for output in outputs), max(output.timestamps[0] for output in outputs)
    later = [moment for output in outputs for moment in output.timestamps if moment > ready]
    return ready - begin, len(later) / (max(later) - ready)


def measure(results: Results, tiny: bool, rounds: int) -> None:
    config = LlamaConfig(**{**SHAPE, **(TINY if tiny else {})})
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    new_tokens = 4 if tiny else 33
    results.part(
        "batching",
        "generate_batch, 135M shape: s until all have a token, then tokens/s; x: over transformers' own (sdpa)",
    )
    for num_requests, length in ((3, 40),) if tiny else ROWS:

        def measured(count: int = num_requests, length: int = length) -> dict[str, Any]:
            measured_of: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
            for index in range(rounds + 1):
                prompts = torch.randint(3, config.vocab_size, (count, length)).tolist()
                for way in WAYS:
                    model.set_attn_implementation(way)
                    found = speeds_of(model, prompts, new_tokens, PAGE_SIZE, max_batch_tokens=1024)
                    if index:  # the first round warms up
                        measured_of[way].append(found)
            row: dict[str, Any] = {"load average": os.getloadavg()[0]}
            theirs = measured_of["sdpa"]
            for way, ours in measured_of.items():
                row |= {
                    f"{way}, prompts s": statistics.median(prompt for prompt, _ in ours),
                    f"{way}, prompts x": statistics.median(a / b for (a, _), (b, _) in zip(theirs, ours, strict=True)),
                    f"{way}, tokens/s": statistics.median(speed for _, speed in ours),
                    f"{way}, x": statistics.median(b / a for (_, a), (_, b) in zip(theirs, ours, strict=True)),
                }
            return row

        results.row({"requests": num_requests, "tokens": length, "rounds": rounds}, measured)


def measure_gpu(results: Results, quick: bool = False, tiny: bool = False) -> None:
    """The part `batching` of `benchmarks.gpu`: each way once to warm up and to record, and once more."""
    results.part("batching", "generate_batch, 1B shape: seconds until all have a token, then tokens/s")
    model = build_model("tiny" if tiny else "1B", results.device)
    new_tokens = 4 if tiny else 65
    for num_requests, length in ((3, 40),) if tiny else GPU_ROWS[:2] if quick else GPU_ROWS:
        for way in GPU_WAYS[: 4 if quick else None]:

            def measured(way: Way = way, count: int = num_requests, length: int = length) -> dict[str, Any]:
                package = _PACKAGES.get(way.attention)
                if package is not None and importlib.util.find_spec(package) is None:
                    raise NotInstalled(f"{package} is not installed")
                if not hooks.is_known():
                    raise NotInstalled("the installed transformers has no continuous batching of the known form")
                model.set_attn_implementation(way.attention)
                prompts = torch.randint(3, model.config.vocab_size, (count, length)).tolist()
                options = {"use_cuda_graph": way.use_cuda_graph, "auto_switch_to_flash": False}
                try:
                    for _ in range(2):  # of one manager, which keeps what it has recorded
                        seconds, speed = speeds_of(model, prompts, new_tokens, 64, is_kept=True, **options)
                finally:
                    model.destroy_cached_continuous_batching_manager()
                return {"prompts_s": seconds, "tok_s": speed}

            results.row({"requests": num_requests, "tokens": length, "way": way.name}, measured)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.batching", description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="sizes that say nothing, to try the program")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    results = Results(arguments.json, torch.device("cpu"), 1e9)
    introduce(results)
    measure(results, arguments.tiny, arguments.rounds)


if __name__ == "__main__":
    main()
