"""`pacl evaluate retrieval` with several captions per image agrees with ranks counted one at a time."""

import json

import numpy as np
import pytest
import torch
from pacl.backbones import patch_tokens
from pacl.cli import main
from pacl.data.sources import open_pairs
from pacl.evaluate import scorer as scorer_module
from pacl.evaluate.metrics import RECALLS, Retrieval
from pacl.evaluate.retrieval import read_gallery
from pacl.evaluate.retrieval import retrieval as measure
from pacl.evaluate.scorer import Scorer
from pacl.sharing import load_pacl
from pacl.towers import load_towers
from pictures import encode, picture
from PIL import Image
from running import write_embedder
from torch.nn import functional as F

from pacl_kernels.reference import compatibility

torch.set_num_threads(1)
IMAGES = 24


def ranks(phi, captions, owners):
    """Return the rank of each image's best caption and of each caption's image; equal captions are not mistakes."""
    of = [{captions[t] for t in range(len(owners)) if owners[t] == i} for i in range(len(phi))]
    images, texts = [], []
    for i, row in enumerate(phi):
        best = max(row[t] for t in range(len(owners)) if owners[t] == i)
        images.append(sum(bool(row[t] >= best) for t in range(len(owners)) if captions[t] not in of[i]))
    for t, owner in enumerate(owners):
        rivals = [i for i in range(len(phi)) if i != owner and captions[t] not in of[i]]
        texts.append(sum(bool(phi[i, t] >= phi[owner, t]) for i in rivals))
    return images, texts


def recalls(phi, captions, owners):
    found = {}
    for way, each in zip(("image_to_text", "text_to_image"), ranks(phi, captions, owners), strict=True):
        found |= {f"{way}_R@{k}": float(np.mean([x < k for x in each])) for k in RECALLS}
    return found


@pytest.mark.parametrize("block", [1, 5, 24])
def test_several_captions_of_an_image(block):
    torch.manual_seed(0)
    owners = [i for i in range(IMAGES) for _ in range(1 + i % 5)]
    phi = (torch.randn(IMAGES, len(owners)) * 2).round() / 4  # many ties
    phi += 0.5 * F.one_hot(torch.tensor(owners), IMAGES).T
    captions = [f"caption {t % (len(owners) // 2)}" for t in range(len(owners))]  # each one twice
    found = Retrieval(captions, None, None, torch.device("cpu"), owners)
    for at in range(0, IMAGES, block):
        found.update(phi[at : at + block], at)
    expected = recalls(phi, captions, owners)
    assert found.values() == pytest.approx(expected)
    assert 0 < expected["image_to_text_R@1"] < expected["image_to_text_R@10"] < 1
    assert 0 < expected["text_to_image_R@1"] < expected["text_to_image_R@10"] < 1


