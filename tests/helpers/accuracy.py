"""Compare a backend's answer with the truth, by one tolerance for all backends.

The truth is the reference in float64. It takes the backend's inputs, already rounded to the backend's dtype. The
relative error is the norm of the difference over the norm of the truth. The tolerance is twice the error of the plain
formula (the reference in float32 on the same inputs) plus `EXTRA`, which covers the rounding of the result to its
dtype. Below the smallest normal number of that dtype the rounding is absolute: half of the smallest subnormal for each
element.

A truth may vanish (saturated losses, one patch, D = 1), so its norm is floored at 1 % of a natural size. For a gradient
the natural size is `logit_scale / ‖x‖`, where x is one embedding: the loss depends on its direction only. In general,
let g = ∂L/∂φ `[B, K]`, |∂φ/∂p̂| ≈ 1/N and |∂φ/∂t̂| ≈ 1. Terms of independent sign then give these norms:

    patches          ‖g‖ · rms(1/‖p‖) / √N      (each of B N rows: ‖g‖/√B · 1/N · 1/‖p‖)
    texts            ‖g‖ · rms(1/‖t‖)           (each of K rows: ‖g‖/√K · 1/‖t‖)
    temperature      ‖g‖ / τ  for `compatibility`; logit_scale / τ for a loss, whose g is not of random sign
    scale, bias      1: each multiplies a mean of φ or of ones
    φ                1 for each element; the loss: 1

An unsaturated loss has ‖g‖ = logit_scale / √B, from the pairs. All sizes are multiplied by the incoming gradient. In
the cosine form, φ = u / r, each term carries 1/r, so the sizes are multiplied by the root mean square of 1/r. It is
about 1 for patches that agree, and 37 for 1369 random directions, which nearly cancel. In the form "max" the whole g
of a pair reaches one patch, so the size of the patches' gradient has no 1/√N.

In the form "max" rounding may decide between nearly equal patches, whose gradients have nothing in common. The truth
therefore uses the backend's winner, after checking that its score is the true maximum up to rounding. A patch that is
not finite and never wins may have a gradient of 0 or of 0 x NaN.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from functools import lru_cache, partial
from unittest import mock

import torch
from problems import DIFFERENTIABLE, Case, Problem, make
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pacl_kernels
from pacl_kernels import reference
from pacl_kernels.backends import computes_sigmoid_step, takes_lists
from pacl_kernels.reference import MIN_POOLED_NORM

EXTRA = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
FLOOR = 0.01
MAX_LOSS_SCALE = 2.0**16  # torch.amp.GradScaler starts with it
LARGEST_KEPT = 2**16  # elements of the patches of a case whose truth is kept


def check(problem: Problem, backend: str, needs: tuple[str, ...] = DIFFERENTIABLE) -> dict[str, Tensor | None]:
    """Assert that the backend answers within the tolerance, and return its answer."""
    return Expected(problem, needs, winners(problem, backend) if problem.form == "max" else None).check(backend)


def check_case(case: Case, form: str, objective: str, backend: str, dtype=torch.float32, device="cpu", seed=0):
    """Call `check` on a case; compute its truth once for all backends and instruction sets that a process tries."""
    arguments = (case, form, objective, dtype, device, seed)
    if case.B * case.N * case.D > LARGEST_KEPT:
        return check(make(*arguments), backend)
    problem, truths = _kept(*arguments)
    index = winners(problem, backend) if form == "max" else None
    chosen = None if index is None else tuple(index.flatten().tolist())
    if chosen not in truths:
        truths[chosen] = Expected(problem, index=index)
    return truths[chosen].check(backend)


@lru_cache(maxsize=4096)
def _kept(*arguments) -> tuple[Problem, dict]:
    """Return the problem, and its truths by the winners of the form "max"."""
    return make(*arguments), {}


class Expected:
    """Hold the float64 truth of a problem and the plain formula's errors; backends with equal winners share them."""

    def __init__(self, problem: Problem, needs: tuple[str, ...] = DIFFERENTIABLE, index: Tensor | None = None):
        self.needs, self.chosen = needs, contextlib.nullcontext if index is None else partial(as_chosen, problem, index)
        self.free = None if index is None else _never_chosen(problem, index) & ~problem.patches.isfinite().all(-1)
        self.truth = self._formula(problem.to(torch.float64))
        if problem.patches.dtype == torch.float16:
            # Scale as a gradient scaler does: the gradients of a mean over many patches would underflow in float16.
            problem = replace(problem, upstream=problem.upstream * _loss_scale(self.truth))
            self.truth = self._formula(problem.to(torch.float64))
        self.problem, self.sizes = problem, natural_sizes(problem)
        self.plain = self._plain_errors(problem, self.truth)

    def check(self, backend: str, shares: dict[str, float] | None = None) -> dict[str, Tensor | None]:
        """Assert that the backend answers within the tolerance, and return its answer.

        `shares` receives the used share of the tolerance for the value and each gradient.
        """
        answer = evaluate(self.problem, backend, self.needs)
        dtype, objective = self.problem.patches.dtype, self.problem.objective
        for name, true in self.truth.items():
            # A float32 scalar has a float32 gradient, even with float64 patches.
            coarser = max(dtype, answer[name].dtype, key=EXTRA.__getitem__)
            given = answer[name]
            if name == "patches" and self.free is not None:
                given, true = (x.masked_fill(self.free[..., None], 0.0) for x in (given, true))
            compared = (given, true, coarser, self.plain[name], self.sizes[name])
            share = assert_accurate(f"{objective}, {name}", *compared)
            if shares is not None:
                shares[name] = share
        for name in set(answer) - set(self.truth):
            assert answer[name] is None, f"gradient of {name}, which nobody asked for"
        return answer

    def ask_neighbours(self, count: int) -> None:
        """Raise the plain formula's error to its worst over this problem and `count` neighbours.

        A neighbour permutes D and changes the temperature by up to 1 %. Where patches cancel, or τ magnifies the
        rounding of a score, a single rounding decides, and the plain formula may have been right by chance.
        """
        generator = torch.Generator().manual_seed(0)
        for _ in range(count):
            order = torch.randperm(self.problem.patches.shape[-1], generator=generator)
            factor = 1 + 0.01 * (2 * torch.rand((), generator=generator).item() - 1)
            patches, texts = self.problem.patches[..., order], self.problem.texts[..., order]
            temperature = self.problem.attn_temperature * factor
            problem = replace(self.problem, patches=patches, texts=texts, attn_temperature=temperature)
            errors = self._plain_errors(problem, self._formula(problem.to(torch.float64)))
            self.plain = {name: max(error, errors[name]) for name, error in self.plain.items()}

    def _plain_errors(self, problem: Problem, truth: dict[str, Tensor]) -> dict[str, float]:
        plain = self._formula(problem.to(_wide(problem)))
        return {name: relative_error(plain[name].double(), true, self.sizes[name]) for name, true in truth.items()}

    def _formula(self, problem: Problem) -> dict[str, Tensor | None]:
        with self.chosen():
            return evaluate(problem, "reference", self.needs)


