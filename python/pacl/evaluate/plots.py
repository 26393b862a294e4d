"""Plots of results, if matplotlib is installed."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import write_bytes
from ..segment.lettering import families

MISSING = "matplotlib is not installed, pip install matplotlib"


def plot_png(size: tuple[float, float], draw: Callable[[Any], None]) -> bytes | None:
    """Return a PNG of `size` inches with one axes, filled by `draw`; None without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(size, dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure.subplots())
    _find_fonts(figure)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # said by `families`, with the font to install
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _find_fonts(figure: Any) -> None:
    """Let all texts of the figure fall back on installed fonts for characters that matplotlib's own font lacks."""
    from matplotlib.text import Text

    texts = figure.findobj(Text)
    names = families(text.get_text() for text in texts)
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # else a font of another weight is a warning
    for text in texts if names else ():
        text.set_fontfamily([*text.get_fontfamily(), *names])


def print_plot(path: Path, size: tuple[float, float], draw: Callable[[Any], None]) -> None:
    """Write plot_png to `path` and print the path; without matplotlib, print that there is no plot."""
    png = plot_png(size, draw)
    if png is None:
        print(f"no plot {path}: {MISSING}", file=sys.stderr)
        return
    write_bytes(path, png)
    print(path)


def bars(classes: Sequence[str], values: Mapping[str, Sequence[float]], title: str) -> Callable[[Any], None]:
    """Draw bars of the classes' accuracies, 0 to 1, in a colour for each of `values`."""

    def draw(axes: Any) -> None:
        height = 0.8 / len(values)
        for i, (name, each) in enumerate(values.items()):
            axes.barh([k + (i + 0.5) * height - 0.4 for k in range(len(classes))], each, height, label=name)
        axes.set_yticks(range(len(classes)), [_plain(name) for name in classes])
        axes.set(xlim=(0, 1), ylim=(len(classes) - 0.5, -0.5), xlabel="accuracy over patches", title=title)
        axes.figure.legend(loc="outside lower center")  # off the bars

    return draw


def curves(lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], title: str) -> Callable[[Any], None]:
    """Draw ROC curves and the diagonal."""

    def draw(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], color="gray", linewidth=0.8)
        for name, (false, true) in lines.items():
            axes.plot(false, true, label=name)
        axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", title=title)
        axes.set(xlabel="pairs of two classes above the cosine", ylabel="pairs of one class above the cosine")
        axes.legend(loc="lower right")

    return draw


def series(lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], title: str) -> Callable[[Any], None]:
    """Draw curves over training steps; one without points is not named, but keeps its colour for the other plots."""

    def draw(axes: Any) -> None:
        for i, (name, (steps, values)) in enumerate(lines.items()):
            if len(steps):
                dots = "." if len(steps) < 30 else None
                axes.plot(steps, values, color=f"C{i % 10}", marker=dots, label=_plain(name))
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend()

    return draw


def _plain(name: str) -> str:
    """Escape `$`, with which matplotlib begins a formula."""
    return name.replace("$", r"\$")
