"""`pacl data`: shards out of any source, and what is wrong with one."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import get_args

from . import Kind


def add_data(commands) -> None:
    """The sub-commands, for argparse."""
    data = commands.add_parser("data", help="pack image-caption pairs into shards, check them")
    actions = data.add_subparsers(required=True, metavar="ACTION")
    pack = actions.add_parser("pack", help="write webdataset shards", description="Images are copied byte for byte.")
    check = actions.add_parser("check", help="count, decode a sample, show what is wrong (exit status 1)")
    for parser, action in ((pack, _pack), (check, _check)):
        parser.set_defaults(run=_run, action=action)
        parser.add_argument(
            "source",
            metavar="SOURCE",
            help="shards (braces, ::), a folder of them, a .csv or .tsv file, a folder of images with .txt files, an "
            "annotation .json of COCO captions, or synthetic",
        )
        parser.add_argument("--dataset-type", choices=get_args(Kind), default="auto")
        parser.add_argument("--csv-separator", metavar="C", help="default: tab or comma, as the header has it")
        parser.add_argument("--csv-img-key", default="filepath", metavar="COLUMN", help="(%(default)s)")
        parser.add_argument("--csv-caption-key", default="title", metavar="COLUMN", help="(%(default)s)")
        parser.add_argument("--image-root", metavar="DIR", help="images of a csv or COCO file (default: beside it)")
        parser.add_argument("--scenes", type=int, default=10_000, metavar="N", help="generated ones (%(default)s)")
        parser.add_argument("--masks", action="store_true", help="every sample has a mask, .mask.png")
        parser.add_argument("--max-image-pixels", type=int, default=25_000_000, metavar="N", help="(%(default)s)")
    pack.add_argument("--out", type=Path, required=True, metavar="DIR", help="a folder that has no shards")
    pack.add_argument("--shard-size", type=int, default=10_000, metavar="N", help="pairs in a shard (%(default)s)")
    pack.add_argument("--shuffle", action="store_true", help="in a random order; shards are shuffled 2,000 at a time")
    pack.add_argument("--seed", type=int, default=0, metavar="N")
    check.add_argument("--sample", type=int, default=1000, metavar="N", help="pairs to decode, 0: all (%(default)s)")
    check.add_argument("--json", action="store_true")


def _run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    try:
        return arguments.action(arguments)
    except ValueError as error:
        print(f"pacl: error: {error}", file=sys.stderr)
        return 1


def _open(arguments: argparse.Namespace, **options):
    from .sources import open_pairs

    names = "csv_separator csv_img_key csv_caption_key image_root scenes masks max_image_pixels".split()
    options |= {name: getattr(arguments, name) for name in names}
    return open_pairs(arguments.source, kind=arguments.dataset_type, max_bad_share=1.0, **options)


def _pack(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from .check import EXAMPLES
    from .pack import pack
    from .samples import no_image

    source = _open(arguments, shuffle=2000 if arguments.shuffle else 0, seed=arguments.seed)
    bad = []
    source = source.with_options(
        transform=no_image,
        on_skip=lambda *reason_key_error: bad.append(reason_key_error) if len(bad) < EXAMPLES else None,
    )
    with tqdm(unit=" pairs", disable=None) as bar:
        sizes = pack(source, arguments.out, shard_size=arguments.shard_size, progress=bar.update)
    for reason, key, error in bad:
        print(f"bad: {key}: {reason}: {error}")
    if not sizes:
        raise ValueError(source.complaint())
    skipped = ", ".join(f"{reason} {count:,}" for reason, count in source.skipped.items() if count) or "none"
    print(f"packed {sum(sizes.values()):,} pairs in {len(sizes):,} shard(s): {arguments.out}; skipped: {skipped}")
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from .check import check, describe

    if arguments.sample < 0:
        raise ValueError(f"sample: got {arguments.sample}, expected at least 0")
    report = check(_open(arguments), arguments.sample)
    print(json.dumps(report, indent=2) if arguments.json else describe(report))
    if report["problems"] and arguments.json:
        print(*report["problems"], sep="\n", file=sys.stderr)
    return 1 if report["problems"] else 0
