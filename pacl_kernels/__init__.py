"""Patch Aligned Contrastive Learning, all pairs of a batch, at the cost of its matrix products and almost no memory."""

__version__ = "0.1.0.dev0"  # before the imports: native.py compares it

from .cached import cached_step
from .dispatch import available_backends
from .function import PaclFunction
from .loss import compatibility, fused_pacl_loss
from .module import PaclLoss
from .upsample import upsample_argmax

__all__ = [
    "PaclFunction",
    "PaclLoss",
    "available_backends",
    "cached_step",
    "compatibility",
    "fused_pacl_loss",
    "upsample_argmax",
]
