"""Fixtures for tests that run in every process of a group: `torchrun --nproc-per-node 3 -m pytest .../gloo_loss.py`.

`test_distributed.py` starts them. The files are not named test_*, so that a single process does not collect them.
"""

from __future__ import annotations

import datetime

import pytest
import torch
import torch.distributed as dist


@pytest.fixture(scope="session")
def group():
    """Return the default group, of all processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture(params=["even", "uneven"])
def sizes(request, group) -> list[int]:
    """Return the local batch size of each process."""
    return [3] * group.size() if request.param == "even" else [3, 5, 1, 4][: group.size()]
