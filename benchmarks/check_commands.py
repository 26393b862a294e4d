"""Check commands without running them: read lines of name, limit in seconds and command from standard input.

`on_gpu.sh --dry-run` writes them, separated by tabs. A script of Python must parse its arguments, and the files and
expressions of a run of pytest must be there and be valid.
"""

from __future__ import annotations

import argparse
import runpy
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from _pytest.mark.expression import Expression

WRAPPERS = ("env", "ncu", "compute-sanitizer")  # programs whose arguments end in a command of Python


class _Parsed(Exception):
    """The script has parsed its arguments."""


@contextmanager
def _stopped_behind_the_parser() -> Iterator[None]:
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, *given, **more):
        parse(self, *given, **more)
        raise _Parsed

    argparse.ArgumentParser.parse_args = parse_and_stop
    try:
        yield
    finally:
        argparse.ArgumentParser.parse_args = parse


def _check_pytest(arguments: list[str]) -> str | None:
    for option, value in zip(arguments, arguments[1:], strict=False):
        if option in ("-m", "-k"):
            Expression.compile(value)
    for word in arguments:
        if word.startswith("tests/") and not Path(word).exists():
            return f"there is no {word}"
    return None


def _check_python(arguments: list[str]) -> str | None:
    """Return None, or a sentence that says what is wrong with the arguments of Python."""
    if arguments[:2] == ["-m", "pytest"]:
        return _check_pytest(arguments[2:])
    before = sys.argv, sys.path[:]
    is_module = arguments[0] == "-m"
    script, sys.argv = arguments[is_module], arguments[is_module:]
    try:
        with _stopped_behind_the_parser():
            if is_module:
                runpy.run_module(script, run_name="__main__", alter_sys=True)
            elif not Path(script).exists():
                return f"there is no {script}"
            else:
                sys.path.insert(0, str(Path(script).parent))
                runpy.run_path(script, run_name="__main__")
    except _Parsed:
        return None
    except SystemExit as error:
        return f"{script} ends with {error.code}"
    finally:
        sys.argv, sys.path[:] = before
    return f"{script} parses no arguments"


def check(command: list[str]) -> str | None:
    """Return None, or a sentence that says what is wrong with a command."""
    if command[0] in WRAPPERS:
        command = command[next((i for i, word in enumerate(command) if "python" in Path(word).name), 0) :]
    if "python" not in Path(command[0]).name:
        return f"{command[0]} is not Python, which is all that can be checked"
    if command[1] == "setup.py":
        return None if Path("setup.py").exists() else "there is no setup.py"
    return _check_python(command[1:])


def main() -> int:
    wrong = 0
    for line in sys.stdin:
        name, limit, text = line.rstrip("\n").split("\t")
        found = check(shlex.split(text))
        wrong += found is not None
        print(f"{name} ({limit} s): {text}" if found is None else f"{name}: {found}: {text}", flush=True)
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
