"""Time new words on this machine: ViT-B-16's text tower (random weights) with and without padding that it cannot see.

    python benchmarks/words.py [--json F]          # a few minutes on a CPU

"answer" is everything that `pacl serve` computes for new words once it has the image's tokens. Runs are interleaved;
each shows its least wall-clock time and its least processor time, which other work on the machine lengthens less.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from pacl.files import write_bytes
from pacl.segment.draw import png
from pacl.segment.predict import Segmenter
from pacl.segment.prompts import TEMPLATES, class_texts
from pacl.serve.viewer import Viewer
from pacl.towers import Towers, load_towers
from PIL import Image
from report import machine
from torch import Tensor
from torch.nn import functional as F

from pacl_kernels.native import native

CASES = [("photo", 1), ("simple", 1), ("simple", 4)]  # templates, new words


@torch.no_grad()
def whole(towers: Towers, words: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Return the embeddings of `class_texts`, computed with the whole context of 77 tokens."""
    sentences = [template.replace("{}", word) for word in words for template in templates]
    found = torch.cat([towers.encode_text(part) for part in towers.tokenize(sentences).split(256)])
    return F.normalize(found.unflatten(0, (len(words), -1)).mean(1), dim=-1)


def measure(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, float]]:
    """Return the least milliseconds of each run, interleaved, after a first call that does not count."""
    found = {name: {"wall_ms": float("inf"), "cpu_ms": float("inf")} for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            begin = time.perf_counter(), time.process_time()
            run()
            took = {"wall_ms": time.perf_counter() - begin[0], "cpu_ms": time.process_time() - begin[1]}
            if repeat:
                found[name] = {key: min(1e3 * x, found[name][key]) for key, x in took.items()}
    return found


def case(towers: Towers, templates: str, count: int, repeats: int) -> dict:
    sentences, numbers = TEMPLATES[templates], itertools.count()
    viewer = Viewer({"CLIP": Segmenter(towers)}, {"CLIP": ""}, templates=templates, max_image_pixels=10**6)
    noise = np.random.default_rng(0).integers(0, 256, (224, 304, 3), dtype=np.uint8)
    image = viewer.add(png(Image.fromarray(noise)))["image"]

    def new() -> list[str]:
        return [f"zebra crossing {next(numbers)}" for _ in range(count)]

    words = new()
    runs = {
        "whole": lambda: whole(towers, words, sentences),
        "cut": lambda: class_texts(towers, words, sentences),
        "answer": lambda: viewer.words(image, new()),
    }
    error = (runs["whole"]() - runs["cut"]().embeddings).abs().max().item()
    return {"templates": len(sentences), "words": count, "error": error, **measure(runs, repeats)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="Threads of torch.")
    parser.add_argument("--repeats", type=int, default=10, help="Timed runs of each.")
    parser.add_argument("--quick", action="store_true", help="Run one small case, to see that it runs.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="Write the result.")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    towers, rows = load_towers("ViT-B-32" if arguments.quick else "ViT-B-16"), []
    print(f"{'sentences':>9}{'words':>7}   {'whole ms':>16}{'cut ms':>16}{'answer ms':>16}   wall (cpu)")
    for templates, count in CASES[:1] if arguments.quick else CASES:
        row = case(towers, templates, count, arguments.repeats)
        rows.append(row)
        times = (f"{row[name]['wall_ms']:.0f} ({row[name]['cpu_ms']:.0f})" for name in ("whole", "cut", "answer"))
        print(f"{row['templates']:9}{count:7}   " + "".join(f"{x:>16}" for x in times), flush=True)
    if arguments.json:
        result = {"machine": machine(torch.device("cpu"), native()), "threads": arguments.threads, "words": rows}
        write_bytes(arguments.json, (json.dumps(result, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
