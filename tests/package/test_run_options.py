"""`pacl train`: its log, its options, its plan, and a full disk."""

from __future__ import annotations

import importlib.util
import math
import re
import shutil

import pytest

pytest.importorskip("open_clip")
pytest.importorskip("tyro")
import torch
from pacl.training.checkpoints import checkpoints, load_checkpoint
from pacl.training.config import TrainConfig
from pacl.training.log import pair_statistics
from pacl.training.optimiser import learning_rate
from pacl.training.plan import plan, sent_bytes
from pacl.training.run import Run
from running import lines, train
from safetensors.torch import load_file


def last_checkpoint(logs) -> dict:
    return load_checkpoint(checkpoints(logs / "pacl/checkpoints")[-1])


def assert_same_weights(a: dict, b: dict, **tolerance):
    assert a.keys() == b.keys()
    for name, x in a.items():
        torch.testing.assert_close(b[name], x, **(tolerance or {"rtol": 0, "atol": 0}), msg=name)


# The log


@pytest.mark.parametrize("form", ["cosine", "max"])
def test_pair_statistics(form):
    torch.manual_seed(0)
    patches, texts = torch.randn(5, 7, 16) * 3, torch.randn(5, 16) * 2
    found = pair_statistics(patches, texts, 0.1, form)
    s = torch.cosine_similarity(patches, texts[:, None], dim=-1)
    assert found["similarity"] == pytest.approx(s.mean().item(), rel=1e-5)
    assert found["similarity_p99"] == s.flatten().sort().values[-1]  # the largest of 35
    entropy = torch.distributions.Categorical(logits=s / 0.1).entropy().mean().item() / math.log(7)
    assert found.get("attention_entropy") == (pytest.approx(entropy, rel=1e-5) if form == "cosine" else None)


def test_what_is_logged(run_world, tmp_path, capsys):
    assert train(run_world, tmp_path, attn_temperature=1e4, report_to="auto") == 0
    row = lines(tmp_path / "pacl/metrics.jsonl")[-1]
    assert row["train/attention_entropy"] == pytest.approx(1, abs=1e-6), "with such a temperature it is uniform"
    assert -1 < row["train/similarity"] < row["train/similarity_p99"] < 1
    assert 50 < row["train/peak_memory_mib"] < 64e3 and 0 < row["train/data_share"] < 1
    assert row["train/data_share"] * row["train/batch_time"] == pytest.approx(row["train/data_time"])
    assert row["train/samples_per_second_per_gpu"] == row["train/samples_per_second"]
    assert (tmp_path / "pacl/out.log").read_text() == capsys.readouterr().out
    if importlib.util.find_spec("tensorboard"):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(tmp_path / "pacl/tensorboard")).Reload()
        assert [event.step for event in events.Scalars("train/attention_entropy")] == [2, 4, 6]


def test_an_error_is_in_the_log_too(run_world, tmp_path, capsys):
    assert train(run_world, tmp_path, lr=1e37, grad_clip_norm="None") == 1
    assert (tmp_path / "pacl/out.log").read_text().endswith(capsys.readouterr().err)


def test_reporters(run_world, tmp_path, capsys):
    missing = next((name for name in ("trackio", "wandb") if importlib.util.find_spec(name) is None), None)
    if missing is not None:
        assert train(run_world, tmp_path, report_to=f"tensorboard,{missing}") == 1
        expected = f"report_to: got {missing!r}, which is not installed (pip install {missing})"
        assert capsys.readouterr().err == f"pacl: error: {expected}\n"
    assert train(run_world, tmp_path, report_to="wandv") == 1
    assert "report_to: got 'wandv', expected auto, none, or some of tensorboard" in capsys.readouterr().err


# Options


def test_running_average(run_world, tmp_path):
    """The average follows its recurrence over the saved weights, becomes the embedder, and resumes bit-identically."""
    changes = {"ema_decay": 0.8, "save_frequency": 1, "keep_checkpoints": 10, "lr": 0.01, "max_steps": 5}
    assert train(run_world, tmp_path, **changes) == 0
    paths = checkpoints(tmp_path / "pacl/checkpoints")
    weights = [load_checkpoint(path)["state_dict"] for path in paths]
    whole = last_checkpoint(tmp_path)
    average = weights[0]
    for later in weights[1:]:
        average = {name: 0.8 * x + 0.2 * later[name] for name, x in average.items()}
    kept = {name.removeprefix("module."): x for name, x in whole["ema"].items() if name != "n_averaged"}
    assert_same_weights(average, kept, rtol=1e-5, atol=1e-6)
    written = load_file(tmp_path / "pacl/embedder/model.safetensors")
    assert_same_weights(written, {name: kept[f"embedder.{name}"] for name in written})
    assert not torch.equal(kept["embedder.skip.weight"], weights[-1]["embedder.skip.weight"])

    for path in paths[2:]:
        path.unlink()
    assert train(run_world, tmp_path, resume="latest", **changes) == 0
    for part in ("ema", "state_dict"):
        assert_same_weights(last_checkpoint(tmp_path)[part], whole[part])


