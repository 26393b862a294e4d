"""Show a result of `throughput.py`: describe the machine, print a table, draw a chart.

`python benchmarks/report.py FILE...` prints Markdown tables of results written with --json.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch
from result_tables import number, throughput

import pacl_kernels

EXPLANATION = """
Medians of interleaved runs; ± is half the distance from the 20th to the 80th percentile.
/ products: time divided by that of the bare matrix products of a step ({products:.0f} units; forward 1).
% of peak: work of the fused loss, {forward:.3g} and {step:.3g} units (products: their own), over time and peak.
speed: step time of the fastest row that is not ours divided by that of this row; above 1 beats them all.
extra: peak memory beyond inputs and gradients. error: largest relative error of loss and gradients, norm of the
difference over norm of the float64 truth, at B = K = {error_batch}.
floor: a cheaper loss, of each image's mean patch."""


def machine(device: torch.device, native) -> dict:
    cuda = device.type == "cuda"
    try:
        cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):  # not Linux, or an Arm whose cpuinfo lacks the line
        cpu = platform.processor() or platform.machine()
    commit = os.environ.get("PACL_COMMIT")  # for a copy with another history or without one
    describe = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty"]
    try:
        commit = commit or subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        pass
    return {
        "cpu": cpu,
        "cpu_isa": native.cpu_isa() if hasattr(native, "cpu_isa") else None,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(device) if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "compiler": None,  # the native module does not report it
        "pacl_kernels": pacl_kernels.__version__,
        "commit": commit,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def table(result: dict) -> str:
    on, settings, peak = result["machine"], result["settings"], result["peak"]
    isa = on["cpu_isa"] or "no native module"
    peak_text = f"{peak / 1e9:.4g} GFLOP/s{_spread(peak, result['peak_spread'])}" if peak else "unknown"
    source = "" if not peak else " (data sheet)" if on["gpu"] else " (a loop of multiply-adds in this run)"
    lines = [
        on["gpu"] or f"{on['cpu']}, {isa}, {settings['threads']} threads on {on['cores']} cores",
        f"pacl_kernels {on['pacl_kernels']}, commit {on['commit'] or 'unknown'}; torch {on['torch']}"
        f" ({on['torch_cpu_capability']}), Python {on['python']}; {on['date']}",
        _shape(settings) + f", temperature {settings['temperature']}, seed {settings['seed']}",
        f"unit {result['unit'] / 1e9:.3g} GFLOP, peak {peak_text}{source}",
        "",
        f"{'':<28}{'forward':>11}{'fwd + bwd':>15}{'/ products':>17}{'% of peak':>14}{'speed vs':>11}"
        f"{'extra':>7}{'error':>9}{'runs':>5}",
        f"{'':<28}{'ms':>7}{'':6}{'ms':>8}{'':6}{'fwd':>7}{'step':>7}{'fwd':>7}{'step':>6}{'best peer':>12}"
        f"{'MiB':>7}{'vs f64':>9}",
    ]
    for row in result["rows"]:
        if row["reason"] is not None:
            lines.append(f"{row['name']:<28}   {row['reason']}")
            continue
        lines.append(
            f"{row['name']:<28}"
            + f"{_number(row['forward_ms'], 7)}{_spread(row['forward_ms'], row['forward_spread']):6}"
            + f"{_number(row['step_ms'], 8)}{_spread(row['step_ms'], row['step_spread']):6}"
            + f"{_number(row['forward_vs_products'], 7)}{_number(row['step_vs_products'], 7)}"
            + f"{_number(row['forward_share_of_peak'], 7, '.0%')}{_number(row['step_share_of_peak'], 6, '.0%')}"
            + f"{_number(row['step_vs_best_peer'], 12)}{_number(row['extra_memory_mib'], 7, '.0f')}"
            + f"{_number(row['relative_error'], 9, '.1e')}{row['runs']:>5}"
        )
    products = 1 if settings["form"] == "max" else 3 if settings["frozen_texts"] else 4
    numbers = {"products": products, "error_batch": settings["error_batch"]}
    return "\n".join(lines) + "\n" + EXPLANATION.format(**numbers, **result["operations"])


def plot(result: dict, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in reversed(result["rows"]) if row["step_ms"] is not None]
    figure, axes = plt.subplots(figsize=(8, 0.4 * len(rows) + 1.5), layout="constrained")
    for y, row in enumerate(rows):
        colour = "C0" if row["name"].startswith("fused") else "C7" if row["name"].startswith("matrix") else "C1"
        whiskers = [[max(0, row["step_ms"] - row["step_spread"][0])], [max(0, row["step_spread"][1] - row["step_ms"])]]
        axes.barh(y, row["step_ms"], xerr=whiskers, color=colour, alpha=0.5)
        axes.barh(y, row["forward_ms"], color=colour)
    if result["peak"]:
        at_peak = 1e3 * result["operations"]["step"] * result["unit"] / result["peak"]
        axes.axvline(at_peak, color="black", linestyle="--", linewidth=1, label="the fused loss at the machine's peak")
        axes.legend(frameon=False)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.set_xlabel("ms a training step (dark: forward), median and 20th to 80th percentile")
    on = result["machine"]
    axes.set_title(f"{_shape(result['settings'])}\n{on['gpu'] or on['cpu']}, torch {on['torch']}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _shape(settings: dict) -> str:
    frozen = ", frozen texts" if settings["frozen_texts"] else ""
    return "B = K = {batch}, N = {patches}, D = {dim}, {dtype}, {form}".format(**settings) + frozen


def _number(value: float | None, width: int, form: str | None = None) -> str:
    return f"{number(value, form):>{width}}"


def _spread(median: float | None, spread: list[float]) -> str:
    if median is None:
        return ""
    percent = 50 * (spread[1] - spread[0]) / median
    return " ±" + (f"{percent:.0f}%" if percent < 99.5 else "big")


if __name__ == "__main__":
    print("\n\n".join(throughput(json.loads(Path(file).read_text())) for file in sys.argv[1:]))
