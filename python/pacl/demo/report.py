"""report.html of `pacl demo --full`: the numbers of full.json as tables, and pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchvision.transforms.functional import to_pil_image

from ..data.scenes import CLASSES, HELD_OUT, PAIRS, phrase
from ..embedder import VisionEmbedder
from ..evaluate.metrics import RECALLS
from ..evaluate.plots import MISSING, bars, curves, plot_png
from ..files import write_bytes
from ..page import Page, Picture
from ..segment.draw import png
from ..segment.prompts import TEMPLATES, class_texts
from ..towers import load_towers
from .evaluation import Evaluation, Row, percent
from .full import METHODS, PER_PAIR, SCORES, STRIDES, TOKENS, Models, measure, read_scenes
from .picture import legend_picture, photo, textured

GROUP_NAMES = {"all": "all", "seen": "seen pairs", "held_out": "held-out pairs", "backgrounds": "backgrounds"}
WAYS = {"text_to_image": "text to image", "image_to_text": "image to text"}


def write_report(
    out: Path, embedders: dict[str, VisionEmbedder], shards: list[Path], evaluation: Evaluation, settings: dict
) -> dict[str, Any]:
    """Measure the models of a demo in `out`, write full.json and report.html there, and return full.json's contents.

    embedders: "pacl" and "mean_pooling". evaluation: its rows are the pictures. settings: those of the run, by name.
    """
    made = Models(load_towers(f"local-dir:{out / 'clip'}"), {"clip": None, **embedders})
    full = {"settings": settings, **measure(made, read_scenes(shards), settings["seed"])}
    write_bytes(out / "full.json", (json.dumps(full, indent=1, allow_nan=False) + "\n").encode())
    write_bytes(out / "report.html", report(full, pictures(made, evaluation.rows)).render())
    return full


def pictures(models: Models, rows: list[Row]) -> list[list[str | Picture]]:
    """Return rows of the demo's scenes: title, image, truth, CLIP, the control, and PACL at every stride."""
    texts = class_texts(models.towers, CLASSES, TEMPLATES["none"])
    found: list[list[str | Picture]] = []
    for row in rows:
        image = to_pil_image(row.image)
        maps = {method: models.segmenter(method).labels(image, texts) for method in METHODS}
        maps |= {f"PACL {n}x": models.segmenter("pacl", n).labels(image, texts) for n in STRIDES[1:]}
        tiles = [photo(row.image), textured(row.maps["truth"]), *(textured(x) for x in maps.values())]
        names = ["image", "truth", *METHODS, *(f"PACL {n}x" for n in STRIDES[1:])]
        words = (f"{name}: {row.title}" for name in names)
        found.append([row.title, *(Picture(png(x), word) for x, word in zip(tiles, words, strict=True))])
    return found


def report(full: dict[str, Any], scenes: list[list[str | Picture]]) -> Page:
    """Return the page, made of full.json's numbers and the pictures in `scenes`."""
    page = Page("pacl demo: plain CLIP, mean pooling and PACL")
    page.text(
        f"{full['scenes']} generated scenes that no model was trained on, with exact masks, seed "
        f"{full['settings']['seed']}. Plain CLIP: every patch through CLIP's own projection. Mean pooling: the "
        "control, an embedder trained like PACL's on the same pairs, but contrasting the mean of all patches. "
        "PACL: the embedder trained with the fused loss. All three share the frozen CLIP, which was trained here "
        "from scratch. Texts are the raw class names, without templates."
    )
    held_out = ", ".join(phrase(pair) for pair in HELD_OUT)
    page.text(
        f"Held-out pairs ({held_out}) never occur in a training scene. There are only three, so their numbers "
        "differ by ten points between runs. The scenes are a toy with local textures as concepts: they show the "
        "alignment of patches and words, and nothing about real photographs. All numbers are percent and come from "
        f"full.json. Measuring took {full['seconds']:.0f} s."
    )
    if full["settings"]["clip_steps"] < 100:
        page.text("This run was too short to learn anything (--quick): its numbers mean nothing.")
    if scenes:
        page.heading("Pictures")
        head = ["scene", "image", "truth", "plain CLIP", "mean pooling", "PACL", *(f"PACL {n}x" for n in STRIDES[1:])]
        page.table(head, scenes)
        page.note("A rule chooses the scenes. Only the last is chosen by its result: PACL misses a held-out pair.")
        page.picture(Picture(png(legend_picture()), "the texture of every class"))
    _patch_accuracy(page, full["patch_accuracy"])
    _coherence(page, full["coherence"])
    _segmentation(page, full)
    _retrieval(page, full["retrieval"])
    _classification(page, full["classification"])
    return page


def _patch_accuracy(page: Page, found: dict[str, Any]) -> None:
    page.heading("Patch accuracy")
    page.text(
        "The class of a patch is the one that covers at least half of it. A patch is right if the words of its class "
        f"are the most similar, among all {len(CLASSES)} classes or among the classes in its image. The second is "
        f"easier: chance is {percent(found['chance_image_classes'])} %, against {percent(1 / len(CLASSES))} % among "
        "all."
    )
    groups = ("seen", "held_out", "backgrounds")
    for key, words in (("all_classes", "among all classes"), ("image_classes", "among the image's classes")):
        rows = [
            [label, *(percent(found[method].get(group, {}).get(f"patch_accuracy_{key}")) for group in groups)]
            for method, label in METHODS.items()
        ]
        page.table(["", *(GROUP_NAMES[x] for x in groups)], rows, f"Patches right {words}, percent", _best(rows))
    there = [name for name in CLASSES if found["pacl"]["classes"][name] is not None]
    values = {label: [found[method]["classes"][name] for name in there] for method, label in METHODS.items()}
    _plot(page, (9, 10), bars(there, values, "Patches right among all classes"), "patch accuracy of every class")


