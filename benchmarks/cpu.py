"""What the operators for CPUs give against the host's own caches: in one process, peers in turn, medians of ratios.

    python -m benchmarks.cpu --json benchmarks/results/cpu-epyc.json
    python -m benchmarks.cpu --only attention --rows 0,2  # the first and the third row
    python -m benchmarks.cpu --tiny                       # try the program itself

Other work on the machine slows all peers of a round alike, so ratios are of one round. Where others share the cores,
waiting threads must not spin (OMP_WAIT_POLICY=passive); but then each operator has to wake them, which takes many small
ones longest. `without a compiler` is what runs where no kernel can be built.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import random
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM, StoppingCriteriaList
from transformers.cache_utils import Cache, DynamicCache, QuantizedCache, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_kvquant import KVQuantConfig, QuantizedPagedCache, huge_pages
from hf_kvquant.attention import kvquant_attention
from hf_kvquant.evaluation.timing import Clock
from hf_kvquant.hosts.conventions import with_cache
from hf_kvquant.ops import cpu

from .models import fill
from .results import Results

DTYPE = torch.bfloat16
OURS = "kvquant int8"
NEW_TOKENS = 6  # of a call of `generate`


@dataclass
class Way:
    """A cache, the attention that goes with it, and what was measured of them.

    `attend` takes a module, a query, and what `update` returned.
    """

    name: str
    cache: Cache
    attend: Callable[..., Any]
    attention: str = "kvquant"  # of a model
    path: str | None = None  # of our operators; None: the fastest
    compiled: bool = False  # whether `generate` compiles its steps
    update_seconds: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def packed_attention(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: None) -> Any:
    """SDPA with the query heads of a group as rows of one head, so that K and V are read once."""
    rows = query.reshape(query.shape[0], key.shape[1], -1, query.shape[3])
    return torch.nn.functional.scaled_dot_product_attention(rows, key, value, scale=module.scaling)


def ours(config: LlamaConfig, kv_cache_dtype: str) -> Cache:
    """Our cache, which grows."""
    return QuantizedPagedCache(config, KVQuantConfig(kv_cache_dtype=kv_cache_dtype))


def ways_for(config: LlamaConfig, without_compiler: bool) -> list[Way]:
    """Ours first, then the host's."""
    config._attn_implementation = "kvquant"
    dynamic = DynamicCache(config=config)
    ways = [
        Way(OURS, ours(config, "int8"), kvquant_attention),
        Way("kvquant fp8", ours(config, "fp8"), kvquant_attention),
        Way("DynamicCache", dynamic, sdpa_attention_forward, "sdpa"),
        Way("DynamicCache, packed", DynamicCache(config=config), packed_attention, "sdpa"),
    ]
    with contextlib.suppress(ValueError):  # transformers has this backend from 5.23 on
        ways.append(Way("transformers fp8", QuantizedCache("fp8", config=config), sdpa_attention_forward, "sdpa"))
    if without_compiler:
        ways.append(Way(f"{OURS}, without a compiler", ours(config, "int8"), kvquant_attention, path="torch"))
    return ways


def compiled_ways(config: LlamaConfig, capacity: int) -> list[Way]:
    """Caches at fixed addresses, ours and the host's, over which `generate` compiles its steps."""
    ours = QuantizedPagedCache(config, KVQuantConfig(kv_cache_dtype="int8", max_cache_len=capacity))
    return [
        Way(f"{OURS}, compiled", ours, kvquant_attention, compiled=True),
        Way("StaticCache, compiled", StaticCache(config, capacity), sdpa_attention_forward, "sdpa", compiled=True),
    ]


def fastest_read(memory: torch.Tensor) -> Callable[[], torch.Tensor]:
    """What reads `memory`, `[N, N]`, fastest of what torch has: Intel's processors multiply, AMD's add."""
    ones = torch.ones(len(memory))
    reads = [lambda: memory @ ones, memory.sum]
    seconds = []
    for read in reads:
        times = []
        for _ in range(4):  # the first warms up
            begin = time.perf_counter()
            read()
            times.append(time.perf_counter() - begin)
        seconds.append(min(times[1:]))
    return reads[seconds.index(min(seconds))]


def in_turn(ways: list[Way], step: Callable[[Way], None], seconds: float, rounds: int) -> list[float]:
    """Let every way make a step, again and again; returns how fast memory was read in each round, bytes a second.

    The read comes before each step, so that every way finds the processor's caches alike, and none waits for what the
    one before it left to be written.
    """
    shape = (1 << 13, 1 << 13) if rounds > 3 else (1 << 8, 1 << 8)
    memory = huge_pages.empty(shape, torch.float32, torch.device("cpu")).fill_(1)
    read = fastest_read(memory)
    speeds = []
    start = time.perf_counter()
    for index in range(rounds + 1):
        if index == 1:  # the first round warms up
            for way in ways:
                way.seconds, way.update_seconds = [], []
            start = time.perf_counter()
        reads = []
        for way in random.sample(ways, len(ways)):
            cpu.use(way.path)
            begin = time.perf_counter()
            read()
            reads.append(time.perf_counter() - begin)
            step(way)
        speeds.append(memory.nbytes / statistics.median(reads))
        if index >= 3 and time.perf_counter() - start > seconds:
            break
    cpu.use()
    return speeds[1:]


