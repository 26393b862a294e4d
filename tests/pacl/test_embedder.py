import json

import pytest
import torch
from pacl.embedder import VisionEmbedder, load_embedder, save_embedder
from safetensors.torch import load_file


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


def test_save_and_load(tmp_path):
    embedder = VisionEmbedder(6, 4)
    save_embedder(embedder, tmp_path / "e", steps=7)
    again = load_embedder(tmp_path / "e")
    tokens = torch.randn(2, 6)
    assert torch.equal(again(tokens), embedder(tokens))
    config = json.loads((tmp_path / "e" / "config.json").read_text())
    assert config == {"in_dim": 6, "out_dim": 4, "hidden_dim": 4, "training": {"steps": 7}}
    assert set(load_file(tmp_path / "e" / "model.safetensors")) == set(embedder.state_dict())


def test_wrong_weights_are_an_error(tmp_path):
    save_embedder(VisionEmbedder(6, 4), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"out_dim": 5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="skip.weight"):
        load_embedder(tmp_path)


@pytest.mark.parametrize("sizes", [{"in_dim": 0}, {"out_dim": -1}, {"hidden_dim": 2.5}])
def test_bad_sizes(sizes):
    (name,) = sizes
    with pytest.raises(ValueError, match=f"{name}: got .*expected a positive integer"):
        VisionEmbedder(**sizes)
