"""Draw labels over images, and the best, median and worst images of an evaluation."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from ..segment.draw import overlay, voc_palette, with_legend, word_colours
from ..segment.lettering import fitting, write
from .segmentation_data import SegmentationData
from .segmentation_measure import Measured, Predictor, competitors
from .specs import IGNORED, Protocol

SIDE = 320  # pixels of a picture's longer side on a sheet
LINE, TITLE = 18, 11  # pixels: height of a title, and of its letters


def label_picture(data: SegmentationData, image: Image.Image, labels: np.ndarray, most: int = 40) -> Image.Image:
    """Draw labels [H, W] over the image, with a legend of the `most` frequent; background and ignored pixels stay."""
    count = len(data.classes)
    colours = voc_palette(count + 1) if count < 255 else np.concatenate([[[0, 0, 0]], word_colours(count)])
    if data.spec.background:
        colours = np.concatenate([[[0, 0, 0]], colours[:-1]])
    shown = labels.astype(np.int64) - IGNORED  # ignored pixels become 0
    pixels = np.bincount(shown.ravel(), minlength=count + 1)[1:]
    present = [k for k in np.argsort(-pixels, kind="stable")[:most].tolist() if pixels[k]]
    entries = [(colours[k - IGNORED], data.classes[k], "") for k in present]
    return with_legend(overlay(image, shown, colours=colours), entries)


def contact_sheet(
    data: SegmentationData, predict: Predictor, protocol: Protocol, measured: Measured, each: int = 3
) -> Image.Image:
    """Draw rows of image, truth and prediction: the `each` best, median and worst images by mean IoU.

    Their labels are predicted again, because only the finished evaluation shows which images these are.
    """
    order = torch.argsort(measured.scores, descending=True)
    ranked = order[~measured.scores[order].isnan()].tolist()
    middle = max(0, (len(ranked) - each) // 2)
    groups = {"best": ranked[:each], "median": ranked[middle : middle + each], "worst": ranked[-each:]}
    titles: dict[int, str] = {}
    for group, indices in groups.items():
        for i in indices:
            titles.setdefault(i, f"{group}: {data.names[i]}, mIoU {100 * measured.scores[i]:.2f}")
    rows = [_row(data, predict, protocol, i, title) for i, title in titles.items()]
    if not rows:
        return Image.new("RGB", (SIDE, LINE), "white")
    sheet = Image.new("RGB", (max(x.width for x in rows), sum(x.height for x in rows)), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    return sheet


def _row(data: SegmentationData, predict: Predictor, protocol: Protocol, i: int, title: str) -> Image.Image:
    image, truth = data[i]
    candidates, truth = competitors(data, truth, protocol)
    labels = torch.as_tensor(predict(image, candidates)).cpu().numpy()
    scale = SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    small = image.resize(size)
    pictures = [small]
    for x in (truth, labels):
        shrunk = np.asarray(Image.fromarray(x.astype(np.int32)).resize(size, Image.Resampling.NEAREST))
        pictures.append(label_picture(data, small, shrunk, most=8))
    row = Image.new("RGB", (3 * (SIDE + 4), LINE + max(x.height for x in pictures) + 4), "white")
    write(row, (2, 2), fitting(title, row.width - 4, TITLE), TITLE)
    for column, each in enumerate(pictures):
        row.paste(each, (column * (SIDE + 4), LINE))
    return row
