"""Compare what `pacl_kernels.plan` predicts with what the files in `benchmarks/results` measured.

    python benchmarks/plan_errors.py --json benchmarks/results/DATE-plan-errors.json

Rates come from one shape on each machine (`pacl_kernels/machines.py`). Rows of that shape, form and loss are left out
of the medians, from whatever day they are. Only the newest file of each name counts, and none of an earlier commit
("-before"). Nothing is measured here, and no GPU is needed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path

from fill_tables import THROUGHPUT, Results

from pacl_kernels import costs, machines
from pacl_kernels.costs import Step
from pacl_kernels.machines import CPU_SHAPE, H100_SHAPE, Machine
from pacl_kernels.plan import seconds_of

KEEPS_SCORES = ("-kept-after", "-sigmoid")  # names of results of kernels that keep scores on a CPU
SUFFIXES = ("", "-house-after", "-pairs-after", "-kept-after", "-sigmoid")
EAGER = {"dot": "eager, sum of a s", "cosine": "eager, sum of a s", "max": "eager, max of s"}


def machine_of(name: str, dtype: str) -> Machine:
    """Return the machine of a result, by the file's name."""
    known = next((key for key in machines.NAMES if name.startswith(key.lower())), None)
    if known is None:
        raise ValueError(f"machines.py has no machine for {name}, expected one of {', '.join(machines.NAMES)}")
    return machines.named(known, dtype)


def step_of(settings: dict, form: str | None = None, dtype: str | None = None) -> Step:
    batch, loss = settings["batch"], settings.get("loss") or "infonce"  # older results have no loss
    return Step(
        batch, settings["patches"], settings["dim"], batch, form or settings["form"], dtype or settings["dtype"], loss,
        settings.get("frozen_texts", False),
    )  # fmt: skip


def rows(results: Results) -> Iterator[dict]:
    """Yield the rows of all results: predicted and measured milliseconds and MiB beyond inputs and gradients."""
    for name in results.paths:
        suffix = next((end for end in SUFFIXES[1:] if name.endswith(end)), "")
        plain = name.removesuffix(suffix)
        for size in ("-1369", "-576"):
            plain = plain.removesuffix(size)
        if not THROUGHPUT.fullmatch(plain):
            continue
        result = results.read(name)
        step, measured = step_of(result["settings"]), {row["name"]: row for row in result["rows"]}
        machine = machine_of(name, step.dtype)
        for backend in ("cuda", "triton", "cpu"):
            row = measured.get(f"fused {backend}")
            if row is None or row["step_ms"] is None:
                continue
            traits = machines.traits(backend, machine.isa, step, suffix in KEEPS_SCORES)
            kernels = seconds_of(step, traits, machine)
            extra = sum(costs.memory(step, traits, result["settings"]["threads"]).values()) - _given(step)
            yield _row(name, backend, step, row, kernels, extra)
        row = measured.get(EAGER[step.form])
        if row is not None and row["step_ms"] is not None:
            rates = machine.rates[next(key for key in machine.rates if key[1] == step.dtype)]
            extra = costs.eager_memory(step, machine.kind == "cpu") - _given(step)
            yield _row(name, "eager", step, row, {"all": rates.eager_seconds(step)}, extra)
    yield from _tuned(results.read("h100-tune-cuda"))


def _tuned(result: dict) -> Iterator[dict]:
    """Yield the whole steps of tune_cuda.py with the kernels that `auto` takes, and with Triton's."""
    dtype = result["settings"]["dtype"]
    machine = machines.named("H100", dtype)
    for row in result["rows"]:
        what, _, form = row["kernel"].partition(", ")
        backend = row["backend"].partition(",")[0]
        if what != "step" or (backend == "cuda" and form == "cosine" and "in memory" not in row["backend"]):
            continue
        step = step_of(row, form, dtype)
        kernels = seconds_of(step, machine.traits(step, backend), machine)
        yield _row("h100-tune-cuda", backend, step, {"step_ms": row["ms"]}, kernels, None)


def _given(step: Step) -> int:
    """Return the bytes of inputs and gradients, which results leave out of their extra memory."""
    return 2 * (step.rows + step.texts * step.dim * step.itemsize)


def _row(name: str, of: str, step: Step, row: dict, kernels: dict, extra: int | None) -> dict:
    fitted = ("dot", "cosine") if name.startswith("h100") and of != "eager" else ("dot",)  # forms that rates come from
    predicted = 1e3 * sum(kernels.values())
    other = step[:3] != (H100_SHAPE if name.startswith("h") else CPU_SHAPE)
    known = row.get("extra_memory_mib") is not None and extra is not None
    return {
        "result": name,
        "of": of,
        **{key: getattr(step, key) for key in ("batch", "patches", "dim", "form", "dtype", "loss")},
        "other_shape": other,
        "fitted": not other and step.form in fitted and step.loss == "infonce",
        "predicted_ms": round(predicted, 3),
        "measured_ms": round(row["step_ms"], 3),
        "kernels_ms": {key: round(1e3 * value, 3) for key, value in kernels.items() if value},
        "predicted_mib": round(extra / 2**20, 1) if known and extra is not None else None,
        "measured_mib": round(row["extra_memory_mib"], 1) if known else None,
    }


def error(row: dict, unit: str) -> float:
    """Return the relative error of a prediction; `unit`: "ms" or "mib"."""
    return row[f"predicted_{unit}"] / row[f"measured_{unit}"] - 1


def summary(found: list[dict]) -> dict[str, float]:
    """Return medians and worst of the errors, of time without the rows that the rates come from."""
    times = [abs(error(row, "ms")) for row in found if not row["fitted"]]
    shapes = [abs(error(row, "ms")) for row in found if row["other_shape"]]
    memory = [abs(error(row, "mib")) for row in found if row["measured_mib"] is not None]
    return {
        "rows": len(times),
        "median_time": round(statistics.median(times), 3),
        "worst_time": round(max(times), 3),
        "rows_of_other_shapes": len(shapes),
        "median_time_of_other_shapes": round(statistics.median(shapes), 3),
        "memory_rows": len(memory),
        "median_memory": round(statistics.median(memory), 3),
        "worst_memory": round(max(memory), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="Write the result.")
    path = parser.parse_args().json
    found = list(rows(Results()))
    outcome = {"summary": summary(found), "rows": found}
    for row in found:
        mib = "" if row["measured_mib"] is None else f"{row['predicted_mib']:9.1f} /{row['measured_mib']:9.1f} MiB"
        print(
            f"{row['result']:<48}{row['of']:<7}{row['form']:<7}"
            f"{row['predicted_ms']:10.1f} /{row['measured_ms']:10.1f} ms"
            f"{error(row, 'ms'):+6.0%}{'*' if row['fitted'] else ' '} {mib}"
        )
    print(outcome["summary"])
    if path:
        Path(path).write_text(json.dumps(outcome, indent=1) + "\n")


if __name__ == "__main__":
    main()
