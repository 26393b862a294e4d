"""Segment a photo by words: every pixel gets the word that fits it best.

python examples/segment_photo.py photo.jpg "dog, puppy" grass sky --checkpoint demo/embedder --out segmented
"""

import argparse
from pathlib import Path

import numpy as np
from pacl import Segmenter, load_pacl, overlay, word_colours
from PIL import Image, ImageOps

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("image", type=Path)
parser.add_argument("words", nargs="+", help="One word for each label; commas separate its synonyms.")
parser.add_argument("--checkpoint", required=True, help="Folder of an embedder, or its name on the Hub.")
parser.add_argument("--out", type=Path, default=Path("segmented"), help="Folder to write to.")
args = parser.parse_args()
try:
    image = ImageOps.exif_transpose(Image.open(args.image)).convert("RGB")
except OSError:
    parser.error(f"image: got {args.image}, expected an image that Pillow can read")
try:
    towers, embedder = load_pacl(args.checkpoint)
except ValueError as error:
    parser.error(f"--checkpoint: {error}")

labels = Segmenter(towers, embedder, stride=2).labels(image, args.words).numpy()  # int16 [H, W]: 0 is the first word

args.out.mkdir(parents=True, exist_ok=True)
Image.fromarray(labels.astype(np.uint8)).save(args.out / "labels.png")
overlay(image, labels, colours=word_colours(len(args.words))).save(args.out / "overlay.png")
for label, word in enumerate(args.words):
    print(f"{word}: {(labels == label).mean():.1%} of the pixels")