def winners(problem: Problem, backend: str) -> Tensor:
    """Return the winning patch `[B, K]` of the backend's "max", -1 where there is none, and assert that it is valid."""
    phi = problem.patches.new_full((len(problem.patches), len(problem.texts)), math.nan, dtype=_wide(problem))
    state = phi.clone()
    inputs = (problem.patches.detach(), problem.texts.detach(), problem.patch_mask, None, 1.0)
    torch.ops.pacl_kernels.compatibility_forward(*inputs, "max", backend, phi, state, None)
    if "text_index" in problem.pairs:  # products of lists may round in another way
        state = _with_winners_of_lists(problem, backend, state)
    index = state.long()
    assert torch.equal(index.to(state.dtype), state), "winners are not whole numbers"
    n = problem.patches.shape[1]
    mask = problem.patch_mask
    mask = torch.ones(len(phi), n, dtype=torch.bool, device=phi.device) if mask is None else mask
    some = mask.any(1, keepdim=True).expand_as(index)
    assert (index[~some] == -1).all() and ((index >= 0) & (index < n))[some].all(), "a winner that is no patch"
    assert mask.gather(1, index.clamp_min(0))[some].all(), "a masked patch won"
    return index


def _with_winners_of_lists(problem: Problem, backend: str, state: Tensor) -> Tensor:
    """Return the winners `[B, K]` with those of the listed pairs as the backend finds them for the lists."""
    index, k = problem.pairs["text_index"].long(), state.shape[1]
    inputs = (problem.patches.detach(), problem.texts.detach(), problem.patch_mask, None, 1.0)
    phi, listed = torch.empty_like(index, dtype=state.dtype), torch.empty_like(index, dtype=state.dtype)
    ran = backend if takes_lists(backend, "both") else "torch"
    torch.ops.pacl_kernels.compatibility_forward(*inputs, "max", ran, phi, listed, None, text_index=index)
    place = torch.where(index < 0, k, index)
    return torch.cat((state, state[:, :1]), 1).scatter(1, place, listed)[:, :k]


