"""Docstrings open with a verb or a noun, and every option of a command line is explained by a sentence."""

import ast
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("pacl_kernels", "python", "benchmarks", "examples", "tests")
FORBIDDEN = re.compile(r"(What|Of|Whether|Where|Those|That which|As)\b")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def docstrings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and text of every docstring of a module, class or function."""
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and (text := ast.get_docstring(node)):
            yield node.body[0].lineno, text


def help_texts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and text of every option: the string below a dataclass field, which tyro shows, or `help=`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for field, below in pairwise(node.body):
                if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                    yield from _text(below.value)
        elif isinstance(node, ast.Call):
            for keyword in node.keywords:
                if keyword.arg == "help":
                    yield from _text(keyword.value)


def _text(node: ast.expr) -> Iterator[tuple[int, str]]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.lineno, node.value.strip()


def is_sentence(text: str) -> bool:
    """Return True for a text that opens with a capital or figure, with no forbidden word, and ends with a full stop."""
    return re.match("[A-Z0-9]", text) is not None and text.endswith(".") and not FORBIDDEN.match(text)


def offenders(texts: Callable[[ast.AST], Iterable[tuple[int, str]]], is_fine: Callable[[str], bool]) -> str:
    """Return every text of the repository that `is_fine` refuses, one per line with its place."""
    lines = []
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"), path)
            for number, text in texts(tree):
                if not is_fine(text):
                    lines.append(f"{path.relative_to(ROOT)}:{number}: {' '.join(text.split())[:100]}")
    return "\n".join(lines)


def test_docstrings_open_with_a_verb_or_a_noun():
    found = offenders(docstrings, lambda text: not FORBIDDEN.match(text))
    assert not found, f"these docstrings open with What, Of, Whether, Where, Those, That which or As:\n{found}"


def test_help_texts_are_sentences():
    found = offenders(help_texts, is_sentence)
    assert not found, f"these help texts need a capital first (no forbidden word) and a full stop last:\n{found}"


def test_the_collectors_see_what_they_look_for():
    """The collectors find docstrings and help texts, so that the tests above do not pass by reading nothing."""
    tree = ast.parse(
        '"""What a module does."""\n'
        "class Options:\n"
        '    """Of a run."""\n'
        "    seed: int = 0\n"
        '    """of the generator"""\n'
        "add('--quick', help='small shapes')\n"
        "def f():\n"
        '    """Whatever comes, return it."""\n'
    )
    assert [FORBIDDEN.match(text) is not None for _, text in docstrings(tree)] == [True, True, False]
    assert [text for _, text in help_texts(tree)] == ["of the generator", "small shapes"]
    assert is_sentence("Use small shapes.")
    assert not any(map(is_sentence, ("use small shapes.", "Use small shapes", "Of the generator.", "")))
