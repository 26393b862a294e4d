"""Measure what carrying scores from frame to frame changes: mIoU and flicker on moving scenes with exact masks.

    pacl demo --out toy
    python benchmarks/video.py --checkpoint toy/embedder [--json F] [--picture PNG]     # two minutes on a free core

The demo's shapes and backgrounds move, each at `speed` pixels a frame in its own direction, and turn back at 20 pixels
from where they were drawn; the background moves at half the speed. Every frame has new noise. Shapes are of pairs that
training has seen. Flicker is the share of the pixels whose label changes from one frame to the next, among those whose
true label does not. "same place" carries each patch from its own place alone, however the scene moved. Intervals are
95 % of 1,000 bootstrap samples of the clips, of the difference from each frame alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from outputs import write_json
from pacl.data import scenes
from pacl.evaluate.metrics import ConfusionMatrix
from pacl.files import write_bytes
from pacl.segment.draw import png, word_colours
from pacl.segment.lettering import write
from pacl.segment.predict import Segmenter
from pacl.segment.temporal import Carry
from pacl.sharing import load_pacl
from PIL import Image
from report import machine
from torch import Tensor

from pacl_kernels.native import native

TRAVEL = 20  # pixels from the start at which a layer turns back
SHOWN = 5  # consecutive frames in the picture
SHARES = (0.0, 0.3, 0.5, 0.7, 0.9)
CLASSES = list(scenes.CLASSES)


def bounce(place: np.ndarray) -> np.ndarray:
    """Return places within TRAVEL of 0, at which what moves evenly is if it turns back there."""
    return np.abs((place + TRAVEL) % (4 * TRAVEL) - 2 * TRAVEL) - TRAVEL


def moving_scene(rng: np.random.Generator, frames: int, speed: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield frames, uint8 [64, 64, 3], and their masks, uint8 [64, 64] with labels into scenes.CLASSES."""
    size, margin = scenes.SIZE, 32  # layers are larger than the frame, which cuts a window from each
    large = size + 2 * margin
    background = int(rng.integers(len(scenes.BACKGROUNDS)))
    texture = scenes.background_texture(scenes.BACKGROUNDS[background])
    top, left = rng.integers(texture.shape[0] - large, size=2)
    ground = texture[top : top + large, left : left + large] + rng.uniform(-10, 10)
    layers = [(np.ones((large, large), bool), ground, len(scenes.PAIRS) + background, speed / 2)]
    for i in rng.choice(len(scenes.SEEN), size=int(rng.integers(1, 4)), replace=False):
        pair = scenes.SEEN[i]
        stencil = np.pad(scenes._silhouette(rng), margin)
        layers.append((stencil, scenes.paint(pair, large, rng), scenes.PAIRS.index(pair), speed))
    angles, starts = rng.uniform(0, 2 * np.pi, len(layers)), rng.uniform(-TRAVEL, TRAVEL, (len(layers), 2))
    for t in range(frames):
        image, mask = np.zeros((size, size, 3)), np.zeros((size, size), np.uint8)
        for (stencil, texture, label, pace), angle, start in zip(layers, angles, starts, strict=True):
            y, x = np.round(bounce(start + t * pace * np.array([np.sin(angle), np.cos(angle)]))).astype(int) + margin
            window = (slice(y, y + size), slice(x, x + size))
            inside = stencil[window]
            image[inside], mask[inside] = texture[window][inside], label
        yield np.clip(image + rng.normal(0, 4, image.shape), 0, 255).astype(np.uint8), mask


def flicker(labels: Tensor, before: Tensor, truth: Tensor, truth_before: Tensor) -> tuple[int, int]:
    """Return the number of pixels whose label changes though the true one does not, and that of the latter's pixels."""
    still = truth == truth_before
    return int((labels != before)[still].sum()), int(still.sum())


