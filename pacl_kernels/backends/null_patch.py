"""The null patch: one more patch with s = 0 and value 0, added to φ and the state of a softmax without it.

With ℓ = log Σ exp(s / τ) over the patches, all of their attention shrinks by w = σ(ℓ). The `dot` form becomes φ w, and
a backward that reads φ and the state needs no change: dS = a (g + g (s - φ) / τ) holds with the new attention and φ.
The `max` form becomes at least 0. The cosine form does not change, because the direction of the pooled patch is the
same.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..checks import Scalar
from ..contrastive import logistic_, softplus, total


def add(phi: Tensor, state: Tensor, temperature: Scalar, form: str, unit: float | None) -> None:
    """Add the null patch to φ and the state `[B, K]`, in place.

    `unit`: None if the state of the `dot` form is ℓ; otherwise it is log Σ exp((s - φ) / τ), the entropy of the
    attention, in units of this many nats. The state of the `max` form is the winner's index, which becomes -1.
    """
    if form == "max":
        lower = phi < 0.0
        phi.masked_fill_(lower, 0.0)
        state.masked_fill_(lower, -1.0)
    elif form == "cosine":
        return
    elif unit is None:
        phi.mul_(logistic_(state.clone()))
        state.copy_(softplus(state))
    else:
        entropy = state * unit
        log_sum = entropy + phi / temperature
        lost = phi * logistic_(-log_sum)
        phi.mul_(logistic_(log_sum))
        patches, null = entropy.add_(lost.div_(temperature)), -phi / temperature
        state.copy_(torch.maximum(patches, null).add_(softplus(-(patches - null).abs())).div_(unit))


def add_to_temperature(
    grad_temperature: Tensor, phi: Tensor, state: Tensor, grad_phi: Tensor, temperature: Scalar, unit: float | None
) -> None:
    """Add the part of the null patch, -Σ g a φ² / τ² with its attention a, to the `dot` form's gradient of τ (0-D)."""
    attention = (-state if unit is None else -phi / temperature - state * unit).exp_()
    grad_temperature.sub_(total(attention * phi.square() * grad_phi) / temperature / temperature)


BITS = math.log(2.0)
