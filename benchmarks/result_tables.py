"""Format the results of the benchmarks as Markdown tables, without importing torch.

Every function takes the contents of one file of `benchmarks/results` or more, and returns Markdown. `fill_tables.py`
writes these tables into the pages.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

PRODUCTS = "matrix products"
# Part of a file's name -> the machine. A virtual machine may hide its processor's model from the JSON file.
MACHINES = {
    "h100": "H100",
    "h200": "H200",
    "xeon-amx-2cores": "Xeon with AMX, 2 cores",
    "epyc-zen5-2cores": "EPYC, Zen 5, 2 cores",
    "epyc-zen4-2cores": "EPYC, Zen 4, 2 cores",
    "epyc-avx2-2cores": "EPYC with AVX2, 2 cores",
}
DEMO = {
    "clip": "plain CLIP",
    "mean_pooling": "the same embedder, mean pooling",
    "pacl": "**PACL**",
    "oracle": "best that the patch grid allows",
}
STEP_LOSSES = ("fused", "eager")  # of training_step.py
TUNED = ("cuda, attention in memory", "triton")  # of tune_cuda.py


def grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [" | ".join(head), " | ".join(["---"] * len(head)), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |".replace("|  |", "| |") for line in lines)


def number(value: float | None, form: str | None = None) -> str:
    """Format with three digits, or with `form`; a missing value is a dash."""
    return "-" if value is None else format(value, form or (",.0f" if value >= 99.95 else "#.3g"))


def memory(mib: float | None) -> str:
    return "-" if mib is None else f"{mib:.0f} MiB" if mib < 1024 else f"{mib / 1024:.1f} GiB"


# Speed of the loss: throughput.py


def throughput(result: dict, name: str | None = None) -> str:
    """Return the rows of one result of throughput.py, what was measured, and why rows are missing.

    Args:
        result: contents of the JSON file.
        name: name of the file, shown with the table.
    """
    on, settings, peak = result["machine"], result["settings"], result["peak"]
    measured = [row for row in result["rows"] if row["reason"] is None]
    ours = best(result)
    rows = []
    for row in measured:
        cells = [number(row["forward_ms"]), number(row["step_ms"]), number(row["step_vs_products"], ".2f")]
        cells += [
            number(row["step_ms"] and row["step_ms"] / ours["step_ms"], ".2f"),
            number(row["extra_memory_mib"], ",.0f"),
        ]
        fused = row["name"].startswith("fused")
        rows.append([f"**{row['name']}**" if fused else row["name"], *cells, number(row["relative_error"], ".0e")])
    head = ["", "forward ms", "step ms", "step / products", "step / ours", "extra MiB", "error"]
    peak_text = ""
    if peak:
        peak_text = f"; peak {peak / 1e12:.3g} TFLOP/s" if peak >= 1e12 else f"; peak {peak / 1e9:.3g} GFLOP/s"
    lines = [
        f"**{inputs(settings)}**: {_shape(settings)}; {on['gpu'] or on['cpu']}, "
        f"torch {on['torch']}, commit `{on['commit']}`, {on['date'][:10]}{peak_text}",
        "",
        grid(head, rows),
    ]
    missing = [f"{row['name']} ({_reason(row['reason'])})" for row in result["rows"] if row["reason"] is not None]
    notes = [f"Not run: {', '.join(missing)}."] if missing else []
    notes += [f"File: `benchmarks/results/{name}`."] if name else []
    return "\n".join([*lines, "", " ".join(notes)] if notes else lines)


def summary(results: dict[str, dict]) -> str:
    """Return a row for our fastest backend in each result.

    Args:
        results: a result's name without its date, such as "h100-bfloat16-dot" -> contents.
    """
    rows = []
    for place, (slug, machine) in enumerate(MACHINES.items()):
        for name, result in results.items():
            if not name.startswith(f"{slug}-"):
                continue
            settings, row = result["settings"], best(result)
            cells = [machine, f"{settings['dtype']} `{settings['form']}`", f"{settings['batch']:,}"]
            cells += [number(row["step_ms"]), number(row["step_vs_products"], ".2f")]
            cells += [number(row["step_share_of_peak"], ".0%")]
            cells += [number(row["step_vs_best_peer"], ".2f"), result["machine"]["date"][:10]]
            order = (place, settings["form"] == "max", settings["form"] == "cosine", settings["dtype"] != "float32")
            rows.append((*order, settings["batch"], cells))
    unknown = [name for name in results if not name.startswith(tuple(f"{slug}-" for slug in MACHINES))]
    if unknown:
        raise ValueError(f"MACHINES of result_tables.py has no machine for {unknown[0]}, expected one of its names")
    head = ["machine", "inputs", "B = K", "step ms", "step / products", "of peak", "best peer / ours", "date"]
    return grid(head, [row[-1] for row in sorted(rows, key=lambda row: row[:-1])])


def before_after(pairs: dict[str, tuple[dict, dict]]) -> str:
    """Return step over bare products at two commits measured together.

    Args:
        pairs: a result's name without its date -> contents before and after.
    """
    rows = []
    for name, both in sorted(pairs.items()):
        machine = next((text for slug, text in MACHINES.items() if name.startswith(f"{slug}-")), name)
        settings, cells = both[0]["settings"], []
        for result in both:
            row = best(result)
            cells += [f"`{result['machine']['commit']}`", number(row["step_ms"])]
            cells += [number(row["step_vs_products"], ".2f")]
        shape = "" if settings["patches"] == 196 else f", {_shape(settings)}"
        rows.append([machine, f"{settings['dtype']} `{settings['form']}`{shape}", *cells])
    return grid(["machine", "inputs", "before", "step ms", "/ products", "after", "step ms", "/ products"], rows)


def one_step(result: dict) -> str:
    """Return time and memory of one step: ours, the bare products, the best compiled variant, and the paper's code."""
    rows = {row["name"]: row for row in result["rows"] if row["reason"] is None}
    compiled = min((row for name, row in rows.items() if name.startswith("compiled")), key=lambda row: row["step_ms"])
    eager = rows["eager, pooled patch (paper)"]
    chosen = {
        "**`fused_pacl_loss`**": best(result),
        "its four matrix products alone, `torch.mm`": rows[PRODUCTS],
        "the best `torch.compile` variant": compiled,
        "eager PyTorch, the paper's formula": eager,
    }
    head = ["forward and backward", "ms", "extra memory"]
    return grid(head, [[name, number(x["step_ms"]), memory(x["extra_memory_mib"])] for name, x in chosen.items()])