@pytest.fixture(scope="module")
def world(untrained, tmp_path_factory):
    """Create an embedder with form and temperature other than the defaults on the untrained CLIP, and COCO captions."""
    folder = tmp_path_factory.mktemp("retrieval")
    torch.manual_seed(0)
    write_embedder(folder / "run/embedder", untrained / "clip", form="dot", attn_temperature=0.2)
    (folder / "val").mkdir()
    words = "red blue green gray small large round striped cat dog tree house car boat".split()
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for i in range(IMAGES):
        (folder / f"val/{i}.png").write_bytes(encode(picture(i, 64, 64), "PNG"))
        images.append({"id": i, "file_name": f"{i}.png"})
        texts = [" ".join(rng.choice(words, 3)) for _ in range(2 + i % 4)]
        annotations += [{"image_id": i, "caption": text} for text in texts]
    (folder / "val/7.png").write_bytes(b"no image")
    (folder / "captions_val.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return folder, annotations


def test_command_against_the_whole_matrix(world, tmp_path, capsys):
    folder, annotations = world
    words = ["evaluate", "retrieval", "--data", folder / "captions_val.json", "--checkpoint", folder / "run/embedder"]
    assert main([str(x) for x in [*words, "--plain", "--workers", 0, "--batch-size", 5, "--out", tmp_path]]) == 3
    said = capsys.readouterr().out
    towers, embedder = load_pacl(folder / "run/embedder")
    good = [i for i in range(IMAGES) if i != 7]
    captions = [x["caption"] for x in annotations if x["image_id"] != 7]
    owners = [good.index(x["image_id"]) for x in annotations if x["image_id"] != 7]

    with torch.no_grad():
        pixels = torch.stack([towers.transform(Image.open(folder / f"val/{i}.png")) for i in good])
        texts = towers.encode_text(towers.tokenize(captions))
        patches = embedder(patch_tokens(towers.visual, pixels))
        scores = {
            "phi": compatibility(patches, texts, attn_temperature=0.2, form="dot"),
            "plain": F.normalize(towers.visual(pixels), dim=-1) @ texts.T,
        }
    for name, matrix in scores.items():
        row = json.loads((tmp_path / f"captions-val_clip_run_retrieval-{name}.json").read_text())
        expected = recalls(matrix, captions, owners)
        assert row["metrics"] == pytest.approx(
            {
                f"{what}_retrieval_recall@{k}": expected[f"{way}_R@{k}"]
                for what, way in (("image", "text_to_image"), ("text", "image_to_text"))
                for k in RECALLS
            }
        )
        assert (row["images"], row["texts"], row["skipped"]) == (23, len(captions), {"image": 1})
        assert (row["task"], row["embedder"]) == ("zeroshot_retrieval", "run")
        assert f"captions_val retrieval {name}: image_retrieval_recall@1 " in said
    assert row["protocol"] == {"name": "retrieval plain"}
    row = json.loads((tmp_path / "captions-val_clip_run_retrieval-phi.json").read_text())
    assert row["protocol"] == {"name": "retrieval phi", "form": "dot", "attn_temperature": 0.2}


def test_blocks_and_workers_change_nothing(world, monkeypatch):
    folder, _ = world
    towers, embedder = load_pacl(folder / "run/embedder")
    data = open_pairs(folder / "captions_val.json", transform=towers.transform)
    scorer = Scorer(towers, embedder)
    whole = measure(data, read_gallery(data), scorer)
    monkeypatch.setattr(scorer_module, "SCORES", 150)  # two images at a time
    images = torch.zeros(5, 3, 64, 64)
    assert [len(x) for x in scorer.blocks(images, towers.embed(["a"] * 70))] == [2, 2, 1]
    data = open_pairs(folder / "captions_val.json", transform=towers.transform)
    assert measure(data, read_gallery(data, batch_size=4, workers=2), scorer, batch_size=4, workers=2) == whole


def test_one_caption_forms_and_errors(untrained, tmp_path, capsys):
    model = ["--model", f"local-dir:{untrained / 'clip'}", "--workers", "0", "--out", str(tmp_path)]
    assert main(["evaluate", "retrieval", "--data", "synthetic:eval", "--scenes", "30", *model]) == 0
    (path,) = tmp_path.iterdir()
    row = json.loads(path.read_text())
    assert (row["images"], row["texts"], row["embedder"]) == (30, 30, None)
    capsys.readouterr()
    assert main(["evaluate", "retrieval", "--data", "nowhere.json", "--model", "no-such-model"]) == 1
    assert "'nowhere.json' is not a file" in capsys.readouterr().err
    words = ["--scenes", "4", "--workers", "0", "--out", str(tmp_path / "random")]
    assert main(["evaluate", "retrieval", "--data", "synthetic:eval", *words]) == 1
    said = capsys.readouterr().err
    assert said.startswith("pacl: error: pretrained: got none for ViT-B-16, whose weights would be random; expected ")
    assert said.count("\n") == 1 and not (tmp_path / "random").exists()


def test_plain_needs_an_image_embedding():
    towers = load_towers("RN50", vision_model="vit_tiny_patch16_224", vision_pretrained=False)
    with pytest.raises(ValueError, match="plain: got True with vit_tiny.*, expected False"):
        Scorer(towers, plain=True)
