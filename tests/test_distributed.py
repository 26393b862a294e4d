"""Many processes: starts `tests/distributed` under torchrun, and sees what happens when one process fails."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

if not dist.is_available():
    pytest.skip("torch was built without torch.distributed", allow_module_level=True)

FOLDER = Path(__file__).parent / "distributed"


def torchrun(world: int, *command: str) -> str:
    """Run it in `world` processes; their output. Asserts that none fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    run = subprocess.run([*launcher, *command], env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, f"{run.stdout[-6000:]}\n{run.stderr[-3000:]}"
    return run.stdout


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_in_processes(world):
    files = [str(path) for path in sorted(FOLDER.glob("gloo_*.py"))]
    output = torchrun(world, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *files)
    assert output.count(" passed") == world


@pytest.mark.parametrize("exchange", ["gather", "ring"])
@pytest.mark.parametrize("how", ["dies", "sleeps"])
def test_a_process_that_fails_is_an_error_in_the_others(how, exchange):
    """Within the group's timeout, 4 s here, and no hang."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "3"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(FOLDER / "one_fails.py"), how, exchange],
            env=os.environ | address | {"RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    try:
        outputs = [process.communicate(timeout=60)[0] for process in processes[:2]]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=False):
        assert process.returncode == 3 and "finished" not in output
        assert int(re.search(r"Error after (\d+) s", output)[1]) <= 10
