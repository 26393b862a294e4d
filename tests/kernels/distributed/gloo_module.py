"""A loss takes its group by name, and its module keeps the group when it is copied, saved, compiled or printed."""

from __future__ import annotations

import copy
import io
import os
import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
from gloo_loss import answer, local_part, local_rows
from problems import Case, Problem, make
from torch import nn

from pacl_kernels import PaclLoss, backends, fused_pacl_loss

# Build these at import, before any process group exists, as a training script's module may in its constructor.
assert not dist.is_initialized()
RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
EARLY = {
    "world": PaclLoss(group="world"),
    "open_clip": PaclLoss(rank=RANK, world_size=WORLD),
    "wrong": PaclLoss(rank=RANK, world_size=WORLD + 1),
    "nothing": PaclLoss(group=dist.group.WORLD),
}


@pytest.fixture
def whole(group) -> Problem:
    return make(Case(2 * group.size(), 5, 8), "dot", "infonce", torch.float64)


@pytest.fixture
def mine(whole, group) -> Problem:
    return local_part(whole, local_rows([2] * group.size(), group.rank()))


@pytest.fixture
def unwarned(monkeypatch):
    monkeypatch.setattr(backends, "_warned", set())


def value(loss: nn.Module, problem: Problem):
    return loss(problem.patches, problem.texts, 10.0)


def expected(problem: Problem, group):
    return fused_pacl_loss(problem.patches, problem.texts, 10.0, group=group)


def test_names_of_all_processes_and_of_one(whole, mine, group):
    torch.testing.assert_close(answer(mine, group="world")["value"], answer(whole, group="local")["value"])
    assert torch.equal(expected(mine, "world"), expected(mine, group))
    local = fused_pacl_loss(mine.patches, mine.texts, 10.0, group="local", backend="reference")
    torch.testing.assert_close(expected(mine, "local"), local)
    assert group.size() == 1 or expected(mine, "local") != expected(mine, "world")


def test_a_module_built_before_the_process_group(mine, group):
    assert torch.equal(value(EARLY["world"], mine), expected(mine, group))
    assert torch.equal(value(EARLY["open_clip"], mine), expected(mine, group))
    with pytest.raises(ValueError, match=f"world_size {WORLD + 1}, expected {RANK} and {WORLD} as in the group"):
        value(EARLY["wrong"], mine)


def test_no_choice_warns_once(mine, group, unwarned):
    """A group left at its default warns: it is None before `init_process_group`, so the intention is unknown."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for loss in (EARLY["nothing"], PaclLoss(), fused_pacl_loss):
            assert torch.equal(value(loss, mine), expected(mine, "local"))
    assert len(caught) == (group.size() > 1)
    for warning in caught:
        for name in ("group='world'", "group='local'", f"all {group.size()} processes"):
            assert name in str(warning.message)


def test_a_choice_does_not_warn(mine, group, unwarned):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for loss in (PaclLoss(group="local"), PaclLoss(group="world"), PaclLoss(group=group)):
            value(loss, mine)


def saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        copy.copy,
        lambda module: pickle.loads(pickle.dumps(module)),
        saved,
        lambda module: torch.optim.swa_utils.AveragedModel(module).module,
    ],
    ids=["deepcopy", "copy", "pickle", "save", "average"],
)
def test_copies_of_the_default_group(copied, mine, group):
    module = PaclLoss(group=group)
    other = copied(module)
    assert other.group == module.group == "world" and "group='world'" in repr(other)
    assert torch.equal(value(other, mine), expected(mine, group))


def test_copies_of_a_part_of_the_processes(mine, group):
    """Copies share the group; saving to a file is an error that says why."""
    if group.size() < 3:
        pytest.skip("needs processes outside the group")
    part = dist.new_group([0, 1])
    if group.rank() < 2:
        model = nn.Sequential(PaclLoss(group=part))
        assert "group=<2 processes>" in repr(model)
        for other in (copy.deepcopy(model), torch.optim.swa_utils.AveragedModel(model).module, copy.copy(model)):
            assert other[0].group is part
            assert torch.equal(value(other[0], mine), expected(mine, part))
        for save in (pickle.dumps, saved):
            with pytest.raises(TypeError, match="group is a process group .* cannot be pickled: expected 'world'"):
                save(model)
        model[0].group = "world"
        pickle.dumps(model)
    dist.barrier()


@pytest.mark.parametrize("how", ["world", "open_clip", "none"])
def test_compiled(how, mine, group):
    """A compiled module equals the eager one; the compiler looks up the group's name while it traces."""
    torch._dynamo.reset()
    options = {
        "world": {"group": "world"},
        "open_clip": {"rank": group.rank(), "world_size": group.size()},
        "none": {},
    }[how]
    module = PaclLoss(**options)
    patches, texts = (x.float().requires_grad_() for x in (mine.patches, mine.texts))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    values = [function(patches, texts, 10.0) for function in (compiled, module)]
    grads = [torch.autograd.grad(x, (patches, texts)) for x in values]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*grads)


def test_function_transforms_take_no_group(mine, group):
    """Function transforms accept only "local", or "world" if there is one process."""

    def grad(name):
        return torch.func.grad(lambda p: fused_pacl_loss(p, mine.texts, 10.0, group=name))(mine.patches)

    local = grad("local")
    if group.size() == 1:
        assert torch.equal(grad("world"), local)
        return
    with pytest.raises(RuntimeError, match="group is one of several processes, expected None or 'local' inside"):
        grad("world")
