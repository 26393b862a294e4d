"""Run `pacl look` and `pacl segment`: write pictures, label maps and scores of images for words or classes."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..files import write_bytes
from ..formats import one_line, printable
from ..processes import choose_device
from ..sharing import load_model
from .draw import label_image, overlay, png, voc_palette, with_legend, word_colours
from .images import find_images, read_image
from .options import LookOptions, SegmenterOptions, SegmentOptions
from .predict import Dense, Segmenter
from .prompts import Texts, read_classes, templates

WINDOWS = ("short_side", "window", "window_stride")  # options of a Segmenter besides its stride


def make_segmenter(options: SegmenterOptions, **windows: int | None) -> Segmenter:
    """Make the segmenter of a checkpoint or of plain CLIP; raises ValueError for an open_clip model without weights."""
    names = (options.checkpoint, options.model or "", options.pretrained)  # a checkpoint names its own model
    towers, embedder = load_model(*names, choose_device(options.device))
    return Segmenter(towers, embedder, stride=options.stride, **windows)


def run(options: LookOptions | SegmentOptions) -> int:
    """Look at or segment the images and return the exit status, 1 when no image was usable.

    Raises ValueError or OSError for wrong options and for a folder that cannot be written.
    """
    rule = {"threshold": options.threshold, "entropy": options.entropy, "logit_scale": options.logit_scale}
    words = (
        (options.words or "").split(",") if options.classes is None else map(", ".join, read_classes(options.classes))
    )
    sentences = templates(options.templates)
    paths = find_images(options.images)
    segmenter = make_segmenter(options, **{name: getattr(options, name) for name in WINDOWS})
    texts = segmenter.texts(list(words), sentences)
    if isinstance(options, LookOptions):
        return _write(options, segmenter, paths, _look(options, segmenter, texts, rule))
    return _write(options, segmenter, paths, _segment(options, segmenter, texts, rule))


def _write(options: LookOptions | SegmentOptions, segmenter: Segmenter, paths: list[Path], show: Callable) -> int:
    """Write the files that `show` yields for each image; skip and report a bad image, end the run on a full disk."""
    skipped = 0
    for path, stem in zip(paths, _stems(paths), strict=True):
        try:
            image = read_image(path, options.max_image_pixels)
            files = dict(show(path, image, segmenter.dense(image)))
        except Exception as error:  # decoders raise anything on damaged bytes; one image may exceed the memory
            skipped += 1
            reason = one_line(error) or type(error).__name__
            print(printable(f"skipped {path}: {reason[:300]}"), file=sys.stderr, flush=True)
            continue
        for name, data in files.items():
            write_bytes(options.out / f"{stem}-{name}", data)
    done = len(paths) - skipped
    print(f"{done} image(s) in {options.out}" + (f", {skipped} skipped" if skipped else ""), flush=True)
    return 0 if done else 1


def _look(options: LookOptions, segmenter: Segmenter, texts: Texts, rule: dict) -> Callable:
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
            picture = overlay(image, dense.enlarged(values[None])[0], scale=options.scale)
            entry = (None, f"{name}  {float(values.max()):.2f}")
            yield f"{i:02}-{_slug(name)}.png", png(with_legend(picture, [entry], options.scale))

    return show


def _segment(options: SegmentOptions, segmenter: Segmenter, texts: Texts, rule: dict) -> Callable:
    palette = word_colours if options.words else voc_palette
    has_background, names, colours = _labels(texts, rule, palette)
    settings = {name: getattr(segmenter, name) for name in ("stride", *WINDOWS)}
    settings |= {"templates": options.templates, "model": options.checkpoint or options.model, **rule}

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
    """Return whether a rule makes label 0 background, and the name and colour of every label; background is black."""
    has_background = rule["threshold"] is not None or rule["entropy"] is not None
    names = ["background"] * has_background + list(texts.names)
    colours = palette(len(names) + 1)[1:]
    if names[0].lower() == "background":
        colours = np.concatenate([np.zeros((1, 3), np.uint8), colours[:-1]])
    return has_background, names, colours


def _shares(labels: torch.Tensor, count: int) -> list[float]:
    """Return the share of the pixels with each label."""
    return (torch.bincount(labels.flatten().long(), minlength=count) / labels.numel()).tolist()


def _rows(dense: Dense, texts: Texts, shares: list[float], has_background: bool) -> list[tuple[str, dict]]:
    """Return per label: highest and mean cosine over the tokens (none for background by a rule), and pixel share."""
    highest, mean = dense.summary(texts)
    rows = [("background", {"pixels": shares[0]})] if has_background else []
    for name, top, middle, share in zip(texts.names, highest, mean, shares[has_background:], strict=True):
        rows.append((name, {"max": round(float(top), 4), "mean": round(float(middle), 4), "pixels": share}))
    return rows


def _stems(paths: Iterable[Path]) -> Iterator[str]:
    """Yield a file name stem for each image, all different even if images of two folders have the same name."""
    seen: dict[str, int] = {}
    for path in paths:
        stem = _slug(path.stem)
        seen[stem] = seen.get(stem, 0) + 1
        yield stem if seen[stem] == 1 else f"{stem}~{seen[stem]}"


def _slug(word: str) -> str:
    """Return at most 40 characters of a user's word that are safe in a file name: letters, digits, - and _."""
    return re.sub(r"[^\w-]+", "_", word)[:40].strip("_") or "_"
