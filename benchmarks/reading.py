"""Measure how long training waits for features: a disk with warm and cold pages, and a store that takes its time.

    python benchmarks/reading.py --json F                  # two minutes on two cores
    python benchmarks/reading.py --latency 50 --step 200   # milliseconds

The features have the sizes of those of a ViT-B/16, 303 KB an image, and random values. The store is an S3 server of
this file's own on loopback, which answers after --latency. A step is a pause of --step in place of a GPU's work. The
share is the time that the steps wait for their batches, after the first one, over the whole time; "one by one" reads no
image ahead of its turn. "at once" is the same store without latency: the processors cause all that it waits. Beside the
share stands the processor time an image takes in this process and its readers, and in the server, which a real store
does not share; and the time for which this process and its readers could run and no processor was free. It needs s3fs
and Linux. Cold pages are those that the system drops when it is asked to; some file systems keep them.
"""

from __future__ import annotations

import argparse
import contextlib
import http.server
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from outputs import write_json
from pacl.cli import main as pacl
from pacl.data import features
from pacl.data.samples import loader
from report import machine

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/helpers"))
from small_towers import write_world

IMAGES, BATCH, SHARD = 800, 32, 100


class Bucket(http.server.BaseHTTPRequestHandler):
    """Answer the requests that s3fs makes to read objects: the files of `folder`, after `latency` seconds."""

    protocol_version = "HTTP/1.1"
    folder: Path
    latency: float  # seconds

    def log_message(self, *words: object) -> None:
        pass

    def do_GET(self) -> None:
        time.sleep(self.latency)
        path = self.folder / self.path.partition("?")[0].removeprefix("/bucket/")
        if not path.is_file():
            listing = b"<ListBucketResult><KeyCount>0</KeyCount></ListBucketResult>"
            self.reply(*((200, listing) if "list-type" in self.path else (404, b"")))
            return
        size = path.stat().st_size
        first, _, last = self.headers.get("Range", f"bytes=0-{size - 1}").removeprefix("bytes=").partition("-")
        with open(path, "rb") as file:
            file.seek(int(first))
            self.reply(206, file.read(int(last) + 1 - int(first)), size)

    do_HEAD = do_GET

    def reply(self, status: int, data: bytes, size: int = 0) -> None:
        head = self.command == "HEAD"
        self.send_response(200 if head and status == 206 else status)
        self.send_header("ETag", '"1"')
        self.send_header("Last-Modified", "Mon, 30 Nov 2026 00:00:00 GMT")
        self.send_header("Content-Length", str(size if head else len(data)))
        self.end_headers()
        if not head:
            self.wfile.write(data)


def serve(folder: Path, ports: multiprocessing.Queue, latency: Any) -> None:
    class Timed(Bucket):
        # As one write, and at once: the second of two small ones may wait until the first is acknowledged.
        wbufsize, disable_nagle_algorithm = -1, True

        @property
        def latency(self) -> float:
            return latency.value

    class Server(http.server.ThreadingHTTPServer):
        request_queue_size = 256  # with Python's 5, connections that are opened together wait a second and more

        def handle_error(self, *about: object) -> None:
            """Say nothing: readers leave when their epoch ends."""

    Bucket.folder = folder
    server = Server(("127.0.0.1", 0), Timed)
    ports.put(server.server_port)
    server.serve_forever()


