"""Run `pacl look` and `pacl segment`: write pictures, label maps and scores of images and videos for words."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from ..commands import LEFT_OUT, next_command
from ..files import write_bytes
from ..formats import printable
from ..processes import from_first, gather_objects, patient_group, place_in, process_device
from ..readings import best_reading
from ..sharing import load_model
from .draw import label_image, overlay, png, voc_palette, with_legend, word_colours
from .frames import Frames, is_video
from .images import READ, find_images, read_image, why_left_out
from .options import LookOptions, SegmenterOptions, SegmentOptions, ServeOptions
from .predict import Dense, Segmenter
from .prompts import Texts, read_classes, templates
from .video import Drawn, VideoResults

LEGEND = 12  # classes in the legend of a video, whose size must not change
WINDOWS = ("short_side", "window", "window_stride")  # options of a Segmenter besides its stride


def make_segmenter(options: SegmenterOptions, **windows: int | None) -> Segmenter:
    """Make the segmenter of a checkpoint, or of a model alone, whose best reading it chooses and prints by default.

    Raises ValueError for an open_clip model without weights, and for a reading that does not fit.
    """
    names = (options.checkpoint, options.model or "", options.pretrained)  # a checkpoint names its own model
    chosen = options.tokens, options.proxy
    towers, embedder = load_model(*names, process_device(options.device), *chosen, text_model=options.text_model)
    if embedder is None and chosen == (None, None):
        tokens, reason = best_reading(towers.visual)
        towers = towers.read(tokens)
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(f"tokens: {tokens} ({reason}); --tokens takes another reading", flush=True)
    return Segmenter(towers, embedder, stride=options.stride, **windows)


def run(options: LookOptions | SegmentOptions) -> int:
    """Look at or segment the images; return 0, or LEFT_OUT if some of them could not be used.

    The processes that torchrun started share the images, and all return the same. Raises ValueError or OSError for
    wrong options, if no image could be used, and for a folder that cannot be written.
    """
    mine = not dist.is_initialized()  # leave a caller's group as it is
    group = patient_group()
    try:
        return _run(options, group)
    finally:
        if mine and dist.is_initialized():
            dist.destroy_process_group()


def _run(options: LookOptions | SegmentOptions, group: dist.ProcessGroup | None) -> int:
    rule = {"threshold": options.threshold, "entropy": options.entropy, "logit_scale": options.logit_scale}
    words = (
        (options.words or "").split(",") if options.classes is None else map(", ".join, read_classes(options.classes))
    )
    sentences = templates(options.templates)
    folders = isinstance(options, SegmentOptions) and options.video
    paths = from_first(lambda: find_images(options.images, without=options.out, folders=folders), group)
    segmenter = make_segmenter(options, **{name: getattr(options, name) for name in WINDOWS})
    texts = segmenter.texts(list(words), sentences)
    extremes: list[float] = []
    film: Callable[[Path], VideoResults] = _no_video
    if isinstance(options, LookOptions):
        show = _look(options, segmenter, texts, rule, extremes)
    else:
        show, film = _segment(options, segmenter, texts, rule)
    rank, world = place_in(group)
    named = list(zip(paths, _stems(paths, options.images), strict=True))[rank::world]
    whole = sum(gather_objects(_write(options, segmenter, named, show, film, group), group), [])
    extremes = sum(gather_objects(extremes, group), [])
    videos = [path for path in paths if is_video(path, folders)]

    def report() -> None:
        if not whole:
            expected = "videos with frames" if videos else f"{READ} files"
            raise ValueError(f"images: got {len(paths)} that cannot be used, expected {expected}")
        skipped = len(paths) - len(whole)
        kinds = "image(s)" if not videos else "video(s)" if len(videos) == len(paths) else "images and videos"
        print(f"{len(whole)} {kinds} in {options.out}" + (f", {skipped} skipped" if skipped else ""), flush=True)
        if isinstance(options, LookOptions) and (advice := _scale_advice(min(extremes), max(extremes), options.scale)):
            print(advice)
        if len(videos) < len(paths):  # the page shows images alone
            print(_next(options), flush=True)

    from_first(report, group)
    return 0 if len(whole) == len(paths) and all(whole) else LEFT_OUT


def _write(
    options: LookOptions | SegmentOptions,
    segmenter: Segmenter,
    named: list[tuple[Path, str]],
    show: Callable,
    film: Callable[[Path], VideoResults],
    group: dist.ProcessGroup | None,
) -> list[bool]:
    """Write the files that `show` yields for each image, and the results that `film` returns for each video.

    named: the images and videos, each with the start of its output names. Returns, for each that was written, whether
    all of it could be read. A bad one is named and left out; a full disk ends the run.
    """
    whole = []
    for path, stem in named:
        video, files = None, {}
        try:
            if is_video(path, isinstance(options, SegmentOptions) and options.video):
                video = film(path)
            else:
                image = read_image(path, options.max_image_pixels)
                files = dict(show(path, image, segmenter.dense(image)))
        except BrokenPipeError:  # the reader of standard output has seen enough
            raise
        except Exception as error:  # decoders raise anything on damaged bytes; one image may exceed the memory
            print(printable(f"skipped {path}: {why_left_out(path, error)}"), file=sys.stderr, flush=True)
            continue
        for name, data in files.items():
            write_bytes(options.out / f"{stem}-{name}", data)
        whole.append(video is None or video.write(options.out / stem, group))
    return whole


def _scale_advice(lowest: float, highest: float, scale: tuple[float, float]) -> str | None:
    """Return a sentence if no cosine leaves the darkest eighth of the colours, or the brightest; None otherwise."""
    eighth = (scale[1] - scale[0]) / 8
    if highest < scale[0] + eighth:
        seen = f"the highest cosine is {highest:.2f}, so the maps are uniformly dark"
    elif lowest > scale[1] - eighth:
        seen = f"the lowest cosine is {lowest:.2f}, so the maps are uniformly bright"
    else:
        return None
    low, high = math.floor(100 * lowest) / 100, math.floor(100 * highest + 1) / 100
    return f"On colours from {scale[0]:g} to {scale[1]:g}, {seen}: --scale={low:.2f},{high:.2f} shows differences."


def _next(options: LookOptions | SegmentOptions) -> str:
    """Return the line that names the command to type next: label maps after `look`, the page after `segment`."""
    if isinstance(options, LookOptions):
        return next_command("segment", *options.images, *_flags(options, SegmentOptions))
    first = options.images[0]
    return next_command(
        "serve", "--examples", first if first.is_dir() else first.parent, *_flags(options, ServeOptions)
    )


def _flags(options: LookOptions | SegmentOptions, kind: type) -> list[str]:
    """Return the flags of `options`, less images and folders, that differ from their defaults and that `kind` has."""
    flags = []
    for field in dataclasses.fields(kind):
        value = getattr(options, field.name, None)
        if field.name not in ("images", "out") and value is not None and value != field.default:
            flags.append(f"--{field.name.replace('_', '-')}={value}")
    return flags


def _look(options: LookOptions, segmenter: Segmenter, texts: Texts, rule: dict, extremes: list[float]) -> Callable:
    """Return the function that draws an image; it adds the image's lowest and highest cosine to `extremes`."""
    has_background, names, colours = _labels(texts, rule, word_colours)

    def show(path: Path, image: Image.Image, dense: Dense) -> Iterator[tuple[str, bytes]]:
        labels = dense.labels(texts, **rule).labels
        scores = dense.scores(texts)
        extremes.extend((float(scores.min()), float(scores.max())))
        rows = _rows(dense, texts, _shares(labels, len(names)), has_background)
        size = f"{image.width} x {image.height} pixels, {scores.shape[2]} x {scores.shape[1]} tokens"
        lines = [f"{printable(str(path))}: {size}", f"  {'':<24}  highest   mean  of the pixels"]
        for name, row in rows:
            cosines = f"{row['max']:9.3f}{row['mean']:7.3f}" if "max" in row else " " * 16
            lines.append(f"  {printable(name)[:24]:<24}{cosines}{100 * row['pixels']:13.1f} %")
        print("\n".join(lines), flush=True)
        entries = [
            (colour, name, f"{100 * row['pixels']:.0f} %") for colour, (name, row) in zip(colours, rows, strict=True)
        ]
        yield "overlay.png", png(with_legend(overlay(image, labels, colours=colours), entries))
        for i, (name, values) in enumerate(zip(texts.names, scores, strict=True), 1):
            picture = overlay(image, dense.enlarged(values[None])[0], scale=options.scale)
            entry = (None, name, f"{float(values.max()):.2f}")
            yield f"{i:02}-{_slug(name)}.png", png(with_legend(picture, [entry], options.scale))

    return show


