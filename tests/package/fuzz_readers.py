"""Search for damaged files that end a reader in anything but the package's own errors, or cost it much time or memory.

Valid small files of each kind are damaged (bits, cuts, repetitions, parts of other files, extreme numbers, and headers
of tar files with a right checksum) and read by the functions that the commands use. A finding is any exception except
ValueError, OSError and BadData, a message of more than one line or with the address of an object, a read that takes
more than LIMIT_S seconds, or one that takes more than LIMIT_MIB more memory than all before it.

    python tests/package/fuzz_readers.py --seconds 60           # all kinds in turn
    python tests/package/fuzz_readers.py --case tar:0:17        # one problem, as a finding prints it
"""

from __future__ import annotations

import argparse
import faulthandler
import io
import itertools
import json
import random
import re
import resource
import signal
import struct
import sys
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
import torch
from pacl.data.check import check
from pacl.data.features import Features, write_shard
from pacl.data.images import IMAGE_FORMATS, read_image
from pacl.data.samples import BadData
from pacl.data.sources import open_pairs
from pacl.embedder import VisionEmbedder, save_embedder
from pacl.training.checkpoints import load_checkpoint, save_checkpoint
from pacl.training.config import TrainConfig, dump_config, read_config
from pictures import encode, picture

LIMIT_S, LIMIT_MIB = 5.0, 256
MOST_BYTES = 8 * 2**30  # of address space beyond that of the imports, so that a finding does not fill the machine
OWN_ERRORS = (ValueError, OSError, BadData)


