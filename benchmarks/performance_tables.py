"""Tables of docs/performance.md about goals, slow places, sweeps and whole training steps, without importing torch.

`fill_tables.py` writes them into the page. Each takes the results; one that has no file yet is a sentence that names
the command to run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from result_tables import MACHINES, best, grid, inputs, memory, number

if TYPE_CHECKING:
    from fill_tables import Results

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
SUFFIXES = ("-kept-after", "-pairs-after", "-house-after", "-before")  # of a throughput file's name; `-before` is older
SHAPES = ("", "-576", "-1369")
GPU_KERNELS = {  # epilogues of csrc/cuda/epilogues.def that a profile names by number
    "3": "cosine scores",
    "4": "cosine weights W",
}


class Goal(NamedTuple):
    """A goal: its text, its limit, and the figure that the results give; `most`: the figure may be at most the limit.

    `figure` returns the figure and the names of its files, or raises ValueError where there is no such file.
    """

    text: str
    limit: float
    figure: Callable[[Results], tuple[float, list[str]]]
    most: bool = True
    form: str = ".2f"


def _ratio(*names: str) -> Callable[[Results], tuple[float, list[str]]]:
    """Return the largest step of our fastest backend over the bare products of its run."""
    return lambda results: (max(best(results.read(name))["step_vs_products"] for name in names), list(names))


def _over(name: str, row: str, other: str) -> Callable[[Results], tuple[float, list[str]]]:
    """Return the step time of one row of a file over that of another."""

    def figure(results: Results) -> tuple[float, list[str]]:
        rows = {x["name"]: x for x in results.read(name)["rows"]}
        return rows[row]["step_ms"] / rows[other]["step_ms"], [name]

    return figure


def _between(name: str, other: str, key: str = "step_ms") -> Callable[[Results], tuple[float, list[str]]]:
    """Return a number of our fastest row of one file over that of another."""
    return lambda results: (best(results.read(name))[key] / best(results.read(other))[key], [name, other])


def _least_lead(dtype: str) -> Callable[[Results], tuple[float, list[str]]]:
    """Return the smallest speed beside the best peer in the newest results of a dtype, `dot` and `cosine`."""

    def figure(results: Results) -> tuple[float, list[str]]:
        leads = {
            name: best(result)["step_vs_best_peer"]
            for name, result in results.throughput().items()
            if result["settings"]["dtype"] == dtype and result["settings"]["form"] != "max"
        }
        name = min((x for x in leads if leads[x]), key=lambda x: leads[x])
        return leads[name], [name]

    return figure


def _largest_error(results: Results) -> tuple[float, list[str]]:
    """Return the largest error of ours over that of the best eager row of its run."""
    errors = {}
    for name, result in results.throughput().items():
        eager = [x["relative_error"] for x in result["rows"] if x["name"].startswith("eager") and x["relative_error"]]
        if eager:
            errors[name] = best(result)["relative_error"] / max(eager)
    name = max(errors, key=lambda x: errors[x])
    return errors[name], [name]


def _share_of_peak(name: str) -> Callable[[Results], tuple[float, list[str]]]:
    return lambda results: (best(results.read(name))["step_share_of_peak"], [name])


def _workspace(results: Results) -> tuple[float, list[str]]:
    """Return the largest extra memory of a CPU step at the usual shape, in MiB."""
    sizes = {
        name: best(result)["extra_memory_mib"]
        for name, result in results.throughput().items()
        if "2cores" in name and result["settings"]["batch"] == 256
    }
    name = max(sizes, key=lambda x: sizes[x])
    return sizes[name], [name]


def _listed(dtype: str) -> Callable[[Results], tuple[float, list[str]]]:
    def figure(results: Results) -> tuple[float, list[str]]:
        name = "xeon-amx-2cores-text-index"
        rows = [x for x in results.read(name)["rows"] if (x["form"], x["dtype"]) == ("dot", dtype)]
        return rows[0]["listed_to_all"], [name]

    return figure


def _tolerance(dtype: str, frozen: bool) -> Callable[[Results], tuple[float, list[str]]]:
    def figure(results: Results) -> tuple[float, list[str]]:
        name = "xeon-amx-2cores-grad-tolerance"
        rows = results.read(name)["rows"]
        row = next(x for x in rows if (x["scatter"], x["dtype"], x["frozen_texts"]) == (4.0, dtype, frozen))
        return row["tolerance_in_products"], [name]

    return figure


def _plan(key: str) -> Callable[[Results], tuple[float, list[str]]]:
    return lambda results: (results.read("plan-errors")["summary"][key], ["plan-errors"])


H100, XEON, ZEN4 = "h100-bfloat16", "xeon-amx-2cores", "epyc-zen4-2cores"
LIMIT = "step in the time of its bare products, {}"
GOALS = (
    Goal(LIMIT.format("bfloat16 `dot`, H100"), 1.0, _ratio(f"{H100}-dot")),
    Goal(LIMIT.format("float32 `dot`, Xeon"), 1.0, _ratio(f"{XEON}-float32-dot-kept-after")),
    Goal(LIMIT.format("float32 `dot`, Zen 4"), 1.0, _ratio(f"{ZEN4}-float32-dot")),
    Goal(LIMIT.format("bfloat16 `dot`, Xeon"), 1.0, _ratio(f"{XEON}-bfloat16-dot")),
    Goal("step of bfloat16 `cosine` on the H100, of its products", 1.6, _ratio(f"{H100}-cosine")),
    Goal("CUDA C++ no slower than Triton, `dot`, H100", 1.0, _over(f"{H100}-dot", "fused cuda", "fused triton")),
    Goal("CUDA C++ no slower than Triton, `cosine`, H100", 1.0, _over(f"{H100}-cosine", "fused cuda", "fused triton")),
    Goal("lead over the best peer in float32, the smallest of all machines", 1.5, _least_lead("float32"), False),
    Goal("lead over the best peer in bfloat16, the smallest of all machines", 1.3, _least_lead("bfloat16"), False),
    Goal("float32 `dot` with scores kept, B = K = 256, of its products", 0.6, _ratio(f"{XEON}-float32-dot-kept-after")),
    Goal("share of the peak of a bfloat16 `dot` step, Zen 4", 0.8, _share_of_peak(f"{ZEN4}-bfloat16-dot"), False),
    Goal("share of the peak of a bfloat16 `cosine` step, Zen 4", 0.8, _share_of_peak(f"{ZEN4}-bfloat16-cosine"), False),
    Goal(
        "bfloat16 `cosine` no slower than float32 at N = 1,369, Xeon",
        1.0,
        _between(f"{XEON}-bfloat16-cosine-1369-kept-after", f"{XEON}-float32-cosine-1369-kept-after"),
    ),
    Goal(
        "sigmoid loss over InfoNCE at B = K = 512, float32 `dot`, Xeon",
        0.8,
        _between(f"{XEON}-float32-dot-512-sigmoid", f"{XEON}-float32-dot-512", "step_vs_products"),
    ),
    Goal("B = K = 32, float32 `dot`, of its products, Xeon", 0.9, _ratio(f"{XEON}-float32-dot-32")),
    Goal("B = K = 32, bfloat16 `dot`, of its products, Xeon", 1.2, _ratio(f"{XEON}-bfloat16-dot-32")),
    Goal("lists of 64 of 4,096 texts, of the step over all pairs, float32", 0.05, _listed("float32"), form=".3f"),
    Goal("lists of 64 of 4,096 texts, of the step over all pairs, bfloat16", 0.05, _listed("bfloat16"), form=".3f"),
    Goal("`grad_tolerance`, frozen texts, in products, float32", 1.5, _tolerance("float32", True)),
    Goal("`grad_tolerance`, trained texts, in products, float32", 1.8, _tolerance("float32", False)),
    Goal("`grad_tolerance`, frozen texts, in products, bfloat16", 1.5, _tolerance("bfloat16", True)),
    Goal("`grad_tolerance`, trained texts, in products, bfloat16", 1.8, _tolerance("bfloat16", False)),
    Goal("memory of a CPU step beyond inputs and gradients, B = K = 256, MiB", 64, _workspace, form=".0f"),
    Goal("error over that of plain PyTorch, the largest", 2.0, _largest_error),
    Goal("median error of predicted time", 0.15, _plan("median_time"), form=".3f"),
    Goal("median error of predicted memory", 0.05, _plan("median_memory"), form=".3f"),
)


def goals(results: Results) -> str:
    """Return every goal with its limit, the figure of the newest files, and whether it is met."""
    rows = []
    for goal in GOALS:
        sign = "≤" if goal.most else "≥"
        try:
            value, names = goal.figure(results)
        except ValueError:
            rows.append([goal.text, f"{sign} {goal.limit:{goal.form}}", "-", "not measured", "-"])
            continue
        met = value <= goal.limit if goal.most else value >= goal.limit
        files = ", ".join(f"`{name}`" for name in names)
        rows.append(
            [
                goal.text,
                f"{sign} {goal.limit:{goal.form}}",
                f"{value:{goal.form}}",
                "met" if met else "**not met**",
                files,
            ]
        )
    return grid(["goal", "limit", "today", "", "file"], rows)


def _newest(results: Results) -> Iterator[tuple[str, dict]]:
    """Yield the newest result of each machine, kind of input and shape, by its name."""
    newest: dict[tuple, tuple[str, dict]] = {}
    for suffix in SUFFIXES[:-1] + ("", "-sigmoid"):
        for shape in SHAPES:
            for name, result in results.throughput(shape + suffix).items():
                settings = result["settings"]
                key = (name, settings["batch"], settings["patches"], settings["dim"], settings.get("loss", "infonce"))
                if key not in newest or newest[key][1]["machine"]["date"] < result["machine"]["date"]:
                    newest[key] = name + shape + suffix, result
    yield from newest.values()


def slowest(results: Results) -> str:
    """Return the three steps that take longest beside their bare products, each on another machine.

    The last column is where the time goes: kernels of a profile on a GPU, else the parts that `plan` predicts and what
    it does not explain.
    """
    places: dict[str, tuple[float, list[str]]] = {}
    predicted = {(row["result"], row["of"]): row for row in results.read("plan-errors")["rows"]}
    for name, result in sorted(_newest(results), key=lambda x: -best(x[1])["step_vs_products"]):
        slug, machine = next(x for x in MACHINES.items() if name.startswith(f"{x[0]}-"))
        settings, row = result["settings"], best(result)
        if slug in places:
            continue
        shape = f"{settings['batch']:,} × {settings['patches']:,} × {settings['dim']}"
        profile, parts = f"{slug}-profile-{settings['form']}", predicted.get((name, row["name"].removeprefix("fused ")))
        if profile in results.paths:
            where = "; ".join(f"{x['ms']:.1f} {_kernel(x['kernel'])}" for x in results.read(profile)["rows"][:3])
            where += f" (`{profile}`)"
        elif parts:
            ms = parts["kernels_ms"] | {"unexplained": row["step_ms"] - parts["predicted_ms"]}
            where = "; ".join(f"{number(x)} {part}" for part, x in sorted(ms.items(), key=lambda x: -x[1]) if x > 0)
        else:
            where = "-"
        cells = [machine, inputs(settings), shape, number(row["step_ms"]), number(row["step_vs_products"], ".2f")]
        places[slug] = row["step_vs_products"], [*cells, f"ms: {where}", f"`{name}`"]
    three = sorted(places.values(), key=lambda x: -x[0])[:3]
    head = ["machine", "inputs", "B = K × N × D", "step ms", "/ products", "where the time goes", "file"]
    return grid(head, [cells for _, cells in three])


def _kernel(name: str) -> str:
    epilogue = re.search(r"score_kernel<.*Epilogue\)(\d+)", name)
    if epilogue:
        return f"score kernel, {GPU_KERNELS.get(epilogue[1], 'epilogue ' + epilogue[1])}"
    return "library product" if name.startswith("nvjet") else f"`{name.partition('(')[0]}`"


def sweep(results: Results, name: str) -> str:
    """Return the points of a sweep that take longer than their bare products, beside what the model explains.

    "counted" is the operations of the backend's products over those of the bare products; "predicted" also has
    epilogues and traffic, with rates of another shape; the gap is what neither explains.
    """
    if name not in results.paths:
        return (
            "*No sweep of this machine is published yet:* `python benchmarks/throughput.py --sweep "
            f"benchmarks/results/DATE-{name}.json --minutes 12 --backend cpu --plot docs/images/{name}.svg`"
        )
    found, rows, below, unfit = results.read(name), [], 0, 0
    for point in found["points"]:
        ours = [x for x in point["rows"] if x["name"].startswith("fused") and x["step_ms"]]
        if not ours:
            unfit += 1
            continue
        row, settings, plan = min(ours, key=lambda x: x["step_ms"]), point["settings"], point["plan"]
        ratio = row["step_vs_products"]
        if ratio <= 1:
            below += 1
            continue
        bare = 1 if settings["form"] == "max" else 3 if settings["frozen_texts"] else 4
        largest = max(plan["kernels_ms"], key=lambda x: plan["kernels_ms"][x])
        frozen = ", frozen texts" if settings["frozen_texts"] else ""
        shape = f"{settings['batch']:,} × {settings['patches']:,} × {settings['dim']:,}"
        cells = [inputs(settings) + frozen, shape, number(row["step_ms"]), f"{ratio:.2f}"]
        cells.append(f"{plan['units'] / bare:.2f}")
        cells += [f"{ratio * plan['step_ms'] / row['step_ms']:.2f}", f"{row['step_ms'] / plan['step_ms'] - 1:+.0%}"]
        share, eager = row["step_share_of_peak"], row["step_vs_best_peer"]
        rows.append((ratio, [*cells, largest, number(share, ".0%"), number(eager, ".2f")]))
    head = "inputs,B = K × N × D,step ms,/ products,counted,predicted,gap,largest part,of peak,eager / ours".split(",")
    on = found["machine"]
    text = (
        f"{on['gpu'] or on['cpu']}, torch {on['torch']}, commit `{on['commit']}`, {on['date'][:10]}: "
        f"{len(found['points'])} points, {below} of them at or below their bare products, {unfit} without memory."
    )
    table = grid(head, [cells for _, cells in sorted(rows, key=lambda x: -x[0])])
    return f"{_picture(name, 'Time, memory and share of the peak')}{text}\n\n{table}"


def _picture(name: str, title: str) -> str:
    """Return the pictures for light and dark pages, or nothing where they were not drawn."""
    files = [f"{name}-{theme}.svg" for theme in ("light", "dark")]
    if not all((IMAGES / file).exists() for file in files):
        return ""
    light, dark = (f"![{title}](images/{x}#only-{theme})" for x, theme in zip(files, ("light", "dark"), strict=True))
    return f"{light}\n{dark}\n\n"


def end_to_end(results: Results, name: str) -> str:
    """Return the loss's share of whole training steps, and how much faster a step is with the fused loss."""
    if name not in results.paths:
        return (
            "*Not measured on this machine yet:* `python benchmarks/end_to_end.py --json "
            f"benchmarks/results/DATE-{name}.json --plot docs/images/{name}.svg`"
        )
    found, rows = results.read(name), []
    steps: dict[tuple[str, int], dict[str, Any]] = {}
    for row in found["rows"]:
        steps.setdefault((row["source"], row["batch"]), {})[row["loss"]] = row
    for (source, batch), losses in steps.items():
        cells, whole = [source, f"{batch:,}"], {}
        for loss in ("eager", "fused"):
            row = losses[loss]
            if row["reason"]:
                cells += [row["reason"], "-", "-"]
                continue
            whole[loss] = sum(row["seconds"].values())
            cells += [number(whole[loss]), f"{row['seconds']['loss'] / whole[loss]:.0%}", memory(row["extra_mib"])]
        gain = f"{whole['eager'] / whole['fused']:.2f}" if len(whole) == 2 else "-"
        rows.append([*cells, gain])
    on, settings = found["machine"], found["settings"]
    head = ["step from", "batch", "eager step s", "in the loss", "extra memory", "fused step s", "in the loss"]
    return (
        f"{_picture(name, 'Share of a training step in the loss')}"
        f"{settings['dtype']}, `{settings['form']}`, tower {settings['tower']}; {on['gpu'] or on['cpu']}, "
        f"{settings['threads']} threads, torch {on['torch']}, commit `{on['commit']}`, {on['date'][:10]}\n\n"
        f"{grid([*head, 'extra memory', 'eager / fused'], rows)}"
    )
