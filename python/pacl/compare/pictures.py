"""Segment some images by the embedder of every run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from ..failures import sentence
from ..page import Page, Picture
from ..processes import choose_device
from ..segment.draw import overlay, png, word_colours
from ..segment.images import READ, find_images, read_image, why_left_out
from ..segment.predict import Segmenter
from ..segment.prompts import templates
from ..sharing import load_pacl
from .config import CompareConfig
from .entries import Entry

SIDE = 320  # pixels of a picture's longer side


def add_pictures(page: Page, runs: dict[str, Entry], config: CompareConfig, notes: list[str]) -> None:
    """Add a table of images by runs to the page, and a line to `notes` for everything that cannot be read or loaded.

    Raises ValueError for words, templates or images that are unusable for every run.
    """
    assert config.images is not None and config.words is not None  # checked by the command
    words = [word.strip() for word in config.words.split(",") if word.strip()]
    if not words:
        raise ValueError(f"words: got {config.words!r}, expected at least one word, separated by commas")
    sentences, paths = templates(config.templates), find_images([config.images])
    if len(paths) > config.most_images:
        notes.append(f"{config.images} has {len(paths)} images; the page shows {config.most_images} (--most-images)")
        paths = [paths[int(i)] for i in np.linspace(0, len(paths) - 1, config.most_images)]
    table: dict[Path, list[str | Picture]] = {}
    names: dict[Path, str] = {}
    for path in paths:
        try:
            image = read_image(path, config.max_image_pixels)
        except Exception as error:  # decoders raise anything on damaged bytes
            notes.append(f"{path} is skipped: {why_left_out(path, error)}")
            continue
        names[path] = (path.relative_to(config.images) if config.images.is_dir() else Path(path.name)).as_posix()
        table[path] = [names[path], Picture(png(_small(image)), names[path])]
    embedders = {name: entry.embedder for name, entry in runs.items() if entry.embedder}
    if not table or not embedders:
        notes.append(f"no segmentations: there is no {'embedder' if table else f'readable image ({READ})'}")
        return
    colours = word_colours(len(words) + 1)[1:]
    shown: list[str] = []
    for name, embedder in embedders.items():
        made = []
        try:
            segmenter = Segmenter(*load_pacl(embedder, choose_device(config.device)), stride=config.stride)
            texts = segmenter.texts(words, sentences)
            for path in table:  # read again, because large images are not kept for all runs
                image = read_image(path, config.max_image_pixels)
                small = _small(overlay(image, segmenter.labels(image, texts), colours=colours))
                made.append(Picture(png(small), f"{names[path]} by {name}"))
        except Exception as error:  # loading towers raises anything; still show the other runs
            notes.append(f"{embedder} is not shown: {sentence(error)[:300]}")
            continue
        shown.append(name)
        for row, picture in zip(table.values(), made, strict=True):
            row.append(picture)
    page.heading("Segmentations")
    page.legend(list(zip(colours, words, strict=True)))
    page.table(["image", "", *shown], list(table.values()))
    page.note(f"The best word of every pixel; stride {config.stride}, templates {config.templates}.")


def _small(image: Image.Image) -> Image.Image:
    """Resize to at most SIDE pixels in width and height; enlarge small images by a whole factor."""
    factor = max(1, SIDE // max(image.size))
    image = image.resize([x * factor for x in image.size], Image.Resampling.NEAREST)
    image.thumbnail((SIDE, SIDE))
    return image
