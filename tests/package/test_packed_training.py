"""`--max-patches`: features and training with a different number of patches for each image, without padding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import tower_steps
from forks import run_ranks
from pacl.backbones import NAFLEX_VITS, patch_tokens
from pacl.cli import main
from pacl.data.features import Features
from pacl.data.samples import loader
from pacl.embedder import VisionEmbedder
from pacl.evaluate.metrics import ConfusionMatrix
from pacl.segment.predict import Segmenter
from pacl.sharing import load_pacl
from pacl.towers import load_towers
from pacl.training.checkpoints import checkpoints, load_checkpoint
from pacl.training.config import TrainConfig
from pacl.training.log import pair_statistics
from pacl.training.model import Trainable
from pacl.training.trainer import Trainer
from PIL import Image
from running import assert_same_state, final, lines
from safetensors.torch import load_file
from small_towers import naflex, save_naflex
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torchvision.transforms.functional import pil_to_tensor

from pacl_kernels import compatibility

pytestmark = pytest.mark.skipif(not NAFLEX_VITS, reason="this timm has no NaFlex ViT")
IMAGES, MOST = 14, 11


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def world(tower_world, tmp_path_factory) -> Path:
    """Create pictures of different shapes with captions and masks, two towers, and float32 features of the pictures."""
    folder = tmp_path_factory.mktemp("packed")
    save_naflex(folder / "naflex")
    (folder / "clip").symlink_to(tower_world / "clip")
    (folder / "images").mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(IMAGES):
        width, height = torch.randint(16, 160, (2,), generator=generator).tolist()
        colours = torch.randint(0, 255, (4, 4, 3), generator=generator, dtype=torch.uint8).numpy()
        Image.fromarray(colours).resize((width, height)).save(folder / f"images/{i:02}.png")
        Image.fromarray(colours[..., 0] % 2).resize((width, height)).save(folder / f"images/{i:02}.mask.png")
        (folder / f"images/{i:02}.txt").write_text("".join(f"picture {i} again {j}\n" for j in range(1 + i % 2)))
    (folder / "classes.txt").write_text("red\nblue\n")
    assert features(folder, folder / "stored") == 0
    return folder


def command(name: str, world: Path, values: dict) -> int:
    values = {"train_data": world / "images", **towers(world), "max_patches": MOST, "workers": 0} | values
    return main([name, *words(values)])


def words(values: dict) -> list[str]:
    return [word for key, x in values.items() if x is not None for word in (f"--{key}", str(x))]


def towers(world: Path) -> dict:
    return {"model": f"local-dir:{world / 'clip'}", "vision_model": f"local-dir:{world / 'naflex'}"}


def train(world: Path, logs: Path, **changes) -> int:
    return command("train", world, options(logs) | changes)


def options(logs: Path) -> dict:
    values = {"log_dir": logs, "batch_size": 3, "accum_freq": 2, "max_steps": 5, "log_every_n_steps": 1}
    return values | {"report_to": "none"}


def stored_in(world: Path) -> dict:
    """Return flags that replace the images by their features."""
    return {"train_data": None, "features": world / "stored"}


def losses(logs: Path) -> list[float]:
    return [line["train/loss"] for line in lines(logs / "pacl/metrics.jsonl")]


def features(world: Path, out: Path, **changes) -> int:
    return command("features", world, {"out": out, "precision": "fp32", "batch_size": 4, "shard_size": 5} | changes)


def test_features_store_the_tokens_of_each_image(world):
    mine = load_towers(**towers(world), max_patches=MOST)
    stored = {sample["key"]: sample for sample in Features(world / "stored")}
    assert len(stored) == IMAGES
    lengths = set()
    for key, sample in stored.items():
        with Image.open(world / "images" / f"{Path(key).stem}.png") as picture, torch.no_grad():
            expected = patch_tokens(mine.visual, mine.transform(picture)[None])[0]
        assert sample["length"] == len(expected) <= MOST
        torch.testing.assert_close(sample["tokens"], expected, rtol=1e-4, atol=2e-5)
        lengths.add(len(expected))
    assert len(lengths) == 3
    rows = sum(len(load_file(path)["tokens"]) for path in (world / "stored").glob("features-*"))
    assert rows == sum(sample["length"] for sample in stored.values())
    batch = next(iter(loader(Features(world / "stored", captions="all"), 6)))
    assert batch["tokens"].shape == (batch["length"].sum(), 32) and len(batch["texts"]) == 9
    assert torch.equal(batch["tokens"], torch.cat([stored[key]["tokens"] for key in batch["key"]]))


def test_both_kinds_of_features_in_a_folder_are_an_error(world, tmp_path, capsys):
    assert features(world, tmp_path / "fixed", max_patches=None, force_image_size=48) == 0
    names = ("features-00001.safetensors", "manifest.json")
    manifests = [json.loads((folder / names[1]).read_text()) for folder in (world / "stored", tmp_path / "fixed")]
    sizes = [manifest["shards"][1] for manifest in manifests]
    assert [size["count"] for size in sizes] == [5, 5] and sizes[0]["bytes"] != sizes[1]["bytes"]
    assert "max_patches" not in manifests[1]["plan"]
    for number, (given, other, message) in enumerate(
        (
            (tmp_path / "fixed", world / "stored", "has a number of patches for each image .*, expected one number"),
            (world / "stored", tmp_path / "fixed", "has one number of patches, expected a number of patches for each"),
        )
    ):
        mixed = tmp_path / f"mixed-{number}"
        mixed.mkdir()
        for path in given.iterdir():
            (mixed / path.name).write_bytes(path.read_bytes())
        (mixed / names[0]).write_bytes((other / names[0]).read_bytes())
        manifest = json.loads((mixed / names[1]).read_text())
        manifest["shards"][1]["bytes"] = (mixed / names[0]).stat().st_size
        del manifest["sha256"]
        (mixed / names[1]).write_text(json.dumps(manifest))
        with pytest.raises(ValueError, match=message):
            Features(mixed)
    # A folder that was begun with one kind is not continued with the other.
    assert features(world, world / "stored", max_patches=None) == 1
    assert f"was begun with another max_patches ({MOST}, now None), expected" in capsys.readouterr().err


def test_a_step_is_that_on_padding_with_a_mask(world):
    """Both trainers take the same steps, one on packed tokens in micro-batches, one on padded tokens at once."""
    samples = list(Features(world / "stored", shuffle=1))
    texts = torch.stack([sample["text"] for sample in samples])
    tokens, lengths = [sample["tokens"] for sample in samples], torch.tensor([x["length"] for x in samples])
    trainers, found = [], []
    for micro_batch in (4, IMAGES):
        config = TrainConfig(train_data="none", batch_size=micro_batch, lr=0.1, eps=0.1, learn_attn_temperature=True)
        torch.manual_seed(0)
        model = Trainable(VisionEmbedder(32, 48), config)
        trainers.append(Trainer(model, config, 3))
    mask = pad_sequence([torch.ones(len(x), dtype=torch.bool) for x in tokens], batch_first=True)
    inputs = (
        ({"images": torch.cat(tokens), "texts": texts, "lengths": lengths}, {}),
        ({"images": pad_sequence(tokens, batch_first=True), "texts": texts}, {"patch_mask": mask}),
    )
    for trainer, (pairs, options) in zip(trainers, inputs, strict=True):
        found.append([trainer.step(i, pairs, options=options) for i in range(3)])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
    assert found[0][2] != found[0][0]
    for name, x in trainers[1].model.state_dict().items():
        torch.testing.assert_close(trainers[0].model.state_dict()[name], x, rtol=1e-4, atol=1e-5, msg=name)


def test_statistics_of_packed_patches_are_those_of_each_image():
    torch.manual_seed(0)
    lengths, texts = torch.tensor([3, 1, 5]), torch.randn(3, 8)
    patches = torch.randn(9, 8)
    found = pair_statistics(patches, texts, 0.2, "dot", lengths)
    each = [
        pair_statistics(rows[None], text[None], 0.2, "dot")
        for rows, text in zip(patches.split(lengths.tolist()), texts, strict=True)
    ]
    mean = sum(one["similarity"] * n for one, n in zip(each, lengths, strict=True)) / 9
    torch.testing.assert_close(found["similarity"], mean)
    entropies = [one["attention_entropy"] for one in each if "attention_entropy" in one]
    torch.testing.assert_close(found["attention_entropy"], sum(entropies) / 2)
    s = torch.cat([F.cosine_similarity(x, t[None]) for x, t in zip(patches.split([3, 1, 5]), texts, strict=True)])
    torch.testing.assert_close(found["similarity_p99"], s.kthvalue(9).values)
    assert "attention_entropy" not in pair_statistics(patches, texts, 0.2, "max", lengths)


def test_features_train_as_the_images_do(world, tmp_path):
    """Read in another process, and with all captions of an image."""
    changes = {"captions_per_image": 2, "duplicates": "positive", "loss": "sigmoid", "coherence_loss": 2}
    assert train(world, tmp_path / "images", **changes, workers=1) == 0
    assert train(world, tmp_path / "stored", **stored_in(world), **changes) == 0
    assert len(losses(tmp_path / "images")) == 5
    assert losses(tmp_path / "stored") == pytest.approx(losses(tmp_path / "images"), rel=1e-5)


def test_validation_is_that_of_each_image(world, tmp_path):
    flags = {"val_data": world / "images", "val_segmentation": world / "images", "val_classes": world / "classes.txt"}
    assert train(world, tmp_path, **stored_in(world), **flags) == 0
    result = lines(tmp_path / "pacl/results.jsonl")[-1]
    towers, embedder = load_pacl(tmp_path / "pacl")
    captions = [(world / f"images/{i:02}.txt").read_text().splitlines() for i in range(IMAGES)]
    phi, counts, segmenter = [], ConfusionMatrix(2), Segmenter(towers, embedder)
    with torch.no_grad():
        texts = towers.encode_text(towers.tokenize(sum(captions, [])))
        classes = segmenter.texts(["red", "blue"], ["{}"])
        for i in range(IMAGES):
            with Image.open(world / f"images/{i:02}.png") as picture, mask_of(world, i) as mask:
                patches = embedder(towers.tokens(towers.transform(picture)[None]))
                counts.update(pil_to_tensor(mask)[0], segmenter.labels(picture, classes).cpu())
            phi.append(compatibility(patches, texts, attn_temperature=0.05, form="cosine")[0])
    own = torch.tensor([i for i, each in enumerate(captions) for _ in each])
    ranks = (own[torch.stack(phi).argsort(1, descending=True)] == torch.arange(IMAGES)[:, None]).float().argmax(1)
    for k in (1, 5, 10):
        assert result[f"image_to_text_R@{k}"] == pytest.approx((ranks < k).float().mean().item(), abs=1e-6)
    assert result["mIoU"] == pytest.approx(counts.miou(), abs=1e-3)
    arguments = ["--data", str(world / "images"), "--checkpoint", str(tmp_path / "pacl"), "--workers", "0"]
    assert main(["evaluate", "retrieval", *arguments, "--out", str(tmp_path / "results")]) == 0
    measured = json.loads(next((tmp_path / "results").glob("*.json")).read_text())
    assert measured["metrics"]["text_retrieval_recall@5"] == pytest.approx(result["image_to_text_R@5"], abs=1e-6)


def mask_of(world: Path, i: int) -> Image.Image:
    return Image.open(world / f"images/{i:02}.mask.png")


def test_a_resumed_run_ends_with_the_same_bits(world, tmp_path):
    flags = {**stored_in(world), "save_frequency": 3}
    assert train(world, tmp_path, **flags) == 0
    whole = final(tmp_path)
    checkpoints(tmp_path / "pacl/checkpoints")[-1].unlink()
    assert final(tmp_path)["step"] == 3
    assert train(world, tmp_path, **flags, resume="latest") == 0
    assert_same_state(final(tmp_path), whole)


def test_two_processes_are_one(world, tmp_path):
    """On features, where they share the images of a step, and with trained towers and micro-batches of images."""
    trained = options(tmp_path) | towers(world) | {"max_patches": MOST, "train_data": "synthetic", "workers": 0}
    trained |= {"train_num_samples": 12, "lock_text": False, "lock_image_unlocked_groups": 1, "device": "cpu"}
    trained |= {"lr": 0.1, "eps": 0.1, "name": "trained"}
    runs = {
        "one": {"batch_size": 12, "accum_freq": 1},
        "two": {"batch_size": 3, "accum_freq": 2},
    }
    states = {}
    for name, changes in runs.items():
        arguments = trained | changes | {"log_dir": str(tmp_path / name)}
        if name == "two":
            status, printed = run_ranks([tower_steps.__file__, json.dumps(arguments)], 2, tmp_path / "printed")
            assert status == 0, printed[-3000:]
        else:
            tower_steps.main(arguments)
        states[name] = load_checkpoint(checkpoints(tmp_path / name / "trained/checkpoints")[-1])["state_dict"]
    before = naflex().state_dict()
    for name, x in states["one"].items():
        torch.testing.assert_close(states["two"][name], x, rtol=1e-4, atol=1e-5, msg=name)
    assert not torch.equal(states["one"]["visual.blocks.1.mlp.fc1.weight"], before["blocks.1.mlp.fc1.weight"])
    assert train(world, tmp_path / "stored", **stored_in(world), shuffle=1) == 0
    flags = options(tmp_path / "shared") | stored_in(world) | {"accum_freq": 1, "shuffle": 1, "workers": 0}
    status, printed = run_ranks(["-m", "pacl", "train", *words(flags)], 2, tmp_path / "printed")
    assert status == 0, printed[-3000:]
    assert losses(tmp_path / "shared") == pytest.approx(losses(tmp_path / "stored"), rel=1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"vision_model": None}, "max_patches: got 11 for local-dir:"),
        ({"force_image_size": 64}, "max_patches: got 11 with force_image_size 64, expected only one of them"),
        ({"max_patches": 0}, "max_patches: got 0, expected"),
        ({"features": True, "max_patches": 12}, "images have at most 12 patches (--max-patches), not at most 11"),
    ],
)
def test_errors_are_one_line(changes, message, world, tmp_path, capsys):
    changes |= stored_in(world) if changes.pop("features", False) else {}
    assert train(world, tmp_path, **changes) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and message in error[0]
