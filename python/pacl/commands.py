"""Dispatch to commands by name, and the line with which a command names the next one."""

from __future__ import annotations

import importlib
import os
import shlex
import sys
from collections.abc import Mapping, Sequence


def run_command(commands: Mapping[str, tuple[str, str]], argv: Sequence[str], prog: str, about: str) -> int:
    """Run the command that `argv` begins with, or list all commands; returns the exit status, 2 for an unknown name.

    commands: from each name to the module whose main(argv, prog) runs it, and a line of help. about: a sentence about
    all of them.
    """
    if argv and argv[0] in commands:
        return importlib.import_module(commands[argv[0]][0]).main(list(argv[1:]), f"{prog} {argv[0]}")
    asked = bool(argv) and argv[0] in ("-h", "--help")
    out = sys.stdout if asked else sys.stderr
    print(f"usage: {prog} COMMAND ...; {prog} COMMAND --help\n\n{about}\n", file=out)
    width = max(map(len, commands)) + 2
    for name, (_, text) in commands.items():
        print(f"  {name:<{width}}{text}", file=out)
    if not asked:
        got = f"got {argv[0]!r}" if argv else "got none"
        print(f"\npacl: error: command: {got}, expected one of {', '.join(commands)}", file=sys.stderr)
    return 0 if asked else 2


def next_command(*words: str | os.PathLike) -> str:
    """Return the line that names the next command, "Next: pacl ...", quoted for a shell.

    words: the command's words after "pacl", the user's own paths among them.
    """
    return "Next: " + shlex.join(["pacl", *map(os.fspath, words)])
