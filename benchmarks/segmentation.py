"""Measure segmentation on this machine: pacl's label maps against plain PyTorch, and images per second.

    python benchmarks/segmentation.py [--json F]          # about two minutes on a CPU
    python benchmarks/segmentation.py --large             # also 847 classes at 2,048 x 1,536 pixels

The first table times the path from an image's patch embeddings and class texts to its label map. "plain" is class
scores, F.interpolate to the image's size, argmax. Memory is the process's peak growth. The second table times whole
images with 150 classes at each stride and window, through a ViT-B-16 with random weights, which do not change the time;
its "label map" is the part that the first table times.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from pacl.embedder import VisionEmbedder
from pacl.files import write_bytes
from pacl.segment.predict import Dense, Segmenter
from pacl.segment.prompts import Texts
from pacl.towers import load_towers
from PIL import Image
from report import machine
from throughput import peak_growth
from torch import Tensor
from torch.nn import functional as F

from pacl_kernels.native import native

D, PATCH = 512, 16
CASES = [(21, 500, 375, 1), (150, 683, 512, 1), (150, 683, 512, 4), (847, 683, 512, 1)]  # classes, W, H, stride
LARGE = (847, 2048, 1536, 1)
WHOLE = [{}, {"stride": 2}, {"short_side": 448}, {"short_side": 448, "window": 224, "window_stride": 112}]


def random_texts(classes: int) -> Texts:
    return Texts(tuple(map(str, range(classes))), (1,) * classes, F.normalize(torch.randn(classes, D), dim=-1))


def plain(dense: Dense, texts: Texts) -> Tensor:
    h, w, _ = dense.patches.shape
    scores = (texts.embeddings @ dense.patches.flatten(0, 1).T).view(-1, h, w)  # contiguous: 3 times as fast
    return F.interpolate(scores[None], dense.size, mode="bilinear", align_corners=False)[0].argmax(0)


def ours(dense: Dense, texts: Texts) -> Tensor:
    return dense.labels(texts).labels


def measure(runs: dict[str, Callable], repeats: int) -> dict[str, float]:
    """Return the median seconds of each run, interleaved, after a first call that does not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            if repeat:
                times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(x) for name, x in times.items()}


def label_maps(case: tuple[int, int, int, int], repeats: int) -> dict:
    classes, width, height, stride = case
    torch.manual_seed(0)
    h, w = (round(448 * side / min(width, height) / PATCH) * stride for side in (height, width))
    dense, texts = Dense(F.normalize(torch.randn(h, w, D), dim=-1), (height, width)), random_texts(classes)
    runs = {"pacl": lambda: ours(dense, texts), "plain": lambda: plain(dense, texts)}
    agree = float((runs["pacl"]() == runs["plain"]()).float().mean())
    memory = {name: peak_growth(run) / 2**20 for name, run in runs.items()}
    seconds = measure(runs, repeats)
    row = {"classes": classes, "size": [height, width], "tokens": [h, w], "agree": agree}
    return row | {name: {"ms": 1e3 * seconds[name], "peak_mib": memory[name]} for name in runs}


def images(settings: dict, towers, embedder: VisionEmbedder, repeats: int) -> dict:
    segmenter, texts = Segmenter(towers, embedder, **settings), random_texts(150)
    noise = np.random.default_rng(0).integers(0, 256, (375, 500, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    dense = segmenter.dense(image)
    runs = {"image": lambda: segmenter.labels(image, texts), "label map": lambda: ours(dense, texts)}
    memory = peak_growth(runs["image"]) / 2**20
    seconds = measure(runs, repeats)
    row = {"settings": settings, "tokens": list(dense.patches.shape[:2]), "images_per_second": 1 / seconds["image"]}
    return row | {"label_map_ms": 1e3 * seconds["label map"], "peak_mib": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="Threads of torch.")
    parser.add_argument("--repeats", type=int, default=3, help="Timed runs of each.")
    parser.add_argument("--large", action="store_true", help="Add a case for which plain PyTorch needs 11 GB.")
    parser.add_argument("--quick", action="store_true", help="Run two small cases, to see that it runs.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="Write the result.")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cases = [(5, 64, 48, 1)] if arguments.quick else CASES + [LARGE] * arguments.large
    maps = []
    print(
        f"{'classes':>7}{'pixels':>13}{'tokens':>9}   {'pacl ms':>9}{'plain ms':>9}{'ratio':>7}   pacl MiB  plain MiB"
    )
    for case in cases:
        row = label_maps(case, arguments.repeats)
        maps.append(row)
        pacl, other = row["pacl"], row["plain"]
        size = f"{row['size'][1]} x {row['size'][0]}"
        print(
            f"{row['classes']:7}{size:>13}{row['tokens'][1]:>5} x {row['tokens'][0]:<3}"
            f"{pacl['ms']:9.1f}{other['ms']:9.1f}{other['ms'] / pacl['ms']:7.2f}"
            f"{pacl['peak_mib']:11.0f}{other['peak_mib']:11.0f}",
            flush=True,
        )
    whole = []
    with torch.no_grad():
        towers, embedder = load_towers("ViT-B-32" if arguments.quick else "ViT-B-16"), VisionEmbedder().eval()
        print("\n500 x 375 pixels, 150 classes:\n   images/s  label map ms  peak MiB   tokens")
        for settings in WHOLE[: 1 if arguments.quick else None]:
            row = images(settings, towers, embedder, max(1, arguments.repeats // 2))
            whole.append(row)
            print(
                f"{row['images_per_second']:11.2f}{row['label_map_ms']:14.1f}{row['peak_mib']:10.0f}"
                f"   {row['tokens'][1]} x {row['tokens'][0]}  {settings or 'as trained'}",
                flush=True,
            )
    if arguments.json:
        result = {"machine": machine(torch.device("cpu"), native()), "threads": arguments.threads}
        result |= {"label_maps": maps, "images": whole}
        write_bytes(arguments.json, (json.dumps(result, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
