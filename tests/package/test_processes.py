"""Under torchrun the process group's backend follows `--device`, with or without a GPU in the machine."""

import pytest

pytest.importorskip("open_clip")
pytest.importorskip("tyro")
import torch
import torch.distributed as dist
from pacl.cli import main
from running import flags


def commands(world) -> dict[str, list[str]]:
    model = ["--model", f"local-dir:{world / 'clip'}"]
    return {
        "train": ["train", *flags(world, world / "none", dry_run=None)],
        "evaluate": ["evaluate", "retrieval", "--data", "synthetic:eval", "--scenes", "4", *model],
    }


@pytest.mark.parametrize("command", ["train", "evaluate"])
@pytest.mark.parametrize("device, backend", [("cpu", "gloo"), ("cuda", "nccl"), ("auto", "nccl")])
def test_the_backend_follows_the_device(command, device, backend, run_world, capsys, monkeypatch):
    """On a machine with a (pretended) GPU, the requested device selects the backend. The test creates no group."""
    chosen = []

    def stop(backend, timeout):
        assert timeout is None
        raise ValueError(f"backend: {backend}")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(dist, "init_process_group", stop)
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert main([*commands(run_world)[command], "--device", device]) == 1
    assert f"backend: {backend}\n" in capsys.readouterr().err
    assert chosen == ([] if device == "cpu" else [1])
