"""Compare attention over all pairs with paired attention and mean pooling on real encoders, pictures and words.

    python benchmarks/real_words.py run DIR --packages FOLDER    # rerun to resume
    python benchmarks/real_words.py report DIR --json real-words.json

docs/real_words.md lists the packages. Scenes of cut-out pictures on photographs have captions and exact masks; all
measured pictures are held out. A frozen vision tower's tokens are cached, and every run trains a new embedder on them
with the same number of pairs, in bfloat16. The learning rate of every method and batch size is tuned on held-out
pictures that the test does not have.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from outputs import write_json
from pacl.demo.training import ATTN_TEMPERATURE, MEAN_POOLING, embedder_config, embedder_pairs
from pacl.embedder import VisionEmbedder
from pacl.evaluate.metrics import IGNORE, Retrieval, ScoreCounts, class_scores, patch_labels, patch_shares
from pacl.files import write_bytes
from pacl.training.model import Trainable
from pacl.training.trainer import Trainer
from real_words_features import Split, prepare, read_split, read_words
from real_words_pictures import SPLITS, read_world, sheet
from real_words_towers import TOWERS, towers_of
from report import machine
from safetensors.torch import save
from study import mean_pooling, paired, spread
from study_tables import real_words
from torch import Tensor
from torch.nn import functional as F

from pacl_kernels import compatibility, fused_pacl_loss
from pacl_kernels.native import native

METHODS = ("all pairs", "paired", "mean")
# Batch size -> the learning rates tried first. While the best is at an end, tuning goes on there, within LIMITS.
LRS = {64: (2e-3, 4e-3), 256: (4e-3, 8e-3), 1024: (2e-3, 4e-3, 8e-3, 16e-3)}
LIMITS = (5e-4, 64e-3)
COMPARED = 64  # batch size of all methods; the others are for all pairs alone
SEEDS = (0, 1, 2)
TUNE_SEED = 100


@dataclass(frozen=True)
class Size:
    """Amounts of work: a run sees `pairs`, one that tunes `tune_pairs`, with `tokens` random tokens of each image."""

    pairs: int = 40_960
    tune_pairs: int = 20_480
    tokens: int = 24
    train: int = 2_560
    val: int = 256
    test: int = 512


@dataclass(frozen=True)
class Run:
    tower: str
    method: str
    batch: int
    lr: float
    seed: int
    split: str = "test"

    @property
    def name(self) -> str:
        return "_".join(str(x).replace(" ", "-") for x in dataclasses.astuple(self))


def plan(out: Path, towers: Iterable[str]) -> Iterator[Run]:
    """Yield the missing runs that can be done now: first all methods at one batch size, then larger batches."""
    for batch in LRS:
        for tower in towers:
            settings = [(method, batch) for method in METHODS if method == "all pairs" or batch == COMPARED]
            tuned = {}
            for method, _ in settings:
                lr, missing = tune(out, tower, method, batch)
                yield from missing
                tuned[method] = lr
            for seed in SEEDS:
                for method, lr in tuned.items():
                    if lr is not None and result(out, run := Run(tower, method, batch, lr, seed)) is None:
                        yield run


def tune(out: Path, tower: str, method: str, batch: int) -> tuple[float | None, list[Run]]:
    """Return the best learning rate on the validation, None while runs are missing, and those runs.

    The best one names most patches of the validation's pictures correctly.
    """
    runs = [Run(tower, method, batch, lr, TUNE_SEED, "val") for lr in LRS[batch]]
    while True:
        found = [result(out, run) for run in runs]
        missing = [run for run, each in zip(runs, found, strict=True) if each is None]
        if missing:
            return None, missing
        best = max(range(len(runs)), key=lambda i: found[i]["val"]["patches"])
        lower, higher = runs[0].lr / 2, runs[-1].lr * 2
        if best == 0 and lower >= LIMITS[0]:
            runs.insert(0, dataclasses.replace(runs[0], lr=lower))
        elif best == len(runs) - 1 and higher <= LIMITS[1]:
            runs.append(dataclasses.replace(runs[0], lr=higher))
        else:
            return runs[best].lr, []


def result(out: Path, run: Run) -> dict | None:
    path = out / "runs" / f"{run.name}.json"
    return json.loads(path.read_text()) if path.exists() else None


# One run


def train(run: Run, out: Path, size: Size) -> str:
    """Run once, from cached tokens to `out`/runs/NAME.json; return a line about it."""
    torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    begin = time.process_time()
    data, words = read_split(run.tower, "train", out), read_words(run.tower, out)
    steps = (size.pairs if run.split == "test" else size.tune_pairs) // run.batch
    config = embedder_config(steps, run.batch, lr=run.lr)
    embedder = VisionEmbedder(data.tokens.shape[2], words.shape[1])
    trainer = Trainer(Trainable(embedder, config), config, steps, loss=loss_of(run.method), amp=True)
    trainer.run(some_tokens(embedder_pairs(data.tokens, data.texts, run.batch, run.seed), size.tokens))
    values, threshold = measure(embedder, read_split(run.tower, "val", out), words, run.method)
    found = {**dataclasses.asdict(run), "steps": steps, "val": values}
    if run.split == "test":
        found["threshold"] = threshold
        found["test"], _ = measure(embedder, read_split(run.tower, "test", out), words, run.method, threshold)
        write_bytes(out / "runs" / f"{run.name}.safetensors", save(embedder.state_dict()))
    found["cpu_seconds"] = round(time.process_time() - begin, 1)
    write_bytes(out / "runs" / f"{run.name}.json", (json.dumps(found) + "\n").encode())
    last = found[run.split]
    return f"{run.name}: patches {last['patches']:.3f}, find {last['find']:.3f}, {found['cpu_seconds']:.0f} CPU s"


def some_tokens(pairs: Iterator[dict[str, Tensor]], count: int) -> Iterator[dict[str, Tensor]]:
    """Keep `count` random tokens of each batch, the same places in all its images."""
    for batch in pairs:
        places = torch.randperm(batch["images"].shape[1])[:count]
        yield {**batch, "images": batch["images"][:, places]}


def loss_of(method: str) -> Callable[..., Tensor]:
    """Return the loss of one of METHODS, at the temperature and in the form that `pacl train` has by default."""
    if method == "all pairs":
        return partial(fused_pacl_loss, attn_temperature=ATTN_TEMPERATURE, form="cosine")
    pooled = mean_pooling if method == "mean" else partial(paired, tau=ATTN_TEMPERATURE)

    def loss(patches: Tensor, texts: Tensor, logit_scale: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):  # it would round the logits
            return pooled(patches.float(), texts.float(), logit_scale)

    return loss


@torch.no_grad()
def measure(
    embedder: Callable[[Tensor], Tensor], split: Split, words: Tensor, method: str, threshold: float | None = None
) -> tuple[dict[str, float], float]:
    """Return measures as fractions, and the threshold of `find`; None chooses the best one for this split.

    patches: share of the patches, at least half of them in one object, for which its word is the best of all words.
    own_words: the same where only the words of the scene compete, in scenes of several objects. miou: over the words,
    on the objects' pixels. find: mean IoU of the pixels above the threshold of a word and of its object, background
    counted. r1: share of images whose own caption has the largest φ, with the method's weights of the patches (for
    "paired", which has weights for the own caption alone, those of all pairs).
    """
    counts, retrieval = ScoreCounts(len(words)), Retrieval(split.captions, None, None, torch.device("cpu"))
    tau = MEAN_POOLING if method == "mean" else ATTN_TEMPERATURE
    right, total, maps, shapes = 0, 0, [], []
    for start in range(0, len(split.tokens), 32):
        masks, objects = split.masks[start : start + 32], split.objects[start : start + 32]
        patches = embedder(split.tokens[start : start + 32].float())
        scores = class_scores(patches, words)
        counts.update(masks, scores)
        retrieval.update(compatibility(patches, split.texts, attn_temperature=tau, form="cosine"), start)
        for score, mask, listed in zip(scores, masks, objects, strict=True):
            named = sorted(listed)  # so that the truth and the scores settle ties alike
            own = score[named]
            shares = patch_shares(mask[None], named, (score.shape[1], score.shape[2]))
            truth = patch_labels(shares)[0]
            if len(named) > 1:
                right += int((own.argmax(0) == truth).sum())
                total += int((truth != IGNORE).sum())
            maps.append(F.interpolate(own[None], mask.shape, mode="bilinear")[0])
            shapes.append(torch.stack([mask == word for word in named]))
    found, inside = torch.cat(maps), torch.cat(shapes)
    choices = torch.linspace(float(found.min()), float(found.max()), 42)[:-1] if threshold is None else [threshold]
    ious = torch.tensor([float(_iou(found > x, inside).mean()) for x in choices])
    values = {
        "patches": counts.patches.accuracy(),
        "own_words": right / max(1, total),
        "miou": counts.pixels.miou(),
        "find": float(ious.max()),
        "r1": retrieval.values()["image_to_text_R@1"],
    }
    return values, float(choices[int(ious.argmax())])


def _iou(found: Tensor, inside: Tensor) -> Tensor:
    """Return the IoU of bool maps [M, H, W], float [M]."""
    return (found & inside).sum((1, 2)) / (found | inside).sum((1, 2)).clamp(min=1)


# All runs, and the report


def work(out: Path, packages: Path, size: Size, towers: tuple[str, ...], json_path: Path | None) -> None:
    """Do all missing runs, one at a time, and before the first of a tower its tokens."""
    settings = out / "size.json"
    if settings.exists() and json.loads(settings.read_text()) != dataclasses.asdict(size):
        raise SystemExit(f"real_words: out: {out} holds runs of another size, expected another folder")
    write_bytes(settings, json.dumps(dataclasses.asdict(size)).encode())
    world = None
    while (run := next(plan(out, towers), None)) is not None:
        if not (out / f"{run.tower}-{SPLITS[-1]}.safetensors").exists():
            world = world or read_world(packages)
            write_bytes(out / "world.json", json.dumps(world.summary()).encode())
            scenes = {split: getattr(size, split) for split in SPLITS}
            prepare(run.tower, towers_of(run.tower, packages, out), world, scenes, out)
        print(train(run, out, size), flush=True)
        if json_path:
            write_json(json_path, report(out))


def report(out: Path) -> dict:
    """Return means and spreads over seeds of every kind of finished run, and the runs that tuned."""
    runs = [json.loads(path.read_text()) for path in sorted((out / "runs").glob("*.json"))]
    rows = []
    for tower in TOWERS:
        for method, batch in [(method, COMPARED) for method in METHODS] + [
            ("all pairs", b) for b in LRS if b > COMPARED
        ]:
            group = [
                x for x in runs if (x["tower"], x["method"], x["batch"], x["split"]) == (tower, method, batch, "test")
            ]
            if group:
                kept = {name: group[0][name] for name in ("tower", "method", "batch", "lr", "steps")}
                values = {name: spread([x["test"][name] for x in group]) for name in group[0]["test"]}
                rows.append({**kept, "seeds": len(group), **values})
    tuning = [
        {**{name: x[name] for name in ("tower", "method", "batch", "lr", "steps")}, **x["val"]}
        for x in runs
        if x["split"] == "val"
    ]
    return {
        "machine": machine(torch.device("cpu"), native()),
        "size": json.loads((out / "size.json").read_text()),
        "world": json.loads((out / "world.json").read_text()),
        "cpu_minutes": round(sum(x["cpu_seconds"] for x in runs) / 60, 1),
        "missing_runs": len(list(plan(out, TOWERS))),
        "rows": rows,
        "tuning": tuning,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("out", type=Path, help="Folder of the runs.")
    run.add_argument("--packages", type=Path, required=True, help="Folder of the unpacked packages.")
    run.add_argument("--towers", nargs="+", choices=list(TOWERS), default=list(TOWERS), help="Vision towers.")
    for field in dataclasses.fields(Size):
        run.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    draw = commands.add_parser("sheet", help="Write examples of the scenes.")
    draw.add_argument("image", type=Path, help="File, .jpg.")
    draw.add_argument("--packages", type=Path, required=True, help="Folder of the unpacked packages.")
    show = commands.add_parser("report")
    show.add_argument("out", type=Path, help="Folder of the runs.")
    for each in (run, show):
        each.add_argument("--json", type=Path, help="Write the result, after each run.")
    arguments = parser.parse_args()
    if arguments.command == "sheet":
        print("\n".join(sheet(arguments.packages, arguments.image)))
        return
    if arguments.command == "run":
        size = Size(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Size)})
        work(arguments.out, arguments.packages, size, tuple(arguments.towers), arguments.json)
    found = report(arguments.out)
    print(real_words(found))
    if arguments.json:
        write_json(arguments.json, found)


if __name__ == "__main__":
    main()
