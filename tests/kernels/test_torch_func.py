"""`torch.func`: reverse mode and vmap agree with the plain formula; forward mode and second derivatives are errors."""

import pytest
import torch
from problems import FORMS
from torch import func, nn

from pacl_kernels import compatibility, fused_pacl_loss, upsample_argmax

B, K, N, D, SAMPLES = 4, 3, 6, 5, 2


def randn(*shape: int, device: str, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def pairs(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    return randn(B, N, D, device=device), randn(B, D, device=device, seed=1)


def same(make, target, *inputs):
    """Assert that `make(backend)` gives the same results for the target's backend and for the reference."""
    got, expected = (make(backend)(*inputs) for backend in (target.backend, "reference"))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def loss_of(form: str, loss: str, mask=None):
    def make(backend):
        def function(patches, texts, scale, bias, tau):
            return fused_pacl_loss(
                *(patches, texts, scale),
                **dict(logit_bias=bias, attn_temperature=tau, patch_mask=mask, form=form, loss=loss, backend=backend),
            )

        return function

    return make


def scalars(device: str) -> list[torch.Tensor]:
    return [torch.tensor(x, device=device) for x in (3.0, -0.5, 0.4)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
def test_grad_and_vjp_of_the_loss(form, loss, single):
    """`grad` and `vjp` reach every differentiable argument, also if the vjp is called after its transform has ended."""
    make, inputs = loss_of(form, loss), (*pairs(single.device), *scalars(single.device))
    same(lambda backend: func.grad_and_value(make(backend), argnums=(0, 1, 2, 3, 4)), single, *inputs)
    same(lambda backend: lambda *x: func.vjp(make(backend), *x)[1](x[2]), single, *inputs)


def test_grad_of_some_arguments(single):
    """The gradient of the patches alone is right, with a number as scale and frozen texts."""
    patches, texts = pairs(single.device)
    mask = randn(B, N, device=single.device) > -0.5

    def make(backend):
        return func.grad(lambda p: fused_pacl_loss(p, texts, 10.0, patch_mask=mask, backend=backend))

    same(make, single, patches)


def test_functional_call(single):
    """`functional_call` gives the gradients of a module's parameters."""
    patches, texts = pairs(single.device)
    embed = nn.Linear(D, D).to(single.device)

    def make(backend):
        def value(parameters):
            return fused_pacl_loss(func.functional_call(embed, parameters, patches), texts, 10.0, backend=backend)

        return func.grad(value)

    same(make, single, {name: x.detach() for name, x in embed.named_parameters()})


@pytest.mark.parametrize("form", FORMS)
def test_jacrev_of_the_compatibility(form, single):
    def make(backend):
        def phi(patches, texts, tau):
            return compatibility(patches, texts, attn_temperature=tau, form=form, backend=backend)

        return func.jacrev(phi, argnums=(0, 1, 2))

    patches, texts = pairs(single.device)
    same(make, single, patches, texts[:K], torch.tensor(0.4, device=single.device))


@pytest.mark.parametrize("outer", ["vmap of grad", "grad of vmap", "vmap"])
@pytest.mark.parametrize("texts_dim", [None, 1])
def test_vmap_of_the_loss(outer, texts_dim, single):
    """`vmap` works along any dimension, over all arguments or some."""
    patches = randn(SAMPLES, B, N, D, device=single.device)
    texts = randn(B, D, device=single.device) if texts_dim is None else randn(B, SAMPLES, D, device=single.device)
    mask = randn(SAMPLES, B, N, device=single.device) > -0.5

    def make(backend):
        def loss(p, t, m):
            return fused_pacl_loss(p, t, 10.0, patch_mask=m, backend=backend)

        dims = (0, texts_dim, 0)
        if outer == "vmap of grad":
            return func.vmap(func.grad(loss, argnums=(0, 1)), dims)
        mapped = func.vmap(loss, dims)
        return mapped if outer == "vmap" else func.grad(lambda *x: mapped(*x).square().sum(), argnums=(0, 1))

    same(make, single, patches, texts, mask)


def test_vmap_of_the_compatibility(single):
    """`vmap` may map the texts alone; the samples share everything else."""
    patches, _ = pairs(single.device)

    def make(backend):
        return func.vmap(lambda t: compatibility(patches, t, backend=backend))

    same(make, single, randn(SAMPLES, K, D, device=single.device))


FORWARD = {
    "jvp": lambda f, x: func.jvp(f, (x,), (x,)),
    "jacfwd": lambda f, x: func.jacfwd(f)(x),
    "hessian": lambda f, x: func.hessian(f)(x),
    "jvp of grad": lambda f, x: func.jvp(func.grad(f), (x,), (x,)),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("transform", FORWARD)
def test_forward_mode_is_refused(transform, single):
    patches, texts = pairs(single.device)
    for function in (
        lambda p, **options: fused_pacl_loss(p, texts, 10.0, **options),
        lambda p, **options: compatibility(p, texts, **options).sum(),
    ):
        with pytest.raises(
            NotImplementedError, match="no derivative in forward mode .*expected reverse mode"
        ) as caught:
            FORWARD[transform](lambda p, function=function: function(p, backend=single.backend), patches)
        assert "\n" not in str(caught.value)
        FORWARD[transform](lambda p, function=function: function(p, backend="reference"), patches)  # as the error says


def test_a_missing_kernel_is_not_taken_for_forward_mode(single, monkeypatch):
    def fails(*arguments):
        raise NotImplementedError("no kernel for this device")

    monkeypatch.setattr("pacl_kernels.autograd.compatibility", fails)
    with pytest.raises(NotImplementedError, match="^no kernel for this device$"):
        compatibility(*pairs(single.device), backend=single.backend)


@pytest.mark.parametrize("transform", [func.grad, func.jacrev])
def test_second_derivative_is_refused(transform, single):
    patches, texts = pairs(single.device)

    def first(p):
        return transform(lambda x: fused_pacl_loss(x, texts, 10.0, backend=single.backend))(p)

    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        transform(lambda p: first(p).sum())(patches)


@pytest.mark.parametrize("scale_dim", [None, 0])
def test_upsample_argmax(scale_dim, single):
    """Under vmap each sample gets the same result as alone, and derivatives treat the results as constants."""
    scores = randn(SAMPLES, 2, 3, 4, 5, device=single.device)
    scale = torch.tensor(2.0, device=single.device) if scale_dim is None else randn(SAMPLES, device=single.device).exp()

    def labels(x, s):
        return upsample_argmax(x, (7, 6), return_best=True, return_entropy=True, logit_scale=s, backend=single.backend)

    got = func.vmap(labels, (0, scale_dim))(scores, scale)
    for i in range(SAMPLES):
        expected = labels(scores[i], scale if scale_dim is None else scale[i])
        assert all(torch.equal(x[i], y) for x, y in zip(got, expected, strict=True))
    assert torch.equal(func.vmap(lambda x: upsample_argmax(x, (7, 6), backend=single.backend))(scores), got[0])
    grad, aux = func.grad(lambda x: ((x * labels(x, 2.0)[1].sum()).sum(), labels(x, 2.0)[0]), has_aux=True)(scores[0])
    assert torch.equal(grad, labels(scores[0], 2.0)[1].sum().expand_as(grad))
    assert torch.equal(aux, labels(scores[0], 2.0)[0])
