"""`pacl train`: its files, resuming after an interruption, and its errors for bad input."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import pickle
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

pytest.importorskip("open_clip")
pytest.importorskip("tyro")
import running
import torch
from dies import fork_pacl
from forks import status, wait_for
from pacl.cli import main
from pacl.data.pairs import ScenePairs
from pacl.sharing import load_pacl
from pacl.training.checkpoints import checkpoints, save_checkpoint, step_of
from running import assert_same_state, final
from safetensors.torch import load_file

from pacl_kernels.backends import cpu


@pytest.fixture
def world(run_world) -> Path:
    return run_world


SHORT = {"max_steps": 8, "save_frequency": 3}


def flags(world: Path, logs: Path, **changes) -> list[str]:
    return running.flags(world, logs, **SHORT | changes)


def loose_scenes(folder: Path, count: int, bad: int) -> Path:
    """Write images and caption files; the first `bad` images cannot be decoded."""
    folder.mkdir()
    for number, raw in enumerate(ScenePairs(scenes=count).undecoded(0, 0, 1)):
        (folder / f"{number:04d}.jpg").write_bytes(raw.image if number >= bad else raw.image[:300])
        (folder / f"{number:04d}.txt").write_bytes(raw.captions)
    return folder


def kill_tree(pid: int) -> None:
    """Send kill -9 to a process and to all its descendants."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    os.kill(pid, signal.SIGKILL)
    for child in children:
        kill_tree(int(child))


