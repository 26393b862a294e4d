"""Runs of `pacl train` that lose a data reader, a process, memory or patience: one line, and the last step is saved."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest

pytest.importorskip("open_clip")
pytest.importorskip("tyro")
import torch
from dies import children, fork_pacl, fork_ranks
from forks import status
from pacl.cli import main
from pacl.data.readers import _unless_disconnected
from pacl.failures import describe
from pacl.training.checkpoints import checkpoints
from pacl.training.trainer import Trainer
from running import assert_same_state, final, flags

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux to find a process's children")
PATIENCE = 60  # seconds for the end of a process on a busy machine


def command(world: Path, logs: Path, **changes) -> list[str]:
    changes = {"workers": 2, "max_steps": 4000, "save_frequency": 10_000, "log_every_n_steps": 1} | changes
    return ["train", *flags(world, logs, **changes)]


def wait_for_steps(logs: Path, count: int) -> None:
    """Wait until a run in another process has logged `count` steps."""
    end = time.monotonic() + 120
    while not ((log := logs / "pacl/metrics.jsonl").exists() and len(log.read_text().splitlines()) >= count):
        assert time.monotonic() < end, (logs / "output").read_text()
        time.sleep(0.02)


def trained(logs: Path) -> dict:
    """Return the part of the last checkpoint that does not name folders and flags."""
    state = final(logs)
    return {name: state[name] for name in ("step", "state_dict", "optimizer", "data")}


def has_the_bits_of_a_whole_run(world: Path, logs: Path, **changes) -> int:
    """Go on with a run for two steps and compare it with one that was never stopped; return the step it had reached."""
    torch.set_num_threads(1)
    step = final(logs)["step"]
    ends = {"max_steps": step + 2, "lr_scheduler": "const"} | changes
    assert main(command(world, logs, **ends, resume="latest")) == 0
    assert main(command(world, logs / "whole", **ends)) == 0
    assert_same_state(trained(logs), trained(logs / "whole"))
    return step


def the_error(logs: Path) -> str:
    """Return the only line of a run's output that is an error; out.log has it, too, and there is no traceback.

    The readers of a killed process may print one: their lines begin with "[rank1]:".
    """
    output = (logs / "output").read_text()
    (line,) = [line for line in output.splitlines() if line.startswith("pacl: error: ")]
    assert not re.search(r"^(\[rank0\]: )?Traceback", output, re.M)
    assert (logs / "pacl/out.log").read_text().splitlines()[-1] == line
    return line


@pytest.mark.sampled(2)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_data_reader_that_hangs_does_not_outlive_a_signal(workers, world, tmp_path):
    run = fork_pacl(command(world, tmp_path, workers=workers, lr_scheduler="const"), tmp_path / "output")
    wait_for_steps(tmp_path, 3)
    for reader in children(run):
        os.kill(reader, signal.SIGSTOP)
    time.sleep(1)  # the run uses up what was read ahead, and then waits
    os.kill(run, signal.SIGTERM)
    begin = time.monotonic()
    assert status(run, PATIENCE) == 128 + signal.SIGTERM
    assert time.monotonic() - begin < 30, "a few seconds on a machine that does nothing else"
    step = has_the_bits_of_a_whole_run(world, tmp_path, workers=workers)
    assert f"stopped at step {step} of 4000; continue with --resume latest" in (tmp_path / "output").read_text()


def test_a_data_reader_that_dies(world, tmp_path):
    run = fork_pacl(command(world, tmp_path, lr_scheduler="const"), tmp_path / "output")
    wait_for_steps(tmp_path, 3)
    os.kill(children(run)[-1], signal.SIGKILL)
    assert status(run, PATIENCE) == 1
    error = the_error(tmp_path)
    step = has_the_bits_of_a_whole_run(world, tmp_path)
    assert re.fullmatch(
        r"pacl: error: data reader \d of 3 shard\(s\) was killed by SIGKILL, as when memory runs out; fewer --workers "
        rf"take less; step {step} of 4000 is saved, continue with --resume latest",
        error,
    )


@pytest.mark.sampled(2)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_is_lost(how, world, tmp_path):
    """The first process saves, whether the other one died or only stopped."""
    changes = {"workers": 1, "lr_scheduler": "const", "batch_size": 6} | (
        {"dist_timeout": 8} if how == signal.SIGSTOP else {}
    )
    first, second = fork_ranks(command(world, tmp_path, **changes), 2, tmp_path / "output")
    wait_for_steps(tmp_path, 3)
    os.kill(second, how)
    assert status(first, PATIENCE) == 1
    os.killpg(second, signal.SIGKILL)
    status(second)
    error = the_error(tmp_path)
    step = final(tmp_path)["step"]
    what = "another process was lost" if how == signal.SIGKILL else "another process did not answer in time"
    assert re.match(f"pacl: error: {what}.*; step {step} of 4000 is saved, continue with --resume latest", error)
    if how == signal.SIGKILL:
        ends = {**changes, "max_steps": step + 2}
        for more, logs in (({"resume": "latest"}, tmp_path), ({}, tmp_path / "whole")):
            (logs / "output").parent.mkdir(exist_ok=True)
            processes = fork_ranks(command(world, logs, **ends, **more), 2, logs / "output2")
            assert [status(process, PATIENCE) for process in processes] == [0, 0]
        assert_same_state(trained(tmp_path), trained(tmp_path / "whole"))


def test_all_processes_stop_although_one_waits_for_data(world, tmp_path):
    """A signal to all ends a run whose second process has a data reader that hangs."""
    changes = {"workers": 1, "batch_size": 6}
    processes = fork_ranks(command(world, tmp_path, **changes), 2, tmp_path / "output")
    wait_for_steps(tmp_path, 3)
    os.kill(children(processes[1])[-1], signal.SIGSTOP)
    time.sleep(1)
    for process in processes:
        os.kill(process, signal.SIGTERM)
    assert [status(process, PATIENCE) for process in processes] == [128 + signal.SIGTERM] * 2
    output = (tmp_path / "output").read_text()
    assert f"stopped at step {final(tmp_path)['step']} of 4000; continue with --resume latest" in output
    assert "error" not in output


@pytest.mark.parametrize("when", ["forward", "update"])
def test_memory_that_runs_out(when, world, tmp_path, monkeypatch, capsys):
    """The last complete step is saved, unless the memory ran out while the weights changed."""
    real, steps = Trainer.step, 3

    def step(self, number, *rest):
        if number == steps and when == "forward":
            torch.empty(2**60)
        if number == steps:
            self.optimiser.register_step_pre_hook(lambda *_: torch.empty(2**60))
        return real(self, number, *rest)

    monkeypatch.setattr(Trainer, "step", step)
    assert main(command(world, tmp_path, workers=0)) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    kept = "step 3 of 4000 is saved, continue with --resume latest" if when == "forward" else "nothing saved"
    assert error == (
        "pacl: error: out of memory in this process, which asked for 4611686018427387904 bytes more; a smaller "
        f"--batch-size or fewer --workers take less; {kept}"
    )
    assert (tmp_path / "pacl/out.log").read_text().splitlines()[-1] == error
    assert len(checkpoints(tmp_path / "pacl/checkpoints")) == (when == "forward")
    if when == "forward":  # the batch of the step that failed was read, but is read again
        assert final(tmp_path)["data"] == [{"batches": 3, "workers": 0, "places": [[0, 36]]}]


def test_a_mistake_keeps_its_traceback_and_the_last_step(world, tmp_path, monkeypatch):
    real = Trainer.step

    def step(self, number, *rest):
        return real(self, number, *rest) if number < 2 else len(None)

    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(TypeError):
        main(command(world, tmp_path, workers=0))
    assert final(tmp_path)["step"] == 2
    assert (tmp_path / "pacl/out.log").read_text().splitlines()[-1].startswith("pacl: error: TypeError: object of type")


def test_failures_are_told_from_mistakes():
    def of(run) -> str | None:
        with pytest.raises(Exception) as caught:
            run()
        return describe(caught.value)

    assert of(lambda: torch.empty(2**60)).startswith("out of memory in this process, which asked for 46116860184")
    assert of(lambda: bytearray(2**62)).startswith("out of memory in this process; a smaller")
    gpu = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 1 GiB")
    assert describe(gpu).startswith("out of memory in the GPU, which asked for 20.00 GiB more")
    assert describe(MemoryError("Caught MemoryError in DataLoader worker process 0.")).startswith(
        "out of memory in a data reader; a smaller"
    )
    assert of(lambda: torch.zeros(2) @ torch.zeros(3)) is None and of(lambda: [][0]) is None


@pytest.fixture
def world(run_world) -> Path:
    return run_world


def test_a_broken_connection_to_a_reader_is_no_news(capsys):
    """A signal may end the wait in the midst of a batch's transfer; the reader's thread for it sees that break."""
    for error in (ConnectionResetError("reset"), EOFError(), KeyError("a mistake")):
        _unless_disconnected(type(error), error, None)
    assert capsys.readouterr().err == "KeyError: 'a mistake'\n"
