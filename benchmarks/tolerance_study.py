"""Train to the end with `grad_tolerance` in the study's two worlds, and compare with the exact backward seed by seed.

    python benchmarks/tolerance_study.py run DIR            # one process of one thread; rerun to resume
    python benchmarks/tolerance_study.py report DIR --json FILE

Worlds, models and measures are those of study.py, at one batch size and learning rate. Runs with the same seed have
the same first weights and the same batches, so that they differ in the tolerance alone.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path

import study
import torch
from outputs import run_and_report, write_json
from pacl.files import write_bytes
from report import machine
from study_tables import tolerance_study

TOLERANCES = (0.0, 2.0**-9, 2.0**-6)
LR = 32e-3  # the best of study.py for batches of 1,024 in the hard world
MEASURES = ("miou", "patch_accuracy", "retrieval_r1", "loss")


def plan(batch: int, seeds: int) -> list[study.Run]:
    """Return the runs, all of a seed together."""
    return [
        study.Run(world, batch, LR, seed, tolerance=tolerance)
        for seed in range(seeds)
        for world in study.WORLDS
        for tolerance in TOLERANCES
    ]


def work(out: Path, size: study.Size, batch: int, seeds: int) -> None:
    """Prepare both worlds, then do the missing runs."""
    (out / "runs").mkdir(parents=True, exist_ok=True)
    settings = {"size": dataclasses.asdict(size), "batch": batch, "seeds": seeds}
    path = out / "settings.json"
    if path.exists() and json.loads(path.read_text()) != settings:
        raise SystemExit(f"tolerance_study: out: {out} holds runs with other settings, expected another folder")
    write_bytes(path, json.dumps(settings).encode())
    for world in study.WORLDS:
        study.prepare(world, out, size)
    study.train_missing(plan(batch, seeds), out, size)


def report(out: Path) -> dict:
    """Return the curves of all finished runs, and the last measures beside those of the exact run of the same seed."""
    settings = json.loads((out / "settings.json").read_text())
    runs = plan(settings["batch"], settings["seeds"])
    found = {run: points for run in runs if (points := study.result_of(out, run)) is not None}
    rows = []
    for world in study.WORLDS:
        for tolerance in TOLERANCES:
            own = [run for run in found if (run.world, run.tolerance) == (world, tolerance)]
            if not own:
                continue
            row = {"world": world, "tolerance": tolerance, "seeds": [run.seed for run in own]}
            row |= {name: study.spread([found[run][-1][name] for run in own]) for name in MEASURES}
            pairs = [(found[run], found.get(dataclasses.replace(run, tolerance=0.0))) for run in own]
            if tolerance and all(exact for _, exact in pairs):
                row["differences"] = {
                    name: study.spread([points[-1][name] - exact[-1][name] for points, exact in pairs])
                    for name in MEASURES
                }
                row["kept_share"] = study.spread([_kept_share(found[run]) for run in own])
            row["curves"] = [found[run] for run in own]
            rows.append(row)
    return {
        "machine": machine(torch.device("cpu"), None),
        **settings,
        "missing_runs": len(runs) - len(found),
        "rows": rows,
    }


def _kept_share(points: list[dict]) -> float:
    """Return the mean over all steps."""
    ends = [0, *(point["step"] for point in points)]
    steps = [end - begin for begin, end in zip(ends, ends[1:], strict=False)]
    return statistics.fmean([point["kept_share"] for point in points], weights=steps)


def main() -> None:
    parser, run, _ = run_and_report(__doc__)
    run.add_argument("--batch", type=int, default=1024, help="Batch size (default: %(default)s).")
    run.add_argument("--images", type=int, help="Images of a run (default: those of study.py).")
    run.add_argument("--clip-steps", type=int, help="Steps of the frozen CLIP (default: those of study.py).")
    run.add_argument("--seeds", type=int, default=3, help="Number of seeds (default: %(default)s).")
    arguments = parser.parse_args()
    if arguments.command == "run":
        torch.set_num_threads(1)
        given = {"images": arguments.images, "clip_steps": arguments.clip_steps}
        size = study.Size(**{name: value for name, value in given.items() if value is not None})
        work(arguments.out, size, arguments.batch, arguments.seeds)
        return
    result = report(arguments.out)
    print(tolerance_study(result))
    if arguments.json:
        write_json(arguments.json, result)


if __name__ == "__main__":
    main()
