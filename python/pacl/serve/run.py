"""Run `pacl serve`: load a model, print the page's address, answer until Ctrl-C."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import webbrowser

from ..segment.options import ServeOptions
from ..segment.predict import Segmenter
from ..segment.run import make_segmenter
from .examples import find_examples
from .server import Server
from .viewer import Viewer

LOADING = {  # the Python lines that load each model
    "PACL": "from pacl import load_pacl\nsegmenter = Segmenter(*load_pacl({checkpoint!r}), stride={stride})",
    "CLIP of PACL": "from pacl import load_pacl\ntowers, _ = load_pacl({checkpoint!r})\n"
    "segmenter = Segmenter(towers, stride={stride})",
    "CLIP": "from pacl import load_towers\n"
    "towers = load_towers({model!r}, {pretrained!r}, tokens={tokens!r}{proxy}{text})\n"
    "segmenter = Segmenter(towers, stride={stride})",
}


def serve(options: ServeOptions) -> int:
    """Answer until Ctrl-C; raises ValueError or OSError if the server cannot start.

    After Ctrl-C the process ends at once, with status 130: an image inside a model can take seconds and cannot be
    stopped, and neither can its thread.
    """
    examples = find_examples(options.examples, options.checkpoint)
    with Server(port=options.port, examples=examples) as server:
        server.viewer = make_viewer(options)
        print(f"{server.url}\nPress Ctrl-C to stop.", flush=True)
        if options.browser and _display():
            webbrowser.open(server.url)
        try:
            server.serve_until_interrupted()
        except KeyboardInterrupt:
            server.server_close()
            sys.stderr.flush()
            os._exit(128 + signal.SIGINT)
    return 0


def make_viewer(options: ServeOptions) -> Viewer:
    """Make the viewer of a checkpoint and of its CLIP, if that projects single patches; or of plain CLIP alone."""
    first, values = make_segmenter(options), dataclasses.asdict(options)
    values["tokens"] = first.towers.reader.name
    values["proxy"] = f", proxy={options.proxy!r}" if options.proxy else ""
    values["text"] = f", text_model={str(options.text_model)!r}" if options.text_model else ""
    rest = {name: values[name] for name in ("templates", "max_image_pixels")}
    rest["name"] = options.checkpoint or " ".join(filter(None, (options.model, options.pretrained)))
    if not options.checkpoint:
        return Viewer({"CLIP": first}, {"CLIP": LOADING["CLIP"].format(**values)}, **rest)
    segmenters, load = {"PACL": first}, {"PACL": LOADING["PACL"].format(**values)}
    try:
        segmenters["CLIP"] = Segmenter(first.towers, stride=options.stride)
        load["CLIP"] = LOADING["CLIP of PACL"].format(**values)
    except ValueError:
        pass  # the CLIP has no projection of patches: show PACL alone
    return Viewer(segmenters, load, **rest)


def _display() -> bool:
    return sys.platform in ("darwin", "win32") or any(os.environ.get(x) for x in ("DISPLAY", "WAYLAND_DISPLAY"))