class Slow(BaseException):
    """A read takes too long. Not an Exception, which a reader could take for damaged data."""


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    write: writes valid files into a folder. name: the file that is damaged. read: reads the folder.
    """

    write: Callable[[Path], None]
    name: str
    read: Callable[[Path], object]


# Valid files, and how they are read


def _members() -> dict[str, bytes]:
    members = {}
    for i in range(3):
        members |= {f"d/{i}.v1.png": encode(picture(i), "PNG"), f"d/{i}.v1.txt": f"a dog {i}\nand a cat".encode()}
    return members | {"4.jpg": encode(picture(4)), "4.json": b'{"captions": ["one", "two"]}', "4.txt": b"one"}


def _write_tar(folder: Path) -> None:
    with tarfile.open(folder / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in _members().items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def _write_images(folder: Path) -> None:
    for i in range(3):
        (folder / f"{i}.png").write_bytes(encode(picture(i), "PNG"))


def _write_table(separator: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        _write_images(folder)
        rows = [("filepath", "size", "title"), ("0.png", "1", "a dog"), ("1.png", "2", '"a ""big"" cat\nand more"')]
        rows += [("2.png", "3", 'a 12" record'), ("0.png", "4", "größe, and so on"), ("1.png", "5", '"Sunset" is')]
        (folder / "pairs.csv").write_text("\n".join(separator.join(row) for row in rows) + "\n")

    return write


def _write_coco(folder: Path) -> None:
    _write_images(folder)
    notes = [{"image_id": i % 3, "id": i, "caption": f"caption {i}"} for i in range(6)]
    images = [{"id": i, "file_name": f"{i}.png", "width": 8} for i in range(3)]
    (folder / "notes.json").write_text(json.dumps({"info": {"year": 2017}, "images": images, "annotations": notes}))


def _write_text(folder: Path) -> None:
    (folder / "a.png").write_bytes(encode(picture(0), "PNG"))
    (folder / "a.txt").write_text("\ufeffone caption\r\nand another größe\n\n", encoding="utf-8")


def _write_features(folder: Path) -> None:
    records = [{"key": f"{i}", "captions": [f"text {i}"], "text": i} for i in range(3)]
    write_shard(folder, 0, torch.randn(3, 4, 5), torch.randn(3, 6), records)
    file = folder / "features-00000.safetensors"
    shards = [{"name": file.name, "bytes": file.stat().st_size, "count": 3}]
    manifest = {"complete": True, "plan": {"nouns": None}, "shards": shards, "towers": {"fingerprint": [0.5]}}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2))


def _write_config(folder: Path) -> None:
    config = TrainConfig(train_data="pairs.csv", max_steps=3, lr=1e-3)
    (folder / "config.yaml").write_text(dump_config(config, {"left_open": {"logit_scale": "100"}}))


def _write_checkpoint(folder: Path) -> None:
    save_checkpoint(folder, {"step": 3, "state_dict": {"weight": torch.randn(5, 3)}, "notes": ["a", 1.5]}, keep=1)
    (folder / "checkpoint").write_bytes(next(folder.glob("*.pt")).read_bytes())


def _write_embedder(folder: Path) -> None:
    save_embedder(VisionEmbedder(4, 5, hidden_dim=3), folder, {"model": "ViT-B-16"}, command="pacl train")


def _read_pairs(name: str) -> Callable[[Path], object]:
    def read(folder: Path) -> None:
        data = open_pairs(folder / name if name else folder, max_bad_share=1.0, max_image_pixels=1_000_000)
        check(data, 0)
        list(data.with_options(captions="one"))

    return read


def _read_features(folder: Path) -> list:
    return list(Features(folder))


def _image(kind: str) -> Kind:
    def write(folder: Path) -> None:
        (folder / "image").write_bytes(encode(picture(0, 40, 30), kind))

    return Kind(write, "image", lambda folder: read_image(folder / "image", 1_000_000))


KINDS = {
    "tar": Kind(_write_tar, "a.tar", _read_pairs("a.tar")),
    "csv": Kind(_write_table(","), "pairs.csv", _read_pairs("pairs.csv")),
    "tsv": Kind(_write_table("\t"), "pairs.csv", _read_pairs("pairs.csv")),
    "coco": Kind(_write_coco, "notes.json", _read_pairs("notes.json")),
    "text": Kind(_write_text, "a.txt", _read_pairs("")),
    **{kind.lower(): _image(kind) for kind in (*IMAGE_FORMATS, "GIF")},
    "manifest": Kind(_write_features, "manifest.json", _read_features),
    "features": Kind(_write_features, "features-00000.safetensors", _read_features),
    "config": Kind(_write_config, "config.yaml", lambda folder: read_config(folder / "config.yaml")),
    "embedder": Kind(_write_embedder, "config.json", VisionEmbedder.from_pretrained),
    "weights": Kind(_write_embedder, "model.safetensors", VisionEmbedder.from_pretrained),
    "checkpoint": Kind(_write_checkpoint, "checkpoint", lambda folder: load_checkpoint(folder / "checkpoint")),
}

# Damage

NUMBERS = [
    b"-1",
    b"0",
    b"2147483648",
    b"9223372036854775808",
    b"1" * 400,
    b"1e999",
    b"-1e-999",
    b"NaN",
    b"0x10",
    b"1.5",
]
WORDS = [
    b"\0",
    b"\xff",
    b"\xed\xa0\x80",
    b'"',
    b"'",
    b"\n",
    b"\r",
    b",",
    b"\t",
    b"{",
    b"}",
    b"[",
    b"]",
    b"null",
    b"true",
]
WORDS += [b"[" * 2000, b'{"a":' * 2000, b"&a [*a]", b"!!python/object:os.system", b"<<: *a", b"\\ud800", b"\x1b[31m"]


def damage(data: bytes, rng: random.Random) -> bytes:
    """Return `data` with one to four kinds of damage."""
    ways = [_flip, _cut, _drop, _repeat, _move, _number, _word, _bytes]
    if data[257:262] == b"ustar":
        ways += [_header] * 3
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        data = rng.choice(ways)(data, rng)
    return data


def _span(data: bytes, rng: random.Random, most: int = 600) -> tuple[int, int]:
    start = rng.randint(0, len(data))
    return start, min(len(data), start + rng.choice((1, 2, 4, 8, 32, rng.randint(1, most))))


def _flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8)) if data else 0):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randint(0, len(data))]


def _drop(data: bytes, rng: random.Random) -> bytes:
    start, end = _span(data, rng)
    return data[:start] + data[end:]


def _repeat(data: bytes, rng: random.Random) -> bytes:
    start, end = _span(data, rng)
    return data[:end] + data[start:end] * rng.choice((1, 2, 100)) + data[end:]


def _move(data: bytes, rng: random.Random) -> bytes:
    (start, end), place = _span(data, rng), rng.randint(0, len(data))
    return data[:place] + data[start:end] + data[rng.choice((place, place + end - start)) :]


def _number(data: bytes, rng: random.Random) -> bytes:
    found = list(re.finditer(rb"\d+(\.\d+)?", data))
    if not found:
        return _bytes(data, rng)
    one = rng.choice(found)
    return data[: one.start()] + rng.choice(NUMBERS) + data[one.end() :]


def _word(data: bytes, rng: random.Random) -> bytes:
    start, end = _span(data, rng, 8)
    return data[:start] + rng.choice(WORDS) + data[rng.choice((start, end)) :]


def _bytes(data: bytes, rng: random.Random) -> bytes:
    """Write an extreme number of 1 to 8 bytes."""
    size = rng.choice((1, 2, 4, 8))
    value = rng.choice((b"\0" * size, b"\xff" * size, b"\x7f" + b"\xff" * (size - 1), b"\x80" + b"\0" * (size - 1)))
    start = rng.randint(0, max(0, len(data) - size))
    return data[:start] + (value if rng.random() < 0.5 else value[::-1]) + data[start + size :]


def _header(data: bytes, rng: random.Random) -> bytes:
    """Change a field of one header of a tar file and mend its checksum, so that readers believe it."""
    fields = {"name": (0, 100), "size": (124, 12), "type": (156, 1), "link": (157, 100), "magic": (257, 8)}
    fields |= {"prefix": (345, 155), "sparse": (386, 96)}
    starts = [at for at in range(0, len(data) - 511, 512) if data[at + 257 : at + 262] == b"ustar"]
    if not starts:
        return data
    at = rng.choice(starts)
    offset, size = fields[rng.choice([*fields, "size", "type"])]
    value = rng.choice(
        (
            rng.randbytes(size),
            b"%0*o\0" % (size - 1, rng.choice((1, 511, 2**20, 8**11 - 1))) if size == 12 else b"\0" * size,
            b"\x80" + struct.pack(">q", rng.choice((2**62, 2**40, -1, 10**6))).rjust(size - 1, b"\0")[-size + 1 :]
            if size > 1
            else rng.choice((b"S", b"L", b"K", b"x", b"g", b"1", b"2", b"3", b"5", b"6", b"7")),
        )
    )
    header = bytearray(data[at : at + 512])
    header[offset : offset + size] = value[:size].ljust(size, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:at] + bytes(header) + data[at + 512 :]


# The search


def try_one(one: Kind, rng: random.Random, folder: Path) -> str | None:
    """Read a damaged file; return what is wrong with the reader, or None."""
    for path in folder.iterdir():
        path.unlink()
    torch.manual_seed(0)
    one.write(folder)
    path = folder / one.name
    path.write_bytes(damage(path.read_bytes(), rng))
    before, start = _peak(), time.monotonic()
    faulthandler.dump_traceback_later(10 * LIMIT_S, exit=True, file=sys.__stderr__)  # ends a hang outside Python
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        one.read(folder)
    except OWN_ERRORS as error:
        text = str(error)
        if "\n" in text.strip() or re.search(r" object at 0x|\x1b", text):
            return f"message {text[:300]!r}"
    except Slow:
        return f"more than {LIMIT_S} s"
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
    if _peak() - before > LIMIT_MIB:
        return f"{_peak() - before:.0f} MiB more"
    if time.monotonic() - start > LIMIT_S:
        return f"{time.monotonic() - start:.1f} s"
    return None


def _peak() -> float:
    """Return the peak memory of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _stop(*_: object) -> None:
    raise Slow


