"""`pacl data pack` continues after kill -9, and no reader takes a part of a dataset for the whole."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

pytest.importorskip("open_clip")
pytest.importorskip("tyro")
from dies import dies_at, fork_ranks
from forks import status
from pacl.cli import main
from pacl.data.pairs import ScenePairs
from pacl.data.sources import open_pairs
from pacl.locks import lock_folder

COUNT = 19


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Create images with captions, some of them bad, around the ends of shards too."""
    folder = tmp_path_factory.mktemp("source")
    for number, raw in enumerate(ScenePairs(scenes=COUNT).undecoded(0, 0, 1)):
        (folder / f"{number:02d}.jpg").write_bytes(raw.image[:300] if number in (2, 7, 8, 18) else raw.image)
        (folder / f"{number:02d}.txt").write_bytes(raw.captions)
    return folder


def command(source: Path, out: Path, *more: str) -> list[str]:
    return ["data", "pack", str(source), "--out", str(out), "--shard-size", "5", "--shuffle", "--seed", "3", *more]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole") / "out"
    assert main(command(source, out)) == 3
    assert set(contents(out)) == {"00000.tar", "00001.tar", "00002.tar", "00003.tar", "sizes.json", "packed.json"}
    return contents(out)


@pytest.mark.sampled(2)
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
@pytest.mark.parametrize("renaming", range(1, 13))
def test_killed_before_any_renaming_and_continued(renaming, source, whole, tmp_path, capsys):
    """Whichever file was just to get its name, the same command ends with the bytes of an uninterrupted run."""
    out = tmp_path / "out"
    killed = dies_at(renaming, command(source, out))
    if renaming == 12:
        assert killed == 3 and contents(out) == whole, "a file more is written than this test knows of"
        return
    assert killed == -signal.SIGKILL
    shards = [path.name for path in out.glob("*.tar")]
    if renaming > 1:
        for read in (["data", "check", str(out)], ["data", "check", f"{out}/{shards[0]}" if shards else str(out)]):
            assert main(read) == 1
            assert "out is incomplete (incomplete.json), expected" in capsys.readouterr().err
        with pytest.raises(ValueError, match="is incomplete"):
            open_pairs(out)
    times = {name: (out / name).stat().st_mtime_ns for name in shards}
    assert main(command(source, out)) == 3
    assert contents(out) == whole
    assert times == {name: (out / name).stat().st_mtime_ns for name in shards}, "a finished shard was written again"
    assert main(command(source, out)) == 3 and contents(out) == whole
    assert main(["data", "check", str(out)]) == 0


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
@pytest.mark.parametrize("shards", [False, True], ids=["folder", "shards"])
def test_processes_share_the_pairs(shards, source, whole, tmp_path):
    """Two processes, of which one is killed, and then three write the bytes of one, also in shuffled shards."""
    expected, given = whole, source
    if shards:
        assert main(["data", "pack", str(source), "--out", str(tmp_path / "given"), "--shard-size", "6"]) == 3
        given = tmp_path / "given"
        assert main(command(given, tmp_path / "alone")) == 0
        expected = contents(tmp_path / "alone")
    out, printed = tmp_path / "out", tmp_path / "printed"
    ended = [status(process, 120) for process in fork_ranks(command(given, out), 2, printed, dying={1: 2})]
    assert ended == [1, -signal.SIGKILL], printed.read_text()
    assert "pacl: error: another process was lost" in printed.read_text()
    assert list(out.glob("*.tar")), "nothing was kept"
    ended = [status(process, 120) for process in fork_ranks(command(given, out), 3, printed)]
    assert ended == [0 if shards else 3] * 3, printed.read_text()
    assert contents(out) == expected


def test_what_may_not_change(source, tmp_path, capsys):
    out = tmp_path / "out"
    assert dies_at(4, command(source, out)) == -signal.SIGKILL
    before = contents(out)
    for changes in (["--seed", "4"], ["--shard-size", "6"], ["--max-image-pixels", "9999"]):
        name = changes[0].strip("-").replace("-", "_")
        assert main(command(source, out, *changes)) == 1
        assert re.search(
            f"out: .*/out was begun with another {name} .*, now .*, expected the same", capsys.readouterr().err
        )
    with lock_folder(out):
        assert main(command(source, out)) == 1
    assert re.search("out: .*/out is in use by process", capsys.readouterr().err)
    assert contents(out) == {name: data for name, data in before.items() if name[0] != "."}, "only temporary files went"
    (out / "incomplete.json").write_text("[]")
    assert main(command(source, out)) == 1
    assert "incomplete.json is damaged, expected notes of `pacl data pack`" in capsys.readouterr().err


def test_nothing_is_left_of_a_source_without_a_good_sample(tmp_path, capsys):
    (tmp_path / "source").mkdir()
    (tmp_path / "source/a.jpg").write_bytes(b"-")
    assert main(command(tmp_path / "source", tmp_path / "out")) == 1
    assert "no usable sample" in capsys.readouterr().err and not (tmp_path / "out").exists()
