"""Trains the demo's embedder in several processes; the losses are those of one process with the whole batch.

torchrun --nproc-per-node 2 examples/distributed.py demo    # the folder that `pacl demo --out demo` wrote
python examples/distributed.py demo                         # the same in one process
"""

import argparse
import functools
import os
from pathlib import Path

import open_clip
import torch
import torch.distributed as dist
from pacl.backbones import freeze
from pacl.demo import loops
from pacl.demo.run import frozen_features
from pacl.embedder import VisionEmbedder
from pacl.progress import Progress


class Losses(Progress):
    """Keeps the losses, and shows them in the first process."""

    def __init__(self, steps: int, rank: int):
        super().__init__("Embedder", steps)
        self.rank = rank

    def step(self, loss=None, count: int = 1) -> None:
        self.done += count
        if self.rank == 0 and (self.done % 20 == 0 or self.done == 1):
            print(f"step {self.done}: loss {loss.item():.6f}", flush=True)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", type=Path)
parser.add_argument("--scenes", type=int, default=2000)
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--batch-size", type=int, default=64, help="of all processes together")
arguments = parser.parse_args()

group = None
if "WORLD_SIZE" in os.environ:  # torchrun
    dist.init_process_group("gloo")
    group = dist.group.WORLD
torch.set_num_threads(1)
torch.manual_seed(0)
clip = open_clip.create_model(f"local-dir:{arguments.folder / 'clip'}")
freeze(clip)
shards = sorted((arguments.folder / "scenes").glob("train-*.tar"))
tokens, texts = frozen_features(clip, shards, arguments.scenes)
embedder = VisionEmbedder(tokens.shape[2], texts.shape[1])
loops.train_embedder(
    embedder,
    functools.partial(loops.pacl, group=group),
    tokens,
    texts,
    Losses(arguments.steps, group.rank() if group else 0),
    batch_size=arguments.batch_size,
    seed=0,
    group=group,
)
if group is not None:
    dist.destroy_process_group()
