"""`pacl features`: compute tokens and text embeddings of frozen towers once, for `pacl train --features`."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor

from ..commands import next_command
from ..data.features import (
    MANIFEST,
    NOUNS,
    TOWERS,
    last_place,
    read_manifest,
    shard_files,
    stored_records,
    write_manifest,
    write_shard,
)
from ..data.flags import TrainingDataFlags, check_plan, plan_of
from ..data.samples import BadData, Samples, loader
from ..data.scene_shards import shard_sizes
from ..data.texts import PROMPTS, noun_finder
from ..failures import sentence
from ..files import remove_unfinished, write_bytes
from ..flags import Place, parse
from ..locks import LOCK, lock_folder
from ..processes import choose_device, default_workers
from ..progress import Progress
from ..remote import Location, RemotePath, writable
from ..sharing import describe_towers, load_tower, save_tower
from ..towers import frozen_random_towers, load_towers

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig(TrainingDataFlags):
    """Store patch tokens and text embeddings of frozen towers for `pacl train --features OUT`. The same command
    continues a run that was stopped.
    """

    train_data: str
    """Image-caption pairs, given as for `pacl train`; so are the flags of data and model."""
    out: Place
    """Folder to write the features to, or its address in a store (s3://, gs:// or hf://)."""
    train_num_samples: int | None = None
    """Number of generated scenes, if --train-data is synthetic."""
    model: str = "ViT-B-16"
    pretrained: str | None = None
    vision_model: str | None = None
    vision_pretrained: bool = True
    random_towers: bool = False
    """Use towers without weights, and keep them beside the features."""
    force_image_size: int | None = None
    nouns: Literal["words", "nltk"] | None = None
    """Also store prompts with all nouns of the captions, for `pacl train --nouns` and `--recipe paper`."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Number format of the stored tokens; on a GPU also that of autocast. Text embeddings are stored in float32."""
    batch_size: int = 64
    shard_size: int = 1000
    """Most images in one file; files are of equal size."""
    workers: int = field(default_factory=default_workers)
    device: str = "auto"
    seed: int = 0
    """Random seed of towers without weights."""
    dry_run: bool = False
    """Print the size of the features and stop."""

    @property
    def plan(self) -> dict[str, Any]:
        """The values that must not change when a run continues, as plain Python."""
        without = () if self.random_towers else ("random_towers",)  # which earlier versions did not have
        return plan_of(self, "out", "dry_run", "device", "batch_size", *without)


def main(argv: Sequence[str], prog: str = "pacl features") -> int:
    """Run `pacl features` with these arguments and return its exit status; KeyboardInterrupt passes through."""
    try:
        config = parse(FeaturesConfig, argv, prog)
        config = dataclasses.replace(config, out=writable(str(config.out), config.store))
        with contextlib.nullcontext() if config.dry_run else lock_folder(config.out):
            _write(config)
    except (ValueError, OSError) as error:
        print(f"pacl: error: {sentence(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        raise
    return 0


def _write(config: FeaturesConfig) -> None:
    manifest: dict[str, Any] = {"complete": False, "plan": config.plan, "shards": []}
    if not config.dry_run:
        remove_unfinished(config.out)
    if (config.out / MANIFEST).is_file():
        found = read_manifest(config.out)
        check_plan(config.out, found["plan"], config.plan)
        if found["complete"]:
            print(f"finished: {config.out}, {sum(shard['count'] for shard in found['shards']):,} images")
            return
    elif config.out.exists() and any(path.name != LOCK for path in config.out.iterdir()):
        raise ValueError(f"out: {config.out} holds other files, expected a new folder")
    encoder = Encoder(config)
    # All captions of an image are stored; training takes one of them an epoch.
    source = config.open(config.train_data, transform=encoder.towers.transform, captions="all")
    done = shard_files(config.out)
    total = source.count()
    count = max(0, total - sum(shard["count"] for shard in done))
    print(_estimate(config, encoder, count), flush=True)
    if config.dry_run:
        return
    write_manifest(config.out, manifest)
    encoder.keep_random(config.out)
    with Progress("Features", max(1, count), "image") as progress:
        for number, shard in enumerate(_shards(config, encoder, source, progress, len(done), total), len(done)):
            write_shard(config.out, number, *shard)
    if config.nouns:
        find = noun_finder(config.nouns)
        records = stored_records(config.out)
        manifest["nouns"] = sorted({noun for each in records for text in each["captions"] for noun in find(text)})
        prompts = encoder.texts([prompt.format(noun) for noun in manifest["nouns"] for prompt in PROMPTS])
        write_bytes(config.out / NOUNS, save({"texts": prompts}))
    manifest |= {
        "complete": True,
        "shards": shard_files(config.out),
        "towers": describe_towers(encoder.towers, config.out, random=encoder.random),
    }
    write_manifest(config.out, manifest)
    count = sum(shard["count"] for shard in manifest["shards"])
    for line in source.remarks():
        print(line)
    print(f"finished: {config.out}, {count:,} images; skipped: {source.reasons}")
    print(_next(config), flush=True)


def _next(config: FeaturesConfig) -> str:
    return next_command("train", "--features", str(config.out), *(["--nouns", config.nouns] if config.nouns else []))


class Encoder:
    """The frozen towers, with outputs in the dtypes that are stored."""

    def __init__(self, config: FeaturesConfig):
        self.device = choose_device(config.device)
        self.batch_size, self.dtype = config.batch_size, DTYPES[config.precision]
        torch.manual_seed(config.seed)
        self.towers = load_towers(**{name: getattr(config, name) for name in TOWERS}, device=self.device)
        self.random = frozen_random_towers(self.towers.names, ("visual", "text"), config.random_towers)

    def keep_random(self, folder: Location) -> None:
        """Write the random towers to `folder`, or load those that an earlier run wrote there."""
        for name in self.random:
            if (folder / f"{name}.safetensors").is_file():
                load_tower(self.towers, name, folder, {})  # the digests are written last
            else:
                save_tower(self.towers, name, folder)

    def tokens(self, images: Tensor) -> Tensor:
        """Return patch tokens [B, N, width] of images [B, 3, H, W], in the dtype of --precision."""
        tokens = self._run(self.towers.tokens, images).to(self.dtype)
        if not tokens.isfinite().all():
            raise ValueError(f"precision: got tokens that are not finite in {self.dtype}, expected a wider type")
        return tokens.cpu()

    def texts(self, texts: list[str]) -> Tensor:
        """Return normalised text embeddings [B, D], float32."""
        parts = [texts[i : i + self.batch_size] for i in range(0, len(texts), self.batch_size)]
        rows = [self._run(self.towers.encode_text, self.towers.tokenize(part)).float().cpu() for part in parts]
        return torch.cat(rows) if rows else torch.empty(0, self.towers.widths[1])

    @torch.no_grad()
    def _run(self, encode: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
        amp = self.device.type == "cuda" and self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype, enabled=amp):
            return encode(batch.to(self.device, non_blocking=True))


def _estimate(config: FeaturesConfig, encoder: Encoder, count: int) -> str:
    """Return a line on the size of the features of `count` images; raise ValueError if they do not fit on the disk."""
    image, _ = encoder.towers.probe()
    patches, width = encoder.tokens(image).shape[1:]
    dim = encoder.towers.widths[1]
    # Most keys, captions and offsets take less than a kilobyte.
    size = count * (patches * width * encoder.dtype.itemsize + 4 * dim + 1024)
    what = (
        f"features: {count:,} images, {patches} x {width} {config.precision} and texts of {dim} fp32: "
        f"{size / 1e9:,.3f} GB"
    )
    if isinstance(config.out, RemotePath):
        return what
    folder = next(path for path in (config.out, *config.out.absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if size > free:
        raise ValueError(
            f"out: {count:,} images take {size / 1e9:,.1f} GB, {(size - free) / 1e9:,.1f} GB more than {folder} has "
            "free; `pacl train` without --features computes tokens as it trains"
        )
    return f"{what} of {free / 1e9:,.1f} GB free"


def _shards(
    config: FeaturesConfig, encoder: Encoder, source: Samples, progress: Progress, done: int, total: int
) -> Iterator[tuple[Tensor, Tensor, list[dict], dict[str, Any]]]:
    """Yield the contents of each shard after the first `done`, as write_shard takes them.

    The batches are those of an uninterrupted run, so that its bits are the same. The shards are of equal size if all
    `total` images are good; bad ones make the last shards smaller, because they are not known before.
    """
    workers = min(config.workers, source.most_workers)
    start, stored = last_place(config.out, done) or (None, (0, -1))
    batches = loader(source, config.batch_size, workers=workers, start=start)
    tokens: list[Tensor] = []
    texts: list[Tensor] = []
    records: list[dict] = []
    before = copy.deepcopy(batches.state)  # before the batch
    # A source may have more images than it counts.
    sizes = itertools.chain(shard_sizes(total, config.shard_size)[done:], itertools.repeat(config.shard_size))
    size = next(sizes)
    try:
        for batch in batches:
            captions = batch["captions"]
            places = list(zip(batch["worker"].tolist(), batch["place"][1].tolist(), strict=True))
            count = sum(worker == stored[0] and index <= stored[1] for worker, index in places)
            if count < len(places):
                tokens += encoder.tokens(batch["image"])[count:]
                texts += encoder.texts(sum(captions, [])).split([len(each) for each in captions])[count:]
                for key, each, place in list(zip(batch["key"], captions, places, strict=True))[count:]:
                    records.append({"key": key, "captions": each, "place": place})
            progress.step(count=len(places) - count)
            while len(records) >= size:
                yield *_take(size, tokens, texts, records), before
                size = next(sizes)
            before = copy.deepcopy(batches.state)
    except BadData as error:
        raise ValueError(f"train_data: {source.complaint()}; `pacl data check` lists them") from error
    if records:
        yield *_take(size, tokens, texts, records), before


def _take(
    size: int, tokens: list[Tensor], texts: list[Tensor], records: list[dict]
) -> tuple[Tensor, Tensor, list[dict]]:
    """Remove and return the first `size` of each; set each record's "text", the first row of its image's texts."""
    first = 0
    for record, each in zip(records[:size], texts, strict=False):
        record["text"], first = first, first + len(each)
    shard = torch.stack(tokens[:size]), torch.cat(texts[:size]), records[:size]
    del tokens[:size], texts[:size], records[:size]
    return shard
