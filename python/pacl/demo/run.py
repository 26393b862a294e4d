"""`pacl demo`: generate scenes, train a CLIP and PACL on top of it, and compare both, in a few minutes."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import open_clip
import torch
from torchvision.transforms.functional import to_pil_image

from ..backbones import freeze
from ..data import scenes
from ..data.scene_shards import write_scenes
from ..data.shards import INCOMPLETE, Shards
from ..embedder import VisionEmbedder, save_embedder
from ..files import write_bytes
from ..progress import Progress
from ..sharing import describe_towers
from ..towers import load_towers
from ..training.model import Trainable
from ..training.trainer import Trainer
from .evaluation import Evaluation, evaluate, percent
from .picture import draw_picture
from .toy_clip import new_clip, save_clip
from .training import (
    ATTN_TEMPERATURE,
    MEAN_POOLING,
    OnePatch,
    clip_config,
    clip_pairs,
    embedder_config,
    embedder_pairs,
    frozen_features,
)


@dataclass(frozen=True)
class DemoConfig:
    """The settings of a demo run. The same values on the same machine give the same numbers."""

    seed: int = 0
    # At most 4, because the models are small. One is fastest if another process holds one of two cores.
    threads: int = field(default_factory=lambda: min(4, torch.get_num_threads()))
    train_scenes: int = 16_000
    eval_scenes: int = 600
    clip_steps: int = 700
    embedder_scenes: int = 8_000  # their frozen tokens stay in memory, 32 kB each
    embedder_steps: int = 2_000
    batch_size: int = 64

    def __post_init__(self) -> None:
        for item in fields(self):
            value, least = getattr(self, item.name), 0 if item.name == "seed" else 1
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{item.name}: got {value!r}, expected an integer of at least {least}")
        if self.train_scenes < self.batch_size:
            raise ValueError(f"train_scenes: got {self.train_scenes}, expected at least one batch ({self.batch_size})")


# Every stage for a few seconds: shows that it runs, not what it learns.
QUICK = {"train_scenes": 256, "eval_scenes": 60, "clip_steps": 5, "embedder_scenes": 256, "embedder_steps": 40}


@dataclass
class Trained:
    """The models of a run, with the progress of each stage."""

    config: DemoConfig
    clip: open_clip.CLIP
    embedders: dict[str, VisionEmbedder] = field(default_factory=dict)
    stages: dict[str, Progress] = field(default_factory=dict)

    def save(self, folder: Path) -> list[str]:
        """Write the CLIP and the PACL embedder to `folder`, if training began; return a line for each."""
        lines = []
        for name in ("clip", "pacl"):
            stage = self.stages.get(name)
            if stage is None or stage.done == 0:
                continue
            target = folder / ("embedder" if name == "pacl" else name)
            notes: dict[str, Any] = {"steps": stage.done, "planned_steps": stage.total, "seed": self.config.seed}
            if name == "clip":
                save_clip(self.clip, target, **notes)
            else:
                towers = describe_towers(load_towers(f"local-dir:{folder / 'clip'}"), target)
                save_embedder(self.embedders["pacl"], target, towers, **notes)
            lines.append(f"{target}: {stage.label}, {stage.done} of {stage.total} steps")
        return lines


def run(config: DemoConfig, out: Path, *, full: bool = False) -> dict:
    """Run the whole demo, write its files to `out`, print its table, and return the contents of metrics.json.

    full: also write report.html and full.json, with more measures.

    On KeyboardInterrupt the models go to `out`/interrupted, so that a complete run in `out` stays as it is, and the
    exception is raised again.
    """
    start = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    trained = Trained(config, new_clip())
    try:
        train_shards, eval_shards = _write_scenes(config, out / "scenes")
        _train_clip(trained, train_shards)
        _train_embedders(trained, train_shards)
        evaluation = evaluate(trained.clip, trained.embedders, Shards(eval_shards, masks=True))
    except KeyboardInterrupt:
        lines = trained.save(out / "interrupted")
        first = "Interrupted. Kept:" if lines else "Interrupted before any training; nothing is kept."
        print(f"\n{first}", *lines, sep="\n  ")
        raise
    trained.save(out)
    metrics = {**evaluation.metrics, "seconds": round(time.perf_counter() - start, 1), "seed": config.seed}
    draw_picture(evaluation, out / "segmentation.png")
    write_bytes(out / "metrics.json", (json.dumps(metrics, indent=2) + "\n").encode())
    print(_summary(config, evaluation, metrics, out), flush=True)
    if full:
        from .report import write_report

        found = write_report(out, trained.embedders, eval_shards, evaluation, asdict(config))
        print(f"{found['seconds']:.0f} s for all measures. Written to {out}:\n  report.html  full.json")
    return metrics


def _write_scenes(config: DemoConfig, folder: Path) -> tuple[list[Path], list[Path]]:
    write_bytes(folder / INCOMPLETE, b"{}")
    with Progress("Scenes", config.train_scenes + config.eval_scenes, unit="scene") as progress:
        workers = config.threads if config.threads > 1 else 0
        options: dict[str, Any] = {"seed": config.seed, "workers": workers, "progress": progress.step}
        train = write_scenes(folder, "train", config.train_scenes, pairs=scenes.SEEN, **options)
        evaluation = write_scenes(folder, "eval", config.eval_scenes, masks=True, **options)
    (folder / INCOMPLETE).unlink()
    return train, evaluation


def _train_clip(trained: Trained, shards: list[Path]) -> None:
    config, settings = trained.config, clip_config(trained.config.clip_steps, trained.config.batch_size)
    batches = clip_pairs(shards, config.batch_size, config.seed)
    with Progress("CLIP", config.clip_steps) as trained.stages["clip"]:
        trainer = Trainer(OnePatch(trained.clip), settings, config.clip_steps)
        trainer.run(batches, trained.stages["clip"].step)
    freeze(trained.clip)


def _train_embedders(trained: Trained, shards: list[Path]) -> None:
    """Train PACL's embedder and the control's, from the same initial weights, on the same batches."""
    config, steps = trained.config, trained.config.embedder_steps
    tokens, texts = frozen_features(trained.clip, shards, min(config.embedder_scenes, config.train_scenes))
    for name, label, temperature in (
        ("pacl", "PACL", ATTN_TEMPERATURE),
        ("mean_pooling", "Mean pooling", MEAN_POOLING),
    ):
        settings = embedder_config(steps, config.batch_size, attn_temperature=temperature)
        torch.manual_seed(config.seed)
        embedder = VisionEmbedder(
            tokens.shape[2], texts.shape[1], form=settings.form, attn_temperature=settings.attn_temperature
        )
        trained.embedders[name] = embedder
        with Progress(label, steps) as trained.stages[name]:
            batches = embedder_pairs(tokens, texts, config.batch_size, config.seed)
            Trainer(Trainable(embedder, settings), settings, steps).run(batches, trained.stages[name].step)
        freeze(embedder)


def _summary(config: DemoConfig, evaluation: Evaluation, metrics: dict, out: Path) -> str:
    """Return the table, in percent, and the commands to try next."""
    rows = [
        "                        seen pairs        held-out pairs",
        "                      mIoU  patches        mIoU  patches",
    ]
    for name, label in evaluation.methods.items():
        seen, held_out = metrics[name]["seen"], metrics[name]["held_out"]
        values = [percent(part[key]) for part in (seen, held_out) for key in ("miou", "patch_accuracy")]
        rows.append(f"{label:<20}{values[0]:>6}{values[1]:>9}{values[2]:>12}{values[3]:>9}")
    return "\n".join(
        [
            "",
            f"Zero-shot segmentation of {config.eval_scenes} unseen scenes, {len(scenes.CLASSES)} classes, percent:",
            "",
            *rows,
            "",
            "patches: accuracy over the patches of these shapes; held-out pairs never occur in training.",
            *(["This run was too short to learn anything; run without --quick."] if config.clip_steps < 100 else []),
            f"{metrics['seconds']:.0f} s with seed {config.seed}. Written to {out}:",
            "  segmentation.png  metrics.json  embedder/  clip/  scenes/",
            *_next(evaluation, out),
        ]
    )


def _next(evaluation: Evaluation, out: Path) -> list[str]:
    """Write the first scene to `out` and return the commands to try next; [] if no scene was chosen."""
    if not evaluation.rows:
        return []
    row = evaluation.rows[0]
    to_pil_image(row.image).save(out / "scene.png")
    words = ",".join(scenes.CLASSES[label] for label in row.maps["truth"].unique().tolist())
    command = f'pacl look {out / "scene.png"} --words "{words}" --templates none --checkpoint {out / "embedder"}'
    return [f"Next: open {out / 'segmentation.png'}, then", f"  {command} --out {out / 'look'}"]
