import hashlib
import json
import re

import pytest
import torch
import yaml
from pacl.embedder import VisionEmbedder, save_embedder
from safetensors.torch import load_file, save_file

TOWERS = {"model": "ViT-B-16", "pretrained": "openai", "vision_model": None, "base_model": ["timm/x"], "trained": []}


def test_default_size_is_the_papers():
    assert sum(parameter.numel() for parameter in VisionEmbedder().parameters()) == 1_050_112


def test_residual_formula():
    torch.manual_seed(0)
    embedder = VisionEmbedder(6, 4, 5)
    tokens = torch.randn(2, 3, 6)
    first, _, second = embedder.main
    by_hand = (tokens @ first.weight.T + first.bias).clamp(min=0) @ second.weight.T + second.bias
    by_hand = by_hand + tokens @ embedder.skip.weight.T + embedder.skip.bias
    torch.testing.assert_close(embedder(tokens), by_hand)


@pytest.mark.parametrize("through_the_mixin", [False, True])
def test_save_and_load(through_the_mixin, tmp_path, capsys):
    embedder = VisionEmbedder(6, 4, towers=TOWERS, training={"steps": 7})
    for _ in range(2):  # the second save overwrites the first
        embedder.save_pretrained(tmp_path / "e") if through_the_mixin else save_embedder(embedder, tmp_path / "e")
    again = VisionEmbedder.from_pretrained(tmp_path / "e")
    tokens = torch.randn(2, 6)
    assert torch.equal(again(tokens), embedder(tokens)) and not again.training
    assert (again.towers, again.notes) == (TOWERS, {"steps": 7})
    config = json.loads((tmp_path / "e" / "config.json").read_text())
    sizes = {"in_dim": 6, "out_dim": 4, "hidden_dim": 4}
    trained_as = {"form": "cosine", "attn_temperature": 0.05}
    digest = hashlib.sha256((tmp_path / "e" / "model.safetensors").read_bytes()).hexdigest()
    assert config.pop("sha256") == {"model.safetensors": digest}
    assert config == {**sizes, **trained_as, "towers": TOWERS, "training": {"steps": 7}}
    assert set(load_file(tmp_path / "e" / "model.safetensors")) == set(embedder.state_dict())
    assert sorted(path.name for path in (tmp_path / "e").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert capsys.readouterr().out == ""


def test_form_and_temperature_are_kept(tmp_path):
    embedder = VisionEmbedder(6, 4, form="dot", attn_temperature=0.2)
    save_embedder(embedder, tmp_path, attn_temperature=0.25, steps=7)
    again = VisionEmbedder.from_pretrained(tmp_path)
    assert (again.config["form"], again.config["attn_temperature"], again.notes) == ("dot", 0.25, {"steps": 7})
    assert embedder.config["attn_temperature"] == 0.2, "saving changed what was saved"
    lines = (tmp_path / "README.md").read_text().splitlines()
    assert "| form | dot |" in lines and "| attn_temperature | 0.25 |" in lines


def test_embedders_of_earlier_versions_load(tmp_path):
    """An embedder that keeps form and temperature in its training notes still loads."""
    save_embedder(VisionEmbedder(6, 4), tmp_path, TOWERS)
    notes = {"form": "dot", "loss": "infonce", "attn_temperature": 0.2, "steps": 7}
    config = {"in_dim": 6, "out_dim": 4, "hidden_dim": 4, "towers": TOWERS, "training": notes}
    (tmp_path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    embedder = VisionEmbedder.from_pretrained(tmp_path)
    assert (embedder.config["form"], embedder.config["attn_temperature"]) == ("dot", 0.2)
    assert embedder.notes == {"loss": "infonce", "steps": 7}
    del config["training"]["form"], config["training"]["attn_temperature"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert VisionEmbedder.from_pretrained(tmp_path).config["attn_temperature"] == 0.05


def test_the_card_is_made_from_the_run(tmp_path):
    notes = {"steps": 7, "logit_scale": 1 / 3, "command": "pacl train --lr 0.1", "metrics": {"mIoU": 41.25}}
    save_embedder(VisionEmbedder(6, 4), tmp_path, TOWERS, **notes)
    card = (tmp_path / "README.md").read_text()
    head = yaml.safe_load(re.match("---\n(.*?)---\n", card, re.S)[1])
    assert head["library_name"] == "pacl-kernels" and head["license"] == "mit" and head["base_model"] == ["timm/x"]
    assert {"zero-shot-image-segmentation", "pacl"} <= set(head["tags"])
    for line in ("| mIoU | 41.25 |", "| steps | 7 |", "| logit_scale | 0.333333 |", "| pretrained | openai |"):
        assert line in card.splitlines()
    assert "```\npacl train --lr 0.1\n```" in card and "6 wide" in card and "4 wide" in card
    lines = re.search("```python\n(.*?)```", card, re.S)[1]
    compile(lines, "card", "exec")


@pytest.mark.parametrize("change", [{"out_dim": 5}, {"hidden_dim": 3}])
def test_wrong_weights_are_an_error(change, tmp_path):
    save_embedder(VisionEmbedder(6, 4), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"model.safetensors is damaged: main.\S+ has the shape .*, expected"):
        VisionEmbedder.from_pretrained(tmp_path)


def test_a_missing_weight_is_an_error(tmp_path):
    save_embedder(VisionEmbedder(6, 4), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["skip.bias"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="model.safetensors is damaged: it does not have the SHA-256"):
        VisionEmbedder.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["sha256"]  # as in earlier versions
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="model.safetensors is damaged: it lacks skip.bias"):
        VisionEmbedder.from_pretrained(tmp_path)


def test_a_pickle_is_not_taken_in_place_of_safetensors(tmp_path):
    save_embedder(VisionEmbedder(6, 4), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError):
        VisionEmbedder.from_pretrained(tmp_path)


@pytest.mark.parametrize("sizes", [{"in_dim": 0}, {"out_dim": -1}, {"hidden_dim": 2.5}])
def test_bad_sizes(sizes):
    (name,) = sizes
    with pytest.raises(ValueError, match=f"{name}: got .*expected a positive integer"):
        VisionEmbedder(**sizes)
