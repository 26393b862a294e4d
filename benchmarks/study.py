"""Measure the effect of batch size, attention and temperature in two generated worlds: curves, controls, a plot.

    python benchmarks/study.py run DIR                 # everything, in two processes of one thread; rerun to resume
    python benchmarks/study.py report DIR --json study.json --plot study.png

Each world (the demo's, and hard_scenes.py's near-duplicates) gets one small CLIP, trained and then frozen. Its patch
tokens are cached, and every run trains a new embedder on them with the same number of images: batches of 64 to 4,096,
then at one batch size the temperatures, forms and controls. The learning rate of each batch size is tuned on separate
scenes of the hard world. Losses are computed in bfloat16. Seeds change the embedder and the order of the images; the
CLIP, the training scenes and the 512 evaluation scenes are the same for all runs.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import open_clip
import torch
from outputs import run_and_report, write_json
from pacl.cross_attention import CrossAttention
from pacl.demo.training import ATTN_TEMPERATURE, embedder_config, embedder_pairs
from pacl.embedder import VisionEmbedder
from pacl.evaluate.coherence import compared
from pacl.evaluate.metrics import IGNORE, ScoreCounts, class_scores, patch_labels, patch_shares
from pacl.files import write_bytes
from pacl.training.model import Trainable
from pacl.training.trainer import Trainer
from report import machine
from safetensors import safe_open
from study_tables import STUDY_BATCH, STUDY_TAU, centre, label, tables_of_study
from study_worlds import QUICK, WORLDS, Size, prepare, tokens_of
from torch import Tensor
from torch.nn import functional as F

from pacl_kernels import compatibility, fused_pacl_loss

# Batch sizes, and the learning rates tried first for each. While the largest is the best, tuning doubles it, up to
# MAX_LR; beyond that trials gained less than seeds differ.
LRS = {64: (8e-3, 16e-3), 256: (16e-3, 32e-3), 1024: (16e-3, 32e-3), 4096: (16e-3, 32e-3)}
MAX_LR = 64e-3
SEEDS = (0, 1, 2)
TUNE_SEED = 100
PAIRS = 200_000  # of patches, drawn for the coherence
HEAD_LR = 2e-3  # of cross-attention; `lr` is the embedder's


@dataclass(frozen=True)
class Run:
    world: str
    batch: int
    lr: float
    seed: int
    tau: float | None = ATTN_TEMPERATURE  # None: learned, from the default
    form: str = "cosine"
    # "paired": attend with an image's own caption for every text; "mean": no attention; "cross-attention": in φ's place
    pooling: str = "all pairs"
    tower: str = "clip"  # "random": the tower before training; otherwise a reading of the trained one
    split: str = "eval"
    tolerance: float = 0.0  # grad_tolerance of the all-pairs loss
    coherence: float = 0.0  # weight of the coherence loss

    @property
    def name(self) -> str:
        return "_".join(str(x).replace(" ", "-") for x in dataclasses.astuple(self))


# Runs


def plan(out: Path) -> tuple[list[Run], list[Run]]:
    """Return the known runs that tune learning rates and, once those are complete, all others."""
    tune, lr = [], {}
    for batch, rates in LRS.items():
        runs = [Run("hard", batch, rate, TUNE_SEED, split="tune") for rate in rates]
        while True:
            found = [result_of(out, run) for run in runs]
            tune += [run for run in runs if run not in tune]
            if None in found:
                break
            best = max(range(len(runs)), key=lambda i: found[i][-1]["miou"])
            lr[batch] = runs[best].lr
            if best < len(runs) - 1 or 2 * runs[-1].lr > MAX_LR:
                break
            runs.append(dataclasses.replace(runs[-1], lr=2 * runs[-1].lr))
            lr.pop(batch)
    if len(lr) < len(LRS):
        return tune, []
    rest = []
    for seed in SEEDS:
        for world in reversed(WORLDS):
            rest += [Run(world, batch, lr[batch], seed) for batch in LRS]
            control = Run(world, STUDY_BATCH, lr[STUDY_BATCH], seed)
            changes = [{"tau": tau} for tau in (1.0, 0.1, None)] + [{"form": "dot"}, {"tower": "random"}]
            changes += [{"pooling": pooling} for pooling in ("paired", "mean")]
            rest += [dataclasses.replace(control, **change) for change in changes]
    rest.sort(key=lambda run: run.batch == max(LRS))  # last, because they take as long as all others together
    return tune, rest


def result_of(out: Path, run: Run) -> list[dict] | None:
    path = out / "runs" / f"{run.name}.json"
    return json.loads(path.read_text())["points"] if path.exists() else None


def train(run: Run, out: Path, size: Size) -> str:
    """Run once, from cached tokens to `out`/runs/NAME.json; return a line about it."""
    torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    begin = time.perf_counter()
    data = read_world(out, run)
    kind = tokens_of(run.tower)
    steps = size.images // run.batch
    changes = {"lr": run.lr, "learn_attn_temperature": run.tau is None, "grad_tolerance": run.tolerance}
    changes["coherence_loss"] = run.coherence
    crossed = run.pooling == "cross-attention"
    if crossed:
        changes |= {"align": run.pooling, "tower_lr": HEAD_LR}
    config = embedder_config(steps, run.batch, **changes)
    model = Trainable(VisionEmbedder(data[f"train.{kind}"].shape[2], data["classes"].shape[1]), config)
    trainer = Trainer(model, config, steps, tower_parameters=model.tower_parameters(), loss=_loss(run))
    points = Points(run, trainer, data, steps, size.points)
    texts = data["train.words" if crossed else "train.texts"]
    trainer.run(embedder_pairs(data[f"train.{kind}"], texts, run.batch, run.seed), points.step)
    seconds = time.perf_counter() - begin
    record = {**dataclasses.asdict(run), "points": points.rows, "seconds": round(seconds, 1)}
    write_bytes(out / "runs" / f"{run.name}.json", (json.dumps(record) + "\n").encode())
    return f"{run.name}: mIoU {points.rows[-1]['miou']:.3f}, {seconds:.0f} s"


def read_world(out: Path, run: Run) -> dict[str, Tensor]:
    """Return what a run reads of its world: the tokens of no other tower."""
    with safe_open(out / f"{run.world}.safetensors", "pt") as file:
        names = [name for name in file.keys() if "tokens" not in name or name.endswith(f".{tokens_of(run.tower)}")]
        return {name: file.get_tensor(name) for name in names}


def _loss(run: Run) -> Callable[..., Tensor] | None:
    if run.pooling == "cross-attention":
        return None  # the head's own
    if run.pooling == "mean":
        return mean_pooling
    if run.pooling == "paired":
        return partial(paired, tau=run.tau)

    def loss(patches: Tensor, texts: Tensor, logit_scale: Tensor, *learned: Tensor) -> Tensor:
        tau = learned[0] if run.tau is None else run.tau
        patches, texts = patches.bfloat16(), texts.bfloat16()
        options = {"attn_temperature": tau, "form": run.form, "grad_tolerance": run.tolerance}
        return fused_pacl_loss(patches, texts, logit_scale, **options)

    return loss


def mean_pooling(patches: Tensor, texts: Tensor, logit_scale: Tensor) -> Tensor:
    """Return the contrastive loss with the same weight for every patch."""
    pooled = F.normalize(F.normalize(patches, dim=-1).mean(1), dim=-1)
    return open_clip.ClipLoss()(pooled, F.normalize(texts, dim=-1), logit_scale)


def paired(patches: Tensor, texts: Tensor, logit_scale: Tensor, *, tau: float) -> Tensor:
    """Return the loss with the paired caption's attention: pool once, compare with every text."""
    patches, texts = F.normalize(patches, dim=-1), F.normalize(texts, dim=-1)
    weights = ((patches @ texts[:, :, None]) / tau).softmax(1)
    return open_clip.ClipLoss()(F.normalize((weights * patches).sum(1), dim=-1), texts, logit_scale)


