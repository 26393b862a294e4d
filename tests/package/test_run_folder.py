"""The folder of a run belongs to one run at a time, and logs of two runs never mix."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("open_clip")
pytest.importorskip("tyro")
from pacl.training.run import Run
from running import final, lines, train

BROKEN = {"lr": 1e37, "grad_clip_norm": "None"}  # the second step's loss is not finite, before any checkpoint


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("resume", [{}, {"resume": "latest"}])
def test_a_second_run_in_the_same_folder_is_refused(resume, run_world, tmp_path, capsys, monkeypatch):
    pytest.importorskip("fcntl")
    step, refused = Run._step, []

    def second(self, batch):
        if self.step == 1:
            before = contents(tmp_path / "pacl")
            refused.append(train(run_world, tmp_path, max_steps=3, seed=1, **resume))
            refused.append(contents(tmp_path / "pacl") == before)
        return step(self, batch)

    monkeypatch.setattr(Run, "_step", second)
    assert train(run_world, tmp_path, max_steps=3, save_frequency=1) == 0
    assert refused == [1, True]
    error = capsys.readouterr().err
    assert error.startswith(f"pacl: error: name: {tmp_path / 'pacl'} is in use by process ")
    assert f"(lock file {tmp_path / 'pacl/.lock'})" in error
    assert final(tmp_path)["step"] == 3 and not (tmp_path / "pacl/.lock").exists()


def test_a_run_that_died_before_its_first_checkpoint(run_world, tmp_path, capsys):
    folder = tmp_path / "pacl"
    validated = {"val_data": run_world / "scenes/eval-000.tar", "val_frequency": 1}
    for _ in range(2):
        assert train(run_world, tmp_path, log_every_n_steps=1, **BROKEN, **validated) == 1
        died = contents(folder)
        assert {"out.log", "config.yaml", "not_finite_rank0.json", "results.jsonl", "embedder/config.json"} < set(died)
        assert train(run_world, tmp_path, train_data="missing.tar") == 1
        assert contents(folder) == died, "a run that did not begin changed the logs of another"
        capsys.readouterr()
    assert f"an earlier run in {folder} saved no checkpoint; its files are now in {folder / 'earlier-1'}" in (
        (folder / "out.log").read_text()
    )
    assert train(run_world, tmp_path, max_steps=2, log_every_n_steps=1, resume="latest") == 0
    assert capsys.readouterr().out.splitlines()[0].endswith(f"its files are now in {folder / 'earlier-2'}")
    assert contents(folder / "earlier-2") == {k: x for k, x in died.items() if not k.startswith("earlier-1")}
    assert [row["step"] for row in lines(folder / "metrics.jsonl")] == [1, 2]
    assert not (folder / "results.jsonl").exists() and not (folder / "not_finite_rank0.json").exists()
    log = (folder / "out.log").read_text()
    assert "nan" not in log and log.count("steps: 2 of 12 pairs") == 1


def test_an_error_of_another_run_is_not_in_the_log(run_world, tmp_path):
    assert train(run_world, tmp_path, max_steps=1) == 0
    before = contents(tmp_path)
    assert train(run_world, tmp_path, max_steps=2) == 1
    assert contents(tmp_path) == before


def test_a_run_that_does_not_begin_leaves_no_folder(run_world, tmp_path):
    assert train(run_world, tmp_path / "logs", train_data="missing.tar") == 1
    assert not (tmp_path / "logs/pacl").exists()
    assert train(run_world, tmp_path, dry_run=None) == 0
    assert not (tmp_path / "pacl").exists()
