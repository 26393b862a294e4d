"""Runs of open_clip_train's `main` by the recipe: the losses are those of a plain loop with the written formula."""

from __future__ import annotations

import json
import logging
import math
import os
import runpy
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("open_clip")
pytest.importorskip("pandas")  # open_clip_train reads csv files with it
import open_clip
import open_clip.factory
import torch
from forks import run_ranks
from open_clip_train import main
from open_clip_train.data import CsvDataset
from pictures import picture
from PIL import Image
from ranks import TORCHRUN
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler

from pacl_kernels import fused_pacl_loss

RECIPE = str(Path(__file__).parents[2] / "examples/recipes/train_open_clip.py")
CPU_RANKS = str(Path(__file__).with_name("cpu_ranks.py"))
SIZES = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
BATCH, PAIRS, HELD_OUT, EPOCHS = 4, 16, 6, 2
# With open_clip_train's eps, 1e-6, Adam turns the rounding of gradients that are zero in theory into whole steps.
LR, BETAS, EPS, DECAY = 1e-3, (0.9, 0.98), 1e-3, 0.2
# The whole image is the crop, so that processes and resumed runs need not draw the same random numbers.
SAME_CROP = ["--aug-cfg", "scale=(1.0,1.0)"]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Create `clip`, an untrained CLIP, and the pairs `train.csv` and `val.csv` with images of random pixels."""
    folder = tmp_path_factory.mktemp("open_clip_train")
    (folder / "clip").mkdir()
    (folder / "clip/open_clip_config.json").write_text(json.dumps({"model_cfg": SIZES, "preprocess_cfg": {}}))
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**SIZES).state_dict(), folder / "clip/open_clip_model.safetensors")
    words = "zebra apple river castle orange violin tiger lamp".split()
    rows = ["filepath\ttitle"]
    for i in range(PAIRS + HELD_OUT):
        Image.fromarray(picture(i, 32, 32)).save(folder / f"{i}.png")
        rows.append(f"{folder / f'{i}.png'}\ta {words[i % 8]} and a {words[i // 8]}")
    (folder / "train.csv").write_text("\n".join(rows[: PAIRS + 1]))
    (folder / "val.csv").write_text("\n".join(rows[:1] + rows[PAIRS + 1 :]))
    return folder


@contextmanager
def undone():
    """Undo what the recipe and open_clip_train change in this process: their own names, and the settings of logging."""
    names = [(open_clip.factory, "CLIP"), (main, "create_loss"), (main, "evaluate"), (sys, "argv")]
    before = [getattr(module, name) for module, name in names]
    levels = {name: logging.getLogger(name).level for name in [None, *logging.root.manager.loggerDict]}
    handlers = logging.root.handlers[:]
    try:
        yield
    finally:
        for (module, name), value in zip(names, before, strict=True):
            setattr(module, name, value)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for handler in set(logging.root.handlers) - set(handlers):
            logging.root.removeHandler(handler)
            handler.close()


def flags(world: Path, logs: Path, *more: object) -> list[str]:
    words = ["--model", f"local-dir:{world / 'clip'}", "--logs", logs, "--name", "run", "--report-to", "tensorboard"]
    words += ["--batch-size", BATCH, "--epochs", EPOCHS, "--workers", 0, "--device", "cpu", "--log-every-n-steps", 1]
    words += ["--lr", LR, "--beta1", BETAS[0], "--beta2", BETAS[1], "--eps", EPS, "--wd", DECAY, "--skip-scheduler"]
    return [str(word) for word in (*words, *SAME_CROP, *more)]


def run(world: Path, logs: Path, *more: object) -> list[float]:
    """Run the recipe in this process, with fp32 unless `more` says otherwise, and return the loss of every step."""
    with undone():
        sys.argv = [RECIPE, *flags(world, logs, "--precision", "fp32", *more)]
        with pytest.raises(SystemExit) as end:
            runpy.run_path(RECIPE, run_name="__main__")
    assert end.value.code is None
    return losses(logs)


def training(world: Path) -> tuple[str, Path]:
    return "--train-data", world / "train.csv"


def losses(logs: Path) -> list[float]:
    """Return the logged losses; where a resumed run logged a step again, its loss."""
    events = EventAccumulator(str(logs / "run/tensorboard"), size_guidance={"scalars": 0}).Reload()
    found = {event.step: event.value for event in events.Scalars("train/contrastive_loss")}
    return [found[step] for step in sorted(found)]


def formula(patches: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss and φ [B, B], in the form "cosine" with a temperature of 0.05."""
    patches, texts = F.normalize(patches, dim=-1), F.normalize(texts, dim=-1)
    scores = torch.einsum("bnd,kd->bkn", patches, texts)
    attention = (scores / 0.05).softmax(-1)
    pooled = torch.einsum("bkn,bnd->bkd", attention, patches)
    phi = (attention * scores).sum(-1) / pooled.norm(dim=-1)
    labels = torch.arange(len(phi))
    return (F.cross_entropy(scale * phi, labels) + F.cross_entropy(scale * phi.T, labels)) / 2, phi


