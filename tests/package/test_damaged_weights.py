"""Flipped bits in checkpoints, embedders and features: refused by the file's name, or without any effect."""

from __future__ import annotations

import json
import random
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("open_clip")
pytest.importorskip("tyro")
import torch
from pacl.cli import main
from pacl.data.features import Features
from pacl.embedder import VisionEmbedder, save_embedder
from pacl.sharing import load_pacl
from pacl.training.checkpoints import load_checkpoint, save_checkpoint
from running import assert_same_state
from safetensors.torch import load_file, save_file

SEED, FLIPS = 24, 16


def flip(path: Path, rng: random.Random) -> str:
    """Flip a bit of the file and return where."""
    data = bytearray(path.read_bytes())
    place, bit = rng.randrange(len(data)), rng.randrange(8)
    data[place] ^= 1 << bit
    path.write_bytes(data)
    return f"{path.name}, byte {place} of {len(data)}, bit {bit}"


def assert_refused_or_same(path: Path, load: Callable[[], Any], flips: int, rng: random.Random) -> int:
    """Load after each of `flips` flips of one bit; return how many were refused, all in a sentence with the name."""
    whole, before, refused = path.read_bytes(), load(), 0
    for _ in range(flips):
        where = flip(path, rng)
        try:
            found = load()
        except ValueError as error:
            assert path.name in str(error) and "\n" not in str(error) and "0x" not in str(error), where
            refused += 1
        else:
            assert_same_state(found, before, where)
        path.write_bytes(whole)
    return refused


def state() -> dict[str, Any]:
    torch.manual_seed(0)
    model = torch.nn.Linear(20, 30)
    optimiser = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 20)).sum().backward()
    optimiser.step()
    return {
        "step": 7,
        "name": "pacl",
        "state_dict": dict(model.state_dict()),
        "ema": None,
        "optimizer": optimiser.state_dict(),
        "global_batch": 24,
        "world": 1,
        "data": [{"batches": 3, "workers": 0, "places": [[0, 12]]}],
    }


def test_checkpoints(tmp_path):
    path = save_checkpoint(tmp_path, state(), keep=1)
    # The rest of the bits are paddings and fields of the zip format that nobody reads.
    assert assert_refused_or_same(path, lambda: load_checkpoint(path), 4 * FLIPS, random.Random(SEED)) > FLIPS
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"resume: .*step_00000007\.pt is not a whole checkpoint"):
        load_checkpoint(path)


def test_a_checkpoint_that_unfolds_is_refused(tmp_path):
    path = save_checkpoint(tmp_path, state(), keep=1)
    with zipfile.ZipFile(path) as file:
        parts = {part.filename: file.read(part) for part in file.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in parts.items():
            file.writestr(name, data)
        file.writestr("archive/data/99", bytes(2**20))
    with pytest.raises(ValueError, match="has compressed parts"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"step": "7"}, "is damaged: step is '7', expected an integer"),
        ({"data": {}}, "is damaged: data is {}, expected a list"),
        ({"state_dict": {"weight": torch.tensor([1.0, torch.nan])}}, "is damaged: weight of its state_dict is not"),
        ({"ema": {"weight": torch.tensor([torch.inf])}}, "is damaged: weight of its ema is not"),
        ({"state_dict": {"weight": "heavy"}}, "is damaged: weight of its state_dict is not"),
    ],
)
def test_checkpoints_with_other_contents(change, message, tmp_path):
    path = save_checkpoint(tmp_path, state() | {"step": 7}, keep=1)
    torch.save(state() | change, path)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(path)


def contents(embedder: VisionEmbedder) -> dict[str, Any]:
    return {name: x.clone() for name, x in embedder.state_dict().items()} | {"config": embedder.config}


def test_embedders(tmp_path):
    torch.manual_seed(0)
    folder = tmp_path / "embedder"
    VisionEmbedder(6, 4).save_pretrained(folder)
    path, rng = folder / "model.safetensors", random.Random(SEED)
    assert assert_refused_or_same(path, lambda: contents(VisionEmbedder.from_pretrained(folder)), FLIPS, rng) == FLIPS


def test_settings_of_embedders(tmp_path):
    """Flips in config.json change a value, as an editor may; all else is refused, and the weights stay the same."""
    torch.manual_seed(0)
    VisionEmbedder(6, 4, training={"steps": 7}).save_pretrained(tmp_path)
    path, rng = tmp_path / "config.json", random.Random(SEED)
    whole, before = path.read_bytes(), contents(VisionEmbedder.from_pretrained(tmp_path))
    for _ in range(4 * FLIPS):
        where = flip(path, rng)
        try:
            found = contents(VisionEmbedder.from_pretrained(tmp_path))
        except ValueError as error:
            assert "config.json" in str(error) or "model.safetensors is damaged" in str(error), where
        else:
            assert found["config"].keys() == before["config"].keys(), where
            assert found["config"] != before["config"] or found["config"]["attn_temperature"] > 0
            assert_same_state(found | {"config": 0}, before | {"config": 0}, where)
        path.write_bytes(whole)


