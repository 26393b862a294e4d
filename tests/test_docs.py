"""The Python on the pages of the documentation runs, and the API page lists every public name.

`.ci/lint docs` builds the site and checks its links. A block that is not marked `python` is not run: commands, and
programs that need a GPU or several processes.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pacl
import pytest
import torch

import pacl_kernels

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LISTED = re.compile(r"^::: (\S+)$", re.MULTILINE)


def blocks(page: str) -> list[str]:
    """Return the Python blocks of a page, each behind as many empty lines as are above it: errors name the line."""
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    found = [match for match in BLOCK.finditer(text) if match[1] == "python"]
    return ["\n" * text.count("\n", 0, match.start(2)) + match[2] for match in found]


def settings() -> tuple:
    return torch.are_deterministic_algorithms_enabled(), torch.get_num_threads(), torch.get_default_dtype()


@pytest.mark.parametrize(
    "page",
    [
        "getting-started",
        "api",
        "distributed",
        "faq",
        "math",
        "pairs",
        "tokens",
        "recipes/export",
        "recipes/late-interaction",
        "recipes/other-losses",
    ],
)
def test_the_python_of_a_page_runs(page, capsys):
    """Blocks run in order in one namespace, and change no global setting of torch."""
    torch.manual_seed(0)
    before = settings()
    found, names = blocks(page), {"__name__": "page"}
    assert found, f"docs/{page}.md has no Python block"
    for block in found:
        exec(compile(block, f"docs/{page}.md", "exec"), names)
    assert settings() == before
    if page == "getting-started":
        assert names["loss"] < 0.5 and names["right"] > 0.9, capsys.readouterr().out


def test_the_api_page_lists_every_public_name():
    """Every name of `__all__` has an entry, and every entry is a thing that exists and has a docstring."""
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    listed = LISTED.findall(page)
    assert len(set(listed)) == len(listed)
    missing = {f"pacl_kernels.{name}" for name in pacl_kernels.__all__} - {*listed}
    assert missing == {"pacl_kernels.__version__"} and "`pacl_kernels.__version__`" in page  # a string has no docstring
    found = []
    for entry in listed:
        module, _, name = entry.rpartition(".")
        thing = getattr(importlib.import_module(module), name)
        found.append(thing)
        if callable(thing) and module not in ("pacl_kernels.checks", "pacl_kernels.groups"):  # those are type aliases
            assert thing.__doc__, f"{entry} has no docstring"
    missing = {name for name in getattr(pacl, "__all__", ()) if getattr(pacl, name) not in found}
    assert not missing, f"names of pacl that the page does not list: {missing}"
