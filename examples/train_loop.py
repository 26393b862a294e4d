"""Train a layer on a frozen CLIP so that its patches match words: a plain PyTorch loop around `fused_pacl_loss`.

python examples/train_loop.py demo/scenes/train-*.tar --model local-dir:demo/clip    # after `pacl demo --out demo`
python examples/train_loop.py cc3m-*.tar --model ViT-B-16-quickgelu --pretrained openai

The shards are tar files of images, each with its caption in a .txt member of the same name.
"""

import argparse
import math
import random
from pathlib import Path

import open_clip
import torch
import webdataset

from pacl_kernels import fused_pacl_loss

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("shards", nargs="+", type=Path)
parser.add_argument("--model", required=True, help="An open_clip model with a ViT, or local-dir:FOLDER.")
parser.add_argument("--pretrained", help="The tag of the model's weights; none for local-dir:FOLDER.")
parser.add_argument("--batch-size", type=int, default=64)
parser.add_argument("--steps", type=int, default=200)
args = parser.parse_args()
for path in args.shards:
    if not path.is_file():
        parser.error(f"shards: got {path}, which is not a file; expected tar files")
scheme, _, folder = args.model.partition(":")
if not args.pretrained and not (scheme == "local-dir" and Path(folder, "open_clip_config.json").is_file()):
    parser.error(f"--model: got {args.model} without --pretrained, expected local-dir: and a folder with its weights")

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
clip, _, preprocess = open_clip.create_model_and_transforms(args.model, pretrained=args.pretrained, device=device)
tokenize = open_clip.get_tokenizer(args.model)
clip.eval().requires_grad_(False)
clip.visual.output_tokens = True  # the tower now returns its patch tokens too

shards = webdataset.WebDataset([str(path) for path in args.shards], shardshuffle=False)
pairs = shards.shuffle(1000, rng=random.Random(0)).decode("pil").to_tuple("jpg;png;webp", "txt")
pairs = pairs.map_tuple(preprocess, lambda caption: tokenize(caption)[0]).repeat()

layer = torch.nn.Linear(*clip.visual.proj.shape).to(device)  # from the tokens' width to the text embeddings'
log_scale = torch.nn.Parameter(torch.tensor(math.log(20.0), device=device))
optimizer = torch.optim.AdamW([*layer.parameters(), log_scale], lr=1e-3)
for step, (images, captions) in enumerate(torch.utils.data.DataLoader(pairs, args.batch_size), 1):
    with torch.no_grad():
        _, tokens = clip.visual(images.to(device))  # [B, N, width]
        texts = clip.encode_text(captions.to(device))  # [B, D]
    loss = fused_pacl_loss(layer(tokens), texts, log_scale.exp(), attn_temperature=0.05, form="cosine")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step == 1 or step % 20 == 0:
        print(f"step {step}: loss {loss.item():.6f}", flush=True)
    if step == args.steps:
        break
