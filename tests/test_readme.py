"""README.md keeps its promises: its length, its two set-up commands, its links, and its Python."""

import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F

import pacl_kernels

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_it_is_read_in_one_go():
    assert len(TEXT.splitlines()) <= 130


def test_set_up_commands():
    """Programs find the two commands by the words `demo` and `test`, so no other fenced line may contain these."""
    for word in ("demo", "test"):
        (block,) = [content for _, content in BLOCKS if word in content]
        assert block.startswith("python3 -m venv .venv && .venv/bin/pip install "), f"{word}: {block}"
        assert block.count("\n") == 1, f"{word}: the command is alone in its block, in one line"


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            page = ROOT / (path or "README.md")
            assert page.exists(), target
            assert not anchor or anchor in anchors(page), target


def test_both_loops_compute_the_same_loss():
    """The lines that README replaces and those that replace them agree."""
    given, instead = (content for language, content in BLOCKS if language == "python")
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "patches": torch.randn(7, 5, 12, generator=generator, dtype=torch.float64),
        "texts": torch.randn(7, 12, generator=generator, dtype=torch.float64),
        "logit_scale": 10.0,
    }
    losses = []
    for lines in (given, instead):
        names = {"torch": torch, "F": F, **inputs}
        exec(lines, names)
        losses.append(float(names["loss"]))
    assert math.isclose(*losses, rel_tol=1e-12), losses


def test_every_backend_is_named():
    rows = re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE)
    assert sorted(rows) == sorted(pacl_kernels.available_backends())