def ratios(ways: list[Way]) -> dict[str, float]:
    """How many times longer the others take than our int8, the median over rounds."""
    ours = ways[0].seconds
    return {way.name: statistics.median(b / a for a, b in zip(ours, way.seconds, strict=True)) for way in ways}


def llama(layers: int, q_heads: int, kv_heads: int, head_dim: int) -> LlamaConfig:
    """A configuration of this shape, the rest like SmolLM2-135M's."""
    return LlamaConfig(
        num_hidden_layers=layers, num_attention_heads=q_heads, num_key_value_heads=kv_heads, head_dim=head_dim,
        hidden_size=q_heads * head_dim, intermediate_size=1536, vocab_size=49152, max_position_embeddings=1 << 16,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=None, pad_token_id=0, dtype=DTYPE,
    )  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What of a part is measured, and how long a row may take."""

    tiny: bool
    rows: frozenset[int] | None  # None: all
    seconds: float

    def of(self, rows: list[Any], tiny: list[Any]) -> list[Any]:
        """Those that were chosen."""
        rows = tiny if self.tiny else rows
        return [row for index, row in enumerate(rows) if self.rows is None or index in self.rows]


def measure_attention(results: Results, plan: Plan) -> None:
    """`update` and attention of one new token, a layer: 32 query heads, 8 of K and V, head_dim 128.

    A few layers follow each other, as in a model: programs are read from memory once a step there, not once a layer.
    """
    results.part("attention", "a layer's step, 32/8 heads, head_dim 128, ms; x: times as long as kvquant int8")
    module = SimpleNamespace(num_key_value_groups=4, is_causal=True, training=False, scaling=128**-0.5)
    sizes = [(1, 512), (1, 4096), (1, 32768), (8, 512), (8, 4096), (8, 32768)]
    for batch, context in plan.of(sizes, [(2, 65)]):

        def measured(batch: int = batch, context: int = context) -> dict[str, Any]:
            num_layers = 4 if batch * context <= 1 << 15 else 1  # what memory holds beside copies
            config = llama(num_layers, 32, 8, 128)
            ways = ways_for(config, without_compiler=True)
            new = [torch.randn(batch, 1, 8, 128, dtype=DTYPE).transpose(1, 2) for _ in range(2)]
            query = torch.randn(batch, 32, 1, 128, dtype=DTYPE)
            for way in ways:
                fill(way.cache, SimpleNamespace(config=config, dtype=DTYPE, device=torch.device("cpu")), batch, context)

            def step(way: Way) -> None:
                whole = updates = 0.0
                for layer in range(num_layers):
                    start = time.perf_counter()
                    key, value = way.cache.update(*new, layer)
                    middle = time.perf_counter()
                    way.attend(module, query, key, value, None)
                    updates += middle - start
                    whole += time.perf_counter() - start
                way.update_seconds.append(updates / num_layers)
                way.seconds.append(whole / num_layers)

            speeds = in_turn(ways, step, min(60, plan.seconds), 3 if plan.tiny else 100)
            times = ratios(ways)
            row: dict[str, Any] = {"layers": num_layers, "rounds": len(speeds), "load average": os.getloadavg()[0]}
            for way in ways:
                row |= {f"{way.name}, ms": statistics.median(way.seconds) * 1e3, f"{way.name}, x": times[way.name]}
            for way in ways[:2]:
                nbytes = 2 * batch * 8 * context * (128 + 2)
                shares = [
                    nbytes / (whole - update) / speed
                    for whole, update, speed in zip(way.seconds, way.update_seconds, speeds, strict=True)
                ]
                row[f"{way.name}, share of read bandwidth"] = statistics.median(shares)
            return row | {"read GB/s": statistics.median(speeds) / 1e9}

        results.row({"batch": batch, "context": context}, measured)
        gc.collect()


def measure_prompt(results: Results, plan: Plan) -> None:
    """A prompt's `update` and attention: alone, and after a stored past."""
    results.part("prompt", "a layer's prompt, 32/8 heads, head_dim 128, ms; x: times as long as kvquant int8")
    config = llama(1, 32, 8, 128)
    module = SimpleNamespace(num_key_value_groups=4, is_causal=True, training=False, scaling=128**-0.5)
    for past, tokens in plan.of([(0, 512), (0, 2048), (4096, 64), (4096, 512)], [(0, 5), (65, 5)]):

        def measured(past: int = past, tokens: int = tokens) -> dict[str, Any]:
            new = [torch.randn(1, tokens, 8, 128, dtype=DTYPE).transpose(1, 2) for _ in range(2)]
            query = torch.randn(1, tokens, 32, 128, dtype=DTYPE).transpose(1, 2)
            mask = None
            if past:  # what the host makes for a prompt after a past
                mask = torch.ones(tokens, past + tokens, dtype=torch.bool).tril(past)[None, None]
            ways = ways_for(config, without_compiler=False)
            ways = [way for way in ways if way.name != "DynamicCache, packed"]
            names = [way.name for way in ways]

            def step(way: Way) -> None:
                fresh = ways_for(config, without_compiler=False)
                cache = next(other.cache for other in fresh if other.name == way.name)
                if past:
                    model = SimpleNamespace(config=config, dtype=DTYPE, device=torch.device("cpu"))
                    fill(cache, model, 1, past)
                start = time.perf_counter()
                key, value = cache.update(*new, 0)
                way.attend(module, query, key, value, mask)
                way.seconds.append(time.perf_counter() - start)

            speeds = in_turn(ways, step, min(20, plan.seconds), 3 if plan.tiny else 20)
            times = ratios(ways)
            row: dict[str, Any] = {"rounds": len(speeds), "load average": os.getloadavg()[0]}
            for way, name in zip(ways, names, strict=True):
                row |= {f"{name}, ms": statistics.median(way.seconds) * 1e3, f"{name}, x": times[name]}
            return row

        results.row({"past": past, "new": tokens}, measured)


