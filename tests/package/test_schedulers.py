"""The script for Slurm saves at a signal, goes back to the queue, resumes, and lets an error end the job.

Two processes on this machine stand for the nodes; `srun` and `scontrol` are stand-ins that write down what was asked.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("open_clip")
pytest.importorskip("tyro")
from dies import fork_ranks
from forks import status
from running import final, flags

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples/recipes/train.sbatch"
SRUN = """#!/bin/bash
trap 'touch "$STUB/terminated"' TERM
printf '%s\\n' "$@" > "$STUB/asked.new"
mv "$STUB/asked.new" "$STUB/asked"
until [ -e "$STUB/status" ]; do sleep 0.05; done
exit "$(cat "$STUB/status")"
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo "$3" | tr , '\\n'; else echo "$@" >> "$STUB/requeued"; fi
"""
pytestmark = pytest.mark.skipif(shutil.which("bash") is None or os.name == "nt", reason="needs bash")


def wait_until(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.02)


class Job:
    """A start of the script in a folder of its own, with two nodes."""

    def __init__(self, folder: Path, words: list[str]):
        self.folder = folder
        folder.mkdir()
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "STUB": str(folder)}
        environment |= {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node3,node5"}
        self.script = subprocess.Popen(["bash", SCRIPT, *words], env=environment)
        wait_until((folder / "asked").exists)
        self.asked = (folder / "asked").read_text().splitlines()

    def end(self, code: int) -> int:
        """Let srun end with this exit status; return that of the script."""
        (self.folder / "status.new").write_text(str(code))
        (self.folder / "status.new").rename(self.folder / "status")
        return self.script.wait(60)


def test_a_signal_saves_and_the_next_start_resumes(run_world, tmp_path):
    logs, printed = tmp_path / "logs", tmp_path / "printed"
    words = flags(run_world, logs, batch_size=6, max_steps=24, save_frequency=1000, log_every_n_steps=1)
    job = Job(tmp_path / "first", words)
    at = job.asked.index("pacl")
    assert job.asked[1] == "torchrun" and job.asked[at - 1 :] == ["-m", "pacl", "train", "--resume", "latest", *words]
    assert "node3:29400" in job.asked and "7-0" in job.asked
    command = job.asked[at + 1 :]
    processes = fork_ranks(command, 2, printed)
    wait_until(lambda: (log := logs / "pacl/metrics.jsonl").exists() and log.read_text().count("\n") >= 2)
    job.script.send_signal(signal.SIGUSR1)
    wait_until((tmp_path / "first/terminated").exists)
    for process in processes:
        os.kill(process, signal.SIGTERM)
    assert [status(process, 60) for process in processes] == [128 + signal.SIGTERM] * 2, printed.read_text()
    assert job.end(1) == 0 and (tmp_path / "first/requeued").read_text() == "requeue 7\n"
    step = final(logs)["step"]
    assert 2 <= step < 24

    job = Job(tmp_path / "second", words)
    assert job.asked[job.asked.index("pacl") + 1 :] == command
    assert [status(process, 120) for process in fork_ranks(command, 2, printed)] == [0, 0], printed.read_text()
    assert job.end(0) == 0 and not (tmp_path / "second/requeued").exists()
    assert final(logs)["step"] == 24
    assert re.search(rf"^resume: \S+, step {step}$", (logs / "pacl/out.log").read_text(), re.M)


def test_an_error_ends_the_job(tmp_path):
    job = Job(tmp_path / "job", [])
    assert job.end(3) == 3 and not (tmp_path / "job/requeued").exists()
