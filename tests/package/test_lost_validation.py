"""A validation that was due at the step of a checkpoint is made up when the run resumes."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

pytest.importorskip("open_clip")
pytest.importorskip("tyro")
import torch
from forks import fork, status
from pacl.training.run import Run
from running import assert_same_state, final, lines, train


@pytest.fixture(scope="module")
def settings(run_world) -> dict:
    return {"val_data": run_world / "scenes/eval-000.tar", "val_frequency": 4, "save_frequency": 2, "lr": 0.01}


@pytest.fixture(scope="module")
def whole(run_world, settings, tmp_path_factory) -> Path:
    """Run 8 steps without an interruption; return the folder of the logs."""
    torch.set_num_threads(1)
    logs = tmp_path_factory.mktemp("whole") / "deeper"  # a checkpoint does not depend on its folder
    assert train(run_world, logs, max_steps=8, **settings) == 0
    return logs


def assert_same_run(logs: Path, whole: Path) -> None:
    """Assert that two runs end with the same bits, the same validations and the same metrics of the embedder."""
    assert_same_state(final(logs), final(whole))
    rows, expected = (lines(folder / "pacl/results.jsonl") for folder in (logs, whole))
    assert rows == expected
    notes = json.loads((logs / "pacl/embedder/config.json").read_text())["training"]
    assert notes["metrics"] == rows[-1] and notes["steps"] == rows[-1]["step"]
    name = "pacl/embedder/model.safetensors"
    assert (logs / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("number, at", [(signal.SIGTERM, 4), (signal.SIGINT, 8)])
def test_a_signal_in_the_step_of_a_validation(number, at, run_world, settings, whole, tmp_path, monkeypatch):
    step = Run._step

    def signalled(self, batch):
        if self.step + 1 == at:
            os.kill(os.getpid(), number)
        return step(self, batch)

    monkeypatch.setattr(Run, "_step", signalled)
    assert train(run_world, tmp_path, max_steps=8, **settings) == 128 + number
    monkeypatch.undo()
    assert final(tmp_path)["step"] == at
    assert train(run_world, tmp_path, max_steps=8, resume="latest", **settings) == 0
    assert_same_run(tmp_path, whole)


def test_killed_between_the_checkpoint_and_its_validation(run_world, settings, whole, tmp_path):
    save = Run.save

    def save_and_die(self):
        save(self)
        if self.step == 4:
            os.kill(os.getpid(), signal.SIGKILL)

    def run() -> int:
        Run.save = save_and_die
        return train(run_world, tmp_path, max_steps=8, **settings)

    assert status(fork(run)) == -signal.SIGKILL
    assert final(tmp_path)["step"] == 4 and not (tmp_path / "pacl/results.jsonl").exists()
    assert train(run_world, tmp_path, max_steps=8, resume="latest", **settings) == 0
    assert_same_run(tmp_path, whole)


def test_killed_before_the_embedder_got_its_results(run_world, settings, whole, tmp_path, monkeypatch):
    """A validation that is in results.jsonl is not made again, but the embedder gets its results."""

    def lost(self):
        if self.validated:
            raise OSError("the disk is gone")

    monkeypatch.setattr(Run, "export", lost)
    assert train(run_world, tmp_path, max_steps=4, **settings) == 1
    monkeypatch.undo()
    assert train(run_world, tmp_path, max_steps=4, resume="latest", **settings) == 0
    notes = json.loads((tmp_path / "pacl/embedder/config.json").read_text())["training"]
    assert notes["metrics"] == lines(tmp_path / "pacl/results.jsonl")[0] and notes["steps"] == 4
    assert len(lines(tmp_path / "pacl/results.jsonl")) == 1


def test_the_results_survive_resuming(run_world, settings, tmp_path, monkeypatch):
    """Between two validations the embedder of a resumed run keeps the results of the last one; a copied checkpoint has
    them too.
    """
    assert train(run_world, tmp_path, max_steps=5, **settings | {"val_frequency": 3, "save_frequency": 4}) == 0
    (row,) = lines(tmp_path / "pacl/results.jsonl")[:1]
    saved = tmp_path / "pacl/checkpoints"
    (saved / "step_00000005.pt").unlink()
    step = Run._step

    def stopped(self, batch):
        os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch)

    monkeypatch.setattr(Run, "_step", stopped)
    for name, resume in (("pacl", "latest"), ("copy", saved / "step_00000004.pt")):
        changes = settings | {"val_frequency": 100, "resume": resume, "name": name, "max_steps": 6}
        assert train(run_world, tmp_path, **changes) == 128 + signal.SIGTERM
        notes = json.loads((tmp_path / name / "embedder/config.json").read_text())["training"]
        assert notes["steps"] == 5 and notes["metrics"] == row


def test_flags_of_a_validation_given_later(run_world, settings, tmp_path):
    """A finished run that is resumed with --val-data for the first time gets the validation of its last step."""
    assert train(run_world, tmp_path, max_steps=2) == 0
    for _ in range(2):
        assert train(run_world, tmp_path, max_steps=2, resume="latest", val_data=settings["val_data"]) == 0
        assert [row["step"] for row in lines(tmp_path / "pacl/results.jsonl")] == [2]
    assert json.loads((tmp_path / "pacl/embedder/config.json").read_text())["training"]["metrics"]["step"] == 2
