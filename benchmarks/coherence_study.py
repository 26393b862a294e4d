"""Compare how coherent a tower's patches are with what PACL gains on it, over towers and layers of the demo's world.

    python benchmarks/coherence_study.py run DIR --clip toy/clip   # toy: of `pacl demo`; one thread; rerun to resume
    python benchmarks/coherence_study.py report DIR --json FILE --plot FILE.svg

The towers are the demo's CLIP and its first blocks, such a CLIP before and early in its training, and a convolutional
network with random weights. Each gets PACL embedders with the temperature and form of study.py, without and with the
coherence loss of `pacl train`, from the same images and the same text embeddings: those of the demo's CLIP. Weights of
that loss are compared on that CLIP. Coherence is the AUC of `pacl evaluate coherence`, of the tower's tokens and of the
embedder's patches. The gain is the mIoU of PACL less that of the tokens in the tower's own projection, with the texts
of its own CLIP.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import open_clip
import timm.models
import torch
from outputs import run_and_report, write_json
from pacl.backbones import freeze, patch_tokens, share
from pacl.demo import toy_clip
from pacl.files import write_bytes
from pacl.segment.predict import own_projection
from report import machine
from safetensors.torch import load_file, save
from study import Run, coherence, measure, read_world, result_of, spread, train_missing, write_size
from study_tables import centre, coherence_towers, coherence_weights
from study_worlds import WORLDS, Size, evaluation, tokens_of, train_clip, training_scenes, write_world
from torch import Tensor, nn

WORLD, BATCH, LR, SEEDS = "demo", 64, 16e-3, (0, 1, 2)  # the best rate of study.py for this batch
WEIGHT = 10.0  # of the coherence loss, on every tower
WEIGHTS = (1.0, 100.0)  # on the demo's CLIP, besides
EARLY = (25, 75, 150)  # steps of the CLIP's short training
SIZE = Size(images=4_096, scenes=1_024, eval_scenes=256, clip_steps=max(EARLY), clip_scenes=4_096, points=1)
QUICK = Size(images=128, scenes=64, eval_scenes=12, clip_steps=max(EARLY), clip_scenes=64, points=1)
RESAMPLES = 10_000


# Towers: name -> a CLIP and the function that makes its vision tower's tokens.


def first_blocks(visual: nn.Module, images: Tensor, *, count: int) -> Tensor:
    """Return the tokens after `count` blocks, with the norm that follows the last one."""
    if count == 0:
        return visual.ln_post(visual.ln_pre(visual.conv1(images).flatten(2).mT))
    short = share(visual)
    short.transformer = share(visual.transformer)
    short.transformer.resblocks = nn.ModuleList(list(visual.transformer.resblocks)[:count])
    return patch_tokens(short, images)


TOWERS: dict[str, tuple[str, Callable[[nn.Module, Tensor], Tensor]]] = {
    "random weights": ("vit-0", patch_tokens),
    "random weights, patch embedding": ("vit-0", partial(first_blocks, count=0)),
    **{f"CLIP after {step} steps": (f"vit-{step}", patch_tokens) for step in EARLY},
    "CLIP of the demo": ("demo", patch_tokens),
    "CLIP of the demo, after block 2 of 3": ("demo", partial(first_blocks, count=2)),
    "CLIP of the demo, after block 1 of 3": ("demo", partial(first_blocks, count=1)),
    "CLIP of the demo, patch embedding": ("demo", partial(first_blocks, count=0)),
    "convolutional, random weights": ("conv", patch_tokens),
}
BEST = "CLIP of the demo"


def new_conv() -> open_clip.CLIP:
    """Return the demo's CLIP with an untrained ConvNeXt in place of its vision tower: as many tokens, as wide."""
    clip = toy_clip.new_clip()
    sizes = {"depths": (1, 1, 1, 1), "dims": (32, 64, 128, 128), "output_stride": 8, "kernel_sizes": 3}
    # Without layer scale, whose first value of 1e-6 would leave an untrained tower without blocks.
    clip.visual = timm.models.ConvNeXt(num_classes=128, **sizes, ls_init_value=None)
    return clip


def load_clip(out: Path, name: str) -> open_clip.CLIP:
    torch.manual_seed(0)
    clip = new_conv() if name == "conv" else toy_clip.new_clip()
    if name != "conv":
        clip.load_state_dict(load_file(out / f"{name}.clip"))
    return freeze(clip)


