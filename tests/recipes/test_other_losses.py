"""The examples in `examples/recipes` of other codebases compute those codebases' formulas, learn, and run under DDP."""

from __future__ import annotations

import re
import runpy
import socket
import sys
from pathlib import Path

import pytest
import torch
from forks import run_ranks
from torch.nn import functional as F

from pacl_kernels import compatibility, fused_pacl_loss

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
NAMES = ("xpool", "flair_like", "pacl_ports")


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64).requires_grad_()


def cross_entropy_both_ways(logits: torch.Tensor) -> torch.Tensor:
    right = torch.arange(len(logits))
    return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2


def assert_same(got: torch.Tensor, expected: torch.Tensor, *leaves: torch.Tensor):
    """Assert that two losses and their gradients are equal."""
    torch.testing.assert_close(got, expected)
    mine, true = (torch.autograd.grad(loss, leaves, retain_graph=True) for loss in (got, expected))
    torch.testing.assert_close(mine, true)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("temperature", [0.01, 0.1])
def test_xpool(temperature):
    """The cosine form is X-Pool's attention pooling of 12 frames, with its cosines and CLIP's loss."""
    raw_videos, raw_texts, log_scale = random(7, 12, 16), random(7, 16), random()
    videos, texts = F.normalize(raw_videos, dim=-1), F.normalize(raw_texts, dim=-1)
    attention = (videos @ texts.T / temperature).softmax(1)  # [videos, frames, texts]
    pooled = F.normalize(attention.transpose(1, 2) @ videos, dim=-1)  # [videos, texts, D]
    cosines = (pooled * texts).sum(-1)  # [videos, texts]
    expected = cross_entropy_both_ways(log_scale.exp() * cosines.T)  # X-Pool has the texts in the rows

    options = {"form": "cosine", "attn_temperature": temperature}
    torch.testing.assert_close(compatibility(raw_videos, raw_texts, **options), cosines)
    got = fused_pacl_loss(raw_videos, raw_texts, log_scale.exp(), **options)
    assert_same(got, expected, raw_videos, raw_texts, log_scale)


def test_flair_like():
    """Ids and the sigmoid loss are FLAIR's text-conditioned loss with one head and every caption of the batch."""
    images, captions = 5, 3
    raw_patches, raw_texts, scale, bias = random(images, 9, 16), random(images * captions, 16), random(), random()
    patches, texts = F.normalize(raw_patches, dim=-1), F.normalize(raw_texts, dim=-1)
    attention = (texts @ patches.transpose(1, 2) / 0.1).softmax(-1)  # [images, texts, patches]
    logits = scale * (F.normalize(attention @ patches, dim=-1) * texts).sum(-1) + bias
    labels = 2 * torch.eye(images, dtype=torch.float64).repeat_interleave(captions, 1) - 1
    expected = -F.logsigmoid(labels * logits).sum() / images

    ids = torch.arange(images)
    options = {"form": "cosine", "attn_temperature": 0.1, "loss": "sigmoid", "logit_bias": bias}
    owners = {"image_ids": ids, "text_ids": ids.repeat_interleave(captions)}
    got = fused_pacl_loss(raw_patches, raw_texts, scale, **options, **owners)
    assert_same(got, expected, raw_patches, raw_texts, scale, bias)


@pytest.mark.parametrize("weights", ["softmax", "sigmoid"])
def test_what_the_ports_compute(weights):
    """Patches pooled for their own caption, as one patch each, give the ports' loss; the paper's is another one."""
    patches, texts = random(6, 9, 16), random(6, 16)
    s = torch.einsum("bnd,bd->bn", F.normalize(patches, dim=-1), F.normalize(texts, dim=-1))
    attention = (10 * s).softmax(-1) if weights == "softmax" else (10 * s).sigmoid()
    pooled = (attention[..., None] * patches).sum(1)
    cosines = F.normalize(pooled, dim=-1) @ F.normalize(texts, dim=-1).T
    assert_same(fused_pacl_loss(pooled[:, None], texts, 10.0), cross_entropy_both_ways(10 * cosines), patches, texts)
    papers = fused_pacl_loss(patches, texts, 10.0, attn_temperature=0.1)
    assert (papers - cross_entropy_both_ways(10 * cosines)).abs() > 0.01


def run(name: str, monkeypatch, capsys, *words: str) -> str:
    monkeypatch.setattr(sys, "argv", [str(RECIPES / f"{name}.py"), *words])
    for variable in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    runpy.run_path(sys.argv[0], run_name="__main__")
    return capsys.readouterr().out


def losses(printed: str) -> list[float]:
    return [float(value) for value in re.findall(r"loss ([\d.]+)$", printed, re.MULTILINE)]


@pytest.mark.parametrize("name", NAMES)
def test_it_learns(name, monkeypatch, capsys):
    printed = run(name, monkeypatch, capsys)
    found = losses(printed)
    assert len(found) == 6 and found[-1] < 0.3 * found[0]
    recall = float(re.search(r"R@1 among \d+ unseen \w+: ([\d.]+) %", printed)[1])
    assert recall > 50, "chance is 1 % or less"


DRIVER = """
import os, runpy, sys
for path, port in zip(sys.argv[1::2], sys.argv[2::2]):
    os.environ["MASTER_PORT"] = port
    sys.argv = [path, "--steps", "20"]
    runpy.run_path(path, run_name="__main__")
"""


def test_two_processes_print_what_one_prints(tmp_path, monkeypatch, capsys):
    """Two Gloo processes under DDP have the losses and the final recall of one process."""
    (tmp_path / "driver.py").write_text(DRIVER)
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in NAMES]
    words = [x for name, free in zip(NAMES, sockets, strict=True) for x in (name, free.getsockname()[1])]
    for free in sockets:
        free.close()
    words = [str(RECIPES / f"{word}.py") if word in NAMES else str(word) for word in words]
    one = [run(name, monkeypatch, capsys, "--steps", "20") for name in NAMES]  # first, for its imports
    status, printed = run_ranks([tmp_path / "driver.py", *words], 2, tmp_path / "printed")
    assert status == 0, printed[-4000:]
    assert len(losses(printed)) == 2 * len(NAMES)
    # After 20 steps, rounding has grown: an attention of temperature 0.01 multiplies it by 100 in every step.
    assert losses(printed) == pytest.approx([x for printed in one for x in losses(printed)], rel=1e-5)


@pytest.mark.parametrize(
    "command, message",
    [
        ("xpool --batch-size 33", "--batch-size: got 33, expected a multiple of the 2 processes"),
        ("flair_like --batch-size 33", "--batch-size: got 33, expected a multiple of the 2 processes"),
        ("pacl_ports --batch-size 33", "--batch-size: got 33, expected a multiple of the 2 processes"),
        ("flair_like --captions 6", "--captions: got 6, expected 1 to 5"),
    ],
)
def test_wrong_arguments_are_one_line(command, message, monkeypatch, capsys):
    name, *words = command.split()
    monkeypatch.setattr(sys, "argv", [str(RECIPES / f"{name}.py"), *words])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(sys.argv[0], run_name="__main__")
    assert capsys.readouterr().err.splitlines()[-1] == f"{name}.py: error: {message}"
