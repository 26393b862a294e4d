"""`pacl features` stores tokens and texts, and `pacl train` learns from them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

pytest.importorskip("open_clip")
pytest.importorskip("tyro")
import torch
from dies import dies_at, fork_pacl
from forks import status
from pacl.cli import main
from pacl.data.features import Features
from pacl.data.samples import loader
from pacl.data.scene_shards import write_scenes
from pacl.data.sources import open_pairs
from pacl.data.texts import PROMPTS
from pacl.demo.toy_clip import new_clip, save_clip
from pacl.locks import lock_folder
from pacl.sharing import load_pacl
from pacl.towers import load_towers
from pacl.training.checkpoints import checkpoints, load_checkpoint
from PIL import Image
from running import assert_same_state

SCENES = 60


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Create two untrained CLIPs, and float32 features of 60 scenes with nouns."""
    folder = tmp_path_factory.mktemp("features")
    for seed, name in enumerate(("clip", "other")):
        torch.manual_seed(seed)
        save_clip(new_clip(), folder / name)
    assert features(folder, folder / "stored", nouns="words") == 0
    return folder


def words(values: dict) -> list[str]:
    return [word for name, x in values.items() for word in ([f"--{name}"] if x is None else [f"--{name}", str(x)])]


def feature_flags(world: Path, out: Path, **changes) -> list[str]:
    values = {"train_data": "synthetic", "train_num_samples": SCENES, "model": f"local-dir:{world / 'clip'}"}
    values |= {"out": out, "precision": "fp32", "workers": 0, "batch_size": 16, "shard_size": 25}
    return ["features", *words(values | changes)]


def features(world: Path, out: Path, **changes) -> int:
    return main(feature_flags(world, out, **changes))


def train(logs: Path, **changes) -> int:
    values = {"log_dir": logs, "batch_size": 12, "max_steps": 7, "workers": 0, "log_every_n_steps": 1}
    return main(["train", *words(values | {"report_to": "none"} | changes)])


def losses(logs: Path) -> list[float]:
    return [json.loads(line)["train/loss"] for line in (logs / "pacl/metrics.jsonl").read_text().splitlines()]


def final(logs: Path) -> dict:
    return load_checkpoint(checkpoints(logs / "pacl/checkpoints")[-1])


def stored(folder: Path, **options) -> dict[str, dict]:
    return {sample["key"]: sample for sample in Features(folder, **options)}


@pytest.mark.parametrize("recipe", [{}, {"recipe": "paper", "accum_freq": 1}], ids=["plain", "recipe"])
def test_training_has_the_losses_of_training_without_features(recipe, world, tmp_path):
    direct = {"train_data": "synthetic", "train_num_samples": SCENES, "model": f"local-dir:{world / 'clip'}"}
    direct |= {"pretrained": "None"}
    assert train(tmp_path / "direct", **direct, **recipe) == 0
    assert train(tmp_path / "stored", features=world / "stored", **recipe) == 0
    assert len(losses(tmp_path / "direct")) == 7
    assert losses(tmp_path / "stored") == pytest.approx(losses(tmp_path / "direct"), rel=1e-5)
    values = (tmp_path / "stored/pacl/config.yaml").read_text()
    assert str(world / "clip") in values and ("global_batch" in values) == bool(recipe)


def test_bfloat16_rounds_the_tokens_alone(world, tmp_path, capsys):
    assert features(world, tmp_path / "bf16", precision="bf16") == 0
    printed = capsys.readouterr().out
    exact, rounded = stored(world / "stored"), stored(tmp_path / "bf16")
    assert list(exact) == list(rounded) and len(exact) == SCENES
    for key, sample in exact.items():
        assert torch.equal(sample["tokens"].bfloat16(), rounded[key]["tokens"])
        assert torch.equal(sample["text"], rounded[key]["text"])
    patches, width = sample["tokens"].shape
    assert f"60 images, {patches} x {width} bf16 and texts of {len(sample['text'])} fp32" in printed
    size = sum(path.stat().st_size for path in (tmp_path / "bf16").glob("features-*"))
    assert f"{SCENES * (patches * width * 2 + len(sample['text']) * 4 + 1024) / 1e9:.3f} GB of" in printed
    assert size < SCENES * (patches * width * 2 + len(sample["text"]) * 4 + 1024)
    assert train(tmp_path / "logs", features=tmp_path / "bf16") == 0
    assert train(tmp_path / "exact", features=world / "stored") == 0
    assert losses(tmp_path / "logs") == pytest.approx(losses(tmp_path / "exact"), rel=1e-2)


