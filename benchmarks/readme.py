"""Write the README's tables from committed results, so that no number is typed by hand.

python benchmarks/readme.py                                        # of `examples/demo.py --json`
python benchmarks/readme.py --gpu benchmarks/results/<device>.json  # of `benchmarks.gpu --json`, docs/gpu.md as well
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import gpu_tables

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULT = ROOT / "benchmarks" / "results" / "demo-cpu.json"
GPU_RESULT = ROOT / "benchmarks" / "results" / "h200-2026-11-20.json"
TABLE = re.compile(r"(?<=<!-- demo-table -->\n).*?(?=<!-- /demo-table -->)", re.DOTALL)
GPU_TABLE = re.compile(r"(?<=<!-- gpu-table -->\n).*?(?=<!-- /gpu-table -->)", re.DOTALL)


def table(result: dict[str, Any]) -> str:
    """The measured table in Markdown, with what it was measured on."""
    dense = result["results"][0]
    lines = [
        "| cache | bytes held | tokens/s | perplexity | same greedy token |",
        "|---|---|---|---|---|",
    ]
    for row in result["results"]:
        speed = row["tokens_per_second"] / dense["tokens_per_second"]
        lines.append(
            f"| {row['cache']} | {row['bytes']:,} ({row['share_of_dynamic']:.2f}x) | {row['tokens_per_second']:.0f} "
            f"({speed:.2f}x) | {row['perplexity']:.3f} | {row['same_greedy_token']:.2%} |"
        )
    versions = result["versions"]
    lines.append(
        f"\nThe repository's own model (2.8 M parameters, head_dim 64, bf16) on {result['threads']} cores of an "
        f"{result['cpu']}, after {result['prompt_tokens']} + {result['new_tokens']} tokens; perplexity and greedy "
        f"tokens over {result['text_tokens']:,} tokens of text it has not seen. torch {versions['torch']}, "
        f"transformers {versions['transformers']}, commit {result['git_commit'][:7]}."
    )
    return "\n".join(lines) + "\n"


def render(readme: str, result: dict[str, Any]) -> str:
    """`readme` with the table put in its place."""
    return TABLE.sub(lambda _: table(result), readme)


def render_gpu(readme: str, result: dict[str, Any]) -> str:
    """`readme` with the short table of a GPU in its place, if it has one."""
    return GPU_TABLE.sub(lambda _: gpu_tables.readme_table(result), readme)


def write_gpu(path: Path) -> None:
    """docs/gpu.md, its plots and the README's table from a result of `benchmarks.gpu`."""
    result = json.loads(path.read_text(encoding="utf-8"))
    images = gpu_tables.plots(result)
    for name, text in images.items():
        (ROOT / "docs" / name).write_text(text, encoding="utf-8")
    (ROOT / "docs" / "gpu.md").write_text(gpu_tables.document(result, list(images)), encoding="utf-8")
    README.write_text(render_gpu(README.read_text(encoding="utf-8"), result), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", type=Path, help="result of benchmarks.gpu to write docs/gpu.md and the README's from")
    arguments = parser.parse_args()
    if arguments.gpu is None:
        README.write_text(render(README.read_text(encoding="utf-8"), json.loads(RESULT.read_text())), encoding="utf-8")
    else:
        write_gpu(arguments.gpu)
