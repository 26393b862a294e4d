"""`pacl train --align cross-attention`: the head, its loss, and a run."""

from __future__ import annotations

import pytest

pytest.importorskip("open_clip")
pytest.importorskip("tyro")
import torch
from pacl.cross_attention import CrossAttention, load_head, word_tokens
from pacl.demo.toy_clip import new_clip, tokenizer
from pacl.embedder import embedder_folder
from running import assert_same_state, final, lines, train
from torch.nn import functional as F

from pacl_kernels import compatibility


@pytest.fixture
def pairs():
    """Patches [5, 9, 8] and words [4, 6, 8], of which two texts have padding."""
    torch.manual_seed(0)
    words = torch.randn(4, 6, 8)
    words[1, 3:] = 0
    words[3, 5:] = 0
    return torch.randn(5, 9, 8), words


def trained(dim: int) -> CrossAttention:
    """Return a head with random weights in place of the zeros that it begins with."""
    head = CrossAttention(dim)
    with torch.no_grad():
        for x in head.parameters():
            x.add_(0.3 * torch.randn_like(x))
    return head


def test_a_new_head_gives_phi(pairs):
    patches, words = pairs
    phi, cosines = (torch.stack(x) for x in zip(*CrossAttention(8).score(patches, words), strict=True))
    texts = words[:, 0].contiguous()
    torch.testing.assert_close(phi, compatibility(patches, texts, attn_temperature=0.05, form="cosine"))
    expected = F.normalize(texts, dim=-1) @ F.normalize(patches, dim=-1).transpose(1, 2)
    torch.testing.assert_close(cosines, expected)


def test_patches_and_words_attend_to_each_other(pairs):
    patches, words = pairs
    torch.manual_seed(1)
    head = trained(8)

    def score(patches, words):
        return torch.stack([phi for phi, _ in head.score(patches, words, block=3)])

    phi = score(patches, words)
    padded = F.pad(words, (0, 0, 0, 2))
    for each, expected in ((padded, phi), (words[1:2, :3], phi[:, 1:2])):  # padding is not read
        torch.testing.assert_close(score(patches, each), expected)
    torch.testing.assert_close(score(patches[:, torch.randperm(9)], words), phi)
    changed = words.clone()
    changed[0, 4] *= -1  # a word of the first text
    difference = (score(patches, changed) - phi).abs()
    assert (difference[:, 0] > 1e-4).all() and (difference[:, 1:] == 0).all()
    # Patches do not see each other, so the last one changes the cosines of the first eight through the caption.
    others = patches.clone()
    others[:, 8] *= -1
    both = [torch.stack([cosines[:, :8] for _, cosines in head.score(x, words)]) for x in (patches, others)]
    assert ((both[0] - both[1]).abs().amax(-1) > 1e-4).all()


def test_negatives_of_the_loss(pairs):
    patches, words = pairs[0][:4], pairs[1]
    head, scale = trained(8), torch.tensor(1000.0)  # so large that the hardest negatives are drawn
    phi = compatibility(patches, words[:, 0].contiguous(), attn_temperature=0.05, form="cosine")
    others = phi.masked_fill(torch.eye(4, dtype=torch.bool), -torch.inf)
    matches = torch.stack([each for each, _ in head.score(patches, words)])
    own = torch.arange(4)
    logits = scale * (torch.cat([matches.diagonal(), matches[own, others.argmax(1)], matches[others.argmax(0), own]]))
    logits = logits - scale * head.threshold
    expected = F.binary_cross_entropy_with_logits(logits, torch.tensor([1.0] * 4 + [0.0] * 8))
    torch.testing.assert_close(head.loss(patches, words, scale), expected)
    # Equal texts are no negatives: here no pair has any.
    same = words[:1].expand(4, -1, -1)
    own = torch.stack([each for each, _ in head.score(patches, same)]).diagonal()
    torch.testing.assert_close(head.loss(patches, same, scale), -F.logsigmoid(scale * (own - head.threshold)).mean())


def test_words_are_those_of_the_text_tower():
    torch.manual_seed(0)
    clip, ids = new_clip().eval(), tokenizer()(["a red shape", "sand"])
    words = word_tokens(clip, clip.encode_text, ids)
    torch.testing.assert_close(words[:, 0], clip.encode_text(ids))
    assert words.any(-1).sum(1).tolist() == [1 + int(x) for x in ids.argmax(1)]  # the embedding, all ids before the end
    # The tower is causal, so the last word's token does not know that the text ends after "a red".
    shorter = ids[:1].clone()
    shorter[0, 3:] = 0
    shorter[0, 3] = ids.max()
    torch.testing.assert_close(word_tokens(clip, clip.encode_text, shorter)[0, 1:4], words[0, 1:4])
    with pytest.raises(ValueError, match="align: got cross-attention with a Linear, expected the text tower of a CLIP"):
        word_tokens(torch.nn.Linear(2, 2), clip.encode_text, ids)


def test_run(run_world, tmp_path, capsys):
    whole, part = tmp_path / "whole", tmp_path / "part"
    changes = {"align": "cross-attention", "lr": 0.01, "tower_lr": 0.001, "save_frequency": 3}
    assert train(run_world, whole, **changes) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == f"finished 6 steps: {whole / 'pacl/cross_attention.safetensors'}"
    assert not (whole / "pacl/embedder").exists()
    assert "train/attention_entropy" in lines(whole / "pacl/metrics.jsonl")[-1]
    embedder, head = load_head(whole / "pacl/cross_attention.safetensors")
    state = final(whole)["state_dict"]
    for name, x in torch.nn.ModuleDict({"head": head, "embedder": embedder}).state_dict().items():
        assert torch.equal(x, state[name]), name
    assert head.read.out.weight.any() and head.see.out.weight.any(), "both directions learn"
    # A stopped run continues to the same bits, negatives included.
    assert train(run_world, part, **changes) == 0
    (part / "pacl/checkpoints/step_00000006.pt").unlink()
    assert train(run_world, part, **changes, resume="latest") == 0
    assert_same_state(final(part)["state_dict"], state)
    # No other command takes the run for one with an embedder.
    with pytest.raises(ValueError, match="pacl', whose run trained cross-attention, which no command reads, expected"):
        embedder_folder(whole / "pacl")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"form": "dot"}, "form: got 'dot' with align cross-attention, expected 'cosine', the default"),
        ({"val_data": "x"}, "val_data: got 'x' with align cross-attention, expected None, the default"),
        ({"align": "phi", "tower_lr": 0.1}, "tower_lr: got 0.1, expected a tower to train, but all are locked"),
    ],
)
def test_flags_that_do_not_fit(run_world, tmp_path, capsys, changes, message):
    assert train(run_world, tmp_path, **({"align": "cross-attention"} | changes)) == 1
    assert message in capsys.readouterr().err
