"""The pages of Lightning, Hugging Face and FSDP2 quote their examples, and the commands on them run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import TORCHRUN
from recipe_runs import LOSS

ROOT = Path(__file__).parents[2]
PAGES = {
    "lightning": ["lightning_module.py"],
    "hugging-face": ["hf_trainer.py", "accelerate_loop.py"],
    "fsdp": ["fsdp_cached.py"],
}
PROGRAMS = {
    "python": [sys.executable],
    "torchrun": [*TORCHRUN[:4]],
    "accelerate": [sys.executable, "-m", "accelerate.commands.accelerate_cli"],
}


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / f"docs/recipes/{page}.md").read_text(encoding="utf-8")
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [content for name, content in found if name == language]


def commands(page: str) -> list[list[str]]:
    lines = "".join(blocks(page, "")).splitlines()
    return [line.partition("#")[0].split() for line in lines]


@pytest.mark.parametrize("page", PAGES)
def test_a_page_quotes_its_examples(page):
    texts = [(ROOT / "examples/recipes" / name).read_text(encoding="utf-8") for name in PAGES[page]]
    lines = {line.strip() for text in texts for line in text.splitlines()}
    quoted = [line.strip() for line in "".join(blocks(page, "python")).splitlines()]
    assert len(quoted) > 5 and not [line for line in quoted if line not in lines]


@pytest.mark.recipes_full
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page(page):
    """All commands for one example and model print the same losses."""
    found: dict[tuple[str, bool], list[list[float]]] = {}
    for command in commands(page):
        (script,) = [word for word in command if word.endswith(".py")]
        done = subprocess.run(
            [*PROGRAMS[command[0]], *command[1:]],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, f"{command}: {done.stderr[-4000:]}"
        values = [float(value) for _, value in LOSS.findall(done.stdout)]
        assert len(values) >= 6, f"{command}: {done.stdout[-4000:]}"
        found.setdefault((script, "siglip" in command), []).append(values)
    for same in found.values():
        assert all(values == pytest.approx(same[0], rel=1e-5) for values in same)