class Points:
    """Stand-in for a progress bar that measures the embedder after ..., 1/4, 1/2 and all of the steps.

    The mean loss, and with a tolerance the mean share of pairs kept, are those of the steps since the point before.
    """

    def __init__(self, run: Run, trainer: Trainer, data: dict[str, Tensor], total: int, count: int):
        self.run, self.trainer, self.data, self.done = run, trainer, data, 0
        self.rows: list[dict] = []
        self.losses: list[float] = []
        self.shares: list[float] = []
        self.due = {max(1, total >> shift) for shift in range(count)}

    def step(self, loss: Tensor) -> None:
        self.done += 1
        self.losses.append(loss.item())
        if self.trainer.kept_share is not None:
            self.shares.append(self.trainer.kept_share)
        if self.done in self.due:
            row = {"step": self.done, "images": self.done * self.run.batch, "loss": self.losses[-1]}
            row["mean_loss"] = statistics.mean(self.losses)
            if self.shares:
                row["kept_share"] = statistics.mean(self.shares)
            model = self.trainer.model
            tau = self.run.tau if model.log_temperature is None else model.log_temperature.exp().item()
            self.rows.append(row | measure(self.run, model.embedder, self.data, tau, model.head))
            self.losses, self.shares = [], []


@torch.no_grad()
def measure(
    run: Run,
    embedder: VisionEmbedder,
    data: dict[str, Tensor],
    tau: float = ATTN_TEMPERATURE,
    head: CrossAttention | None = None,
) -> dict[str, float]:
    """Return mIoU, patch accuracy (all attributes, and each), the coherence of the embeddings, and image-to-text R@1
    among the evaluation's captions.

    head: scores images with texts and patches with classes in the place of φ and of cosines.
    """
    world, split = WORLDS[run.world], run.split
    masks, classes = data[f"{split}.masks"], data["classes"]
    tokens = data[f"{split}.{tokens_of(run.tower)}"]
    seen = [label for label in range(len(world.kinds)) if label not in world.held_out]
    found = ScoreCounts(len(world.classes))
    for part, truth in zip(tokens.split(32), masks.split(32), strict=True):
        if head is None:
            scores = class_scores(embedder(part), classes)
        else:
            cosines = torch.stack([each for _, each in head.score(embedder(part), data["classes.words"])])
            scores = cosines.unflatten(2, (round(cosines.shape[2] ** 0.5), -1))
        found.update(truth, scores)
    pixels, patches = found.pixels, found.patches
    out = {"miou": pixels.miou(seen), "patch_accuracy": patches.accuracy(seen)}
    if world.held_out:
        out |= {
            "held_out_miou": pixels.miou(world.held_out),
            "held_out_patch_accuracy": patches.accuracy(world.held_out),
        }
    counts = patches.counts[seen].double()
    for position, name in enumerate(("colour", "pattern", "accent")[: len(world.kinds[0])]):
        values = [kind[position] for kind in world.kinds] + [None] * (len(world.classes) - len(world.kinds))
        right = torch.tensor([[values[k] == values[label] for k in range(len(values))] for label in seen])
        out[name] = float((counts * right).sum() / counts.sum())
    texts, patches = data[f"{split}.texts"], embedder(tokens)
    out["coherence"] = coherence(patches, masks, len(world.classes))
    if head is None:
        phi = compatibility(patches, texts, attn_temperature=tau, form=run.form)
    else:
        phi = torch.stack([each for each, _ in head.score(patches, data[f"{split}.words"])])
    own = phi.diagonal()[:, None]
    # Equal captions are not mistakes: a text counts against the pair only if its score is larger.
    out["retrieval_r1"] = float(((phi > own + 1e-6).sum(1) == 0).float().mean())
    return out


