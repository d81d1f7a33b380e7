"""`make readme`: the README's tables, docs/cpu.md, docs/gpu.md, docs/quality.md and their pictures, from results.

So no number is typed by hand, and a test holds them together.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import cpu_tables
import gpu_tables
import quality_tables

from hf_kvquant.evaluation.pictures import Picture

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DEMO, GPU = RESULTS / "demo-cpu.json", RESULTS / "h200-2026-11-20.json"
CPU = RESULTS / "bench-cpu-2026-11-30.json"
CPU_OPERATORS = (RESULTS / "cpu-xeon.json", RESULTS / "cpu-epyc.json")
QUALITY = RESULTS / "quality-2026-12-01.json"


def demo_table(result: dict[str, Any]) -> str:
    """What `examples/demo.py` measured in Markdown, with what it was measured on."""
    dense = result["results"][0]
    lines = [
        "| cache | bytes held | tokens/s | perplexity | top-1 |",
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
        f"{result['cpu']}, after {result['prompt_tokens']} + {result['new_tokens']} tokens, reading the first ones "
        "included; perplexity and top-1 (most likely next token as with DynamicCache) over "
        f"{result['text_tokens']:,} tokens of text it has not seen. torch {versions['torch']}, "
        f"transformers {versions['transformers']}, commit {result['git_commit'][:7]}."
    )
    return "\n".join(lines) + "\n"


def put(text: str, name: str, table: str) -> str:
    """`text` with the table put between the marks of its name. Raises ValueError without exactly one such place."""
    marks = re.compile(rf"(?<=<!-- {name}-table -->\n).*?(?=<!-- /{name}-table -->)", re.DOTALL)
    text, count = marks.subn(lambda _: table, text)
    if count != 1:
        raise ValueError(f"{count} places for the table {name!r}; there must be one")
    return text


def documents() -> tuple[dict[Path, str], dict[Path, Picture]]:
    """All that is written: texts, and pictures as SVG."""
    paths = (DEMO, CPU, GPU, QUALITY, *CPU_OPERATORS)
    demo, cpu, gpu, quality, *operators = (json.loads(path.read_text(encoding="utf-8")) for path in paths)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tables = {
        "demo": demo_table(demo),
        "gpu": gpu_tables.readme_table(gpu),
        "quality": quality_tables.readme_table(quality),
    }
    for name, table in tables.items():
        readme = put(readme, name, table)
    of_cpu = cpu_tables.pictures(cpu)
    of_gpu, of_models = gpu_tables.pictures(gpu), quality_tables.pictures(quality)
    texts = {
        ROOT / "README.md": readme,
        ROOT / "docs" / "cpu.md": cpu_tables.document(cpu, operators, of_cpu),
        ROOT / "docs" / "gpu.md": gpu_tables.document(gpu, of_gpu),
        ROOT / "docs" / "quality.md": quality_tables.document(quality, of_models),
    }
    drawn = [*of_cpu, *of_gpu, *(picture for of_model in of_models.values() for picture in of_model)]
    return texts, {ROOT / "docs" / f"{picture.name}.svg": picture for picture in drawn}


if __name__ == "__main__":
    texts, pictures = documents()
    for path, content in [*texts.items(), *((path, picture.svg()) for path, picture in pictures.items())]:
        path.write_text(content, encoding="utf-8")
        print(path.relative_to(ROOT))
