"""The training loop: embed a batch of pairs, contrast all of them, update the weights."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pacl_kernels import cached_step, fused_pacl_loss, kept_pairs
from pacl_kernels.checks import BackendName
from pacl_kernels.distributed import forget

from ..cross_attention import CrossAttention
from ..resolution import moved
from .coherence import coherence_loss
from .config import TrainConfig
from .optimiser import average_of, learning_rate, parameter_groups


class Trainer:
    """Training steps of `model` by the flags of `pacl train`.

    model: a Trainable, or another module whose `forward(images, texts)` returns patches [B, N, D], or packed
        [sum of N, D], texts [B, D], the logit scale, and the attention temperature and bias if they are learned. Its
        parameter `log_scale` is the logarithm of the logit scale.
    steps: steps of the whole training. cooldown: steps at its end in which const-cooldown lowers the learning rate.
    tower_parameters: parameters of `model` with the learning rate config.tower_lr.
    group: processes that share one batch; None for this one alone. amp: run under bfloat16 autocast.
    loss: function of the outputs of `model`; default: fused_pacl_loss by `config`.

    Attributes: `average`, the running average of the weights, None without config.ema_decay; `lr`, the last learning
    rate; `updating`, True while a step changes the weights, and after one that failed in doing so.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        steps: int,
        *,
        cooldown: int = 0,
        tower_parameters: Iterable[nn.Parameter] = (),
        group: dist.ProcessGroup | None = None,
        device: torch.device | str = "cpu",
        amp: bool = False,
        loss: Callable[..., Tensor] | None = None,
    ):
        self.model, self.config, self.steps, self.cooldown = model, config, steps, cooldown
        self.group, self.device, self.amp, self.lr = group, torch.device(device), amp, 0.0
        self.loss = loss or self._contrast
        self.updating = False
        self.contrasted: Tensor | None = None  # the loss of the step that runs, with its graph
        self.kept_share: float | None = None  # of the pairs in the last backward, with grad_tolerance
        self.coherence_loss: Tensor | None = None  # of the last step, without its weight, with config.coherence_loss
        self.average = average_of(model, config.ema_decay) if config.ema_decay is not None else None
        self.wrapped = model
        if group and config.align == "cross-attention":
            raise ValueError(f"align: got cross-attention in {group.size()} processes, expected one process")
        if group:  # the buffers of towers never change
            arguments = inspect.signature(DistributedDataParallel).parameters
            name = "forward_sync_buffers" if "forward_sync_buffers" in arguments else "broadcast_buffers"  # before 2.13
            buffers: dict[str, Any] = {name: False}
            self.wrapped = DistributedDataParallel(model, process_group=group, **buffers)
        towers = list(tower_parameters)
        others = [x for x in model.parameters() if x not in set(towers)]
        self.optimiser = torch.optim.AdamW(
            [
                {**group, "initial_lr": rate or config.lr}
                for parameters, rate in ((others, None), (towers, config.tower_lr))
                for group in parameter_groups(parameters, config.wd)
                if group["params"]
            ],
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
        )

    def run(self, batches: Iterable[dict[str, Tensor]], after: Callable[[Tensor], Any] = lambda loss: None) -> None:
        """Run all steps, one batch each, and call `after` with each loss."""
        for number, pairs in zip(range(self.steps), batches, strict=False):
            after(self.step(number, pairs))

    def step(
        self,
        number: int,
        pairs: dict[str, Any],
        watch: Callable[..., Any] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Run step `number`, counted from 0, on `model`'s inputs {"images": ..., "texts": ...}; return the loss, 0-D.

        pairs: with "places", int64 [B, N] on the CPU, the texts are K instead of B, in the order of their images: those
        of image i are the rows places[i], without -1. With "lengths", int64 [B] on the CPU, the images are packed
        tokens [sum of N, width], or a list of B images of different sizes, and so many patches of each image come out.
        watch: called with the patches, one text of each image, the attention temperature of the batch and the lengths.
        options: further arguments of the loss, which pair_options gives.
        """
        config = self.config
        factor = learning_rate(number, self.steps, config.warmup, config.lr_scheduler, self.cooldown)
        self.lr = config.lr * factor
        for group in self.optimiser.param_groups:
            group["lr"] = group["initial_lr"] * factor
        self.optimiser.zero_grad()

        places, lengths = pairs.get("places"), pairs.get("lengths")
        options = dict(options or {}) | ({} if lengths is None else {"patch_lengths": lengths})

        def loss(patches: Tensor, texts: Tensor, *others: Tensor) -> Tensor:
            if watch is not None:
                first = texts if places is None else texts[places[:, 0].to(texts.device)]
                first = first if first.ndim == 2 else first[:, 0]  # of words, the embedding of the text
                watch(patches, first, self._temperature(*others), lengths)
            self.contrasted = self.loss(patches, texts, *others, **options)
            if not config.coherence_loss:
                return self.contrasted
            coherence = coherence_loss(patches, moved(pairs["images"], patches.device), lengths)
            self.coherence_loss = coherence.detach()
            return self.contrasted + config.coherence_loss * coherence

        kept: dict[str, Any] = {}
        batch: dict[str, Any] = {name: pairs[name] for name in ("images", "texts", "places") if name in pairs}
        if places is not None:  # kept from being split with the batch, because it has other rows
            kept["texts"] = batch.pop("texts")
            if self.group is not None:
                forget(self.group)  # on a GPU; the processes would else agree on the first step's number of texts
        if lengths is not None:  # likewise
            images = batch.pop("images")
            kept["images"] = images.split(lengths.tolist()) if isinstance(images, Tensor) else images
            batch["index"] = torch.arange(len(lengths))
        encode = functools.partial(self._encode, **kept)
        modules = [self.wrapped] if self.group else []
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            value = cached_step(encode, batch, loss, micro_batch=config.batch_size, modules=modules)
        used = kept_pairs(self.contrasted) if config.grad_tolerance and self.contrasted is not None else None
        self.kept_share, self.contrasted = None if used is None else used.share, None
        if config.grad_clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip_norm)
        self.updating = True
        self.optimiser.step()
        with torch.no_grad():
            cast(Tensor, self.model.log_scale).clamp_(0, math.log(config.max_logit_scale))
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.updating = False
        return value

    def _encode(
        self, part: dict[str, Tensor], texts: Tensor | None = None, images: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, ...]:
        """Encode a part of a batch. texts, images: those of the whole batch, if the part has places or an index."""
        if texts is None:
            texts = part["texts"]
        else:
            places = part["places"][part["places"] >= 0]
            texts = texts[places.to(texts.device)]
        given: Any = part.get("images")
        if images is not None:
            given = [images[i] for i in part["index"].tolist()]
            given = torch.cat(given) if given[0].ndim == 2 else given  # tokens are packed
        given = moved(given, self.device)
        if self.config.features is not None:
            given = given.float()
        return self.wrapped(given, moved(texts, self.device))

    def _temperature(self, scale: Tensor, *learned: Tensor) -> Tensor | float:
        # A temperature that is not learned is a number, because the loss chooses its kernel by it.
        return learned[0] if self.config.learn_attn_temperature else self.config.attn_temperature

    def _contrast(self, patches: Tensor, texts: Tensor, scale: Tensor, *learned: Tensor, **options: Any) -> Tensor:
        config = self.config
        if config.align == "cross-attention":
            return cast(CrossAttention, self.model.head).loss(patches, texts, scale)
        return fused_pacl_loss(
            patches,
            texts,
            scale,
            attn_temperature=self._temperature(scale, *learned),
            logit_bias=learned[-1] if config.loss == "sigmoid" else None,
            form=config.form,
            loss=config.loss,
            group=self.group,
            grad_tolerance=config.grad_tolerance,
            backend=cast(BackendName, config.backend),  # the loss checks it
            **options,
        )