def coherence(patches: Tensor, masks: Tensor, classes: int) -> float:
    """Return the AUC of `pacl evaluate coherence` for patches [B, N, D] of images with labels [B, H, W]."""
    side = round(patches.shape[1] ** 0.5)
    labels = patch_labels(patch_shares(masks, classes, (side, side))).flatten()
    known = labels != IGNORE
    return compared(F.normalize(patches, dim=-1).flatten(0, 1)[known], labels[known], pairs=PAIRS).auc()


def write_size(out: Path, size: Size) -> None:
    """Write the size of the runs to `out`; refuse a folder with runs of another one."""
    settings = out / "size.json"
    if settings.exists() and json.loads(settings.read_text()) != dataclasses.asdict(size):
        raise SystemExit(f"study: out: {out} holds runs of another size, expected another folder")
    write_bytes(settings, json.dumps(dataclasses.asdict(size)).encode())


def train_missing(runs: Iterable[Run], out: Path, size: Size) -> None:
    """Do the runs that `out` does not have yet, one after the other in this process."""
    for run in runs:
        if result_of(out, run) is None:
            print(train(run, out, size), flush=True)


def work(out: Path, size: Size, processes: int) -> None:
    """Prepare both worlds, then do all missing runs, `processes` at a time."""
    (out / "runs").mkdir(parents=True, exist_ok=True)
    write_size(out, size)
    begin = time.perf_counter()
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(partial(prepare, out=out, size=size), reversed(WORLDS)))
        while todo := [run for stage in plan(out) for run in stage if result_of(out, run) is None]:
            for count, line in enumerate(pool.map(partial(train, out=out, size=size), todo), start=1):
                print(f"[{count}/{len(todo)}, {(time.perf_counter() - begin) / 60:.0f} min] {line}", flush=True)


