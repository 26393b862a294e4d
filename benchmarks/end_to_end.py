"""Measure the share of a whole training step that the loss takes, fused and eager: from tokens, and with a live tower.

    python benchmarks/end_to_end.py --json result.json --plot result.svg   # some six minutes on two cores (estimate)
    python benchmarks/end_to_end.py --device cuda --json result.json

"features" are the tokens of a ViT-B/16 from memory, of which the embedder makes patches. "live tower" is a small ViT
of timm with random weights that learns too, from noise. Both steps end with AdamW. Eager is the paper's formula, the
pooled patch of every pair, with autograd.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import timm
import torch
from outputs import light_and_dark, write_json
from pacl.embedder import VisionEmbedder
from report import machine
from throughput import peak_growth
from training_step import LOSSES, D, N
from training_step import WIDTH as FEATURE_WIDTH

TOWERS = {"cpu": "vit_tiny_patch16_224", "cuda": "vit_small_patch16_224"}
BATCHES = {
    "cpu": {"features": (256, 1024), "live tower": (64, 256)},
    "cuda": {"features": (1024, 4096), "live tower": (256, 1024)},
}
PARTS = ("tower", "embedder and optimiser", "loss")


class Step:
    """One training step, in parts that are timed separately."""

    def __init__(self, args: argparse.Namespace, source: str, batch: int):
        self.device, self.dtype, self.form = torch.device(args.device), getattr(torch, args.dtype), args.form
        self.tower, width = None, FEATURE_WIDTH
        if source == "live tower":
            self.tower = timm.create_model(args.tower, num_classes=0).to(self.device)
            width = self.tower.num_features
            self.images = torch.randn(1, 3, 224, 224, device=self.device).expand(batch, 3, 224, 224)
        else:
            self.tokens = torch.randn(batch, N, width, device=self.device)
        self.texts = torch.randn(batch, D, device=self.device)
        self.embedder = VisionEmbedder(width, D).to(self.device)
        learned = [*self.embedder.parameters(), *(self.tower.parameters() if self.tower else ())]
        self.optimiser = torch.optim.AdamW(learned, lr=5e-4, fused=True)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def run(self, name: str) -> dict[str, float]:
        """Return the seconds of each part of a step with the loss `name`, forward and backward."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            marks = [self._now()]
            tokens = self.tokens if self.tower is None else self.tower.forward_features(self.images)[:, 1:]
            marks.append(self._now())
            token_leaf = tokens.detach().requires_grad_(self.tower is not None)  # a leaf parts two backward passes
            patches = self.embedder(token_leaf)
            marks.append(self._now())
            leaf = patches.detach().requires_grad_()
            loss = LOSSES[name](leaf, self.texts.to(leaf.dtype), self.form)
        loss.backward()
        marks.append(self._now())
        patches.backward(leaf.grad)
        marks.append(self._now())
        if self.tower is not None:
            tokens.backward(token_leaf.grad)
        marks.append(self._now())
        self.optimiser.step()
        self.optimiser.zero_grad()
        marks.append(self._now())
        seconds = [end - begin for begin, end in zip(marks, marks[1:], strict=False)]
        parts = (seconds[0] + seconds[4], seconds[1] + seconds[3] + seconds[5], seconds[2])
        return dict(zip(PARTS, parts, strict=True))

    def memory(self, name: str) -> float:
        """Return the peak memory of a step beyond what is there before it, in MiB."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            self.run(name)
            return (torch.cuda.max_memory_allocated(self.device) - before) / 2**20
        return peak_growth(lambda: self.run(name)) / 2**20


def measure(args: argparse.Namespace, source: str, batch: int) -> list[dict]:
    """Return a row for each loss: median seconds of the parts and MiB, or the reason why there are none."""
    step = Step(args, source, batch)
    rows = {name: {"source": source, "batch": batch, "loss": name, "reason": None} for name in LOSSES}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in LOSSES}
    for name in LOSSES:
        try:
            rows[name]["extra_mib"] = round(step.memory(name), 1)
        except torch.OutOfMemoryError:
            rows[name]["reason"] = "out of memory"
            del runs[name]
    for _ in range(args.repeats):
        for name in runs:
            runs[name].append(step.run(name))
    for name, times in runs.items():
        rows[name]["seconds"] = {part: statistics.median(x[part] for x in times) for part in PARTS}
    return list(rows.values())


def plot(result: dict, path: Path) -> list[Path]:
    """Draw the parts of every step, each beside the eager step of its batch, for light and dark pages."""
    rows = [row for row in result["rows"] if not row["reason"]]
    eager = {(x["source"], x["batch"]): sum(x["seconds"].values()) for x in rows if x["loss"] == "eager"}
    rows = [row for row in rows if (row["source"], row["batch"]) in eager][::-1]

    def draw(plt: Any, ink: str) -> Any:
        figure, axes = plt.subplots(figsize=(8, 0.4 * len(rows) + 1.2), layout="constrained")
        for y, row in enumerate(rows):
            whole, left = eager[row["source"], row["batch"]], 0.0
            for part, colour in zip(PARTS, ("C7", "C0", "C1"), strict=True):
                share = 100 * row["seconds"][part] / whole
                axes.barh(y, share, left=left, color=colour, label=part if y == 0 else None)
                left += share
        names = [f"{row['source']}, {row['batch']:,}, {row['loss']}" for row in rows]
        axes.set_yticks(range(len(rows)), names)
        axes.set_xlabel("% of the eager step")
        axes.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.4, 1.0))
        axes.spines[["top", "right"]].set_visible(False)
        return figure

    return light_and_dark(path, "end to end", draw)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", default="cpu", choices=list(BATCHES), help="Device to run on.")
    add("--batches", type=int, nargs="+", help="Batches of both steps (default: those of the device).")
    add("--dtype", choices=["float32", "bfloat16"], help="Autocast dtype (CPU default: float32).")
    add("--form", default="cosine", choices=["dot", "cosine"], help="Form of φ.")
    add("--tower", help="Name of a ViT in timm with 14 × 14 patches (default: a small one for the device).")
    add("--repeats", type=int, default=3, help="Timed steps of each.")
    add("--json", type=Path, metavar="FILE", help="Write the result, after each batch.")
    add("--plot", type=Path, metavar="FILE", help="Draw FILE-light and FILE-dark.")
    args = parser.parse_args(argv)
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    args.tower = args.tower or TOWERS[args.device]
    settings = {"dtype": args.dtype, "form": args.form, "tower": args.tower, "repeats": args.repeats}
    settings["threads"] = torch.get_num_threads()
    result: dict = {"machine": machine(torch.device(args.device), None), "settings": settings, "rows": []}
    for source, batches in BATCHES[args.device].items():
        for batch in args.batches or batches:
            for row in measure(args, source, batch):
                result["rows"].append(row)
                parts = row.get("seconds", {})
                times = ", ".join(f"{part} {seconds:.3f} s" for part, seconds in parts.items())
                share = f"{parts['loss'] / sum(parts.values()):.0%} in the loss" if parts else row["reason"]
                print(f"{source}, batch {batch:,}, {row['loss']}: {share}; {times}", flush=True)
            if args.json:
                write_json(args.json, result)
    if args.plot:
        print(*plot(result, args.plot), sep="\n")


if __name__ == "__main__":
    main()
