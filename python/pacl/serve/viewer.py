"""Answer the page's requests: embed an image once, then score it for any words and any of its patches."""

from __future__ import annotations

import hashlib
import io
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import torch
from PIL import Image
from torch import Tensor

from ..data.images import MAX_IMAGE_PIXELS
from ..segment.draw import word_colours
from ..segment.images import read_image
from ..segment.predict import Dense, Segmenter
from ..segment.prompts import Texts
from ..segment.prompts import templates as read_templates
from .gate import Gate

IMAGES = 8  # images kept at a time, as files
MOST_WORDS, LONGEST = 64, 200  # most words in a request, and most letters in a word
KEPT_WORDS = 1024  # words whose embeddings are kept
TOWERS = 2  # images embedded at a time: a slow one does not hold up the next
PICTURE = 2048  # most pixels along each side of a picture that the page asks for
DIGITS = 4  # decimals of the cosines in an answer

LINES = """\
from pathlib import Path
from pacl import Segmenter, overlay, word_colours
from pacl.segment.images import read_image
from pacl.segment.prompts import templates
{load}
image = read_image(Path(path))
dense = segmenter.dense(image)
"""
WORDS = """\
words = {words!r}
texts = segmenter.texts(words, templates({templates!r}))
scores = dense.scores(texts)  # [K, h, w]
labels = dense.labels(texts, threshold={threshold}).labels  # [H, W]
colours = word_colours(len(words) + 1){colours}
overlay(image, labels, colours=colours).save("overlay.png")
"""
PATCH = """\
similarity = dense.patches @ dense.patches[{row}, {column}]  # [h, w]
overlay(image, similarity, scale=(0.0, 1.0)).save("patch.png")
"""


class Gone(KeyError):
    """Raised for an image that is not kept, or no longer: send it again."""


@dataclass
class _Kept:
    data: bytes
    dense: dict[str, Dense] = field(default_factory=dict)


