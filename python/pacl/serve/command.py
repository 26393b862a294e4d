"""`pacl serve`: load a model, print the page's address, answer until Ctrl-C."""

from __future__ import annotations

import argparse
import os
import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..data.scenes import CLASSES, draw_scene
from ..segment.command import make_segmenter
from ..segment.draw import png
from ..segment.images import find_images
from ..segment.predict import Segmenter
from ..segment.prompts import TEMPLATES
from .server import Example, Server
from .viewer import Viewer

DESCRIPTION = (
    "A page on this machine: drop an image, type words, and see where they are, or click a patch for those like it; "
    "plain CLIP beside PACL. Nothing is loaded from elsewhere, and only the printed address is answered."
)
LOADING = {  # the Python lines for it
    "PACL": "from pacl.sharing import load_pacl\nsegmenter = Segmenter(*load_pacl({checkpoint!r}), stride={stride})",
    "CLIP of PACL": "from pacl.sharing import load_pacl\ntowers, _ = load_pacl({checkpoint!r})\n"
    "segmenter = Segmenter(towers, stride={stride})",
    "CLIP": "from pacl.towers import load_towers\ntowers = load_towers({model!r}, {pretrained!r})\n"
    "segmenter = Segmenter(towers, stride={stride})",
}


def main(argv: Sequence[str], prog: str) -> int:
    """Run `pacl serve`; returns 1 where it cannot begin, and ends by KeyboardInterrupt."""
    arguments = _parser(prog).parse_args(argv)
    try:
        examples = find_examples(arguments.examples, arguments.checkpoint)
        server = Server(make_viewer(arguments), arguments.port, examples)
    except (ValueError, OSError, OverflowError) as error:
        print(f"pacl: error: {error}", file=sys.stderr)
        return 1
    with server:
        print(f"{server.url}\nCtrl-C ends it.", flush=True)
        if arguments.browser and _display():
            webbrowser.open(server.url)
        server.serve_until_interrupted()
    return 0


def make_viewer(arguments: argparse.Namespace) -> Viewer:
    """PACL of a checkpoint and the plain CLIP under it, where that projects single patches; or plain CLIP alone."""
    first, values = make_segmenter(arguments), vars(arguments)
    rest = {name: values[name] for name in ("templates", "max_image_pixels")}
    if not arguments.checkpoint:
        return Viewer({"CLIP": first}, {"CLIP": LOADING["CLIP"].format(**values)}, **rest)
    segmenters, load = {"PACL": first}, {"PACL": LOADING["PACL"].format(**values)}
    try:
        segmenters["CLIP"] = Segmenter(first.towers, stride=arguments.stride)
        load["CLIP"] = LOADING["CLIP of PACL"].format(**values)
    except ValueError:
        pass  # no projection: PACL alone
    return Viewer(segmenters, load, **rest)


def find_examples(folder: Path | None, checkpoint: str | None) -> list[Example]:
    """The images of a folder; where none is given and the checkpoint is the demo's, scenes that it has not seen."""
    if folder is not None:
        return [Example(x.name, x) for x in find_images([folder]) if x.is_file()]
    if checkpoint and all((Path(checkpoint).resolve().parent / name).is_dir() for name in ("clip", "scenes")):
        return demo_scenes()
    return []


def demo_scenes(count: int = 6) -> list[Example]:
    """Generated scenes, each with the words for all that is in it and for one thing that is not."""
    found = []
    for number in range(count):
        rng = np.random.default_rng((2**31, number))  # the demo's own seeds have three numbers
        scene = draw_scene(rng)
        inside = [CLASSES[i] for i in np.unique(scene.mask)]
        absent = rng.choice([x for x in CLASSES if x not in inside])
        found.append(Example(f"scene {number + 1}", png(Image.fromarray(scene.image)), ", ".join([*inside, absent])))
    return found


def _display() -> bool:
    return sys.platform in ("darwin", "win32") or any(os.environ.get(x) for x in ("DISPLAY", "WAYLAND_DISPLAY"))


def _parser(prog: str = "pacl serve") -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=DESCRIPTION)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument(
        "--checkpoint", metavar="FOLDER", help="an embedder that pacl train or pacl demo wrote, or the Hub's"
    )
    model.add_argument("--model", help="plain CLIP alone: an open_clip model")
    parser.add_argument("--pretrained", metavar="TAG", help="the open_clip model's weights")
    number = {"type": int, "metavar": "N"}
    parser.add_argument("--templates", default="simple", help=f"{', '.join(TEMPLATES)} or a file (%(default)s)")
    parser.add_argument("--stride", default=1, help="tokens per patch along each side (%(default)s)", **number)
    parser.add_argument("--port", default=8000, help="0 for any that is free (%(default)s)", **number)
    parser.add_argument("--examples", type=Path, metavar="DIR", help="images that the page offers")
    parser.add_argument("--no-browser", dest="browser", action="store_false", help="print the address only")
    parser.add_argument("--max-image-pixels", default=25_000_000, help="larger images are refused", **number)
    parser.add_argument("--device", default="auto", help="(%(default)s)")
    parser.set_defaults(short_side=None, window=None, window_stride=None)
    return parser
