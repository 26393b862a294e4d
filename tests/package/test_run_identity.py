"""A run resumes with its own towers, data and flags only; what may change is recorded. Processes must agree."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import yaml

pytest.importorskip("open_clip")
pytest.importorskip("tyro")
import torch
from pacl.cli import main
from pacl.data.sources import open_pairs
from pacl.demo.toy_clip import new_clip, save_clip
from pacl.evaluate.classification import ClassificationOptions
from pacl.evaluate.retrieval import RetrievalOptions
from pacl.training.checkpoints import checkpoints
from pacl.training.config import TrainConfig
from pacl.training.features import FeaturesConfig
from pacl.training.identity import describe_data
from running import final, flags, train, train_in


@pytest.fixture(scope="module")
def begun(run_world, tmp_path_factory) -> Path:
    """Train two steps; return the folder of the logs. It also has another CLIP of the same sizes, and other shards."""
    torch.set_num_threads(1)
    logs = tmp_path_factory.mktemp("begun")
    torch.manual_seed(1)
    save_clip(new_clip(), logs / "other_clip")
    shutil.copytree(run_world / "clip", logs / "moved/clip")
    shutil.copytree(run_world / "scenes", logs / "moved/scenes")
    assert train(run_world, logs, max_steps=2) == 0
    return logs


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"model": "local-dir:{logs}/other_clip"},
            r"--model was local-dir:.*/clip, now local-dir:.*/other_clip, but the vision tower's output is off by "
            r"[\d.]+% \(other weights\?\); .*but the text tower's output is off by",
        ),
        ({"force_image_size": 32}, "--force-image-size was None, now 32"),
        (
            {"vision_model": "test_vit", "no-vision-pretrained": None, "random_towers": None},
            "--vision-model was None, now test_vit; --vision-pretrained was True, now False$",
        ),
        ({"tokens": "value"}, "--tokens was plain, now value; --model is .*, but the tokens are value, not plain$"),
        ({"seed": 7}, "--seed was 0, now 7$"),
        ({"form": "dot", "attn_temperature": 1}, "--form was cosine, now dot; --attn-temperature was 0.05, now 1.0$"),
        ({"learn_attn_temperature": None}, "--learn-attn-temperature was False, now True$"),
        ({"no-learn-logit-scale": None}, "--learn-logit-scale was True, now False$"),
        ({"loss": "sigmoid"}, "--loss was infonce, now sigmoid$"),
        ({"lock_image_unlocked_groups": 1}, "--lock-image-unlocked-groups was 0, now 1$"),
        ({"nouns": "words"}, "--nouns was None, now words$"),
        ({"precision": "amp_bf16"}, "--precision was fp32, now amp_bf16$"),
        ({"workers": 2}, "--workers was 1, now 2; give --workers 1$"),
        ({"shuffle": 10}, "--shuffle was 2000, now 10$"),
        (
            {"train_data": "{world}/scenes/train-000.tar"},
            r"--train-data was Shards \(3 shards, [\d,]+ bytes, digest \w+\), now Shards \(1 shards, ",
        ),
        ({"train_data": "synthetic"}, r"--train-data was Shards .*, now ScenePairs \(10,000 pairs, digest \w+\)$"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_another_run_is_refused(changes, message, begun, run_world, tmp_path, capsys):
    shutil.copytree(begun / "pacl", tmp_path / "pacl")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    changes = {k: x.format(logs=begun, world=run_world) if isinstance(x, str) else x for k, x in changes.items()}
    assert train(run_world, tmp_path, max_steps=4, resume="latest", **changes) == 1
    (error,) = capsys.readouterr().err.strip().splitlines()[-1:]
    path = checkpoints(tmp_path / "pacl/checkpoints")[-1]
    assert re.match(f"pacl: error: resume: {path} is of another run: .*{message}", error), error
    log = before.pop(tmp_path / "pacl/out.log") + f"{error}\n".encode()
    assert before | {tmp_path / "pacl/out.log": log} == {
        path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()
    }


def test_what_changed_is_recorded(begun, run_world, tmp_path, capsys):
    """Towers and data that moved are the same; rates, lengths and their like may change."""
    shutil.copytree(begun / "pacl", tmp_path / "pacl")
    moved = {
        "train_data": begun / "moved/scenes/train-{000..002}.tar",
        "model": f"local-dir:{begun / 'moved/clip'}",
    }
    assert train(run_world, tmp_path, max_steps=4, resume="latest", lr=0.001, **moved) == 0
    assert "resume: --train-data was " in capsys.readouterr().out
    for _ in range(2):  # resuming without a change leaves no entry
        assert train(run_world, tmp_path, max_steps=5, resume="latest", lr=0.001, **moved) == 0
    config = yaml.safe_load((tmp_path / "pacl/config.yaml").read_text())
    first, second = config["resumed"]
    assert first["step"] == 2 and set(first["changed"]) == {"train_data", "model", "lr", "max_steps"}
    assert first["changed"]["lr"] == {"from": 0.0005, "to": 0.001}
    assert second == {"step": 4, "changed": {"max_steps": {"from": 4, "to": 5}}}
    assert final(tmp_path)["resumed"] == config["resumed"]
    assert json.loads((tmp_path / "pacl/embedder/config.json").read_text())["training"]["resumed"] == config["resumed"]
    assert '"max_steps": {"from": 4, "to": 5}' in (tmp_path / "pacl/embedder/README.md").read_text()
    assert main(["train", "--config", str(tmp_path / "pacl/config.yaml"), "--name", "again", "--dry-run"]) == 0


def test_another_machine_has_other_workers(run_world, tmp_path, capsys, monkeypatch):
    """The default of --workers follows the cores; the run keeps its number, and resuming elsewhere says which one."""

    def resume(cores: int, *words: str, steps: int = 2) -> int:
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)), raising=False)
        given = flags(run_world, tmp_path, max_steps=steps, resume="latest")
        at = given.index("--workers")
        return main(["train", *given[:at], *given[at + 2 :], *words])

    assert resume(2, steps=1) == 0
    config = tmp_path / "pacl/config.yaml"
    assert yaml.safe_load(config.read_text())["workers"] == final(tmp_path)["run"]["flags"]["workers"] == 2
    assert "--workers 2" in (tmp_path / "pacl/embedder/README.md").read_text()
    assert resume(1) == 1
    assert "is of another run: --workers was 2, now 1; give --workers 2\n" in capsys.readouterr().err
    assert resume(1, "--workers", "2") == 0 and final(tmp_path)["step"] == 2
    assert resume(1, "--config", str(config), steps=3) == 0 and final(tmp_path)["step"] == 3


def test_the_default_number_of_workers(monkeypatch):
    for cores, expected in ((1, 1), (3, 3), (64, 4)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda process, cores=cores: set(range(cores)), raising=False)
        options = (TrainConfig, FeaturesConfig, ClassificationOptions, RetrievalOptions)
        workers = [item for kind in options for item in dataclasses.fields(kind) if item.name == "workers"]
        assert [item.default_factory() for item in workers] == [expected] * 4


def test_a_checkpoint_of_an_earlier_version(begun, run_world, tmp_path, capsys):
    shutil.copytree(begun / "pacl", tmp_path / "pacl")
    path = checkpoints(tmp_path / "pacl/checkpoints")[-1]
    state = torch.load(path, weights_only=True)
    torch.save({name: x for name, x in state.items() if name not in ("run", "resumed", "validated")}, path)
    assert train(run_world, tmp_path, max_steps=3, resume="latest") == 0
    assert f"warning: resume: {path} is of an earlier version, so towers, data and flags were not compared" in (
        capsys.readouterr().out
    )
    assert final(tmp_path)["step"] == 3 and final(tmp_path)["run"]["flags"]["seed"] == 0


def test_the_digest_of_pairs(tmp_path):
    """Other keys or captions are other data; another folder is not."""

    def digest(folder: str, captions: list[str]) -> str:
        (tmp_path / folder).mkdir(exist_ok=True)
        rows = "".join(f"{i}.jpg\t{caption}\n" for i, caption in enumerate(captions))
        (tmp_path / folder / "pairs.tsv").write_text("filepath\ttitle\n" + rows)
        return describe_data(open_pairs(tmp_path / folder / "pairs.tsv"))["digest"]

    first = digest("a", ["a dog", "a cat"])
    assert digest("b", ["a dog", "a cat"]) == first
    assert len({first, digest("b", ["a dog", "a hat"]), digest("b", ["a cat", "a dog"])}) == 3
    scenes = [describe_data(open_pairs(name, scenes=30)) for name in ("synthetic", "synthetic:eval")]
    assert scenes[0]["digest"] != scenes[1]["digest"] and scenes[0]["pairs"] == 30


UNLIKE = """
import os, sys
from pacl.cli import main
sys.exit(main(["train", *sys.argv[1:], *(["--batch-size", "10", "--seed", "3"] if os.environ["RANK"] == "1" else [])]))
"""


def test_processes_with_other_flags(run_world, tmp_path):
    (tmp_path / "unlike.py").write_text(UNLIKE)
    status, output = train_in(2, run_world, tmp_path, [tmp_path / "unlike.py"])
    assert status != 0
    said = "--batch-size is 12 in process 0 and 10 in process 1; --seed is 0 in process 0 and 3 in process 1"
    lines = [line for line in output.splitlines() if "error" in line.lower()]
    assert lines == [f"pacl: error: {said}; expected the same in all processes"], output
    assert not (tmp_path / "pacl").exists()
