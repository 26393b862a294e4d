"""φ of any inputs on any backend: packed patches, texts of many tokens, and the options of the attention.

A backend computes φ of patches `[B, N, D]` and texts `[K, D]`. Everything else is made of such calls, unless the
backend has a way of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends
from .checks import Scalar, check_sum
from .packed import Group, groups, starts_of
from .tokens import BLOCK_BYTES, Tokens, tokens_of
from .tolerance import KeptPairs


class Call(NamedTuple):
    """Inputs of φ `[B, K]` and the backend that computes it.

    Patches are `[B, N, D]`, or packed `[ΣN, D]` with lengths; the mask is `[B, N]` or `[ΣN]`. Texts are `[K, D]`, or
    with `text_pool` `[K, L, D]` with or without a mask `[K, L]`, or packed `[ΣL, D]` with lengths. With `text_index`,
    lists of texts, φ and everything like it is `[B, M]`; the backend must take lists (`backends.takes_lists`), and
    with `text_pool` the state is empty.
    """

    backend: str
    patches: Tensor
    texts: Tensor
    patch_mask: Tensor | None
    temperature: Scalar
    form: str
    patch_lengths: Tensor | None = None  # int64 [B] on the CPU
    text_mask: Tensor | None = None
    text_lengths: Tensor | None = None  # int64 [K]
    text_pool: str | None = None
    text_pool_scale: float = 1.0
    null_patch: bool = False
    normalize: str = "both"
    text_index: Tensor | None = None  # int64 [B, M], -1 for none

    def forward(
        self, phi: Tensor, state: Tensor, scores: Tensor | None = None, scores_texts: tuple[int, int] = (0, 0)
    ) -> None:
        """Write φ and the state, see `ops.compatibility_forward`."""
        call = self._rectangle()
        if call._is_one_call:
            of_scores: dict[str, Any] = {} if scores is None else {"scores": scores, "scores_texts": scores_texts}
            call._forward_of_rows(phi, state, **of_scores)
            return
        tokens = call._tokens()
        rows = call.texts if tokens is None else tokens.rows
        if not len(rows):  # no text has a token
            phi.zero_()
            return
        kept = (phi, state) if tokens is None else _kept(state, len(phi), len(rows))
        for part in call._parts(rows, tokens, phi):
            own = part.compute(phi)
            if part.tokens is not None:
                phi[part.images] = part.tokens.pool(own[0])
            for to, x in zip(kept, own, strict=False):
                to[part.images] = x

    def backward(
        self, phi: Tensor, state: Tensor, grad_phi: Tensor, grad_patches: Tensor | None, grad_texts: Tensor | None,
        grad_temperature: Tensor | None, keeps_scores: bool = False, grad_tolerance: float = 0.0,
    ) -> KeptPairs | None:  # fmt: skip
        """Write the gradients whose buffers are not None, see `ops.compatibility_backward`.

        Return what was kept if pairs were left out.
        """
        call = self._rectangle()
        if grad_patches is not None:
            grad_patches = grad_patches.view(call.patches.shape)
        if call._is_one_call:
            arguments: dict[str, Any] = {"keeps_scores": True} if keeps_scores else {}
            if grad_tolerance and self.text_index is None and backends.drops_pairs(self.backend):
                arguments["grad_tolerance"] = grad_tolerance
            return call._backward_of_rows(
                *(phi, state, grad_phi, grad_patches, grad_texts, grad_temperature), **arguments
            )
        tokens = call._tokens()
        rows = call.texts if tokens is None else tokens.rows
        kept = (phi, state) if tokens is None else _kept(state, len(phi), len(rows))
        texts_sum = temperature_sum = None
        if grad_texts is not None:
            into = grad_texts.view(-1, grad_texts.shape[-1])
            in_place = into.shape == rows.shape and into.dtype == phi.dtype
            texts_sum = _Sum(into if in_place else phi.new_empty(rows.shape))
        if grad_temperature is not None:
            temperature_sum = _Sum(phi.new_empty(()))
        for part in call._parts(rows, tokens, phi) if len(rows) else ():
            own = tuple(x[part.images] for x in kept) if kept else part.compute(phi)
            grad = grad_phi[part.images]
            if part.tokens is not None:
                grad = part.tokens.spread(own[0], grad)
            of_patches = None if grad_patches is None else part.gradient(grad_patches)
            part.call._backward_of_rows(
                *(x.contiguous() for x in (*own, grad)),
                of_patches,
                *(None if x is None else x.buffer() for x in (texts_sum, temperature_sum)),
            )
            if of_patches is not None and grad_patches is not None:
                part.put(of_patches, grad_patches)
            for x in (texts_sum, temperature_sum):
                if x is not None:
                    x.add()
        if grad_patches is not None and not len(rows):
            grad_patches.zero_()
        if texts_sum is not None and texts_sum.total is not into:
            if tokens is not None and tokens.places is not None:
                into.zero_()
                into[tokens.places] = texts_sum.total.to(into.dtype)
            else:
                into.copy_(texts_sum.total)
        if grad_temperature is not None and temperature_sum is not None:
            grad_temperature.copy_(temperature_sum.total)
        return None

    @property
    def _is_one_call(self) -> bool:
        return self.text_pool is None and (self.patch_lengths is None or self._takes_packed_patches)

    @property
    def _takes_packed_patches(self) -> bool:
        return backends.takes_packed_patches(self.backend, self.form, self.text_index is not None)

    def _rectangle(self) -> Call:
        """Return the call with packed patches as a rectangle, if all images have the same number."""
        lengths = self.patch_lengths
        if lengths is None:
            return self
        check_sum("patch_lengths", lengths, "patches", len(self.patches))  # nobody else does inside torch.compile
        if len(lengths) == 0 or not (0 < lengths[0] and bool((lengths == lengths[0]).all())):
            return self
        shape = len(lengths), int(lengths[0])
        mask = None if self.patch_mask is None else self.patch_mask.unflatten(0, shape)
        return self._replace(patches=self.patches.unflatten(0, shape), patch_mask=mask, patch_lengths=None)

    def _tokens(self) -> Tokens | None:
        if self.text_pool is None:
            return None
        return tokens_of(self.texts, self.text_mask, self.text_lengths, self.text_pool, self.text_pool_scale)

    def _forward_of_rows(self, *arguments: Tensor, **kept: Any) -> None:
        backend: Any = backends.get_for(self.backend, self.patches)
        backend.compatibility_forward(*self._inputs, *arguments, **self._options, **kept)

    def _backward_of_rows(self, *arguments: Tensor | None, **kept: Any) -> KeptPairs | None:
        backend: Any = backends.get_for(self.backend, self.patches)
        used: KeptPairs | None = backend.compatibility_backward(*self._inputs, *arguments, **self._options, **kept)
        return used

    @property
    def _inputs(self) -> tuple[Any, ...]:
        return self.patches, self.texts, self.patch_mask, self.temperature, self.form

    @property
    def _options(self) -> dict[str, Any]:
        """The options that differ from their default; not every backend has all of them."""
        options: dict[str, Any] = {}
        if self.null_patch:
            options["null_patch"] = True
        if self.normalize != "both":
            options["normalize"] = self.normalize
        if self.patch_lengths is not None:
            options["patch_lengths"] = self.patch_lengths
        if self.text_index is not None:
            options["text_index"] = self.text_index
        return options

    def _parts(self, rows: Tensor, tokens: Tokens | None, phi: Tensor) -> Iterator[_Part]:
        """Yield calls of the backend that together have all images, with the rows of all texts."""
        lists = self.text_index
        columns = len(rows) if lists is None else lists.shape[1]
        if lists is not None and tokens is not None:
            columns = max(1, tokens.longest(lists))
        most = max(1, BLOCK_BYTES // (3 * phi.element_size() * columns))
        call = self._replace(texts=rows, text_mask=None, text_lengths=None, text_pool=None)

        def of_lists(part: _Part) -> _Part:
            if lists is None:
                return part
            index = lists[part.images]
            if tokens is None:
                return part._replace(call=part.call._replace(text_index=index))
            own, numbers = tokens.listed(index, columns)
            return part._replace(call=part.call._replace(text_index=numbers), tokens=own)

        lengths = self.patch_lengths
        if lengths is not None and not self._takes_packed_patches:
            row_bytes = self.patches.shape[1] * self.patches.element_size()
            for group in groups(lengths, row_bytes, most, self.patches.device):
                patches, mask = group.gather(self.patches, self.patch_mask)
                part = call._replace(patches=patches, patch_mask=mask, patch_lengths=None)
                yield of_lists(_Part(group.images, part, group, tokens))
            return
        starts = None if lengths is None else starts_of(lengths).tolist()
        for first in range(0, len(phi), most):
            images = slice(first, min(first + most, len(phi)))
            some = images if starts is None else slice(starts[images.start], starts[images.stop])
            part = call._replace(
                patches=self.patches[some],
                patch_mask=None if self.patch_mask is None else self.patch_mask[some],
                patch_lengths=None if lengths is None else lengths[images],
            )
            yield of_lists(_Part(images, part, some, tokens))


class _Part(NamedTuple):
    """Call of a backend for some of the images."""

    images: slice | Tensor
    call: Call
    place: slice | Group  # of its patches
    tokens: Tokens | None  # of all texts, or of the lists of these images

    def compute(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        """Return new φ and state of these images, in the dtype of `phi`."""
        count, index = len(phi[self.images]), self.call.text_index
        columns = len(self.call.texts) if index is None else index.shape[1]
        own = phi.new_empty(count, columns), phi.new_empty(count, columns)
        self.call._forward_of_rows(*own)
        return own

    def gradient(self, grad_patches: Tensor) -> Tensor:
        """Return a buffer for the gradient of the patches of this part."""
        if isinstance(self.place, Group):
            return grad_patches.new_empty(self.call.patches.shape)
        return grad_patches[self.place]

    def put(self, grad: Tensor, into: Tensor) -> None:
        if isinstance(self.place, Group):
            self.place.scatter(grad, into)


class _Sum:
    """Sum of what several calls write into a buffer; `total` may hold anything before."""

    def __init__(self, total: Tensor) -> None:
        self.total = total.zero_()
        self._part: Tensor | None = None
        self._first = True

    def buffer(self) -> Tensor:
        if self._first:
            return self.total
        if self._part is None:
            self._part = torch.empty_like(self.total)
        return self._part

    def add(self) -> None:
        if not self._first and self._part is not None:
            self.total += self._part
        self._first = False


def _kept(state: Tensor, images: int, tokens: int) -> tuple[Tensor, ...]:
    """Return φ and the state of all tokens `[B, T]`, views of what the forward leaves, or nothing."""
    if not state.numel():
        return ()
    phi, state = state[: 2 * images * tokens].view(2, images, tokens)
    return phi, state