def embed(clip: open_clip.CLIP, images: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    clip.visual.output_tokens = True  # open_clip's own way to the patch tokens
    return clip.visual(images)[1] @ clip.visual.proj, clip.encode_text(ids, normalize=True), clip.logit_scale.exp()


def load(world: Path):
    return open_clip.create_model_and_transforms(f"local-dir:{world / 'clip'}", aug_cfg={"scale": (1.0, 1.0)})


def dataset(world: Path, name: str, transform) -> CsvDataset:
    tokenize = open_clip.get_tokenizer(f"local-dir:{world / 'clip'}")
    return CsvDataset(str(world / f"{name}.csv"), transform, "filepath", "title", tokenizer=tokenize)


def plain(
    world: Path, *, accumulate: int = 1, processes: int = 1, resumed: bool = False, bf16: bool = False
) -> tuple[list[float], float]:
    """Return the loss of every step of a loop without open_clip_train, in one process, and `scale_momentum`."""
    clip, transform, _ = load(world)
    pairs = dataset(world, "train", transform)
    if processes > 1:
        samplers = [DistributedSampler(pairs, processes, rank) for rank in range(processes)]
        loaders = [DataLoader(pairs, BATCH, sampler=sampler, drop_last=True) for sampler in samplers]
    else:
        samplers, loaders = [], [DataLoader(pairs, BATCH, shuffle=True, drop_last=True)]
    decayed = [x for name, x in clip.named_parameters() if x.ndim >= 2 and "bn" not in name and "ln" not in name]
    others = [x for x in clip.parameters() if not any(x is y for y in decayed)]
    groups = [{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": DECAY}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS)
    found = []
    torch.manual_seed(0)
    for epoch in range(EPOCHS):
        if resumed and epoch == 1:
            torch.manual_seed(0)  # open_clip_train's checkpoints have no state of the generator
        for sampler in samplers:
            sampler.set_epoch(epoch)
        batches = [list(loader) for loader in loaders]
        parts = [part for batch in zip(*batches, strict=True) for part in batch]
        for start in range(0, len(parts), processes * accumulate):
            images, ids = (torch.cat(x) for x in zip(*parts[start : start + processes * accumulate], strict=True))
            if bf16:
                with torch.autocast("cpu", torch.bfloat16):
                    loss = fused_pacl_loss(*embed(clip, images, ids), attn_temperature=0.05, form="cosine")
            else:
                loss = formula(*embed(clip, images, ids))[0]
            optimizer.zero_grad()
            loss.backward()
            clip.logit_scale.grad *= accumulate  # --accum-freq adds its whole gradient once for each part
            optimizer.step()
            with torch.no_grad():
                clip.logit_scale.clamp_(0, math.log(100))
            found.append(loss.item())
    return found, scale_momentum(optimizer.state_dict())


def scale_momentum(optimizer: dict) -> float:
    """Return the mean gradient that AdamW has kept of the only scalar, the logarithm of the logit scale."""
    return next(state["exp_avg"].item() for state in optimizer["state"].values() if state["exp_avg"].ndim == 0)


def checkpoint(logs: Path, epoch: int) -> dict:
    return torch.load(logs / f"run/checkpoints/epoch_{epoch}.pt", weights_only=True)


def test_plain_and_resumed(world, tmp_path):
    found = run(world, tmp_path, *training(world))
    assert len(found) == EPOCHS * PAIRS // BATCH and found[-1] < 0.7 * found[0]
    assert found == pytest.approx(plain(world)[0], rel=1e-5)

    (tmp_path / "run/checkpoints/epoch_2.pt").unlink()
    found = run(world, tmp_path, *training(world), "--resume", "latest")
    assert found == pytest.approx(plain(world, resumed=True)[0], rel=1e-5)


def test_accumulated(world, tmp_path):
    found = run(world, tmp_path, *training(world), "--accum-freq", 2)
    assert len(found) == EPOCHS * PAIRS // BATCH // 2
    expected, momentum = plain(world, accumulate=2)
    assert found == pytest.approx(expected, rel=1e-5)
    assert scale_momentum(checkpoint(tmp_path, EPOCHS)["optimizer"]) == pytest.approx(momentum, rel=1e-4)


def test_autocast(world, tmp_path):
    found = run(world, tmp_path, *training(world), "--precision", "amp_bf16")
    assert found == pytest.approx(plain(world, bf16=True)[0], rel=1e-5)


@torch.no_grad()
def test_sigmoid_on_a_locked_tower(world, tmp_path):
    clip, transform, _ = load(world)
    pairs = dataset(world, "train", transform)
    images, ids = (torch.stack(x) for x in zip(*(pairs[i] for i in range(PAIRS)), strict=True))
    patches, texts, scale = embed(clip, images, ids)
    signs = 2 * torch.eye(PAIRS) - 1  # open_clip starts at a bias of 0, where the weights have none
    expected = -F.logsigmoid(signs * scale * formula(patches, texts, scale)[1]).sum() / PAIRS

    locked = ["--siglip", "--lock-image", "--lock-image-unlocked-groups", 1, "--lock-text"]
    locked += ["--lock-text-freeze-layer-norm"]  # without it, open_clip 3.3 fails
    with torch.enable_grad():
        found = run(world, tmp_path, *training(world), *locked, "--batch-size", PAIRS)
    assert found[0] == pytest.approx(expected.item(), rel=1e-5) and found[1] < found[0]
    before, after = clip.state_dict(), checkpoint(tmp_path, EPOCHS)["state_dict"]
    changed = {name for name, x in after.items() if name not in before or not torch.equal(x, before[name])}
    assert changed == {"visual.proj", "logit_scale", "logit_bias"}


@torch.no_grad()
def validated(world: Path, state: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return the metrics to expect of weights on `val.csv`. The loss is the mean over the batches of BATCH pairs."""
    clip, _, transform = load(world)
    clip.load_state_dict(state)
    pairs = dataset(world, "val", transform)
    images, ids = (torch.stack(x) for x in zip(*(pairs[i] for i in range(HELD_OUT)), strict=True))
    patches, texts, scale = embed(clip.eval(), images, ids)
    parts = [slice(0, BATCH), slice(BATCH, HELD_OUT)]
    values = [formula(patches[part], texts[part], scale)[0] * len(patches[part]) for part in parts]
    phi = formula(patches, texts, scale)[1]
    ranks = [(x > x.diagonal()[:, None]).sum(1) + 1.0 for x in (phi, phi.T)]
    return {
        "clip_val_loss": sum(values).item() / HELD_OUT,
        "image_to_text_mean_rank": ranks[0].mean().item(),
        "text_to_image_mean_rank": ranks[1].mean().item(),
        "image_to_text_R@1": (ranks[0] == 1).float().mean().item(),
        "num_samples": HELD_OUT,
    }


def assert_validated(world: Path, logs: Path, epochs: list[int]):
    lines = [json.loads(line) for line in (logs / "run/checkpoints/results.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == epochs
    for line in lines:
        state = checkpoint(logs, line["epoch"])["state_dict"]
        state = {name.removeprefix("module."): x for name, x in state.items()}
        expected = validated(world, state)
        assert {name: line[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_validation_alone(world, tmp_path):
    run(world, tmp_path, *training(world), "--epochs", 1)
    (tmp_path / "run/out.log").unlink()  # open_clip_train starts no second run of a name
    run(world, tmp_path, "--val-data", world / "val.csv", "--resume", tmp_path / "run/checkpoints/epoch_1.pt")
    assert_validated(world, tmp_path, [1])


def test_zero_shot_imagenet_is_refused(world, tmp_path):
    with undone(), pytest.raises(SystemExit, match="--imagenet-val and --imagenet-v2: got one of them, expected"):
        sys.argv = [RECIPE, "--imagenet-val", str(tmp_path)]
        runpy.run_path(RECIPE, run_name="__main__")


def test_the_frameworks_own_validation_fails_on_patches(world, tmp_path):
    """If this ever fails, the recipe no longer needs its `evaluate`."""
    with undone(), pytest.raises(RuntimeError, match="expects a tensor with <= 2 dimensions"):
        open_clip.factory.CLIP = runpy.run_path(RECIPE)["PatchCLIP"]
        main.main(flags(world, tmp_path, "--precision", "fp32", "--val-data", world / "val.csv"))


def torchrun(world: Path, logs: Path, *more: object) -> list[float]:
    launcher = [*TORCHRUN, "2", "--"]  # without "--", torchrun takes --logs for a flag of its own
    done = subprocess.run(
        [*launcher, CPU_RANKS, RECIPE, *flags(world, logs, "--precision", "fp32", *training(world), *more)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return losses(logs)


def test_two_processes_validated(world, tmp_path):
    words = flags(world, tmp_path, "--precision", "fp32", *training(world), "--val-data", world / "val.csv")
    status, printed = run_ranks([CPU_RANKS, RECIPE, *words], 2, tmp_path / "printed")
    assert status == 0, printed[-4000:]
    found = losses(tmp_path)
    assert len(found) == EPOCHS * PAIRS // BATCH // 2
    assert found == pytest.approx(plain(world, processes=2)[0], rel=1e-5)
    assert_validated(world, tmp_path, [1, 2])


@pytest.mark.recipes_full
def test_torchrun_accumulated_and_resumed(world, tmp_path):
    expected = pytest.approx(plain(world, processes=2, accumulate=2)[0], rel=1e-5)
    assert torchrun(world, tmp_path, "--accum-freq", 2) == expected
    (tmp_path / "run/checkpoints/epoch_2.pt").unlink()
    assert torchrun(world, tmp_path, "--accum-freq", 2, "--resume", "latest") == expected


@pytest.mark.recipes_full
def test_compiled_and_validated(world, tmp_path):
    found = run(world, tmp_path, *training(world), "--torchcompile", "--val-data", world / "val.csv", "--epochs", 1)
    assert found == pytest.approx(plain(world)[0][: len(found)], rel=1e-5)
    assert_validated(world, tmp_path, [1])
