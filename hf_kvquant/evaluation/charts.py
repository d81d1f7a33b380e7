"""The kinds of pictures: lines, points, bars and heat maps of named numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .pictures import Picture, bar_style, draw, label_right, line_style, room_for

Points = Sequence[tuple[float, float]]
Matrix = Sequence[Sequence[float | None]]
_CELL = 0.44  # inches of a heat map's cell
_MOST_CELLS = 16  # columns of a heat map that still have room for a number each


def lines(
    name: str,
    title: str,
    caption: str,
    series: Mapping[str, Points],
    x_label: str,
    y_label: str,
    reference: str | None = None,
    log_x: bool = True,
) -> Picture:
    """Lines from zero up, each named at its end; the reference's is thicker."""

    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        ends = []
        for index, (label, points) in enumerate(series.items()):
            look = line_style(index, thick=label == reference)
            axes.plot([x for x, _ in points], [y for _, y in points], **look)
            ends.append((label, *max(points), look["color"]))
        axes.set(title=title, xlabel=x_label, ylabel=y_label, xscale="log" if log_x else "linear")
        _ticks(axes, sorted({x for points in series.values() for x, _ in points}), log_x)
        axes.set_ylim(0, axes.get_ylim()[1])
        axes.set_xlim(axes.get_xlim())
        label_right(axes, ends)

    content = {"lines": {label: list(points) for label, points in series.items()}, "axes": [x_label, y_label]}
    return draw(name, title, caption, content, paint, size=(room_for(series), 3.9))


def points(
    name: str,
    title: str,
    caption: str,
    series: Mapping[str, tuple[float, float]],
    x_label: str,
    y_label: str,
    reference: tuple[str, float] | None = None,
    linear_below: float | None = None,
) -> Picture:
    """One point a name, named at the side; the y axis is logarithmic.

    Args:
        name, title, caption, x_label, y_label: in words.
        series: the place of each.
        reference: a name for an x.
        linear_below: y up to which the axis is linear, for numbers that may be zero or negative.
    """

    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        labels = []
        for index, (label, (x, y)) in enumerate(series.items(), 1):
            look = {**line_style(index), "linestyle": "", "markersize": 6.5}
            axes.plot([x], [y], **look)
            labels.append((label, x, y, look["color"]))
        if linear_below is None:
            axes.set_yscale("log")
        else:
            axes.set_yscale("symlog", linthresh=linear_below)
            axes.axhline(0, color="#444444", linewidth=0.8)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.set(title=title, xlabel=x_label, ylabel=y_label, xlim=(0, None))
        if reference is not None:
            axes.axvline(reference[1], color="#444444", linewidth=0.9, linestyle=":")
            axes.set_xlim(right=1.03 * max(reference[1], *(x for x, _ in series.values())))
            axes.annotate(
                reference[0], (reference[1], 0.98), (-4, 0), xycoords=axes.get_xaxis_transform(),
                textcoords="offset points", ha="right", va="top", fontsize=8, zorder=5,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
            )  # fmt: skip
        axes.margins(y=0.12)
        _whole_decades(axes)
        label_right(axes, labels)

    content = {"points": dict(series), "axes": [x_label, y_label], "reference": reference}
    return draw(name, title, caption, content, paint, size=(room_for(series), max(3.9, 1.1 + 0.2 * len(series))))


def bars(
    name: str, title: str, caption: str, groups: Mapping[str, Mapping[str, float]], y_label: str, x_label: str
) -> Picture:
    """Groups of bars that share their names, with their numbers above."""
    names = list(dict.fromkeys(label for group in groups.values() for label in group))

    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        width = 0.86 / len(names)
        for index, label in enumerate(names):
            places = [g for g, group in enumerate(groups.values()) if label in group]
            heights = [group[label] for group in groups.values() if label in group]
            drawn = axes.bar([g + index * width for g in places], heights, 0.9 * width, label=label, **bar_style(index))
            axes.bar_label(drawn, fmt="%.3g", fontsize=6.5, padding=1, rotation=90 if len(names) > 5 else 0)
        axes.set(title=title, xlabel=x_label, ylabel=y_label)
        axes.set_xticks([g + 0.43 - width / 2 for g in range(len(groups))], list(groups))
        axes.grid(visible=False, axis="x")
        axes.margins(y=0.12)
        figure.legend(loc="outside right upper", frameon=False, handlelength=2.4, handleheight=1.2, fontsize=8)

    content = {"bars": {group: dict(values) for group, values in groups.items()}, "axes": [x_label, y_label]}
    return draw(name, title, caption, content, paint, size=(9.2, 3.9))


