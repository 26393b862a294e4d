"""The public names of `pacl` are loaded when they are first used, and the documentation explains each of them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pacl
import pytest

ROOT = Path(__file__).parents[2]


def test_importing_pacl_imports_no_package():
    code = """
import sys
before = set(sys.modules)
import pacl
new = {name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names
assert new == {"pacl"}, new
assert set(pacl.__all__) <= set(dir(pacl))
sys.modules["open_clip"] = None  # as if it were not installed
try:
    pacl.load_towers
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stderr, done.returncode) == ("", 0)
    assert done.stdout == "pacl.load_towers needs open_clip: pip install 'pacl-kernels[train]'\n"


def test_public_names_are_those_of_their_modules():
    pytest.importorskip("open_clip")
    from pacl.segment.predict import Segmenter
    from pacl.sharing import load_pacl

    assert pacl.Segmenter is Segmenter and pacl.load_pacl is load_pacl
    for name in pacl.__all__:
        assert getattr(pacl, name).__name__ == name and getattr(pacl, name).__doc__
    with pytest.raises(AttributeError, match="module 'pacl' has no attribute 'load_palc'"):
        pacl.load_palc  # noqa: B018


@pytest.mark.parametrize("name", pacl.__all__)
def test_the_documentation_names(name):
    texts = [path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))]
    assert any(re.search(rf"\b{name}\b", text) for text in texts)
