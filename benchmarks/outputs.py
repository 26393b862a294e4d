"""Output that benchmarks share: files of results, figures for light and dark pages, and the commands of a study."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

THEMES = {
    "light": {"figure.facecolor": "white", "axes.facecolor": "white", "text": "black"},
    "dark": {"figure.facecolor": "#0d1117", "axes.facecolor": "#0d1117", "text": "#e6edf3"},
}
INK = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor")


def write_json(path: Path, result: Any) -> None:
    """Replace the file at once, so that an interrupted benchmark leaves the old one or the new one."""
    from pacl.files import write_bytes  # only where a benchmark needs it: the kernels' own do not import the package

    write_bytes(path, (json.dumps(result, indent=1) + "\n").encode())


def light_and_dark(path: Path, salt: str, draw: Callable[[Any, str], Any]) -> list[Path]:
    """Write a figure for light pages and one for dark pages. Return the files, PATH with -light and -dark.

    Args:
        path: name of the file; its suffix is the format.
        salt: makes the names inside an SVG the same in every run.
        draw: function of pyplot and the colour of text, that returns the figure.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    files = []
    for theme, colours in THEMES.items():
        faces = {key: value for key, value in colours.items() if key != "text"}
        with plt.rc_context(faces | dict.fromkeys(INK, colours["text"]) | {"svg.hashsalt": salt}):
            figure = draw(plt, colours["text"])
            files.append(path.with_name(f"{path.stem}-{theme}{path.suffix}"))
            figure.savefig(files[-1], metadata={"Date": None} if path.suffix == ".svg" else None)
            plt.close(figure)
    return files


def run_and_report(
    description: str | None,
) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser, argparse.ArgumentParser]:
    """Return a parser with the commands `run` and `report` of a folder of runs, and the parsers of both."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run, report = commands.add_parser("run"), commands.add_parser("report")
    for each in (run, report):
        each.add_argument("out", type=Path, help="Folder of the runs.")
    report.add_argument("--json", type=Path, help="Write the result.")
    return parser, run, report