def forget(folder: Path) -> None:
    """Ask the system to drop the pages of a folder's files."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def times(processes: Iterable[int]) -> tuple[float, float]:
    """Return the seconds for which processes ran, and for which they could have run and no processor was free."""
    ran = waited = 0.0
    for process in processes:
        words = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        ran += (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")
        for task in Path(f"/proc/{process}/task").iterdir():
            with contextlib.suppress(OSError):  # a thread that ends now
                waited += int((task / "schedstat").read_text().split()[1]) / 1e9
    return ran, waited


def share(
    place: str | Path, options: argparse.Namespace, cold: Path | None, ahead: int, server: int
) -> dict[str, float]:
    """Read an epoch; return the share of the time that steps waited, images a second, and processor time an image."""
    features._open.cache_clear()
    features.AHEAD = ahead
    source = features.Features(place, verify=False, shuffle=1)
    if cold:
        forget(cold)
    waits = []
    reading = loader(source, BATCH, workers=options.workers, drop_last=True)
    batches = iter(reading)
    next(batches)
    mine = [os.getpid(), *(worker.pid for worker in reading._iterator._workers)]
    before, begin = (*times(mine), *times([server])), time.perf_counter()
    while time.perf_counter() - begin < options.seconds and len(waits) < len(source) // BATCH - 1 - 2 * options.workers:
        asked = time.perf_counter()
        next(batches)
        waits.append(time.perf_counter() - asked)
        time.sleep(options.step / 1000)
    whole, images = time.perf_counter() - begin, len(waits) * BATCH
    used = [1000 * (new - old) / images for new, old in zip((*times(mine), *times([server])), before, strict=True)]
    named = dict(zip(("processor_ms", "queued_ms", "server_ms"), used, strict=False))
    return {"share": sum(waits) / whole, "images_per_s": images / whole, **named}


def write_features(folder: Path, images: int) -> None:
    """Write random features in the sizes of a ViT-B/16 in place of those of a small tower."""
    clip = write_world(folder.parent / "world", train=(0, 1)) / "clip"
    words = f"--train-data synthetic --train-num-samples {SHARD} --model local-dir:{clip} --workers 0 --out {folder}"
    if pacl(["features", *words.split()]):
        raise SystemExit(1)
    records = list(features.stored_records(folder))
    tokens, texts = torch.randn(SHARD, 196, 768).bfloat16(), torch.randn(SHARD, 512)
    manifest = features.read_manifest(folder)
    for number in range(-(-images // SHARD)):
        features.write_shard(folder, number, tokens, texts, records)
    features.write_manifest(folder, {**manifest, "shards": features.shard_files(folder), "sha256": {}})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency", type=float, default=10.0, help="Milliseconds before each answer of the store.")
    parser.add_argument("--step", type=float, default=100.0, help=f"Milliseconds of a step of {BATCH} images.")
    parser.add_argument("--workers", type=int, default=2, help="Processes that read.")
    parser.add_argument("--images", type=int, default=IMAGES, help="Number of images.")
    parser.add_argument("--seconds", type=float, default=8, help="Most seconds of an epoch that are measured.")
    parser.add_argument("--repeats", type=int, default=3, help="Epochs of each, of which the median counts.")
    parser.add_argument("--features", type=Path, help="Finished features to read in place of new ones.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="Write the result.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.features or Path(temporary, "features")
        if options.features is None:
            write_features(folder, options.images)
        ports: multiprocessing.Queue = multiprocessing.Queue()
        latency = multiprocessing.Value("d", 0.0)
        server = multiprocessing.Process(target=serve, args=(folder.parent, ports, latency), daemon=True)
        server.start()
        os.environ |= {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none", "AWS_DEFAULT_REGION": "us-east-1"}
        os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{ports.get()}"
        address = f"s3://bucket/{folder.name}"
        ahead = features.AHEAD
        cases = {
            "disk, warm pages": (folder, 0.0, None, ahead),
            "disk, cold pages": (folder, 0.0, folder, ahead),
            "disk, cold pages, one by one": (folder, 0.0, folder, 0),
            "store, at once": (address, 0.0, None, ahead),
            "store": (address, options.latency / 1000, None, ahead),
            "store, one by one": (address, options.latency / 1000, None, 0),
        }
        settings = {name: value for name, value in vars(options).items() if name not in ("json", "features")}
        settings |= {"batch": BATCH, "ahead": ahead, "load_average": os.getloadavg()[0]}
        result = {"machine": machine(torch.device("cpu"), None), "settings": settings, "rows": []}
        for name, (place, latency.value, cold, count) in cases.items():
            each = [share(place, options, cold, count, server.pid) for _ in range(options.repeats)]
            medians = {key: statistics.median(one[key] for one in each) for key in each[0]}
            result["rows"].append({"source": name, **medians})
            print(
                f"{name:30} waits {medians['share']:6.1%}  {medians['images_per_s']:6.1f} images/s; an image takes "
                f"{medians['processor_ms']:.2f} ms of processors, {medians['queued_ms']:.2f} ms in their queue, "
                f"{medians['server_ms']:.2f} ms in the server",
                flush=True,
            )
            if options.json:
                write_json(options.json, result)
        server.kill()


if __name__ == "__main__":
    main()