def as_chosen(problem: Problem, index: Tensor):
    """Return a context in which the reference takes patch `index` `[B, K]` as the maximum of each pair.

    The reference asserts that the score of that patch is the maximum up to rounding; the module docstring says why.
    """
    epsilon = torch.finfo(_wide(problem)).eps
    rounding = epsilon * (4 + 2 * math.sqrt(problem.patches.shape[-1]))  # two scores, each a sum over D

    def first_maximum(scores: Tensor) -> Tensor:
        score = scores.gather(-1, index.clamp_min(0)[..., None])[..., 0]
        short = scores.amax(-1) - score
        wrong = (short > rounding) | (score.isnan() != scores.amax(-1).isnan())
        assert not (wrong & (index >= 0)).any(), f"the winner's score is {short.nan_to_num(9).max():.3g} too low"
        return index.clamp_min(0)

    return mock.patch.object(reference, "first_maximum", first_maximum)


def _never_chosen(problem: Problem, index: Tensor) -> Tensor:
    """Return a mask `[B, N]`, True at patches that win for no text."""
    b, n, _ = problem.patches.shape
    never = torch.ones(b, n + 1, dtype=torch.bool, device=index.device)
    return never.scatter_(1, index.remainder(n + 1), False)[:, :n]


def _wide(problem: Problem) -> torch.dtype:
    return torch.promote_types(problem.patches.dtype, torch.float32)


class Inaccurate(AssertionError):
    """Report an error that is `share` times the tolerance."""

    share = math.inf


def assert_accurate(
    what, answer: Tensor, truth: Tensor, dtype, plain: Tensor | float | None = None, natural: float = 0.0
) -> float:
    """Assert that `answer`, from inputs of `dtype`, equals `truth` within the tolerance that the module describes.

    `plain` is the plain formula's answer, or its relative error.
    Return the error as a share of the tolerance; raise `Inaccurate` if it is above 1.
    """
    assert answer.shape == truth.shape, f"{what}: shape {list(answer.shape)}, expected {list(truth.shape)}"
    half_step = torch.finfo(answer.dtype).smallest_normal * torch.finfo(answer.dtype).eps / 2
    answer, truth = answer.detach().double(), truth.detach().double()
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        wrong = (kind(answer) != kind(truth)).nonzero()
        if len(wrong):
            at = tuple(wrong[0].tolist())
            raise AssertionError(
                f"{what}: {kind.__name__} differs at {len(wrong)} of {answer.numel()} elements, first at {at}: "
                f"{answer[at].item()}, expected {truth[at].item()}"
            )
    error = relative_error(answer, truth, natural)
    plain_error = relative_error(plain.double(), truth, natural) if isinstance(plain, Tensor) else plain or 0.0
    allowed = EXTRA[dtype] + 2 * plain_error
    if size := _size(truth[truth.isfinite()], natural):
        allowed += half_step * math.sqrt(truth.numel()) / size
    if not error <= allowed:
        worst = (answer - truth).nan_to_num(0, 0, 0).abs().argmax()
        at = tuple(int(i) for i in torch.unravel_index(worst, truth.shape))
        failure = Inaccurate(
            f"{what}: error {error:.3g}, allowed {allowed:.3g}; worst at {at}: {answer[at].item()}, "
            f"expected {truth[at].item()}"
        )
        failure.share = error / allowed
        raise failure
    return error / allowed


