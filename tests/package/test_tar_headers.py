"""Tar files and names of shards that claim more than they hold: every reader refuses them, in time and memory."""

from __future__ import annotations

import gzip
import io
import subprocess
import sys
import tarfile

import pytest

pytest.importorskip("webdataset")
import numpy as np
from pacl.cli import main
from pacl.data.braces import count_names, expand_braces
from pacl.data.pack import pack
from pacl.data.shards import Shards, count_shards
from pacl.evaluate.classification_data import Labelled
from PIL import Image

LIMITED = """
import resource, sys
from pacl.cli import main
import pacl.data.check, pacl.data.sources
held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
status = main(["data", "check", sys.argv[1], "--sample", "0"])
print("grown MiB", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held) // 1024)
sys.exit(status)
"""


def png() -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(data, "PNG")
    return data.getvalue()


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def member(name: str, data: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    return header(name, len(data), kind) + data + bytes(-len(data) % 512)


def sparse(name: str, size: int) -> bytes:
    """Return a member of `size` bytes that are all holes, as `tar --sparse` writes it."""
    fields = bytearray(header(name, 0, tarfile.GNUTYPE_SPARSE))
    fields[386:398] = b"%011o\0" % size
    fields[398:410] = fields[410:422] = b"0" * 11 + b"\0"
    fields[483:495] = b"%011o\0" % size
    fields[148:156] = b"        "
    fields[148:156] = b"%06o\0 " % sum(fields)
    return bytes(fields)


PAIR = member("good.png", png()) + member("good.txt", b"a caption")
END = bytes(1024)
# For each kind of damage, a tar file, and the good pairs in it.
DAMAGED = {
    "endless": (PAIR + header("x.png", 2**62) + END, 1),
    "beyond the end": (PAIR + header("x.png", 10_000) + bytes(512), 1),
    "sparse": (sparse("x.png", 2**31 - 1) + member("x.txt", b"a hole") + PAIR + END, 1),
    "negative": (PAIR + header("x.png", -512) + PAIR + END, 1),
    "long name": (PAIR + header("x", 2**62, tarfile.GNUTYPE_LONGNAME) + END, 1),
    "extended header": (PAIR + header("x", 2**62, tarfile.XHDTYPE) + END, 1),
    "link": (member("x.png", b"", tarfile.SYMTYPE) + member("x.txt", b"a link") + PAIR + END, 1),
    "device": (member("x.png", b"", tarfile.CHRTYPE) + PAIR + END, 1),
    "flipped header": (PAIR + bytes([1]) + member("x.png", png())[1:] + END, 1),
    "cut at a member": (PAIR, 1),
    "nothing": (b"", 0),
}


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("kind", DAMAGED)
def test_damage_is_counted_and_the_good_pairs_are_read(kind, compressed, tmp_path):
    content, good = DAMAGED[kind]
    path = tmp_path / "a.tar"
    path.write_bytes(gzip.compress(content) if compressed else content)
    skipped = []
    source = Shards(path, max_bad_share=1.0)
    source.on_skip = lambda reason, key, error: skipped.append((reason, key, error))
    pairs = [source.decode(raw) for raw in source.undecoded(0, 0, 1)]
    assert [pair["key"] for pair in pairs if pair] == ["good"] * good
    # The end of a compressed file is known only when it is reached.
    assert source.skipped["archive"] == 1 or compressed and 1 <= source.skipped["archive"] <= 2
    sentences = [error for reason, key, error in skipped if reason == "archive" and key == str(path)]
    assert sentences and all("0x" not in sentence and len(sentence) < 200 for sentence in sentences)
    assert count_shards([path]) == {path: good}
    assert not (tmp_path / "sizes.json").exists(), "the count of a damaged shard was kept"


@pytest.mark.long
def test_small_files_take_neither_long_nor_much_memory(tmp_path):
    for kind in ("endless", "sparse"):
        (tmp_path / f"{kind}.tar").write_bytes(DAMAGED[kind][0])
    done = subprocess.run([sys.executable, "-c", LIMITED, tmp_path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 3 and "archive 2" in done.stdout, done.stdout + done.stderr
    assert int(done.stdout.rpartition("grown MiB ")[2]) < 200


def test_packing_leaves_them_out(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(DAMAGED["sparse"][0])
    source = Shards(path, max_bad_share=1.0)
    assert pack(source, tmp_path / "out") == {"00000.tar": 1}
    assert source.skipped["archive"] == 1


@pytest.mark.parametrize("kind", sorted(DAMAGED))
def test_evaluation_refuses_them_by_name(kind, tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "classnames.txt").write_text("dog\n")
    whole = member("good.png", png()) + member("good.cls", b"0") + END
    (tmp_path / "test/0.tar").write_bytes(whole)
    assert len(Labelled("wds", tmp_path)) == 1
    (tmp_path / "test/1.tar").write_bytes(DAMAGED[kind][0])
    with pytest.raises(ValueError, match=r"data_root: .*1\.tar cannot be read: [^\n]+$"):
        Labelled("wds", tmp_path)


def test_a_duplicate_name_is_reported_without_an_address(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(PAIR + member("good.txt", b"again") + END)
    skipped = []
    source = Shards(path, max_bad_share=1.0)
    source.on_skip = lambda *what: skipped.append(what)
    list(source)
    assert len(skipped) == 1 and "0x" not in skipped[0][2] and "None" not in skipped[0][2]


BOMBS = ("{0..999999999}", "{0..9}" * 40, "{" + "{a,b}" * 40 + ",c}", "{a..z}" * 9, "{{0..99999999},b}{", "x" * 5000)


@pytest.mark.parametrize("name", BOMBS)
def test_brace_bombs_end_in_a_sentence(name, capsys):
    with pytest.raises(ValueError, match="^shards: got .* expected "):
        expand_braces(name)
    assert main(["data", "check", f"{name}.tar"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pacl: error: ") and len(line) < 6000


@pytest.mark.parametrize("name", ["{" * 1100 + "}" * 1100, "{a", "a}"])
def test_braces_that_do_not_match_or_are_too_deep(name):
    with pytest.raises(ValueError, match="^shards: got .*expected .*brace"):
        expand_braces(name)


@pytest.mark.parametrize(
    "name", ["a", "{a,b}-{01..12}", "{{000..010},{020..030..5}}", "{3..1}", "{x}", "a{,b}", "{a,{b,c}d}e,f"]
)
def test_names_are_counted_without_expanding(name):
    assert count_names(name) == len(expand_braces(name))


def test_a_long_range_still_expands():
    assert len(expand_braces("{00000..99999}.tar")) == 100_000
