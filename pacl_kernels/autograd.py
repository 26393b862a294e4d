"""The autograd Functions: they allocate the operators' outputs and save what the backward needs.

They check nothing, because `loss.py` does. At most three `[B, K]` arrays are alive: φ and the backend's state between
forward and backward, and ∂L/∂φ in the backward.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from . import ops, tolerance
from .backends import keeps_scores
from .checks import Form, Inputs, Loss, Normalize, Scalar, TextPool
from .tokens import kept_pairs


class Options(NamedTuple):
    """Choices of a call, in this order; they are not checked.

    Attributes:
        form: as in `fused_pacl_loss`.
        loss: as in `fused_pacl_loss`, or None for the compatibility alone.
        backend: name of a backend that can run; not `"auto"`.
        kept: what the forward leaves for one backward, which takes it out: memory of the patches' gradient, in which
            the backend has kept scores (`keeping`), or finished gradients (`sigmoid_autograd`). A second backward
            computes it again. None: the forward leaves only tensors that autograd saves.
        grad_tolerance: as in `fused_pacl_loss`, a number.
        text_pool: as in `fused_pacl_loss`, like those below.
        text_pool_scale: a number.
        null_patch: True or False.
        normalize: a choice.
    """

    form: Form
    loss: Loss | None
    backend: str
    kept: list[Any] | None = None
    grad_tolerance: float = 0.0
    text_pool: TextPool | None = None
    text_pool_scale: float = 1.0
    null_patch: bool = False
    normalize: Normalize = "both"

    @property
    def of_phi(self) -> tuple[Any, ...]:
        """The options of φ that operators take after its inputs."""
        return self[5:]


OPTIONS_OF_PHI = "form", "text_pool", "text_pool_scale", "null_patch", "normalize"


class PerSample(torch.autograd.Function):
    """Function that `torch.func.vmap` calls once per sample, because the operators have no batching rule."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        # PyTorch asks for the signature at each call, and `inspect` would derive it anew.
        cls.forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]

    @classmethod
    def vmap(
        cls, info: Any, in_dims: tuple[int | None, ...], *arguments: Any
    ) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        calls = [
            cls.apply(*(x.select(d, i) if isinstance(d, int) else x for x, d in zip(arguments, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        outputs = tuple(None if samples[0] is None else torch.stack(samples) for samples in zip(*calls, strict=True))
        return outputs, tuple(None if output is None else 0 for output in outputs)


def first_output(function: type[PerSample], *arguments: Any) -> Tensor:
    """Call `function` and return its first output; only its backward needs the others."""
    output: Tensor
    if torch.compiler.is_compiling():
        output = function.apply(*arguments)[0]
        return output
    try:
        output = function.apply(*arguments)[0]
        return output
    except NotImplementedError as error:
        if torch.autograd.forward_ad._current_level < 0:
            raise
        # PyTorch refuses it too, but its message names nothing. A `jvp` that raises would break fullgraph=True.
        raise NotImplementedError(
            "a fused function has no derivative in forward mode (jvp, jacfwd, hessian), expected reverse mode (grad, "
            "vjp, jacrev) or backend='reference'"
        ) from error


Gradients = tuple[Tensor | None, ...]
Compute = Callable[..., Gradients]


class _Gradients(PerSample):
    """Backward whose results keep a graph to the tensors that they depend on; differentiating them is an error."""

    @staticmethod
    def forward(compute: Compute, grad: Tensor, *saved: Tensor | None) -> Gradients:
        return compute(grad, *saved)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> NoReturn:
        raise RuntimeError(
            "the PACL loss cannot be differentiated twice: only its first derivative is supported, unless "
            "backend='reference'"
        )


def first_order(backward: Callable[[Any, list[Any], Tensor], Gradients]) -> Callable[..., Gradients]:
    """Decorate a backward like `once_differentiable`, but raise for every second derivative.

    The original lets through a gradient that depends only on saved tensors (a gradient penalty). `backward` takes ctx,
    the values that `keep` saved and the gradient of the first output; no other output has a gradient.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> Gradients:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)

        def compute(grad: Tensor, *saved: Tensor | None) -> Gradients:
            return backward(ctx, [ctx.others.get(i, x) for i, x in enumerate(saved)], grad)

        saved = ctx.saved_tensors  # read once: a checkpoint refuses a second read, and hooks would copy again
        transformed = not torch.compiler.is_compiling() and (
            torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()
        )
        if transformed:
            return _Gradients.apply(compute, grad, *saved)  # type: ignore[no-any-return]  # `apply` is untyped
        with torch.no_grad():
            return compute(grad, *saved)

    return wrapper


def keep(ctx: Any, *values: Any) -> None:
    """Save tensors, numbers and None; `first_order` passes them to the backward."""
    ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in values))
    ctx.others = {i: x for i, x in enumerate(values) if not isinstance(x, Tensor)}


def only_first_has_gradient(ctx: Any, output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    if not torch.compiler.is_compiling():  # the compiler neither supports nor needs this
        ctx.set_materialize_grads(False)  # else autograd makes an array of zeros for each other output


class CompatibilityFunction(PerSample):
    """Compatibility φ `[B, K]` of patches `[B, N, D]` and texts `[K, D]`, float32 (float64 for float64 inputs).

    `apply(*inputs, options)`, with the fields of `Inputs`, returns a tuple that starts with φ. The other outputs are
    for the backward: `torch.func` demands that tensors saved for it are inputs or outputs.
    """

    @staticmethod
    def forward(
        patches: Tensor, texts: Tensor, patch_mask: Tensor | None, attn_temperature: Scalar,
        patch_lengths: Tensor | None, text_mask: Tensor | None, text_lengths: Tensor | None, options: Options,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        layout = patch_lengths, text_mask, text_lengths
        return compatibility(Inputs(patches, texts, patch_mask, attn_temperature, *layout), options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *values, ctx.options = inputs
        keep(ctx, *values, *output)
        only_first_has_gradient(ctx, output)

    @staticmethod
    @first_order
    def backward(ctx: Any, values: list[Any], grad_phi: Tensor) -> Gradients:
        *fields, phi, state = values
        inputs, (needs_patches, needs_texts, _, needs_temperature, *_) = Inputs(*fields), ctx.needs_input_grad
        if ctx.options.grad_tolerance and not torch.compiler.is_compiling():
            ctx.kept_pairs = None
        grads = compatibility_gradients(
            *(inputs, ctx.options, phi, state, grad_phi.contiguous(), needs_patches, needs_texts, needs_temperature),
            ctx=ctx,
        )
        return *of_inputs(inputs, *grads), None


class PaclFunction(PerSample):
    """Loss (0-D) with gradients for patches, texts, logit scale, temperature and logit bias.

    The `torch.autograd.Function` under `fused_pacl_loss`, for code that has already checked its arguments:
    `apply(*inputs, logit_scale, logit_bias, options)`, with the fields of `Inputs`. Scalars are numbers or tensors of
    one element, `options` is a value of `Options`. It returns a tuple that starts with the loss. The other outputs are
    for the backward: `torch.func` demands that tensors saved for it are inputs or outputs.
    """

    @staticmethod
    def forward(
        patches: Tensor, texts: Tensor, patch_mask: Tensor | None, attn_temperature: Scalar,
        patch_lengths: Tensor | None, text_mask: Tensor | None, text_lengths: Tensor | None,
        logit_scale: Scalar, logit_bias: Scalar | None, options: Options,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        layout = patch_lengths, text_mask, text_lengths
        phi, state = compatibility(Inputs(patches, texts, patch_mask, attn_temperature, *layout), options)
        value = phi.new_empty(())
        statistics = phi.new_empty(4, phi.shape[0]) if options.loss == "infonce" else None
        scalars = *ops.pair(logit_scale), *ops.pair(logit_bias)
        ops.loss_forward(phi, *scalars, options.loss, options.backend, value, statistics)
        return value, phi, state, *(() if statistics is None else (statistics,))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *values, ctx.options = inputs
        _, phi, state, *statistics = output
        keep(ctx, *values, phi, state, *(statistics or (None,)))
        only_first_has_gradient(ctx, output)

    @staticmethod
    @first_order
    def backward(ctx: Any, values: list[Any], grad_loss: Tensor) -> Gradients:
        *fields, logit_scale, logit_bias, phi, state, statistics = values
        inputs, (needs_patches, needs_texts, _, needs_temperature, *_) = Inputs(*fields), ctx.needs_input_grad
        if ctx.options.grad_tolerance and not torch.compiler.is_compiling():
            ctx.kept_pairs = None
        needs_scale, needs_bias, _ = ctx.needs_input_grad[-3:]
        grad_phi = torch.empty_like(phi)
        grad_scale, grad_bias = (phi.new_empty(()) if needs else None for needs in (needs_scale, needs_bias))
        scalars = *ops.pair(logit_scale), *ops.pair(logit_bias)
        ops.loss_backward(
            phi, *scalars, ctx.options.loss, ctx.options.backend, statistics, grad_loss, grad_phi, grad_scale, grad_bias
        )
        grads = compatibility_gradients(
            inputs, ctx.options, phi, state, grad_phi, needs_patches, needs_texts, needs_temperature, ctx=ctx
        )
        return *of_inputs(inputs, *grads), like(grad_scale, logit_scale), like(grad_bias, logit_bias), None


class PairLossFunction(PerSample):
    """Loss (0-D) of φ `[B, K]` with any positives, with gradients for φ, logit scale, logit bias and pair bias.

    `apply(phi, logit_scale, logit_bias, image_ids, text_ids, targets, pair_bias, text_index, text_count, loss)` returns
    a tuple that starts with the loss; the other outputs are for the backward. With `text_index` `[B, M]`, in which no
    text is twice in a list, φ is that of the listed ones of `text_count` texts, and so are targets and pair bias.
    """

    @staticmethod
    def forward(
        phi: Tensor, logit_scale: Scalar, logit_bias: Scalar | None, image_ids: Tensor | None, text_ids: Tensor | None,
        targets: Tensor | None, pair_bias: Tensor | None, text_index: Tensor | None, text_count: int, loss: Loss,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        value = phi.new_empty(())
        sizes = phi.shape[0], text_count
        statistics = tuple(phi.new_empty(4, size) for size in sizes) if loss == "infonce" else ()
        scalars = *ops.pair(logit_scale), *ops.pair(logit_bias)
        ops.pair_loss_forward(
            phi, *scalars, image_ids, text_ids, targets, pair_bias, loss, value, *(statistics or (None, None)),
            text_index,
        )  # fmt: skip
        return value, *statistics

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *values, _, ctx.loss = inputs
        keep(ctx, *values, *(output[1:] or (None, None)))
        only_first_has_gradient(ctx, output)

    @staticmethod
    @first_order
    def backward(ctx: Any, values: list[Any], grad_loss: Tensor) -> Gradients:
        phi, logit_scale, logit_bias, *given, text_index, row_statistics, column_statistics = values
        needs_scale, needs_bias, _, _, _, needs_pair_bias, *_ = ctx.needs_input_grad[1:]
        grad_phi = torch.empty_like(phi)
        grad_scale, grad_bias = (phi.new_empty(()) if needs else None for needs in (needs_scale, needs_bias))
        grad_pair_bias = torch.empty_like(phi) if needs_pair_bias else None
        scalars = *ops.pair(logit_scale), *ops.pair(logit_bias)
        ops.pair_loss_backward(
            phi, *scalars, *given, ctx.loss, row_statistics, column_statistics,
            grad_loss, grad_phi, grad_scale, grad_bias, grad_pair_bias, text_index,
        )  # fmt: skip
        of_scalars = like(grad_scale, logit_scale), like(grad_bias, logit_bias)
        return grad_phi, *of_scalars, None, None, None, grad_pair_bias, None, None, None


def like(grad: Tensor | None, scalar: Any) -> Tensor | None:
    """Return a 0-D gradient in the dtype and shape of its scalar, a tensor unless `grad` is None."""
    return None if grad is None else grad.to(scalar.dtype).reshape(scalar.shape)


def in_functorch() -> bool:
    """Return True inside `torch.func`, where a backward must not write into what the forward has made."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def needed(*values: Tensor | Scalar | None) -> tuple[bool, ...]:
    """Return for each value if a backward is to come for it. Inside `torch.func` the answer may be a wrong no."""
    return tuple(torch.is_grad_enabled() and isinstance(x, Tensor) and x.requires_grad for x in values)


def keeping(options: Options, inputs: Inputs) -> Options:
    """Return the options of a call that keeps scores, if its backend can and a gradient of the patches is expected.

    Only for one call of a Function, outside of `torch.compile` and `torch.func`.
    """
    patches = inputs.patches
    if not needed(patches)[0] or torch.compiler.is_compiling() or in_functorch():
        return options
    if options.text_pool is not None or not keeps_scores(options.backend, options.form, patches.dtype):
        return options
    return options._replace(kept=[patches.new_empty(patches.shape)])


def compatibility(inputs: Inputs, options: Options, scores_texts: tuple[int, int] = (0, 0)) -> tuple[Tensor, Tensor]:
    """Return φ `[B, K]` and the state, `[B, K]` or what texts of many tokens leave, which the backward reads.

    `scores_texts`: `all_texts` and `first_text` of the operator.
    """
    patches, texts, patch_mask, attn_temperature, *layout = inputs
    dtype = torch.float64 if patches.dtype == torch.float64 else torch.float32
    phi = patches.new_empty(inputs.images, inputs.text_count, dtype=dtype)
    if options.text_pool is None:
        state = torch.empty_like(phi)
    else:
        state = phi.new_empty(kept_pairs(inputs.images, inputs.tokens, phi.element_size()))
    ops.compatibility_forward(
        patches, texts, patch_mask, *ops.pair(attn_temperature), options.form, options.backend, phi, state,
        *(options.kept or (None,)), *layout, *options.of_phi, None, *scores_texts,
    )  # fmt: skip
    return phi, state


def compatibility_gradients(
    inputs: Inputs,
    options: Options,
    phi: Tensor,
    state: Tensor,
    grad_phi: Tensor,
    needs_patches: bool,
    needs_texts: bool,
    needs_temperature: bool,
    texts_dtype: torch.dtype | None = None,
    ctx: Any = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the needed gradients of patches, texts (in `texts_dtype`, by default their own) and temperature.

    With `options.grad_tolerance` add to `ctx.kept_pairs`, None at first, what `tolerance.kept_pairs` returns.
    """
    patches, texts, patch_mask, attn_temperature, *layout = inputs
    grad_patches, keeps_scores = None, False
    if needs_patches:
        keeps_scores = bool(options.kept)
        grad_patches = options.kept.pop() if options.kept else patches.new_empty(patches.shape)
    grad_texts = texts.new_empty(texts.shape, dtype=texts_dtype) if needs_texts else None
    grad_temperature = phi.new_empty(()) if needs_temperature else None
    kept_pairs = torch.zeros(3, dtype=torch.float64) if options.grad_tolerance else None
    if needs_patches or needs_texts or needs_temperature:
        ops.compatibility_backward(
            patches, texts, patch_mask, *ops.pair(attn_temperature), options.form, options.backend,
            phi, state, grad_phi, grad_patches, grad_texts, grad_temperature, kept_pairs, keeps_scores,
            *layout, *options.of_phi, None, options.grad_tolerance,
        )  # fmt: skip
    if ctx is not None and kept_pairs is not None and not torch.compiler.is_compiling():
        ctx.kept_pairs = tolerance.added(ctx.kept_pairs, kept_pairs)
    return grad_patches, grad_texts, grad_temperature


def of_inputs(
    inputs: Inputs, grad_patches: Tensor | None, grad_texts: Tensor | None, grad_temperature: Tensor | None
) -> Gradients:
    """Return a gradient or None for each field of `inputs`."""
    return grad_patches, grad_texts, None, like(grad_temperature, inputs.attn_temperature), None, None, None
