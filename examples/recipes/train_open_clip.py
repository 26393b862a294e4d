"""Train an open_clip model with open_clip_train, which gets its patch tokens and this loss. The flags are its own.

python examples/recipes/train_open_clip.py --train-data pairs.csv --model ViT-B-16
torchrun --nproc-per-node 8 -- examples/recipes/train_open_clip.py --train-data pairs.csv --model ViT-B-16
"""

import sys

import open_clip.factory
import torch
from open_clip_train import main, train
from open_clip_train.distributed import is_master
from open_clip_train.precision import get_autocast
from pacl import patch_tokens

from pacl_kernels import PaclLoss, compatibility

CHOICES = {"attn_temperature": 0.05, "form": "cosine"}


class PatchCLIP(open_clip.CLIP):
    """CLIP of open_clip whose image features are its patch tokens, projected: `[B, N, D]`."""

    def encode_image(self, image, normalize=False):  # the loss normalises
        return patch_tokens(self.visual, image) @ self.visual.proj


def create_loss(args):
    loss = "sigmoid" if args.siglip else "infonce"
    return PaclLoss(**CHOICES, loss=loss, rank=args.rank, world_size=args.world_size, group="world")


class Scores(torch.nn.Module):
    """Stand for `model` in open_clip_train's `evaluate`, where an image's features times a text's are their score.

    The features of an image are its φ with all M texts, and those of text k are row k of the identity `[M, M]`.
    """

    def __init__(self, model, texts):
        super().__init__()
        self.model, self.texts, self.seen = model, texts, 0
        self.module = self.forward  # DDP is unwrapped already; see `evaluate`

    def forward(self, images, texts):
        phi = compatibility(self.model.encode_image(images), self.texts, **CHOICES)
        rows = torch.arange(self.seen, self.seen + len(images), device=phi.device)
        self.seen += len(images)
        one_hot = torch.nn.functional.one_hot(rows, len(self.texts)).to(phi)
        return {"image_features": phi, "text_features": one_hot, "logit_scale": self.model.logit_scale.exp()}


def evaluate(model, data, epoch, args, **options):
    """Validate as open_clip_train does, by φ. The validation data is read twice: for the texts, then for the images."""
    due = args.val_frequency and (epoch % args.val_frequency == 0 or epoch == args.epochs)
    if due and is_master(args):
        model = train.unwrap_model(model).eval()
        with torch.inference_mode(), get_autocast(args.precision, torch.device(args.device).type)():
            texts = [model.encode_text(texts.to(args.device)) for _, texts in data["val"].dataloader]
        model = Scores(model, torch.cat(texts))
    return train.evaluate(model, data, epoch, args, **options)


if __name__ == "__main__":
    if any(word.startswith("--imagenet") for word in sys.argv):
        sys.exit("--imagenet-val and --imagenet-v2: got one of them, expected --val-data: they need pooled features")
    open_clip.factory.CLIP = PatchCLIP
    main.create_loss, main.evaluate = create_loss, evaluate
    sys.exit(main.main(sys.argv[1:]))