def test_what_is_stored(world):
    """The stored tokens of images and embeddings of captions and prompts equal those of towers loaded by the test."""
    towers = load_towers(f"local-dir:{world / 'clip'}")
    source = open_pairs("synthetic", scenes=SCENES, transform=towers.transform)
    found = stored(world / "stored")
    with torch.no_grad():
        for sample in list(source)[:5]:
            mine = found[sample["key"]]
            assert mine["caption"] == sample["caption"]
            torch.testing.assert_close(mine["tokens"], towers.tokens(sample["image"][None])[0])
            torch.testing.assert_close(mine["text"], towers.encode_text(towers.tokenize([sample["caption"]]))[0])
        data = Features(world / "stored", nouns="words")
        assert set(data.prompts) >= {prompt.format("shape") for prompt in PROMPTS}
        for text in ("a bad photo of the shape.", "art of the sand."):
            torch.testing.assert_close(data.prompts[text], towers.encode_text(towers.tokenize([text]))[0])


def test_features_and_training_on_another_reading(world, tmp_path, capsys):
    clip = f"local-dir:{world / 'clip'}"
    few = {"train_num_samples": 12, "tokens": "clearclip"}
    assert features(world, tmp_path / "read", **few) == 0
    towers = load_towers(clip, tokens="clearclip")
    found = stored(tmp_path / "read")
    for sample in list(open_pairs("synthetic", scenes=12, transform=towers.transform))[:3]:
        expected = towers.tokens(sample["image"][None])[0]
        torch.testing.assert_close(found[sample["key"]]["tokens"], expected)
        plain = load_towers(clip).tokens(sample["image"][None])[0]
        assert not torch.allclose(plain, expected, atol=0.01)
    direct = {"train_data": "synthetic", "model": clip, "pretrained": "None", "max_steps": 2, **few}
    assert train(tmp_path / "direct", **direct) == 0
    assert "clip (from a folder), clearclip tokens, " in capsys.readouterr().out
    assert train(tmp_path / "stored", features=tmp_path / "read", max_steps=2) == 0
    assert losses(tmp_path / "stored") == pytest.approx(losses(tmp_path / "direct"), rel=1e-5)
    for logs in ("stored", "direct"):
        again, embedder = load_pacl(tmp_path / logs / "pacl")
        assert again.reader.name == embedder.towers["tokens"] == "clearclip"
        image = again.probe()[0]
        torch.testing.assert_close(again.tokens(image), towers.tokens(image))
    capsys.readouterr()
    assert train(tmp_path / "other", features=tmp_path / "read", tokens="plain") == 1
    assert "but the tokens are plain, not clearclip" in capsys.readouterr().err
    assert features(world, tmp_path / "read", train_num_samples=12) == 1
    assert "was begun with another tokens (clearclip, now plain)" in capsys.readouterr().err
    assert train(tmp_path / "other", **direct, **{"no-lock-image": None}) == 1
    assert "tokens: got 'clearclip' with a vision tower to train, expected 'plain'" in capsys.readouterr().err
    # A run on plain tokens leaves no trace of readings in its embedder.
    assert "tokens" not in json.loads((world / "stored/manifest.json").read_text())["towers"]


