"""Segmentations of some images by the embedder of every run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from ..page import Page, Picture
from ..processes import choose_device
from ..segment.draw import overlay, png, word_colours
from ..segment.images import find_images, read_image
from ..segment.predict import Segmenter
from ..segment.prompts import templates
from ..sharing import load_pacl
from .config import CompareConfig
from .entries import Entry

SIDE = 320  # pixels of a picture's longer side


def add_pictures(page: Page, runs: dict[str, Entry], config: CompareConfig, notes: list[str]) -> None:
    """A table of images by runs; what cannot be read or loaded is a line of `notes`.

    ValueError for words, templates or images that no run could be shown for.
    """
    words = [word.strip() for word in config.words.split(",") if word.strip()]
    if not words:
        raise ValueError(f"words: got {config.words!r}, expected some, with commas between")
    sentences, paths = templates(config.templates), find_images([config.images])
    if len(paths) > config.most_images:
        notes.append(f"{config.images} has {len(paths)} images, {config.most_images} are shown (--most-images)")
        paths = [paths[int(i)] for i in np.linspace(0, len(paths) - 1, config.most_images)]
    table: dict[Path, list[str | Picture]] = {}
    for path in paths:
        try:
            image = read_image(path, config.max_image_pixels)
        except Exception as error:  # decoders raise anything on damaged bytes
            notes.append(f"{path} is left out: {str(error) or type(error).__name__}")
            continue
        table[path] = [path.name, Picture(png(_small(image)), path.name)]
    with_embedder = {name: entry for name, entry in runs.items() if entry.embedder}
    if not table or not with_embedder:
        notes.append(f"no segmentations: there is no {'embedder' if table else 'readable image'}")
        return
    colours, shown = word_colours(len(words) + 1)[1:], []
    for name, entry in with_embedder.items():
        made = []
        try:
            segmenter = Segmenter(*load_pacl(entry.embedder, choose_device(config.device)), stride=config.stride)
            texts = segmenter.texts(words, sentences)
            for path in table:  # read again: large ones are not kept for all runs
                image = read_image(path, config.max_image_pixels)
                picture = _small(overlay(image, segmenter.labels(image, texts), colours=colours))
                made.append(Picture(png(picture), f"{path.name} by {name}"))
        except Exception as error:  # whatever its towers' files raise: the other runs are shown all the same
            notes.append(f"{entry.embedder} is not shown: {' '.join(str(error).split())[:300] or type(error).__name__}")
            continue
        shown.append(name)
        for row, picture in zip(table.values(), made, strict=True):
            row.append(picture)
    page.heading("Segmentations")
    page.legend(list(zip(colours, words, strict=True)))
    page.table(["image", "", *shown], list(table.values()))
    page.note(f"The best of the words in every pixel; stride {config.stride}, templates {config.templates}.")


def _small(image: Image.Image) -> Image.Image:
    """At most SIDE pixels wide and high, and small ones enlarged by whole numbers."""
    factor = max(1, SIDE // max(image.size))
    image = image.resize([x * factor for x in image.size], Image.Resampling.NEAREST)
    image.thumbnail((SIDE, SIDE))
    return image
