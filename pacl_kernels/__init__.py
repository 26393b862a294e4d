"""Exact Patch Aligned Contrastive Learning over all pairs of a batch, at the cost of its matrix products."""

from .autograd import PaclFunction
from .backends import available_backends
from .cached import cached_step
from .lists import mine
from .loss import compatibility, fused_pacl_loss
from .module import PaclLoss
from .plan import Plan, plan
from .tolerance import KeptPairs, kept_pairs
from .upsample import upsample_argmax
from .version import __version__

__all__ = [
    "KeptPairs",
    "PaclFunction",
    "PaclLoss",
    "Plan",
    "__version__",
    "available_backends",
    "cached_step",
    "compatibility",
    "fused_pacl_loss",
    "kept_pairs",
    "mine",
    "plan",
    "upsample_argmax",
]
