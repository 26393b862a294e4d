"""`torch.compile` captures the loss in one graph with eager's results, and the operators obey their schemas."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from accuracy import assert_accurate, call, natural_sizes
from problems import DIFFERENTIABLE, FORMS, Case, make
from torch import nn

from pacl_kernels import PaclLoss, backends, compatibility, fused_pacl_loss, upsample_argmax

COMPATIBILITY_FORWARD = torch.ops.pacl_kernels.compatibility_forward.default
COMPATIBILITY_BACKWARD = torch.ops.pacl_kernels.compatibility_backward.default


def operator_arguments(problem, backend):
    """Return the operators' arguments before their buffers: with the temperature as a tensor, then as a number."""
    inputs = (problem.patches, problem.texts, problem.patch_mask)
    tau = problem.attn_temperature
    return [(*inputs, tau, 1.0, problem.form, backend), (*inputs, None, tau.item(), problem.form, backend)]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("form, mask", [("dot", None), ("cosine", "random"), ("max", "random")])
def test_opcheck(form, mask, single):
    _opcheck(form, mask, single)


@pytest.mark.sampled(2)
def test_opcheck_in_every_dtype(target):
    _opcheck("cosine", "random", target)


def _opcheck(form, mask, target):
    problem = make(Case(3, 5, 9, K=4, mask=mask), form, "compatibility", target.dtype, target.device)
    if mask is not None:  # opcheck compares inputs before and after a call, and takes NaN as unequal to itself
        problem = replace(problem, patches=problem.patches.nan_to_num(0, 0, 0))
    for arguments, skips in zip(operator_arguments(problem, target.backend), ((None, 0, 1, 2), (None,)), strict=True):
        phi, state = torch.empty_like(problem.upstream), torch.empty_like(problem.upstream)
        torch.library.opcheck(COMPATIBILITY_FORWARD, (*arguments, phi, state, None))
        COMPATIBILITY_FORWARD(*arguments, phi, state, None)
        buffers = (torch.empty_like(problem.patches), torch.empty_like(problem.texts), phi.new_empty(()))
        for skipped in skips:
            grads = [None if i == skipped else buffer for i, buffer in enumerate(buffers)]
            torch.library.opcheck(COMPATIBILITY_BACKWARD, (*arguments, phi, state, problem.upstream, *grads, None))


def _answer(function, problem):
    leaves = {name: getattr(problem, name).detach().clone().requires_grad_() for name in DIFFERENTIABLE}
    value = function(*leaves.values(), problem.patch_mask)
    grads = torch.autograd.grad(value, list(leaves.values()))
    return {"value": value.detach(), **dict(zip(leaves, grads, strict=True))}


def _same(compiled, eager, problem):
    """Assert that the compiled and the eager function have the same values and gradients."""
    expected, sizes = _answer(eager, problem), natural_sizes(problem)
    for name, got in _answer(compiled, problem).items():
        assert got.dtype == expected[name].dtype
        assert_accurate(name, got, expected[name], problem.patches.dtype, natural=sizes[name])


def _function(form, loss, backend):
    def function(patches, texts, scale, bias, tau, mask):
        options = {"patch_mask": mask, "form": form, "loss": loss, "backend": backend}
        return fused_pacl_loss(patches, texts, scale, logit_bias=bias, attn_temperature=tau, **options)

    return function


@pytest.mark.sampled(2)
@pytest.mark.parametrize("form, loss, mask", [("dot", "infonce", None), ("cosine", "sigmoid", "first")])
def test_fullgraph(form, loss, mask, single):
    """Inductor compiles the loss in one graph, and its code gives eager's results."""
    torch._dynamo.reset()
    function = _function(form, loss, single.backend)
    compiled = torch.compile(function, fullgraph=True)
    _same(compiled, function, make(Case(4, 9, 21, mask=mask), form, loss, single.dtype, single.device))


@pytest.mark.sampled(4)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
@pytest.mark.parametrize("mask", [None, "first"])
def test_fullgraph_traced(form, loss, mask, single):
    """Every option traces in one graph; leaving out Inductor saves minutes."""
    _traced(form, loss, mask, single)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
def test_fullgraph_traced_in_every_dtype(loss, target):
    _traced("cosine", loss, "first", target)


def _traced(form, loss, mask, target):
    torch._dynamo.reset()
    function = _function(form, loss, target.backend)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    _same(compiled, function, make(Case(4, 9, 21, mask=mask), form, loss, target.dtype, target.device))


@pytest.mark.sampled(4)
@pytest.mark.parametrize("form", FORMS)
def test_dynamic_batch(form, single):
    """One graph serves all batch sizes and numbers of patches."""
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    function = _function(form, "infonce", single.backend)
    for backend in (count, "aot_eager"):
        compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
        for b, n in ((4, 9), (7, 5), (2, 33)):
            _same(compiled, function, make(Case(b, n, 21, mask="first"), form, "infonce", device=single.device))
        torch._dynamo.reset()
    assert len(graphs) == 1


def test_numbers_and_module(single):
    """Scalars may be numbers, and the module may be called by keyword."""
    torch._dynamo.reset()
    module = PaclLoss(attn_temperature=0.2, form="cosine", backend=single.backend)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    problem = make(Case(4, 9, 21), "cosine", "infonce", device=single.device)
    arguments = {"image_features": problem.patches, "text_features": problem.texts, "logit_scale": 10.0}
    assert_accurate("loss", compiled(**arguments), module(**arguments), torch.float32)
    traced = compiled(**arguments, output_dict=True)["contrastive_loss"]
    assert_accurate("loss", traced, module(**arguments), torch.float32)


