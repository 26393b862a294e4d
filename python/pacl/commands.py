"""Commands by name, for `pacl` and those of its commands that have some of their own."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence


def run_command(commands: Mapping[str, tuple[str, str]], argv: Sequence[str], prog: str, about: str) -> int:
    """Run the command that `argv` begins with, or list all; returns the exit status.

    commands: from the name to the module whose main(argv, prog) runs it, and a line of help. A name that is not there
    has status 2.
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
