"""The operators write every element of their buffers, and nothing outside."""

import ast
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from accuracy import assert_accurate, evaluate, natural_sizes
from problems import FORMS, Case, make

from pacl_kernels import ops

CANARY = 12345.0
PAD = 64
CASES = [
    Case(1, 1, 1),
    Case(3, 7, 5, K=2),
    Case(5, 50, 33, K=49),
    Case(17, 3, 67, K=97),
    Case(2, 1369, 31, K=5),
    Case(3, 197, 130, K=7, mask="random"),
    Case(4, 9, 16, K=5, mask="none"),
    Case(4, 9, 16, K=5, data="zero_patches"),
    Case(4, 9, 16, K=5, data="zero_texts"),
    Case(2, 9, 16, K=5, tau=0.01),
    Case(0, 3, 4, K=5),
    Case(5, 3, 4, K=0),
]


class Guarded:
    """Hold a buffer full of NaN inside a larger one full of canaries."""

    def __init__(self, shape, dtype, device):
        size = torch.Size(shape).numel()
        self.whole = torch.full((size + 2 * PAD,), CANARY, dtype=dtype, device=device)
        self.inside = self.whole[PAD : PAD + size].view(shape)
        self.inside.fill_(float("nan"))

    def assert_written(self, what):
        assert not self.inside.isnan().any(), f"{what}: {int(self.inside.isnan().sum())} elements were left out"
        canary = torch.tensor(CANARY).to(self.whole.dtype).item()
        around = torch.cat([self.whole[:PAD], self.whole[len(self.whole) - PAD :]])
        assert (around == canary).all(), f"{what}: written past its end"


def _guarded_inputs(problem):
    """Return patches and texts with NaN directly before and after them in memory."""
    guarded = []
    for x in (problem.patches, problem.texts):
        whole = torch.full((x.numel() + 2 * PAD,), float("nan"), dtype=x.dtype, device=x.device)
        guarded.append(whole[PAD : PAD + x.numel()].view(x.shape).copy_(x))
    return guarded


@pytest.mark.sampled(2)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_buffers(case, form, target):
    problem = make(case, form, "compatibility", target.dtype, target.device)
    patches, texts = _guarded_inputs(problem)
    arguments = (patches, texts, problem.patch_mask, problem.attn_temperature, 1.0, form, target.backend)
    wide = problem.upstream.dtype
    phi, state = (Guarded(problem.upstream.shape, wide, target.device) for _ in range(2))
    torch.ops.pacl_kernels.compatibility_forward(*arguments, phi.inside, state.inside, None)
    phi.assert_written("phi")
    state.assert_written("state")
    saved = phi.inside.clone(), state.inside.clone()
    expected = evaluate(problem, target.backend)
    assert_accurate("phi", phi.inside, expected["value"], target.dtype)
    shapes = {
        "patches": (patches.shape, target.dtype),
        "texts": (texts.shape, target.dtype),
        "attn_temperature": ((), wide),
    }
    for asked in product((True, False), repeat=3):
        grads = {
            name: Guarded(*shape, target.device)
            for (name, shape), ask in zip(shapes.items(), asked, strict=True)
            if ask
        }
        buffers = [grads[name].inside if name in grads else None for name in shapes] + [None]
        torch.ops.pacl_kernels.compatibility_backward(*arguments, phi.inside, state.inside, problem.upstream, *buffers)
        sizes = natural_sizes(problem)
        for name, grad in grads.items():
            grad.assert_written(name)
            assert_accurate(name, grad.inside, expected[name], target.dtype, natural=sizes[name])
    assert torch.equal(phi.inside, saved[0]) and torch.equal(state.inside, saved[1]), "backward wrote to what it reads"


@pytest.mark.parametrize("form", FORMS)
def test_nan_from_above(form, target):
    """A NaN in ∂L/∂φ reaches only the gradients of its image, its text and the temperature.

    In the form "max" it reaches only the winning patch of its image; the temperature's gradient stays 0.
    """
    problem = make(Case(4, 9, 16, K=5), form, "compatibility", target.dtype, target.device)
    clean = evaluate(problem, target.backend)
    upstream = problem.upstream.clone()
    upstream[1, 2] = float("nan")
    arguments = (problem.patches, problem.texts, None, problem.attn_temperature, 1.0, form, target.backend)
    phi, state = torch.empty_like(upstream), torch.empty_like(upstream)
    torch.ops.pacl_kernels.compatibility_forward(*arguments, phi, state, None)
    patches, texts, tau = torch.empty_like(problem.patches), torch.empty_like(problem.texts), phi.new_empty(())
    torch.ops.pacl_kernels.compatibility_backward(*arguments, phi, state, upstream, patches, texts, tau, None)
    reached = patches[1, int(state[1, 2])] if form == "max" else patches[1]
    assert reached.isnan().all() and texts[2].isnan().all()
    assert patches[1].isnan().sum() == reached.numel() and (tau == 0 if form == "max" else tau.isnan())
    assert_accurate("patches", patches[[0, 2, 3]], clean["patches"][[0, 2, 3]], target.dtype)
    assert_accurate("texts", texts[[0, 1, 3, 4]], clean["texts"][[0, 1, 3, 4]], target.dtype)


def test_the_oldest_torch_can_read_the_annotations():
    """They are types: torch.library of torch 2.6 takes neither a string, nor `Tensor | None`."""
    module = ast.parse(Path(ops.__file__).read_text())
    assert not any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in module.body)
    functions = [
        node
        for node in module.body
        if isinstance(node, ast.FunctionDef) and any("_operator" in ast.unparse(x) for x in node.decorator_list)
    ]
    assert [x.name for x in functions] == [k for k, x in vars(ops).items() if isinstance(x, torch._ops.OpOverload)]
    for function in functions:
        annotations = [argument.annotation for argument in function.args.args]
        assert all(isinstance(annotation, ast.Name) for annotation in annotations), function.name


def test_the_first_call_does_not_import_the_compiler():
    """It takes seconds to import; an operator of `torch.library.custom_op` imports it at its first call."""
    program = """
import sys, torch, pacl_kernels
patches, texts = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 4)
for loss in ("infonce", "sigmoid"):
    pacl_kernels.fused_pacl_loss(patches, texts, 10.0, loss=loss).backward()
pacl_kernels.upsample_argmax(torch.randn(1, 2, 3, 4), (6, 8))
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)
