"""Towers: which parts are trained, what their fingerprint tells apart, and what a wrong or malicious name does."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import subprocess
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import tower_steps
from pacl import sharing
from pacl.cli import main
from pacl.data import scenes
from pacl.data.scene_shards import write_scenes
from pacl.embedder import VisionEmbedder, save_embedder
from pacl.sharing import _absolute, check_towers, describe_towers, load_pacl
from pacl.towers import load_towers, quick_gelu
from pacl.training.checkpoints import checkpoints, load_checkpoint
from pacl.training.config import TrainConfig
from pacl.training.model import Trainable
from PIL import Image
from running import RANKS
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
SIZES = {
    "embed_dim": 48,
    "vision_cfg": {"image_size": 64, "patch_size": 8, "width": 64, "layers": 3, "head_width": 32},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
CHANGES = {"no-lock-text": None, "lock-image-unlocked-groups": 1}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """An untrained CLIP and 24 scenes."""
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    (folder / "clip").mkdir()
    (folder / "clip/open_clip_config.json").write_text(json.dumps({"model_cfg": SIZES, "preprocess_cfg": {}}))
    save_file(open_clip.CLIP(**copy.deepcopy(SIZES)).state_dict(), folder / "clip/open_clip_model.safetensors")
    write_scenes(folder / "scenes", "train", 24, seed=0, pairs=scenes.SEEN)
    return folder


def train(world: Path, logs: Path, **changes) -> int:
    values = {
        "train-data": world / "scenes/train-000.tar",
        "model": f"local-dir:{world / 'clip'}",
        "log-dir": logs,
        "batch-size": 8,
        "max-steps": 4,
        "workers": 0,
        "report-to": "none",
    }
    words = [
        x for name, value in (values | changes).items() for x in ([f"--{name}"] + [str(value)] * (value is not None))
    ]
    return main(["train", *words])


def change_config(folder: Path, **changes) -> None:
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    for name, value in changes.items():
        config["model_cfg" if name == "quick_gelu" else "preprocess_cfg"][name] = value
    path.write_text(json.dumps(config))


# Which towers


def test_a_clips_text_beside_a_timm_vision_tower(world):
    clip = open_clip.create_model(f"local-dir:{world / 'clip'}").eval()
    options = {"vision_pretrained": False, "force_image_size": 96}
    towers = load_towers(f"local-dir:{world / 'clip'}", vision_model="test_vit", **options)
    ids = towers.tokenize(["a red ball"])
    assert ids.shape == (1, 24)
    torch.testing.assert_close(towers.encode_text(ids), clip.encode_text(ids, normalize=True))
    # timm's own mean and deviation, which for this model are not CLIP's.
    image = towers.transform(Image.new("RGB", (120, 100), (255, 0, 51)))
    mean, std = (torch.tensor(towers.visual.pretrained_cfg[name]) for name in ("mean", "std"))
    torch.testing.assert_close(image[:, 50, 50], (torch.tensor([1.0, 0.0, 0.2]) - mean) / std)
    assert not torch.allclose(mean, torch.tensor(open_clip.OPENAI_DATASET_MEAN), atol=0.01)
    assert image.shape == (3, 96, 96) and towers.tokens(image[None]).shape == (1, 36, 64)
    assert towers.widths == (64, 48) and towers.trained == []


def test_a_convolutional_tower_takes_the_size_asked_for(world):
    options = {"vision_model": "test_convnext", "vision_pretrained": False, "force_image_size": 64}
    towers = load_towers(f"local-dir:{world / 'clip'}", **options)
    image = towers.transform(Image.new("RGB", (120, 100)))
    assert towers.tokens(image[None]).shape[:2] == (1, 4) and not towers.visual.training


def test_quick_gelu_is_that_of_the_weights():
    assert quick_gelu("ViT-B-16", "openai") and quick_gelu("ViT-B-16-quickgelu", "openai")
    assert not quick_gelu("ViT-B-16", "laion2b_s34b_b88k") and not quick_gelu("ViT-B-16", None)
    with pytest.raises(ValueError, match="which is no file and no tag of ViT-B-32-quickgelu"):
        quick_gelu("ViT-B-32-quickgelu", "laion2b_s34b_b79k")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": "ViT-B-61"}, "model: got 'ViT-B-61', which open_clip does not know; it knows ViT-B-16"),
        (
            {"model": "ViT-B-32", "pretrained": "opnai"},
            "pretrained: got 'opnai', which is no file and no tag of ViT-B-32; it has openai",
        ),
        ({"pretrained": "openai"}, "which brings weights of its own"),
        (
            {"vision-model": "vit_bas_patch16_224"},
            "vision_model: got 'vit_bas_patch16_224', which timm does not know; it knows vit_base",
        ),
        (
            {"vision-model": "vit_base_patch16_224.dinno"},
            "of which timm has no weights; it has vit_base_patch16_224.dino",
        ),
        (
            {"vision-model": "resnet10t", "no-vision-pretrained": None, "force-image-size": -3},
            "force_image_size: got -3",
        ),
        ({"vision-model": "test_efficientnet", "no-vision-pretrained": None}, "visual: got EfficientNet, expected"),
        (
            {"vision-model": "test_vit", "no-vision-pretrained": None, "force-image-size": 50},
            "force_image_size: got 50, expected a multiple of 16",
        ),
        ({"lock-image-unlocked-groups": 4}, "lock_image_unlocked_groups: got 4, expected at most the 3 blocks"),
        (
            {"lock-image-unlocked-groups": 1, "no-lock-image": None},
            "lock_image_unlocked_groups: got it with no_lock_image",
        ),
        ({"grad-checkpointing": None}, "grad_checkpointing: got True, but every tower is locked"),
        ({"tower-lr": 1e-5}, "tower_lr: got 1e-05, but every tower is locked"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_wrong_names_are_one_line(changes, message, world, tmp_path, capsys):
    assert train(world, tmp_path, **changes) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("pacl: error: ") and message in error


class Malicious:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


@pytest.mark.parametrize("how", ["pretrained", "folder", "zip"])
def test_nothing_is_unpickled(how, world, tmp_path, capsys, monkeypatch):
    """A pickle offered as weights, as a file or in a model's folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world / "clip", "clip")
    if how == "folder":
        Path("clip/open_clip_model.safetensors").unlink()
        torch.save({"state_dict": Malicious()}, "clip/open_clip_pytorch_model.bin")
        assert train(world, tmp_path, model="local-dir:clip") == 1
    else:
        torch.save(Malicious(), "weights.pt") if how == "zip" else Path("weights.pt").write_bytes(
            pickle.dumps(Malicious())
        )
        assert train(world, tmp_path, model=_registered(tmp_path), pretrained="weights.pt") == 1
        assert "pretrained: open_clip cannot load 'weights.pt' into tiny: " in capsys.readouterr().err
    assert not Path("executed").exists(), "something was executed"


