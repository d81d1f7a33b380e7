"""Continuous batching over 8-bit pages against transformers' own, in one process, peers in turn.

    python -m benchmarks.batching --json benchmarks/results/cpu-epyc.json
    python -m benchmarks.batching --tiny  # try the program itself

A row is so many requests, all there from the start, through `generate_batch` of a model of SmolLM2-135M's shape with
random weights. `prompts` is the time of a call for one token each, `tokens/s` what the further ones take.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.generation.configuration_utils import ContinuousBatchingConfig

import hf_kvquant  # noqa: F401 - registers the attentions
from hf_kvquant.ops import cpu

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


def seconds_of(model: LlamaForCausalLM, prompts: list[list[int]], new_tokens: int, num_blocks: int) -> float:
    generation = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = ContinuousBatchingConfig(
        page_size=PAGE_SIZE, num_blocks=num_blocks, max_batch_tokens=1024, allow_block_sharing=False
    )
    begin = time.perf_counter()
    outputs = model.generate_batch(prompts, generation_config=generation, continuous_batching_config=batching)
    seconds = time.perf_counter() - begin
    if failed := [output.error for output in outputs.values() if output.error]:
        raise RuntimeError(failed[0])
    return seconds


def measure(results: Results, tiny: bool, rounds: int) -> None:
    config = LlamaConfig(**{**SHAPE, **(TINY if tiny else {})})
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    new_tokens = 4 if tiny else 33
    results.part(
        "batching",
        "generate_batch, 135M shape: s of all prompts, then tokens/s; x: over transformers' own (sdpa)",
    )
    for num_requests, length in ((3, 40),) if tiny else ROWS:
        num_blocks = num_requests * (-(-(length + new_tokens) // PAGE_SIZE) + 1)

        def measured(count: int = num_requests, length: int = length, num_blocks: int = num_blocks) -> dict[str, Any]:
            seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
            for index in range(rounds + 1):
                prompts = torch.randint(3, config.vocab_size, (count, length)).tolist()
                for way in WAYS:
                    model.set_attn_implementation(way)
                    first, all_ = (seconds_of(model, prompts, new, num_blocks) for new in (1, new_tokens))
                    if index:  # the first round warms up
                        seconds[way].append((first, all_ - first))
            row: dict[str, Any] = {"load average": os.getloadavg()[0]}
            theirs = seconds["sdpa"]
            for way, ours in seconds.items():
                row |= {
                    f"{way}, prompts s": statistics.median(first for first, _ in ours),
                    f"{way}, prompts x": statistics.median(a / b for (a, _), (b, _) in zip(theirs, ours, strict=True)),
                    f"{way}, tokens/s": count * (new_tokens - 1) / statistics.median(rest for _, rest in ours),
                    f"{way}, x": statistics.median(a / b for (_, a), (_, b) in zip(theirs, ours, strict=True)),
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
    about = results.data["about"] | {"threads": torch.get_num_threads(), "path": cpu.use()}
    print(about["device"], about["threads"], "threads", about["path"], about["versions"], about["git_commit"])
    measure(results, arguments.tiny, arguments.rounds)


if __name__ == "__main__":
    main()
