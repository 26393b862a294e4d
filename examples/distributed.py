"""Train the demo's embedder in several processes; the losses equal those of one process with the whole batch.

torchrun --nproc-per-node 2 examples/distributed.py demo    # the folder that `pacl demo --out demo` wrote
python examples/distributed.py demo                         # the same in one process
"""

import argparse
import os
from pathlib import Path

import open_clip
import torch
import torch.distributed as dist
from pacl.backbones import freeze
from pacl.demo.training import embedder_config, embedder_pairs, frozen_features
from pacl.embedder import VisionEmbedder
from pacl.training.model import Trainable
from pacl.training.trainer import Trainer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", type=Path)
parser.add_argument("--scenes", type=int, default=2000)
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--batch-size", type=int, default=64, help="Pairs in a batch of all processes together.")
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
config = embedder_config(arguments.steps, arguments.batch_size)
model = Trainable(VisionEmbedder(tokens.shape[2], texts.shape[1]), config)
trainer = Trainer(model, config, arguments.steps, group=group)
rank, world = (group.rank(), group.size()) if group else (0, 1)
batches = embedder_pairs(tokens, texts, arguments.batch_size, seed=0, rank=rank, world=world)
for step, pairs in zip(range(arguments.steps), batches, strict=False):
    loss = trainer.step(step, pairs)
    if rank == 0 and (step == 0 or (step + 1) % 20 == 0):
        print(f"step {step + 1}: loss {loss.item():.6f}", flush=True)
if group is not None:
    dist.destroy_process_group()