def test_an_average_does_not_begin_in_mid_run(run_world, tmp_path, capsys):
    assert train(run_world, tmp_path, max_steps=1) == 0
    assert train(run_world, tmp_path, resume="latest", max_steps=2, ema_decay=0.9) == 1
    assert "is of a run without --ema-decay" in capsys.readouterr().err


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a compiler")
def test_compiled_losses_are_the_same(run_world, tmp_path):
    changes = {"log_every_n_steps": 1, "max_steps": 4, "lr": 0.01}
    assert train(run_world, tmp_path / "eager", **changes) == 0
    assert train(run_world, tmp_path / "compiled", torchcompile=None, **changes) == 0
    eager, compiled = (
        [row["train/loss"] for row in lines(tmp_path / name / "pacl/metrics.jsonl")] for name in ("eager", "compiled")
    )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    assert compiled == pytest.approx(eager, rel=1e-4) and eager[-1] != eager[0]
    assert (
        last_checkpoint(tmp_path / "eager")["state_dict"].keys()
        == last_checkpoint(tmp_path / "compiled")["state_dict"].keys()
    )


def test_schedules():
    rates = [learning_rate(step, 10, 2, "const-cooldown", 4) for step in range(10)]
    assert rates == [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert [learning_rate(step, 4, 0, "const") for step in range(4)] == [1] * 4
    assert learning_rate(5, 10, 0, "cosine") == pytest.approx(0.5)


# Plan and disk


def test_plan(run_world, tmp_path, capsys):
    """The plan has the numbers by hand of a step: 64 patches of width 128, 12 images of 64 x 64, 2 x 12 pairs."""
    assert train(run_world, tmp_path, dry_run=None, accum_freq=2, ema_decay=0.9) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("memory: "))
    trained = 3 * (128 * 128 + 128) + 1
    mib = {
        "optimiser": 4 * trained * 4,
        "images": 24 * 3 * 64 * 64 * 4,
        "tokens": (24 + 12 * 5) * 64 * 128 * 4,
        "embeddings": 3 * 24 * 64 * 128 * 4,
        "loss": 24 * 128 * 12 + 4 * 24 * 24 * 4,
    }
    for name, size in mib.items():
        assert f"{name} {size / 2**20:.1f} MiB" in line, line
    assert "network" not in line and list(tmp_path.iterdir()) == []


def test_the_plan_says_what_the_loss_takes(run_world, tmp_path, capsys):
    """Three arrays of all pairs, and a workspace; only a dry run takes the time to measure the machine."""
    assert train(run_world, tmp_path, dry_run=None, batch_size=40, form="dot", backend="torch") == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("loss: about ")]
    mib = 64 + 3 * 4 * 40 * 40 / 2**20
    assert re.search(rf"^loss: about \S+ m?s of a step \(torch\) and {mib:.1f} MiB beside", line), line
    assert train(run_world, tmp_path, max_steps=1) == 0
    assert "loss: about" not in capsys.readouterr().out


def test_bytes_over_the_network(run_world, tmp_path):
    """The plan has the bytes that benchmarks/distributed.py measures (without headers and sums), plus those of DDP."""
    config = TrainConfig(
        train_data=str(run_world / "scenes/train-000.tar"), model=f"local-dir:{run_world / 'clip'}", batch_size=12
    )
    run = Run(config)
    run.world = 4
    texts = 12 * 128 * 4  # float32, like their gradients, which Gloo sends twice
    assert sent_bytes(run) == 2 * (3 * (128 * 128 + 128) + 1) * 4 * 3 // 4 + 3 * (texts + 2 * texts)
    assert "network: " in plan(run)


def test_a_full_disk_leaves_the_last_checkpoint(run_world, tmp_path, capsys):
    """If files above 300 kB fail, as on a full disk, the last checkpoint stays whole and the run can resume from it."""
    resource = pytest.importorskip("resource")
    changes = {"save_frequency": 2, "max_steps": 6}
    assert train(run_world, tmp_path / "whole", **changes) == 0
    assert train(run_world, tmp_path / "cut", **changes) == 0
    folder = tmp_path / "cut/pacl/checkpoints"
    first = checkpoints(folder)[0]
    checkpoints(folder)[-1].unlink()

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        assert train(run_world, tmp_path / "cut", resume="latest", **changes) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("pacl: error: checkpoint: ") and "step_00000006.pt could not be written (" in error
    assert error.endswith(f"the last one is {first}")
    assert [path.name for path in folder.iterdir()] == [first.name], "half a file was left"
    assert train(run_world, tmp_path / "cut", resume="latest", **changes) == 0
    assert_same_weights(
        last_checkpoint(tmp_path / "cut")["state_dict"], last_checkpoint(tmp_path / "whole")["state_dict"]
    )
