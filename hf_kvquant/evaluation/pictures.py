"""Pictures: what matplotlib draws, with one look, as SVG or PNG, readable without colour."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Told apart by marker, line and hatch; colours differ in lightness too.
_COLOURS = (
    "#000000",
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#8a4f9e",
    "#5c3c10",
    "#56a0d3",
    "#7a7a00",
    "#c0392b",
    "#666666",
)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
_LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (7, 2)))
_HATCHES = ("", "////", "\\\\\\\\", "----", "xxxx", "||||", "++++", "//", "\\\\", "--")
_FILLS = ("#222222", "#ffffff", "#dddddd", "#ffffff", "#dddddd", "#ffffff", "#dddddd", "#ffffff", "#dddddd", "#ffffff")
_LETTERS = 16  # of a caption, an inch
_LETTER = 0.074  # inches, of a label
_LINE = 0.16  # inches of a label
_FONT = "DejaVu Sans"  # comes with matplotlib
_RC: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small files that can be searched
    "font.family": [_FONT],
    "font.size": 9,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "text.parse_math": False,  # a dollar in a name is a dollar
    "axes.formatter.useoffset": False,
}


@dataclass(frozen=True)
class Picture:
    """A figure, and what it shows.

    Attributes:
        name: of its file, without an ending.
        title: what it says.
        caption: what it was measured with.
        digest: of the numbers and words in it.
        figure: matplotlib's.
    """

    name: str
    title: str
    caption: str
    digest: str
    figure: Figure

    def svg(self) -> str:
        """As SVG text, the same for the same data under the same matplotlib."""
        note = {"Date": None, "Title": self.title, "Description": f"drawn from data {self.digest}"}
        text = self._saved("svg", metadata=note).decode()
        return text.replace(f"'{_FONT}'", f"'{_FONT}', Verdana, sans-serif")  # a font as wide, where it is missing

    def png(self) -> bytes:
        """As a PNG file."""
        return self._saved("png", dpi=160)

    def _saved(self, kind: str, **options: Any) -> bytes:
        with style(self.name):
            file = io.BytesIO()
            self.figure.savefig(file, format=kind, **options)
        return file.getvalue()


def style(name: str) -> AbstractContextManager[None]:
    """matplotlib with this look; identifiers in the SVG depend on `name` alone.

    Raises ImportError naming the extra to install where matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("pictures are drawn by matplotlib; install it with `pip install 'hf-kvquant[report]'`")
    import matplotlib

    return matplotlib.rc_context({**_RC, "svg.hashsalt": name})


def draw(
    name: str,
    title: str,
    caption: str,
    content: Mapping[str, Any],
    paint: Callable[[Any], None],
    size: tuple[float, float] = (7.6, 3.9),
) -> Picture:
    """A picture with its caption below.

    Args:
        name, title, caption: as in `Picture`.
        content: all that `paint` draws, as JSON.
        paint: draws into an empty figure.
        size: inches.

    Raises ImportError as `style` does.
    """
    with style(name):
        from matplotlib.figure import Figure

        figure = Figure(figsize=size, layout="constrained")
        paint(figure)
        words = textwrap.fill(caption, int(_LETTERS * size[0]))
        figure.supxlabel(words, fontsize=7, x=0.01, ha="left", color="#444444")
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # settled: each drawing would move things a little further
    data = json.dumps([title, caption, content], sort_keys=True).encode()
    return Picture(name, title, caption, hashlib.sha256(data).hexdigest(), figure)


def line_style(index: int, thick: bool = False) -> dict[str, Any]:
    """How a series looks."""
    return {
        "color": _COLOURS[index % len(_COLOURS)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "linestyle": _LINES[index % len(_LINES)],
        "markersize": 5,
        "markerfacecolor": "white" if (index + index // len(_MARKERS)) % 2 else _COLOURS[index % len(_COLOURS)],
        "linewidth": 2.2 if thick else 1.4,
    }


def bar_style(index: int) -> dict[str, Any]:
    """How the bars of a name look."""
    return {
        "facecolor": _FILLS[index % len(_FILLS)],
        "hatch": _HATCHES[index % len(_HATCHES)],
        "edgecolor": "#222222",
        "linewidth": 0.7,
    }


def label_right(axes: Any, labels: Sequence[tuple[str, float, float, str]]) -> None:
    """Write labels right of the axes, none over another, each tied to its point by a thin line.

    Args:
        axes: with limits and scales as they will stay.
        labels: (text, x, y, colour), the place in data coordinates.
    """
    if not labels:
        return
    to_axes = axes.transData + axes.transAxes.inverted()
    places = [tuple(map(float, to_axes.transform((x, y)))) for _, x, y, _ in labels]
    order = sorted(range(len(labels)), key=lambda index: (places[index][1], -places[index][0]))
    # The axes are about so much lower than the figure: title, ticks, caption.
    gap = _LINE / (axes.figure.get_figheight() - 1.1)
    heights = spread([places[index][1] for index in order], gap)
    for index, height in zip(order, heights, strict=True):
        text, x, y, colour = labels[index]
        axes.annotate(
            text, xy=(x, y), xytext=(1.04, height), textcoords="axes fraction", va="center", ha="left", fontsize=8,
            color=colour, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.6, "shrinkA": 1, "shrinkB": 3,
                        "relpos": (0, 0.5)},
        )  # fmt: skip


def room_for(labels: Iterable[str]) -> float:
    """Inches of a figure's width that leave its axes their usual width beside these labels."""
    return max(7.6, 6.0 + _LETTER * max(map(len, labels), default=0))


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Increasing places moved as little as it takes to be `gap` apart, and to lie between 0 and 1 if all have room."""
    groups: list[list[float]] = []  # of each: sum of the wanted first places, and how many stand one above the other
    for place in places:
        groups.append([place, 1])
        while len(groups) > 1:
            (low, count), (high, more) = groups[-2:]
            if low / count + count * gap <= high / more:
                break
            groups[-2:] = [[low + high - more * count * gap, count + more]]
    apart = [total / count + index * gap for total, count in groups for index in range(int(count))]
    apart = [max(place, index * gap) for index, place in enumerate(apart)]
    return [min(place, 1 - index * gap) for index, place in zip(reversed(range(len(apart))), apart, strict=True)]


def plain(text: str) -> str:
    """A text as part of a file's name: letters, digits and dashes."""
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower() or "measurement"


def unused(text: str, taken: set[str]) -> str:
    """A file's name of `text` that is not taken yet."""
    name = plain(text)
    numbered = (f"{name}-{number}" for number in range(2, len(taken) + 3))
    return name if name not in taken else next(other for other in numbered if other not in taken)