def relative_error(answer: Tensor, truth: Tensor, natural: float) -> float:
    """Return the norm of the difference over the floored norm of the truth, where the truth is finite."""
    finite = truth.isfinite()
    difference = (answer - truth)[finite].norm().item()
    if difference == 0:
        return 0.0
    size = _size(truth[finite], natural)
    return difference / size if size > 0 else math.inf


def _size(truth: Tensor, natural: float) -> float:
    return max(truth.norm().item(), FLOOR * natural)


def natural_sizes(problem: Problem) -> dict[str, float]:
    """Return the natural size of the value and of each gradient, as the module docstring defines it."""
    (b, n, _), k, tau = problem.patches.shape, len(problem.texts), float(problem.attn_temperature)
    if problem.objective == "compatibility":
        factor, value = 1.0, math.sqrt(b * k)
        grad_phi = temperature = problem.upstream.double().norm().item()
    else:
        factor, value = abs(float(problem.upstream)), 1.0
        temperature = factor * abs(float(problem.logit_scale))
        grad_phi = temperature / math.sqrt(b)
    if problem.form == "cosine":
        inverse = _inverse_pooled_norm(problem)
        grad_phi, temperature = grad_phi * inverse, temperature * inverse
    shared_by = 1 if problem.form == "max" else n
    return {
        "value": value,
        "patches": grad_phi * _inverse_norm(problem.patches, problem.patch_mask) / math.sqrt(shared_by),
        "texts": grad_phi * _inverse_norm(problem.texts),
        "attn_temperature": temperature / tau,
        "logit_scale": factor,
        "logit_bias": factor,
        "pair_bias": factor / math.sqrt(max(b, 1)),
    }


def _inverse_norm(x: Tensor, mask: Tensor | None = None) -> float:
    """Return the root mean square of 1/‖x‖ over the rows with a direction; 0 (an exact answer) if there is none."""
    norms = x.double().norm(dim=-1)
    norms = norms[norms.isfinite() & (norms > 0) & (True if mask is None else mask)]
    return norms.pow(-2).mean().sqrt().item() if len(norms) else 0.0


def _inverse_pooled_norm(problem: Problem) -> float:
    """Return the root mean square of 1/r over the pairs, at least 1."""
    double = problem.to(torch.float64)
    mask = (
        problem.patch_mask if problem.patch_mask is not None else torch.ones_like(problem.patches[..., 0], dtype=bool)
    )
    patches = reference.unit(double.patches.detach().masked_fill(~mask[..., None], 0.0))
    scores = patches @ reference.unit(double.texts.detach()).T / float(problem.attn_temperature)
    attention = scores.masked_fill(~mask[..., None], float("-inf")).softmax(1).nan_to_num(0.0)
    norms = (attention.mT @ patches).norm(dim=-1).clamp_min(MIN_POOLED_NORM)
    norms = norms[mask.any(1)]
    return max(1.0, norms.pow(-2).mean().sqrt().item()) if norms.numel() else 1.0


def _loss_scale(truth: dict[str, Tensor]) -> float:
    """Return the power of two, at most `MAX_LOSS_SCALE`, that brings the largest gradient to about 256."""
    grads = [truth[name] for name in ("patches", "texts") if truth.get(name) is not None and truth[name].numel()]
    largest = max((grad.nan_to_num(0, 0, 0).abs().max().item() for grad in grads), default=0.0)
    return min(MAX_LOSS_SCALE, 2.0 ** math.floor(math.log2(256 / largest))) if largest else MAX_LOSS_SCALE


