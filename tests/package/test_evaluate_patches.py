"""`pacl evaluate alignment` and `coherence` agree with a count of single patches and with torchmetrics' AUC."""

import itertools
import json
import sys

import numpy as np
import pytest
import torch
from miniature import mask, save
from pacl.backbones import patch_tokens
from pacl.cli import main
from pacl.evaluate.coherence import Coherence, coherence
from pacl.evaluate.metrics import patch_truth
from pacl.evaluate.segmentation_data import SegmentationData
from pacl.evaluate.specs import IGNORED, spec
from pacl.segment.predict import Segmenter
from pacl.segment.prompts import TEMPLATES
from pacl.sharing import load_pacl
from pacl.towers import load_towers
from PIL import Image
from running import write_embedder
from torch import nn
from torch.nn import functional as F
from torchmetrics.functional.classification import binary_auroc, binary_roc

torch.set_num_threads(1)
NAMES = [f"2007_{i:06d}" for i in range(6)]


@pytest.fixture(scope="module")
def world(untrained, tmp_path_factory):
    """Create an embedder on the untrained CLIP, and six images of Pascal VOC: blocks of classes, each in its colour."""
    folder = tmp_path_factory.mktemp("patches")
    torch.manual_seed(0)
    write_embedder(folder / "run/embedder", untrained / "clip")
    rng = np.random.default_rng(0)
    base, colours = folder / "VOCdevkit/VOC2012", rng.integers(0, 256, (256, 3))
    for name in NAMES:
        few = rng.choice(np.arange(1, 21), 4, replace=False)
        values = np.kron(rng.choice([0, 255, *few, *few], (5, 5)), np.ones((13, 13), int))[:64, :64]
        values = np.where(rng.random((64, 64)) < 0.3, rng.choice(few, (64, 64)), values)
        picture = (colours[values] + rng.integers(-9, 9, (64, 64, 3))).clip(0, 255).astype(np.uint8)
        save(Image.fromarray(picture), base / f"JPEGImages/{name}.jpg")
        save(mask(values, "P"), base / f"SegmentationClass/{name}.png")
    (base / "ImageSets/Segmentation").mkdir(parents=True)
    (base / "ImageSets/Segmentation/val.txt").write_text("\n".join(NAMES))
    return folder


@pytest.fixture(scope="module")
def truth(world):
    """Return for each image the true voc21 label of every 8 x 8 patch, by counting pixels, and the image's labels."""
    found = []
    for name in NAMES:
        values = np.asarray(Image.open(world / f"VOCdevkit/VOC2012/SegmentationClass/{name}.png"))
        patches = []
        for y, x in itertools.product(range(0, 64, 8), repeat=2):
            part = values[y : y + 8, x : x + 8]
            most = max(range(1, 21), key=lambda k, part=part: (part == k).sum())
            patches.append(most if (part == most).sum() >= 32 else None)
        found.append((patches, sorted(set(values.ravel().tolist()) - {0, 255})))
    assert sum(x is not None for patches, _ in found for x in patches) > 50
    assert any(x is None for patches, _ in found for x in patches)
    return found


@pytest.fixture(scope="module")
def embedded(world):
    """Return the patch embeddings [6, 64, D] of "vision", "embedder" and "plain", and the towers."""
    towers, embedder = load_pacl(world / "run/embedder")
    images = [Image.open(world / f"VOCdevkit/VOC2012/JPEGImages/{name}.jpg") for name in NAMES]
    with torch.no_grad():
        tokens = patch_tokens(towers.visual, torch.stack([towers.transform(x) for x in images]))
        each = {"vision": tokens, "embedder": embedder(tokens), "plain": tokens @ towers.visual.proj}
    return {name: F.normalize(x, dim=-1) for name, x in each.items()}, towers


def evaluate(world, task, out, *words) -> int:
    given = ["--data-root", world, "--partial", "--checkpoint", world / "run/embedder", "--out", out]
    return main(["evaluate", task, *map(str, given), *map(str, words)])


@pytest.mark.parametrize("name", ["voc20", "voc21"])
def test_alignment_against_patches_one_by_one(name, world, truth, embedded, tmp_path, capsys):
    patches, towers = embedded
    classes = spec("voc20").classes
    names = list(classes)
    if name == "voc21":  # a background that would win everywhere if it competed
        names.insert(0, "background, " + ", ".join(classes))
    (tmp_path / "classes.txt").write_text("\n".join(names))
    words = ["--dataset", name, "--class-file", tmp_path / "classes.txt", "--plain"]
    assert evaluate(world, "alignment", tmp_path, *words) == 0
    with torch.no_grad():
        sentences = [[template.format(x) for template in TEMPLATES["simple"]] for x in classes]
        texts = [towers.encode_text(towers.tokenize(each)).mean(0) for each in sentences]
    scores = {x: patches[x] @ F.normalize(torch.stack(texts), dim=-1).T for x in ("embedder", "plain")}
    for kind, each in scores.items():
        hits, chance = {k: [] for k in range(1, 21)}, []
        for (labels, present), image in zip(truth, each.tolist(), strict=True):
            for label, row in zip(labels, image, strict=True):
                if label is not None:
                    among_all = max(range(1, 21), key=lambda k, row=row: row[k - 1])
                    among = max(present, key=lambda k, row=row: row[k - 1])
                    hits[label].append((among_all == label, among == label))
                    chance.append(1 / len(present))
        whole = np.mean([x for each in hits.values() for x in each], 0)
        means = np.mean([np.mean(each, 0) for each in hits.values() if each], 0)
        row = json.loads((tmp_path / f"{name}_clip_run_alignment-{kind}.json").read_text())
        assert row["metrics"] == pytest.approx(
            {
                "patch_accuracy_all_classes": whole[0],
                "patch_accuracy_image_classes": whole[1],
                "mean_class_accuracy_all_classes": means[0],
                "mean_class_accuracy_image_classes": means[1],
            }
        )
        assert 0 < whole[0] < whole[1] < 1
        assert row["chance_image_classes"] == pytest.approx(np.mean(chance))
        assert row["patches_of_class"] == {x: len(hits[k]) for k, x in enumerate(classes, 1)}
        assert row["patches"] == len(chance) and row["protocol"]["short_side"] == 64
    with Image.open(tmp_path / f"{name}_clip_run_alignment-plain.png") as plot:
        assert np.asarray(plot.convert("L")).std() > 10
    assert "patch_accuracy_all_classes 0." in capsys.readouterr().out


