"""Train a CLIPModel in a loop of accelerate; the losses are the same for any number of processes.

accelerate launch --cpu --num_processes 1 examples/recipes/accelerate_loop.py
accelerate launch --cpu --num_processes 2 examples/recipes/accelerate_loop.py --model siglip --micro-batch 4
"""

import argparse
import math

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from hf_trainer import PaclClip, pairs, random_model
from torch.utils.data import DataLoader

from pacl_kernels import cached_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["clip", "siglip"], default="clip")
    parser.add_argument("--batch-size", type=int, default=16, help="Pairs in a batch of all processes together.")
    parser.add_argument("--micro-batch", type=int, help="Pairs that a process encodes at a time.")
    parser.add_argument("--max-scale", type=float, default=100.0, help="Largest logit scale.")
    parser.add_argument("--bf16", action="store_true", help="Train under autocast to bfloat16.")
    parser.add_argument("--steps", type=int, default=6)
    args = parser.parse_args()

    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="bf16" if args.bf16 else "no",
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),  # one order for any number of processes
    )
    world = accelerator.num_processes
    if args.batch_size % world:
        parser.error(f"--batch-size: got {args.batch_size}, expected a multiple of the {world} processes")
    set_seed(0)
    pacl = PaclClip(random_model(args.model))
    optimizer = torch.optim.Adam(pacl.parameters(), lr=1e-3, eps=1e-3)
    data = pairs(args.batch_size * args.steps, seed=1)
    loader = DataLoader(data, args.batch_size // world, shuffle=True, drop_last=True)
    model, optimizer, loader = accelerator.prepare(pacl, optimizer, loader)
    for step, batch in enumerate(loader, 1):
        optimizer.zero_grad()
        if args.micro_batch:
            with accelerator.autocast():
                loss = cached_step(
                    lambda part: model(**part, return_loss=False),
                    batch,
                    pacl.loss,
                    micro_batch=args.micro_batch,
                    modules=[model] if world > 1 else [],
                )
        else:
            loss = model(**batch)["loss"]
            accelerator.backward(loss)
        optimizer.step()
        with torch.no_grad():
            pacl.clip.logit_scale.clamp_(max=math.log(args.max_scale))
        accelerator.print(f"step {step}: loss {loss.item():.6f}", flush=True)
    accelerator.end_training()


if __name__ == "__main__":
    main()