def test_compatibility_compiles(single):
    torch._dynamo.reset()
    problem = make(Case(4, 9, 21, K=3), "cosine", "compatibility", device=single.device)
    patches = problem.patches.requires_grad_()
    compiled = torch.compile(
        lambda p: call(replace(problem, patches=p), single.backend), fullgraph=True, backend="aot_eager"
    )
    eager = call(problem, single.backend)
    assert_accurate("phi", compiled(patches), eager, torch.float32)
    traced, expected = (
        torch.autograd.grad((phi * problem.upstream).sum(), patches)[0] for phi in (compiled(patches), eager)
    )
    assert_accurate("patches", traced, expected, torch.float32)


class Exported(nn.Module):
    """Wrap a function of this library in a module, as `torch.export` requires."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def _exports(function, inputs, dynamic, others):
    """Assert that the function, exported with `inputs`, gives eager's results for `others`.

    `dynamic` names the dimensions that may change.
    """
    # torch 2.6 refuses a size without an upper limit where it meets `arange`.
    shapes = (tuple({d: torch.export.Dim(name, min=2, max=2**31) for d, name in dims.items()} for dims in dynamic),)
    program = torch.export.export(Exported(function), inputs, dynamic_shapes=shapes).module()
    for other in (inputs, *others):
        torch.testing.assert_close(program(*other), function(*other), rtol=0, atol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
def test_export_of_the_loss(form, loss, single):
    """The loss exports with a dynamic batch size and number of patches."""

    def function(patches, texts, mask):
        options = {"patch_mask": mask, "attn_temperature": 0.1, "logit_bias": 0.5, "backend": single.backend}
        return fused_pacl_loss(patches, texts, 10.0, form=form, loss=loss, **options)

    problems = [make(Case(b, n, 21, mask="first"), form, loss, device=single.device) for b, n in ((4, 9), (7, 5))]
    first, second = ((x.patches, x.texts, x.patch_mask) for x in problems)
    _exports(function, first, ({0: "B", 1: "N"}, {0: "B"}, {0: "B", 1: "N"}), [second])


@pytest.mark.sampled(2)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_export_of_the_compatibility(form, backend):
    """`compatibility` exports with independent numbers of images and texts, also for the reference."""

    def function(patches, texts):
        return compatibility(patches, texts, form=form, backend=backend)

    first, second = ((torch.randn(b, 6, 7), torch.randn(k, 7)) for b, k in ((5, 3), (2, 9)))
    _exports(function, first, ({0: "B"}, {0: "K"}), [second])


class Scorer(nn.Module):
    """A model to serve: an embedder, and the compatibilities of its patches with any texts."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(12, 8)

    def forward(self, tokens, texts, mask):
        patches = self.embed(tokens)
        return compatibility(patches, texts, patch_mask=mask, attn_temperature=0.05, form="cosine")


def test_an_exported_model_is_saved_and_loaded(tmp_path):
    """One program serves any number of images, patches and texts, in a process that knows no class of ours."""
    torch.manual_seed(0)
    model = Scorer().eval()

    def inputs(b, n, k):
        return torch.randn(b, n, 12), torch.randn(k, 8), torch.rand(b, n) > 0.3

    images, texts, patches = (torch.export.Dim(name) for name in ("images", "texts", "patches"))
    shapes = {0: images, 1: patches}, {0: texts}, {0: images, 1: patches}
    exported = torch.export.export(model, inputs(4, 7, 3), dynamic_shapes=shapes, strict=False)  # True in torch 2.6
    torch.export.save(exported, tmp_path / "model.pt2")
    cases = [inputs(*sizes) for sizes in ((4, 7, 3), (1, 1, 1), (33, 196, 70), (0, 7, 3), (2, 7, 0))]
    torch.save(cases, tmp_path / "cases.pt")
    program = """
import torch, pacl_kernels
program = torch.export.load("model.pt2").module()
torch.save([program(*case) for case in torch.load("cases.pt")], "answers.pt")
"""
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    for case, answer in zip(cases, torch.load(tmp_path / "answers.pt"), strict=True):
        assert torch.equal(answer, model(*case))


def test_an_exported_program_keeps_its_backend(cpu_backend):
    """Inputs that the backend of the export cannot take are an error in one sentence."""
    inputs, scores = (torch.randn(2, 3, 8), torch.randn(2, 8)), torch.randn(1, 2, 3, 4)
    phi = torch.export.export(Exported(lambda p, t: compatibility(p, t, backend="cpu")), inputs).module()
    labels = torch.export.export(Exported(lambda x: upsample_argmax(x, (6, 8), backend="cpu")), (scores,)).module()
    expected = "backend 'cpu' cannot run here: it takes float32, bfloat16 and float16, not torch.float64"
    with pytest.raises(ValueError, match=expected):
        phi(*(x.double() for x in inputs))
    with pytest.raises(ValueError, match=expected):
        labels(scores.double())
    with pytest.raises(ValueError, match="backend 'cpu' cannot run here: it takes tensors on the CPU, not on meta"):
        backends.get_for("cpu", scores.to("meta"))


def test_export_of_the_formula():
    def function(patches, texts):
        return fused_pacl_loss(patches, texts, 10.0, backend="reference")

    first, second = ((torch.randn(b, 6, 7), torch.randn(b, 7)) for b in (5, 9))
    _exports(function, first, ({0: "B"}, {0: "B"}), [second])


def test_export_of_upsample_argmax(single):
    def function(scores):
        options = {"return_best": True, "return_entropy": True, "backend": single.backend}
        return upsample_argmax(scores, (20, 30), **options)

    first, second = (torch.randn(b, 3, 4, 5, device=single.device) for b in (2, 7))
    _exports(function, (first,), ({0: "B"},), [(second,)])