def test_coherence_against_torchmetrics(world, truth, embedded, tmp_path):
    assert evaluate(world, "coherence", tmp_path, "--pairs", 10**6) == 0
    labels = torch.tensor([-1 if x is None else x for each, _ in truth for x in each])
    for kind in ("vision", "embedder"):
        tokens = embedded[0][kind].flatten(0, 1)[labels >= 0].double()
        known = labels[labels >= 0]
        one, other = torch.triu_indices(len(known), len(known), 1)  # all pairs, because they are fewer than a million
        expected = binary_auroc((tokens[one] * tokens[other]).sum(1) / 2 + 0.5, (known[one] == known[other]).int())
        row = json.loads((tmp_path / f"voc20_clip_run_coherence-{kind}.json").read_text())
        assert row["metrics"]["auc"] == pytest.approx(expected.item(), abs=1e-4)
        assert (row["pairs"], row["pairs_of_one_class"]) == (len(one), int((known[one] == known[other]).sum()))
        assert row["metrics"]["auc"] > 0.55  # equal colours give similar tokens
        assert row["roc"]["true_positive_rate"][-1] == 1 and len(row["roc"]["false_positive_rate"]) == 101
    assert (tmp_path / "voc20_clip_run_coherence-embedder.png").stat().st_size > 1000


def test_auc_is_exact_with_ties():
    torch.manual_seed(0)
    scores, same = (torch.randn(300) * 2).round() / 8, torch.rand(300) < 0.3
    scores[same] += 0.125
    found = Coherence(scores, same)
    higher = [float(a > b) + float(a == b) / 2 for a in scores[same] for b in scores[~same]]
    assert found.auc() == pytest.approx(np.mean(higher), abs=1e-12) and 0.6 < found.auc() < 0.9
    false, true, _ = binary_roc((scores / 4 + 0.5).double(), same.int())
    assert torch.allclose(found.curve()[0].float(), false.float()) and torch.allclose(
        found.curve()[1].float(), true.float()
    )


def test_a_sample_of_pairs(world, untrained):
    data = SegmentationData("voc20", world, partial=True)
    segmenter = Segmenter(load_towers(f"local-dir:{untrained / 'clip'}"), nn.Identity())
    whole = coherence(data, segmenter, pairs=10**6).auc()
    one, again, other = (coherence(data, segmenter, patches=60, pairs=1500, seed=x) for x in (1, 1, 2))
    assert len(one.same) == 1500 and one.auc() == again.auc() != other.auc()
    assert np.mean(
        [coherence(data, segmenter, patches=60, pairs=1500, seed=x).auc() for x in range(4)]
    ) == pytest.approx(whole, abs=0.06)
    with pytest.raises(ValueError, match="expected 1 and None, so that patches tile"):
        coherence(data, Segmenter(segmenter.towers, nn.Identity(), stride=2))


def test_patches_that_no_class_covers():
    labels = torch.tensor([[3, 3, 5, 6], [3, -1, 5, 7], [-1, -1, 2, 2], [-1, 4, 2, 4]])
    assert patch_truth(labels, (2, 2)).tolist() == [[3, 5], [IGNORED, 2]]
    assert patch_truth(torch.full((3, 3), -1), (2, 2)).tolist() == [[IGNORED] * 2] * 2


def test_without_matplotlib_and_errors(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert evaluate(world, "coherence", tmp_path, "--patches", 20) == 0
    assert "matplotlib is not installed" in capsys.readouterr().err
    assert {path.suffix for path in tmp_path.iterdir()} == {".json"}
    assert evaluate(world, "coherence", tmp_path, "--patches", 1) == 1
    assert "patches: got 1, expected at least 2" in capsys.readouterr().err
    assert evaluate(world, "alignment", tmp_path, "--templates", "no such") == 1
    assert "templates: got 'no such'" in capsys.readouterr().err
    assert main(["evaluate", "alignment", "--data-root", str(tmp_path), "--model", "no-such-model"]) == 1
    assert "has no Pascal VOC" in capsys.readouterr().err