def test_weights_without_a_digest_load_and_are_checked(tmp_path):
    torch.manual_seed(0)
    embedder = VisionEmbedder(6, 4)
    save_embedder(embedder, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({name: x for name, x in config.items() if name != "sha256"}))
    assert_same_state(contents(VisionEmbedder.from_pretrained(tmp_path)), contents(embedder))
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    for change, message in (
        ({"skip.bias": torch.full((4,), torch.nan)}, "skip.bias has values that are not finite"),
        (
            {"skip.bias": torch.zeros(4, dtype=torch.int32)},
            "skip.bias has the type torch.int32, expected torch.float32",
        ),
        ({"other": torch.zeros(4)}, "it has other, which the model does not have"),
    ):
        save_file(weights | change, path)
        with pytest.raises(ValueError, match=f"model.safetensors is damaged: {message}"):
            VisionEmbedder.from_pretrained(tmp_path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="model.safetensors is damaged: it is a pointer of Git LFS.*git lfs pull"):
        VisionEmbedder.from_pretrained(tmp_path)


def test_trained_towers(untrained, tmp_path):
    """A trained tower's digest is in config.json too; without one, its shapes and values are checked."""
    for name in ("clip", "run"):
        shutil.copytree(untrained / name, tmp_path / name)
    folder = tmp_path / "run/embedder"
    towers, embedder = load_pacl(folder)
    path = folder / "text.safetensors"
    weights = {name: x.contiguous() for name, x in towers.text.state_dict().items()}
    save_file(weights, path)
    save_embedder(embedder, folder, embedder.towers | {"trained": ["text"]})
    assert set(json.loads((folder / "config.json").read_text())["sha256"]) == {"model.safetensors", "text.safetensors"}
    load_pacl(folder)
    flip(path, random.Random(SEED))
    with pytest.raises(ValueError, match=r"text\.safetensors is damaged: it does not have the SHA-256"):
        load_pacl(folder)
    first = next(iter(weights))
    save_file(weights | {first: weights[first][:1].clone()}, path)
    save_embedder(embedder, folder, embedder.towers | {"trained": ["text"]})
    with pytest.raises(ValueError, match=r"text\.safetensors is damaged: \S+ has the shape"):
        load_pacl(folder)


@pytest.fixture(scope="module")
def stored(untrained, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stored") / "features"
    words = ["--train-data", "synthetic", "--train-num-samples", "6", "--model", f"local-dir:{untrained / 'clip'}"]
    words += ["--out", str(folder), "--workers", "0", "--shard-size", "4", "--nouns", "words", "--precision", "bf16"]
    assert main(["features", *words]) == 0
    return folder


def read(folder: Path, **options: Any) -> dict[str, Any]:
    features = Features(folder, nouns="words", **options)
    return {"samples": list(features), "prompts": features.prompts, "manifest": features.manifest}


def test_features(stored):
    files, rng = sorted(stored.iterdir()), random.Random(SEED)
    assert len(files) == 4
    for path in files:
        flips = FLIPS if path.name == "manifest.json" else FLIPS // 4
        refused = assert_refused_or_same(path, lambda: read(stored), flips, rng)
        assert refused >= flips - 2 if path.name == "manifest.json" else refused == flips


def test_features_without_verification(stored, tmp_path):
    """--no-verify reads no digest; a file of another length, or with another header, is refused all the same."""
    shutil.copytree(stored, tmp_path / "features")
    path = tmp_path / "features/features-00000.safetensors"
    whole = path.read_bytes()
    half = len(whole) // 2  # among the tokens
    path.write_bytes(whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1 :])
    read(tmp_path / "features", verify=False)
    with pytest.raises(ValueError, match=r"features-00000\.safetensors is damaged: it does not have the SHA-256"):
        read(tmp_path / "features")
    path.write_bytes(whole.replace(b'"F32"', b'"I32"'))
    with pytest.raises(ValueError, match="is damaged: its tensors have other names or types"):
        read(tmp_path / "features", verify=False)


def test_features_of_earlier_versions_load(stored, tmp_path):
    shutil.copytree(stored, tmp_path / "features")
    manifest = json.loads((tmp_path / "features/manifest.json").read_text())
    assert set(manifest.pop("sha256")) == {path.name for path in stored.iterdir()}
    (tmp_path / "features/manifest.json").write_text(json.dumps(manifest))
    assert_same_state(read(tmp_path / "features")["samples"], read(stored)["samples"])


def test_training_refuses_damaged_features_unless_told(stored, tmp_path, capsys):
    shutil.copytree(stored, tmp_path / "features")
    path = tmp_path / "features/features-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    words = ["train", "--features", str(tmp_path / "features"), "--log-dir", str(tmp_path), "--workers", "0"]
    words += ["--batch-size", "2", "--max-steps", "1", "--report-to", "none"]
    assert main(words) == 1
    assert "features-00000.safetensors is damaged: it does not have the SHA-256" in capsys.readouterr().err
    assert main([*words, "--no-verify"]) == 0


def test_a_damaged_record_in_a_worker_is_one_line(stored, tmp_path, capsys):
    shutil.copytree(stored, tmp_path / "features")
    for path in (tmp_path / "features").glob("features-*.safetensors"):
        path.write_bytes(path.read_bytes().replace(b'"captions"', b'"captious"'))
    words = ["train", "--features", str(tmp_path / "features"), "--log-dir", str(tmp_path), "--workers", "1"]
    words += ["--batch-size", "2", "--max-steps", "1", "--report-to", "none", "--no-verify"]
    assert main(words) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pacl: error: ")]
    assert re.search(r"features-0000\d\.safetensors is damaged: the record of its image \d cannot be read$", line)
    assert "Traceback" not in line
