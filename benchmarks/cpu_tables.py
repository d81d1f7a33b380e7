"""What was measured on a CPU in Markdown: `bench`, and the operators by `benchmarks.cpu`."""

from __future__ import annotations

from typing import Any

from hf_kvquant.evaluation.caches import DENSE
from hf_kvquant.evaluation.parts import part_sections
from hf_kvquant.evaluation.pictures import Picture
from hf_kvquant.evaluation.sections import speed_section
from hf_kvquant.evaluation.speed import Benchmark


def pictures(bench: dict[str, Any]) -> list[Picture]:
    """What is drawn of it."""
    return speed_section(Benchmark.from_dict(bench), "cpu").pictures


def over_dense(part: dict[str, Any]) -> dict[str, Any]:
    """A part of tokens a second with `x` over `DynamicCache`, where `benchmarks.cpu` has our int8 over each cache.

    Readers compare with what they have. The records stay as they are: some are of machines that are not at hand.
    """
    title, replaced = part["title"], "x: kvquant int8 over it"
    if replaced not in title:
        return part
    rows = [
        row
        if "error" in row
        else {name: row[f"{DENSE}, x"] / value if name.endswith(", x") else value for name, value in row.items()}
        for row in part["rows"]
    ]
    return {**part, "title": title.replace(replaced, f"x: over {DENSE}"), "rows": rows}


def document(bench: dict[str, Any], operators: list[dict[str, Any]], images: list[Picture]) -> str:
    """Everything; `images` are those of `pictures`, `operators` what was measured on each machine."""
    lines = [
        "# On a CPU",
        "",
        "`hf-kvquant bench` on a model of SmolLM2-135M's shape, then `python -m benchmarks.cpu` and "
        "`benchmarks.batching`; written by `make readme`. Attention of several `layers` is that of one among them, "
        "in turn as in a model; without that column there was one only, and Python came back from memory each step.",
        "",
        speed_section(Benchmark.from_dict(bench), "cpu").markdown(images),
    ]
    for machine in operators:
        about = machine["about"]
        waiting = f", OMP_WAIT_POLICY={about['omp_wait_policy']}" if about.get("omp_wait_policy") else ""
        lines += ["", f"## {about['device']}, {about['threads']} threads{waiting}", ""]
        parts = {name: over_dense(part) for name, part in machine["parts"].items()}
        lines += [section.markdown([], level=3) for section in part_sections({**machine, "parts": parts}, "cpu")]
    return "\n".join(lines).rstrip() + "\n"
