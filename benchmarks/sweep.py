"""Sweep of `throughput.py` over shapes, forms, losses and dtypes: one JSON that a later call continues, and its plots.

    python benchmarks/throughput.py --sweep sweep.json --minutes 12 --backend cpu --plot sweep.svg

The points are a star around the shape, form, loss and dtype that the options name: each changes one number or one
option, and a few corners change more. They come in order of worth. With --minutes a point is left out while it is
predicted to take longer than what remains. Unless --peers names others, plain PyTorch is the only peer. The file is
written after each point; a call that finds it measures only what it lacks.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from outputs import light_and_dark
from plan_errors import step_of
from providers import does_not_fit

from pacl_kernels import backends, calibration, costs
from pacl_kernels.plan import seconds_of

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
CORNERS: tuple[dict[str, Any], ...] = (
    {"form": "cosine", "dtype": "bfloat16"},
    {"form": "cosine", "dtype": "bfloat16", "batch": 64, "patches": 1369, "dim": 768},
    {"form": "cosine", "dtype": "bfloat16", "batch": 128, "patches": 576, "dim": 768},
    {"form": "cosine", "loss": "sigmoid"},
    {"dtype": "bfloat16", "batch": 64, "patches": 49, "dim": 64},
)
ARMS: tuple[dict[str, Any], ...] = (
    {},
    {"form": "cosine"},
    {"dtype": "bfloat16"},
    {"form": "cosine", "dtype": "bfloat16"},
    {"form": "max"},
)
GIVEN = ("patches and texts", "their gradients")  # parts of the memory that the caller has in any case
PEERS = "eager, sum;eager, max"
REPEATS, OVERHEAD = 5, 10.0  # timed runs, and seconds of a point besides its steps (processes that measure memory)


def points(args: argparse.Namespace) -> Iterator[dict]:
    """Yield the settings of every point once, those of most worth first.

    First the centre, and the centre with one option changed; then its arms along B, N and D; corners; then the arms of
    other forms and dtypes.
    """
    centre = {name: getattr(args, name) for name in SETTINGS}

    def arms(kind: dict) -> list[dict]:
        return [kind | {name: value} for name, values in AXES.items() for value in values]

    options = [{name: choice} for name, choices in KINDS.items() for choice in choices]
    seen = set()
    for change in [{}, *options, *arms(ARMS[0]), *CORNERS, *(point for kind in ARMS[1:] for point in arms(kind))]:
        point = centre | change
        known = all(point[name] in choices for name, choices in KINDS.items())
        if known and tuple(point.values()) not in seen:
            seen.add(tuple(point.values()))
            yield point


def predict(args: argparse.Namespace) -> dict:
    """Return what the model of `pacl_kernels.plan` says of a point, with the rates of this machine.

    "units" counts the operations of the matrix products that the backend does, in products of all patches with all
    texts; "kernels_ms" are the parts of "step_ms".
    """
    name = args.backend[0] if len(args.backend) == 1 else "auto"
    backend = backends.resolve(name, args.torch_device, args.torch_dtype)
    machine = calibration.this_machine(args.device, args.dtype, backend)
    step = step_of(vars(args))
    traits = machine.traits(step, backend)
    kernels = {part: 1e3 * seconds for part, seconds in seconds_of(step, traits, machine).items() if seconds}
    parts = costs.memory(step, traits, args.threads)
    return {
        "backend": backend,
        "units": sum(work.products for work in costs.work(step, traits)) / step.unit,
        "kernels_ms": kernels,
        "step_ms": sum(kernels.values()),
        "extra_mib": sum(size for part, size in parts.items() if part not in GIVEN) / 2**20,
        "eager_ms": 1e3 * machine.rates[backend, args.dtype].eager_seconds(step),
    }


def run(args: argparse.Namespace, measure: Callable, complete: Callable) -> dict:
    """Measure the points that the file lacks, write it after each, and return its contents.

    Args:
        args: those of throughput.py.
        measure: its function of the same name.
        complete: function that completes arguments whose shape or dtype has changed.

    Raises:
        ValueError: the file is of another machine or of other options.
    """
    path, deadline = Path(args.sweep), time.monotonic() + 60 * args.minutes
    args.peers = PEERS if args.peers == "all" else args.peers
    options = {name: getattr(args, name) for name in ("backend", "peers", "temperature", "threads", "device")}
    found = json.loads(path.read_text()) if path.exists() else {"machine": None, "options": options, "points": []}
    if found["options"] != options:
        raise ValueError(f"{path} has options {found['options']}, expected {options} or another file")
    done = {tuple(point["settings"][name] for name in SETTINGS) for point in found["points"]}
    todo = [point for point in points(args) if tuple(point[name] for name in SETTINGS) not in done]
    left = 0
    for count, point in enumerate(todo, 1):
        these = copy.copy(args)
        vars(these).update(point, torch_dtype=getattr(torch, point["dtype"]), profile=None)
        these.repeats = min(args.repeats, REPEATS)
        complete(these)
        reason = does_not_fit(2, these)  # patches and their gradient
        if reason is not None:
            found["points"].append({"settings": point, "reason": reason, "rows": []})
            _write(path, found)
            continue
        plan = predict(these)
        steps = (3 + these.repeats) * 1e-3 * (2 * plan["step_ms"] + plan["eager_ms"] * (args.peers != "none"))
        if time.monotonic() + OVERHEAD + steps > deadline:
            left += 1
            continue
        print(f"point {count} of {len(todo)}: {point}", file=sys.stderr, flush=True)
        *_, outcome = measure(these)
        machine = outcome.pop("machine")
        here = {name: machine[name] for name in ("cpu", "gpu", "cores", "commit", "torch")}
        before = found["machine"] and {name: found["machine"][name] for name in here}
        if before not in (None, here):
            raise ValueError(f"{path} is of {before}, expected {here} or another file")
        found["machine"] = found["machine"] or machine
        kept = ("unit", "units", "operations", "peak", "rows")
        new = {"settings": point, "reason": None, "plan": plan} | {name: outcome[name] for name in kept}
        found["points"].append(new)
        _write(path, found)
    if left:
        print(f"{left} points are left, because they do not fit into --minutes; run it again to go on", file=sys.stderr)
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
            y = value(point, row)
            if y is not None:
                lines.setdefault(row["name"], []).append((settings[axis], y))
    return {name: sorted(line) for name, line in lines.items()}


def _step_ms(point: dict, row: dict) -> float | None:
    return row["step_ms"]


def _extra_mib(point: dict, row: dict) -> float | None:
    return row["extra_memory_mib"] if row["step_ms"] is not None else None


def _share(point: dict, row: dict) -> float | None:
    return row["step_share_of_peak"] and 100 * row["step_share_of_peak"]


def walls(found: dict, base: dict, kind: dict) -> dict[str, float]:
    """Return the smallest B at which a peer needs more memory than there is."""

    def unfit(point: dict, row: dict) -> float | None:
        lacks = not row["name"].startswith("fused") and "GiB are free" in (row["reason"] or "")
        return 1.0 if lacks else None

    return {name: line[0][0] for name, line in series(found, "batch", base, kind, unfit).items()}


def plot(found: dict, path: str, args: argparse.Namespace) -> list[Path]:
    """Draw time and memory against B, and the share of the peak against N; one file for light pages, one for dark.

    A dotted line stands where plain PyTorch no longer fits. Return the files, PATH with -light and -dark.
    """
    base = {name: getattr(args, name) for name in AXES}
    kind = {name: getattr(args, name) for name in KINDS}

    def draw(plt: Any, ink: str) -> Any:
        figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
        for place, value, label in ((axes[0], _step_ms, "ms a step"), (axes[1], _extra_mib, "extra MiB")):
            for name, line in series(found, "batch", base, kind, value).items():
                place.plot(*zip(*line, strict=True), marker="o", label=name)
            for name, batch in walls(found, base, kind).items():
                place.axvline(batch, linestyle=":", color=ink)
                place.text(batch, 1.0, f"{name}: no memory ", transform=place.get_xaxis_transform(), fontsize=7,
                           rotation=90, ha="right", va="top")  # fmt: skip
            place.set(xscale="log", yscale="log", xlabel="B = K", ylabel=label)
            place.set_xscale("log", base=2)
        for form in KINDS["form"]:
            for name, line in series(found, "patches", base, kind | {"form": form}, _share).items():
                if name.startswith("fused"):
                    axes[2].plot(*zip(*line, strict=True), marker="o", label=f"{name}, {form}")
        axes[2].set_xscale("log", base=2)
        axes[2].set_xticks(AXES["patches"], [f"{value:,}" for value in AXES["patches"]], fontsize=7)
        axes[2].minorticks_off()
        axes[2].set(xlabel="N", ylabel="% of the peak")
        for place in (axes[0], axes[2]):
            if place.get_legend_handles_labels()[0]:
                place.legend(frameon=False, fontsize=8)
        for place in axes:
            place.spines[["top", "right"]].set_visible(False)
        on = found["machine"]
        figure.suptitle(f"{kind['dtype']}, {kind['form']}, {kind['loss']}; {on and (on['gpu'] or on['cpu'])}")
        return figure

    return light_and_dark(Path(path), "sweep", draw)
