"""Loss over the batch of all processes of a `torch.distributed` group; `function.py` describes the step."""

from . import collectives
from .agreement import GATHER_BYTES, forget, gathered_bytes
from .function import global_loss
from .ring import RING_BYTES
from .scores import global_compatibility

__all__ = [
    "GATHER_BYTES",
    "RING_BYTES",
    "collectives",
    "forget",
    "gathered_bytes",
    "global_compatibility",
    "global_loss",
]
