"""Text towers from folders of transformers and sentence-transformers, compared with the models' own blocks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("open_clip")
import torch
import transformers
from pacl.cli import main
from pacl.sharing import load_pacl
from pacl.text_models import load_text_model
from pacl.towers import load_towers
from PIL import Image
from safetensors.torch import load_file, save_file
from small_towers import train
from torch.nn import functional as F

torch.set_num_threads(1)
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a red blue ball shape on grass , . striped the and cyan of".split()
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
TEXTS = ["a red ball", "a blue ball on the striped grass , and a ball .", "grass"]
TYPES = "sentence_transformers.models."


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    """Write a BERT of two layers with random weights, and its tokenizer."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=40, **SIZES)
    transformers.BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    tokenizer = transformers.BertTokenizer(str(folder / "vocab.txt"), do_lower_case=False, model_max_length=38)
    tokenizer.save_pretrained(folder)
    return folder


def sentence_model(bert: Path, folder: Path, pooling: dict, *, dense: bool = False, **settings) -> Path:
    """Write a folder as sentence-transformers does, with the encoder of `bert`."""
    folder.mkdir()
    for path in bert.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    modules = [("Transformer", ""), ("Pooling", "1_Pooling")] + [("Dense", "2_Dense")] * dense
    modules += [("Normalize", "3_Normalize")]
    for place, name in enumerate(modules):
        (folder / name[1]).mkdir(exist_ok=True)
        modules[place] = {"idx": place, "name": str(place), "path": name[1], "type": TYPES + name[0]}
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling/config.json").write_text(json.dumps({"word_embedding_dimension": 32, **pooling}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 16, **settings}))
    if dense:
        config = {"in_features": 32, "out_features": 48, "bias": True, "activation_function": "torch.nn.Tanh"}
        (folder / "2_Dense/config.json").write_text(json.dumps(config))
        generator = torch.Generator().manual_seed(1)
        weights = {"linear.weight": (48, 32), "linear.bias": (48,)}
        save_file(
            {name: torch.randn(shape, generator=generator) for name, shape in weights.items()},
            folder / "2_Dense/model.safetensors",
        )
    return folder


