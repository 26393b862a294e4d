"""The `pacl` command."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Sequence

from .commands import CUT_OFF, INTERRUPTED, USAGE, run_command
from .failures import describe, sentence

ABOUT = "Patch Aligned Contrastive Learning: train, segment and measure. `pacl --version` prints the version."
# For each command, the module whose main(argv, prog) runs it, and a line of help.
COMMANDS = {
    "demo": ("pacl.demo.command", "Train and segment in a few minutes."),
    "data": ("pacl.data.command", "Pack image-caption pairs into shards, or check them."),
    "doctor": ("pacl.doctor", "Report what runs here and what is missing, and check the backends."),
    "train": ("pacl.training.command", "Train the vision embedder on image-caption pairs."),
    "features": ("pacl.training.features", "Compute the features of frozen towers once and store them for training."),
    "look": ("pacl.segment.command", "Show where an image matches words."),
    "segment": ("pacl.segment.command", "Segment images and videos by a list of classes."),
    "evaluate": ("pacl.evaluate.command", "Measure a model on datasets, and print tables of results."),
    "compare": ("pacl.compare.command", "Show training runs, embedders and results side by side on one page."),
    "serve": ("pacl.serve.command", "Serve a local page: drop an image, type words, click patches."),
}
# Modules of the extra "train" and their packages. Every command but doctor, which reports what is missing, needs them.
NEEDS = {
    "open_clip": "open_clip_torch",
    "webdataset": "webdataset",
    "torchvision": "torchvision",
    "PIL": "pillow",
    "tyro": "tyro",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: sys.argv) and return its exit status.

    A ValueError or OSError of a command becomes one line on standard error, and status 1; so do memory that runs out
    and a data reader that dies.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    _print_everything()
    if argv[:1] == ["--version"]:
        print(f"pacl-kernels {_version('pacl-kernels')}, torch {_version('torch')}")
        return 0
    missing = [package for module, package in NEEDS.items() if importlib.util.find_spec(module) is None]
    if missing and argv and argv[0] in COMMANDS and argv[0] != "doctor":
        print(f"pacl: error: {argv[0]} needs {', '.join(missing)}: pip install 'pacl-kernels[train]'", file=sys.stderr)
        return USAGE
    try:
        return run_command(COMMANDS, argv, "pacl", ABOUT)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python writes when it ends
        return CUT_OFF
    except Exception as error:
        if describe(error) is None and not isinstance(error, (ValueError, OSError)):
            raise
        print(f"pacl: error: {sentence(error)}", file=sys.stderr)
        return 1


def _print_everything() -> None:
    """Let standard output escape what the terminal's encoding lacks: a name in a message must not end the command."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)  # some streams that programs put in its place have none
    if reconfigure is not None and sys.stdout.errors == "strict":
        reconfigure(errors="backslashreplace")


def _version(package: str) -> str:
    """Return the version of an installed package, without importing it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "is not installed"
