"""Powers of two that keep the backward of float16 in range, found on the device."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .problem import Problem


def of_weights(p: Problem, form: str, grad_phi: Tensor) -> Tensor:
    """Return the power of two, computed on the device, that brings the bound of |W| to at most 2¹⁴.

    The bound is max|g| (1 + c) max 1/‖p‖ max 1/‖t‖. c bounds a |s - φ| / τ: it is 2 / τ, and in the `dot` form at most
    ln N, since there a |s - φ| / τ = a |ln a + H| with the entropy H. In the cosine form W may reach 1 / r times the
    bound; float16 overflows at 4 times 2¹⁴.
    """
    bend = 2.0 / p.temperature
    if form == "dot":
        most = math.log(p.n)
        bend = bend.clamp(max=most) if isinstance(bend, Tensor) else min(bend, most)
    return power_of_two_below(grad_phi, p.inv_p, p.inv_t, 1.0 + bend)


def power_of_two_below(*factors: Tensor | float) -> Tensor:
    """Return the power of two that brings the product of the factors' largest values to at most 2¹⁴."""
    bound: Any = 1.0  # a tensor, once it has a factor that is one
    for factor in factors:
        bound = bound * (factor.abs().amax() if isinstance(factor, Tensor) else factor)
    exponent = torch.floor(14.0 - torch.log2(bound)).nan_to_num(0.0, 100.0, -100.0).clamp_(-100.0, 100.0)
    return torch.exp2(exponent)
