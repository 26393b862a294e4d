"""Run `pacl serve`: load a model, print the page's address, answer until Ctrl-C."""

from __future__ import annotations

import dataclasses
import os
import sys
import webbrowser
from pathlib import Path

import numpy as np
from PIL import Image

from ..data.scenes import CLASSES, draw_scene
from ..segment.draw import png
from ..segment.images import find_images
from ..segment.options import ServeOptions
from ..segment.predict import Segmenter
from ..segment.run import make_segmenter
from .server import Example, Server
from .viewer import Viewer

LOADING = {  # the Python lines that load each model
    "PACL": "from pacl import load_pacl\nsegmenter = Segmenter(*load_pacl({checkpoint!r}), stride={stride})",
    "CLIP of PACL": "from pacl import load_pacl\ntowers, _ = load_pacl({checkpoint!r})\n"
    "segmenter = Segmenter(towers, stride={stride})",
    "CLIP": "from pacl import load_towers\ntowers = load_towers({model!r}, {pretrained!r})\n"
    "segmenter = Segmenter(towers, stride={stride})",
}


def serve(options: ServeOptions) -> int:
    """Answer until Ctrl-C, which raises KeyboardInterrupt; raises ValueError or OSError if the server cannot start."""
    examples = find_examples(options.examples, options.checkpoint)
    viewer = make_viewer(options)
    if not 0 <= options.port < 2**16:
        raise ValueError(f"port: got {options.port}, expected 0 to {2**16 - 1}")
    with Server(viewer, options.port, examples) as server:
        print(f"{server.url}\nPress Ctrl-C to stop.", flush=True)
        if options.browser and _display():
            webbrowser.open(server.url)
        server.serve_until_interrupted()
    return 0


def make_viewer(options: ServeOptions) -> Viewer:
    """Make the viewer of a checkpoint and of its CLIP, if that projects single patches; or of plain CLIP alone."""
    first, values = make_segmenter(options), dataclasses.asdict(options)
    rest = {name: values[name] for name in ("templates", "max_image_pixels")}
    if not options.checkpoint:
        return Viewer({"CLIP": first}, {"CLIP": LOADING["CLIP"].format(**values)}, **rest)
    segmenters, load = {"PACL": first}, {"PACL": LOADING["PACL"].format(**values)}
    try:
        segmenters["CLIP"] = Segmenter(first.towers, stride=options.stride)
        load["CLIP"] = LOADING["CLIP of PACL"].format(**values)
    except ValueError:
        pass  # the CLIP has no projection of patches: show PACL alone
    return Viewer(segmenters, load, **rest)


def find_examples(folder: Path | None, checkpoint: str | None) -> list[Example]:
    """Return the images of a folder; without one, scenes unseen in training if the checkpoint is the demo's."""
    if folder is not None:
        return [Example(x.name, x) for x in find_images([folder]) if x.is_file()]
    if checkpoint and all((Path(checkpoint).resolve().parent / name).is_dir() for name in ("clip", "scenes")):
        return demo_scenes()
    return []


def demo_scenes(count: int = 6) -> list[Example]:
    """Generate scenes, each with words for everything in it and for one absent thing."""
    found = []
    for number in range(count):
        rng = np.random.default_rng((2**31, number))  # cannot repeat the demo's own seeds, which have three numbers
        scene = draw_scene(rng)
        inside = [CLASSES[i] for i in np.unique(scene.mask)]
        absent = rng.choice([x for x in CLASSES if x not in inside])
        found.append(Example(f"scene {number + 1}", png(Image.fromarray(scene.image)), ", ".join([*inside, absent])))
    return found


def _display() -> bool:
    return sys.platform in ("darwin", "win32") or any(os.environ.get(x) for x in ("DISPLAY", "WAYLAND_DISPLAY"))
