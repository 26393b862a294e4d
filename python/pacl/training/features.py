"""`pacl features`: compute tokens and text embeddings of frozen towers once, for `pacl train --features`."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from safetensors.torch import save
from torch import Tensor

from ..commands import next_command
from ..data.features import (
    MANIFEST,
    NOUNS,
    TOWERS,
    digested_files,
    missing_shards,
    read_manifest,
    shard_files,
    stored_records,
    write_manifest,
    write_shard,
)
from ..data.flags import TrainingDataFlags, check_plan, plan_of
from ..data.parts import block, part_batches
from ..data.samples import BadData, Part, Samples
from ..data.texts import PROMPTS, noun_finder
from ..failures import collective, sentence
from ..files import file_digest, remove_unfinished, write_bytes
from ..flags import Place, Tokens, parse
from ..locks import LOCK, lock_folder
from ..processes import (
    add_up,
    default_workers,
    from_first,
    gather_objects,
    patient_group,
    place_in,
    process_device,
    shared_progress,
)
from ..remote import Location, RemotePath, writable
from ..resolution import images_of, moved
from ..sharing import describe_towers, load_tower, save_tower
from ..towers import frozen_random_towers, load_towers
from .identity import check_agreement, describe_data

# Flags that plans of earlier versions lack, and their defaults.
LATER = {"random_towers": False, "max_patches": None, "tokens": "plain", "proxy": None}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig(TrainingDataFlags):
    """Store patch tokens and text embeddings of frozen towers for `pacl train --features OUT`. The same command
    continues a run that was stopped. The processes that torchrun starts share the images.
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
    text_model: str | None = None
    random_towers: bool = False
    """Use towers without weights, and keep them beside the features."""
    force_image_size: int | None = None
    max_patches: int | None = None
    tokens: Tokens = "plain"
    """Reading of the patch tokens."""
    proxy: str | None = None
    """Second tower of proxy tokens, a timm model. Default: vit_base_patch16_224.dino."""
    nouns: Literal["words", "nltk"] | None = None
    """Also store prompts with all nouns of the captions, for `pacl train --nouns` and `--recipe paper`."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Number format of the stored tokens; on a GPU also that of autocast. Text embeddings are stored in float32."""
    batch_size: int = 64
    shard_size: int = 1000
    """Most images in one file; files are of equal size."""
    workers: int = field(default_factory=default_workers)
    """Processes that read images, each those of one file at a time, which the main process holds until it is whole."""
    device: str = "auto"
    seed: int = 0
    """Random seed of towers without weights."""
    dry_run: bool = False
    """Print the size of the features and stop."""

    @property
    def plan(self) -> dict[str, Any]:
        """The values that must not change when a run continues, as plain Python."""
        without = [name for name, default in LATER.items() if getattr(self, name) == default]
        return plan_of(self, "out", "dry_run", "device", "batch_size", "workers", *without)