def measure(segmenter: Segmenter, speed: float, clips: int, frames: int) -> tuple[dict, list]:
    """Return mIoU and flicker of each way with the intervals of their differences, and the maps of the first clip."""
    texts, reach = segmenter.texts(CLASSES, ["{}"]), segmenter.stride
    ways = {f"{share:g}": (share, reach) for share in SHARES} | {"0.7, same place": (0.7, 0)}
    counts = torch.zeros(len(ways), clips, len(CLASSES), len(CLASSES), dtype=torch.int64)
    changes = torch.zeros(len(ways), clips, 2)
    kept = []
    for clip in range(clips):
        carries = [Carry(*settings) for settings in ways.values()]
        matrices = [ConfusionMatrix(len(CLASSES)) for _ in ways]
        before: list[Tensor] = []
        truth_before = torch.empty(0)
        for image, mask in moving_scene(np.random.default_rng([0, clip]), frames, speed):
            dense, truth = segmenter.dense(Image.fromarray(image)), torch.from_numpy(mask)
            maps = [carry(dense).labels(texts).labels for carry in carries]
            for way, (matrix, labels) in enumerate(zip(matrices, maps, strict=True)):
                matrix.update(truth, labels)
                if before:
                    changes[way, clip] += torch.tensor(flicker(labels, before[way], truth, truth_before))
            before, truth_before = maps, truth
            if clip == 0:
                kept.append((image, mask, maps[0].numpy(), maps[list(ways).index("0.7")].numpy()))
        counts[:, clip] = torch.stack([matrix.counts for matrix in matrices])
    draws = torch.randint(clips, (1000, clips), generator=torch.Generator().manual_seed(0))
    alone = _scores(counts[0], changes[0], draws)
    rows = {}
    for way, name in enumerate(ways):
        samples = _scores(counts[way], changes[way], draws) - alone
        values = _scores(counts[way], changes[way], torch.arange(clips)[None])[0]
        low, high = samples.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), 0)
        rows[name] = {
            kind: {"percent": float(values[i]), "against_alone": [float(low[i]), float(high[i])]}
            for i, kind in enumerate(("miou", "flicker"))
        }
    return rows, kept


def _scores(counts: Tensor, changes: Tensor, draws: Tensor) -> Tensor:
    """Return mIoU over the seen pairs and flicker, in percent, of each draw of clips [R, clips]: float64 [R, 2]."""
    found = []
    for draw in draws:
        matrix = ConfusionMatrix(len(CLASSES))
        matrix.counts = counts[draw].sum(0)
        changed, still = changes[draw].sum(0)
        found.append([100 * matrix.miou(scenes.SEEN_LABELS), 100 * float(changed / still)])
    return torch.tensor(found, dtype=torch.float64)


def draw_picture(kept: list, path: Path) -> None:
    """Draw consecutive frames in columns: frame, truth, each frame alone, and scores carried with 0.7."""
    side, left = 2 * scenes.SIZE, 84
    colours = word_colours(len(CLASSES))
    sheet = Image.new("RGB", (left + SHOWN * (side + 4), 4 * (side + 4)), "white")
    for row, name in enumerate(("frame", "truth", "alone", "carried")):
        write(sheet, (4, row * (side + 4) + side // 2 - 8), name, 14)
        for column, parts in enumerate(kept[-SHOWN:]):
            shown = parts[row] if row == 0 else colours[parts[row]]
            tile = Image.fromarray(np.asarray(shown, np.uint8)).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(tile, (left + column * (side + 4), row * (side + 4)))
    write_bytes(path, png(sheet))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="Folder of the demo's embedder.")
    parser.add_argument("--clips", type=int, default=40, help="Number of scenes.")
    parser.add_argument("--frames", type=int, default=24, help="Frames of each.")
    parser.add_argument("--speeds", type=float, nargs="+", default=[1.0, 3.0], help="Pixels a frame of the shapes.")
    parser.add_argument("--strides", type=int, nargs="+", default=[1, 2], help="Tokens per patch along each side.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="Write the result.")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="Draw frames of the first clip and case.")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    towers, embedder = load_pacl(arguments.checkpoint)
    settings = {"clips": arguments.clips, "frames": arguments.frames, "pixels": scenes.SIZE, "seed": 0}
    result = {"machine": machine(torch.device("cpu"), native()), "settings": settings, "cases": []}
    for stride in arguments.strides:
        segmenter = Segmenter(towers, embedder, stride=stride)
        for speed in arguments.speeds:
            rows, kept = measure(segmenter, speed, arguments.clips, arguments.frames)
            print(f"\n{speed:g} pixels a frame, stride {stride}\n{'--temporal':<18}mIoU{'':22}flicker")
            for name, row in rows.items():
                cells = []
                for found in row.values():
                    low, high = found["against_alone"]
                    cells.append(f"{found['percent']:5.1f} ({low:+.1f} to {high:+.1f})")
                print(f"{name:<18}" + "".join(f"{cell:<26}" for cell in cells), flush=True)
            if arguments.picture and not result["cases"]:
                draw_picture(kept, arguments.picture)
            result["cases"].append({"stride": stride, "speed": speed, "temporal": rows})
            if arguments.json:
                write_json(arguments.json, result)


if __name__ == "__main__":
    main()