def prepare_clips(out: Path, size: Size) -> None:
    """Train a CLIP for a short time, if `out` has none, and keep its weights before, during and after that."""
    if (out / f"vit-{size.clip_steps}.clip").exists():
        return

    def keep(step: int, clip: open_clip.CLIP) -> None:
        if step in (0, *EARLY):
            state = {name: x.contiguous() for name, x in clip.state_dict().items()}
            write_bytes(out / f"vit-{step}.clip", save(state))

    train_clip(WORLD, size, keep)


def prepare(out: Path, size: Size) -> None:
    """Write the tokens that the embedders are trained on, and the measures of the towers' own tokens."""
    prepare_clips(out, size)
    clips = {name: load_clip(out, name) for name, _ in TOWERS.values()}
    towers = {tower: partial(see, clips[name].visual) for tower, (name, see) in TOWERS.items()}
    if not (out / f"{WORLD}.safetensors").exists():
        scenes = training_scenes(WORLD, size.scenes)
        write_world(out / f"{WORLD}.safetensors", WORLD, size, clips["demo"], towers, *scenes, splits=("eval",))
    if (out / "own.json").exists():
        return
    found = {}
    for name, clip in clips.items():  # each with the texts of its own
        texts = evaluation(WORLD, size, clip, {}, "eval")
        project = clip.visual.head.fc if name == "conv" else own_projection(clip.visual)
        for tower in (tower for tower in TOWERS if TOWERS[tower][0] == name):
            run = Run(WORLD, 0, 0.0, 0, tower=tower)
            data = read_world(out, run) | texts
            found[tower] = measure(run, project, data)
            tokens = data[f"eval.{tokens_of(tower)}"]
            found[tower]["tokens_coherence"] = coherence(tokens, texts["eval.masks"], len(WORLDS[WORLD].classes))
            print(f"{tower}: coherence {found[tower]['tokens_coherence']:.3f}, {found[tower]['miou']:.3f}", flush=True)
    write_bytes(out / "own.json", json.dumps(found).encode())


def plan() -> list[Run]:
    """Return the runs, all of a seed together."""
    runs = []
    for seed in SEEDS:
        plain = [Run(WORLD, BATCH, LR, seed, tower=tower) for tower in TOWERS]
        runs += plain + [dataclasses.replace(plain[0], tower=BEST, coherence=weight) for weight in (WEIGHT, *WEIGHTS)]
        runs += [dataclasses.replace(run, coherence=WEIGHT) for run in plain if run.tower != BEST]
    return runs


def work(out: Path, size: Size, clip: Path) -> None:
    (out / "runs").mkdir(parents=True, exist_ok=True)
    write_size(out, size)
    torch.set_num_threads(1)
    write_bytes(out / "demo.clip", (clip / "open_clip_model.safetensors").read_bytes())
    prepare(out, size)
    train_missing(plan(), out, size)


# Report


def report(out: Path) -> dict:
    """Return a row for each tower and weight, with the mean and spread over seeds, and the rank correlations."""
    own, rows, missing = json.loads((out / "own.json").read_text()), [], 0
    groups: dict[Run, list[dict]] = {}
    for run in plan():
        points = result_of(out, run)
        missing += points is None
        if points is not None:
            groups.setdefault(dataclasses.replace(run, seed=0), []).append(points[-1])
    for run, points in groups.items():
        row = {"tower": run.tower, "weight": run.coherence, "seeds": len(points)}
        row |= {"tokens_coherence": own[run.tower]["tokens_coherence"], "own_miou": own[run.tower]["miou"]}
        for name in ("miou", "patch_accuracy", "retrieval_r1", "coherence"):
            row[name] = spread([point[name] for point in points])
        row["gain"] = spread([point["miou"] - own[run.tower]["miou"] for point in points])
        rows.append(row)
    rows.sort(key=lambda row: (list(TOWERS).index(row["tower"]), row["weight"]))
    plain = [row for row in rows if row["weight"] == 0]
    with_loss = [row for row in rows if row["weight"] == WEIGHT]
    correlations = {
        "tokens": spearman(plain, "tokens_coherence"),
        "patches": spearman(plain, "coherence"),
        "patches, with the loss": spearman(with_loss, "coherence"),
    }
    return {
        "machine": machine(torch.device("cpu"), None),
        "size": json.loads((out / "size.json").read_text()),
        "lr": LR,
        "batch": BATCH,
        "weight": WEIGHT,
        "missing_runs": missing,
        "correlations": {name: x for name, x in correlations.items() if x is not None},
        "rows": rows,
    }


