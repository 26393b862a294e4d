"""The lock of a folder: one holder, released by the kernel, and not inherited by forked processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

pytest.importorskip("fcntl")
from pacl.locks import LOCK, lock_folder

HOLD = """
import os, sys, time
from pacl.locks import lock_folder
with lock_folder(sys.argv[1]):
    child = os.fork()
    if child == 0:
        print(os.getpid(), flush=True)
        os.close(1)
        time.sleep(60)
        os._exit(0)
    time.sleep(60)
"""


def test_one_holder(tmp_path):
    folder = tmp_path / "new/run"
    with lock_folder(folder, "name"):
        assert (folder / LOCK).exists()
        with pytest.raises(
            ValueError, match=rf"^name: {folder} is in use by process {os.getpid()} on .*{folder}/.lock"
        ):
            with lock_folder(folder, "name"):
                pass
        (folder / "file").touch()
    assert [path.name for path in folder.iterdir()] == ["file"]
    with lock_folder(folder):
        pass


def test_an_unused_folder_goes_again(tmp_path):
    with lock_folder(tmp_path / "run"):
        pass
    assert list(tmp_path.iterdir()) == []
    with lock_folder(tmp_path):
        pass
    assert tmp_path.exists(), "it was there before"


def test_death_releases_it(tmp_path):
    """After kill -9 the folder is free at once, although a child of the dead process lives on."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    try:
        with pytest.raises(ValueError, match=f"in use by process {process.pid} on "), lock_folder(tmp_path):
            pass
        process.kill()
        process.communicate()
        os.kill(child, 0)
        assert (tmp_path / LOCK).exists()
        with lock_folder(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
    assert list(tmp_path.iterdir()) == []


def test_a_removed_lock_file_is_not_held(tmp_path, monkeypatch):
    """A process that opened the file of an earlier holder takes the new one instead."""
    import fcntl

    real, files = fcntl.flock, []

    def flock(descriptor, how):
        if not files:  # the earlier holder ends between this process's open and its lock
            os.unlink(tmp_path / LOCK)
        files.append(descriptor)
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock_folder(tmp_path):
        assert len(files) == 2 and (tmp_path / LOCK).exists()
        monkeypatch.undo()
        with pytest.raises(ValueError), lock_folder(tmp_path):
            pass