def _registered(folder: Path) -> str:
    """SIZES under a name that open_clip knows."""
    (folder / "tiny.json").write_text(json.dumps(SIZES))
    open_clip.add_model_config(folder / "tiny.json")
    return "tiny"


def test_weights_from_a_file(tmp_path):
    name = _registered(tmp_path)
    model = open_clip.create_model(name)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    towers = load_towers(name, str(tmp_path / "w.pt"))
    ids = towers.tokenize(["a ball"])
    torch.testing.assert_close(towers.encode_text(ids), model.eval().encode_text(ids, normalize=True))


def test_towers_without_weights_are_the_same_in_every_run(world, tmp_path):
    """And so in every process, and on resuming."""
    for name in ("one", "two"):
        torch.rand(len(name) * len(list(tmp_path.iterdir())))
        assert train(world, tmp_path, name=name, model=_registered(world), **{"max-steps": 1}) == 0
    one, two = (json.loads((tmp_path / name / "embedder/config.json").read_text())["towers"] for name in ("one", "two"))
    assert one == two


# Which parts are trained


def grads(towers) -> dict[str, torch.Tensor]:
    """Gradients of a loss on both towers, by "visual" or "text" and the parameter's name."""
    torch.manual_seed(1)
    image, ids = towers.probe()
    tokens, texts = towers.tokens(image), towers.encode_text(ids)
    loss = (tokens * torch.randn_like(tokens)).sum() + (texts * torch.randn_like(texts)).sum()
    loss.backward()
    found = {f"{part}.{name}": x for part in ("visual", "text") for name, x in getattr(towers, part).named_parameters()}
    assert all((x.grad is not None) == x.requires_grad for x in found.values())
    return {name: x.grad for name, x in found.items() if x.grad is not None}


def test_unlocked_towers_stay_in_eval_mode(world):
    towers = load_towers(f"local-dir:{world / 'clip'}", lock_image=False, lock_text=False)
    model = Trainable(VisionEmbedder(64, 48), TrainConfig("x"), towers)
    model.eval().train()
    assert model.embedder.training and not any(m.training for x in (towers.visual, towers.text) for m in x.modules())


