"""Measure `pacl segment` on a folder of photographs with a ViT-B/16 on this CPU: images a second, and what takes them.

    python benchmarks/segment_folder.py --json F        # some minutes on two cores
    python benchmarks/segment_folder.py --photo 4032 3024 --sizes 448 --images 3

The weights are random, which does not change the time. The photographs are JPEG files of noise with the edges and about
the bytes of real ones. Loading the model and embedding the words count once for a folder and are not in the rate. The
parts are timed around the command's own functions, in processor time of all threads and in seconds.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import open_clip
import torch
from outputs import write_json
from pacl.cli import main as pacl
from pacl.segment import predict, run
from PIL import Image
from report import machine

from pacl_kernels.native import native

MODEL, WORDS = "ViT-B-16", "dog,cat,grass,sky,road"
# Part -> the functions that do it. A function within another one counts for itself alone.
PARTS: dict[str, list[tuple[Any, str]]] = {
    "read": [(run, "read_image")],
    "resize": [(predict.Segmenter, "_resized")],
    "tower": [(predict, "dense_tokens")],
    "labels": [(predict.Dense, "labels"), (predict.Dense, "summary"), (run, "_shares")],
    "draw": [(run, "overlay"), (run, "with_legend"), (run, "label_image")],
    "compress": [(run, "png")],
    "write": [(run, "write_bytes")],
}


class Clock:
    """Seconds and processor seconds of each part, without those of the parts that it calls."""

    def __init__(self) -> None:
        self.spent = {name: np.zeros(2) for name in (*PARTS, "whole")}
        self.inside: list[np.ndarray] = []

    def timed(self, name: str, function: Callable) -> Callable:
        def call(*args: Any, **options: Any) -> Any:
            self.inside.append(np.zeros(2))
            begin = np.array([time.perf_counter(), time.process_time()])
            try:
                return function(*args, **options)
            finally:
                took = np.array([time.perf_counter(), time.process_time()]) - begin
                self.spent[name] += took - self.inside.pop()
                if self.inside:
                    self.inside[-1] += took

        return call


def write_photos(folder: Path, count: int, width: int, height: int) -> None:
    for index in range(count):
        draw = np.random.default_rng(index)
        few = draw.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(few).resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
        noisy = (smooth + draw.integers(-6, 7, smooth.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{index:03}.jpg", quality=90)


def measure(photos: Path, weights: Path, out: Path, side: int, tokens: str) -> dict[str, Any]:
    """Segment the folder; return images a second and each part's seconds, processor seconds and share of the latter."""
    clock, count = Clock(), len(list(photos.iterdir()))
    given = [photos, "--model", MODEL, "--pretrained", weights, "--words", WORDS, "--short-side", side]
    command = ["segment", *map(str, given), "--tokens", tokens, "--out", str(out)]
    changed = [patch.object(run, "_write", clock.timed("whole", run._write))]
    for name, functions in PARTS.items():
        changed += [patch.object(place, x, clock.timed(name, getattr(place, x))) for place, x in functions]
    for change in changed:
        change.start()
    try:
        if pacl(command):
            raise SystemExit(1)
    finally:
        patch.stopall()
    seconds, processor = sum(clock.spent.values())
    spent = {"other" if name == "whole" else name: x / count for name, x in clock.spent.items()}
    parts = {name: {"s": x[0], "processor_s": x[1], "share": x[1] * count / processor} for name, x in spent.items()}
    return {"short_side": side, "images_per_s": count / seconds, "parts": parts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 448, 896], help="Short sides of the images.")
    parser.add_argument("--photo", type=int, nargs=2, default=[640, 480], help="Width and height of the photographs.")
    parser.add_argument("--images", type=int, default=12, help="Number of photographs.")
    parser.add_argument("--tokens", default="naclip", help="Reading of the patch tokens.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="Threads of torch.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="Write the result.")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = {name: value for name, value in vars(options).items() if name not in ("json", "sizes")}
    result = {"machine": machine(torch.device("cpu"), native()), "settings": settings, "rows": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "photos").mkdir()
        write_photos(folder / "photos", options.images, *options.photo)
        torch.save(open_clip.create_model(MODEL).state_dict(), folder / "weights.pt")
        for side in options.sizes:
            row = measure(folder / "photos", folder / "weights.pt", folder / "out", side, options.tokens)
            result["rows"].append(row)
            parts = "  ".join(f"{name} {100 * x['share']:.1f} %" for name, x in row["parts"].items())
            print(f"{side}: {row['images_per_s']:.2f} images/s   {parts}", flush=True)
    if options.json:
        write_json(options.json, result)


if __name__ == "__main__":
    main()
