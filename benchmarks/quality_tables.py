"""The record of `benchmarks.quality` in Markdown: a short table for the README, all of it for docs/quality.md."""

from __future__ import annotations

from typing import Any

from hf_kvquant.evaluation.caches import DENSE
from hf_kvquant.evaluation.pictures import Picture
from hf_kvquant.evaluation.quality import Quality
from hf_kvquant.evaluation.quality_section import divergence, perplexity_increase, quality_section
from hf_kvquant.evaluation.reporting import comparisons_of
from hf_kvquant.evaluation.rows import Comparison
from hf_kvquant.evaluation.sections import Table, provenance

# Of the README: our defaults, and what transformers has.
_SHORT = (
    "auto", "int8 dynamic", "int8 dynamic, 16 recent tokens exact", "fp8_e4m3 dynamic", "transformers fp8",
    "transformers hqq 8 bit", "transformers hqq 4 bit", "transformers quanto 4 bit",
)  # fmt: skip
_PICTURES = ("kl", "perplexity")  # of a model that is no twin; `hf-kvquant report` draws more

Qualities = dict[str, Quality]


def readme_table(record: dict[str, Any]) -> str:
    """Bytes, and divergence from the unquantized cache, of a few caches, with what it was measured on."""
    plain, twins = _parted(record)
    first = next(iter(plain.values()))
    header = ["cache", "bytes held", *plain]
    if twins:
        header.append("worst of their outlier twins")
    lines = []
    for cache in (cache for cache in _SHORT if cache in first):
        line = [
            _full_name(cache),
            f"{first[cache].bytes_held / first[DENSE].bytes_held:.2f}x",
            *(divergence(qualities[cache]) for qualities in plain.values()),
        ]
        if twins:
            line.append(_worst(twins, cache))
        lines.append(line)
    context = next(comparison.setup["context"] for _, comparison in comparisons_of(record))
    return (
        Table(header, lines).markdown()
        + "\nKL divergence of the predictions from those over `DynamicCache`, nats a token; windows of "
        f"{context:,} tokens of held-out text in growing chunks, in fp32: SmolLM2 as others trained it (its weights "
        "from 4 bits), and the repository's models, trained to be small, one of each kind; bytes as held for a model "
        "in bf16. Outlier twins compute the same function, with a few channels or heads of K or V made large and the "
        "weights that read them small. transformers' caches with "
        f"their defaults. {_provenance(record)}.\n"
    )


def document(record: dict[str, Any], images: dict[str, list[Picture]]) -> str:
    """All models and caches. `images` are the pictures of each model, by its name."""
    plain, _ = _parted(record)
    everything = {entry["name"]: _qualities(comparison) for entry, comparison in comparisons_of(record)}
    lines = [
        "# What each cache costs in quality",
        "",
        "`python -m benchmarks.quality` on SmolLM2-135M-Instruct, on the repository's models and on their outlier "
        "twins, which compute the same with a few channels or heads of keys or values made large; written by "
        "`make readme`. Rows are caches: formats of K and V (one name if they are the same), where scales come from, "
        "and for static ones how many share one. `model` is our cache without quantization, `auto` what it does by "
        "itself with the scales of the checkpoint, if there are any (SmolLM2 has none). "
        "`hf-kvquant report` makes a page of the same file, with errors by layer.",
        "",
        f"{_provenance(record)}.",
        "",
        "## Perplexity over that of DynamicCache, in percent",
        "",
        _overview(everything, lambda qualities, cache: _percent(_increase(qualities, cache), "")),
        "",
        "## KL divergence from DynamicCache, in nats",
        "",
        _overview(everything, lambda qualities, cache: divergence(qualities[cache])),
        "",
    ]
    for entry, comparison in comparisons_of(record):
        section = quality_section(comparison, None, entry["name"], entry["description"])
        lines.append(section.markdown(images.get(entry["name"], []), folded=entry["name"] not in plain))
    return "\n".join(lines).rstrip() + "\n"


def pictures(record: dict[str, Any]) -> dict[str, list[Picture]]:
    """Name of each model that is no twin -> its pictures."""
    plain, _ = _parted(record)
    sections = {
        entry["name"]: quality_section(comparison, f"quality-{entry['name']}", entry["name"])
        for entry, comparison in comparisons_of(record)
        if entry["name"] in plain
    }
    return {
        name: [picture for picture in section.pictures if picture.name.rpartition("-")[2] in _PICTURES]
        for name, section in sections.items()
    }


def _parted(record: dict[str, Any]) -> tuple[dict[str, Qualities], dict[str, Qualities]]:
    """Models, and twins, which are called `model/twin`."""
    found = {entry["name"]: _qualities(comparison) for entry, comparison in comparisons_of(record)}
    plain = {name: qualities for name, qualities in found.items() if "/" not in name}
    return plain, {name: qualities for name, qualities in found.items() if "/" in name}


def _qualities(comparison: Comparison) -> Qualities:
    return {row.cache: row.quality for row in comparison.rows if row.quality is not None}


def _provenance(record: dict[str, Any]) -> str:
    """That of its models, which need not be measured together."""
    return ", and ".join(dict.fromkeys(provenance(comparison.setup) for _, comparison in comparisons_of(record)))


def _increase(qualities: Qualities, cache: str) -> float | None:
    return perplexity_increase(qualities[cache], qualities[DENSE]) if cache in qualities else None


def _worst(twins: dict[str, Qualities], cache: str) -> str:
    found = [qualities[cache] for qualities in twins.values() if cache in qualities]
    return divergence(max(found, key=lambda quality: quality.chunks.kl_divergence)) if found else ""


def _percent(value: float | None, unit: str = " %") -> str:
    if value is None:
        return ""
    return f"{value:+,.0f}{unit}" if abs(value) >= 100 else f"{value:+.3f}{unit}"


def _overview(everything: dict[str, Qualities], cell: Any) -> str:
    """Caches down, models across."""
    caches = dict.fromkeys(cache for qualities in everything.values() for cache in qualities if cache != DENSE)
    lines = [
        [cache, *(cell(qualities, cache) if cache in qualities else "" for qualities in everything.values())]
        for cache in caches
    ]
    return Table(["cache", *everything], lines).markdown()


def _full_name(cache: str) -> str:
    return cache if cache.startswith("transformers") else f"kvquant {cache}"
