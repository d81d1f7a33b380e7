"""Continuous batching over 8-bit pages against transformers' own, in one process, peers in turn.

    python -m benchmarks.batching --json benchmarks/results/cpu-epyc.json
    python -m benchmarks.batching --tiny  # try the program itself

A row is so many requests, all there from the start, through `generate_batch` of a model of SmolLM2-135M's shape with
random weights: seconds until the last of them has its first token, and tokens a second from then on.
"""

from __future__ import annotations

import argparse
import os
import statistics
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.generation.configuration_utils import ContinuousBatchingConfig

import hf_kvquant  # noqa: F401 - registers the attentions

from .cpu import introduce
from .results import Results

SHAPE = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152, "max_position_embeddings": 1 << 15,
    "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0, "tie_word_embeddings": True,
}  # fmt: skip
TINY = {"hidden_size": 72, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 99}
ROWS = ((4, 512), (16, 512), (8, 2048))  # requests, tokens of each
WAYS = ("kvquant_int8", "kvquant_fp8", "sdpa")
PAGE_SIZE = 16


def speeds_of(
    model: LlamaForCausalLM, prompts: list[list[int]], new_tokens: int, num_blocks: int
) -> tuple[float, float]:
    """Seconds until the last request has its first token, and tokens a second from then on."""
    generation = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = ContinuousBatchingConfig(
        page_size=PAGE_SIZE, num_blocks=num_blocks, max_batch_tokens=1024, allow_block_sharing=False
    )
    outputs = model.generate_batch(
        prompts, generation_config=generation, continuous_batching_config=batching, record_timestamps=True
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
        # Twice what they need: a scheduler that is short of blocks lets requests wait.
        num_blocks = 2 * num_requests * -(-(length + new_tokens) // PAGE_SIZE)

        def measured(count: int = num_requests, length: int = length, num_blocks: int = num_blocks) -> dict[str, Any]:
            measured_of: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
            for index in range(rounds + 1):
                prompts = torch.randint(3, config.vocab_size, (count, length)).tolist()
                for way in WAYS:
                    model.set_attn_implementation(way)
                    found = speeds_of(model, prompts, new_tokens, num_blocks)
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
