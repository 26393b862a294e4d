"""`Towers.embed` cuts padding that the tower cannot see, and keeps it for towers that can."""

import open_clip
import pytest
import torch
from open_clip.model import _build_text_tower
from pacl.segment.prompts import TEMPLATES, class_texts
from pacl.towers import BATCH, Towers, encode_text, read_lengths
from torch import nn

torch.set_num_threads(1)
CONFIGS = {name: open_clip.get_model_config(name)["text_cfg"] for name in open_clip.list_models()}
SMALL = {"width": 32, "heads": 2, "layers": 2, "vocab_size": 100, "context_length": 24}
EOS, PAD = 99, 1


def small_tower(name):
    """Return the text tower of an open_clip model in float64, with smaller sizes."""
    torch.manual_seed(0)
    ends = {"eos_id": EOS, "pad_id": PAD}
    tower = _build_text_tower(16, CONFIGS[name] | SMALL | (ends if "eos_id" in CONFIGS[name] else {}))
    with torch.no_grad():
        tower.positional_embedding.mul_(50)  # so that positions matter
    return tower.double().eval().requires_grad_(False)


def towers_of(text):
    """Return towers whose texts are numbers of the vocabulary; each text gets an EOS at its end, and padding."""

    def tokenize(texts):
        ids = torch.full((len(texts), SMALL["context_length"]), PAD)
        for row, each in zip(ids, texts, strict=True):
            numbers = [*map(int, each.split()), EOS]
            row[: len(numbers)] = torch.tensor(numbers)
        return ids

    return Towers(nn.Identity(), text, None, tokenize, {})


OWN = sorted(name for name, config in CONFIGS.items() if not config.get("hf_model_name"))
KEYS = (
    "pool_type",
    "no_causal_mask",
    "embed_cls",
    "eos_id",
    "proj_type",
    "proj_bias",
    "output_tokens",
    "hf_model_name",
)
KINDS = {str({key: CONFIGS[name].get(key) for key in KEYS}): name for name in OWN}


@pytest.mark.parametrize("name", sorted(KINDS.values()))
def test_every_text_tower_of_open_clip(name):
    text = small_tower(name)
    towers = towers_of(text)
    texts = [" ".join(str(2 + (7 * i + 3 * j) % 90) for j in range(1 + i % 13)) for i in range(40)]
    ids = towers.tokenize(texts)
    whole = encode_text(text, ids)
    torch.testing.assert_close(towers.embed(texts), whole.float(), rtol=0, atol=1e-7)
    causal = not CONFIGS[name].get("no_causal_mask") and not CONFIGS[name].get("embed_cls")
    expected = (ids == EOS).int().argmax(1) + 1 if causal else torch.full((40,), 24)
    assert torch.equal(read_lengths(text, ids), expected)
    # For a tower that sees the padding, cutting it would change the result.
    if CONFIGS[name].get("no_causal_mask"):
        text.pool_type = "first"
        assert (encode_text(text, ids) - encode_text(text, ids[:, :15])).abs().max() > 1e-3


def test_there_are_towers_of_both_kinds():
    causal = {name for name in KINDS.values() if not CONFIGS[name].get("no_causal_mask")}
    assert any("SigLIP" in name for name in KINDS.values()) and any("coca" in name for name in causal)
    assert {CONFIGS[name].get("pool_type", "argmax") for name in causal} >= {"argmax"}


def test_short_batches_in_their_order():
    text = small_tower("ViT-B-16")
    towers, seen = towers_of(text), []
    text.register_forward_pre_hook(lambda module, given: seen.append(tuple(given[0].shape)))
    texts = [" ".join(["5"] * (1 + i % 20)) + f" {2 + i % 90}" for i in range(2 * BATCH + 3)]
    found = towers.embed(texts)
    assert [rows for rows, _ in seen] == [BATCH, BATCH, 3]
    assert seen[0][1] < seen[1][1] <= seen[2][1] == 22 and text.attn_mask.shape == (24, 24)
    torch.testing.assert_close(found, encode_text(text, towers.tokenize(texts)).float(), rtol=0, atol=1e-7)


def test_a_text_that_fills_the_context_and_one_tower_of_another_kind():
    text = small_tower("ViT-B-16")
    towers = towers_of(text)
    full = [" ".join(["7"] * 23), "3"]
    assert read_lengths(text, towers.tokenize(full)).tolist() == [24, 2]
    torch.testing.assert_close(towers.embed(full), encode_text(text, towers.tokenize(full)).float(), rtol=0, atol=1e-7)
    other = nn.Sequential(nn.Embedding(100, 8), nn.Flatten())  # an unknown tower counts as seeing all
    assert read_lengths(other, towers.tokenize(full)).tolist() == [24, 24]


def test_class_texts_of_a_real_tower():
    """Words of any length are embedded as in 80 whole sentences each, with CLIP's own tokenizer."""
    torch.manual_seed(0)
    text = _build_text_tower(64, CONFIGS["ViT-B-16"] | {"width": 64, "heads": 2, "layers": 2}).double().eval()
    towers = Towers(nn.Identity(), text, None, open_clip.get_tokenizer("ViT-B-16"), {})
    classes = ["dog, a very small dog", "zebra crossing", "antidisestablishmentarianism", "word " * 90]
    found = class_texts(towers, classes, TEMPLATES["openai"])
    assert found.synonyms == (2, 1, 1, 1)
    for row, word in zip(found.embeddings, ["dog", "a very small dog", *classes[1:]], strict=True):
        sentences = [template.format(" ".join(word.split())) for template in TEMPLATES["openai"]]
        expected = nn.functional.normalize(encode_text(text, towers.tokenize(sentences)).mean(0), dim=0)
        torch.testing.assert_close(row, expected.float().detach(), rtol=0, atol=1e-7)