def best(result: dict) -> dict:
    """Return the row of our fastest backend."""
    fused = [row for row in result["rows"] if row["name"].startswith("fused") and row["reason"] is None]
    return min(fused, key=lambda row: row["step_ms"])


def inputs(settings: dict) -> str:
    loss = ", sigmoid loss" if settings.get("loss") == "sigmoid" else ""  # older results have no loss: InfoNCE
    return f"{settings['dtype']}, `{settings['form']}`{loss}"


def _shape(settings: dict) -> str:
    return f"B = K = {settings['batch']:,}, N = {settings['patches']}, D = {settings['dim']}"


def _reason(text: str) -> str:
    return "out of memory" if text.startswith("OutOfMemoryError") else text


def plan_errors(result: dict) -> str:
    """Return predicted and measured steps of the fused loss, those that take longest beside their prediction first.

    Of several results of one step the last counts. Rows that the rates come from are left out.
    """
    steps: dict[tuple, tuple[float, list[str]]] = {}
    for row in result["rows"]:
        if row["of"] == "eager" or row["fitted"] or row["result"].endswith(("-house-after", "-pairs-after")):
            continue
        machine = next(text for slug, text in MACHINES.items() if row["result"].startswith(f"{slug}-"))
        gap = row["measured_ms"] / row["predicted_ms"]
        cells = [machine, f"{inputs(row)}, `{row['of']}`"]
        cells += [f"{row['batch']:,} × {row['patches']:,} × {row['dim']:,}"]
        cells += [number(row["kernels_ms"].get(part)) for part in ("products", "epilogues", "traffic")]
        cells += [number(row["predicted_ms"]), number(row["measured_ms"]), f"{gap - 1:+.0%}"]
        steps[tuple(cells[:3])] = gap, cells
    head = ["machine", "inputs, backend", "B = K × N × D", "products", "epilogues", "traffic", "predicted", "measured"]
    return grid([*head, "gap"], [cells for _, cells in sorted(steps.values(), key=lambda x: -x[0])])