def _coherence(page: Page, found: dict[str, Any]) -> None:
    page.heading("Semantic coherence")
    page.text(
        "This measure uses no text. The cosine of two patches of a group scores whether they have the same class; the "
        "table has the area under the ROC curve (AUC). Chance is 50. The held-out pairs differ from each other in both "
        "colour and pattern, so they are the easiest to tell apart."
    )
    groups = ("all", "seen", "held_out")
    rows = [[label, *(percent(found[x].get(g, {}).get("auc")) for g in groups)] for x, label in TOKENS.items()]
    page.table(["", *(GROUP_NAMES[x] for x in groups)], rows, "AUC, percent", _best(rows))
    for group in groups:
        lines = {label: tuple(found[x][group]["roc"].values()) for x, label in TOKENS.items() if group in found[x]}
        if lines:
            title = f"Pairs of patches, {GROUP_NAMES[group]}"
            _plot(page, (4.6, 4.6), curves(lines, title), f"ROC curves, {GROUP_NAMES[group]}")


def _segmentation(page: Page, full: dict[str, Any]) -> None:
    found, strides = full["segmentation"], full["strides"]
    page.heading("Segmentation")
    page.text(
        f"All {len(CLASSES)} classes compete in every pixel; chance is an mIoU of "
        f"{percent(found['chance_miou'])}. The stride trick shifts CLIP's patches by a half (2x) or a quarter "
        "(4x) of their size, which makes the grid of tokens finer without any training."
    )
    groups = ("seen", "held_out", "backgrounds")
    rows = [[label, *(percent(found[x]["1"][group]) for group in groups)] for x, label in METHODS.items()]
    caption = f"mIoU of {found['scenes']} scenes, stride 1x, percent"
    page.table(["", *(GROUP_NAMES[x] for x in groups)], rows, caption, _best(rows))
    head = ["", *(f"{GROUP_NAMES[group]} {n}x" for group in groups for n in STRIDES)]
    rows = [
        [label, *(percent(strides[x][str(n)][group]) for group in groups for n in STRIDES)]
        for x, label in METHODS.items()
    ]
    page.table(head, rows, f"mIoU of the first {strides['scenes']} scenes, by stride, percent", _best(rows))


def _retrieval(page: Page, found: dict[str, Any]) -> None:
    page.heading("Image-text retrieval")
    page.text(
        "Every scene has one caption. Captions leave out parts of a scene, and many scenes have equal captions, which "
        "do not count against each other. Ties count as wrong. CLIP scores with the image embedding that it was "
        "trained with, φ with attention over patches, and the control with the mean of its patches, as it was trained. "
        "Held-out pairs: scenes whose caption names a held-out pair. Seen pairs: as many scenes whose caption names a "
        "pair and whose image has no held-out pair. So both groups have the same number of rivals."
    )
    head = ["", *(f"{words} R@{k}" for words in WAYS.values() for k in RECALLS)]
    for name, each in found.items():
        rows = [
            [label, *(percent(each[score][f"{way}_R@{k}"]) for way in WAYS for k in RECALLS)]
            for score, label in SCORES.items()
        ]
        caption = (
            f"{GROUP_NAMES[name]}: {each['images']} scenes, {each['distinct_captions']} different captions, percent"
        )
        page.table(head, rows, caption, _best(rows))


def _classification(page: Page, found: dict[str, Any]) -> None:
    page.heading("Classification")
    page.text(
        f"{found['images']} further scenes with exactly one shape on a background, "
        f"{found['images'] // len(PAIRS)} of each pair (one for {PER_PAIR} evaluation scenes); the words of the "
        f"{len(PAIRS)} pairs compete, without the backgrounds. The images are not crops: they show the shape's "
        f"surroundings. Chance is {percent(1 / found['classes'])} %."
    )
    groups = ("all", "seen", "held_out")
    rows = [[label, *(percent(found[score][group]) for group in groups)] for score, label in SCORES.items()]
    page.table(["", *(GROUP_NAMES[x] for x in groups)], rows, "Top-1 accuracy, percent", _best(rows))


def _plot(page: Page, size: tuple[float, float], draw: Callable[[Any], None], words: str) -> None:
    made = plot_png(size, draw)
    page.note(f"No plot of {words}: {MISSING}") if made is None else page.picture(Picture(made, words))


def _best(rows: list[list[str]]) -> set[tuple[int, int]]:
    """Return (row, column) of the cells with the highest printed number of their column, ties included."""
    found = set()
    for j in range(1, len(rows[0])):
        values = [float(row[j]) if row[j] != "-" else -1.0 for row in rows]
        found |= {(i, j) for i, value in enumerate(values) if value == max(values) >= 0}
    return found
