"""benchmarks/real_words.py draws, trains, measures and resumes, on drawn pictures with random towers."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("open_clip")
import torch
from helpers.small_towers import registered
from pacl.evaluate.metrics import IGNORE, patch_labels, patch_shares
from pacl.towers import load_towers
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import real_words
import real_words_features as features
import real_words_pictures as pictures
import real_words_towers
from real_words import Run, Size
from real_words_features import Split
from study_tables import real_words as table

WORDS = ("apple", "bear", "cherries")
SIZE = Size(pairs=64, tune_pairs=64, tokens=16, train=16, val=4, test=4)


def _cutout(word, colour, sides):
    image = Image.new("RGBA", (60, 60))
    ImageDraw.Draw(image).regular_polygon((30, 30, 28), sides, fill=colour)
    image.paste((0, 0, 0, 0), (38, 0, 60, 60))  # so that the mirrored picture is another
    return pictures.Cutout(word, "drawn", np.asarray(image))


@pytest.fixture(scope="module")
def world():
    drawn = [
        _cutout(word, colour, 3 + i)
        for i, (word, colour) in enumerate(zip(WORDS, ("red", "blue", "lime"), strict=True))
    ]
    held = [dataclasses.replace(x, rgba=np.rot90(x.rgba)) for x in drawn]
    photos = [np.full((90, 120, 3), 40 * i, np.uint8) for i in range(4)]
    return pictures.World(WORDS, {"train": drawn, "val": held, "test": held}, pictures.split_photos(photos))


def test_scenes_name_what_they_show(world):
    for index in range(8):
        scene = pictures.draw_scene(world, "test", index)
        assert set(np.unique(scene.mask)) - {IGNORE} == set(scene.words), "an object is hidden"
        assert all((pictures.phrase(word) in scene.caption) == (i in scene.words) for i, word in enumerate(WORDS))
        assert (scene.image == 120).all(-1).any(), "the photograph is not the held-out one"
        assert np.array_equal(scene.image, pictures.draw_scene(world, "test", index).image)
    assert pictures.phrase("apple") == "an apple" and pictures.phrase("cherries") == "cherries"


def test_near_twins_are_left_out(world):
    mirrored = [dataclasses.replace(x, rgba=x.rgba[:, ::-1]) for x in world.cutouts["train"]]
    other = _cutout("bear", "white", 3)
    kept = pictures.without_twins({**world.cutouts, "val": mirrored, "test": [other]})
    assert kept["val"] == [] and kept["test"] == [other] and len(kept["train"]) == 3


def test_an_embedder_that_knows_everything(world):
    scenes = [pictures.draw_scene(world, "test", i) for i in range(6)]
    masks = torch.from_numpy(np.stack([scene.mask for scene in scenes]))
    words = torch.eye(4)[:3]
    truth = patch_labels(patch_shares(masks, 3, (10, 10))).flatten(1)
    tokens = torch.eye(4)[truth.masked_fill(truth == IGNORE, 3)]
    texts = torch.stack([words[list(scene.words)].mean(0) for scene in scenes])
    split = Split(tokens, texts, masks, [scene.caption for scene in scenes], [list(scene.words) for scene in scenes])
    found, threshold = real_words.measure(lambda x: x, split, words, "all pairs")
    assert found["patches"] == found["own_words"] == 1
    assert found["miou"] > 0.7 and 0.6 < found["find"] < 1 and 0 < threshold < 1
    wrong = dataclasses.replace(split, tokens=tokens.roll(1, -1))
    worse, _ = real_words.measure(lambda x: x, wrong, words, "all pairs", threshold)
    assert worse["patches"] == 0 and worse["find"] < 0.3
    one = torch.eye(4)[torch.arange(6) % 3]  # an image is its only word
    alone = dataclasses.replace(split, tokens=one[:, None].expand(-1, 100, -1), texts=one, captions=[*"abcabc"])
    assert real_words.measure(lambda x: x, alone, words, "mean")[0]["r1"] == 1
    alone = dataclasses.replace(alone, texts=one.roll(1, 0))
    assert real_words.measure(lambda x: x, alone, words, "mean")[0]["r1"] == 0


def test_runs_are_tuned_resumed_and_reported(world, tmp_path, monkeypatch):
    monkeypatch.setattr(real_words, "TOWERS", {"tiny": ()})
    monkeypatch.setattr(real_words, "LRS", {64: (1e-3, 2e-3)})
    monkeypatch.setattr(real_words, "LIMITS", (1e-3, 2e-3))
    monkeypatch.setattr(real_words, "SEEDS", (0, 1))
    (tmp_path / "world.json").write_text(json.dumps(world.summary()))
    scenes = {"train": SIZE.train, "val": SIZE.val, "test": SIZE.test}
    features.prepare("tiny", load_towers(registered(tmp_path)), world, scenes, tmp_path)
    real_words.work(tmp_path, tmp_path, SIZE, ("tiny",), tmp_path / "r.json")
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["missing_runs"] == 0 and len(found["tuning"]) == 6
    assert [(row["method"], row["seeds"], row["steps"]) for row in found["rows"]] == [
        (x, 2, 1) for x in real_words.METHODS
    ]
    for row in found["rows"]:
        tuned = {x["lr"]: x["patches"] for x in found["tuning"] if x["method"] == row["method"]}
        assert tuned[row["lr"]] == max(tuned.values()), "the test chose the learning rate, or nothing did"
    assert table(found, "tiny").count("\n") == 4 and "the paired caption's | 64" in table(found)
    lost = next(tmp_path.glob("runs/tiny_mean_*_1_test.json"))
    lost.unlink()
    assert [run.name for run in real_words.plan(tmp_path, ("tiny",))] == [lost.stem]
    with pytest.raises(SystemExit, match="runs of another size"):
        real_words.work(tmp_path, tmp_path, Size(), ("tiny",), None)


def test_methods_have_losses_of_their_own():
    torch.manual_seed(0)
    patches, texts, scale = torch.randn(6, 5, 8), torch.randn(6, 8), torch.tensor(20.0)
    losses = [float(real_words.loss_of(method)(patches, texts, scale)) for method in real_words.METHODS]
    assert len({round(x, 3) for x in losses}) == 3 and losses[1] < losses[0]
    equal = patches[:, :1].expand(-1, 5, -1)  # without a choice of patches all three pool alike
    same = [float(real_words.loss_of(method)(equal, texts, scale)) for method in real_words.METHODS]
    assert same == pytest.approx([same[0]] * 3, rel=1e-5)


def test_the_vit_under_the_names_of_timm():
    """The names that transformers had when the file was exported, of a ViT whose queries, keys and values are apart."""
    timm = pytest.importorskip("timm")
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 28, "num_classes": 0}
    ours = timm.create_model("vit_small_patch14_dinov2", **sizes).state_dict()
    names = {"attn.proj": "attention.output.dense", "ls1.gamma": "layer_scale1.lambda1"}
    names |= {"ls2.gamma": "layer_scale2.lambda1", "blocks.": "encoder.layer.", "cls_token": "embeddings.cls_token"}
    names |= {"patch_embed.proj": "embeddings.patch_embeddings.projection"}
    stored = {"onnx::Concat_7": ours["pos_embed"][:, :1], "onnx::Reshape_9": ours["pos_embed"][:, 1:]}
    for key, x in ours.items():
        name = f"backbone.{'layernorm.' + key[5:] if key.startswith('norm.') else key}"
        for here, there in names.items():
            name = name.replace(here, there)
        if "qkv" in key:
            parts = zip(("query", "key", "value"), x.chunk(3), strict=True)
            stored |= {name.replace("attn.qkv", f"attention.attention.{part}"): y for part, y in parts}
        elif key != "pos_embed":
            stored[name] = x
    found = real_words_towers.vit_names(stored)
    assert found.keys() == ours.keys() and all(torch.equal(found[key], x) for key, x in ours.items())


def test_missing_packages_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="en/data.json, expected the unpacked packages"):
        real_words_towers.found(tmp_path, "en/data.json")


def test_runs_have_distinct_names():
    runs = [Run("vit", method, 64, 1e-3, 0, split) for method in real_words.METHODS for split in ("val", "test")]
    assert len({run.name for run in runs}) == 6
