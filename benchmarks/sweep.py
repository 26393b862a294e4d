"""Sweep of `throughput.py` over shapes, forms, losses and dtypes: one JSON that a later call continues, and its plots.

    python benchmarks/throughput.py --sweep sweep.json --plot sweep.svg --peers "eager, sum" --backend cpu

Each point changes one number of the shape, B, N or D, and leaves the others at --batch, --patches and --dim. It is
measured as without --sweep. The file is written after each point; a call that finds it measures only what it lacks.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from providers import does_not_fit

AXES = {
    "batch": (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768),
    "patches": (49, 196, 256, 576, 729, 1369),
    "dim": (64, 128, 256, 512, 768, 1024),
}
KINDS = {
    "form": ("dot", "cosine", "max"),
    "loss": ("infonce", "sigmoid"),
    "dtype": ("float32", "bfloat16"),
    "frozen_texts": (False, True),
}
SETTINGS = (*AXES, *KINDS)
THEMES = {
    "light": {"figure.facecolor": "white", "axes.facecolor": "white", "text": "black"},
    "dark": {"figure.facecolor": "#0d1117", "axes.facecolor": "#0d1117", "text": "#e6edf3"},
}


def points(args: argparse.Namespace) -> Iterator[dict]:
    """Yield the settings of every point, each once; the most usual kind comes first."""
    seen = set()
    kinds: list[dict] = [{}]
    for name, choices in KINDS.items():
        kinds = [kind | {name: choice} for choice in choices for kind in kinds]
    for kind in kinds:
        for name, values in AXES.items():
            for value in values:
                point = {key: getattr(args, key) for key in AXES} | {name: value} | kind
                if tuple(point.values()) not in seen:
                    seen.add(tuple(point.values()))
                    yield point


def run(args: argparse.Namespace, measure: Callable, complete: Callable) -> dict:
    """Measure the points that the file lacks, write it after each, and return its contents.

    Args:
        args: those of throughput.py.
        measure: its function of the same name.
        complete: function that completes arguments whose shape or dtype has changed.

    Raises:
        ValueError: the file is of another machine or of other options.
    """
    path = Path(args.sweep)
    options = {name: getattr(args, name) for name in ("backend", "peers", "temperature", "threads", "device")}
    found = json.loads(path.read_text()) if path.exists() else {"machine": None, "options": options, "points": []}
    if found["options"] != options:
        raise ValueError(f"{path} has options {found['options']}, expected {options} or another file")
    done = {tuple(point["settings"][name] for name in SETTINGS) for point in found["points"]}
    todo = [point for point in points(args) if tuple(point[name] for name in SETTINGS) not in done]
    for count, point in enumerate(todo, 1):
        print(f"point {count} of {len(todo)}: {point}", file=sys.stderr, flush=True)
        these = copy.copy(args)
        vars(these).update(point, torch_dtype=getattr(torch, point["dtype"]), profile=None)
        complete(these)
        reason = does_not_fit(2, these)  # patches and their gradient
        if reason is not None:
            found["points"].append({"settings": point, "reason": reason, "rows": []})
        else:
            *_, outcome = measure(these)
            machine = outcome.pop("machine")
            here = {name: machine[name] for name in ("cpu", "gpu", "cores", "commit", "torch")}
            before = found["machine"] and {name: found["machine"][name] for name in here}
            if before not in (None, here):
                raise ValueError(f"{path} is of {before}, expected {here} or another file")
            found["machine"] = found["machine"] or machine
            kept = ("unit", "units", "operations", "peak", "rows")
            found["points"].append({"settings": point, "reason": None} | {name: outcome[name] for name in kept})
        _write(path, found)
    return found


def _write(path: Path, found: dict) -> None:
    """Replace the file at once, so that an interrupted sweep loses the point that it was measuring and no other."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(found, indent=1) + "\n")
    os.replace(part, path)


def series(found: dict, axis: str, base: dict, kind: dict, value: Callable[[dict, dict], float | None]) -> dict:
    """Return by row of a table [(place on the axis, value)], for the points of one kind.

    Args:
        found: contents of the file.
        axis: a name of `AXES`.
        base: the other numbers of the shape.
        kind: values of `KINDS`.
        value: function of a point and its row; None leaves the row out.
    """
    lines: dict[str, list[tuple[float, float]]] = {}
    for point in found["points"]:
        settings = point["settings"]
        if any(settings[name] != x for name, x in kind.items()):
            continue
        if any(settings[name] != x for name, x in base.items() if name != axis):
            continue
        for row in point["rows"]:
            y = value(point, row) if row["reason"] is None else None
            if y is not None:
                lines.setdefault(row["name"], []).append((settings[axis], y))
    return {name: sorted(line) for name, line in lines.items()}


def plot(found: dict, path: str, args: argparse.Namespace) -> list[Path]:
    """Draw time and memory against B, and the share of the peak against N; one file for light pages, one for dark.

    A line of eager PyTorch ends where it did not fit or did not run. Return the files, PATH with -light and -dark.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    base = {name: getattr(args, name) for name in AXES}
    kind = {name: getattr(args, name) for name in KINDS}
    charts = [
        ("batch", "ms a step", lambda _, row: row["step_ms"]),
        ("batch", "extra MiB", lambda _, row: row["extra_memory_mib"]),
        ("patches", "% of the peak", lambda _, row: row["step_share_of_peak"] and 100 * row["step_share_of_peak"]),
    ]
    files = []
    for theme, colours in THEMES.items():
        text = {key: colours["text"] for key in ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")}
        text["axes.edgecolor"] = colours["text"]
        faces = {key: value for key, value in colours.items() if key != "text"}
        with plt.rc_context(faces | text | {"svg.hashsalt": "sweep"}):
            figure, axes = plt.subplots(1, len(charts), figsize=(13, 3.8), layout="constrained")
            for place, (axis, label, value) in zip(axes, charts, strict=True):
                for name, line in series(found, axis, base, kind, value).items():
                    place.plot(*zip(*line, strict=True), marker="o", label=name)
                place.set_xscale("log", base=2)
                if axis == "batch":
                    place.set_yscale("log")
                else:
                    place.set_xticks(AXES[axis], [f"{value:,}" for value in AXES[axis]], fontsize=7)
                    place.minorticks_off()
                place.set_xlabel({"batch": "B = K", "patches": "N"}[axis])
                place.set_ylabel(label)
                place.spines[["top", "right"]].set_visible(False)
            axes[0].legend(frameon=False, fontsize=8)
            on = found["machine"]
            figure.suptitle(f"{kind['dtype']}, {kind['form']}, {kind['loss']}; {on and (on['gpu'] or on['cpu'])}")
            target = Path(path)
            files.append(target.with_name(f"{target.stem}-{theme}{target.suffix}"))
            figure.savefig(files[-1], metadata={"Date": None} if target.suffix == ".svg" else None)
            plt.close(figure)
    return files
