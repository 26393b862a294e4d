"""Several captions of an image in a batch, and captions that occur twice in a step."""

from __future__ import annotations

import copy
import io
import json
import shutil
import warnings
from pathlib import Path

import pytest

pytest.importorskip("open_clip")
pytest.importorskip("tyro")
import torch
from pacl.backbones import patch_tokens
from pacl.cli import main
from pacl.data.features import Features
from pacl.data.samples import Samples, captions_of
from pacl.data.sources import open_pairs
from pacl.towers import encode_text
from pacl.training.checkpoints import checkpoints
from pacl.training.command import _parse
from pacl.training.pairing import pair_options, text_id
from pacl.training.run import Run
from PIL import Image
from running import assert_same_state, final, flags, lines, train, train_in

from pacl_kernels.reference import pacl_loss

WORDS = ("a red dog", "a green cat", "two blue boats", "some grass", "a yellow car", "an old man", "the sky")
# One to four captions of an image, many of them those of other images too; one image has a text twice.
CAPTIONS = [
    [WORDS[(3 * i + i // 7 + j) % 7] + (" at night" if i % 3 else "") for j in range(i % 4 + 1)] for i in range(24)
]
CAPTIONS[3][1] = CAPTIONS[3][0]
KINDS = ("coco", "csv", "folder", "txt shards", "json shards", "features")


@pytest.fixture(scope="module")
def data(run_world, tmp_path_factory, module_tar) -> dict[str, Path]:
    """Write the same images and captions in every form; return the location of each."""
    folder, shards = tmp_path_factory.mktemp("captions"), tmp_path_factory.mktemp("shards")
    images, notes, rows = [], [], ["filepath\ttitle\n"]
    members: dict[str, dict[str, bytes]] = {"txt": {}, "json": {}}
    for i, captions in enumerate(CAPTIONS):
        name, stream = f"{i:02d}.png", io.BytesIO()
        Image.effect_noise((64, 64), 60 + 5 * i).convert("RGB").save(stream, "PNG")
        (folder / name).write_bytes(stream.getvalue())
        (folder / f"{i:02d}.txt").write_text("\n".join(captions))
        images.append({"id": i, "file_name": name})
        for caption in captions:
            notes.append({"image_id": i, "caption": caption})
            rows.append(f"{name}\t{caption}\n")
        members["txt"] |= {name: stream.getvalue(), f"{i:02d}.txt": "\n".join(captions).encode()}
        members["json"] |= {name: stream.getvalue(), f"{i:02d}.txt": captions[0].encode()}
        members["json"][f"{i:02d}.json"] = json.dumps({"captions": captions}).encode()
    (folder / "pairs.tsv").write_text("".join(rows))
    (folder / "coco.json").write_text(json.dumps({"images": images, "annotations": notes}))
    found = {"coco": folder / "coco.json", "csv": folder / "pairs.tsv", "folder": folder}
    found |= {f"{name} shards": module_tar(shards / f"{name}.tar", each) for name, each in members.items()}
    words = ["--train-data", str(folder / "coco.json"), "--model", f"local-dir:{run_world / 'clip'}", "--workers", "0"]
    assert main(["features", *words, "--precision", "fp32", "--out", str(shards / "stored")]) == 0
    return found | {"features": shards / "stored"}


def opened(location: Path, **options) -> Samples:
    return Features(location, **options) if location.name == "stored" else open_pairs(location, **options)


def read(location: Path, **options) -> dict[int, list[dict]]:
    """Return the samples of each image in six epochs."""
    found: dict[int, list[dict]] = {}
    source = opened(location, shuffle=5, seed=3, repeat=True, **options)
    for sample, _ in zip(source, range(6 * len(CAPTIONS)), strict=False):
        found.setdefault(int(sample["key"][:2]), []).append(sample)
    return found


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", KINDS)
def test_every_source_gives_several_captions(kind, data):
    one, three = read(data[kind]), read(data[kind], captions=3)
    assert len(three) == len(CAPTIONS)
    for image, captions in enumerate(CAPTIONS):
        assert len(three[image]) == 6
        for single, sample in zip(one[image], three[image], strict=True):
            assert len(set(sample["captions"])) == len(sample["captions"]) == min(3, len(set(captions)))
            assert set(sample["captions"]) <= set(captions) and sample["captions"][0] == single["caption"]
            if kind == "features":
                assert torch.equal(sample["texts"][0], single["text"])
                assert len(sample["texts"]) == len(sample["captions"])
    changing = [len({tuple(sample["captions"]) for sample in samples}) > 1 for samples in three.values()]
    assert sum(changing) > len(CAPTIONS) / 2, "the same ones in every epoch"


def test_equal_keys_of_two_shards_are_two_images(data, tmp_path):
    shutil.copy(data["txt shards"], tmp_path / "copy.tar")
    samples = list(open_pairs(f"{data['txt shards']}::{tmp_path / 'copy.tar'}"))
    assert len({sample["key"] for sample in samples}) == len(CAPTIONS) == len(samples) / 2
    assert len({(sample["origin"], sample["key"]) for sample in samples}) == len(samples)


def relation(captions: list[list[str]], keys: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which pairs are an image with its own caption, and which with another's that is one of its own too."""
    texts = [(i, caption) for i, each in enumerate(captions) for caption in each]
    own = [[i == j for j, _ in texts] for i in range(len(captions))]
    same = [[caption in captions[i] or keys[i] == keys[j] for j, caption in texts] for i in range(len(captions))]
    return torch.tensor(own), torch.tensor(same) & ~torch.tensor(own)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "kind, changes",
    [
        ("coco", {"captions_per_image": 3}),
        ("features", {"captions_per_image": 3, "duplicates": "positive"}),
        ("json shards", {"captions_per_image": 2, "duplicates": "ignore", "no-lock-text": None}),
        ("csv", {"captions_per_image": 3, "duplicates": "positive", "loss": "sigmoid", "nouns": "words"}),
        ("txt shards", {"captions_per_image": 4, "duplicates": "ignore", "loss": "sigmoid"}),
        ("coco", {"duplicates": "positive"}),
        ("csv", {"duplicates": "ignore", "nouns": "words"}),
    ],
    ids=lambda x: "-".join(map(str, x.values())) if isinstance(x, dict) else x,
)
def test_a_step_is_that_of_the_reference(kind, changes, data, run_world, tmp_path):
    """The loss and its gradients are those of the formula in float64 for the pairs that the captions say."""
    given = {"features": data[kind], "train_data": "None"} if kind == "features" else {"train_data": data[kind]}
    given |= {"batch_size": 8, "accum_freq": 4, "train_num_samples": 32, "grad_clip_norm": "None"}
    run = Run(_parse(flags(run_world, tmp_path, **given, **changes), "pacl train"))
    batch, _ = next(run._batches())
    captions, keys = run._texts(batch), batch["key"]
    assert len(set(keys)) < len(keys) == 32, "no image is twice in the step"
    several = "captions_per_image" in changes
    assert several == any(len(each) > 1 for each in captions)
    pairs = zip(captions, captions_of(batch), strict=True)
    replaced = [x != y for texts, read in pairs for x, y in zip(texts, read, strict=True)]
    assert any(replaced) == ("nouns" in changes) and not all(replaced)

    model, towers = copy.deepcopy(run.model).double(), run.towers
    own, duplicate = relation(captions, keys)
    assert duplicate.any()
    with torch.no_grad():
        tokens = batch["tokens"] if kind == "features" else patch_tokens(towers.visual, batch["image"])
        ids = towers.tokenize(sum(captions, []))
        texts = None if run.model.text is not None else encode_text(towers.text, ids).double()
    duplicates = changes.get("duplicates", "negative")
    bias = torch.zeros(own.shape, dtype=torch.float64)
    expected = pacl_loss(
        model.embedder(tokens.double()),
        encode_text(model.text, ids) if texts is None else texts,
        model.log_scale.exp(),
        attn_temperature=0.05,
        form="cosine",
        loss=run.config.loss,
        logit_bias=model.bias,
        targets=(own | duplicate if duplicates == "positive" else own).double(),
        pair_bias=bias.masked_fill(duplicate, -torch.inf) if duplicates == "ignore" else bias,
    )
    expected.backward()
    torch.testing.assert_close(run._step(batch).double(), expected.detach(), rtol=1e-5, atol=1e-6)
    truth = dict(model.named_parameters())
    for name, x in run.model.named_parameters():
        scale = truth[name].grad.abs().max()
        torch.testing.assert_close(x.grad.double() / scale, truth[name].grad / scale, rtol=1e-3, atol=1e-4, msg=name)


def test_a_resumed_run_ends_with_the_same_bits(data, run_world, tmp_path, capsys):
    changes = {"train_data": data["coco"], "captions_per_image": 3, "duplicates": "positive", "nouns": "words"}
    changes |= {"batch_size": 4, "accum_freq": 3, "max_steps": 5, "save_frequency": 3, "workers": 1}
    assert train(run_world, tmp_path, **changes) == 0
    printed = capsys.readouterr().out
    assert "captions: at most 3 of an image in a step; equal ones are positives of both images\n" in printed
    whole = final(tmp_path)
    checkpoints(tmp_path / "pacl/checkpoints")[-1].unlink()
    assert final(tmp_path)["step"] == 3
    assert train(run_world, tmp_path, **changes, resume="latest") == 0
    assert_same_state(final(tmp_path), whole)
    for name, value in (("captions_per_image", 2), ("duplicates", "ignore")):
        assert train(run_world, tmp_path, **changes | {name: value, "max_steps": 6}, resume="latest") == 1
        flag = "--" + name.replace("_", "-")
        assert f"is of another run: {flag} was {changes[name]}, now {value}\n" in capsys.readouterr().err


# There the processes agree on a number of texts once; the numbers of several captions differ in every step.
AS_ON_A_GPU = """
import sys
from pacl.cli import main
from pacl_kernels.distributed import agreement
agreement.may_read = lambda device: False
sys.exit(main(["train", *sys.argv[1:]]))
"""


@pytest.mark.parametrize(
    "changes",
    [{"captions_per_image": 3}, {"captions_per_image": 3, "duplicates": "positive"}, {"duplicates": "ignore"}],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_two_processes_are_one(changes, data, run_world, tmp_path):
    """Two processes have the losses and the weights of one with the images of both. What is deprecated is an error."""
    warnings.simplefilter("error", FutureWarning)  # pytest restores the filters
    warnings.filterwarnings("error", category=DeprecationWarning, module="pacl")
    changes = {"train_data": data["folder"], "max_steps": 3, "log_every_n_steps": 1, "batch_size": 12} | changes
    changes["seed"] = 4  # the second step has more captions than the first
    assert train(run_world, tmp_path / "one", **changes) == 0
    (tmp_path / "as_on_a_gpu.py").write_text(AS_ON_A_GPU)
    changes |= {"batch_size": 3, "accum_freq": 2}
    status, printed = train_in(2, run_world, tmp_path / "two", [tmp_path / "as_on_a_gpu.py"], **changes)
    assert status == 0, printed[-4000:]
    one, two = (lines(tmp_path / name / "pacl/metrics.jsonl") for name in ("one", "two"))
    losses = [[row["train/loss"] for row in rows] for rows in (one, two)]
    assert len(losses[0]) == 3 and losses[1] == pytest.approx(losses[0], rel=1e-4)
    one, two = (final(tmp_path / name)["state_dict"] for name in ("one", "two"))
    for name, x in one.items():  # Adam turns the rounding of small gradients into steps
        torch.testing.assert_close(two[name], x, rtol=1e-3, atol=1e-5)


def test_a_checkpoint_without_these_flags(run_world, tmp_path, capsys):
    """An earlier version had one caption of an image, and its runs go on."""
    assert train(run_world, tmp_path, max_steps=1) == 0
    path = checkpoints(tmp_path / "pacl/checkpoints")[-1]
    state = torch.load(path, weights_only=True)
    for name in ("captions_per_image", "duplicates"):
        del state["run"]["flags"][name]
    torch.save(state, path)
    assert train(run_world, tmp_path, max_steps=2, resume="latest") == 0
    assert final(tmp_path)["resumed"] == [{"step": 1, "changed": {"max_steps": {"from": 1, "to": 2}}}]
    assert train(run_world, tmp_path, max_steps=3, resume="latest", captions_per_image=2) == 1
    assert "is of another run: --captions-per-image was 1, now 2" in capsys.readouterr().err


def test_without_these_flags_the_loss_gets_no_pairs():
    options = {"several": False, "group": None, "device": "cpu"}
    assert pair_options([["a"], ["a"]], ["x", "x"], "negative", **options) == {}
    assert text_id(" größe\n") == text_id("größe") != text_id("Größe") and 0 < text_id("größe") < 2**63
