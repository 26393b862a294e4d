"""Train as `train_loop.py` does, in several processes with one batch; the losses are the same for any number of them.

torchrun --nproc-per-node 2 examples/ddp.py demo/scenes/train-*.tar --model local-dir:demo/clip
torchrun --nproc-per-node 1 examples/ddp.py demo/scenes/train-*.tar --model local-dir:demo/clip
"""

import argparse
import io
import itertools
import math
import os
from pathlib import Path

import open_clip
import torch
import torch.distributed as dist
import webdataset
from PIL import Image
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from pacl_kernels import fused_pacl_loss

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("shards", nargs="+", type=Path)
parser.add_argument("--model", required=True, help="An open_clip model with a ViT, or local-dir:FOLDER.")
parser.add_argument("--pretrained", help="The tag of the model's weights; none for local-dir:FOLDER.")
parser.add_argument("--pairs", type=int, default=2000, help="Most pairs to read from the shards.")
parser.add_argument("--batch-size", type=int, default=64, help="Pairs in a batch of all processes together.")
parser.add_argument("--epochs", type=int, default=5)
args = parser.parse_args()
for path in args.shards:
    if not path.is_file():
        parser.error(f"shards: got {path}, which is not a file; expected tar files")
scheme, _, folder = args.model.partition(":")
if not args.pretrained and not (scheme == "local-dir" and Path(folder, "open_clip_config.json").is_file()):
    parser.error(f"--model: got {args.model} without --pretrained, expected local-dir: and a folder with its weights")
if "WORLD_SIZE" not in os.environ:
    parser.error("got a single process without WORLD_SIZE, expected torchrun to start this file")
world = int(os.environ["WORLD_SIZE"])
if args.batch_size % world:
    parser.error(f"--batch-size: got {args.batch_size}, expected a multiple of the {world} processes")


class Head(torch.nn.Module):
    """Map tokens [B, N, width] to patch embeddings [B, N, D], and hold the logit scale."""

    def __init__(self, width: int, dim: int):
        super().__init__()
        self.layer = torch.nn.Linear(width, dim)
        self.log_scale = torch.nn.Parameter(torch.tensor(math.log(20.0)))

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.layer(tokens), self.log_scale.exp()


def collate(samples: list[tuple[bytes, bytes]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images [B, 3, H, W] and token ids [B, L]."""
    images = [preprocess(Image.open(io.BytesIO(image))) for image, _ in samples]
    return torch.stack(images), tokenize([caption.decode() for _, caption in samples])


device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
torch.manual_seed(0)
clip, _, preprocess = open_clip.create_model_and_transforms(args.model, pretrained=args.pretrained, device=device)
tokenize = open_clip.get_tokenizer(args.model)
clip.eval().requires_grad_(False)
clip.visual.output_tokens = True  # the tower now returns its patch tokens too

# Every process reads the same pairs. The sampler gives each one its part of the batch that one process would draw.
shards = webdataset.WebDataset([str(path) for path in args.shards], shardshuffle=False, nodesplitter=None)
pairs = list(itertools.islice(shards.to_tuple("jpg;png;webp", "txt"), args.pairs))
if len(pairs) < args.batch_size:
    parser.error(f"shards: got {len(pairs)} pairs, expected at least one batch ({args.batch_size})")
sampler = DistributedSampler(pairs, seed=0, drop_last=True)
loader = DataLoader(pairs, args.batch_size // world, sampler=sampler, collate_fn=collate, drop_last=True)

model = DistributedDataParallel(Head(*clip.visual.proj.shape).to(device))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for epoch in range(args.epochs):
    sampler.set_epoch(epoch)
    for images, captions in loader:
        with torch.no_grad():
            _, tokens = clip.visual(images.to(device))  # [B / world, N, width]
            texts = clip.encode_text(captions.to(device))  # [B / world, D]
        patches, scale = model(tokens)
        loss = fused_pacl_loss(patches, texts, scale, attn_temperature=0.05, form="cosine", group="world")
        optimizer.zero_grad()
        loss.backward()  # DDP averages the gradients, which gives those of the whole batch
        optimizer.step()
    if dist.get_rank() == 0:
        print(f"epoch {epoch + 1}: loss {loss.item():.6f}", flush=True)
dist.destroy_process_group()
