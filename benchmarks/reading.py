"""Measure how long training waits for features: a disk with warm and cold pages, and a store that takes its time.

    python benchmarks/reading.py --json F                  # two or three minutes on two cores
    python benchmarks/reading.py --latency 50 --step 200   # milliseconds

The features have the sizes of those of a ViT-B/16, 303 KB an image; one layer of it, without weights, makes them. The
store is an S3 server of this file's own on loopback, which answers after --latency. A step is a pause of --step in
place of a GPU's work. The share is the time that the steps wait for their batches, after the first one, over the whole
time; "one by one" reads no image ahead of its turn. It needs s3fs. Cold pages are those that the system drops when it
is asked to; some file systems keep them.
"""

from __future__ import annotations

import argparse
import copy
import http.server
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import open_clip
import torch
from pacl.cli import main as pacl
from pacl.data import features
from pacl.data.samples import loader
from pacl.files import write_bytes
from report import machine

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/helpers"))
from small_towers import write_world

IMAGES, BATCH = 512, 32


class Bucket(http.server.BaseHTTPRequestHandler):
    """Answer the requests that s3fs makes to read objects: the files of `folder`, after `latency` seconds."""

    protocol_version = "HTTP/1.1"
    folder: Path
    latency: float

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


def serve(folder: Path, latency: float, ports: multiprocessing.Queue) -> None:
    Bucket.folder, Bucket.latency = folder, latency
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Bucket)
    ports.put(server.server_port)
    server.serve_forever()


def forget(folder: Path) -> None:
    """Ask the system to drop the pages of a folder's files."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def share(place: str | Path, workers: int, step: float, cold: Path | None, ahead: int) -> dict[str, float]:
    """Read an epoch; return the share of the time that steps waited, and images a second."""
    features._open.cache_clear()
    features.AHEAD = ahead
    source = features.Features(place, verify=False, shuffle=1)
    if cold:
        forget(cold)
    waits = []
    batches = iter(loader(source, BATCH, workers=workers, drop_last=True))
    next(batches)
    begin = time.perf_counter()
    while True:
        asked = time.perf_counter()
        if next(batches, None) is None:
            break
        waits.append(time.perf_counter() - asked)
        time.sleep(step)
    whole = time.perf_counter() - begin
    return {"share": sum(waits) / whole, "images_per_s": len(waits) * BATCH / whole}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency", type=float, default=10.0, help="Milliseconds before each answer of the store.")
    parser.add_argument("--step", type=float, default=100.0, help=f"Milliseconds of a step of {BATCH} images.")
    parser.add_argument("--workers", type=int, default=2, help="Processes that read.")
    parser.add_argument("--images", type=int, default=IMAGES, help="Number of images.")
    parser.add_argument("--repeats", type=int, default=3, help="Epochs of each, of which the median counts.")
    parser.add_argument("--features", type=Path, help="Finished features to read in place of new ones.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="Write the result.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.features or Path(temporary, "features")
        if options.features is None:
            sizes = copy.deepcopy(open_clip.get_model_config("ViT-B-16"))
            sizes["vision_cfg"]["layers"] = sizes["text_cfg"]["layers"] = 1
            clip = write_world(Path(temporary, "world"), train=(0, 1), sizes=sizes) / "clip"
            words = f"--train-data synthetic --train-num-samples {options.images} --model local-dir:{clip}"
            if pacl(["features", *words.split(), "--shard-size", "100", "--out", str(folder)]):
                raise SystemExit(1)
        ports: multiprocessing.Queue = multiprocessing.Queue()
        arguments = (folder.parent, options.latency / 1000, ports)
        server = multiprocessing.Process(target=serve, args=arguments, daemon=True)
        server.start()
        os.environ |= {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none", "AWS_DEFAULT_REGION": "us-east-1"}
        os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{ports.get()}"
        address = f"s3://bucket/{folder.name}"
        ahead = features.AHEAD
        cases = {
            "disk, warm pages": (folder, None, ahead),
            "disk, cold pages": (folder, folder, ahead),
            "disk, cold pages, one by one": (folder, folder, 0),
            "store": (address, None, ahead),
            "store, one by one": (address, None, 1),
        }
        settings = {name: value for name, value in vars(options).items() if name not in ("json", "features")}
        settings |= {"batch": BATCH, "ahead": ahead, "load_average": os.getloadavg()[0]}
        result = {"machine": machine(torch.device("cpu"), None), "settings": settings, "rows": []}
        for name, (place, cold, count) in cases.items():
            each = [share(place, options.workers, options.step / 1000, cold, count) for _ in range(options.repeats)]
            medians = {key: statistics.median(one[key] for one in each) for key in each[0]}
            result["rows"].append({"source": name, **medians})
            print(f"{name:30} waits {medians['share']:6.1%}  {medians['images_per_s']:8.1f} images/s", flush=True)
            if options.json:
                write_bytes(options.json, (json.dumps(result, indent=1) + "\n").encode())
        server.kill()


if __name__ == "__main__":
    main()
