"""Long runs of `pacl train` hold no more at their end than at their beginning, and a full disk loses nothing."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("open_clip")
pytest.importorskip("tyro")
import torch
from dies import fork_pacl
from pacl.cli import main
from pacl.training.checkpoints import checkpoints, load_checkpoint
from running import assert_same_state, final, flags

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import long_run

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux")


@pytest.mark.long
def test_nothing_grows(tmp_path, monkeypatch):
    """A short run of `benchmarks/long_run.py`, with checkpoints, validations and data readers."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    world = long_run.make_world(tmp_path / "world")
    run = fork_pacl(long_run.words(world, tmp_path, steps=60, every=1), tmp_path / "printed")
    codes: list[int] = []

    def ended() -> bool:
        with contextlib.suppress(TimeoutError, ChildProcessError):
            found, code = os.waitpid(run, os.WNOHANG)
            codes.extend([os.waitstatus_to_exitcode(code)] * bool(found))
        return bool(codes)

    samples = [sample for sample, _ in long_run.watch(run, tmp_path / "pacl", temporary, ended, 0.01)]
    assert codes == [0], (tmp_path / "printed").read_text()
    parts = long_run.medians(samples)
    assert not long_run.growth(parts)
    last = parts[-1]
    assert last["checkpoints"] <= long_run.KEEP + 1 and last["processes"] >= 2 and last["memory_mib"] > 50
    assert len(checkpoints(tmp_path / "pacl/checkpoints")) == long_run.KEEP
    assert not [path for path in temporary.rglob("*") if path.is_file()]
    assert len((tmp_path / "pacl/metrics.jsonl").read_text().splitlines()) == 60


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """Mount a disk of two megabytes, where that is allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if (
        mount is None
        or subprocess.run([mount, "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True).returncode
    ):
        pytest.skip("this user may not mount a disk")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_disk_that_fills_up_loses_nothing(run_world, disk, tmp_path, capsys):
    """The run ends with one line and all of its checkpoints; with more room it ends with the bits of a whole run."""

    def the_error() -> str:
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pacl: error: ")]
        assert re.search(r"/disk/\S+ (could not be written \(|cannot be written: the disk is full)", line), line
        return line

    torch.set_num_threads(1)
    changes = {"save_frequency": 1, "keep_checkpoints": 99, "log_every_n_steps": 1, "max_steps": 12}
    assert main(["train", *flags(run_world, tmp_path / "whole", **changes)]) == 0
    assert main(["train", *flags(run_world, disk, **changes)]) == 1
    the_error()
    saved = checkpoints(disk / "pacl/checkpoints")
    assert 0 < len(saved) < 12 and all(load_checkpoint(path)["step"] == i for i, path in enumerate(saved, 1))
    assert not list(disk.rglob("*.part"))
    assert main(["train", *flags(run_world, disk, **changes, resume="latest")]) == 1
    the_error()
    assert checkpoints(disk / "pacl/checkpoints")[: len(saved)] == saved
    subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
    assert main(["train", *flags(run_world, disk, **changes, resume="latest")]) == 0
    mine, whole = final(disk), final(tmp_path / "whole")
    for name in ("step", "state_dict", "optimizer", "data"):
        assert_same_state(mine[name], whole[name])
    steps = [json.loads(line)["step"] for line in (disk / "pacl/metrics.jsonl").read_text().splitlines()]
    assert set(steps) == set(range(1, 13))