def plan_summary(result: dict) -> str:
    """Return the medians and the worst errors of all predictions."""
    found = result["summary"]
    rows = [
        ["time, other shape, form or loss", "rows", "median_time", "worst_time"],
        ["time, other shape alone", "rows_of_other_shapes", "median_time_of_other_shapes", None],
        ["memory beyond inputs and gradients", "memory_rows", "median_memory", "worst_memory"],
    ]
    cells = [
        [text, str(found[count]), f"{found[median]:.1%}", f"{found[worst]:.0%}" if worst else "-"]
        for text, count, median, worst in rows
    ]
    return grid(["error of", "results", "median", "worst"], cells)


# Results of the package: the demo, training steps


def demo(result: dict) -> str:
    rows = []
    for key, name in DEMO.items():
        groups = [result[key][group] for group in ("seen", "held_out")]
        rows.append([name, *(f"{100 * x[measure]:.1f}" for x in groups for measure in ("miou", "patch_accuracy"))])
    return grid(["", "mIoU, seen pairs", "patches right", "mIoU, held-out pairs", "patches right"], rows)


def training_step(result: dict) -> str:
    """Return seconds of towers, embedder and loss, the loss's share of a step (with and without towers), memory."""
    rows = []
    for row in result["rows"]:
        cells = [f"{row['batch']:,}", f"{row['towers_s']:.1f}", f"{row['fused_embedder_s']:.2f}"]
        for name in STEP_LOSSES:
            loss = row.get(f"{name}_loss_s")
            if loss is None:
                cells += [row[f"{name}_reason"], "-", "-"]
                continue
            others = (row["towers_s"] + row["fused_embedder_s"], row["fused_embedder_s"])
            shares = " / ".join(f"{100 * loss / (loss + other):.0f}%" for other in others)
            cells += [f"{loss:.3f}", shares, f"{row[f'{name}_extra_mib']:,}"]
        rows.append(cells)
    losses = [text for name in STEP_LOSSES for text in (f"{name} loss s", "of a step / from tokens", "extra MiB")]
    on, settings = result["machine"], result["settings"]
    return (
        f"{result['rows'][0]['towers']}; {settings['dtype']}, `{settings['form']}`, {on['gpu'] or on['cpu']}, "
        f"{settings['threads']} threads, torch {on['torch']}, commit `{on['commit']}`, {on['date'][:10]}; towers once, "
        f"the rest medians of {settings['repeats']}\n\n{grid(['batch', 'towers s', 'embedder s', *losses], rows)}"
    )


# Long runs and many processes: long_run.py, distributed.py


def reading(result: dict) -> str:
    """Return the share of time that training waits for features, and images a second and processor time of each."""
    times = {
        "processor_ms": "ms of processors an image",
        "queued_ms": "ms in their queue",
        "server_ms": "ms in the server",
    }
    times = {key: words for key, words in times.items() if key in result["rows"][0]}  # earlier results have none
    rows = [
        [
            row["source"],
            f"{100 * row['share']:.1f}%",
            number(row["images_per_s"]),
            *(f"{row[key]:.2f}" for key in times),
        ]
        for row in result["rows"]
    ]
    return grid(["features in", "steps wait", "images/s", *times.values()], rows)


def segment_folder(result: dict) -> str:
    """Return images a second of `pacl segment`, and each part's share of the processor time."""
    parts = list(result["rows"][0]["parts"])
    rows = [
        [
            str(row["short_side"]),
            f"{row['images_per_s']:.2f}",
            *(f"{100 * row['parts'][x]['share']:.1f}%" for x in parts),
        ]
        for row in result["rows"]
    ]
    return grid(["short side", "images/s", *parts], rows)


def text_index(result: dict) -> str:
    """Return steps with lists of texts beside steps over all pairs."""
    rows = [
        [
            f"{row['dtype']} `{row['form']}`",
            *(f"{1e3 * row['seconds'][x]:,.0f}" for x in ("all", "listed")),
            f"{100 * row['listed_to_all']:.1f}%",
        ]
        for row in result["rows"]
    ]
    return grid(["inputs", "all pairs, ms", "lists, ms", "lists / all"], rows)


