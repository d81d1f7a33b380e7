"""Sections as one HTML file that needs no other."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from .pictures import Picture
from .sections import Section, Table

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #111; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; border-bottom: 1px solid #999; }
.table { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.85rem; }
th, td { padding: 0.25rem 0.6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; } th { border-bottom: 1px solid #111; }
figure { margin: 1.2rem 0; } svg { max-width: 100%; height: auto; } .caption { color: #333; }
@media print { section { break-inside: avoid; } }
"""


def page(title: str, sections: Sequence[Section]) -> str:
    """The file's text: tables, and pictures as SVG inside."""
    links = "".join(f'<li><a href="#s{i}">{escape(s.title)}</a></li>' for i, s in enumerate(sections))
    body = "\n".join(_section(section, f"s{index}") for index, section in enumerate(sections))
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n<nav><ul>{links}</ul></nav>\n"
        f"{body}\n</body>\n</html>\n"
    )


def _section(section: Section, anchor: str) -> str:
    parts = [f'<section id="{anchor}">\n<h2>{escape(section.title)}</h2>']
    parts.append(f'<p class="caption">{escape(section.caption)}</p>')
    parts += map(_figure, section.pictures)
    parts += map(_table, section.tables)
    if section.notes:
        parts.append("<ul>" + "".join(f"<li>{escape(note)}</li>" for note in section.notes) + "</ul>")
    return "\n".join([*parts, "</section>"])


def _figure(picture: Picture) -> str:
    """The SVG element alone, without what makes it a file."""
    svg = picture.svg()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    return f'<figure role="img" aria-label="{escape(picture.title)}">{svg.strip()}</figure>'


def _table(table: Table) -> str:
    def row(cells: Sequence[str], kind: str) -> str:
        return "<tr>" + "".join(f"<{kind}>{escape(cell)}</{kind}>" for cell in cells) + "</tr>"

    rows = "\n".join(row(cells, "td") for cells in table.rows)
    return (
        f'<div class="table"><table><thead>{row(table.header, "th")}</thead>\n<tbody>\n{rows}\n</tbody></table></div>'
    )
