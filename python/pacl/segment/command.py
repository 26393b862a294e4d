"""`pacl look` and `pacl segment`: pictures, label maps and scores of images for words or classes."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..files import write_bytes
from ..processes import choose_device
from ..sharing import load_model
from .draw import SCALE, label_image, overlay, png, voc_palette, with_legend, word_colours
from .images import find_images, read_image
from .predict import Dense, Segmenter
from .prompts import TEMPLATES, Texts, read_classes, templates

DESCRIPTIONS = {
    "look": "Where in an image is what the words say: the best word of every pixel as an overlay, and one map per word "
    "on a fixed colour scale. Cosines and shares of pixels are printed.",
    "segment": "Zero-shot segmentation: an overlay, a label map (palette PNG) and scores (JSON) per image. Labels are "
    "numbers of lines of the class file from 0; with --threshold or --entropy, 0 is background and classes begin at 1.",
}

SETTINGS = ("stride", "short_side", "window", "window_stride")  # of a Segmenter


def main(argv: Sequence[str], prog: str) -> int:
    """Run "pacl look" or "pacl segment", as `prog` says; returns its exit status, 1 when no image was usable."""
    command = prog.removeprefix("pacl ")
    arguments = _parser(command).parse_args(argv)
    try:
        rule = {"threshold": arguments.threshold, "entropy": arguments.entropy, "logit_scale": arguments.logit_scale}
        lines = read_classes(arguments.classes) if arguments.classes else arguments.words.split(",")
        sentences = templates(arguments.templates)
        paths = find_images(arguments.images)
        segmenter = make_segmenter(arguments)
        texts = segmenter.texts(lines, sentences)
        show = {"look": _look, "segment": _segment}[command](arguments, segmenter, texts, rule)
        return _run(arguments, segmenter, paths, show)
    except (ValueError, OSError) as error:
        print(f"pacl: error: {error}", file=sys.stderr)
        return 1


def _run(arguments: argparse.Namespace, segmenter: Segmenter, paths: list[Path], show: Callable) -> int:
    """Writes what `show` yields for each image. A bad image is named and left out; a full disk ends the run."""
    skipped = 0
    for path, stem in zip(paths, _stems(paths), strict=True):
        try:
            image = read_image(path, arguments.max_image_pixels)
            files = dict(show(path, image, segmenter.dense(image)))
        except Exception as error:  # decoders raise anything on damaged bytes; memory may not suffice for one image
            skipped += 1
            reason = " ".join(str(error).split()) or type(error).__name__
            print(printable(f"skipped {path}: {reason[:300]}"), file=sys.stderr, flush=True)
            continue
        for name, data in files.items():
            write_bytes(arguments.out / f"{stem}-{name}", data)
    done = len(paths) - skipped
    print(f"{done} image(s) in {arguments.out}" + (f", {skipped} skipped" if skipped else ""), flush=True)
    return 0 if done else 1


def _look(arguments: argparse.Namespace, segmenter: Segmenter, texts: Texts, rule: dict) -> Callable:
    has_background, names, colours = _labels(texts, rule, word_colours)

    def show(path: Path, image: Image.Image, dense: Dense) -> Iterator[tuple[str, bytes]]:
        labels = dense.labels(texts, **rule).labels
        scores = dense.scores(texts)
        rows = _rows(dense, texts, _shares(labels, len(names)), has_background)
        size = f"{image.width} x {image.height} pixels, {scores.shape[2]} x {scores.shape[1]} tokens"
        lines = [f"{printable(str(path))}: {size}", f"  {'':<24}  highest   mean  of the pixels"]
        for name, row in rows:
            cosines = f"{row['max']:9.3f}{row['mean']:7.3f}" if "max" in row else " " * 16
            lines.append(f"  {printable(name)[:24]:<24}{cosines}{100 * row['pixels']:13.1f} %")
        print("\n".join(lines), flush=True)
        entries = [
            (colour, f"{name}  {100 * row['pixels']:.0f} %") for colour, (name, row) in zip(colours, rows, strict=True)
        ]
        yield "overlay.png", png(with_legend(overlay(image, labels, colours=colours), entries))
        for i, (name, values) in enumerate(zip(texts.names, scores, strict=True), 1):
            picture = overlay(image, dense.enlarged(values[None])[0], scale=arguments.scale)
            entry = (None, f"{name}  {float(values.max()):.2f}")
            yield f"{i:02}-{_slug(name)}.png", png(with_legend(picture, [entry], arguments.scale))

    return show


def _segment(arguments: argparse.Namespace, segmenter: Segmenter, texts: Texts, rule: dict) -> Callable:
    palette = word_colours if arguments.words else voc_palette
    has_background, names, colours = _labels(texts, rule, palette)
    settings = {name: getattr(segmenter, name) for name in SETTINGS}
    settings |= {"templates": arguments.templates, "model": arguments.checkpoint or arguments.model, **rule}

    def show(path: Path, image: Image.Image, dense: Dense) -> Iterator[tuple[str, bytes]]:
        labels = dense.labels(texts, **rule).labels
        shares = _shares(labels, len(names))
        present = sorted(np.flatnonzero(shares), key=lambda i: -shares[i])[:40]
        entries = [(colours[i], f"{names[i]}  {100 * shares[i]:.0f} %") for i in present]
        yield "overlay.png", png(with_legend(overlay(image, labels, colours=colours), entries))
        yield "labels.png", png(label_image(labels, colours))
        rows = _rows(dense, texts, shares, has_background)
        found = {"image": str(path), "size": list(dense.size), "settings": settings}
        classes = [{"label": i, "name": name, **row} for i, (name, row) in enumerate(rows)]
        yield "scores.json", (json.dumps(found | {"classes": classes}, indent=1) + "\n").encode()

    return show


def _labels(texts: Texts, rule: dict, palette: Callable[[int], np.ndarray]) -> tuple[bool, list[str], np.ndarray]:
    """Whether a rule makes label 0 background; the name and the colour of every label, background's being black."""
    has_background = rule["threshold"] is not None or rule["entropy"] is not None
    names = ["background"] * has_background + list(texts.names)
    colours = palette(len(names) + 1)[1:]
    if names[0].lower() == "background":
        colours = np.concatenate([np.zeros((1, 3), np.uint8), colours[:-1]])
    return has_background, names, colours


