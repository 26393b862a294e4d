"""Write the results of a video: an overlay video, a label map for each frame, and shares of the pixels as CSV."""

from __future__ import annotations

import contextlib
import csv
import io
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist
from PIL import Image

from ..files import atomic_writer, write_bytes
from ..formats import printable
from ..processes import shared_progress
from ..signals import Signals
from .draw import png
from .frames import Frames, film
from .predict import Dense, Segmenter
from .temporal import Carry


class Drawn(NamedTuple):
    """The results of a frame: its label map, the share of the pixels of each label, and the overlay."""

    labels: Image.Image
    shares: list[float]
    overlay: Image.Image


class VideoResults:
    """The results of a video, frame by frame, in one pass.

    The first frame is read at once, so that a file which cannot be used raises before anything is written.

    Args:
        frames: the frames.
        segmenter: embeds a frame.
        temporal: the `share` of Carry.
        draw: draws the results of a frame.
        names: those of the labels.

    Raises:
        ValueError: for a video without a frame that can be read.
    """

    def __init__(
        self,
        frames: Frames,
        segmenter: Segmenter,
        temporal: float,
        draw: Callable[[Image.Image, Dense], Drawn],
        names: list[str],
    ):
        self.frames, self.names = frames, names
        carry = Carry(temporal, reach=segmenter.stride)
        found = ((seconds, draw(image, carry(segmenter.dense(image)))) for seconds, image in frames)
        first = next(found, None)
        if first is None:
            raise ValueError("; ".join(frames.problems[:3]) or "has no frames")
        self._found: Iterator[tuple[Fraction, Drawn]] = chain([first], found)

    def write(self, target: Path, group: dist.ProcessGroup | None = None) -> bool:
        """Write TARGET-overlay.mp4, TARGET-shares.csv and TARGET-labels/000000.png, ...

        Returns False, and says why on standard error, if a part of the video could not be
        read. Ctrl-C and SIGTERM end it after the current frame: the files of the frames until then are complete.
        Raises SystemExit with 128 and the signal's number afterwards.
        """
        folder = target.parent / f"{target.name}-labels"
        for old in folder.glob("[0-9]*.png"):  # of an earlier run, whose video may have been longer
            old.unlink()
        count = 0
        with (
            Signals() as signals,
            shared_progress(self.frames.path.name, self.frames.total, "frame", group) as progress,
            atomic_writer(target.parent / f"{target.name}-shares.csv") as table,
            film(target.parent / f"{target.name}-overlay.mp4", self.frames.rate) as add,
            contextlib.suppress(KeyboardInterrupt),  # a second Ctrl-C does not wait for the frame
        ):
            table.write(_line("frame", "seconds", *self.names))
            for seconds, (labels, shares, overlay) in self._found:
                write_bytes(folder / f"{count:06}.png", png(labels))
                add(overlay, seconds)
                table.write(_line(count, f"{float(seconds):.4f}", *(f"{share:.6f}" for share in shares)))
                count += 1
                progress.step()
                if signals.number is not None:
                    break
        problems = list(self.frames.problems)
        if signals.number is not None:
            problems.append(f"stopped after {count} frames, whose results are in {target.parent}")
        for line in problems:
            print(printable(f"{self.frames.path}: {line}"), file=sys.stderr, flush=True)
        if signals.number is not None:
            raise SystemExit(128 + signals.number)
        return not problems


def _line(*values: object) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue().encode()
