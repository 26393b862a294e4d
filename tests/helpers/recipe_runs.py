"""Runs of the examples in `examples/recipes`, and the plain loop whose losses they must have."""

from __future__ import annotations

import math
import re
import runpy
import socket
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import ranks
import torch
from dies import fork, status
from torch import Tensor, nn

from pacl_kernels import fused_pacl_loss

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
LOSS = re.compile(r"^(step \d+|validation): loss ([\d.]+)$", re.MULTILINE)


def names_of(script: str) -> dict:
    """Return the functions and classes of an example."""
    return runpy.run_path(str(RECIPES / script), run_name="recipe")


def losses(output: Path, script: str, *words: object, processes: int | None = None) -> list[float]:
    """Run an example in processes forked from this one, which has done the imports; return the losses it prints.

    `processes` are started as torchrun does; by default there is one, started as Python does.
    """
    command = [str(RECIPES / script), *map(str, words)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def no_gpu() -> None:
        torch.cuda.is_available, torch.cuda.device_count = lambda: False, lambda: 0

    def alone() -> int:
        no_gpu()
        sys.argv, sys.path[0] = command, str(RECIPES)
        runpy.run_path(command[0], run_name="__main__")
        return 0

    def be(rank: int) -> int:
        no_gpu()
        ranks.be(rank, processes or 1, port, command)
        return 0

    output.touch()
    jobs = [alone] if processes is None else [lambda rank=rank: be(rank) for rank in range(processes)]
    ended = [status(process) for process in [fork(job, output) for job in jobs]]
    printed = output.read_text()
    assert not any(ended), printed[-6000:]
    return [float(value) for _, value in LOSS.findall(printed)]


def plain_losses(
    model: Callable[..., tuple[Tensor, ...]],
    parameters: Iterable[nn.Parameter],
    batches: Iterable[Iterable[Tensor]],
    log_scale: nn.Parameter,
    max_scale: float,
    optimizer: type[torch.optim.Optimizer] = torch.optim.Adam,
    loss: str = "infonce",
    bf16: bool = False,
    **options: float,
) -> list[float]:
    """Train in a plain loop with the formula in place of the kernels; return the loss before each step."""
    parameters = list(parameters)
    clip = options.pop("clip", math.inf)
    stepper, found = optimizer(parameters, **options), []
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            patches, texts, scale, *bias = model(*batch)
            value = fused_pacl_loss(
                patches, texts, scale, logit_bias=bias[0] if bias else None, attn_temperature=0.05, form="cosine",
                loss=loss, backend="reference",
            )  # fmt: skip
        stepper.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, clip)
        stepper.step()
        with torch.no_grad():
            log_scale.clamp_(max=math.log(max_scale))
        found.append(value.item())
    return found