def search(cases: Iterator[tuple[str, int, int]], seconds: float) -> tuple[int, int]:
    """Try cases until they or the time end; print each finding; return the numbers of cases and findings."""
    before = signal.signal(signal.SIGALRM, _stop)
    warnings.simplefilter("ignore")
    start, tried, findings = time.monotonic(), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        for kind, seed, index in cases:
            if time.monotonic() - start > seconds:
                break
            found = try_one(KINDS[kind], random.Random(f"{kind} {seed} {index}"), Path(folder))
            tried += 1
            if found is not None:
                findings += 1
                print(f"FINDING {kind}: {found}\n  python tests/package/fuzz_readers.py --case {kind}:{seed}:{index}")
    signal.signal(signal.SIGALRM, before)
    return tried, findings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, help="Number of cases of each kind; default: no end.")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--case", help="One case, as a finding prints it.")
    options = parser.parse_args()
    if options.case:
        kind, seed, index = options.case.split(":")
        cases = iter([(kind, int(seed), int(index))])
    else:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MOST_BYTES,) * 2)
        numbers = itertools.count() if options.count is None else range(options.count)
        cases = ((kind, options.seed, index) for index in numbers for kind in options.kinds)
    tried, findings = search(cases, options.seconds)
    print(f"{tried} cases, {findings} findings")
    return int(findings > 0)


if __name__ == "__main__":
    sys.exit(main())
