"""Train under FSDP2 or DDP with batches beyond memory; the losses are the same for any number of processes.

torchrun --nproc-per-node 2 examples/recipes/fsdp_cached.py              # FSDP2
torchrun --nproc-per-node 2 examples/recipes/fsdp_cached.py --how ddp
"""

import argparse
import math
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from pacl_kernels import PaclLoss, cached_step


class Towers(nn.Module):
    """Stand for a CLIP: return patches [B, 16, 24], texts [B, 24] and the logit scale [1]."""

    def __init__(self):
        super().__init__()
        self.vision = nn.Conv2d(3, 48, 8, stride=8)
        self.head = nn.Sequential(nn.GELU(), nn.Linear(48, 24))
        self.text = nn.EmbeddingBag(64, 24)
        self.log_scale = nn.Parameter(torch.tensor([math.log(20.0)]))  # FSDP takes no parameters of zero dimensions

    def forward(self, images: Tensor, captions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tokens = self.vision(images).flatten(2).transpose(1, 2)
        return self.head(tokens), self.text(captions), self.log_scale.exp()


def wrap(model: Towers, how: str, device: torch.device) -> nn.Module:
    """Put the model under DDP or FSDP2."""
    if how == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for part in (model.vision, model.head, model.text):  # in a transformer: its blocks
        fully_shard(part, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def pairs(count: int) -> TensorDataset:
    """Return images [count, 3, 32, 32], noise with a square in one of 64 colours, and captions [count, 1]."""
    generator = torch.Generator().manual_seed(1)
    colours, captions = torch.randn(64, 3, generator=generator), torch.randint(64, (count, 1), generator=generator)
    images = 0.3 * torch.randn(count, 3, 32, 32, generator=generator)
    for image, caption, cell in zip(images, captions, torch.randint(16, (count,), generator=generator), strict=True):
        row, column = 8 * (int(cell) // 4), 8 * (int(cell) % 4)
        image[:, row : row + 8, column : column + 8] += colours[caption[0], :, None, None]
    return TensorDataset(images, captions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--how", choices=["fsdp", "ddp"], default="fsdp")
    parser.add_argument("--batch-size", type=int, default=16, help="Pairs in a batch of all processes together.")
    parser.add_argument("--micro-batch", type=int, default=4, help="Pairs that a process encodes at a time.")
    parser.add_argument("--max-scale", type=float, default=100.0, help="Largest logit scale.")
    parser.add_argument("--steps", type=int, default=6)
    args = parser.parse_args()
    if "WORLD_SIZE" not in os.environ:
        parser.error("got a single process without WORLD_SIZE, expected torchrun to start this file")
    world = int(os.environ["WORLD_SIZE"])
    if args.batch_size % world:
        parser.error(f"--batch-size: got {args.batch_size}, expected a multiple of the {world} processes")

    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(0)  # the same weights in every process
    towers = Towers().to(device)
    model = wrap(towers, args.how, device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    loss_of = PaclLoss(attn_temperature=0.05, form="cosine", group="world")
    data = pairs(args.batch_size * args.steps)
    sampler = DistributedSampler(data, seed=0, drop_last=True)
    for step, batch in enumerate(DataLoader(data, args.batch_size // world, sampler=sampler, drop_last=True), 1):
        batch = [x.to(device) for x in batch]
        optimizer.zero_grad()
        # Two passes over micro-batches; gradients are those of the whole batch, and travel once.
        loss = cached_step(lambda part: model(*part), batch, loss_of, micro_batch=args.micro_batch, modules=[model])
        optimizer.step()
        with torch.no_grad():
            towers.log_scale.clamp_(max=math.log(args.max_scale))
        if dist.get_rank() == 0:
            print(f"step {step}: loss {loss.item():.6f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
