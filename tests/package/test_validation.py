"""Validation of `pacl train`: its numbers, equal for one and several processes, and its lack of effect on training."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("open_clip")
pytest.importorskip("tyro")
import open_clip
import torch
from pacl.backbones import patch_tokens
from pacl.data.shards import Shards
from pacl.embedder import VisionEmbedder
from pacl.evaluate.metrics import RECALLS, Retrieval
from pacl.training.checkpoints import checkpoints, load_checkpoint
from pacl.training.validation import _Squashed
from PIL import Image
from running import lines, train, train_in

from pacl_kernels.reference import compatibility, contrastive_loss

HELD_OUT = "scenes/eval-{000..002}.tar"


def brute_force(phi: torch.Tensor, captions: list[str], scale: float, bias: float | None) -> dict[str, float]:
    """Compute the recalls from the whole matrix, one pair at a time, and the loss by the reference."""
    found = {}
    for direction, scores in (("image_to_text", phi), ("text_to_image", phi.T)):
        ranks = []
        for i, row in enumerate(scores):
            rivals = [j for j, caption in enumerate(captions) if caption != captions[i]]
            ranks.append(sum(not row[j] < row[i] for j in rivals))
        found |= {f"{direction}_R@{k}": float(np.mean([rank < k for rank in ranks])) for k in RECALLS}
    logits = scale * phi if bias is None else scale * phi + bias
    return found | {"clip_val_loss": contrastive_loss(logits, "infonce" if bias is None else "sigmoid").item()}


@pytest.mark.parametrize("bias", [None, -3.0])
@pytest.mark.parametrize("pairs, block", [(40, 40), (40, 7), (3, 1)])
def test_streamed_recall_and_loss_are_those_of_the_matrix(pairs, block, bias):
    torch.manual_seed(0)
    phi = torch.randn(pairs, pairs, dtype=torch.float64).mul_(2).round_().div_(4).float()  # many ties
    phi += 0.75 * torch.eye(pairs)
    captions = [f"caption {i % (pairs - 2)}" for i in range(pairs)]  # two captions occur twice
    retrieval = Retrieval(captions, 5.0, bias, torch.device("cpu"))
    for at in range(0, pairs, block):
        retrieval.update(phi[at : at + block], at)
    expected = brute_force(phi, captions, 5.0, bias)
    assert retrieval.values() == pytest.approx(expected, rel=1e-5)
    assert pairs == 3 or 0 < expected["image_to_text_R@1"] < expected["image_to_text_R@10"] < 1


def test_a_collapsed_embedder_finds_nothing():
    for value in (0.3, torch.nan):
        retrieval = Retrieval([str(i) for i in range(20)], 1.0, None, torch.device("cpu"))
        retrieval.update(torch.full((20, 20), value), 0)
        found = retrieval.values()
        assert all(found[f"{way}_R@10"] == 0 for way in ("image_to_text", "text_to_image"))


def test_a_long_image_is_squeezed_not_cropped():
    preprocess = open_clip.image_transform(64, is_train=False)
    image = Image.new("RGB", (256, 32))
    image.paste("white", (0, 0, 32, 32))  # an eighth at the left, which a central crop would lose
    seen = _Squashed(preprocess)(image)[0]
    assert seen.shape == (64, 64) and (seen[:, :7] > seen[:, 9:].max()).all()


@pytest.fixture(scope="module")
def validated(run_world, tmp_path_factory):
    """Run training with every kind of validation; return its folder and the random state afterwards."""
    logs = tmp_path_factory.mktemp("validated")
    changes = {"val_data": run_world / HELD_OUT, "val_segmentation": run_world / HELD_OUT}
    changes |= {"val_classes": run_world / "classes.txt", "val_frequency": 4, "lr": 0.01}
    assert train(run_world, logs, **changes) == 0
    return logs / "pacl", torch.get_rng_state()


def test_numbers_are_those_of_the_written_embedder(validated, run_world):
    folder, _ = validated
    rows = lines(folder / "results.jsonl")
    assert [row["step"] for row in rows] == [4, 6]
    clip, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{run_world / 'clip'}")
    tokenize, embedder = (
        open_clip.get_tokenizer(f"local-dir:{run_world / 'clip'}"),
        VisionEmbedder.from_pretrained(folder / "embedder"),
    )
    samples = list(Shards(run_world / HELD_OUT, transform=preprocess, masks=True))
    classes = (run_world / "classes.txt").read_text().splitlines()
    captions = [sample["caption"] for sample in samples]
    with torch.no_grad():
        patches = embedder(patch_tokens(clip.eval().visual, torch.stack([sample["image"] for sample in samples])))
        phi = compatibility(patches, clip.encode_text(tokenize(captions)), attn_temperature=0.05, form="cosine")
        names = torch.nn.functional.normalize(clip.encode_text(tokenize(classes)), dim=-1)
        scores = torch.nn.functional.normalize(patches, dim=-1) @ names.T
    scale = load_checkpoint(checkpoints(folder / "checkpoints")[-1])["state_dict"]["log_scale"].exp().item()
    expected = brute_force(phi, captions, scale, None)
    grid = scores.transpose(1, 2).reshape(60, len(classes), 8, 8)
    predicted = torch.nn.functional.interpolate(grid, size=(64, 64), mode="bilinear").argmax(1).numpy()
    truth = np.stack([sample["mask"].numpy() for sample in samples])
    classes_met = [k for k in range(len(classes)) if ((truth == k) | (predicted == k)).any()]
    expected["mIoU"] = np.mean(
        [((truth == k) & (predicted == k)).sum() / ((truth == k) | (predicted == k)).sum() for k in classes_met]
    )
    cells = truth.reshape(60, 8, 8, 8, 8).transpose(0, 1, 3, 2, 4).reshape(-1, 64)
    counts = np.stack([(cells == k).sum(1) for k in range(len(classes))], 1)
    clear = counts.max(1) >= 32
    expected["patch_accuracy"] = (grid.argmax(1).numpy().reshape(-1) == counts.argmax(1))[clear].mean()
    found = {name: value for name, value in rows[-1].items() if name not in ("step", "epoch")}
    assert found == pytest.approx(expected, rel=1e-4)
    assert "Eval Epoch: 0 Step: 6 image_to_text_R@1: " in (folder / "out.log").read_text()


def test_training_does_not_notice(validated, run_world, tmp_path):
    folder, random = validated
    assert train(run_world, tmp_path, lr=0.01) == 0
    with_it, without = (load_checkpoint(checkpoints(x / "checkpoints")[-1]) for x in (folder, tmp_path / "pacl"))
    for name, x in without["state_dict"].items():
        assert torch.equal(with_it["state_dict"][name], x), name
    assert torch.equal(torch.get_rng_state(), random), "validation used the random numbers of training"


def test_processes_agree_with_one(run_world, tmp_path):
    """Two processes, with 40 and 20 of 60 samples, get the numbers of one. A tiny rate keeps the weights equal."""
    changes = {"val_data": run_world / HELD_OUT, "val_segmentation": run_world / HELD_OUT, "lr": 1e-30}
    changes |= {"val_classes": run_world / "classes.txt", "max_steps": 1}
    assert train(run_world, tmp_path / "one", **changes) == 0
    status, printed = train_in(2, run_world, tmp_path / "two", **changes)
    assert status == 0, printed[-4000:]
    one, two = (lines(tmp_path / name / "pacl/results.jsonl") for name in ("one", "two"))
    assert len(one) == len(two) == 1
    losses = [row[0].pop("clip_val_loss") for row in (one, two)]
    assert one == two and one[0]["text_to_image_R@10"] > 0
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_several_readers(run_world, tmp_path):
    """Captions and images come in the same order when the batches of two workers take turns."""
    assert train(run_world, tmp_path, val_data=run_world / HELD_OUT, workers=2, max_steps=1, lr=1e-30) == 0
    assert train(run_world, tmp_path / "one", val_data=run_world / HELD_OUT, max_steps=1, lr=1e-30) == 0
    two, one = (lines(folder / "pacl/results.jsonl")[0] for folder in (tmp_path, tmp_path / "one"))
    assert two == pytest.approx(one, rel=1e-5)


def test_synonyms_of_a_class_are_texts_of_their_own(run_world, tmp_path):
    """A class has the score of its best synonym, so naming a class twice changes nothing."""
    names = (run_world / "classes.txt").read_text().splitlines()
    (tmp_path / "twice.txt").write_text("".join(f"{name}, {name}\n" for name in names))
    found = []
    for file in (run_world / "classes.txt", tmp_path / "twice.txt"):
        changes = {"val_segmentation": run_world / HELD_OUT, "val_classes": file, "name": file.stem}
        assert train(run_world, tmp_path, max_steps=1, **changes) == 0
        found.append(lines(tmp_path / file.stem / "results.jsonl"))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"val_data": "missing.tar"}, "'missing.tar' is not a file"),
        ({"val_data": "bad.tar"}, "val_data: no usable sample in 1 shard(s) (image 1)"),
        ({"val_segmentation": "eval"}, "val_segmentation: got --val-segmentation alone"),
        ({"val_segmentation": "eval", "val_classes": "empty.txt"}, "val_classes: empty.txt line 1 is empty"),
        ({"val_segmentation": "eval", "val_classes": "gap.txt"}, "val_classes: gap.txt line 2 is empty"),
        ({"val_segmentation": "eval", "val_classes": "two.txt"}, "eval-000000 has label 2"),
    ],
    ids=["missing", "bad", "no-classes", "empty-classes", "blank-line", "few-classes"],
)
def test_bad_validation_data_is_one_line(changes, message, run_world, tmp_path, write_tar, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tar("bad.tar", {"a.jpg": b"no jpeg", "a.txt": b"a word"})
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "gap.txt").write_text("cat\n\ndog\n")
    (tmp_path / "two.txt").write_text("cat\ndog\n")
    changes = {key: str(run_world / HELD_OUT) if value == "eval" else value for key, value in changes.items()}
    assert train(run_world, tmp_path / "logs", max_steps=1, **changes) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("pacl: error: ") and message in error