TIMM = {"vision_pretrained": False, "force_image_size": 64}


@pytest.mark.parametrize(
    "options, parts",
    [
        ({"lock_image_unlocked_groups": 1}, ["visual.transformer.resblocks.2.", "visual.ln_post."]),
        (
            {"lock_image_unlocked_groups": 2},
            ["visual.transformer.resblocks.1.", "visual.transformer.resblocks.2.", "visual.ln_post."],
        ),
        ({"vision_model": "test_vit", "lock_image_unlocked_groups": 1}, ["visual.blocks.5.", "visual.norm."]),
        ({"vision_model": "test_convnext", "lock_image_unlocked_groups": 1}, ["visual.stages.3.", "visual.head.norm."]),
        ({"vision_model": "test_resnet", "lock_image_unlocked_groups": 1}, ["visual.layer4."]),
        ({"lock_text": False}, ["text."]),
        ({"lock_image": False}, ["visual."]),
        ({"vision_model": "test_vit", "lock_image": False, "lock_text": False}, ["visual.", "text."]),
    ],
    ids=lambda x: "-".join(map(str, x.values())) if isinstance(x, dict) else "",
)
def test_gradients_reach_exactly_the_chosen_blocks(options, parts, world):
    timm = TIMM if "vision_model" in options else {}
    towers = load_towers(f"local-dir:{world / 'clip'}", **timm | options)
    found = grads(towers)
    unused = {"visual.proj"}  # open_clip's projection, which PACL does not use
    named = {f"{part}.{name}" for part in ("visual", "text") for name, _ in getattr(towers, part).named_parameters()}
    assert set(found) == {name for name in named if name.startswith(tuple(parts))} - unused
    assert sum(bool(grad.abs().sum() > 0) for grad in found.values()) > 0.5 * len(
        found
    )  # ResNet's last gains begin at 0
    assert towers.trained == sorted({name.split(".")[0] for name in found}, reverse=True)
    assert not any(m.training for x in (towers.visual, towers.text) for m in x.modules())


@pytest.mark.parametrize("vision", [{}, {"vision_model": "test_vit"} | TIMM, {"vision_model": "test_convnext"} | TIMM])
def test_checkpointing_gives_the_same_gradients(vision, world):
    options = {"lock_image_unlocked_groups": 2, "lock_text": False, **vision}
    both = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        towers = load_towers(f"local-dir:{world / 'clip'}", grad_checkpointing=checkpointing, **options)
        for part in (towers.visual, towers.text):
            assert any(getattr(m, "grad_checkpointing", False) for m in part.modules()) == checkpointing
        both.append(grads(towers))
    assert both[0].keys() == both[1].keys()
    for name, grad in both[0].items():
        torch.testing.assert_close(both[1][name], grad, msg=name)


def test_two_processes_and_accumulation_are_one_big_batch(world, tmp_path):
    """All of both towers, whose gradients are exchanged, micro-batches and checkpointed blocks included."""
    values = {
        "train_data": str(world / "scenes/train-000.tar"),
        "model": f"local-dir:{world / 'clip'}",
        "lock_image": False,
        "lock_text": False,
        "learn_attn_temperature": True,
        "max_steps": 3,
        "lr_scheduler": "const",
        "eps": 0.1,  # Adam would make steps of the rounding of gradients near 0
        "lr": 0.1,
    }
    runs = {
        "one": {"batch_size": 12},
        "parts": {"batch_size": 3, "accum_freq": 4},
        "two": {"batch_size": 3, "accum_freq": 2, "grad_checkpointing": True},
    }
    states = {}
    for name, changes in runs.items():
        arguments = values | changes | {"log_dir": str(tmp_path / name)}
        if name == "two":
            command = [*RANKS, "2", tower_steps.__file__, json.dumps(arguments)]
            done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-3000:]
        else:
            tower_steps.main(arguments)
        states[name] = load_checkpoint(checkpoints(tmp_path / name / "pacl/checkpoints")[-1])["state_dict"]
    before = load_file(world / "clip/open_clip_model.safetensors")
    for name, x in states["one"].items():
        for other in ("parts", "two"):
            torch.testing.assert_close(states[other][name], x, rtol=1e-4, atol=1e-6, msg=f"{other}: {name}")
    moved = [name for name, x in states["one"].items() if name in before and not torch.equal(x, before[name])]
    assert len(moved) > 20 and not torch.equal(states["one"]["text.ln_final.weight"], before["ln_final.weight"])


