"""The plan that `pacl train` prints first: what a run will do, and how much memory it needs."""

from __future__ import annotations

from typing import cast

from PIL import Image
from torch import Tensor, nn

import pacl_kernels
from pacl_kernels.checks import BackendName
from pacl_kernels.distributed import GATHER_BYTES, gathered_bytes

from .config import TrainConfig
from .recipe import recipe_notes
from .run import Run


def plan(run: Run) -> str:
    """Return the plan as lines for the console."""
    config = run.config
    trained = sum(x.numel() for x in run.model.parameters() if x.requires_grad)
    frozen = sum(x.numel() for x in _parameters(run) if not x.requires_grad)
    need = memory(run)
    lines = [
        f"model: {config.tower_names()}, {frozen:,} parameters frozen, {trained:,} trained",
        f"data: {run.samples:,} pairs in {run.data.name}",
        *(f"data: {remark}" for remark in run.data.remarks()),
        f"steps: {run.steps:,} of {run.global_batch:,} pairs ({run.world} process(es) x "
        f"{config.accum_freq} x {config.batch_size}), {run.epoch_steps:,} an epoch",
        *_left_out(run),
        *_captions(config),
        f"device: {run.device}, {'bfloat16 autocast' if run.amp else 'float32'}",
        f"memory: {_mib(sum(need.values()))} a process ({', '.join(f'{k} {_mib(x)}' for k, x in need.items())}), "
        "plus PyTorch itself and the activations of the towers",
    ]
    if config.dry_run and run.rank == 0 and config.backend != "reference" and config.align == "phi":
        lines.append(_loss(run))
    if run.world > 1:
        lines.append(f"network: each process sends {_mib(sent_bytes(run))} in a step")
    lines.append(f"folder: {config.folder}")
    deviations = recipe_notes(config, run.global_batch).get("deviations")
    if deviations is not None:
        words = [f"{name} {value['run']} for {value['paper']}" for name, value in deviations.items()]
        lines.append(f"recipe: {config.recipe}" + (f", but {'; '.join(words)}" if words else ""))
    return "\n".join(lines)


def _loss(run: Run) -> str:
    """Return a line on time and memory of the loss in a step; the first one on a machine times the loss there."""
    config = run.config
    need = pacl_kernels.plan(
        config.local_batch,
        _image_and_patches(run)[2],
        run.model.embedder.config["out_dim"],
        config.local_batch * config.captions_per_image,
        form=config.form,
        dtype="bfloat16" if run.amp else "float32",
        loss=config.loss,
        device=run.device.type,
        world_size=run.world,
        frozen_texts=config.lock_text,
        backend=cast(BackendName, config.backend),
    )
    beside = need.peak - need.memory["patches and texts"] - need.memory["their gradients"]
    eager = need.eager_memory - need.memory["patches and texts"] - need.memory["their gradients"]
    return (
        f"loss: about {_time(need.seconds)} of a step ({need.backend}) and {_mib(beside)} beside the embeddings; plain "
        f"PyTorch {_time(need.eager_seconds)} and {_mib(max(0, eager))}"
    )


def _left_out(run: Run) -> list[str]:
    """Return a line on the pairs that the steps of an epoch do not take, if there are any."""
    rest = 0 if run.config.dataset_resampled else run.samples - run.epoch_steps * run.global_batch
    taken = f"the steps of an epoch take {run.samples - rest:,} of {run.samples:,} pairs"
    return [f"epoch: {taken}; the other {rest:,} are left for the next epoch"] if rest else []


def _captions(config: TrainConfig) -> list[str]:
    """Return a line on the captions of a step, if it is not one of each image and all are contrasted."""
    words = []
    if config.captions_per_image > 1:
        words.append(f"at most {config.captions_per_image} of an image in a step")
    if config.duplicates != "negative":
        kinds = {"positive": "positives of both images", "ignore": "left out of the contrast"}
        words.append(f"equal ones are {kinds[config.duplicates]}")
    return [f"captions: {'; '.join(words)}"] if words else []


def memory(run: Run) -> dict[str, int]:
    """Return the bytes that one process needs at the peak of a step, by use."""
    config, sizes = run.config, run.model.embedder.config
    item = 2 if run.amp else 4
    weights = sum(x.numel() * x.element_size() for x in _parameters(run))
    trained = sum(x.numel() * x.element_size() for x in run.model.parameters() if x.requires_grad)
    image, own, patches = _image_and_patches(run)
    local = config.local_batch
    texts = local * config.captions_per_image  # at most
    width, hidden, out = (sizes[f"{name}_dim"] for name in ("in", "hidden", "out"))
    return {
        "weights": weights,
        # Gradients, Adam's two averages, and the average of the weights.
        "optimiser": trained * (3 + (config.ema_decay is not None)),
        "images": local * image.numel() * patches // own * 4,
        "tokens": (local * width + config.batch_size * (2 * hidden + 3 * out)) * patches * item,
        # Patch embeddings and their gradient; with micro-batches also the parts of the embeddings.
        "embeddings": (3 if local > config.batch_size else 2) * local * patches * out * item,
        "loss": gathered_bytes(run.world, texts, out, item),
    }


def _image_and_patches(run: Run) -> tuple[Tensor, int, int]:
    """Return an image as the tower takes it, the number of its patches, and the most that an image may have."""
    image = run.towers.transform(Image.new("RGB", (8, 8)))
    own = run.model.patches_of(image[None], run.towers)[0].shape[-2]
    return image, own, run.config.max_patches or own


def sent_bytes(run: Run) -> int:
    """Return the bytes that a process sends in a step: gradients of the parameters, texts, and their float32 gradients
    (see docs/distributed.md). Assumes ring algorithms; leaves out headers and sums.
    """
    local, out = run.config.local_batch * run.config.captions_per_image, run.model.embedder.config["out_dim"]
    item, others = 2 if run.amp else 4, run.world - 1
    trained = sum(x.numel() * x.element_size() for x in run.model.parameters() if x.requires_grad)
    texts, gradients = local * out * item, local * out * 4
    if gathered_bytes(run.world, local, out, item) > GATHER_BYTES:
        exchange = 2 * others * texts + run.world * gradients
    else:
        exchange = others * (texts + gradients * (2 if run.device.type == "cpu" else 1))
    return 2 * trained * others // run.world + exchange


def _parameters(run: Run) -> set[nn.Parameter]:
    """Return the parameters of the towers and the model, which share those that are trained."""
    return {x for module in (run.towers.visual, run.towers.text, run.model) for x in module.parameters()}


def _mib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
