"""Charts of a page: SVG whose text and lines take the page's colours, light or dark."""

import io
import re
from collections.abc import Sequence
from typing import NamedTuple

import markupsafe
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from isd_tf.report.figures import COLORS

# Points of a line; more cannot be told apart.
MAX_POINTS = 300
# What the page's own colour takes the place of: no other line has it.
INK = "#010203"


class Line(NamedTuple):
    """A line of a chart."""

    name: str
    x: np.ndarray  # [n]
    y: np.ndarray  # [n]
    color: int = 0  # of COLORS
    dashed: bool = False


class Level(NamedTuple):
    """A value to hold lines against."""

    name: str
    y: float


def chart(
    title: str,
    lines: Sequence[Line],
    levels: Sequence[Level] = (),
    percent: bool = False,
    logarithmic: bool = False,
    scale: Level | None = None,
) -> markupsafe.Markup:
    """Draws lines over the epochs.

    Args:
        title: of the chart; what a screen reader reads, with the lines' last values.
        lines: at least one point in all.
        levels: horizontal dotted lines.
        percent: whether values are shares.
        logarithmic: whether the values' axis is.
        scale: what the axis on the right shows values as shares of.

    Returns:
        An <svg> element.
    """
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "isd_tf"}):
        figure = Figure(figsize=(5, 3), layout="constrained")
        axis = figure.subplots()
        for name, x, y, color, dashed in lines:
            x, y = _thinned(x, y)
            axis.plot(
                x,
                y,
                label=name,
                color=COLORS[color % 6],
                linestyle="--" if dashed else "-",
                marker="o" if len(x) <= 40 else None,
                markersize=3,
            )
        for name, y in levels:
            axis.axhline(y, color=INK, linestyle=":", linewidth=1)
            place = axis.get_yaxis_transform()
            axis.text(
                1, y, name, ha="right", va="bottom", fontsize=8, transform=place, parse_math=False
            )
        axis.set_title(title, loc="left", fontsize=10, color=INK)
        axis.set_xlabel("epoch")
        if logarithmic and all((line.y > 0).all() for line in lines):
            axis.set_yscale("log")
        if percent:
            axis.yaxis.set_major_formatter(PercentFormatter(1))
        axes = [axis]
        if scale:
            right = axis.secondary_yaxis(
                "right", functions=(lambda y: y / scale.y, lambda y: y * scale.y)
            )
            right.set_ylabel(f"share of {scale.name}")
            right.yaxis.set_major_formatter(PercentFormatter(1))
            axes.append(right)
        axis.grid(alpha=0.25, color=INK)
        if len(lines) > 1:
            legend = axis.legend(fontsize=8, labelcolor=INK, framealpha=0)
            for text in legend.get_texts():
                text.set_parse_math(False)
        _ink(figure, axes)
        return _svg(figure, f"{title}: {_in_words(lines, percent)}")


def _in_words(lines, percent):
    shown = "{:.1%}" if percent else "{:.4g}"
    ends = [f"{x.name} {shown.format(x.y[0])} to {shown.format(x.y[-1])}" for x in lines]
    return "; ".join(ends)


def _thinned(x, y):
    if len(x) <= MAX_POINTS:
        return x, y
    parts = np.array_split(np.arange(len(x)), MAX_POINTS)
    return tuple(np.array([values[part].mean() for part in parts]) for values in (x, y))


def _ink(figure, axes):
    for axis in axes:
        axis.tick_params(colors=INK, which="both", labelsize=8)
        for part in (*axis.texts, axis.xaxis.label, axis.yaxis.label):
            part.set_color(INK)
        for spine in axis.spines.values():
            spine.set_edgecolor(INK)
            spine.set_alpha(0.4)
        axis.xaxis.label.set_fontsize(8)
        axis.yaxis.label.set_fontsize(8)


def _svg(figure, alt):
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = re.sub(r"<metadata>.*?</metadata>", "", text.getvalue(), flags=re.DOTALL)
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    head, body = svg.split(">", 1)
    view_box = re.search(r'viewBox="[^"]+"', head)[0]
    alt = markupsafe.escape(alt)
    return markupsafe.Markup(f'<svg {view_box} role="img" aria-label="{alt}">{body}')
