"""`PaclLoss` can be moved, copied, saved and printed like any module; `distributed/gloo_module.py` tests its groups."""

import copy
import io
import pickle

import pytest
import torch
from accuracy import call
from problems import Case, make
from torch import nn

import pacl_kernels
from pacl_kernels import PaclLoss, fused_pacl_loss

SETTINGS = {
    "attn_temperature": 0.07,
    "form": "cosine",
    "loss": "sigmoid",
    "group": "local",
    "exchange": "ring",
    "backend": "torch",
}


def inputs():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, 5, generator=generator), torch.randn(4, 5, generator=generator), 10.0


def test_repr_shows_every_setting():
    """The repr shows every setting and is a call that makes the same module."""
    module = PaclLoss(**SETTINGS)
    assert all(f"{name}={value!r}" in repr(module) for name, value in SETTINGS.items())
    assert "rank=0, world_size=1" in repr(module)
    assert repr(eval(repr(module))) == repr(module)
    assert "attn_temperature=tensor(0.0700)" in repr(PaclLoss(attn_temperature=torch.tensor(0.07)))


def saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": saved,
    "AveragedModel": lambda module: torch.optim.swa_utils.AveragedModel(module).module,
}


@pytest.mark.parametrize("group", [None, "world", "local"])
@pytest.mark.parametrize("how", COPIES)
def test_copies(how, group):
    module = PaclLoss(**SETTINGS | {"group": group, "attn_temperature": torch.tensor(0.07)})
    other = COPIES[how](nn.ModuleList([module]))[0] if how != "copy" else copy.copy(module)
    assert repr(other) == repr(module) and other.group == group
    assert torch.equal(other(*inputs()), module(*inputs()))


@pytest.mark.parametrize("how", [how for how in COPIES if how != "copy"])
def test_a_computed_temperature_is_not_copied(how):
    """A copy would not follow the parameter; a shallow copy shares the tensor."""
    module = PaclLoss(attn_temperature=nn.Parameter(torch.tensor(-2.0)).exp())
    with pytest.raises(TypeError, match="attn_temperature is a tensor computed from others, which cannot be deep-copi"):
        COPIES[how](module)
    other = copy.copy(module)
    assert other is not module and other.attn_temperature is module.attn_temperature
    assert torch.equal(other(*inputs()), module(*inputs()))


@pytest.mark.parametrize("how", COPIES)
def test_copies_of_a_learnable_temperature(how):
    """A Parameter is copied with the module, and its state loads strictly."""
    module = PaclLoss(attn_temperature=nn.Parameter(torch.tensor(0.07)))
    other = COPIES[how](module)
    assert (other.attn_temperature is module.attn_temperature) == (how == "copy")
    assert isinstance(other.attn_temperature, nn.Parameter) and list(other.state_dict()) == ["attn_temperature"]
    other.load_state_dict({"attn_temperature": torch.tensor(0.2)})
    torch.testing.assert_close(other(*inputs()), fused_pacl_loss(*inputs(), attn_temperature=0.2))


@pytest.mark.parametrize("name", pacl_kernels.__all__)
def test_every_public_name_pickles(name):
    value = getattr(pacl_kernels, name)
    assert pickle.loads(pickle.dumps(value)) is value or isinstance(value, str)
    assert copy.deepcopy(value) is value


def test_names_without_distributed_training():
    """Without a process group "world" and "local" mean this process, so a program also runs in one process."""
    expected = fused_pacl_loss(*inputs())
    for group in (None, "world", "local"):
        assert torch.equal(fused_pacl_loss(*inputs(), group=group), expected)
        assert torch.equal(PaclLoss(group=group)(*inputs()), expected)


def test_a_tensor_temperature_moves_with_the_module():
    module = nn.Sequential(PaclLoss(attn_temperature=torch.tensor(0.07)))
    before = module[0](*inputs())
    for cast in (module.half, module.bfloat16, module.double):
        cast()
        assert module[0].attn_temperature.dtype == torch.float32, "16 bits would round it"
        assert torch.equal(module[0](*inputs()), before)
    assert module.to("meta")[0].attn_temperature.device.type == "meta"
    assert module.to_empty(device="cpu")[0].attn_temperature.device.type == "cpu"


def test_a_temperature_that_is_no_state():
    """A fixed temperature is not in checkpoints, and a schedule may assign a number or a tensor to it."""
    module = PaclLoss(attn_temperature=torch.tensor(0.07))
    assert not module.state_dict() and not list(module.parameters())
    module.load_state_dict({})
    for tau in (0.05, torch.tensor(0.05)):
        module.attn_temperature = tau
        torch.testing.assert_close(module(*inputs()), fused_pacl_loss(*inputs(), attn_temperature=0.05))
    assert module.to("meta").attn_temperature.device.type == "meta"


def test_a_learnable_temperature():
    """A temperature that is a Parameter is registered; one computed from a Parameter keeps its graph."""
    tau = nn.Parameter(torch.tensor(0.07))
    module = PaclLoss(attn_temperature=tau)
    assert [name for name, _ in module.named_parameters()] == ["attn_temperature"]
    assert module.double().attn_temperature is tau and tau.dtype == torch.float64
    log_tau = nn.Parameter(torch.tensor(-2.0))
    module = PaclLoss(attn_temperature=log_tau.exp())
    module.double()(*inputs()).backward()
    assert log_tau.grad.isfinite() and log_tau.grad != 0


def test_open_clip_call(single):
    """The module takes open_clip's keywords and scalars, and returns its dictionary on request."""
    problem = make(Case(5, 7, 33, mask="random"), "cosine", "sigmoid", device=single.device)
    module = PaclLoss(attn_temperature=0.1, form="cosine", loss="sigmoid", backend=single.backend)
    outputs = {"image_features": problem.patches, "text_features": problem.texts, "logit_scale": problem.logit_scale}
    got = module(**outputs, logit_bias=problem.logit_bias, patch_mask=problem.patch_mask, output_dict=True)
    assert list(got) == ["contrastive_loss"]
    assert torch.equal(got["contrastive_loss"], call(problem, single.backend))
    positional = module(problem.patches, problem.texts, problem.logit_scale, problem.logit_bias, problem.patch_mask)
    assert torch.equal(positional, got["contrastive_loss"])
    defaults = PaclLoss()(problem.texts[:, None], problem.texts, problem.logit_scale)
    assert torch.equal(defaults, fused_pacl_loss(problem.texts[:, None], problem.texts, problem.logit_scale))
    assert not list(module.parameters()) and "cosine" in repr(module) and "sigmoid" in repr(module)
