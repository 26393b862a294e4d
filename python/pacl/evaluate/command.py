"""`pacl evaluate`: which task runs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from ..commands import run_command

# The module of each task, as in pacl.cli.
TASKS = {
    "segmentation": ("pacl.evaluate.segmentation", "mIoU of labels of pixels, and what is wrong with a data set"),
    "retrieval": ("pacl.evaluate.retrieval", "recall of captions by images and of images by captions"),
    "classification": ("pacl.evaluate.classification", "accuracy of classes of whole images"),
    "alignment": ("pacl.evaluate.alignment", "accuracy of single patches by the most similar word"),
    "coherence": ("pacl.evaluate.coherence", "whether patches of one class are similar, without any text"),
    "table": ("pacl.evaluate.results", "results side by side"),
}


def main(argv: Sequence[str], prog: str = "pacl evaluate") -> int:
    """Run `pacl evaluate` with these arguments; returns its exit status."""
    run = partial(
        run_command, TASKS, argv, prog, "Measures of a model on data sets, each with a JSON file of its result."
    )
    if not argv or argv[0] not in TASKS:
        return run()
    import torch.distributed as dist  # torch takes seconds, which a list of tasks has not

    mine = not dist.is_initialized()  # a caller's group stays
    try:
        return run()
    finally:
        if mine and dist.is_initialized():
            dist.destroy_process_group()