@pytest.mark.sampled(2)
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
@pytest.mark.parametrize("workers, renamings", [(0, (1, 8)), (3, (2, 7, 9, 11, 12))])
def test_killed_before_any_renaming_and_continued(workers, renamings, world, tmp_path, capsys):
    """Whichever file was just to get its name, the same command ends with the bytes of an uninterrupted run.

    Files of features begin and end within shards, and the workers' shares differ in length.
    """

    def contents(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    shards = tmp_path / "source"
    for number, count in enumerate((15, 1, 14)):
        write_scenes(shards / str(number), "train", count, seed=number)
    paths = "::".join(str(path) for path in sorted(shards.glob("*/*.tar")))
    settings = {"train_data": paths, "train_num_samples": "None", "workers": workers, "batch_size": 6, "shard_size": 4}
    whole = tmp_path / "whole"
    assert features(world, whole, **settings, nouns="words") == 0
    manifest = json.loads((whole / "manifest.json").read_text())
    assert len(list(Features(whole))) == 30 and [x["count"] for x in manifest["shards"]] == [4] * 6 + [3] * 2
    expected = contents(whole)
    out = tmp_path / "out"
    for renaming in renamings:
        shutil.rmtree(out, ignore_errors=True)
        killed = dies_at(renaming, feature_flags(world, out, **settings, nouns="words"))
        if renaming == 12:
            assert killed == 0 and contents(out) == expected, "a file more is written than this test knows of"
            continue
        assert killed == -signal.SIGKILL
        times = {path.name: path.stat().st_mtime_ns for path in out.glob("features-*")}
        assert train(tmp_path / "logs", features=out) == 1
        assert features(world, out, **settings, nouns="words") == 0
        assert contents(out) == expected, f"renaming {renaming}"
        assert times.items() <= {path.name: path.stat().st_mtime_ns for path in out.glob("features-*")}.items()
    assert features(world, out, **settings, nouns="words") == 0 and contents(out) == expected
    assert features(world, out, **settings, nouns="words", precision="bf16") == 1
    assert "out was begun with another precision" in capsys.readouterr().err
    with lock_folder(out):
        assert features(world, out, **settings, nouns="words") == 1
    assert "out is in use by process" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGINT to a child process")
def test_interrupted_and_gone_on_with(world, tmp_path, capsys):
    folder = tmp_path / "cut"
    settings = {"shard_size": 4, "batch_size": 4, "train_num_samples": 2000}
    # Tests started in the background ignore Ctrl-C, which their children would inherit.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = fork_pacl(feature_flags(world, folder, **settings), tmp_path / "output")
    signal.signal(signal.SIGINT, handler)
    end = time.monotonic() + 120
    while not (folder / "features-00001.safetensors").exists():
        assert time.monotonic() < end, (tmp_path / "output").read_text()
        time.sleep(0.005)
    os.kill(process, signal.SIGINT)
    ended, said = status(process), (tmp_path / "output").read_text()
    assert ended == 130 and said.endswith("stopped; the same command continues\n"), said
    assert features(world, folder, **settings, dry_run=None) == 0
    assert 0 < int(re.search(r"features: ([\d,]+) images", capsys.readouterr().out)[1].replace(",", "")) <= 1992


@pytest.mark.parametrize("workers", [0, 2])
def test_order(workers, world):
    """Each epoch has every sample once, in a new order across shards. Processes share it, and resuming is exact."""

    def keys(count, rank=0, world_size=1, start=None):
        data = Features(world / "stored", shuffle=1, seed=3, repeat=True, rank=rank, world=world_size)
        batches = loader(data, 10, workers=workers, drop_last=True, start=start)
        found = []
        for batch in batches:
            found.append(batch["key"])
            if len(found) == count:
                return found, batches.state

    whole, _ = keys(12)
    first, second = (sum(part, []) for part in (whole[:6], whole[6:]))
    assert len(set(first)) == SCENES and first != second and set(first) == set(second)
    stored_order = [sample["key"] for sample in Features(world / "stored")]
    assert all(len({stored_order.index(key) // 25 for key in first[i : i + 20]}) == 3 for i in (0, 20, 40))
    begun, state = keys(5)
    assert begun + keys(7, start=state)[0] == whole
    if not workers:
        shares = [sum(keys(3, rank, 2)[0], []) for rank in range(2)]
        assert len(set(shares[0]) | set(shares[1])) == SCENES


def test_a_resumed_run_ends_with_the_same_bits(world, tmp_path):
    settings = {"features": world / "stored", "recipe": "paper", "accum_freq": 2, "batch_size": 6}
    assert train(tmp_path, **settings, save_frequency=4) == 0
    whole = final(tmp_path)
    checkpoints(tmp_path / "pacl/checkpoints")[-1].unlink()
    assert final(tmp_path)["step"] == 4
    assert train(tmp_path, **settings, save_frequency=4, resume="latest") == 0
    assert_same_state(final(tmp_path), whole)


def test_all_captions_of_an_image(world, tmp_path):
    """Features of a COCO file give the same captions in every epoch as the file itself."""
    (tmp_path / "images").mkdir()
    for i in range(8):
        Image.new("RGB", (64, 64), (i * 30, 0, 0)).save(tmp_path / f"images/{i}.png")
    images = [{"id": i, "file_name": f"{i}.png"} for i in range(8)]
    notes = [{"image_id": i, "caption": f"dog {i} number {j}"} for i in range(8) for j in range(1 + i % 3)]
    (tmp_path / "coco.json").write_text(json.dumps({"images": images, "annotations": notes}))
    coco = {"image_root": tmp_path / "images"}
    assert features(world, tmp_path / "out", train_data=tmp_path / "coco.json", train_num_samples="None", **coco) == 0
    source = iter(open_pairs(tmp_path / "coco.json", shuffle=1, repeat=True, **coco))
    data = iter(Features(tmp_path / "out", shuffle=1, repeat=True))
    towers, seen = load_towers(f"local-dir:{world / 'clip'}"), set()
    for _ in range(8 * 16):
        theirs, mine = next(source), next(data)
        assert (mine["key"], mine["caption"]) == (theirs["key"], theirs["caption"])
        with torch.no_grad():
            text = towers.encode_text(towers.tokenize([mine["caption"]]))[0]
        torch.testing.assert_close(mine["text"], text)
        seen.add(mine["caption"])
    assert len(seen) == len(notes)


def test_dry_run_writes_nothing(world, tmp_path, capsys):
    assert features(world, tmp_path / "out", dry_run=None) == 0
    assert "features: 60 images" in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_a_disk_that_is_too_small(world, tmp_path, capsys):
    assert features(world, tmp_path / "out", train_num_samples=10**11) == 1
    error = capsys.readouterr().err
    assert "100,000,000,000 images take" in error and "GB more than" in error and not (tmp_path / "out").exists()


def damage(folder: Path, kind: str) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    shard = folder / "features-00001.safetensors"
    if kind == "truncated":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif kind == "missing":
        shard.unlink()
    elif kind == "outside":
        manifest["shards"][0]["name"] = "../features-00000.safetensors"
    elif kind == "no manifest":
        manifest = []
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        ("truncated", {}, "features-00001.safetensors is missing or does not have"),
        ("missing", {}, "features-00001.safetensors is missing or does not have"),
        ("outside", {}, "names '../features-00000.safetensors', expected"),
        ("no manifest", {}, "manifest.json is damaged: it holds [], expected a mapping"),
        ("", {"model": "local-dir:other"}, "towers: expected those that the embedder was trained on, but"),
        ("", {"nouns": "words"}, "nouns: got 'words', expected None"),
        ("", {"train_data": "a.tar"}, "train_data: got both"),
        ("", {"no-lock-image": None}, "features: got stored features and a tower to train"),
    ],
)
def test_bad_features_are_one_line(kind, changes, message, world, tmp_path, capsys):
    if kind:
        for path in (world / "stored").iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        damage(tmp_path, kind)
    elif "nouns" in changes:
        assert features(world, tmp_path, shard_size=100) == 0
    changes = {name: str(x).replace("other", str(world / "other")) if x else x for name, x in changes.items()}
    given = tmp_path if kind or "nouns" in changes else world / "stored"
    assert train(tmp_path / "logs", features=given, **changes) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("pacl: error: ") and message in error


def test_a_damaged_shard_is_not_gone_on_from(world, tmp_path, capsys):
    manifest = json.loads((world / "stored/manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"complete": False, "shards": []}))
    data = (world / "stored/features-00000.safetensors").read_bytes()
    (tmp_path / "features-00000.safetensors").write_bytes(data[:-1])
    assert features(world, tmp_path, nouns="words") == 1
    assert "features-00000.safetensors is damaged" in capsys.readouterr().err
    (tmp_path / "features-00000.safetensors").unlink()
    (tmp_path / "features-00003.safetensors").write_bytes(data)
    assert features(world, tmp_path, nouns="words") == 1
    assert "has features-00003.safetensors, expected at most 3 files" in capsys.readouterr().err
    (tmp_path / "features-00003.safetensors").unlink()
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"complete": False, "shards": [], "images": 61}))
    assert features(world, tmp_path, nouns="words") == 1
    assert "was begun with another images (61, now 60), expected the same" in capsys.readouterr().err
    del manifest["images"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"complete": False, "shards": []}))
    assert features(world, tmp_path, nouns="words") == 1
    assert "was begun by an earlier version, which divided the images otherwise" in capsys.readouterr().err


def test_a_folder_of_something_else_is_left_alone(world, tmp_path, capsys):
    (tmp_path / "precious").write_text("")
    assert features(world, tmp_path) == 1
    assert "holds other files" in capsys.readouterr().err
