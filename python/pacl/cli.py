"""The `pacl` command."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence

from .commands import run_command
from .formats import one_line

INTERRUPTED = 130  # what shells report for a program ended by Ctrl-C
# The module of each command, whose main(argv, prog) runs it, and a line of help.
COMMANDS = {
    "demo": ("pacl.demo.command", "train and segment in a few minutes"),
    "data": ("pacl.data.command", "pack image-caption pairs into shards, check them"),
    "doctor": ("pacl.doctor", "what can run here, what is missing, and a self-check"),
    "train": ("pacl.training.command", "train the vision embedder on image-caption pairs"),
    "features": ("pacl.training.features", "compute what frozen towers give once, and store it for training"),
    "look": ("pacl.segment.command", "where in an image is what words say"),
    "segment": ("pacl.segment.command", "segment images by a list of classes"),
    "evaluate": ("pacl.evaluate.command", "measures on data sets, tables of results"),
    "compare": ("pacl.compare.command", "training runs, embedders and results side by side, as one page"),
    "serve": ("pacl.serve.command", "a local page: drop an image, type words, click patches"),
}
# Modules of the extra "train" and their packages. Every command needs them but doctor, which says what is missing.
NEEDS = {
    "open_clip": "open_clip_torch",
    "webdataset": "webdataset",
    "torchvision": "torchvision",
    "PIL": "pillow",
    "tyro": "tyro",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (sys.argv by default) and return its exit status.

    A ValueError or OSError of a command is one line on standard error, and status 1.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    missing = [package for module, package in NEEDS.items() if importlib.util.find_spec(module) is None]
    if missing and argv and argv[0] in COMMANDS and argv[0] != "doctor":
        print(f"pacl: error: {argv[0]} needs {', '.join(missing)}: pip install 'pacl-kernels[train]'", file=sys.stderr)
        return 2
    try:
        return run_command(COMMANDS, argv, "pacl", "Patch Aligned Contrastive Learning: train and look.")
    except KeyboardInterrupt:
        return INTERRUPTED
    except (ValueError, OSError) as error:
        print(f"pacl: error: {one_line(error)}", file=sys.stderr)
        return 1
