"""Dispatch to commands by name, the example in each command's help, and the line that names the next command."""

from __future__ import annotations

import importlib
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence

# Exit statuses besides 1, an error. docs/getting-started.md explains them.
USAGE = 2
LEFT_OUT = 3  # done, but a part of the input was left out or has problems
INTERRUPTED = 130  # as shells report Ctrl-C
CUT_OFF = 141  # as shells report a program whose output nobody reads any more

Main = Callable[[Sequence[str], str], int]
# The last lines of each command's help.
EXAMPLES = {
    "pacl demo": "pacl demo --out toy",
    "pacl data pack": "pacl data pack pairs.csv --image-root images --out shards",
    "pacl data check": "pacl data check 'shards/{00000..00015}.tar' --sample 0",
    "pacl doctor": "pacl doctor --json",
    "pacl train": "pacl train --train-data 'cc3m-{0000..0331}.tar' --model ViT-B-16 --pretrained openai --name cc3m",
    "pacl features": "pacl features --train-data pairs.csv --model ViT-B-16 --pretrained openai --out features",
    "pacl look": "pacl look photo.jpg --words 'dog,grass,red ball' --checkpoint logs/cc3m",
    "pacl segment": "pacl segment photos --classes classes.txt --checkpoint logs/cc3m --out masks",
    "pacl evaluate segmentation": (
        "pacl evaluate segmentation --dataset voc21 --data-root data/VOCdevkit/VOC2012 --checkpoint logs/cc3m"
    ),
    "pacl evaluate retrieval": "pacl evaluate retrieval --data captions_val2017.json --checkpoint logs/cc3m",
    "pacl evaluate classification": (
        "pacl evaluate classification --dataset cifar10 --data-root data --checkpoint logs/cc3m"
    ),
    "pacl evaluate alignment": (
        "pacl evaluate alignment --dataset voc21 --data-root data/VOCdevkit/VOC2012 --checkpoint logs/cc3m"
    ),
    "pacl evaluate coherence": (
        "pacl evaluate coherence --dataset voc21 --data-root data/VOCdevkit/VOC2012 --checkpoint logs/cc3m"
    ),
    "pacl evaluate table": "pacl evaluate table results/voc21_ViT-B-16-openai_cc3m_tcl.json",
    "pacl compare": "pacl compare logs/cc3m logs/other results --images photos --words 'dog,grass' --out compare.html",
    "pacl serve": "pacl serve --checkpoint logs/cc3m --examples photos",
}


def run_command(commands: Mapping[str, tuple[str | Main, str]], argv: Sequence[str], prog: str, about: str) -> int:
    """Run the command that `argv` begins with, or list all commands; returns the exit status, 2 for an unknown name.

    commands: from each name to its main(argv, prog), or to the module that has it, and a line of help. about: a
    sentence about all of them.
    """
    if argv and argv[0] in commands:
        found = commands[argv[0]][0]
        run: Main = importlib.import_module(found).main if isinstance(found, str) else found
        return run(list(argv[1:]), f"{prog} {argv[0]}")
    asked = bool(argv) and argv[0] in ("-h", "--help")
    out = sys.stdout if asked else sys.stderr
    print(f"usage: {prog} COMMAND ...; {prog} COMMAND --help\n\n{about}\n", file=out)
    width = max(map(len, commands)) + 2
    for name, (_, text) in commands.items():
        print(f"  {name:<{width}}{text}", file=out)
    if asked:
        return 0
    got = f"got {argv[0]!r}" if argv else "got none"
    print(f"\npacl: error: command: {got}, expected one of {', '.join(commands)}", file=sys.stderr)
    return USAGE


def example(prog: str) -> str:
    """Return the end of the help of the command `prog`: an example of it."""
    return f"example: {EXAMPLES[prog]}"


def next_command(*words: str | os.PathLike) -> str:
    """Return the line that names the next command, "Next: pacl ...", quoted for a shell.

    words: the command's words after "pacl", the user's own paths among them.
    """
    return "Next: " + shlex.join(["pacl", *(os.fspath(word) for word in words)])