def test_what_a_run_leaves(world, tmp_path, capsys):
    changes = {"accum_freq": 2, "max_steps": 20, "learn-attn-temperature": None, "lr": 0.01}
    assert main(["train", *flags(world, tmp_path, **changes)]) == 0
    printed = capsys.readouterr().out
    assert "steps: 20 of 24 pairs (1 process(es) x 2 x 12), 5 an epoch" in printed
    assert "Train Epoch: 0 [48/120 (40%)] Data (t): " in printed and "Contrastive_loss: " in printed
    epochs = [line.split("] ")[0] for line in printed.splitlines() if line.startswith("Train Epoch")]
    assert epochs[-1] == "Train Epoch: 3 [120/120 (100%)" and "left for the next epoch" not in printed
    rows = [json.loads(line) for line in (tmp_path / "pacl/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(2, 21, 2))
    assert rows[-1]["train/loss"] < rows[0]["train/loss"] - 0.2, "nothing was learned"
    assert rows[-1]["train/skipped"] == 0 and rows[-1]["train/lr"] < 1e-3 < rows[0]["train/lr"]
    assert [path.name for path in checkpoints(tmp_path / "pacl/checkpoints")] == [
        "step_00000018.pt",
        "step_00000020.pt",
    ]
    towers, embedder = load_pacl(tmp_path / "pacl/embedder")
    assert embedder(torch.zeros(1, 3, 128)).shape == (1, 3, 128) and towers.widths == (128, 128)
    config = json.loads((tmp_path / "pacl/embedder/config.json").read_text())
    assert config["towers"]["model"] == f"local-dir:{os.path.relpath(world / 'clip', tmp_path / 'pacl/embedder')}"
    notes = config["training"]
    assert config["form"] == "cosine" and notes["global_batch"] == 24 and notes["pairs_seen"] == 480
    card = (tmp_path / "pacl/embedder/README.md").read_text()
    assert notes["command"] in card and "--accum-freq 2" in card and "--learn-attn-temperature" in card
    assert config["attn_temperature"] != 0.05, "it was not learned"

    settings = tmp_path / "pacl/config.yaml"
    settings.write_text(settings.read_text().replace("lr: 0.01\n", "lr: 1e-2\n"))  # which YAML reads as a string
    assert main(["train", f"--config={settings}", "--name", "again"]) == 0
    first, second = (load_file(tmp_path / name / "embedder/model.safetensors") for name in ("pacl", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def whole_run(world: Path, logs: Path, processes: int, **changes) -> str:
    """Return the run's output. With one process it runs in the test's own, which has done the imports."""
    if processes > 1:
        ended, printed = running.train_in(processes, world, logs, **SHORT | changes)
        assert ended == 0, printed[-4000:]
        return printed
    torch.set_num_threads(1)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(["train", *flags(world, logs, **changes)]) == 0
    return printed.getvalue()


@pytest.mark.sampled(2)
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux to find a process's children")
@pytest.mark.parametrize("processes, workers, form", [(1, 2, "folder"), (2, 1, "shards")])
def test_killed_and_resumed(processes, workers, form, world, tmp_path):
    """After kill -9 in mid-epoch, the resumed run is bit-identical to an uninterrupted one."""
    steps = 12 if processes == 1 else 8
    changes = {"workers": workers, "save_frequency": 1, "max_steps": steps, "batch_size": 12 // processes}
    if form == "folder":  # with bad images, which must not shift later samples
        changes["train_data"] = loose_scenes(tmp_path / "loose", 120, bad=10)
    whole_run(world, tmp_path / "whole", processes, **changes)
    process = running.start(world, tmp_path / "cut", processes, **changes)
    folder = tmp_path / "cut/pacl/checkpoints"
    while not (folder.exists() and len(checkpoints(folder)) >= 2):
        assert process.poll() is None, process.stdout.read()[-4000:]
        time.sleep(0.02)
    kill_tree(process.pid)
    process.communicate()
    reached = step_of(checkpoints(folder)[-1])
    assert 2 <= reached < steps, "too late to see anything"
    output = whole_run(world, tmp_path / "cut", processes, **changes, resume="latest")
    assert f"step {reached}\n" in output
    assert_same_state(final(tmp_path / "cut"), final(tmp_path / "whole"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits(number, world, tmp_path):
    """After a signal the run saves and exits.

    The test sends it to the whole group, data readers included, as torchrun, schedulers and terminals do.
    """
    changes = {"max_steps": 500, "save_frequency": 1000, "workers": 2}
    run = fork_pacl(["train", *flags(world, tmp_path, **changes)], tmp_path / "output")
    wait_for("\nTrain Epoch", tmp_path / "output")
    os.killpg(run, number)
    ended, output = status(run), (tmp_path / "output").read_text()
    assert ended == 128 + number and "Traceback" not in output, output[-4000:]
    step = final(tmp_path)["step"]
    assert f"stopped at step {step} of 500; continue with --resume latest" in output and 2 <= step < 500
    assert main(["train", *flags(world, tmp_path, max_steps=step + 1, workers=2, resume="latest")]) == 0
    assert final(tmp_path)["step"] == step + 1


def test_accumulation_is_one_big_batch(world, tmp_path):
    for name, batch, accum in (("one", 25, 1), ("many", 5, 5)):
        changes = {"batch_size": batch, "accum_freq": accum, "max_steps": 4}
        assert main(["train", *flags(world, tmp_path / name, **changes)]) == 0
    # Adam turns the rounding of small gradients into steps; test_cached.py holds cached_step itself to 1e-10.
    one, many = (final(tmp_path / name)["state_dict"] for name in ("one", "many"))
    for name, x in one.items():
        torch.testing.assert_close(many[name], x, rtol=1e-3, atol=1e-5)


def test_siglip_loss_and_float_bias(world, tmp_path):
    assert main(["train", *flags(world, tmp_path, loss="sigmoid", lr=0.01)]) == 0
    assert final(tmp_path)["state_dict"]["bias"] != -10


def test_bad_samples_are_skipped_and_counted(world, tmp_path, write_tar):
    members = {f"bad{i}.{suffix}": data for i in range(5) for suffix, data in (("jpg", b"no jpeg"), ("txt", b"a word"))}
    data = f"{world}/scenes/train-000.tar::{write_tar('bad.tar', members)}"
    assert main(["train", *flags(world, tmp_path, train_data=data, train_num_samples=40)]) == 0
    last = json.loads((tmp_path / "pacl/metrics.jsonl").read_text().splitlines()[-1])
    assert last["train/skipped"] >= 5 and math.isfinite(last["train/loss"])


def test_too_many_bad_samples_stop_the_run(world, tmp_path, capsys):
    changes = {"train_data": loose_scenes(tmp_path / "loose", 100, bad=15), "max_steps": 50, "workers": 2}
    assert main(["train", *flags(world, tmp_path, **changes)]) == 1
    (error,) = capsys.readouterr().err.strip().splitlines()[-1:]
    line = r"pacl: error: train_data: \d+ of 5\d\d samples of .*loose are bad \(image \d+\); max_bad_share is 0.1; .*"
    assert re.fullmatch(line, error)
    assert main(["train", *flags(world, tmp_path, **changes, resume="latest", max_bad_share=0.2)]) == 0


def test_too_many_bad_samples_stop_all_processes(world, tmp_path):
    data = loose_scenes(tmp_path / "loose", 100, bad=15)
    changes = {"train_data": data, "batch_size": 40, "max_steps": 100, "workers": 1, "save_frequency": 3}
    ended, output = running.train_in(2, world, tmp_path, **changes)
    assert ended != 0
    assert len(re.findall("^pacl: error: train_data: .* of 5.. samples of .* are bad", output, re.M)) == 1
    assert "[rank" not in output, "a process was left to find out by itself"
    assert final(tmp_path)["step"] >= 5  # because workers read ahead


def test_loose_pairs_scenes_and_resampled_shards_train(world, tmp_path, capsys):
    folder = loose_scenes(tmp_path / "loose", 24, bad=0)
    rows = "".join(f"{path.name}\t{path.with_suffix('.txt').read_text()}\n" for path in sorted(folder.glob("*.jpg")))
    (folder / "pairs.tsv").write_text("filepath\ttitle\n" + rows)
    masks = {"val_segmentation": world / "scenes/eval-000.tar", "val_classes": world / "classes.txt"}
    for name, changes, expected in (
        ("csv", {"train_data": folder / "pairs.tsv", "dataset_type": "csv"} | masks, f"24 pairs in {folder}/pairs.tsv"),
        ("scenes", {"train_data": "synthetic", "train_num_samples": 36}, "36 pairs in generated scenes"),
        ("drawn", {"dataset_resampled": None}, "120 pairs in 3 shard(s)"),
    ):
        assert main(["train", *flags(world, tmp_path, **{"max_steps": 3, "name": name} | changes)]) == 0
        assert f"data: {expected}\n" in capsys.readouterr().out
        again = ["train", "--config", str(tmp_path / name / "config.yaml"), "--name", f"{name}2"]
        assert main(again) == 0
        first, second = (load_file(tmp_path / x / "embedder/model.safetensors") for x in (name, f"{name}2"))
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_loss_that_is_not_finite_stops_the_run(world, tmp_path, capsys):
    assert main(["train", *flags(world, tmp_path, lr=1e37, grad_clip_norm="None", save_frequency=1)]) == 1
    assert "the loss of step 2 is nan" in capsys.readouterr().err
    report = json.loads((tmp_path / "pacl/not_finite_rank0.json").read_text())
    assert report["step"] == 2 and len(report["keys"]) == 12 and report["keys"][0].startswith("train-")
    assert final(tmp_path)["step"] == 1


class Malicious:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"train_data": "missing.tar"}, "'missing.tar' is not a file"),
        ({"train_data": "pipe:touch executed"}, "expected a local path or an address of s3:"),
        ({"model": "ViT-B-61"}, "model: got 'ViT-B-61', expected a model of open_clip, such as ViT-B-16"),
        ({"batch_size": 1000}, "batch_size: got 1000 pairs in a step of all processes, expected at most the 120"),
        ({"train_data": "missing.csv"}, "'missing.csv' is not a file"),
        ({"dataset_type": "folder"}, "is not a folder, expected one of images"),
        ({"max_bad_share": -1}, "max_bad_share: got -1.0, expected at least 0"),
        ({"lr": -1}, "lr: got -1.0, expected a number above 0"),
        ({"logit_scale": 0.5}, "logit_scale: got 0.5, expected 1 to 100.0 (--max-logit-scale)"),
        ({"lr": "nan"}, "lr: got nan, expected a finite number"),
        ({"resume": "malicious.pt"}, "malicious.pt holds other objects than tensors and plain Python, expected"),
        ({"resume": "text.pt"}, "text.pt is a text, expected a checkpoint of pacl train"),
        ({"resume": "missing.pt"}, "missing.pt"),
        ({"resume": "tensor.pt"}, "tensor.pt holds a Tensor, expected a checkpoint of pacl train"),
        ({"resume": "other.pt"}, "other.pt is of a run with global_batch 7, expected 12"),
        ({"config": "text.pt"}, "text.pt is damaged: it holds 'no checkpoint', expected a mapping"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_input_is_one_line(changes, message, world, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("malicious.pt").write_bytes(pickle.dumps(Malicious()))
    Path("text.pt").write_text("no checkpoint")
    torch.save({"global_batch": 7}, "other.pt")
    torch.save(torch.ones(3), "tensor.pt")
    torch.save({"state": Malicious()}, "malicious.pt")
    assert main(["train", *flags(world, tmp_path / "logs", **changes)]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("pacl: error: ") and message in error
    assert not Path("executed").exists(), "something was executed"


def test_an_earlier_run_is_not_overwritten(world, tmp_path, capsys):
    assert main(["train", *flags(world, tmp_path, max_steps=1)]) == 0
    before = final(tmp_path)
    assert main(["train", *flags(world, tmp_path, max_steps=2)]) == 1
    assert "has checkpoints of an earlier run; expected --resume latest or another --name" in capsys.readouterr().err
    assert_same_state(final(tmp_path), before)


def test_what_a_resumed_run_takes_from_its_flags(world, tmp_path, capsys):
    assert main(["train", *flags(world, tmp_path, max_steps=2, save_frequency=1)]) == 0
    earlier, _ = checkpoints(tmp_path / "pacl/checkpoints")
    changes = {"max_steps": 3, "lr": 0.02, "wd": 0.1, "beta2": 0.9, "resume": "latest"}
    assert main(["train", *flags(world, tmp_path, **changes)]) == 0
    groups = final(tmp_path)["optimizer"]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.1, 0.0}
    assert all(group["initial_lr"] == 0.02 and group["betas"] == (0.9, 0.9) for group in groups)

    first = torch.load(checkpoints(tmp_path / "pacl/checkpoints")[0], weights_only=True)
    torch.save(first | {"step": 1}, earlier)
    for changes, message in (
        ({"resume": earlier}, "step_00000003.pt; delete the later checkpoints"),
        ({"resume": "latest", "loss": "sigmoid"}, "is of another run: --loss was infonce, now sigmoid"),
    ):
        assert main(["train", *flags(world, tmp_path, max_steps=4, **changes)]) == 1
        assert message in capsys.readouterr().err
    assert final(tmp_path)["step"] == 3


def test_a_finished_run_is_not_trained_again(world, tmp_path):
    for resume in ({}, {"resume": "latest"}, {"resume": "latest", "max_steps": 1}):
        assert main(["train", *flags(world, tmp_path, **({"max_steps": 2} | resume))]) == 0
    assert final(tmp_path)["step"] == 2 and len((tmp_path / "pacl/metrics.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("left", ["none", "older", "half"])
def test_killed_before_the_embedder_was_written(left, world, tmp_path):
    """If a run was killed after its last checkpoint but before its embedder, resuming writes the embedder."""
    assert main(["train", *flags(world, tmp_path, max_steps=1, save_frequency=1)]) == 0
    folder = tmp_path / "pacl/embedder"
    older = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert main(["train", *flags(world, tmp_path, max_steps=2, resume="latest")]) == 0
    expected = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert expected["model.safetensors"] != older["model.safetensors"]
    if left == "none":
        shutil.rmtree(folder)
    else:  # config.json is written last
        for name in older if left == "older" else ["config.json"]:
            (folder / name).write_bytes(older[name])
    assert main(["train", *flags(world, tmp_path, max_steps=2, resume="latest")]) == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == expected

    (folder / "README.md").write_text("my own words")
    assert main(["train", *flags(world, tmp_path, max_steps=2, resume="latest")]) == 0
    assert (folder / "README.md").read_text() == "my own words", "what is of this step was written again"


def test_half_checkpoints_of_a_killed_run_go(world, tmp_path):
    """The next start or save removes the files that kill -9 during a save leaves, and no others."""
    assert main(["train", *flags(world, tmp_path, max_steps=1)]) == 0
    folder = tmp_path / "pacl/checkpoints"
    kept = {"step_00000001.pt", ".step_1.pt.original", ".step_1.pt.abcdefgh.part.mine", "step_1.pt.abcdefgh.part"}

    def leave(*names):
        for name in names:
            (folder / name).write_bytes((folder / "step_00000001.pt").read_bytes())

    leave(*kept, ".step_00000001.pt.ab_d3fgh.part", ".step_00000123.pt.zzzzzzzz.part")
    assert main(["train", *flags(world, tmp_path, max_steps=1, resume="latest", dry_run=None)]) == 0
    assert len(list(folder.iterdir())) == 6, "a dry run changed something"
    assert main(["train", *flags(world, tmp_path, max_steps=1, resume="latest")]) == 0
    assert {path.name for path in folder.iterdir()} == kept

    leave(".step_00000001.pt.ab_d3fgh.part")
    save_checkpoint(folder, {"step": 2}, keep=2)
    assert {path.name for path in folder.iterdir()} == kept | {"step_00000002.pt"}


def test_dry_run_writes_nothing(world, tmp_path, capsys):
    assert main(["train", *flags(world, tmp_path, dry_run=None)]) == 0
    assert "120 pairs in 3 shard(s)" in capsys.readouterr().out
    assert main(["train", *flags(world, tmp_path, dry_run=None, batch_size=25)]) == 0
    line = "epoch: the steps of an epoch take 100 of 120 pairs; the other 20 are left for the next epoch\n"
    assert line in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_grad_tolerance_is_in_the_log(world, tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "_lists_are_worth", lambda *_: True)
    assert running.train(world, tmp_path, grad_tolerance=0.2, max_steps=2) == 0
    shares = [row["train/kept_share"] for row in running.lines(tmp_path / "pacl/metrics.jsonl")]
    assert shares and all(0 < share < 1 for share in shares)
    assert running.train(world, tmp_path / "bad", grad_tolerance=1) == 1
