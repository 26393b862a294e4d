"""Train on several captions of each image with a sigmoid loss and text-conditioned pooling, as FLAIR does.

python examples/recipes/flair_like.py
torchrun --nproc-per-node 2 examples/recipes/flair_like.py

FLAIR pools the patches of each image for a sample of the batch's captions, because pooling for all of them is costly
there. Here every image meets every caption of the batch. The pooling has one head without projections of its own
(`form="cosine"`). Any number of processes prints the same losses. The features are made up: each of an image's captions
describes one of its objects, which covers 3 of 16 patches.
"""

import argparse
import math
import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from pacl_kernels import compatibility, fused_pacl_loss

PATCHES, WIDTH, DIM = 16, 64, 32
POOLING = {"form": "cosine", "attn_temperature": 0.1}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--batch-size", type=int, default=32, help="Images in a batch of all processes together.")
parser.add_argument("--captions", type=int, default=4, help="Captions of each image, at most 5.")
args = parser.parse_args()
rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
if args.batch_size % world:
    parser.error(f"--batch-size: got {args.batch_size}, expected a multiple of the {world} processes")
if not 1 <= args.captions <= 5:
    parser.error(f"--captions: got {args.captions}, expected 1 to 5")


class Model(torch.nn.Module):
    """Map features of patches [B, N, WIDTH] and of captions [B, K, WIDTH] to one space; hold logit scale and bias."""

    def __init__(self):
        super().__init__()
        self.patch, self.text = torch.nn.Linear(WIDTH, DIM), torch.nn.Linear(WIDTH, DIM)
        self.log_scale = torch.nn.Parameter(torch.tensor(math.log(10.0)))
        self.bias = torch.nn.Parameter(torch.tensor(-10.0))  # at first nearly all pairs are negatives

    def forward(self, patches: torch.Tensor, captions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # DDP wants every parameter to be used in forward, so the scalars are outputs too.
        return self.patch(patches), self.text(captions).flatten(0, 1), self.log_scale.exp(), self.bias * 1


def draw(images: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features of patches [images, 16, WIDTH] and of captions [images, K, WIDTH]."""
    objects, patches = torch.randn(images, args.captions, WIDTH), torch.randn(images, PATCHES, WIDTH)
    patches[:, : 3 * args.captions] += objects.repeat_interleave(3, 1)
    return patches, objects + 0.3 * torch.randn(objects.shape)


torch.manual_seed(0)  # in every process: all draw the same batches, and each takes its rows
model = Model()
if "WORLD_SIZE" in os.environ:
    dist.init_process_group("gloo")
wrapped = DistributedDataParallel(model) if dist.is_initialized() else model
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
mine = slice(rank * args.batch_size // world, (rank + 1) * args.batch_size // world)
image_ids = torch.arange(args.batch_size)[mine]  # ids count in the batch of all processes
text_ids = image_ids.repeat_interleave(args.captions)
for step in range(1, args.steps + 1):
    patches, texts, scale, bias = wrapped(*(x[mine] for x in draw(args.batch_size)))
    loss = fused_pacl_loss(
        *(patches, texts, scale),
        **POOLING,
        loss="sigmoid",
        logit_bias=bias,
        image_ids=image_ids,
        text_ids=text_ids,
        group="world",
    )
    optimizer.zero_grad()
    loss.backward()  # DDP averages the gradients, which gives those of the whole batch
    optimizer.step()
    with torch.no_grad():
        model.log_scale.clamp_(0, math.log(100))
    if rank == 0 and (step == 1 or step % 20 == 0):
        print(f"step {step}: loss {loss.item():.6f}", flush=True)

with torch.no_grad():
    patches, texts, *_ = model(*draw(100))
    best = compatibility(patches, texts, **POOLING).argmax(0)  # the image [100 K] of each text
if rank == 0:
    right = best == torch.arange(100).repeat_interleave(args.captions)
    print(f"R@1 among 100 unseen images: {100 * right.float().mean():.1f} %")
if dist.is_initialized():
    dist.destroy_process_group()
