"""Many processes: starts `tests/distributed` in them, and sees what happens when one process fails."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from ranks import TORCHRUN, forked

if not dist.is_available():
    pytest.skip("torch was built without torch.distributed", allow_module_level=True)

FOLDER = Path(__file__).parent / "distributed"


def in_processes(world: int, *command: str) -> str:
    """Run it in `world` processes; their output. Asserts that none fails. Two are torchrun's, others begin sooner."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    modules = "torch.distributed.fsdp", "torch._dynamo", "pacl_kernels", "pytest"
    launcher = TORCHRUN if world == 2 else forked(*modules)
    command = [*launcher, str(world), *command]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, f"{run.stdout[-6000:]}\n{run.stderr[-3000:]}"
    return run.stdout


# All of them in three processes, of which each has two others; in fewer and in more what their number can change.
@pytest.mark.parametrize(
    "world, chosen",
    [
        (1, "one"),
        (2, "equals and float64 or ten_steps or cached or travel"),
        (3, ""),
        (4, "equals and infonce and float64 and dot or travel"),
    ],
)
def test_in_processes(world, chosen):
    files = [str(path) for path in sorted(FOLDER.glob("gloo_*.py"))]
    output = in_processes(world, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-k", chosen, *files)
    assert output.count(" passed") == world


@pytest.mark.parametrize("exchange", ["gather", "ring"])
@pytest.mark.parametrize("how", ["dies", "sleeps"])
def test_a_process_that_fails_is_an_error_in_the_others(how, exchange, tmp_path):
    """Within the group's timeout, 4 s here, and no hang."""
    processes = [
        subprocess.Popen(
            [sys.executable, str(FOLDER / "one_fails.py"), how, exchange, str(tmp_path / "meeting"), str(rank)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    try:
        outputs = [process.communicate(timeout=600)[0] for process in processes[:2]]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=False):
        assert process.returncode == 3 and "finished" not in output
        assert int(re.search(r"Error after (\d+) s", output)[1]) <= 10


@pytest.mark.skipif(not Path("/proc/net/dev").exists(), reason="needs Linux to count what is sent")
def test_benchmark_counts_what_its_formulas_say(tmp_path):
    """Bytes on the loopback device; patches that were gathered would be many times as many."""
    pytest.importorskip("open_clip")
    path, sent = tmp_path / "result.json", {}
    script = FOLDER.parents[1] / "benchmarks" / "distributed.py"
    options = ["--processes=2", "--batch=64", "--patches=16", "--dim=256", "--repeats=3", f"--json={path}"]
    for _ in range(3):  # what other tests send meanwhile can only add
        subprocess.run([sys.executable, str(script), *options], check=True, capture_output=True, timeout=600)
        result = json.loads(path.read_text())
        formulas = {row["what"]: row["formula"] for row in result["rows"]}
        sent = {row["what"]: min(row["sent"], sent.get(row["what"], row["sent"])) for row in result["rows"]}
        if all(sent[what] <= 1.2 * formula + 10_000 for what, formula in formulas.items()):
            break
    for what, formula in formulas.items():
        assert 0.95 * formula <= sent[what] <= 1.2 * formula + 10_000, what
    assert sent["all patches"] > 10 * sent["gather"]
    assert {row["exchange"] for row in result["model"]} == {"gather", "ring"}
