"""Lightning, FSDP2 and `cached_step` train as a plain loop does, in one process and in two."""

from __future__ import annotations

import sys

import pytest
import torch
from recipe_runs import losses, names_of, plain_losses
from torch.utils.data import DataLoader, DistributedSampler

BATCH, STEPS, MAX_SCALE = 16, 6, 19.0  # the scale begins at 20, so the clamp acts
FLAGS = ["--batch-size", BATCH, "--steps", STEPS, "--max-scale", MAX_SCALE]


def plain(script: str, bf16: bool = False) -> list[float]:
    example = names_of(script)
    data = example["pairs"](BATCH * STEPS)
    loader = DataLoader(data, BATCH, sampler=DistributedSampler(data, 1, 0, seed=0))
    torch.manual_seed(0)
    towers = example["Towers"]()
    return plain_losses(towers, towers.parameters(), loader, towers.log_scale, MAX_SCALE, lr=1e-2, bf16=bf16)


@pytest.fixture(scope="module", autouse=True)
def _imported():
    """Import what the forked processes need; not at the top, where every run of the tests would pay for it."""
    pytest.importorskip("lightning")
    torch.set_num_threads(1)


@pytest.fixture
def how(request) -> str:
    if request.param == "fsdp" and not hasattr(torch.cpu.Stream(), "record_event"):
        pytest.skip("this torch's fully_shard fails on a CPU")
    return request.param


@pytest.mark.parametrize("processes", [None, 2])
@pytest.mark.parametrize("how", ["ddp", "fsdp", "cached"], indirect=True)
def test_lightning(how, processes, tmp_path):
    words = [*FLAGS, "--how", how, "--devices", processes or 1]
    found = losses(tmp_path / "output", "lightning_module.py", *words, processes=processes)
    expected = plain("lightning_module.py")
    assert found == pytest.approx(expected, rel=1e-5) and len(set(found)) == STEPS


@pytest.mark.parametrize("how", ["ddp", "cached"], indirect=True)
def test_lightning_under_autocast(how, tmp_path):
    bf16, full = plain("lightning_module.py", bf16=True)[0], plain("lightning_module.py")[0]
    assert abs(full / bf16 - 1) > 1e-4
    first, *_ = losses(tmp_path / "output", "lightning_module.py", *FLAGS, "--how", how, "--precision", "bf16-mixed")
    assert first == pytest.approx(bf16, rel=1e-5)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("how", ["fsdp", "ddp"], indirect=True)
def test_cached_step(how, processes, tmp_path):
    words = [*FLAGS, "--how", how, "--micro-batch", 3]
    found = losses(tmp_path / "output", "fsdp_cached.py", *words, processes=processes)
    assert found == pytest.approx(plain("fsdp_cached.py"), rel=1e-5) and len(set(found)) == STEPS


@pytest.mark.parametrize(
    "command, message",
    [
        ("lightning_module.py --devices 2 --batch-size 15", "--batch-size: got 15, expected a multiple of the 2"),
        ("fsdp_cached.py", "got a single process without WORLD_SIZE, expected torchrun to start this file"),
    ],
)
def test_a_wrong_argument_is_one_line(command, message, monkeypatch, capsys):
    script, *words = command.split()
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(sys, "argv", [script, *words])
    with pytest.raises(SystemExit, match="2"):
        names_of(script)["main"]()
    assert f"{script}: error: {message}" in capsys.readouterr().err
