"""Runs of the examples in `examples/recipes`, and the plain loop whose losses they must have."""

from __future__ import annotations

import math
import re
import runpy
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from forks import run_ranks, run_script
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
    command = [RECIPES / script, *words]
    if processes is None:
        status, printed = run_script(command, output)
    else:
        status, printed = run_ranks(command, processes, output)
    assert status == 0, printed[-6000:]
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