def measure_generate(results: Results, plan: Plan) -> None:
    """`generate` with a model of SmolLM2-135M's shape over a random past."""
    results.part("generate", "135M shape, 30 layers, 9/3 heads, head_dim 64: tokens/s; x: kvquant int8 over it")
    config = llama(2, 3, 1, 64) if plan.tiny else llama(30, 9, 3, 64)
    model = LlamaForCausalLM._from_config(config, dtype=DTYPE, attn_implementation="sdpa").eval()
    compiles = CompileConfig(fullgraph=True)
    compiles._compile_all_devices = True
    for context in plan.of([512, 4096, 16384], [65]):

        def measured(context: int = context) -> dict[str, Any]:
            rounds = 3 if plan.tiny else 20
            ways = [way for way in ways_for(model.config, True) if way.name != "DynamicCache, packed"]
            ways.append(Way(f"{OURS}, storage only", ours(model.config, "int8"), sdpa_attention_forward, "sdpa"))
            ways += compiled_ways(model.config, context + NEW_TOKENS * (rounds + 2))
            torch._dynamo.reset()
            for way in ways:
                model.set_attn_implementation(way.attention)
                fill(way.cache, model, 1, context)

            def step(way: Way) -> None:
                model.set_attn_implementation(way.attention)
                ids = torch.randint(3, 49152, (1, int(way.cache.get_seq_length()) + 1))
                clock = Clock(model.device)
                model.generate(
                    ids, attention_mask=torch.ones_like(ids), **with_cache(way.cache), max_new_tokens=NEW_TOKENS,
                    do_sample=False, stopping_criteria=StoppingCriteriaList([clock]),
                    compile_config=compiles if way.compiled else None,
                )  # fmt: skip
                steps = [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)]
                way.seconds.append(statistics.median(steps))

            speeds = in_turn(ways, step, min(120, plan.seconds), rounds)
            times = ratios(ways)
            row: dict[str, Any] = {"rounds": len(speeds), "load average": os.getloadavg()[0]}
            for way in ways:
                row |= {f"{way.name}, tokens/s": 1 / statistics.median(way.seconds), f"{way.name}, x": times[way.name]}
            return row

        results.row({"context": context}, measured)
        gc.collect()


def introduce(results: Results) -> None:
    """Note how the CPU is used, and print where this is."""
    about = results.data["about"]
    about |= {"threads": torch.get_num_threads(), "path": cpu.use(), "paths": cpu.paths()}
    about["omp_wait_policy"] = os.environ.get("OMP_WAIT_POLICY")
    print(about["device"], about["threads"], "threads", about["path"], about["versions"], about["git_commit"])


def main() -> None:
    """Parse the command line and run the parts."""
    parts = {"attention": measure_attention, "prompt": measure_prompt, "generate": measure_generate}
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--only", default=",".join(parts), help=f"parts, of {','.join(parts)}")
    parser.add_argument("--rows", help="rows of the parts, from 0 on; all by default")
    parser.add_argument("--seconds", type=float, default=120.0, help="the most that a row's rounds may take")
    parser.add_argument("--tiny", action="store_true", help="sizes that say nothing, to try the program")
    parser.add_argument("--threads", type=int, help="by default torch's own choice")
    arguments = parser.parse_args()
    chosen = arguments.only.split(",")
    if unknown := [name for name in chosen if name not in parts]:
        parser.error(f"unknown part(s) {', '.join(unknown)}; choose of {', '.join(parts)}")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    rows = None if arguments.rows is None else frozenset(map(int, arguments.rows.split(",")))
    plan = Plan(arguments.tiny, rows, arguments.seconds)
    warnings.filterwarnings("ignore", category=UserWarning)
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    results = Results(arguments.json, torch.device("cpu"), 1e9)
    introduce(results)
    for name in chosen:
        parts[name](results, plan)


if __name__ == "__main__":
    main()