def _no_video(path: Path) -> VideoResults:
    raise ValueError("got a video, which pacl segment reads, expected an image")


def _segment(
    options: SegmentOptions, segmenter: Segmenter, texts: Texts, rule: dict
) -> tuple[Callable, Callable[[Path], VideoResults]]:
    """Return the function that segments an image, and the one that segments a video."""
    if not 0 <= options.temporal < 1:
        raise ValueError(f"temporal: got {options.temporal:g}, expected at least 0 and less than 1")
    palette = word_colours if options.words else voc_palette
    has_background, names, colours = _labels(texts, rule, palette)
    settings = {name: getattr(segmenter, name) for name in ("stride", *WINDOWS)}
    settings |= {"templates": options.templates, "model": options.checkpoint or options.model}
    settings |= {"tokens": segmenter.towers.reading, **rule}

    def show(path: Path, image: Image.Image, dense: Dense) -> Iterator[tuple[str, bytes]]:
        labels = dense.labels(texts, **rule).labels
        shares = _shares(labels, len(names))
        present = sorted(np.flatnonzero(shares), key=lambda i: -shares[i])[:40]
        entries = [(colours[i], names[i], f"{100 * shares[i]:.0f} %") for i in present]
        yield "overlay.png", png(with_legend(overlay(image, labels, colours=colours), entries), level=1)
        yield "labels.png", png(label_image(labels, colours))
        rows = _rows(dense, texts, shares, has_background)
        found = {"image": str(path), "size": list(dense.size), "settings": settings}
        classes = [{"label": i, "name": name, **row} for i, (name, row) in enumerate(rows)]
        yield "scores.json", (json.dumps(found | {"classes": classes}, indent=1) + "\n").encode()

    def draw(image: Image.Image, dense: Dense) -> Drawn:
        labels = dense.labels(texts, **rule).labels
        shares = _shares(labels, len(names))
        present = sorted(np.argsort(shares)[::-1][:LEGEND])
        entries = [(colours[i], names[i], f"{100 * shares[i]:.0f} %") for i in present]
        picture = with_legend(overlay(image, labels, colours=colours), entries)
        return Drawn(label_image(labels, colours), shares, picture)

    def film(path: Path) -> VideoResults:
        frames = Frames(path, options.max_image_pixels, options.fps, options.out)
        return VideoResults(frames, segmenter, options.temporal, draw, names)

    return show, film


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


def _stems(paths: Iterable[Path], given: Iterable[Path]) -> Iterator[str]:
    """Yield the start of the output names of each image: its folder below the one that was given, and its own name.

    All differ, also on a file system that ignores case, even if images of two folders have the same name.
    """
    roots = [root for root in given if root.is_dir()]
    seen: dict[str, int] = {}
    for path in paths:
        root = next((root for root in roots if path.is_relative_to(root)), path.parent)
        stem = "/".join(map(_slug, (*path.relative_to(root).parent.parts, path.stem)))
        number = seen[stem.lower()] = seen.get(stem.lower(), 0) + 1
        yield stem if number == 1 else f"{stem}~{number}"


def _slug(word: str) -> str:
    """Return at most 40 characters of a word that are safe in a file name: letters with marks, digits, - and _."""
    safe = "".join(char if char.isalnum() or char in "-_" or _is_mark(char) else " " for char in word)
    return "_".join(safe.split())[:40].strip("_") or "_"


def _is_mark(char: str) -> bool:
    """Return True for a part of a letter: a vowel sign of Devanagari, or an accent."""
    return unicodedata.category(char).startswith("M")