def hidden(bert: Path, text: str) -> torch.Tensor:
    """Return the last states [L, C] of one text alone, which needs no padding and no mask."""
    model = transformers.BertModel.from_pretrained(bert).eval()
    ids = transformers.BertTokenizer.from_pretrained(bert)([text], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model(ids).last_hidden_state[0]


POOLED = {
    "cls": ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, lambda x: x[0]),
    "mean": ({"pooling_mode_mean_tokens": True}, lambda x: x.mean(0)),
    "max": ({"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": False}, lambda x: x.amax(0)),
    "root": ({"pooling_mode_mean_sqrt_len_tokens": True}, lambda x: x.sum(0) / len(x) ** 0.5),
    "last": ({"pooling_mode_lasttoken": True}, lambda x: x[-1]),
    "new": ({"pooling_mode": "cls"}, lambda x: x[0]),
    "weighted": (
        {"pooling_mode_mean_tokens": False, "pooling_mode_weightedmean_tokens": True},
        lambda x: (x * torch.arange(1, len(x) + 1)[:, None]).sum(0) / (len(x) * (len(x) + 1) / 2),
    ),
    "two": (
        {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
        lambda x: torch.cat([x[0], x.mean(0)]),
    ),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", POOLED)
def test_pooling_is_that_of_the_folder(name, bert, tower_world, tmp_path):
    config, by_hand = POOLED[name]
    folder = sentence_model(bert, tmp_path / "model", config)
    towers = load_towers(f"local-dir:{tower_world / 'clip'}", text_model=str(folder))
    expected = torch.stack([F.normalize(by_hand(hidden(bert, text)), dim=0) for text in TEXTS])
    torch.testing.assert_close(towers.encode_text(towers.tokenize(TEXTS)), expected)
    torch.testing.assert_close(towers.embed(TEXTS), expected)  # sorted by length, without the padding


def test_a_folder_of_transformers_alone_is_averaged(bert, tower_world):
    towers = load_towers(f"local-dir:{tower_world / 'clip'}", text_model=str(bert))
    expected = torch.stack([F.normalize(hidden(bert, text).mean(0), dim=0) for text in TEXTS])
    torch.testing.assert_close(towers.embed(TEXTS), expected)
    assert towers.tokenize(["a ball " * 50]).shape == (1, 38)
    assert towers.names["text_model"] == f"local-dir:{bert}" and towers.trained == []


def test_dense_layer_case_length_and_prompt(bert, tower_world, tmp_path):
    folder = sentence_model(bert, tmp_path / "model", {"pooling_mode": "mean"}, dense=True, do_lower_case=True)
    prompts = {"prompts": {"query": "the "}, "default_prompt_name": "query"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    towers = load_towers(f"local-dir:{tower_world / 'clip'}", text_model=str(folder))
    layer, weights = torch.nn.Linear(32, 48), load_file(folder / "2_Dense/model.safetensors")
    layer.load_state_dict({name.removeprefix("linear."): x for name, x in weights.items()})
    expected = F.normalize(layer(hidden(bert, "the a red ball").mean(0)).tanh(), dim=0)
    torch.testing.assert_close(towers.embed(["A RED ball"])[0], expected.detach())
    assert towers.tokenize(["a ball " * 50]).shape == (1, 16) and towers.widths[1] == 48


def test_clip_of_transformers_pools_by_itself(bert, tower_world, tmp_path):
    torch.manual_seed(0)
    text = {**SIZES, "vocab_size": len(WORDS), "eos_token_id": 3, "bos_token_id": 2, "pad_token_id": 3}
    config = transformers.CLIPTextConfig(**text, max_position_embeddings=20, projection_dim=48)
    model = transformers.CLIPTextModelWithProjection(config).eval()
    model.save_pretrained(tmp_path / "clip")
    tokenizer = transformers.BertTokenizer.from_pretrained(bert, pad_token="[SEP]", model_max_length=20)
    tokenizer.save_pretrained(tmp_path / "clip")
    towers = load_towers(f"local-dir:{tower_world / 'clip'}", text_model=str(tmp_path / "clip"))
    with torch.no_grad():
        expected = [model(tokenizer([text], return_tensors="pt")["input_ids"]).text_embeds[0] for text in TEXTS]
    torch.testing.assert_close(towers.embed(TEXTS), F.normalize(torch.stack(expected), dim=-1))


def test_commands_with_a_text_model(bert, tower_world, tmp_path, capsys):
    clip = f"local-dir:{tower_world / 'clip'}"
    folder = sentence_model(bert, tmp_path / "model", {"pooling_mode": "mean"}, dense=True)
    changes = {"text-model": folder, "max-steps": 2, "no-lock-text": None}
    assert train(tower_world, tmp_path / "logs", **changes) == 0
    towers, embedder = load_pacl(tmp_path / "logs/pacl")
    assert embedder.towers["text_model"].startswith("local-dir:..") and embedder.towers["trained"] == ["text"]
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    look = ["look", str(tmp_path / "red.png"), "--words", "red ball,grass", "--device", "cpu", "--out", str(tmp_path)]
    assert main([*look, "--checkpoint", str(tmp_path / "logs/pacl")]) == 0
    assert main([*look, "--model", clip, "--text-model", str(folder)]) == 0
    assert main([*look, "--model", clip, "--text-model", str(bert)]) == 1
    assert "whose embeddings have 32 numbers, expected 48, as the image" in capsys.readouterr().err
    features = ["features", "--train-data", str(tower_world / "scenes/train-000.tar"), "--workers", "0"]
    features += ["--model", clip, "--text-model", str(folder), "--out", str(tmp_path / "features"), "--device", "cpu"]
    assert main(features) == 0
    changes = {"train-data": "None", "features": tmp_path / "features", "max-steps": 1, "name": "stored"}
    assert train(tower_world, tmp_path / "logs", **changes | {"model": clip, "text-model": folder}) == 0


def test_two_towers_from_folders_need_no_open_clip_model(bert):
    options = {"vision_model": "test_vit", "vision_pretrained": False, "text_model": f"local-dir:{bert}"}
    towers = load_towers("no such model", **options)
    assert towers.widths == (64, 32)


def test_errors_name_the_argument(bert, tmp_path):
    def message(folder: Path) -> str:
        with pytest.raises(ValueError, match="^text_model: got ") as error:
            load_text_model(str(folder))
        assert "\n" not in str(error.value)
        return str(error.value)

    assert message(tmp_path / "none").endswith(
        "is not a folder; expected one with config.json and weights of a text encoder"
    )
    (tmp_path / "empty").mkdir()
    assert "has no config.json; expected a model's folder" in message(tmp_path / "empty")
    pooling = sentence_model(bert, tmp_path / "pooling", {"pooling_mode_mean_tokens": False})
    assert "config.json is damaged: its pooling is []" in message(pooling)
    other = sentence_model(bert, tmp_path / "other", {"pooling_mode": "mean"})
    (other / "modules.json").write_text(json.dumps([{"type": "my.LSTM", "path": ""}]))
    assert "has the modules LSTM; expected Transformer, Pooling" in message(other)
    (other / "modules.json").write_text("{}")
    assert "modules.json is damaged: it holds {}, expected a list" in message(other)
    lacking = sentence_model(bert, tmp_path / "lacking", {"pooling_mode": "mean"})
    save_file({"x": torch.zeros(1)}, lacking / "model.safetensors", {"format": "pt"})
    assert "whose weights lack " in message(lacking)
    dense = sentence_model(bert, tmp_path / "dense", {"pooling_mode": "mean"}, dense=True)
    (dense / "2_Dense/model.safetensors").unlink()
    assert "has neither model.safetensors nor pytorch_model.bin" in message(dense)
