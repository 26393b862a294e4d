"""Train with Lightning on the batch of all processes; the losses are the same for any number of them.

python examples/recipes/lightning_module.py                                # one process
python examples/recipes/lightning_module.py --devices 2                    # DDP
python examples/recipes/lightning_module.py --devices 2 --how fsdp         # FSDP2, by Lightning's ModelParallelStrategy
python examples/recipes/lightning_module.py --devices 2 --how cached       # DDP, with activations of 4 pairs at a time
"""

import argparse
import math

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

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


class Pacl(L.LightningModule):
    """Train a model that returns patches, texts and a logit scale, `batch_size` pairs of all processes together."""

    def __init__(self, model: nn.Module, data: Dataset, batch_size: int, max_scale: float):
        super().__init__()
        self.model, self.data, self.batch_size, self.max_scale = model, data, batch_size, max_scale
        self.loss = PaclLoss(attn_temperature=0.05, form="cosine", group="world")

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        patches, texts, scale = self.model(*batch)
        loss = self.loss(patches, texts, scale)
        self.log("loss", loss)  # the same in every process, so it needs no sync_dist
        return loss

    def on_train_batch_end(self, *_) -> None:
        with torch.no_grad():
            self.model.log_scale.clamp_(max=math.log(self.max_scale))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)

    def train_dataloader(self) -> DataLoader:
        # Lightning's own sampler draws another order than one process does, and repeats pairs to fill the last batch.
        world = self.trainer.world_size
        sampler = DistributedSampler(self.data, world, self.trainer.global_rank, seed=0, drop_last=True)
        return DataLoader(self.data, self.batch_size // world, sampler=sampler, drop_last=True)


class ShardedPacl(Pacl):
    """Shard the parameters with FSDP2."""

    def configure_model(self) -> None:
        data_parallel = self.device_mesh["data_parallel"]
        fully_shard(self.model, mesh=data_parallel)
        self.loss.group = data_parallel.get_group()  # processes of a tensor-parallel group have the same pairs


class CachedPacl(Pacl):
    """Keep the activations of only 4 pairs in memory, and contrast all pairs of the batch."""

    def __init__(self, *args):
        super().__init__(*args)
        self.automatic_optimization = False  # cached_step runs the backward

    def forward(self, images: Tensor, captions: Tensor) -> tuple[Tensor, ...]:
        return self.model(images, captions)

    def training_step(self, batch: list[Tensor], index: int) -> None:
        optimizer, wrapped = self.optimizers(), self.trainer.model  # this module, wrapped in DDP
        modules = [wrapped] if self.trainer.world_size > 1 else []
        optimizer.zero_grad()
        loss = cached_step(lambda part: wrapped(*part), batch, self.loss, micro_batch=4, modules=modules)
        optimizer.step()
        self.log("loss", loss)


class PrintLosses(L.Callback):
    """Print the loss after every step, once."""

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_) -> None:
        if trainer.is_global_zero:
            print(f"step {trainer.global_step}: loss {trainer.callback_metrics['loss'].item():.6f}", flush=True)


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
    parser.add_argument("--devices", type=int, default=1, help="Number of processes.")
    parser.add_argument("--how", choices=["ddp", "fsdp", "cached"], default="ddp")
    parser.add_argument("--batch-size", type=int, default=16, help="Pairs in a batch of all processes together.")
    parser.add_argument("--max-scale", type=float, default=100.0, help="Largest logit scale.")
    parser.add_argument("--precision", default="32-true", help="Lightning's precision, such as bf16-mixed.")
    parser.add_argument("--steps", type=int, default=6)
    args = parser.parse_args()
    if args.batch_size % args.devices:
        parser.error(f"--batch-size: got {args.batch_size}, expected a multiple of the {args.devices} processes")

    L.seed_everything(0)
    if args.how == "fsdp":
        strategy = ModelParallelStrategy(data_parallel_size=args.devices, tensor_parallel_size=1)
    else:
        strategy = DDPStrategy() if args.devices > 1 else "auto"
    data = pairs(args.batch_size * args.steps)
    kind = {"ddp": Pacl, "fsdp": ShardedPacl, "cached": CachedPacl}[args.how]
    trainer = L.Trainer(
        max_epochs=1, devices=args.devices, strategy=strategy, precision=args.precision, callbacks=[PrintLosses()],
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(kind(Towers(), data, args.batch_size, args.max_scale))


if __name__ == "__main__":
    main()
