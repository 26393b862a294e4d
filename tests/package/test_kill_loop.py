"""A few rounds of `kill_loop.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("open_clip")
pytest.importorskip("tyro")
import torch
from kill_loop import COMMANDS, make_world, run_loop

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("kill_loop"))


@pytest.mark.long
@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "shared"])  # see test_features_shared.py
def test_killed_at_random(command, world, tmp_path):
    torch.set_num_threads(1)
    assert run_loop(command, kills=2, seed=0, world=world, folder=tmp_path).kills == 2
