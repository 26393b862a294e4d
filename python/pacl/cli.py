"""The `pacl` command."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import re
import sys
from collections.abc import Sequence
from pathlib import Path

INTERRUPTED = 130  # what shells report for a program ended by Ctrl-C
# Commands that parse their own flags: the module whose main(argv, prog) does it, and a line of help.
OWN_FLAGS = {
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
    _add_demo(commands)
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


def _demo(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    missing = _missing("demo")
    if missing:
        parser.error(missing)
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
