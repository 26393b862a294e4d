"""The whole demo at a tiny size: its files, the same numbers from the same seed, and the state after an interrupt."""

import dataclasses
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from dies import fork_pacl
from forks import status, wait_for
from pacl.backbones import patch_tokens
from pacl.cli import main
from pacl.data.scenes import CLASSES, COLOURS, HELD_OUT_LABELS, PAIRS, SEEN_LABELS
from pacl.data.shards import Shards
from pacl.demo.full import Models, SceneData, _galleries, one_shape_scenes, read_scenes
from pacl.demo.report import report
from pacl.demo.run import QUICK
from pacl.demo.toy_clip import new_clip, normalise, tokenizer
from pacl.demo.training import MEAN_POOLING, OnePatch, clip_config, embedder_config
from pacl.embedder import VisionEmbedder
from pacl.evaluate.metrics import ConfusionMatrix
from pacl.evaluate.specs import IGNORED
from pacl.segment.predict import Segmenter
from pacl.sharing import load_pacl
from pacl.towers import Towers
from pacl.training.model import Trainable
from pacl.training.trainer import Trainer
from pages import read
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from pacl_kernels.reference import compatibility

SCENES = QUICK["eval_scenes"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    """Run the demo with --full. test_same_seed_same_numbers compares it with a demo without that option."""
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    command = [sys.executable, "-m", "pacl", "demo", "--quick", "--out", str(out), "--full"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_metrics(finished):
    metrics = json.loads((finished[0] / "metrics.json").read_text())
    assert set(metrics) == {"clip", "pacl", "mean_pooling", "oracle", "seconds", "seed"}
    for method in ("clip", "pacl", "mean_pooling", "oracle"):
        for group in ("seen", "held_out"):
            assert set(metrics[method][group]) == {"miou", "patch_accuracy"}
            assert all(0 <= value <= 1 for value in metrics[method][group].values())
    assert metrics["oracle"]["seen"]["patch_accuracy"] == 1.0
    assert 0.7 < metrics["oracle"]["seen"]["miou"] < 1.0
    assert metrics["seed"] == 0 and metrics["seconds"] > 0


def test_table_and_progress(finished):
    out, printed = finished
    metrics = json.loads((out / "metrics.json").read_text())
    row = next(line for line in printed.splitlines() if line.startswith("PACL"))
    values = [metrics["pacl"][group][key] for group in ("seen", "held_out") for key in ("miou", "patch_accuracy")]
    assert row.split()[1:] == [f"{100 * value:.1f}" for value in values]
    for label in ("Plain CLIP", "Mean pooling", "Patch-grid limit", "Next:", "  report.html  full.json"):
        assert label in printed


def test_picture(finished):
    with Image.open(finished[0] / "segmentation.png") as picture:
        assert picture.format == "PNG" and min(picture.size) >= 500
        picture.load()


def test_the_command_to_type_next_works(finished, tmp_path):
    (line,) = [line for line in finished[1].splitlines() if line.startswith("  pacl look ")]
    assert main([*shlex.split(line)[1:-1], str(tmp_path)]) == 0
    assert len(list(tmp_path.glob("scene-*.png"))) >= 3


def test_no_temporary_files_are_left(finished):
    assert not [path for path in finished[0].rglob("*") if path.name.startswith(".")]


def test_saved_clip_opens_in_open_clip(finished):
    folder = finished[0] / "clip"
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    weights = load_file(folder / "open_clip_model.safetensors")
    assert torch.equal(model.state_dict()["visual.proj"], weights["visual.proj"])
    # A trained text tower tells the classes apart.
    with torch.no_grad():
        texts = model.encode_text(tokenizer()(list(CLASSES)), normalize=True)
    assert torch.linalg.matrix_rank(texts) > 10


def test_saved_embedder(finished, tmp_path):
    """The embedder finds its CLIP after the whole folder has moved."""
    shutil.copytree(finished[0], tmp_path / "moved", ignore=shutil.ignore_patterns("scenes"))
    towers, embedder = load_pacl(tmp_path / "moved/embedder")
    assert towers.names["model"] == f"local-dir:{tmp_path / 'moved/embedder/../clip'}"
    tokens = towers.tokens(towers.transform(Image.new("RGB", (64, 64)))[None])
    assert embedder(tokens).shape == (1, 64, 128)
    config = json.loads((finished[0] / "embedder" / "config.json").read_text())
    assert config["training"] == {"steps": 40, "planned_steps": 40, "seed": 0}
    assert (config["form"], config["attn_temperature"]) == ("cosine", 0.05)


def test_same_seed_same_numbers(finished, tmp_path):
    before = json.loads((finished[0] / "metrics.json").read_text())
    assert main(["demo", "--quick", "--out", str(tmp_path)]) == 0
    again = json.loads((tmp_path / "metrics.json").read_text())
    assert before | {"seconds": 0} == again | {"seconds": 0}
    for name in ("clip/open_clip_model.safetensors", "embedder/model.safetensors", "segmentation.png"):
        assert (finished[0] / name).read_bytes() == (tmp_path / name).read_bytes()


# --full


@pytest.fixture(scope="module")
def full(finished) -> dict:
    return json.loads((finished[0] / "full.json").read_text())


@pytest.fixture(scope="module")
def page(finished):
    return read((finished[0] / "report.html").read_bytes())


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def test_the_page_has_the_numbers_of_full_json(full, page):
    tables = {caption: {row[0]: row[1:] for row in rows[1:]} for caption, rows in page.tables.items()}
    groups = ("seen", "held_out", "backgrounds")
    methods = {"clip": "Plain CLIP", "mean_pooling": "Mean pooling", "pacl": "PACL"}
    scores = {"clip": "CLIP's image embedding", "clip_patches": "φ of CLIP's patches"}
    scores |= {"mean_pooling": "Mean pooling", "pacl": "φ of PACL"}
    for method, label in methods.items():
        patches, pixels, strides = (full[x][method] for x in ("patch_accuracy", "segmentation", "strides"))
        for key, words in (("all_classes", "all classes"), ("image_classes", "the image's classes")):
            row = tables[f"Patches right among {words}, percent"][label]
            assert row == [percent(patches[group][f"patch_accuracy_{key}"]) for group in groups]
        row = tables[f"mIoU of {SCENES} scenes, stride 1x, percent"][label]
        assert row == [percent(pixels["1"][group]) for group in groups]
        row = tables[f"mIoU of the first {SCENES // 3} scenes, by stride, percent"][label]
        assert row == [percent(strides[x][group]) for group in groups for x in ("1", "2", "4")]
    for tokens, label in {"vision": "CLIP's tokens", **methods}.items():
        expected = [percent(full["coherence"][tokens][group]["auc"]) for group in ("all", "seen", "held_out")]
        assert tables["AUC, percent"][label] == expected
    for score, label in scores.items():
        expected = [percent(full["classification"][score][group]) for group in ("all", "seen", "held_out")]
        assert tables["Top-1 accuracy, percent"][label] == expected
        for name, words in (("all", "all"), ("seen", "seen pairs"), ("held_out", "held-out pairs")):
            (table,) = [rows for caption, rows in tables.items() if caption.startswith(f"{words}: ")]
            found = full["retrieval"][name][score]
            ways = ("text_to_image", "image_to_text")
            assert table[label] == [percent(found[f"{way}_R@{k}"]) for way in ways for k in (1, 5, 10)]
    assert "too short to learn anything" in page.text


def test_full_agrees_with_the_demo_s_own_measures(finished, full):
    metrics = json.loads((finished[0] / "metrics.json").read_text())
    for method in ("clip", "mean_pooling", "pacl"):
        for group in ("seen", "held_out"):
            found = full["patch_accuracy"][method][group]["patch_accuracy_all_classes"]
            assert found == pytest.approx(metrics[method][group]["patch_accuracy"], abs=1e-3)
            found = full["segmentation"][method]["1"][group]
            assert found == pytest.approx(metrics[method][group]["miou"], abs=1e-3)


def test_strides_are_the_segmenter_s(finished, full):
    scenes = list(itertools.islice(Shards(finished[0] / "scenes/eval-000.tar", masks=True), SCENES // 3))
    for stride in (1, 2):
        segmenter = Segmenter(*load_pacl(finished[0] / "embedder"), stride=stride)
        texts, matrix = segmenter.texts(CLASSES, ["{}"]), ConfusionMatrix(len(CLASSES))
        for scene in scenes:
            matrix.update(scene["mask"], segmenter.labels(to_pil_image(scene["image"]), texts))
        for group, labels in {"seen": SEEN_LABELS, "held_out": HELD_OUT_LABELS}.items():
            assert full["strides"]["pacl"][str(stride)][group] == pytest.approx(matrix.miou(labels), abs=1e-9)
    assert full["strides"]["pacl"]["4"] != full["strides"]["pacl"]["2"] != full["strides"]["pacl"]["1"]


def test_pictures_of_the_page(page):
    names = ("image", "truth", "clip", "mean_pooling", "pacl", "PACL 2x", "PACL 4x")
    first = {name: page.images[f"{name}: pairs seen in training"] for name in names}
    assert all(image.size == (192, 192) for image in first.values())
    assert len({image.tobytes() for image in first.values()}) == len(names)
    for words in ("ROC curves, all", "ROC curves, held-out pairs", "patch accuracy of every class"):
        assert words in page.images


def test_one_shape_scenes_and_their_accuracy(finished, full):
    """The accuracy equals a count over single images with open_clip's own model."""
    model = open_clip.create_model(f"local-dir:{finished[0] / 'clip'}").eval()
    scenes = one_shape_scenes(lambda image: normalise(pil_to_tensor(image)), 2, 0)
    assert [label for _, label in scenes] == [label for label in range(18) for _ in range(2)]
    with torch.no_grad():
        texts = model.encode_text(tokenizer()(list(CLASSES[:18])), normalize=True)
        images = model.encode_image(torch.stack([image for image, _ in scenes]), normalize=True)
    hits = (images @ texts.T).argmax(1) == torch.tensor([label for _, label in scenes])
    found = full["classification"]
    assert found["images"] == 36 and found["clip"]["all"] == pytest.approx(hits.double().mean().item())
    held_out = torch.tensor([label in HELD_OUT_LABELS for _, label in scenes])
    assert found["clip"]["held_out"] == pytest.approx(hits[held_out].double().mean().item())
    # Every image shows its own pair: its colour covers more pixels than any other.
    for image, label in scenes[::2]:
        pixels = (image * 0.27 + 0.45).permute(1, 2, 0)  # about 0 to 1
        colours = {name: torch.tensor(rgb) / 255 for name, rgb in COLOURS.items()}
        near = {name: int(((pixels - rgb).abs().amax(-1) < 0.15).sum()) for name, rgb in colours.items()}
        assert max(near, key=near.get) == PAIRS[label][0]


def test_galleries_of_seen_and_held_out_pairs(finished, full):
    scenes = read_scenes([finished[0] / "scenes/eval-000.tar"])
    galleries = _galleries(scenes)
    assert len(galleries["all"]) == SCENES and len(galleries["seen"]) == len(galleries["held_out"]) > 10
    held_out = ("red striped", "yellow dotted", "blue plain")
    assert all(any(x in scene.captions.decode() for x in held_out) for scene in galleries["held_out"])
    data = SceneData(galleries["seen"])
    for i, scene in enumerate(galleries["seen"]):
        assert "shape" in scene.captions.decode() and not set(HELD_OUT_LABELS) & set(data[i][1].ravel().tolist())
    assert full["retrieval"]["seen"]["images"] == full["retrieval"]["held_out"]["images"] == len(galleries["seen"])
    only = SceneData(scenes, HELD_OUT_LABELS)
    found = {x for i in range(SCENES) for x in only[i][1].ravel().tolist()}
    assert found == {IGNORED, *HELD_OUT_LABELS}


def test_the_control_scores_as_it_was_trained():
    torch.manual_seed(0)
    clip, texts = new_clip().eval(), F.normalize(torch.randn(5, 128), dim=-1)
    towers = Towers(clip.visual, clip.transformer, None, None, {"vision_model": None})
    temperatures = {"pacl": 0.05, "mean_pooling": MEAN_POOLING}
    embedders = {name: VisionEmbedder(128, 128, attn_temperature=x) for name, x in temperatures.items()}
    models = Models(towers, embedders)
    images = torch.randn(4, 3, 64, 64)
    (found,) = models.scorer("mean_pooling").blocks(images, texts)
    patches = F.normalize(embedders["mean_pooling"](patch_tokens(clip.visual, images)), dim=-1)
    assert torch.allclose(found, F.normalize(patches.mean(1), dim=-1) @ texts.T, atol=1e-4)
    (found,) = models.scorer("pacl").blocks(images, texts)
    patches = embedders["pacl"](patch_tokens(clip.visual, images))
    assert torch.allclose(found, compatibility(patches, texts, attn_temperature=0.05, form="cosine"), atol=1e-5)


@pytest.mark.parametrize("what", ["clip", "mean_pooling"])
def test_the_loop_s_losses_are_open_clip_s(what):
    """PACL with one patch has the loss and gradients of CLIP, and PACL at a high temperature those of mean pooling."""
    torch.manual_seed(0)
    tokens, texts = torch.randn(8, 5, 16), F.normalize(torch.randn(8, 32), dim=-1)
    if what == "clip":
        settings = clip_config(1, 8)
        model = OnePatch(new_clip().eval())
        pairs = {"images": torch.randn(8, 3, 64, 64), "texts": tokenizer()(list(CLASSES[:8]))}
        expected = open_clip.ClipLoss()(*model.clip(*pairs.values()))
    else:
        settings = embedder_config(1, 8, attn_temperature=MEAN_POOLING)
        model = Trainable(VisionEmbedder(16, 32), settings)
        pairs = {"images": tokens, "texts": texts}
        pooled = F.normalize(F.normalize(model.embedder(tokens), dim=-1).mean(1), dim=-1)
        expected = open_clip.ClipLoss()(pooled, texts, model.log_scale.exp())
    expected.backward()
    parameters = [x for x in model.parameters() if x.grad is not None]
    gradients = [x.grad.clone() for x in parameters]
    trainer = Trainer(model, dataclasses.replace(settings, grad_clip_norm=None), 1)
    torch.testing.assert_close(trainer.step(0, pairs), expected.detach(), rtol=1e-4, atol=1e-5)
    for x, gradient in zip(parameters, gradients, strict=True):
        assert (x.grad - gradient).norm() <= 1e-3 * gradient.norm() + 1e-7


def test_without_matplotlib_the_page_says_so(full, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    found = read(report(full, []).render())
    assert "No plot of ROC curves, all: matplotlib is not installed" in found.text
    assert not found.images and "Top-1 accuracy, percent" in found.tables


def interrupt(out: Path, at: str, output: Path, *options: str) -> str:
    """Start the demo, press Ctrl-C when a progress line starts with `at`, and return what the demo printed."""
    # Tests started in the background ignore Ctrl-C, which their children would inherit.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = fork_pacl(["demo", "--quick", "--out", out, *options], output)
    signal.signal(signal.SIGINT, handler)
    wait_for(f"\n{at}", output)
    os.kill(process, signal.SIGINT)
    assert status(process) == 130
    return output.read_text()


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGINT to a child process")
def test_interrupt_keeps_the_clip_and_leaves_a_complete_run_alone(finished, tmp_path):
    out = finished[0]
    files = ("metrics.json", "segmentation.png", "clip/open_clip_model.safetensors", "embedder/model.safetensors")
    complete = {name: (out / name).read_bytes() for name in files}
    printed = interrupt(out, "CLIP: 5/50", tmp_path / "printed", "--clip-steps", "50")
    assert "Interrupted. Kept:" in printed and "of 50 steps" in printed
    kept = out / "interrupted"
    steps = json.loads((kept / "clip" / "open_clip_config.json").read_text())["training"]["steps"]
    assert 5 <= steps < 50
    trained = open_clip.create_model(f"local-dir:{kept / 'clip'}").state_dict()
    assert not torch.equal(trained["visual.proj"], load_file(out / "clip/open_clip_model.safetensors")["visual.proj"])
    assert not (kept / "embedder").exists()
    assert {name: (out / name).read_bytes() for name in files} == complete


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGINT to a child process")
def test_interrupt_keeps_the_embedder(tmp_path):
    steps = ["--clip-steps", "2", "--embedder-steps", "400"]
    printed = interrupt(tmp_path, "PACL: 40/400", tmp_path / "printed", *steps)
    assert "PACL" in printed and "of 400 steps" in printed
    notes = json.loads((tmp_path / "interrupted/embedder/config.json").read_text())["training"]
    assert 40 <= notes["steps"] < 400 and notes["planned_steps"] == 400
    VisionEmbedder.from_pretrained(tmp_path / "interrupted/embedder")
    assert (tmp_path / "interrupted/clip/open_clip_model.safetensors").exists()
    assert not (tmp_path / "metrics.json").exists()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (["--seed", "-1"], "seed: got -1, expected at least 0"),
        (["--clip_steps", "0"], "clip_steps: got 0, expected an integer of at least 1"),
        (["--seed", "x"], "Error parsing --seed"),
    ],
)
def test_bad_arguments(argument, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--out", str(tmp_path), *argument])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_out_must_be_a_folder(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        main(["demo", "--out", str(tmp_path / "file")])
    assert "is a file, expected a folder" in capsys.readouterr().err
    assert main(["demo", "--quick", "--out", str(tmp_path / "file" / "below")]) == 1
    assert "pacl: error:" in capsys.readouterr().err