def test_trained_towers_are_saved_resumed_and_loaded(world, tmp_path):
    assert train(world, tmp_path / "whole", **CHANGES) == 0
    assert train(world, tmp_path / "cut", **CHANGES | {"max-steps": 4, "save-frequency": 2}) == 0
    folder = tmp_path / "cut/pacl/checkpoints"
    checkpoints(folder)[-1].unlink()
    assert train(world, tmp_path / "cut", **CHANGES | {"resume": "latest"}) == 0
    states = [load_checkpoint(checkpoints(tmp_path / name / "pacl/checkpoints")[-1]) for name in ("whole", "cut")]
    assert states[0]["step"] == states[1]["step"] == 4
    assert all(torch.equal(x, states[1]["state_dict"][name]) for name, x in states[0]["state_dict"].items())

    embedder = tmp_path / "cut/pacl/embedder"
    towers, _ = load_pacl(embedder)
    assert towers.trained == []
    before = load_file(world / "clip/open_clip_model.safetensors")
    for part, prefix in (("visual", "visual."), ("text", "")):
        module, changed = getattr(towers, part).state_dict(), []
        for name, x in module.items():
            assert torch.equal(x, states[0]["state_dict"][f"{part}.{name}"])
            changed += [name] if not torch.equal(x, before[prefix + name]) else []
        expected = ("transformer.resblocks.2", "ln_post") if part == "visual" else ("",)
        assert changed and all(name.startswith(expected) for name in changed)
    state = load_file(embedder / "visual.safetensors")
    save_file({name: x * (1.05 if "mlp" in name else 1) for name, x in state.items()}, embedder / "visual.safetensors")
    with pytest.raises(ValueError, match=r"the vision tower's output is off by [\d.]+% \(other weights\?\)"):
        load_pacl(embedder)


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_a_run_with_a_timm_tower(name, world, tmp_path):
    """One step of the embedder, none to speak of of the tower, and both are found again."""
    changes = {"vision-model": name, "no-vision-pretrained": None, "force-image-size": 64, "max-steps": 1}
    assert train(world, tmp_path, **changes, **{"lock-image-unlocked-groups": 1, "tower-lr": 1e-9}) == 0
    towers, embedder = load_pacl(tmp_path / "pacl/embedder")
    assert embedder.towers["vision_model"] == towers.names["vision_model"] == name
    torch.manual_seed(0)
    names = {"vision_model": name, "vision_pretrained": False, "force_image_size": 64}
    before = load_towers(f"local-dir:{world / 'clip'}", **names)
    torch.manual_seed(0)
    moved = (embedder.skip.weight - VisionEmbedder(*towers.widths).skip.weight).abs().max()
    after, before = towers.visual.state_dict(), before.visual.state_dict()
    assert moved > 1e-4 and max((after[key] - x).abs().max() for key, x in before.items() if x.ndim) < 1e-6
    assert (embedder.notes["steps"], embedder.notes["pairs_seen"]) == (1, 8)


# What the fingerprint tells apart


@pytest.fixture(scope="module")
def shared(world, tmp_path_factory) -> Path:
    """A CLIP with QuickGELU and beside it an embedder on it."""
    folder = tmp_path_factory.mktemp("shared")
    shutil.copytree(world / "clip", folder / "clip")
    change_config(folder / "clip", quick_gelu=True)
    towers = describe_towers(load_towers(f"local-dir:{folder / 'clip'}"), folder / "embedder")
    save_embedder(VisionEmbedder(64, 48), folder / "embedder", towers)
    return folder


@pytest.fixture
def moved(shared, tmp_path) -> Path:
    shutil.copytree(shared, tmp_path / "moved")
    return tmp_path / "moved"


def test_the_fingerprint_is_a_few_dozen_numbers(shared):
    towers = json.loads((shared / "embedder/config.json").read_text())["towers"]
    assert towers["activation"] == {"visual": "QuickGELU", "text": "QuickGELU"} and towers["image_size"] == [64, 64]
    for name, count in (("visual", 48), ("text", 24)):
        numbers = towers["fingerprint"][name]
        assert len(numbers) == len(set(numbers)) == count and all(isinstance(x, float) for x in numbers)


def test_the_same_towers_are_accepted_also_as_bfloat16(moved, monkeypatch):
    monkeypatch.chdir(moved)
    for folder in (moved / "embedder", "embedder"):
        towers, embedder = load_pacl(folder)
    for part in (towers.visual, towers.text):
        part.bfloat16()
    check_towers(embedder.towers, towers)