class Viewer:
    """Answers about images for one or several ways of embedding their patches.

    segmenters: Segmenters by name, with the same towers; the page selects the first. load: the Python lines that make
    each `segmenter`, by the same name. name: the checkpoint or model, for the page's title. templates: as in `pacl
    look`. An image's key is the hash of its file; the last 8 are kept, with their patches. Two images at a time are
    read and embedded; all other requests are answered meanwhile. All answers are JSON values. Raises ValueError, in one
    line, for a bad request, Gone for an image that is not kept, and Unwanted after `close`.
    """

    def __init__(
        self,
        segmenters: dict[str, Segmenter],
        load: dict[str, str],
        *,
        name: str = "",
        templates: str = "simple",
        max_image_pixels: int = MAX_IMAGE_PIXELS,
    ):
        self.segmenters, self.load, self.name, self.max_image_pixels = segmenters, load, name, max_image_pixels
        self.templates, self.sentences = templates, read_templates(templates)
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._known: WeakValueDictionary[str, _Kept] = WeakValueDictionary()  # those kept, and those on their way
        self._lock = threading.Lock()  # of these two alone: nobody holds it for long
        self._texts: OrderedDict[str, Texts] = OrderedDict()
        self._images, self._words = Gate(TOWERS), Gate()

    def close(self) -> None:
        """Turn away all requests that wait for a tower or need one."""
        self._images.close()
        self._words.close()

    def add(self, data: bytes, wanted: Callable[[], bool] = lambda: True) -> dict[str, Any]:
        """Take an image's file; return its key for later requests, and its size in pixels and tokens.

        wanted: asked when the image's turn comes; if it returns False, raises Unwanted.
        """
        key = hashlib.sha256(data).hexdigest()
        with self._lock:
            kept = self._known.setdefault(key, _Kept(data))
        dense = self._dense(kept, next(iter(self.segmenters)), wanted)
        with self._lock:
            self._kept[key] = kept
            self._kept.move_to_end(key)
            while len(self._kept) > IMAGES:
                self._kept.popitem(last=False)
        height, width = dense.size
        return {"image": key, "width": width, "height": height, **_grid(dense)}

    def words(self, image: Any, words: Any, model: Any = None, threshold: Any = None) -> dict[str, Any]:
        """Return cosines with words: {words, h, w, scores [K][h*w], colours [K], ...}.

        threshold: only for the Python lines in the answer.
        """
        words = _checked(words)
        if threshold is not None and not isinstance(threshold, (int, float)):
            raise ValueError(f"threshold: got {type(threshold).__name__}, expected a number")
        dense, load = self._find(image, model)
        scores = dense.scores(self._embedded(words))
        first = "[1:]" if threshold is None else "\ncolours[0] = 0  # background"
        lines = WORDS.format(words=words, templates=self.templates, threshold=threshold, colours=first)
        colours = word_colours(len(words) + 1)[1:].tolist()
        answer = {"words": words, "colours": colours, "scores": [_rounded(x) for x in scores]}
        return answer | _grid(dense) | {"python": LINES.format(load=load) + lines}

    def patch(self, image: Any, row: Any, column: Any, model: Any = None) -> dict[str, Any]:
        """Return the cosines of one patch with all patches: {h, w, similarity [h*w], ...}."""
        dense, load = self._find(image, model)
        for name, value, count in zip(("row", "column"), (row, column), dense.patches.shape[:2], strict=True):
            if type(value) is not int or not 0 <= value < count:
                raise ValueError(f"{name}: got {str(value)[:40]}, expected 0 to {count - 1}")
        similarity = dense.patches @ dense.patches[row, column]
        lines = PATCH.format(row=row, column=column)
        return {"similarity": _rounded(similarity), **_grid(dense), "python": LINES.format(load=load) + lines}

    def picture(self, image: Any) -> bytes:
        """Return a kept image as a JPEG of at most 2,048 pixels a side, for browsers that cannot show its format."""
        small = self._read(self._kept_image(image).data)
        small.thumbnail((PICTURE, PICTURE))
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=90)
        return buffer.getvalue()

    def _find(self, image: Any, model: Any) -> tuple[Dense, str]:
        model = next(iter(self.segmenters)) if model is None else model
        if not isinstance(model, str) or model not in self.segmenters:
            raise ValueError(f"model: got {str(model)[:40]!r}, expected {' or '.join(self.segmenters)}")
        return self._dense(self._kept_image(image), model), self.load[model]

    def _kept_image(self, image: Any) -> _Kept:
        with self._lock:
            kept = self._kept.get(image) if isinstance(image, str) else None
            if kept is None:
                raise Gone("image: got an unknown or expired key, expected that of a kept image; send it again")
            self._kept.move_to_end(image)
        return kept

    def _read(self, data: bytes) -> Image.Image:
        try:
            return read_image(data, self.max_image_pixels)
        except Exception as error:  # decoders raise anything on damaged bytes
            raise ValueError(f"image: {error or type(error).__name__}") from error

    def _dense(self, kept: _Kept, model: str, wanted: Callable[[], bool] = lambda: True) -> Dense:
        if model not in kept.dense:
            with self._images.enter((id(kept), model), wanted):
                if model not in kept.dense:  # another request for this image may have come first
                    kept.dense[model] = self.segmenters[model].dense(self._read(kept.data))
        return kept.dense[model]

    def _embedded(self, words: Sequence[str]) -> Texts:
        """Return embeddings of words: kept ones, and all new ones in one call, the slowest part of an answer."""
        with self._words.enter():
            new = [word for word in dict.fromkeys(words) if word not in self._texts]
            if new:
                made = next(iter(self.segmenters.values())).texts(new, self.sentences)
                rows = made.embeddings.split(made.synonyms)
                for word, name, count, each in zip(new, made.names, made.synonyms, rows, strict=True):
                    self._texts[word] = Texts((name,), (count,), each)
            found = []
            for word in words:
                self._texts.move_to_end(word)
                found.append(self._texts[word])
            while len(self._texts) > KEPT_WORDS:
                self._texts.popitem(last=False)
        names, synonyms = (sum((getattr(x, name) for x in found), ()) for name in ("names", "synonyms"))
        return Texts(names, synonyms, torch.cat([x.embeddings for x in found]))


def _checked(words: Any) -> list[str]:
    if not isinstance(words, list) or not all(isinstance(x, str) for x in words):
        got = str(words)[:40] if isinstance(words, list) else type(words).__name__
        raise ValueError(f"words: got {got}, expected a list of strings")
    words = [x.strip() for x in words]
    if not 1 <= len(words) <= MOST_WORDS or not all(1 <= len(x) <= LONGEST for x in words):
        raise ValueError(f"words: got {len(words)}, expected 1 to {MOST_WORDS}, each of 1 to {LONGEST} letters")
    return words


def _grid(dense: Dense) -> dict[str, Any]:
    """Return the grid of an answer. margins: fractions of height and width outside the cells, at each end."""
    h, w = dense.patches.shape[:2]
    return {"h": h, "w": w, "margins": list(dense.margins)}


def _rounded(scores: Tensor) -> list[float]:
    return [round(x, DIGITS) for x in scores.flatten().tolist()]
