"""Tests that run in every process of a group at once: `torchrun --nproc-per-node 3 -m pytest tests/.../gloo_loss.py`.

`test_distributed.py` starts them. Their files are not named test_*: one process alone must not collect them.
"""

from __future__ import annotations

import datetime

import pytest
import torch
import torch.distributed as dist


@pytest.fixture(scope="session")
def group():
    """The default group, of all processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture(params=["even", "uneven"])
def sizes(request, group) -> list[int]:
    """Local batch of each process."""
    return [3] * group.size() if request.param == "even" else [3, 5, 1, 4][: group.size()]
