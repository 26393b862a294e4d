"""Measure the loss's share of a training step, fused and eager: a frozen ViT-B/16, the embedder, one step of AdamW.

    python benchmarks/training_step.py                          # CPU: batches of 64, 256 and 1,024, tens of minutes
    python benchmarks/training_step.py --device cuda --json F   # 1,024 to 16,384
    python benchmarks/training_step.py --show F

Weights are random and the images noise: neither changes the time. The towers are open_clip's ViT-B-16, or timm's vision
tower alone if open_clip is not installed (the table names them); they are timed once. "of a step" is the loss's
share of towers, embedder, loss and optimiser; "from tokens" leaves out the towers, like `pacl train --features`. Eager
is the paper's formula, the pooled patch of every pair, with autograd.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from outputs import write_json
from pacl.embedder import VisionEmbedder
from peers import LOGIT_SCALE, pooled
from report import machine
from result_tables import training_step
from throughput import peak_growth
from torch import Tensor, nn
from torch.nn import functional as F

from pacl_kernels import fused_pacl_loss

CHUNK = 64  # images in a batch of the towers
TAU = 0.05
N, WIDTH, D = 196, 768, 512
BATCHES = {"cpu": (64, 256, 1024), "cuda": (1024, 4096, 16384)}


def eager(patches: Tensor, texts: Tensor, form: str) -> Tensor:
    logits = LOGIT_SCALE * pooled(patches, texts, TAU, form)
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def fused(patches: Tensor, texts: Tensor, form: str) -> Tensor:
    return fused_pacl_loss(patches, texts, LOGIT_SCALE, attn_temperature=TAU, form=form)


LOSSES: dict[str, Callable[[Tensor, Tensor, str], Tensor]] = {"fused": fused, "eager": eager}


class Towers:
    """Towers that embed a batch, a chunk at a time, without a graph."""

    def __init__(self, device: torch.device):
        self.clip = None
        if importlib.util.find_spec("open_clip"):
            import open_clip

            self.clip = open_clip.create_model("ViT-B-16").to(device).eval().requires_grad_(False)
            self.name = "open_clip ViT-B-16, both towers"
        else:
            self.vision = timm.create_model("vit_base_patch16_clip_224", num_classes=0)
            self.vision = self.vision.to(device).eval().requires_grad_(False)
            self.name = "timm vit_base_patch16_clip_224, vision tower alone"

    @torch.no_grad()
    def __call__(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        tokens, texts = [], []
        for image, words in zip(images.split(CHUNK), ids.split(CHUNK), strict=True):
            if self.clip is None:
                tokens.append(self.vision.forward_features(image)[:, 1:])
                texts.append(torch.randn(len(image), D, device=image.device))
                continue
            from pacl.backbones import patch_tokens

            tokens.append(patch_tokens(self.clip.visual, image))
            texts.append(self.clip.encode_text(words, normalize=True))
        return torch.cat(tokens), torch.cat(texts)


class Step:
    """One training step, in parts that are timed separately."""

    def __init__(self, device: torch.device, dtype: torch.dtype, batch: int, form: str):
        self.device, self.dtype, self.form = device, dtype, form
        self.towers = Towers(device)
        self.embedder = VisionEmbedder(WIDTH, D).to(device)
        self.optimiser = torch.optim.AdamW(self.embedder.parameters(), lr=5e-4, fused=True)
        self.images = torch.randn(1, 3, 224, 224, device=device).expand(batch, 3, 224, 224)
        self.ids = torch.randint(1, 49_000, (1, 77), device=device).expand(batch, 77)

    def _autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def encode(self) -> tuple[tuple[Tensor, Tensor], float]:
        begin = self._clock()
        with self._autocast():
            out = self.towers(self.images, self.ids)
        return out, self._clock() - begin

    def rest(self, tokens: Tensor, texts: Tensor, name: str) -> tuple[float, float]:
        """Return the seconds of the loss, forward and backward, and those of embedder and optimiser."""
        self.optimiser.zero_grad()
        begin = self._clock()
        with self._autocast():
            patches = self.embedder(tokens)
        leaf = patches.detach().requires_grad_()  # separates the loss's backward from the embedder's
        middle = self._clock()
        with self._autocast():
            loss = LOSSES[name](leaf, texts.to(leaf.dtype), self.form)
        loss.backward()
        after = self._clock()
        patches.backward(leaf.grad)
        nn.utils.clip_grad_norm_(self.embedder.parameters(), 1.0)
        self.optimiser.step()
        return after - middle, middle - begin + self._clock() - after

    def memory(self, tokens: Tensor, texts: Tensor, name: str) -> int:
        """Return the peak memory of a step from these tokens, in bytes."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            self.rest(tokens, texts, name)
            return torch.cuda.max_memory_allocated(self.device) - before
        return peak_growth(lambda: self.rest(tokens, texts, name))


def measure(device: torch.device, dtype: torch.dtype, batch: int, form: str, repeats: int) -> dict:
    step = Step(device, dtype, batch, form)
    row: dict = {"batch": batch, "towers": step.towers.name}
    step.towers(step.images[:CHUNK], step.ids[:CHUNK])  # warm-up
    (tokens, texts), row["towers_s"] = step.encode()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in LOSSES}
    for name in LOSSES:
        try:
            row[f"{name}_extra_mib"] = round(step.memory(tokens, texts, name) / 2**20)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "memory" not in str(error):
                raise
            row[f"{name}_reason"] = "out of memory"
            del times[name]
    for _ in range(repeats):
        for name in times:
            times[name].append(step.rest(tokens, texts, name))
    for name, values in times.items():
        row[f"{name}_loss_s"] = statistics.median(loss for loss, _ in values)
        row[f"{name}_embedder_s"] = statistics.median(other for _, other in values)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=list(BATCHES), help="Device to run on.")
    parser.add_argument("--batches", type=int, nargs="+", help="Batch sizes (default: those of the device).")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="Autocast dtype (CPU default: float32).")
    parser.add_argument("--form", default="cosine", choices=["dot", "cosine"], help="Form of φ.")
    parser.add_argument("--repeats", type=int, default=5, help="Timed steps of each.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="Write the result.")
    parser.add_argument("--show", type=Path, metavar="FILE", help="Print the table of an earlier --json.")
    arguments = parser.parse_args()
    if arguments.show:
        print(training_step(json.loads(arguments.show.read_text())))
        return
    dtype = arguments.dtype or ("float32" if arguments.device == "cpu" else "bfloat16")
    result = {
        "machine": machine(torch.device(arguments.device), None),
        "settings": {
            "dtype": dtype,
            "form": arguments.form,
            "repeats": arguments.repeats,
            "threads": torch.get_num_threads(),
            "load_average": os.getloadavg()[0],
        },
        "rows": [],
    }
    for batch in arguments.batches or BATCHES[arguments.device]:
        device = torch.device(arguments.device)
        result["rows"].append(measure(device, getattr(torch, dtype), batch, arguments.form, arguments.repeats))
        print(training_step(result), flush=True)
        if arguments.json:
            write_json(arguments.json, result)


if __name__ == "__main__":
    main()
