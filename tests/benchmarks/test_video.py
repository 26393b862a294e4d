"""`benchmarks/video.py`: scenes that move as their masks do, flicker by hand, and a short run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("open_clip")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import video  # noqa: E402
from pacl.data import scenes  # noqa: E402
from pacl.demo.toy_clip import new_clip, save_clip  # noqa: E402
from running import write_embedder  # noqa: E402


def test_layers_move_with_their_masks():
    """A shape keeps its pixels while its mask moves by `speed`, and turns back within TRAVEL."""
    path = video.bounce(np.arange(-200.0, 200.0))
    assert np.abs(path).max() == video.TRAVEL and set(np.abs(np.diff(path))) == {1.0}
    images, masks = zip(*video.moving_scene(np.random.default_rng(1), 4, 2.0), strict=True)
    label = next(x for x in np.unique(masks[0]) if x < len(scenes.PAIRS))
    colours = [image[mask == label].mean(0) for image, mask in zip(images, masks, strict=True)]
    centres = [np.argwhere(mask == label).mean(0) for mask in masks]
    assert np.ptp(colours, 0).max() < 12 and np.linalg.norm(centres[1] - centres[0]) > 0.5


def test_flicker_counts_pixels_whose_truth_stays():
    truth_before, truth = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 1])
    before, labels = torch.tensor([0, 0, 0, 1]), torch.tensor([2, 1, 1, 1])
    assert video.flicker(labels, before, truth, truth_before) == (2, 3)


def test_a_short_run(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    save_clip(new_clip(), tmp_path / "clip")
    write_embedder(tmp_path / "embedder", tmp_path / "clip")
    words = ["--checkpoint", tmp_path / "embedder", "--clips", 1, "--frames", 2, "--speeds", 1, "--strides", 1]
    words += ["--json", tmp_path / "out.json", "--picture", tmp_path / "out.png"]
    monkeypatch.setattr(sys, "argv", ["video.py", *map(str, words)])
    video.main()
    (case,) = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert case["temporal"]["0"]["miou"]["against_alone"] == [0, 0]
    found = {name: row["flicker"]["percent"] for name, row in case["temporal"].items()}  # the embedder is untrained
    assert len(set(found.values())) == len(found) == 6 and all(0 < value < 100 for value in found.values())
    assert (tmp_path / "out.png").stat().st_size > 1000 and "same place" in capsys.readouterr().out
