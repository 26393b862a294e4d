"""Compare the readings of a frozen tower in the two worlds of study.py: as they are, and as what PACL trains on.

    python benchmarks/study_readings.py run DIR --clip toy/clip    # one process of one thread; rerun to resume
    python benchmarks/study_readings.py report DIR --json F

The demo's world gets the CLIP of `pacl demo --out toy`, or one trained here; the hard one is trained here. Without
training, a reading's tokens go through the CLIP's own projection, and there is one run. PACL trains an embedder on
cached tokens, with the batch of 256, temperature and form of study.py, at two learning rates with three seeds each; the
table shows the better rate of each reading.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import open_clip
import torch
from outputs import run_and_report, write_json
from pacl.backbones import freeze
from pacl.demo import toy_clip
from pacl.dense import dense_tokens
from pacl.files import write_bytes
from pacl.readings import READINGS, Reader
from pacl.segment.predict import own_projection
from report import machine
from safetensors.torch import load_file, save
from study import SEEDS, Run, mean_of_curves, measure, result_of, train_missing, write_size
from study_tables import STUDY_BATCH, readings
from study_worlds import WORLDS, Size, evaluation, train_clip, training_scenes, write_world
from torch import Tensor, nn

TRAINED = ("plain", "maskclip", "sclip", "clearclip")
UNTRAINED = tuple(name for name, reading in READINGS.items() if not reading.proxy)  # a proxy is a second tower
RATES = (64e-3, 32e-3)
QUICK = Size(points=1, images=512, scenes=512, eval_scenes=8, clip_steps=2, clip_scenes=512)


def tokens(visual: nn.Module, name: str, images: Tensor) -> Tensor:
    return dense_tokens(visual, images, reader=Reader(name)).flatten(1, 2)


def prepare(world: str, out: Path, size: Size) -> None:
    """Write the tokens that a world's embedders are trained on; train its CLIP if `out` has none."""
    if (out / f"{world}.safetensors").exists():
        return
    clip = frozen_clip(world, out, size)
    towers = {name: partial(tokens, clip.visual, name) for name in TRAINED}
    write_world(out / f"{world}.safetensors", world, size, clip, towers, *training_scenes(world, size.scenes))


def frozen_clip(world: str, out: Path, size: Size) -> open_clip.CLIP:
    """Return the world's CLIP in `out`, trained if there is none."""
    path = out / f"{world}-clip.safetensors"
    if not path.exists():
        state = train_clip(world, size)[0].state_dict()
        write_bytes(path, save({name: x.contiguous() for name, x in state.items()}))
    clip = toy_clip.new_clip()
    clip.load_state_dict(load_file(path))
    return freeze(clip)


def measure_untrained(world: str, out: Path, size: Size) -> None:
    """Measure every reading without training, on the evaluation's scenes."""
    clip = frozen_clip(world, out, size)
    project = own_projection(clip.visual)
    towers = {name: partial(tokens, clip.visual, name) for name in UNTRAINED}
    data, found = evaluation(world, size, clip, towers, "eval"), {}
    for name in UNTRAINED:
        found[name] = measure(Run(world, 0, 0.0, 0, tower=name), project, data)
        print(f"{world}, {name}, not trained: mIoU {found[name]['miou']:.3f}", flush=True)
    write_bytes(out / f"{world}-untrained.json", json.dumps(found).encode())


def plan(world: str) -> list[Run]:
    return [Run(world, STUDY_BATCH, lr, seed, tower=name) for lr in RATES for seed in SEEDS for name in TRAINED]


def work(out: Path, size: Size, clip: Path | None) -> None:
    (out / "runs").mkdir(parents=True, exist_ok=True)
    write_size(out, size)
    if clip is not None:
        write_bytes(out / "demo-clip.safetensors", (clip / "open_clip_model.safetensors").read_bytes())
    for world in WORLDS:
        prepare(world, out, size)
        measure_untrained(world, out, size)
        train_missing(plan(world), out, size)


def report(out: Path) -> dict:
    """Return every reading without training, and the mean and spread over seeds of those that PACL was trained on."""
    rows, missing = [], 0
    for world in WORLDS:
        path = out / f"{world}-untrained.json"
        for name, values in json.loads(path.read_text()).items() if path.exists() else ():
            rows.append({"world": world, "tokens": name, "trained": False, **values})
        found: dict[tuple, list] = {}
        for run in plan(world):
            points = result_of(out, run)
            missing += points is None
            if points is not None:
                found.setdefault((run.tower, run.lr), []).append(points)
        for (name, lr), curves in found.items():
            row = {"world": world, "tokens": name, "trained": True, "lr": lr, "seeds": len(curves)}
            rows.append(row | mean_of_curves(curves)[-1])
    return {
        "machine": machine(torch.device("cpu"), None),
        "size": json.loads((out / "size.json").read_text()),
        "missing_runs": missing,
        "rows": rows,
    }


def main() -> None:
    parser, run, _ = run_and_report(__doc__)
    run.add_argument("--quick", action="store_true", help="Run everything once in seconds; the numbers mean nothing.")
    run.add_argument("--images", type=int, default=Size().images, help="Images of each run (default: %(default)s).")
    run.add_argument("--clip", type=Path, help="Folder of the CLIP that `pacl demo` trained, for the demo's world.")
    arguments = parser.parse_args()
    if arguments.command == "run":
        work(arguments.out, QUICK if arguments.quick else Size(images=arguments.images, points=1), arguments.clip)
        return
    result = report(arguments.out)
    for world in WORLDS:
        print(f"{world} world\n\n{readings(result, world)}\n")
    if arguments.json:
        write_json(arguments.json, result)


if __name__ == "__main__":
    main()
