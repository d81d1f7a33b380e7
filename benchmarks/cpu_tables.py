"""What was measured on a CPU in Markdown: `bench`, and the operators by `benchmarks.cpu`."""

from __future__ import annotations

from typing import Any

from hf_kvquant.evaluation.parts import part_sections
from hf_kvquant.evaluation.pictures import Picture
from hf_kvquant.evaluation.sections import speed_section
from hf_kvquant.evaluation.speed import Benchmark


def pictures(bench: dict[str, Any]) -> list[Picture]:
    """What is drawn of it."""
    return speed_section(Benchmark.from_dict(bench), "cpu").pictures


def document(bench: dict[str, Any], operators: list[dict[str, Any]], images: list[Picture]) -> str:
    """Everything; `images` are those of `pictures`, `operators` what was measured on each machine."""
    lines = [
        "# On a CPU",
        "",
        "`hf-kvquant bench` on a model of SmolLM2-135M's shape, then `python -m benchmarks.cpu`; written by "
        "`make readme`.",
        "",
        speed_section(Benchmark.from_dict(bench), "cpu").markdown(images),
    ]
    for machine in operators:
        about = machine["about"]
        waiting = f", OMP_WAIT_POLICY={about['omp_wait_policy']}" if about.get("omp_wait_policy") else ""
        lines += ["", f"# {about['device']}, {about['threads']} threads{waiting}", ""]
        lines += [section.markdown([]) for section in part_sections(machine, "cpu")]
    return "\n".join(lines).rstrip() + "\n"