def heat_maps(
    name: str, title: str, caption: str, rows: Sequence[str], panels: Mapping[str, Matrix], x_label: str
) -> Picture:
    """Panels side by side, of the same rows; darker is more, on a logarithmic scale, each panel for itself.

    Args:
        name, title, caption, x_label: in words.
        rows: names of the rows.
        panels: title of each -> numbers `[rows][columns]` from 0 up, None where there is none.
    """
    widths = [
        max(_CELL * min(len(matrix[0]), _MOST_CELLS), 0.3 + 0.08 * len(label)) for label, matrix in panels.items()
    ]

    def paint(figure: Any) -> None:
        all_axes = figure.subplots(1, len(panels), squeeze=False, width_ratios=widths)[0]
        for axes, (label, matrix) in zip(all_axes, panels.items(), strict=True):
            shades = _shades(matrix)
            axes.pcolormesh(shades, cmap="Greys", vmin=0, vmax=1.25, edgecolors="white", linewidth=0.4)
            axes.invert_yaxis()
            columns = len(matrix[0])
            if columns <= _MOST_CELLS:
                for y, row in enumerate(matrix):
                    for x, value in enumerate(row):
                        axes.text(
                            x + 0.5, y + 0.5, _cell(value), ha="center", va="center", fontsize=6.5,
                            color="white" if shades[y][x] > 0.7 else "black",
                        )  # fmt: skip
            axes.set_title(label, fontsize=9)
            axes.set_xlabel(x_label)
            shown = range(0, columns, max(1, columns // 8))
            axes.set_xticks([layer + 0.5 for layer in shown], list(map(str, shown)))
            names = list(rows) if axes is all_axes[0] else [""] * len(rows)
            axes.set_yticks([row + 0.5 for row in range(len(rows))], names)
            axes.tick_params(length=0)
            axes.grid(visible=False)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)

    content = {"rows": list(rows), "panels": {label: [list(row) for row in matrix] for label, matrix in panels.items()}}
    size = (0.5 + 0.085 * max(map(len, rows)) + sum(widths), 1.35 + 0.24 * len(rows))
    return draw(name, title, caption, content, paint, size)


def _cell(value: float | None) -> str:
    """A number from 0 up, in five letters."""
    if value is None:
        return "-"
    if value >= 99.5:
        return f"{value:,.0f}" if value < 10_000 else f"{value / 1000:,.0f}k"
    return f"{value:.2g}" if value >= 0.001 or value == 0 else "<.001"


def _shades(matrix: Matrix) -> list[list[float]]:
    """From 0 for zero, none, or a thousandth of the largest, to 1 for the largest."""
    largest = max((value for row in matrix for value in row if value), default=1.0)
    return [
        [max(0.0, 1 + math.log10(value / largest) / 3) if value else 0.0 for value in row] for row in matrix
    ]  # fmt: skip


def _ticks(axes: Any, values: Sequence[float], log: bool) -> None:
    """The measured values themselves as ticks, as far as they have room."""
    places = [math.log(value) if log else value for value in values]
    gap = 0.06 * (places[-1] - places[0])
    kept = [len(values) - 1]
    for index in reversed(range(len(values) - 1)):
        if places[kept[-1]] - places[index] >= gap:
            kept.append(index)
    axes.set_xticks([values[index] for index in kept], [short(values[index]) for index in kept])
    axes.set_xticks([], minor=True)


def _whole_decades(axes: Any) -> None:
    """Let a logarithmic y axis that would have less than two ticks end at round numbers."""
    low, high = axes.get_ylim()
    if low > 0 and high / low < 100:
        low, high = 10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(high))
    axes.set_ylim(low, high)


def short(number: float) -> str:
    """A number of tokens, `8k` for 8192."""
    for unit, letter in ((1 << 20, "M"), (1 << 10, "k")):
        if number >= unit and number % unit == 0:
            return f"{number / unit:g}{letter}"
    return f"{number:,g}" if number < 100_000 else f"{number:.0e}"
