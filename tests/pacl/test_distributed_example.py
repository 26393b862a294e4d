"""`examples/distributed.py` trains the demo's embedder in two processes with the same losses as in one."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("open_clip")
import torch
from pacl.data import scenes
from pacl.data.scene_shards import write_scenes
from pacl.demo.toy_clip import new_clip, save_clip
from ranks import TORCHRUN

EXAMPLE = Path(__file__).parents[2] / "examples" / "distributed.py"


@pytest.fixture
def demo(tmp_path) -> Path:
    """Create a folder like the demo's, with an untrained CLIP."""
    torch.manual_seed(0)
    save_clip(new_clip(), tmp_path / "clip")
    write_scenes(tmp_path / "scenes", "train", 48, seed=0, pairs=scenes.SEEN)
    return tmp_path


def losses(printed: str) -> list[float]:
    return [float(value) for value in re.findall(r"loss ([\d.]+)$", printed, re.MULTILINE)]


def test_two_processes_and_one_have_the_same_losses(demo, monkeypatch, capsys):
    options = [str(EXAMPLE), str(demo), "--scenes=48", "--steps=40", "--batch-size=15"]
    monkeypatch.setattr(sys, "argv", options)
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    one = losses(capsys.readouterr().out)
    run = subprocess.run(
        [*TORCHRUN, "2", *options],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    assert len(one) == 3 and one[-1] < one[0]
    assert losses(run.stdout) == pytest.approx(one, rel=1e-5)