def long_run(result: dict) -> str:
    """Return what was watched in a long run, as medians of its fifths."""
    names = {
        "memory_mib": "resident memory, MiB",
        "readers_mib": "resident memory of two data readers, MiB",
        "open_files": "open files",
        "threads": "threads",
        "processes": "processes of readers",
        "temporary_files": "temporary files",
        "checkpoints": "checkpoints",
        "log_bytes_per_line": "bytes of the log per line",
    }
    rows = [[text, *(f"{fifth[name]:,.0f}" for fifth in result["fifths"])] for name, text in names.items()]
    return grid(["fifth of the run", *(str(i + 1) for i in range(len(result["fifths"])))], rows)


def distributed(result: dict) -> str:
    on, settings, rows = result["machine"], result["settings"], []
    for row in result["rows"]:
        times = ["-", "-", "-"]
        if "ms_without" in row:
            times = [f"{x:.0f}" for x in (row["ms_without"], row["ms"] - row["ms_without"], row["ms_model"])]
        cells = [str(row["processes"]), row["what"], f"{row['sent'] / 1e6:.2f}", f"{row['formula'] / 1e6:.2f}"]
        rows.append([*cells, f"{row['ms']:.0f}", *times, f"{row['memory']:.0f}"])
    head = ["processes", "what", "MB sent", "formula", "step ms", "without", "communication", "model", "extra MiB"]
    return (
        f"Local batch {settings['batch']}, N = {settings['patches']}, D = {settings['dim']}, {settings['dtype']}, one "
        f"thread for each process, Gloo, {on['cores']} cores of an {on['cpu']}, torch {on['torch']}, "
        f"{on['date'][:10]}\n\n{grid(head, rows)}"
    )


def distributed_model(result: dict) -> str:
    assumed, rows = result["assumed"], []
    for row in result["model"]:
        cells = [str(row["batch"]), str(row["gpus"]), row["exchange"]]
        cells += [f"{row['sent'] / 1e6:.0f}", f"{row['patches_sent'] / 1e6:.0f}"]
        cells += [f"{1e3 * row['communication']:.1f} ms", f"{1e3 * row['compute']:.1f} ms"]
        rows.append([*cells, f"{row['arrays'] / 2**30:.2f}"])
    head = "global batch,GPUs,exchange,MB sent,all patches,communication,products,arrays GiB".split(",")
    return (
        f"Model, not measured: H200s at an assumed {assumed['flops'] / 1e12:.0f} TFLOP/s in the loss's products, "
        f"{assumed['link_bytes'] / 1e9:.0f} GB/s and {1e6 * assumed['latency']:.0f} µs a hop; N = 196, D = 512, "
        f"bfloat16\n\n{grid(head, rows)}"
    )


# A kernel of its own: tune_cuda.py, upsample.py


def attention_in_memory(result: dict) -> str:
    """Return a `cosine` step and its forward with the attention in memory, beside those of Triton's kernels."""
    ms = {tuple(row[k] for k in ("batch", "patches", "dim", "kernel", "backend")): row["ms"] for row in result["rows"]}
    rows = []
    for shape in dict.fromkeys(key[:3] for key in ms):
        times = [ms[(*shape, kernel, name)] for kernel in ("step, cosine", "cosine") for name in TUNED]
        rows.append([" × ".join(f"{size:,}" for size in shape), *map(number, times)])
    return grid(["B = K × N × D", "step ms, CUDA C++", "Triton", "forward ms, CUDA C++", "Triton"], rows)


def upsample(result: dict) -> str:
    head = ["classes, to pixels", "fused", "with entropy", "`interpolate` + `argmax`"]
    head += ["16 classes at a time", "`torch.compile`"]
    names = ("fused cpu", "fused cpu, entropy", "eager", "eager, 16 classes at a time", "compiled")
    lines = []
    for case in result["cases"]:
        classes, *sizes = case["case"].split("x")
        source, target = (" × ".join(pair) for pair in (sizes[:2], sizes[2:]))
        found = {row["name"]: row for row in case["rows"]}
        lines.append([f"{classes}, {source} to {target}", *(_time_and_memory(found.get(name)) for name in names)])
    return grid(head, lines)


def _time_and_memory(row: dict | None) -> str:
    if row is None or "reason" in row:
        return "-" if row is None else row["reason"]
    ms, mib = row["ms"], row["peak_mib"]
    time = f"{ms / 1e3:.1f} s" if ms >= 1e3 else f"{ms:.0f} ms" if ms >= 9.95 else f"{number(ms, '.2g')} ms"
    return time if mib is None else f"{time}, {number(mib, '.0f' if mib >= 9.95 else '.1f')} MiB"
