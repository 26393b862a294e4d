"""Run a fixed part of the search of `fuzz_readers.py`, and see that it finds readers that fail."""

import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("open_clip")
pytest.importorskip("tyro")
import fuzz_readers
from fuzz_readers import KINDS, damage, search

COUNT = 15


def test_damaged_files_end_readers_in_their_own_errors():
    """The search has a process of its own, because its limit of memory would hold for all later tests."""
    words = ["--count", str(COUNT), "--seconds", "500", "--kinds", *KINDS]
    done = subprocess.run([sys.executable, fuzz_readers.__file__, *words], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{COUNT * len(KINDS)} cases, 0 findings" in done.stdout


def test_a_case_is_repeated_by_what_a_finding_prints():
    data = bytes(range(256)) * 4
    for index in range(200):
        assert damage(data, random.Random(f"x 0 {index}")) == damage(data, random.Random(f"x 0 {index}"))


def _key(folder: Path) -> None:
    raise KeyError("gone")


def _lines(folder: Path) -> None:
    raise ValueError("one\ntwo")


def _address(folder: Path) -> None:
    raise OSError(f"cannot read {object()!r}")


@pytest.mark.parametrize(
    "read, message",
    [
        (_key, "KeyError: 'gone'"),
        (_lines, "message 'one\\ntwo'"),
        (_address, "message 'cannot read <object object at 0x"),
        (lambda folder: time.sleep(5), "more than 0.1 s"),
        (lambda folder: bytes(80 * 2**20) + b"x", "MiB more"),
    ],
    ids=["exception", "lines", "address", "slow", "memory"],
)
def test_a_reader_that_fails_is_found(read, message, monkeypatch, capsys):
    monkeypatch.setitem(fuzz_readers.KINDS, "text", replace(KINDS["text"], read=read))
    monkeypatch.setattr(fuzz_readers, "LIMIT_S", 0.1 if "0.1 s" in message else 5.0)
    # The peak of earlier tests may be higher than this one's memory.
    peaks = iter([100.0, 400.0, 400.0])
    if "MiB" in message:
        monkeypatch.setattr(fuzz_readers, "_peak", lambda: next(peaks))
    assert search(iter([("text", 0, 3)]), 60) == (1, 1)
    printed = capsys.readouterr().out
    assert message in printed and "--case text:0:3" in printed