def test_a_lost_quick_gelu_is_caught(moved):
    change_config(moved / "clip", quick_gelu=False)
    with pytest.raises(ValueError, match="the vision tower's activation is GELU, not QuickGELU; .*text tower's activ"):
        load_pacl(moved / "embedder")


def test_another_activation_of_the_same_name_is_caught_by_the_numbers(moved):
    towers, embedder = load_pacl(moved / "embedder")
    for block in towers.visual.transformer.resblocks:
        block.mlp.gelu.forward = torch.nn.functional.gelu
    with pytest.raises(ValueError, match="trained on, but the vision tower's output is off by"):
        check_towers(embedder.towers, towers)


@pytest.mark.parametrize("part, label", [("visual.transformer.resblocks.1.", "vision"), ("ln_final.", "text")])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_other_weights_are_caught(part, label, precision, moved):
    path = moved / "clip/open_clip_model.safetensors"
    generator = torch.Generator().manual_seed(1)
    state = load_file(path)
    for name, x in state.items():
        if name.startswith(part):
            x += x.std().nan_to_num(1).clamp(min=0.1) * torch.randn(x.shape, generator=generator)
    save_file(state, path)
    towers, embedder = load_towers(f"local-dir:{moved / 'clip'}"), VisionEmbedder.from_pretrained(moved / "embedder")
    for tower in (towers.visual, towers.text):
        tower.to(precision)
    with pytest.raises(ValueError, match=f"trained on, but the {label} tower's output is off by"):
        check_towers(embedder.towers, towers)


@pytest.mark.parametrize(
    "changes, message",
    [({"mean": [0.5, 0.5, 0.5]}, "vision tower's output"), ({"resize_mode": "squash"}, "vision tower's output")],
)
def test_another_preprocessing_is_caught(changes, message, moved):
    change_config(moved / "clip", **changes)
    with pytest.raises(ValueError, match=message):
        load_pacl(moved / "embedder")


def test_another_size_and_other_names_are_told(moved, world):
    embedder = VisionEmbedder.from_pretrained(moved / "embedder")
    towers = load_towers(f"local-dir:{moved / 'clip'}", vision_model="test_resnet", vision_pretrained=False)
    with pytest.raises(ValueError, match=r"pixels, not \[64, 64\]; they are .*clip \(no tag\) with test_resnet, not"):
        check_towers(embedder.towers, towers)


def test_an_embedder_without_towers_is_an_error(tmp_path):
    save_embedder(VisionEmbedder(6, 4), tmp_path)
    with pytest.raises(ValueError, match="config.json does not describe the towers of the embedder"):
        load_pacl(tmp_path)


@pytest.mark.parametrize(
    "name", ["logs/rnu/embedder", "./x", "../x/y", "logs/rnu", "missing", "/no/such", "~/logs", "a b/c", "logs/run.pt"]
)
def test_a_mistyped_folder_is_no_name_on_the_hub(name, tmp_path, capsys, monkeypatch):
    """Nothing asks the network for it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/run.pt").write_bytes(b"a file")
    monkeypatch.setattr(sharing, "snapshot_download", lambda name, **options: pytest.fail(f"asked for {name}"))
    assert main(["evaluate", "retrieval", "--data", "synthetic:eval", "--scenes", "4", "--checkpoint", name]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"pacl: error: folder: got {name!r}, which does not exist; expected a folder, or a name")
    assert said.count("\n") == 1


def test_a_name_on_the_hub_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []

    def download(name, **options):
        asked.append((name, options["revision"]))
        raise OSError("no network")

    monkeypatch.setattr(sharing, "snapshot_download", download)
    with pytest.raises(OSError, match="no network"):
        load_pacl("owner/some-name_1.0", revision="main")
    assert asked == [("owner/some-name_1.0", "main")]


def test_a_folder_from_the_hub_names_nothing_outside_itself(shared):
    folder = shared / "embedder"
    for name in ("local-dir:../clip", "../clip/open_clip_model.safetensors"):
        assert _absolute(name, folder, trusted=True).endswith(str(folder / name.removeprefix("local-dir:")))
        with pytest.raises(ValueError, match="names .*, which is outside of it"):
            _absolute(name, folder, trusted=False)
    assert _absolute("openai", folder, trusted=False) == "openai"
    assert np.isfinite(json.loads((folder / "config.json").read_text())["towers"]["fingerprint"]["text"]).all()
