"""Two plots as SVG text, so that no plotting package is needed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

_COLORS = ["#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#9d755d", "#72b7b2", "#888888", "#eeca3b", "#222222"]
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 760, 360, 56, 40, 56


def lines(series: Mapping[str, Sequence[tuple[float, float]]], title: str, x_label: str) -> str:
    """Lines over a logarithmic x axis; y from 0 to 1 or a little more."""
    xs = [x for points in series.values() for x, _ in points]
    low, high = math.log2(min(xs)), math.log2(max(xs))
    top = max(1.0, *(y for points in series.values() for _, y in points))
    right = _WIDTH - 130

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log2(x) - low) / (high - low or 1)
        return _LEFT + across * (right - _LEFT), _HEIGHT - _BOTTOM - y / top * (_HEIGHT - _BOTTOM - _TOP)

    parts = [_text(_LEFT, 22, title, 15), _text((_LEFT + right) / 2, _HEIGHT - 14, x_label, anchor="middle")]
    parts += _y_axis(top, right)
    for exponent in range(math.ceil(low), math.floor(high) + 1, 2):
        parts.append(_text(place(2.0**exponent, 0)[0], _HEIGHT - _BOTTOM + 18, _short(2**exponent), anchor="middle"))
    for index, (name, points) in enumerate(series.items()):
        color = _COLORS[index % len(_COLORS)]
        places = [place(*point) for point in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in places]
        parts.append(_text(right + 10, _TOP + 12 + 18 * index, name, color=color))
    return _svg(parts)


def bars(groups: Mapping[str, Mapping[str, float]], title: str) -> str:
    """Groups of bars that share their names."""
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    top = max(value for group in groups.values() for value in group.values())
    right = _WIDTH - 190
    step = (right - _LEFT) / len(groups)
    width = step * 0.85 / len(names)
    parts = [_text(_LEFT, 22, title, 15), *_y_axis(top, right)]
    for g, (label, group) in enumerate(groups.items()):
        parts.append(_text(_LEFT + (g + 0.45) * step, _HEIGHT - _BOTTOM + 18, label, anchor="middle"))
        for index, name in enumerate(names):
            if name not in group:
                continue
            height = group[name] / top * (_HEIGHT - _BOTTOM - _TOP)
            x, y = _LEFT + g * step + index * width, _HEIGHT - _BOTTOM - height
            color = _COLORS[index % len(_COLORS)]
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{width * 0.9:.1f}" height="{height:.1f}" fill="{color}"/>'
            )
            parts.append(_text(x + width * 0.45, y - 4, f"{group[name]:.1f}", 10, anchor="middle"))
    for index, name in enumerate(names):
        parts.append(_text(right + 10, _TOP + 12 + 18 * index, name, color=_COLORS[index % len(_COLORS)]))
    return _svg(parts)


def _y_axis(top: float, right: float) -> list[str]:
    unit = 10.0 ** math.floor(math.log10(top))
    step = next(unit * m for m in (0.2, 0.5, 1, 2) if top / (unit * m) <= 6)
    parts = []
    for index in range(int(top / step) + 1):
        y = _HEIGHT - _BOTTOM - index * step / top * (_HEIGHT - _BOTTOM - _TOP)
        parts.append(f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(_text(_LEFT - 8, y + 4, f"{index * step:g}", anchor="end"))
    return parts


def _text(x: float, y: float, text: str, size: int = 12, color: str = "#333", anchor: str = "start") -> str:
    escaped = text.replace("&", "&amp;").replace("<", "&lt;")
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{color}" text-anchor="{anchor}">{escaped}</text>'


def _short(number: int) -> str:
    for unit, name in ((1 << 20, "M"), (1 << 10, "k")):
        if number >= unit:
            return f"{number // unit}{name}"
    return str(number)


def _svg(parts: Sequence[str]) -> str:
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif">\n'
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>\n{body}\n</svg>\n'
    )
