"""Write the README's table from the committed result of `examples/demo.py --json`, so that no number is typed by hand.

python benchmarks/readme.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "demo-cpu.json"
TABLE = re.compile(r"(?<=<!-- demo-table -->\n).*?(?=<!-- /demo-table -->)", re.DOTALL)


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


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(render(path.read_text(encoding="utf-8"), json.loads(RESULT.read_text())), encoding="utf-8")
