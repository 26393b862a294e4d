"""Compare the readings of a frozen tower in the two worlds of study.py: as they are, and as what PACL trains on.

    python benchmarks/study_readings.py run DIR               # one process of one thread; rerun to resume
    python benchmarks/study_readings.py report DIR --json F

Each world gets the CLIP of study.py. Without training, a reading's tokens go through the CLIP's own projection, and
there is one run. PACL trains an embedder on cached tokens of a reading, with the batch of 256, temperature and form of
study.py and three seeds. The learning rate of each reading is the better of two on separate scenes of the same world.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from functools import partial
from pathlib import Path

import torch
from pacl.backbones import freeze
from pacl.demo import toy_clip
from pacl.dense import dense_tokens
from pacl.files import write_bytes
from pacl.readings import READINGS, Reader
from pacl.segment.predict import own_projection
from report import machine
from result_tables import STUDY_BATCH, readings
from safetensors.torch import load_file, save
from study import SEEDS, TUNE_SEED, Run, mean_of_curves, measure, result_of, train
from study_worlds import WORLDS, Size, evaluation, train_clip, write_world
from torch import Tensor, nn

TRAINED = ("plain", "maskclip", "sclip", "clearclip")
UNTRAINED = tuple(name for name, reading in READINGS.items() if not reading.proxy)  # a proxy is a second tower
RATES = (32e-3, 64e-3)
SIZE = Size(images=32_768, points=1)  # a quarter of study.py's images
QUICK = Size(points=1, images=512, scenes=512, eval_scenes=8, clip_steps=2, clip_scenes=512)


def tokens(visual: nn.Module, name: str, images: Tensor) -> Tensor:
    return dense_tokens(visual, images, reader=Reader(name)).flatten(1, 2)


def prepare(world: str, out: Path, size: Size) -> None:
    """Train and keep the CLIP of a world, and write the tokens that its embedders are trained on."""
    if (out / f"{world}.safetensors").exists():
        return
    clip, _, images, captions = train_clip(world, size)
    write_bytes(out / f"{world}-clip.safetensors", save({k: x.contiguous() for k, x in clip.state_dict().items()}))
    towers = {name: partial(tokens, clip.visual, name) for name in TRAINED}
    write_world(out / f"{world}.safetensors", world, size, clip, towers, images, captions)


def measure_untrained(world: str, out: Path, size: Size) -> None:
    """Measure every reading without training, on the evaluation's scenes."""
    clip = toy_clip.new_clip()
    clip.load_state_dict(load_file(out / f"{world}-clip.safetensors"))
    project = own_projection(freeze(clip).visual)
    towers = {name: partial(tokens, clip.visual, name) for name in UNTRAINED}
    data, found = evaluation(world, size, clip, towers, "eval"), {}
    for name in UNTRAINED:
        found[name] = measure(Run(world, 0, 0.0, 0, tower=name), project, data)
        print(f"{world}, {name}, not trained: mIoU {found[name]['miou']:.3f}", flush=True)
    write_bytes(out / f"{world}-untrained.json", json.dumps(found).encode())


def plan(world: str, out: Path) -> tuple[list[Run], list[Run]]:
    """Return a world's runs that tune learning rates and, for readings whose rates are known, all others."""
    tune, rest = [], []
    for name in TRAINED:
        runs = [Run(world, STUDY_BATCH, lr, TUNE_SEED, tower=name, split="tune") for lr in RATES]
        tune += runs
        found = [result_of(out, run) for run in runs]
        if None not in found:
            best = max(range(len(runs)), key=lambda i: found[i][-1]["miou"])
            rest += [Run(world, STUDY_BATCH, runs[best].lr, seed, tower=name) for seed in SEEDS]
    return tune, sorted(rest, key=lambda run: run.seed)


def work(out: Path, size: Size) -> None:
    (out / "runs").mkdir(parents=True, exist_ok=True)
    write_bytes(out / "size.json", json.dumps(dataclasses.asdict(size)).encode())
    for world in WORLDS:
        prepare(world, out, size)
        measure_untrained(world, out, size)
        while todo := [run for stage in plan(world, out) for run in stage if result_of(out, run) is None]:
            for run in todo:
                print(train(run, out, size), flush=True)


def report(out: Path) -> dict:
    """Return every reading without training, and the mean and spread over seeds of those that PACL was trained on."""
    rows, tuning, missing = [], [], 0
    for world in WORLDS:
        path = out / f"{world}-untrained.json"
        for name, values in json.loads(path.read_text()).items() if path.exists() else ():
            rows.append({"world": world, "tokens": name, "trained": False, **values})
        tune, rest = plan(world, out)
        found = {run: points[-1] for run in (*tune, *rest) if (points := result_of(out, run)) is not None}
        missing += len(TRAINED) * (len(RATES) + len(SEEDS)) - len(found)
        tuning += [
            {"world": world, "tokens": x.tower, "lr": x.lr, "miou": found[x]["miou"]} for x in tune if x in found
        ]
        for name in TRAINED:
            runs = [run for run in rest if run.tower == name and run in found]
            if runs:
                row = {"world": world, "tokens": name, "trained": True, "lr": runs[0].lr, "seeds": len(runs)}
                rows.append(row | mean_of_curves([[found[run]] for run in runs])[0])
    return {
        "machine": machine(torch.device("cpu"), None),
        "size": json.loads((out / "size.json").read_text()),
        "missing_runs": missing,
        "tuning": tuning,
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("out", type=Path, help="Folder of the runs.")
    run.add_argument("--quick", action="store_true", help="Run everything once in seconds; the numbers mean nothing.")
    show = commands.add_parser("report")
    show.add_argument("out", type=Path, help="Folder of the runs.")
    show.add_argument("--json", type=Path, help="Write the result.")
    arguments = parser.parse_args()
    if arguments.command == "run":
        work(arguments.out, QUICK if arguments.quick else SIZE)
        return
    result = report(arguments.out)
    for world in WORLDS:
        print(f"{world} world\n\n{readings(result, world)}\n")
    if arguments.json:
        write_bytes(arguments.json, (json.dumps(result, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