def spearman(rows: list[dict], name: str) -> dict | None:
    """Return Spearman's rank correlation of `name` and the gain over towers, with a 95 % bootstrap interval.

    rows: one of each tower. None for fewer than three.
    """
    from scipy.stats import rankdata

    if len(rows) < 3:
        return None
    values = np.array([(centre(row[name]), centre(row["gain"])) for row in rows])
    chosen = np.random.default_rng(0).integers(len(rows), size=(RESAMPLES, len(rows)))
    ranks = rankdata(values[np.concatenate([np.arange(len(rows))[None], chosen])], axis=1)
    ranks -= ranks.mean(1, keepdims=True)
    with np.errstate(invalid="ignore"):  # a draw of one tower alone has no correlation
        rho = ranks.prod(2).sum(1) / np.sqrt((ranks**2).sum(1).prod(1))
    low, high = np.nanpercentile(rho[1:], [2.5, 97.5])
    return {"rho": float(rho[0]), "low": float(low), "high": float(high), "towers": len(rows)}


def plot(found: dict, path: Path) -> None:
    """Plot the gain against the coherence of the tokens and of the patches, as one SVG for light and dark pages."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ink, settings = "#010203", {"svg.fonttype": "none", "svg.hashsalt": "coherence", "font.size": 10}
    names = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "axes.titlecolor")
    with matplotlib.rc_context(settings | dict.fromkeys(names, ink)):
        figure, axes = pyplot.subplots(1, 2, figsize=(10, 5.4), sharey=True)
        plain = [row for row in found["rows"] if row["weight"] == 0]
        for axis, name, key in zip(axes, ("tokens_coherence", "coherence"), ("tokens", "patches"), strict=True):
            for number, row in enumerate(plain, start=1):
                x, y = centre(row[name]), 100 * centre(row["gain"])
                colour = f"C{(3 if 'convol' in row['tower'] else 0 if 'random' in row['tower'] else 1)}"
                others = [r for r in found["rows"] if (r["tower"], r["weight"]) == (row["tower"], found["weight"])]
                for other in others if name == "coherence" else ():
                    end = centre(other[name]), 100 * centre(other["gain"])
                    axis.annotate("", end, (x, y), arrowprops={"arrowstyle": "->", "color": "#888888"})
                label = f"{number} {row['tower']}" if name == "coherence" else None
                axis.plot(x, y, "o", color=colour, label=label)
                axis.annotate(str(number), (x, y), (4, 4), textcoords="offset points")
            stated = found["correlations"].get(key)
            title = f"Spearman {stated['rho']:.2f} ({stated['low']:.2f} to {stated['high']:.2f})" if stated else ""
            axis.set(title=title, xlabel=f"coherence of the {'tower’s tokens' if key == 'tokens' else 'patches'}, AUC")
            axis.patch.set_alpha(0)
        axes[0].set_ylabel("gain in mIoU, points")
        figure.legend(loc="lower center", ncols=3, fontsize=8, frameon=False, handlelength=1)
        figure.tight_layout(rect=(0, 0.18, 1, 1))
        figure.savefig(path, format="svg", transparent=True, metadata={"Date": None})
        pyplot.close(figure)
    style = "<style>:root{--ink:#222}@media(prefers-color-scheme:dark){:root{--ink:#ddd}}</style>"
    text = path.read_text().replace(ink, "var(--ink)")
    begin = text.index(">", text.index("<svg")) + 1
    write_bytes(path, (text[:begin] + style + text[begin:]).encode())


def main() -> None:
    parser, run, show = run_and_report(__doc__)
    run.add_argument("--quick", action="store_true", help="Use few images; the numbers mean nothing.")
    run.add_argument("--clip", type=Path, required=True, help="Folder of the CLIP that `pacl demo` trained.")
    show.add_argument("--plot", type=Path, help="Write the figure, an SVG.")
    arguments = parser.parse_args()
    if arguments.command == "run":
        work(arguments.out, QUICK if arguments.quick else SIZE, arguments.clip)
        return
    result = report(arguments.out)
    print(f"{coherence_weights(result)}\n\n{coherence_towers(result)}\n\n{json.dumps(result['correlations'])}")
    if arguments.json:
        write_json(arguments.json, result)
    if arguments.plot:
        plot(result, arguments.plot)


if __name__ == "__main__":
    main()