class Spy(TorchDispatchMode):
    """Record the operators of this library that run: `calls` holds pairs (operator, its arguments by name)."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[str, dict]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "pacl_kernels":
            names = [argument.name for argument in func._schema.arguments]
            name = func._schema.name.removeprefix("pacl_kernels::")
            self.calls.append((name, dict(zip(names, args, strict=False)) | (kwargs or {})))
        return func(*args, **(kwargs or {}))

    def backends(self) -> set[tuple[str, str]]:
        return {(name, arguments["backend"]) for name, arguments in self.calls if "backend" in arguments}


def evaluate(problem: Problem, backend: str, needs: tuple[str, ...] = DIFFERENTIABLE) -> dict[str, Tensor | None]:
    """Return the value, and the gradient of each of `needs` that is a tensor and takes part (None for the others).

    Assert that the fused operators ran with that backend and computed only what was requested, that no input was
    written to, and that every gradient is contiguous and otherwise like its input.
    """
    names = DIFFERENTIABLE if problem.objective != "compatibility" else ("patches", "texts", "attn_temperature")
    leaves = {name: getattr(problem, name) for name in names}
    if "pair_bias" in problem.pairs:
        names, leaves = (*names, "pair_bias"), leaves | {"pair_bias": problem.pairs["pair_bias"]}
    leaves = {
        name: x.detach().requires_grad_(name in needs) if isinstance(x, Tensor) else x for name, x in leaves.items()
    }
    copies = {name: x.detach().clone() for name, x in leaves.items() if isinstance(x, Tensor)}
    with Spy() if backend != "reference" else contextlib.nullcontext() as spy:
        pairs = problem.pairs | {name: leaves[name] for name in problem.pairs if name in leaves}
        inputs = {name: x for name, x in leaves.items() if name not in pairs}
        value = call(replace(problem, pairs=pairs, **inputs), backend)
        asked = {name: x for name, x in leaves.items() if isinstance(x, Tensor) and x.requires_grad}
        upstream = problem.upstream
        upstream = upstream.clone() if isinstance(upstream, Tensor) else torch.full_like(value, upstream)
        grads = torch.autograd.grad(value, list(asked.values()), upstream, allow_unused=True) if asked else ()
    for name, copy in copies.items():
        torch.testing.assert_close(leaves[name].detach(), copy, rtol=0, atol=0, equal_nan=True)
    if backend == "reference":
        return {"value": value.detach(), **dict(zip(asked, grads, strict=True))}
    if isinstance(problem.upstream, Tensor):
        assert torch.equal(upstream, problem.upstream), "the incoming gradient was written to"
    scores = set(asked) & {"patches", "texts", "attn_temperature"}
    expected = {"compatibility_forward", "compatibility_backward"} if asked and scores else {"compatibility_forward"}
    if problem.objective != "compatibility" and not problem.pairs:
        expected |= {"loss_forward", "loss_backward"} if asked else {"loss_forward"}
    listed = "text_index" in problem.pairs
    if problem.objective == "sigmoid" and not listed:
        patches = next(arguments["patches"] for _, arguments in spy.calls if "patches" in arguments)
        if computes_sigmoid_step(backend, problem.form, patches.dtype, patches.shape[1]):
            expected, scores = {"sigmoid_step"}, set(asked)
    ran = "torch" if listed and not takes_lists(backend, "both") else backend
    assert spy.backends() == {(name, ran) for name in expected}
    for operator, arguments in spy.calls:
        if operator in ("compatibility_backward", "sigmoid_step"):
            given = {name for name, x in arguments.items() if name.startswith("grad_") and x is not None} - {"grad_phi"}
            wanted = {f"grad_{name.removeprefix('attn_').removeprefix('logit_')}" for name in scores}
            assert given == wanted, "buffers for gradients not asked for"
    for name, grad in zip(asked, grads, strict=True):
        assert (grad.shape, grad.dtype) == (leaves[name].shape, leaves[name].dtype), name
        assert grad.is_contiguous(), f"the gradient of {name} is not contiguous"
    return {"value": value.detach(), **dict.fromkeys(names), **dict(zip(asked, grads, strict=True))}


def call(problem: Problem, backend: str) -> Tensor:
    """Return φ or the loss; "reference" calls the formula itself, any other backend the public functions."""
    inputs, options = (problem.patches, problem.texts), problem.options()
    if problem.objective == "compatibility":
        if backend == "reference":
            return reference.compatibility(*inputs, **options)
        return pacl_kernels.compatibility(*inputs, **options, backend=backend)
    options |= {"logit_bias": problem.logit_bias, "loss": problem.objective, **problem.pairs}
    if backend == "reference":
        return reference.pacl_loss(*inputs, problem.logit_scale, **options)
    return pacl_kernels.fused_pacl_loss(*inputs, problem.logit_scale, **options, backend=backend)