# Report


def report(out: Path) -> dict:
    """Return means and spreads over seeds of every kind of finished run, and the number of missing runs."""
    tune, rest = plan(out)
    found = {run: points for run in (*tune, *rest) if (points := result_of(out, run)) is not None}
    groups: dict[Run, list[list[dict]]] = {}
    for run in rest:
        if run in found:
            groups.setdefault(dataclasses.replace(run, seed=0), []).append(found[run])
    rows = []
    for run, curves in groups.items():
        rows.append({**dataclasses.asdict(run), "seeds": len(curves), "points": mean_of_curves(curves)})
    seconds = [json.loads(path.read_text())["seconds"] for path in (out / "runs").glob("*.json")]
    return {
        "machine": machine(torch.device("cpu"), None),
        "size": json.loads((out / "size.json").read_text()),
        "missing_runs": len(tune) + len(rest) - len(found),
        "core_minutes": round(sum(seconds) / 60, 1),
        "tuning": [{"batch": r.batch, "lr": r.lr, "miou": found[r][-1]["miou"]} for r in tune if r in found],
        "rows": rows,
    }


def mean_of_curves(curves: list[list[dict]]) -> list[dict]:
    """Return the points of several seeds' runs as one curve of means, least and most values."""
    return [
        {name: spread([point[name] for point in points]) for name in points[0]} for points in zip(*curves, strict=True)
    ]


def spread(values: list[float]) -> dict[str, float] | float:
    if len(set(values)) == 1:
        return values[0]
    return {"mean": statistics.mean(values), "min": min(values), "max": max(values)}


def plot(found: dict, path: Path) -> None:
    """Plot mIoU against images seen and against steps, with a line per batch size, and the controls as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(WORLDS), 3, figsize=(13, 4 * len(WORLDS)), squeeze=False)
    for line, world in zip(axes, WORLDS, strict=True):
        rows = [row for row in found["rows"] if row["world"] == world]
        for row in rows:
            if label(row) != f"τ = {STUDY_TAU:g}":
                continue
            miou = [100 * centre(point["miou"]) for point in row["points"]]
            for axis, name in zip(line, ("images", "step"), strict=False):
                axis.plot([point[name] for point in row["points"]], miou, marker="o", label=f"batch {row['batch']:,}")
        for axis, name in zip(line, ("images seen", "steps"), strict=False):
            axis.set(xscale="log", xlabel=name, ylabel="mIoU, %", title=f"{world} world", ylim=(0, None))
        line[0].legend()
        controls = [row for row in rows if row["batch"] == STUDY_BATCH]
        last = [row["points"][-1]["miou"] for row in controls]
        line[2].barh([label(row) for row in controls], [100 * centre(value) for value in last])
        ends = [value if isinstance(value, dict) else {"min": value, "max": value} for value in last]
        line[2].hlines(range(len(last)), *([100 * end[k] for end in ends] for k in ("min", "max")), colors="black")
        line[2].set(xlabel="mIoU, %", title=f"{world} world, batch {STUDY_BATCH}")
        line[2].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser, run, show = run_and_report(__doc__)
    run.add_argument(
        "--processes", type=int, default=2, help="Number of processes, with one thread each (default: %(default)s)."
    )
    run.add_argument("--quick", action="store_true", help="Run everything once in minutes; the numbers mean nothing.")
    show.add_argument("--plot", type=Path, help="Write a chart.")
    arguments = parser.parse_args()
    if arguments.command == "run":
        work(arguments.out, QUICK if arguments.quick else Size(), arguments.processes)
        return
    found = report(arguments.out)
    print(tables_of_study(found))
    if arguments.json:
        write_json(arguments.json, found)
    if arguments.plot:
        plot(found, arguments.plot)


if __name__ == "__main__":
    main()
