"""The `pacl` command."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import re
import sys
from collections.abc import Sequence
from pathlib import Path

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
    # open_clip writes hyphens, its peers underscores: both work.
    argv = [re.sub(r"^--[^=]+", lambda flag: flag[0].replace("_", "-"), word) for word in argv]
    missing = [package for module, package in NEEDS.items() if importlib.util.find_spec(module) is None]
    if missing and argv and argv[0] in COMMANDS and argv[0] != "doctor":
        print(f"pacl: error: {argv[0]} needs {', '.join(missing)}: pip install 'pacl-kernels[train]'", file=sys.stderr)
        return 2
    if argv and argv[0] == "demo":
        return _argparse_command(argv)
    try:
        return run_command(COMMANDS, argv, "pacl", "Patch Aligned Contrastive Learning: train and look.")
    except KeyboardInterrupt:
        return INTERRUPTED
    except (ValueError, OSError) as error:
        print(f"pacl: error: {one_line(error)}", file=sys.stderr)
        return 1


def _argparse_command(argv: list[str]) -> int:
    """Run `pacl demo`, whose options are still argparse's."""
    parser = argparse.ArgumentParser(prog="pacl", description="Patch Aligned Contrastive Learning: train and look.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands)
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments, parser)
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"pacl: error: {error}", file=sys.stderr)
        return 1


def _add_demo(commands) -> None:
    text = (
        "Train a small CLIP on generated scenes, freeze it, train PACL's vision embedder on it, and show how both "
        "segment scenes they have not seen. Needs no download and no GPU; under 5 minutes on two cores."
    )
    demo = commands.add_parser("demo", help="train and segment in a few minutes", description=text)
    demo.set_defaults(run=_demo)
    demo.add_argument("--out", type=Path, default=Path("pacl-demo"), metavar="DIR", help="results (%(default)s)")
    demo.add_argument("--quick", action="store_true", help="every stage once in seconds, numbers without meaning")
    demo.add_argument(
        "--full", action="store_true", help="all measures of the paper too, a few minutes more: report.html, full.json"
    )
    for name, text in (
        ("seed", "same seed, same numbers (default: 0)"),
        ("threads", "torch's threads (default: those that torch takes by itself, 4 at most)"),
        ("clip-steps", "training steps of the CLIP"),
        ("embedder-steps", "training steps of each embedder"),
    ):
        demo.add_argument(f"--{name}", type=int, metavar="N", help=text)


def _demo(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if arguments.out.exists() and not arguments.out.is_dir():
        parser.error(f"argument --out: {arguments.out} is a file, expected a folder")
    from .demo.run import QUICK, DemoConfig, run

    given = vars(arguments)
    values = {item.name: given.get(item.name) for item in dataclasses.fields(DemoConfig)}
    try:
        settings = (QUICK if arguments.quick else {}) | {k: v for k, v in values.items() if v is not None}
        config = DemoConfig(**settings)
    except ValueError as error:
        parser.error(str(error))
    run(config, arguments.out, full=arguments.full)
    return 0
