"""`pacl evaluate`: run the task that the command line names."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from ..commands import run_command

# For each task, its module and a line of help, as in pacl.cli.
TASKS = {
    "segmentation": ("pacl.evaluate.segmentation", "Measure mIoU over pixels, or check a dataset."),
    "retrieval": ("pacl.evaluate.retrieval", "Measure recall of captions by images and of images by captions."),
    "classification": ("pacl.evaluate.classification", "Measure the accuracy of classes of whole images."),
    "alignment": ("pacl.evaluate.alignment", "Measure how often the most similar word names a patch's class."),
    "coherence": ("pacl.evaluate.coherence", "Measure whether patches of one class are similar, without any text."),
    "table": ("pacl.evaluate.results", "Print results side by side."),
}


def main(argv: Sequence[str], prog: str = "pacl evaluate") -> int:
    """Run `pacl evaluate` and return its exit status."""
    run = partial(run_command, TASKS, argv, prog, "Measure a model on datasets; each task writes its result as JSON.")
    if not argv or argv[0] not in TASKS:
        return run()
    import torch.distributed as dist  # torch takes seconds, which a list of tasks should not

    mine = not dist.is_initialized()  # leave a caller's group as it is
    try:
        return run()
    finally:
        if mine and dist.is_initialized():
            dist.destroy_process_group()
