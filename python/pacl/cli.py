"""The `pacl` command."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import sys
from collections.abc import Sequence

INTERRUPTED = 130  # what shells report for a program ended by Ctrl-C
# Commands that parse their own flags: the module whose main(argv, prog) does it, and a line of help.
OWN_FLAGS = {
    "demo": ("pacl.demo.command", "train and segment in a few minutes"),
    "data": ("pacl.data.command", "pack image-caption pairs into shards, check them"),
    "train": ("pacl.training.command", "train the vision embedder on image-caption pairs"),
    "features": ("pacl.training.features", "compute what frozen towers give once, and store it for training"),
    "look": ("pacl.segment.command", "where in an image is what words say"),
    "segment": ("pacl.segment.command", "segment images by a list of classes"),
    "evaluate": ("pacl.evaluate.command", "measures on data sets, tables of results"),
    "compare": ("pacl.compare.command", "training runs, embedders and results side by side, as one page"),
    "serve": ("pacl.serve.command", "a local page: drop an image, type words, click patches"),
}
NEEDS = {
    "open_clip": "open_clip_torch",
    "webdataset": "webdataset",
    "torchvision": "torchvision",
    "PIL": "pillow",
    "tyro": "tyro",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (sys.argv by default) and return its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    # open_clip writes hyphens, its peers underscores: both work.
    argv = [re.sub(r"^--[^=]+", lambda flag: flag[0].replace("_", "-"), word) for word in argv]
    if argv and argv[0] in OWN_FLAGS:
        return _run(argv[0], argv[1:])
    parser = argparse.ArgumentParser(prog="pacl", description="Patch Aligned Contrastive Learning: train and look.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    doctor = commands.add_parser("doctor", help="what can run here, what is missing, and a self-check")
    doctor.add_argument("--json", action="store_true", help="for a bug report")
    doctor.set_defaults(run=_doctor)
    for name, (_, text) in OWN_FLAGS.items():
        commands.add_parser(name, help=text)
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments, parser)
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"pacl: error: {error}", file=sys.stderr)
        return 1


def _missing(command: str) -> str | None:
    """What a command says where the packages of the extra "train" are not installed."""
    missing = [package for module, package in NEEDS.items() if importlib.util.find_spec(module) is None]
    return f"{command} needs {', '.join(missing)}: pip install 'pacl-kernels[train]'" if missing else None


def _doctor(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from .doctor import main

    return main(arguments.json)


def _run(command: str, argv: Sequence[str]) -> int:
    missing = _missing(command)
    if missing:
        print(f"pacl: error: {missing}", file=sys.stderr)
        return 2
    try:
        return importlib.import_module(OWN_FLAGS[command][0]).main(argv, f"pacl {command}")
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"pacl: error: {error}", file=sys.stderr)
        return 1
