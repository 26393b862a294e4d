"""Train PACL's head with the paper's loss under DDP, where published ports pool each image for its own caption only.

python examples/recipes/pacl_ports.py
torchrun --nproc-per-node 2 examples/recipes/pacl_ports.py

The ports wrap a model in DataParallel. Its forward pools the patches of an image by its own caption, and CLIP's loss
compares the pooled vectors with all captions. In the paper, an image is pooled anew for every caption of the batch.
So the model returns the patches, and the loss pools them. Any number of processes prints the same losses. The features
are made up: a caption describes what is in 4 of 49 patches.
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from pacl_kernels import compatibility, fused_pacl_loss

PATCHES, WIDTH, DIM = 49, 64, 32
POOLING = {"form": "dot", "attn_temperature": 0.1}  # the ports multiply cosines by 10
SCALE = 10.0  # and divide the logits by a fixed 0.1

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--batch-size", type=int, default=64, help="Images in a batch of all processes together.")
args = parser.parse_args()
rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
if args.batch_size % world:
    parser.error(f"--batch-size: got {args.batch_size}, expected a multiple of the {world} processes")


class Model(torch.nn.Module):
    """Map frozen patch tokens [B, N, WIDTH] to the space of the frozen texts; the paper's residual block."""

    def __init__(self):
        super().__init__()
        self.skip = torch.nn.Linear(WIDTH, DIM)
        self.main = torch.nn.Sequential(torch.nn.Linear(WIDTH, DIM), torch.nn.ReLU(), torch.nn.Linear(DIM, DIM))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        # No pooling here, and no dropout: its numbers would depend on the number of processes.
        return self.main(tokens) + self.skip(tokens)


def draw(images: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return patch tokens [images, 49, WIDTH] and embeddings of captions [images, DIM]."""
    texts, tokens = torch.randn(images, DIM), torch.randn(images, PATCHES, WIDTH)
    tokens[:, :4] += 2 * (texts @ towers)[:, None]
    return tokens, texts


torch.manual_seed(0)  # in every process: all draw the same batches, and each takes its rows
towers = torch.randn(DIM, WIDTH) / DIM**0.5  # how a caption shows in the tokens, for the model to find out
model = Model()
if "WORLD_SIZE" in os.environ:
    dist.init_process_group("gloo")
wrapped = DistributedDataParallel(model) if dist.is_initialized() else model
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
mine = slice(rank * args.batch_size // world, (rank + 1) * args.batch_size // world)
for step in range(1, args.steps + 1):
    tokens, texts = (x[mine] for x in draw(args.batch_size))
    loss = fused_pacl_loss(wrapped(tokens), texts, SCALE, group="world", **POOLING)
    optimizer.zero_grad()
    loss.backward()  # DDP averages the gradients, which gives those of the whole batch
    optimizer.step()
    if rank == 0 and (step == 1 or step % 20 == 0):
        print(f"step {step}: loss {loss.item():.6f}", flush=True)

with torch.no_grad():
    tokens, texts = draw(200)
    best = compatibility(model(tokens), texts, **POOLING).argmax(0)  # the image [200] of each text
if rank == 0:
    print(f"R@1 among 200 unseen images: {100 * (best == torch.arange(200)).float().mean():.1f} %")
if dist.is_initialized():
    dist.destroy_process_group()
