"""`pacl train --coherence-loss`: the loss itself, and runs with it."""

from __future__ import annotations

import pytest

pytest.importorskip("open_clip")
import torch
from pacl.training import trainer
from pacl.training.coherence import coherence_loss
from running import lines, train


def expected(patches: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the loss of one image, pair by pair, in float64."""
    pairs = [
        torch.cosine_similarity(patches[i].double(), patches[j].double(), dim=0)
        - torch.cosine_similarity(tokens[i].double(), tokens[j].double(), dim=0)
        for i in range(len(patches))
        for j in range(len(patches))
    ]
    return torch.stack(pairs).square().mean()


def test_the_loss_and_its_gradient_pair_by_pair():
    generator = torch.Generator().manual_seed(0)
    patches = 3 * torch.randn(7, 6, generator=generator)
    tokens = torch.randn(7, 9, generator=generator).half()  # stored features are float16
    for lengths in ([2, 5], [6, 1]):
        mine, truth = (patches.clone().requires_grad_() for _ in range(2))
        images = zip(truth.split(lengths), tokens.split(lengths), strict=True)
        whole = torch.stack([expected(*image) for image in images]).mean()
        found = coherence_loss(mine, tokens, torch.tensor(lengths))
        torch.testing.assert_close(found, whole.float())
        torch.autograd.backward([found, whole])
        torch.testing.assert_close(mine.grad, truth.grad)
    images = patches[:6].unflatten(0, (2, 3)), tokens[:6].unflatten(0, (2, 3))
    whole = torch.stack([expected(*image) for image in zip(*images, strict=True)]).mean()
    with torch.autocast("cpu", torch.bfloat16):  # which must not round the cosines
        torch.testing.assert_close(coherence_loss(*images), whole.float())
    assert coherence_loss(patches[None], 2 * patches[None]) < 1e-12, "cosines do not depend on lengths"


def test_runs_with_the_loss(run_world, tmp_path, capsys, monkeypatch):
    flags = {"log_every_n_steps": 1, "accum_freq": 2, "max_steps": 3, "lr": 0.01}
    with monkeypatch.context() as patched:
        patched.setattr(trainer, "coherence_loss", None)  # a run without the flag does not compute it
        assert train(run_world, tmp_path, name="without", **flags) == 0
    for name, weight in {"light": 1e-9, "heavy": 300.0}.items():
        assert train(run_world, tmp_path, name=name, **flags, coherence_loss=weight) == 0
    plain, light, heavy = (lines(tmp_path / name / "metrics.jsonl") for name in ("without", "light", "heavy"))
    assert plain[0].keys() == heavy[0].keys() - {"train/coherence_loss"}
    assert [row["train/loss"] for row in light] == pytest.approx([row["train/loss"] for row in plain], rel=1e-4)
    for row in heavy:
        total = row["train/contrastive_loss"] + 300 * row["train/coherence_loss"]
        assert row["train/loss"] == pytest.approx(total, rel=1e-6)
    assert heavy[0]["train/contrastive_loss"] == pytest.approx(plain[0]["train/loss"], rel=1e-4)
    assert heavy[-1]["train/coherence_loss"] < 0.7 * light[-1]["train/coherence_loss"], "patches do not follow"
    assert "coherence_loss: 300.0\n" in (tmp_path / "heavy/config.yaml").read_text()
    assert " Coherence_loss: " in capsys.readouterr().out

    assert train(run_world, tmp_path, name="bad", coherence_loss=-1) == 1
    assert "coherence_loss: got -1.0, expected a number at least 0" in capsys.readouterr().err
    assert train(run_world, tmp_path, name="bad", coherence_loss=1, lock_image_unlocked_groups=1) == 1
    said = "coherence_loss: got 1 and a vision tower to train, expected a locked one, because the patches follow its"
    assert said in capsys.readouterr().err
