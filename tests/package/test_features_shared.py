"""`pacl features` writes the same bytes in any number of processes, of which any may die at any moment."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest

pytest.importorskip("open_clip")
pytest.importorskip("tyro")
import torch
from dies import fork_ranks
from forks import status
from pacl.cli import main
from pacl.data.features import Features
from pacl.data.pairs import ScenePairs
from pacl.data.shards import Shards

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
COUNTS = (9, 1, 8)  # samples of the shards
BAD = {2, 12, 13, 14}  # all of the fourth part, which gets no file


@pytest.fixture(scope="module")
def source(tmp_path_factory, module_tar) -> str:
    """Write three shards with damaged images in the midst."""
    folder, number = tmp_path_factory.mktemp("source"), 0
    scenes = list(ScenePairs(scenes=sum(COUNTS)).undecoded(0, 0, 1))
    for shard, count in enumerate(COUNTS):
        members = {}
        for raw in scenes[number : number + count]:
            members[f"{number:03d}.jpg"] = raw.image[:300] if number in BAD else raw.image
            members[f"{number:03d}.txt"] = raw.captions + b"\nanother caption" * (number % 3)
            number += 1
        module_tar(folder / f"{shard}.tar", members)
    return f"{folder}/{{0..2}}.tar"


def flags(source: str, clip: Path, out: Path, workers: int = 0) -> list[str]:
    values = {"train-data": source, "model": f"local-dir:{clip}", "random-towers": None, "nouns": "words", "out": out}
    values |= {"batch-size": 3, "shard-size": 4, "workers": workers, "max-bad-share": 0.9}
    return ["features", *(str(word) for name, x in values.items() for word in (f"--{name}", x) if word is not None)]


def run(argv: list[str], processes: int, output: Path, dying: Mapping[int, int] | None = None) -> list[int]:
    """Run the command in several processes; return their exit statuses by rank."""
    return [status(process, 120) for process in fork_ranks(argv, processes, output, dying)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(source, untrained, tmp_path_factory) -> dict[str, bytes]:
    """Return the files that one process writes."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole") / "out"
    assert main(flags(source, untrained / "clip", out)) == 0
    shards = json.loads((out / "manifest.json").read_text())["shards"]
    assert [shard["count"] for shard in shards] == [3, 4, 4, 3] and shards[3]["name"] == "features-00004.safetensors"
    return contents(out)


@pytest.mark.parametrize("processes, workers", [(2, 2), (3, 0)])
def test_the_bytes_are_those_of_one_process(processes, workers, source, untrained, whole, tmp_path):
    """More processes than files of some share, and workers that share the rest, change nothing."""
    argv = flags(source, untrained / "clip", tmp_path / "out", workers)
    assert run(argv, processes, tmp_path / "printed") == [0] * processes
    assert contents(tmp_path / "out") == whole
    printed = (tmp_path / "printed").read_text()
    assert len(re.findall("^finished: .*, 14 images; skipped: image 4$", printed, re.M)) == 1, printed
    keys = [sample["key"] for sample in Features(tmp_path / "out")]
    assert keys == [f"{number:03d}" for number in range(sum(COUNTS)) if number not in BAD]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "dying, files",
    [({1: 1}, 2), ({0: 2, 1: 2}, 1), ({0: 5}, 4)],
    ids=str,
)
def test_a_rank_dies_and_the_same_command_continues(dying, files, source, untrained, whole, tmp_path):
    """The other process keeps what it wrote and ends with one line. Other numbers of processes end the work."""
    out, printed = tmp_path / "out", tmp_path / "printed"
    argv = flags(source, untrained / "clip", out)
    ended = run(argv, 2, printed, dying)
    for rank, code in enumerate(ended):
        # Before the last renaming, of the manifest, the other process has nothing left to do.
        assert code == (-signal.SIGKILL if rank in dying else dying != {0: 5}), printed.read_text()
    if 1 in ended:
        assert "pacl: error: another process was lost; the same command continues" in printed.read_text()
        assert "Traceback" not in printed.read_text()
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("features-*")}
    assert len(times) == files and all((out / name).read_bytes() == whole[name] for name in times)
    assert run(argv, 1 + 2 * len(dying) % 4, printed) == [0] * (1 + 2 * len(dying) % 4), printed.read_text()
    assert contents(out) == whole
    assert times.items() <= {path.name: path.stat().st_mtime_ns for path in out.glob("features-*")}.items()


def test_all_processes_end_with_the_first_ones_error(source, untrained, whole, tmp_path):
    out, printed = tmp_path / "out", tmp_path / "printed"
    out.mkdir()
    (out / "precious").write_text("")
    argv = flags(source, untrained / "clip", out)
    assert run(argv, 2, printed) == [1, 1]
    assert re.fullmatch(r"pacl: error: out: \S+ holds other files, expected a new folder\n", printed.read_text())
    shutil.rmtree(out)
    assert run([*argv, "--dry-run"], 2, printed) == [0, 0] and not out.exists()


def test_parts_of_shards_hold_every_sample_once(source, tmp_path):
    """Also samples that sizes.json does not count. A part counts the faults between its samples, and no other does."""
    shutil.copytree(Path(source).parent, tmp_path / "stale", ignore=lambda *_: ["sizes.json"])
    (tmp_path / "stale/sizes.json").write_text(json.dumps({"0.tar": 5, "1.tar": 0, "2.tar": 8}))
    whole = [raw.key for raw in Shards(source).undecoded(0, 0, 1)]
    for paths in (source, f"{tmp_path}/stale/{{0..2}}.tar"):
        data = Shards(paths)
        for most, counts in ((1, 18), (4, 5), (100, 1)):
            parts = [[raw.key for raw in data.part(part)] for part in data.parts(most)]
            assert sum(parts, []) == whole and (len(parts) == counts or paths != source), (paths, most)
    with tarfile.open(Path(source).parent / "0.tar") as old, tarfile.open(tmp_path / "link.tar", "w") as new:
        for number, member in enumerate(old):
            new.addfile(member, old.extractfile(member))
            if number == 5:
                link = tarfile.TarInfo("link.jpg")
                link.type = tarfile.SYMTYPE
                new.addfile(link)
    data = Shards(tmp_path / "link.tar")
    read = [raw.key for part in data.parts(2) for raw in data.part(part)]
    assert read == whole[:9] and data.skipped["archive"] == 1
