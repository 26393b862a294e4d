"""Towers: loading by name and from files, and training of their parts."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
import tower_steps
from forks import run_ranks
from pacl.embedder import VisionEmbedder
from pacl.sharing import load_pacl
from pacl.towers import load_towers, quick_gelu
from pacl.training.checkpoints import checkpoints, load_checkpoint
from pacl.training.config import TrainConfig
from pacl.training.model import Trainable
from PIL import Image
from safetensors.torch import load_file, save_file
from small_towers import registered, train

torch.set_num_threads(1)
CHANGES = {"no-lock-text": None, "lock-image-unlocked-groups": 1}


@pytest.fixture
def world(tower_world) -> Path:
    return tower_world


# Which towers


def test_a_clips_text_beside_a_timm_vision_tower(world):
    clip = open_clip.create_model(f"local-dir:{world / 'clip'}").eval()
    options = {"vision_pretrained": False, "force_image_size": 96}
    towers = load_towers(f"local-dir:{world / 'clip'}", vision_model="test_vit", **options)
    ids = towers.tokenize(["a red ball"])
    assert ids.shape == (1, 24)
    torch.testing.assert_close(towers.encode_text(ids), clip.encode_text(ids, normalize=True))
    # timm's mean and deviation, which for this model are not CLIP's.
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


def test_size_of_a_tower_with_convolutions_before_its_patches(world):
    options = {"vision_model": "vit_tiny_r_s16_p8_224", "vision_pretrained": False}
    towers = load_towers(f"local-dir:{world / 'clip'}", **options, force_image_size=96)
    assert towers.widths[0] == 192 and towers.tokens(towers.probe()[0]).shape[1] == 9
    with pytest.raises(ValueError, match="force_image_size: got 104, expected a multiple of 32"):
        load_towers(f"local-dir:{world / 'clip'}", **options, force_image_size=104)


def test_quick_gelu_is_that_of_the_weights():
    assert quick_gelu("ViT-B-16", "openai") and quick_gelu("ViT-B-16-quickgelu", "openai")
    assert not quick_gelu("ViT-B-16", "laion2b_s34b_b88k") and not quick_gelu("ViT-B-16", None)
    with pytest.raises(ValueError, match="expected a file or a tag of ViT-B-32-quickgelu"):
        quick_gelu("ViT-B-32-quickgelu", "laion2b_s34b_b79k")


def test_weights_from_a_file(tmp_path):
    name = registered(tmp_path)
    model = open_clip.create_model(name)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    towers = load_towers(name, str(tmp_path / "w.pt"))
    ids = towers.tokenize(["a ball"])
    torch.testing.assert_close(towers.encode_text(ids), model.eval().encode_text(ids, normalize=True))


def test_towers_without_weights_are_the_same_in_every_run(world, tmp_path):
    """Towers without weights are equal in every run, and therefore in every process and after resuming."""
    for name in ("one", "two"):
        torch.rand(len(name) * len(list(tmp_path.iterdir())))
        assert (
            train(world, tmp_path, name=name, model=registered(world), **{"max-steps": 1, "random-towers": None}) == 0
        )
    one, two = (json.loads((tmp_path / name / "embedder/config.json").read_text())["towers"] for name in ("one", "two"))
    assert one == two


# Which parts are trained


def grads(towers) -> dict[str, torch.Tensor]:
    """Return the gradients of a loss on both towers, by "visual" or "text" and the parameter's name."""
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
    model = Trainable(VisionEmbedder(64, 48), TrainConfig(train_data="x"), towers)
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
    )  # ResNet's last gains start at 0
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
    """With both towers trained, two processes, micro-batches and checkpointed blocks give the weights of one batch."""
    values = {
        "train_data": str(world / "scenes/train-000.tar"),
        "model": f"local-dir:{world / 'clip'}",
        "lock_image": False,
        "lock_text": False,
        "learn_attn_temperature": True,
        "max_steps": 3,
        "lr_scheduler": "const",
        "eps": 0.1,  # with a small eps, Adam turns rounding of gradients near 0 into steps
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
            command = [tower_steps.__file__, json.dumps(arguments)]
            status, printed = run_ranks(command, 2, tmp_path / "printed")
            assert status == 0, printed[-3000:]
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
    with pytest.raises(ValueError, match=r"visual\.safetensors is damaged: it does not have the SHA-256"):
        load_pacl(embedder)
    config = json.loads((embedder / "config.json").read_text())
    (embedder / "config.json").write_text(json.dumps({name: x for name, x in config.items() if name != "sha256"}))
    with pytest.raises(ValueError, match=r"the vision tower's output is off by [\d.]+% \(other weights\?\)"):
        load_pacl(embedder)


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_a_run_with_a_timm_tower(name, world, tmp_path):
    """A run moves the embedder and, at a tiny rate, hardly the tower; both load again."""
    changes = {"vision-model": name, "no-vision-pretrained": None, "force-image-size": 64, "max-steps": 1}
    changes |= {"random-towers": None}
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
