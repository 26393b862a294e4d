"""Train text-to-video retrieval with X-Pool's attention over frames: the frames of a video are its patches.

python examples/recipes/xpool.py
torchrun --nproc-per-node 2 examples/recipes/xpool.py

X-Pool's attention pooling makes a [videos, texts, D] tensor, whose cosines with the texts go into CLIP's loss. One call
takes the place of pooling, cosines and loss. Any number of processes prints the same losses. The features are made up:
a video shows the subject of its caption in 3 of 12 frames.
"""

import argparse
import math
import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from pacl_kernels import compatibility, fused_pacl_loss

FRAMES, WIDTH, DIM = 12, 64, 32
POOLING = {"form": "cosine", "attn_temperature": 0.01}  # the default of X-Pool's --attention_temperature

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--batch-size", type=int, default=32, help="Videos in a batch of all processes together.")
args = parser.parse_args()
rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
if args.batch_size % world:
    parser.error(f"--batch-size: got {args.batch_size}, expected a multiple of the {world} processes")


class Model(torch.nn.Module):
    """Map features of frames [B, 12, WIDTH] and captions [B, WIDTH] to one space, and hold the logit scale."""

    def __init__(self):
        super().__init__()
        self.frame, self.text = torch.nn.Linear(WIDTH, DIM), torch.nn.Linear(WIDTH, DIM)
        self.log_scale = torch.nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, frames: torch.Tensor, captions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.frame(frames), self.text(captions), self.log_scale.exp()


def draw(videos: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features of frames [videos, 12, WIDTH] and of captions [videos, WIDTH]."""
    subjects, frames = torch.randn(videos, WIDTH), torch.randn(videos, FRAMES, WIDTH)
    frames[:, :3] += 2 * subjects[:, None]
    return frames, subjects + 0.3 * torch.randn(videos, WIDTH)


torch.manual_seed(0)  # in every process: all draw the same batches, and each takes its rows
model = Model()
if "WORLD_SIZE" in os.environ:
    dist.init_process_group("gloo")
wrapped = DistributedDataParallel(model) if dist.is_initialized() else model
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
mine = slice(rank * args.batch_size // world, (rank + 1) * args.batch_size // world)
for step in range(1, args.steps + 1):
    frames, captions, scale = wrapped(*(x[mine] for x in draw(args.batch_size)))
    loss = fused_pacl_loss(frames, captions, scale, group="world", **POOLING)
    optimizer.zero_grad()
    loss.backward()  # DDP averages the gradients, which gives those of the whole batch
    optimizer.step()
    with torch.no_grad():
        model.log_scale.clamp_(max=math.log(100))
    if rank == 0 and (step == 1 or step % 20 == 0):
        print(f"step {step}: loss {loss.item():.6f}", flush=True)

with torch.no_grad():
    frames, captions, _ = model(*draw(200))
    best = compatibility(frames, captions, **POOLING).argmax(0)  # the video [200] of each text
if rank == 0:
    print(f"R@1 among 200 unseen videos: {100 * (best == torch.arange(200)).float().mean():.1f} %")
if dist.is_initialized():
    dist.destroy_process_group()
