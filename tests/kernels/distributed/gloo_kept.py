"""A gather of texts on a CPU keeps the scores of all texts for the backward."""

from __future__ import annotations

import pytest
import torch
from gloo_loss import answer, local_part, local_rows
from problems import Case, make

from pacl_kernels import available_backends
from pacl_kernels.backends import cpu
from pacl_kernels.distributed import function as gather


@pytest.mark.skipif(available_backends()["cpu"] is not None, reason="the native module is not built")
@pytest.mark.parametrize("form", ["dot", "cosine"])
def test_scores_of_a_gather_are_kept(form, group, monkeypatch):
    """The backward's bits do not depend on it. Parts of 32 texts begin at a panel; those of 31 keep nothing."""
    rank, world = group.rank(), group.size()
    kept, keeping = [], gather.keeping
    monkeypatch.setattr(gather, "keeping", lambda *x: kept.append(keeping(*x)) or kept[-1])
    for size in (32, 31):
        problem = make(Case(size * world, 50, 128, mask="random"), form, "infonce")
        part = local_part(problem, local_rows([size] * world, rank))
        got = answer(part, group=group, exchange="gather", backend="cpu")
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "keeps_scores", lambda *_: False)
            without = answer(part, group=group, exchange="gather", backend="cpu")
        for name, x in without.items():
            assert torch.equal(got[name], x), name
    assert [x.kept for x in kept] == [[], None]  # the backward has taken the memory; without, there was none
