"""A run of `pacl train`, in one process or under torchrun."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..backbones import patch_counts
from ..cross_attention import save_head, words_of
from ..data.features import Features
from ..data.samples import BadData, Samples, captions_of, loader
from ..data.texts import noun_finder
from ..embedder import CONFIG, HEAD, VisionEmbedder, save_embedder
from ..failures import collective
from ..processes import choose_device, process_group
from ..resolution import images_of, moved
from ..sharing import describe_towers, save_tower
from ..signals import Interrupted, Signals
from ..towers import Towers, frozen_random_towers, load_towers
from .checkpoints import save_checkpoint
from .config import TrainConfig
from .identity import check_agreement, describe_data, describe_run
from .log import Log, say
from .model import Trainable
from .pairing import chosen_texts, pair_options, places_of
from .recipe import command
from .states import DataStates
from .trainer import Trainer
from .validation import Validation

BAD_DATA = 1000  # above the numbers of signals
TOWERS = (
    "model pretrained vision_model vision_pretrained text_model force_image_size max_patches tokens proxy lock_image "
    "lock_image_unlocked_groups lock_text grad_checkpointing"
).split()


class Run:
    """One training run: its models, its data, and its progress."""

    def __init__(self, config: TrainConfig):
        self.config = config
        self.device = choose_device(config.device)
        self.group = process_group(self.device, config.dist_timeout)
        self.rank, self.world = (self.group.rank(), self.group.size()) if self.group else (0, 1)
        check_agreement({k: x for k, x in dataclasses.asdict(config).items() if k != "device"}, self.group)
        self.amp = config.precision == "amp_bf16" or (config.precision == "auto" and self.device.type == "cuda")
        self.step = self.saved = 0  # the last complete step, and the step of the last checkpoint
        self.saving = False
        self.stopped_by: int | None = None  # number of a signal
        self.signals = Signals()
        self.states = DataStates(self.group, self.device)
        self.kept_random = False  # written by this process
        self.resumed: list[dict[str, Any]] = []  # the steps at which flags changed, and their values
        self.nouns = noun_finder(config.nouns) if config.nouns else None
        torch.manual_seed(config.seed)  # so that towers without weights are equal in every process and on resuming
        self.towers = load_towers(**{name: getattr(config, name) for name in TOWERS}, device=self.device)
        order: dict[str, Any] = {"shuffle": config.shuffle, "seed": config.seed, "repeat": True}
        order |= {"rank": self.rank, "world": self.world}
        order["captions"] = config.captions_per_image if config.captions_per_image > 1 else "one"
        # Random towers that are frozen, wholly or in part, are kept beside the embedder.
        self.random = frozen_random_towers(self.towers.names, config.locked, config.random_towers)
        self.data: Samples
        if config.features is not None:
            verify = config.verify and not config.dry_run
            self.data = features = Features(
                config.features, nouns=config.nouns, verify=verify, store=config.store, **order
            )
            features.load_random(self.towers)
            features.check(self.towers)
        else:
            assert config.train_data is not None  # TrainConfig.check
            reading = {"transform": self.towers.transform, "resampled": config.dataset_resampled}
            self.data = config.open(config.train_data, **order, **reading)
        self.data_state: dict[str, Any] | None = None
        self.described: dict[str, Any] = {}  # the towers before training, in the first process
        self.identity = {} if config.dry_run else self._identity()
        self.samples = config.train_num_samples or self._count()
        self.global_batch = config.local_batch * self.world
        self.epoch_steps = self.samples // self.global_batch
        if self.samples == 0:
            raise ValueError(f"train_data: got no pairs in {self.data.name}; `pacl data check` says why")
        if self.epoch_steps == 0:
            raise ValueError(
                f"batch_size: got {self.global_batch} pairs in a step of all processes, expected at most the "
                f"{self.samples} of an epoch"
            )
        self.steps = config.max_steps or config.epochs * self.epoch_steps
        torch.manual_seed(config.seed)
        self.model = Trainable(VisionEmbedder(*self.towers.widths), config, self.towers).to(self.device)
        if config.torchcompile:
            self.model.embedder.compile()
        self.trainer = Trainer(
            self.model,
            config,
            self.steps,
            cooldown=config.epochs_cooldown * self.epoch_steps,
            tower_parameters=self.model.tower_parameters(),
            group=self.group,
            device=self.device,
            amp=self.amp,
        )
        self.validation = Validation(config, self.towers, self.device, self.group, self.amp)
        self.validated: dict[str, float | None] = {}
        self.log = Log(
            config,
            self.device,
            global_batch=self.global_batch,
            epoch_steps=self.epoch_steps,
            rank=self.rank,
            world=self.world,
        )

    def _identity(self) -> dict[str, Any]:
        """Return what must not change on resuming. The towers are described in the first process alone."""
        data = describe_data(self.data)
        check_agreement({"features" if self.config.features else "train_data": data}, self.group)
        self.described = self._describe(self.towers) if self.rank == 0 else {}
        workers = max(1, min(self.config.workers, self.data.most_workers))
        precision = "amp_bf16" if self.amp else "fp32"
        return describe_run(self.config, self.described, data, precision=precision, workers=workers)

    def _describe(self, towers: Towers, trained: Sequence[str] = ()) -> dict[str, Any]:
        kept = [name for name in self.random if name not in trained]
        return describe_towers(towers, self.config.folder / "embedder", trained, kept)

    def _count(self) -> int:
        """Count the pairs in the first process, for all."""
        counts = [self.data.count() if self.rank == 0 else 0]
        if self.group:
            dist.broadcast_object_list(counts, src=0, group=self.group)
        return counts[0]

    def say(self, text: str) -> None:
        """Print a line and append it to out.log, in the first process."""
        if self.rank == 0:
            say(text, None if self.config.dry_run else self.config)

    @property
    def result(self) -> Trainable:
        """The weights that are validated and exported: their average, if the run keeps one."""
        return self.model if self.trainer.average is None else cast(Trainable, self.trainer.average.module)

    def _values(self) -> dict[str, float]:
        """Return the current values of the run for a line of the log."""
        return {
            "lr": self.trainer.lr,
            "scale": self.model.log_scale.exp().item(),
            "attn_temperature": self._temperature(self.model),
            "skipped": sum(self.data.skipped.values()),
            **({} if (kept := self.trainer.kept_share) is None else {"kept_share": kept}),
            **({} if (coherence := self.trainer.coherence_loss) is None else {"coherence_loss": coherence.item()}),
        }

    def _temperature(self, model: Trainable) -> float:
        learned = model.log_temperature
        return self.config.attn_temperature if learned is None else learned.exp().item()

    # Training

    def train(self) -> None:
        """Train from the current step to the last, with checkpoints; on a signal, finish the current step and save.

        First make the validation that was due at the checkpoint's step, if the run ended before it.
        """
        owed = self._validation_is_owed()
        if self.step >= self.steps and not owed:
            # The run was perhaps killed before its last export.
            if _exported(self.config.folder / "embedder") != (self.step, self.validated.get("step")):
                self.export()
            return
        with self.signals, self.log.opened(self.step):
            try:
                if owed:
                    self._validate()
                if self.step < self.steps:
                    self._train()
            except Interrupted:  # in a validation, where the processes cannot agree on it
                self.stopped_by = self.signals.number
            except Exception as error:
                # Processes that a signal reaches one after the other lose each other.
                if self.signals.number is None or collective(error) is None:
                    self._rescue(error)
                    raise
                self.stopped_by = self.signals.number
            if self.step > self.saved:
                self.log.check()
                self.save()

    def _train(self) -> None:
        for batch, waited in self._batches():
            begin = time.perf_counter()
            loss = self._step(batch)
            self.step += 1
            self.states.complete()
            values = self._values if self.due(self.config.log_every_n_steps) else None
            self.log.step(self.step, loss, batch["key"], waited, time.perf_counter() - begin, values)
            if self.due(self.config.save_frequency):
                self.log.check()
                self.save()
            if self.validation and self.due(self.config.val_frequency):
                self._validate()
            if self.step == self.steps:
                return

    @property
    def _interruptible(self) -> bool:
        """True if a signal may end a wait: with NCCL the other processes would not notice."""
        return self.group is None or self.device.type == "cpu"

    def _rescue(self, error: Exception) -> None:
        """Save the last complete step after an error, unless its weights or the disk may be the reason for it."""
        if self.trainer.updating or self.saving or self.step == self.saved or isinstance(error, FloatingPointError):
            return
        with contextlib.suppress(Exception):  # the first error counts
            self.log.check()
            self.save()

    def due(self, every: int, ahead: int = 0) -> bool:
        """Return True if the step `ahead` of the current one is the last, or a multiple of `every`."""
        step = self.step + ahead
        return step % every == 0 or step == self.steps

    def _validate(self) -> None:
        """Validate the current weights and export them with the results."""
        with self.signals.waiting(self._interruptible):
            values = self.validation(self.result)
        self.validated = self.log.validated(self.step, values)
        self.export()

    def _validation_is_owed(self) -> bool:
        """Return True if the checkpoint's step has no validation, although its number or its place as the last asks for
        one.
        """
        due = self.due(self.config.val_frequency) or self.step >= self.steps
        return bool(self.validation) and self.step > 0 and due and self.validated.get("step") != self.step

    def _batches(self) -> Iterator[tuple[dict[str, Any], float]]:
        """Yield this process's batch for each step, with the seconds that the process waited for it, until a signal."""
        size, workers = self.config.local_batch, self.config.workers
        batches = loader(self.data, size, workers=workers, drop_last=True, start=self.data_state)
        try:
            iterator = iter(batches)
            while True:
                begin, batch = time.perf_counter(), None
                with contextlib.suppress(Interrupted), self.signals.waiting(self._interruptible):
                    batch = next(iterator)
                if self._anyone_stopped(batches.state) or batch is None:
                    return
                yield batch, time.perf_counter() - begin
        except BadData as error:  # replaced, because a worker's message holds its traceback
            raise _bad_data([self.data.complaint()]) from error
        finally:
            if self.step < self.steps:
                batches.kill()

    def _step(self, batch: dict[str, Any]) -> Tensor:
        captions, several = self._texts(batch), self.config.captions_per_image > 1
        texts = [caption for each in captions for caption in each]
        if isinstance(self.data, Features):
            pairs = {"images": batch["tokens"], "texts": self.data.embeddings(batch, texts)}
            if "length" in batch:
                pairs["lengths"] = batch["length"]
        else:
            pairs = self._frozen(images_of(batch), self.towers.tokenize(texts))
        if self.model.head is not None:
            pairs["texts"] = words_of(texts, self.towers, self.config.batch_size)
        if several:
            pairs["places"] = places_of(captions)
        names = [f"{origin} {key}" for origin, key in zip(batch["origin"], batch["key"], strict=True)]
        options = pair_options(
            captions, names, self.config.duplicates, several=several, group=self.group, device=self.device
        )
        watched = self.rank == 0 and self.due(self.config.log_every_n_steps, ahead=1)
        return self.trainer.step(self.step, pairs, self.log.watch if watched else None, options)

    def _texts(self, batch: dict[str, Any]) -> list[list[str]]:
        """Return the captions of each image, or what chosen_texts makes of them, which depends on neither resuming nor
        workers.
        """
        captions = captions_of(batch)
        if self.nouns is None:
            return captions
        when = {"seed": self.config.seed, "epoch": self.step // self.epoch_steps}
        return chosen_texts(captions, batch["key"], nouns=self.nouns, **when)

    @torch.no_grad()
    def _frozen(self, images: Tensor | list[Tensor], texts: Tensor) -> dict[str, Any]:
        """Run the frozen towers on the step's pairs. Done outside cached_step, which encodes its inputs twice."""
        size, found = self.config.batch_size, {"images": images, "texts": texts}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            if self.model.visual is None:
                starts = range(0, len(images), size)
                parts = [self.towers.packed(moved(images[i : i + size], self.device)) for i in starts]
                found["images"] = torch.cat([tokens for tokens, _ in parts])
                if self.towers.variable:
                    found["lengths"] = torch.cat([lengths for _, lengths in parts if lengths is not None])
            elif self.towers.variable:
                found |= {"images": list(images), "lengths": patch_counts(self.towers.visual, images)}
            if self.model.text is None:
                ids = texts.split(size)
                found["texts"] = torch.cat([self.towers.encode_text(moved(part, self.device)) for part in ids])
        return found

    def _anyone_stopped(self, state: dict[str, Any]) -> bool:
        """Exchange this process's state after the coming step, and return True if any process has a signal.

        All stop before the same step. On a GPU they look for signals only before logged steps, because looking makes
        the host wait. Raises ValueError, or SystemExit where another process prints it, if there is too much bad data.
        """
        bad = self.group is not None and self.data.too_many
        self.states.exchange(state, BAD_DATA if bad else self.signals.number or 0)
        if self.device.type == "cuda" and self.group and not self.due(self.config.log_every_n_steps, ahead=1):
            return False
        flag = self.states.flag()
        if flag == BAD_DATA:
            complaints = [""] * self.world
            dist.all_gather_object(complaints, self.data.complaint() if self.data.too_many else "", group=self.group)
            raise _bad_data(complaints) if self.rank == 0 else SystemExit(1)
        self.stopped_by = flag or None
        return self.stopped_by is not None

    # Files

    def save(self) -> None:
        """Write a checkpoint and export the embedder, in the first process."""
        if self.rank != 0:
            return
        self.saving = True
        state = {
            "step": self.step,
            "name": self.config.name,
            "state_dict": _on_cpu(self.model),
            "ema": None if self.trainer.average is None else _on_cpu(self.trainer.average),
            "optimizer": self.trainer.optimiser.state_dict(),
            "global_batch": self.global_batch,
            "world": self.world,
            "data": self.states.of_all(),
            "validated": self.validated,
            "run": self.identity,
            "resumed": self.resumed,
        }
        save_checkpoint(self.config.folder / "checkpoints", state, keep=self.config.keep_checkpoints)
        self.saved = self.step
        self.export()
        self.saving = False

    def export(self) -> None:
        """Write the folder that load_pacl reads: embedder, model card with the last validation, and trained towers.

        With a head, write one file instead. Only the first process writes.
        """
        if self.rank != 0:
            return
        folder, config, model = self.config.folder / "embedder", self.config, self.result
        if model.head is not None:
            save_head(model.embedder, model.head, config.folder / HEAD)
            return
        towers, trained = model.towers_of(self.towers), self.towers.trained
        for name in (*trained, *([] if self.kept_random else self.random)):
            save_tower(towers, name, folder)
        self.kept_random = True
        notes: dict[str, Any] = {"loss": config.loss, "steps": self.step}
        notes |= {"global_batch": self.global_batch, "logit_scale": model.log_scale.exp().item()}
        notes |= {"pairs_seen": self.step * self.global_batch, "command": command(config)}
        notes |= {} if config.ema_decay is None else {"ema_decay": config.ema_decay}
        notes |= {"metrics": self.validated} if self.validated else {}
        notes |= {"resumed": self.resumed} if self.resumed else {}
        save_embedder(
            model.embedder,
            folder,
            self._describe(towers, trained) if trained else self.described,
            form=config.form,
            attn_temperature=self._temperature(model),
            **notes,
        )


def _on_cpu(module: nn.Module) -> dict[str, Tensor]:
    return {name: x.detach().cpu() for name, x in module.state_dict().items()}


def _bad_data(complaints: list[str]) -> ValueError:
    return ValueError(f"train_data: {'; '.join(filter(None, complaints))}; `pacl data check` lists them")


def _exported(folder: Path) -> tuple[int, int | None]:
    """Return the step of the embedder in `folder`, -1 without one, and that of its validation; read from config.json,
    which is written last.
    """
    try:
        notes = json.loads((folder / CONFIG).read_bytes())["training"]
        return int(notes["steps"]), notes.get("metrics", {}).get("step")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return -1, None