def _shares(labels: torch.Tensor, count: int) -> list[float]:
    """Of the pixels, per label."""
    return (torch.bincount(labels.flatten().long(), minlength=count) / labels.numel()).tolist()


def _rows(dense: Dense, texts: Texts, shares: list[float], has_background: bool) -> list[tuple[str, dict]]:
    """Per label: highest and mean cosine over the tokens (none for background by a rule), and share of the pixels."""
    highest, mean = dense.summary(texts)
    rows = [("background", {"pixels": shares[0]})] if has_background else []
    for name, top, middle, share in zip(texts.names, highest, mean, shares[has_background:], strict=True):
        rows.append((name, {"max": round(float(top), 4), "mean": round(float(middle), 4), "pixels": share}))
    return rows


def make_segmenter(arguments: argparse.Namespace) -> Segmenter:
    """Of the flags' checkpoint, or of plain CLIP; ValueError for an open_clip model without weights."""
    settings = {name: getattr(arguments, name) for name in SETTINGS}
    names = (arguments.checkpoint, arguments.model, arguments.pretrained)
    return Segmenter(*load_model(*names, choose_device(arguments.device)), **settings)


def _stems(paths: Iterable[Path]) -> Iterator[str]:
    """Beginnings of the names of each image's files, all different even where images of two folders have one name."""
    seen: dict[str, int] = {}
    for path in paths:
        stem = _slug(path.stem)
        seen[stem] = seen.get(stem, 0) + 1
        yield stem if seen[stem] == 1 else f"{stem}~{seen[stem]}"


def _slug(word: str) -> str:
    """Of a user's word what may stand in a file name: letters, digits, - and _, at most 40."""
    return re.sub(r"[^\w-]+", "_", word)[:40].strip("_") or "_"


def printable(text: str) -> str:
    """Without control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() else " " for c in text)


def _parser(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"pacl {command}", description=DESCRIPTIONS[command])
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="files, or folders of images")
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument(
        "--checkpoint", metavar="FOLDER", help="an embedder that pacl train or pacl demo wrote, or the Hub's"
    )
    model.add_argument("--model", help="plain CLIP instead: an open_clip model")
    parser.add_argument("--pretrained", metavar="TAG", help="the open_clip model's weights")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--words", help='"dog,grass,red ball"')
    what.add_argument("--classes", type=Path, metavar="FILE", help="a class per line, synonyms behind commas")
    number = {"type": int, "metavar": "N"}
    parser.add_argument("--templates", default="simple", help=f"{', '.join(TEMPLATES)} or a file (%(default)s)")
    parser.add_argument("--stride", default=1, help="tokens per patch along each side (%(default)s)", **number)
    parser.add_argument("--short-side", help="pixels of the resized image (default: the model's)", **number)
    parser.add_argument("--window", help="pixels of a sliding window (default: none)", **number)
    parser.add_argument("--window-stride", help="pixels (default: half a window)", **number)
    parser.add_argument("--threshold", type=float, help="background is where no cosine reaches it")
    parser.add_argument(
        "--entropy", type=float, help="background is where the classes' softmax has more; the paper: 1.5"
    )
    parser.add_argument("--logit-scale", type=float, default=100.0, help="of that softmax (%(default)s)")
    if command == "look":
        parser.add_argument("--scale", type=_scale, default=SCALE, metavar="LOW,HIGH", help="cosines, dark to bright")
    parser.add_argument("--out", type=Path, default=Path(f"pacl-{command}"), metavar="DIR", help="(%(default)s)")
    parser.add_argument("--max-image-pixels", default=25_000_000, help="larger images are skipped", **number)
    parser.add_argument("--device", default="auto", help="(%(default)s)")
    return parser


def _scale(text: str) -> tuple[float, float]:
    low, high = (float(x) for x in text.split(","))
    if low >= high:
        raise argparse.ArgumentTypeError("expected two increasing numbers")
    return low, high