def main(argv: Sequence[str], prog: str = "pacl features") -> int:
    """Run `pacl features` with these arguments and return its exit status; KeyboardInterrupt passes through."""
    mine = not dist.is_initialized()  # leave a caller's group as it is
    try:
        config = parse(FeaturesConfig, argv, prog)
        config = dataclasses.replace(config, out=writable(str(config.out), config.store))
        group = patient_group()
        if config.dry_run:
            return _dry_run(config, group)
        # The first process locks the folder for all.
        with contextlib.ExitStack() as stack:
            from_first(lambda: stack.enter_context(lock_folder(config.out)), group)
            _write(config, group)
    except (ValueError, OSError) as error:
        print(f"pacl: error: {sentence(error)}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if (lost := collective(error)) is None:
            raise
        lost = lost.partition(" (")[0]  # the flag of another command
        print(f"pacl: error: {lost}; the same command continues", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        raise
    finally:
        if mine and dist.is_initialized():
            dist.destroy_process_group()
    return 0


def _dry_run(config: FeaturesConfig, group: dist.ProcessGroup | None) -> int:
    if place_in(group)[0] == 0 and not _finished(config):
        encoder = Encoder(config)
        print(_plan(config, encoder, _open(config, encoder))[1], flush=True)
    return 0


def _write(config: FeaturesConfig, group: dist.ProcessGroup | None) -> None:
    """Write the features, in all processes of a group.

    The first process divides the images into the parts of the files. Every process writes the files of its share of
    the parts, and the first one then the manifest.
    """
    rank, world = place_in(group)
    check_agreement(dataclasses.asdict(config), group)
    from_first(lambda: remove_unfinished(config.out), group)
    if from_first(lambda: _finished(config), group):
        return
    encoder = Encoder(config)
    source = _open(config, encoder)
    if group is not None:
        check_agreement({"train_data": describe_data(source)}, group)

    def begin() -> list[tuple[int, Part]]:
        """Return the parts that have no file yet, each with its number."""
        missing, estimate, images = _plan(config, encoder, source)
        print(estimate, flush=True)
        write_manifest(config.out, {"complete": False, "plan": config.plan, "images": images, "shards": []})
        encoder.keep_random(config.out)
        return missing

    missing = from_first(begin, group)
    if rank:
        encoder.keep_random(config.out)  # loads those of the first process
    _encode(config, encoder, source, block(missing, rank, world), group)
    add_up(source.counts, group)
    manifest = from_first(lambda: _manifest(config, encoder, source), group)
    names = digested_files(manifest)[rank::world]
    digests = gather_objects({name: file_digest(config.out / name) for name in names}, group)
    if rank == 0:
        found = {name: digest for each in digests for name, digest in each.items()}
        write_manifest(config.out, manifest | {"sha256": {name: found[name] for name in digested_files(manifest)}})
        for line in source.remarks():
            print(line)
        count = sum(shard["count"] for shard in manifest["shards"])
        print(f"finished: {config.out}, {count:,} images; skipped: {source.reasons}")
        print(_next(config), flush=True)


def _finished(config: FeaturesConfig) -> bool:
    """Return True, and say so, if the folder has all features; raise ValueError if it has anything else than a part."""
    if (config.out / MANIFEST).is_file():
        found = read_manifest(config.out)
        check_plan(config.out, LATER | found["plan"], LATER | config.plan)
        if found["complete"]:
            print(f"finished: {config.out}, {sum(shard['count'] for shard in found['shards']):,} images")
            return True
        if "images" not in found:
            raise ValueError(
                f"out: {config.out} was begun by an earlier version, which divided the images otherwise; expected a "
                "new folder"
            )
    elif config.out.exists() and any(path.name != LOCK for path in config.out.iterdir()):
        raise ValueError(f"out: {config.out} holds other files, expected a new folder")
    return False


def _open(config: FeaturesConfig, encoder: Encoder) -> Samples:
    # All captions of an image are stored; training takes one of them an epoch.
    return config.open(config.train_data, transform=encoder.towers.transform, captions="all")


def _manifest(config: FeaturesConfig, encoder: Encoder, source: Samples) -> dict[str, Any]:
    """Return the manifest of complete features, without digests; with --nouns also write the prompts."""
    manifest: dict[str, Any] = dict(read_manifest(config.out))
    manifest |= {"complete": True, "shards": shard_files(config.out)}
    if not manifest["shards"]:
        raise ValueError(_complaint(source))
    if config.nouns:
        find = noun_finder(config.nouns)
        records = stored_records(config.out)
        manifest["nouns"] = sorted({noun for each in records for text in each["captions"] for noun in find(text)})
        prompts = encoder.texts([prompt.format(noun) for noun in manifest["nouns"] for prompt in PROMPTS])
        write_bytes(config.out / NOUNS, save({"texts": prompts}))
    return manifest | {"towers": describe_towers(encoder.towers, config.out, random=encoder.random)}


def _next(config: FeaturesConfig) -> str:
    return next_command("train", "--features", str(config.out), *(["--nouns", config.nouns] if config.nouns else []))


class Encoder:
    """The frozen towers, with outputs in the dtypes that are stored."""

    def __init__(self, config: FeaturesConfig):
        self.device = process_device(config.device)
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

    def tokens(self, images: Tensor | list[Tensor]) -> Sequence[Tensor]:
        """Return patch tokens [N, width] of each image [3, H, W], in the dtype of --precision."""
        tokens, lengths = self._run(self.towers.packed, images)
        tokens = tokens.to(self.dtype)
        if not tokens.isfinite().all():
            raise ValueError(f"precision: got tokens that are not finite in {self.dtype}, expected a wider type")
        return tuple(tokens.cpu()) if lengths is None else tokens.cpu().split(lengths.tolist())

    def texts(self, texts: list[str]) -> Tensor:
        """Return normalised text embeddings [B, D], float32."""
        parts = [texts[i : i + self.batch_size] for i in range(0, len(texts), self.batch_size)]
        rows = [self._run(self.towers.encode_text, self.towers.tokenize(part)).float().cpu() for part in parts]
        return torch.cat(rows) if rows else torch.empty(0, self.towers.widths[1])

    @torch.no_grad()
    def _run(self, encode: Callable[[Any], Any], batch: Tensor | list[Tensor]) -> Any:
        amp = self.device.type == "cuda" and self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype, enabled=amp):
            return encode(moved(batch, self.device))


def _plan(config: FeaturesConfig, encoder: Encoder, source: Samples) -> tuple[list[tuple[int, Part]], str, int]:
    """Return the parts without a file, a line on the size of their features, and the number of images of all parts.

    Raises ValueError if the source has another number of images than when the folder was begun, and if the features
    do not fit on the disk.
    """
    images = source.count()
    if not (config.out / MANIFEST).is_file():
        estimate = _estimate(config, encoder, images)  # before the parts, because the number may be a mistake
        return list(enumerate(source.parts(config.shard_size))), estimate, images
    check_plan(config.out, read_manifest(config.out), {"images": images})
    parts = source.parts(config.shard_size)
    missing = [(number, parts[number]) for number in missing_shards(config.out, len(parts))]
    return missing, _estimate(config, encoder, sum(part.size for _, part in missing)), images


def _estimate(config: FeaturesConfig, encoder: Encoder, count: int) -> str:
    """Return a line on the size of the features of `count` images; raise ValueError if they do not fit on the disk."""
    image, _ = encoder.towers.probe()
    patches, width = encoder.tokens(image)[0].shape
    patches = config.max_patches or patches
    dim = encoder.towers.widths[1]
    # Most keys, captions and offsets take less than a kilobyte.
    size = count * (patches * width * encoder.dtype.itemsize + 4 * dim + 1024)
    most = "at most " if config.max_patches else ""
    what = (
        f"features: {count:,} images, {most}{patches} x {width} {config.precision} and texts of {dim} fp32: "
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


def _encode(
    config: FeaturesConfig,
    encoder: Encoder,
    source: Samples,
    parts: Sequence[tuple[int, Part]],
    group: dist.ProcessGroup | None,
) -> None:
    """Write the file of each part, unless all of its images are bad.

    The batches of a part hold only its own images, so that its bits do not depend on who else reads.
    """
    begun: dict[int, tuple[list[Tensor], list[Tensor], list[dict]]] = {}
    total = sum(part.size for _, part in parts)
    try:
        with shared_progress("Features", total, "image", group) as progress:
            for number, batch, last in part_batches(source, parts, config.batch_size, workers=config.workers):
                tokens, texts, records = begun.setdefault(number, ([], [], []))
                if batch is not None:
                    captions = batch["captions"]
                    tokens += encoder.tokens(images_of(batch))
                    first = records[-1]["text"] + len(records[-1]["captions"]) if records else 0
                    texts.append(encoder.texts(sum(captions, [])))
                    for key, each in zip(batch["key"], captions, strict=True):
                        records.append({"key": key, "captions": each, "text": first})
                        first += len(each)
                    progress.step(count=len(captions))
                if last and records:
                    packed = config.max_patches is not None
                    write_shard(config.out, number, tokens, torch.cat(texts), records, packed=packed)
                if last:
                    del begun[number]
    except BadData as error:
        raise ValueError(_complaint(source)) from error


def _complaint(source: Samples) -> str:
    return f"train_data: {source.complaint()}; `pacl data check` lists them"
