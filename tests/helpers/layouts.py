"""Inputs of other layouts: packed patches, texts of many tokens, the null patch, rows that are not normalised."""

from __future__ import annotations

from itertools import product

import torch
from accuracy import assert_accurate
from problems import FORMS, OBJECTIVES

from pacl_kernels import compatibility, fused_pacl_loss, reference

B, N, K, L, D = 6, 11, 7, 5, 23
PATCHES = ("plain", "mask", "packed", "packed-mask", "packed-equal")
TEXTS = ("single", "tokens", "tokens-mask", "packed")
POOLS = ("mean", "sum", "max", "logsumexp")
SCALARS = ("attn_temperature", "logit_scale")


class Layout:
    """Inputs of one call in float64, from which those of a dtype are rounded."""

    def __init__(self, patches, texts, pool, form, tau, null_patch, normalize, objective, seed=0):
        self.generator = torch.Generator().manual_seed(seed)
        self.options = dict(form=form, null_patch=null_patch, normalize=normalize)
        # Raw products have a standard deviation of √D here; a small τ would leave one patch all the attention.
        self.tensors = {"attn_temperature": torch.tensor(tau * (D**0.5 if normalize != "both" else 1.0)).double()}
        self._set_patches(patches)
        self._set_texts(texts, pool)
        self.objective, self.of_backend = objective, {}  # options that the formula does not have
        if objective == "compatibility":
            self.upstream = self._randn(B, K)
            return
        self.tensors["logit_scale"] = torch.tensor(3.0).double()
        self.options |= {"loss": objective, "text_ids": torch.randint(-1, B, (K,), generator=self.generator)}
        self.upstream = torch.tensor(1.0).double()

    def _randn(self, *shape):
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def _set_patches(self, kind):
        lengths = torch.tensor([0, 4, N, 1, 3, 0])
        if kind == "packed-equal":
            lengths = torch.full((B,), 4)
        if kind.startswith("packed"):
            self.options["patch_lengths"] = lengths
        rows = (int(lengths.sum()),) if kind.startswith("packed") else (B, N)
        self.tensors["patches"] = self._randn(*rows, D)
        if kind.endswith("mask"):
            mask = torch.rand(rows, generator=self.generator) < 0.6
            mask[0] = False
            self.options["patch_mask"] = mask
            self.tensors["patches"][~mask] = float("nan")

    def _set_texts(self, kind, pool):
        if kind == "single":
            self.tensors["texts"] = self._randn(K, D)
            return
        self.options["text_pool"] = pool
        if pool == "logsumexp":
            self.options["text_pool_scale"] = 4.0
        lengths = torch.tensor([0, 2, L, 1, 3, 1, 0])
        if kind == "packed":
            self.tensors["texts"], self.options["text_lengths"] = self._randn(int(lengths.sum()), D), lengths.tolist()
            return
        self.tensors["texts"] = self._randn(K, L, D)
        if kind == "tokens-mask":
            mask = torch.stack([torch.randperm(L, generator=self.generator) < length for length in lengths])
            self.options["text_mask"] = mask
            self.tensors["texts"][~mask] = float("nan")

    def evaluate(self, backend, dtype, rounded, device="cpu"):
        """Return the value and the gradients, from patches and texts that were first rounded to `rounded`."""
        wide = torch.promote_types(dtype, torch.float32)
        tensors = {
            name: x.clone().to(rounded).to(device, dtype).requires_grad_()
            if name in ("patches", "texts")
            else x.clone().to(device, wide).requires_grad_()
            for name, x in self.tensors.items()
        }
        given = dict(tensors)
        options = {
            name: x.to(device) if isinstance(x, torch.Tensor) and not name.endswith("lengths") else x
            for name, x in self.options.items()
        }
        patches, texts, tau = (given.pop(name) for name in ("patches", "texts", "attn_temperature"))
        loss = self.objective != "compatibility"
        arguments = (patches, texts, *((given["logit_scale"],) if loss else ()))
        if backend == "reference":
            lengths = options.pop("text_lengths", None)
            options["text_lengths"] = None if lengths is None else torch.tensor(lengths)
            function = reference.pacl_loss if loss else reference.compatibility
        else:
            function = fused_pacl_loss if loss else compatibility
            options |= {"backend": backend, **self.of_backend}
        value = function(*arguments, attn_temperature=tau, **options)
        grads = torch.autograd.grad((value * self.upstream.to(value)).sum(), list(tensors.values()))
        return {name: x.cpu() for name, x in zip(("value", *tensors), (value, *grads), strict=True)}

    def check(self, backend, dtype, device="cpu"):
        """Assert that the backend answers within the tolerance of `accuracy.py`."""
        truth = self.evaluate("reference", torch.float64, dtype)
        plain = self.evaluate("reference", torch.promote_types(dtype, torch.float32), dtype)
        answer = self.evaluate(backend, dtype, dtype, device)
        scale = float(self.tensors.get("logit_scale", 1.0))
        of_rows = scale * self.upstream.norm().item() / D**0.5
        natural = {"value": 1.0, "patches": of_rows, "texts": of_rows}
        for name, true in truth.items():
            # A float32 scalar has a float32 gradient, even with float64 patches.
            coarser = torch.float32 if name in SCALARS and dtype == torch.float64 else dtype
            assert_accurate(name, answer[name], true, coarser, plain[name].double(), natural.get(name, scale))


# Texts 0 and 6 may have no token. Every image has a positive in its list, but one has no list.
LISTS = torch.tensor([[2, 4, -1], [1, 1, 2], [-1, -1, -1], [6, 0, -1], [3, -1, 5], [0, 2, 3]])


def layout_with_lists(*options):
    """Return a layout of a loss over `LISTS`."""
    layout = Layout(*options)
    layout.options |= {"text_index": LISTS, "text_ids": torch.tensor([-1, 1, 0, 5, 0, 4, 3])}
    return layout


# Arguments of `Layout`.
SINGLE = list(product(PATCHES, ("single",), ("mean",), FORMS, (0.3, 0.02), (False, True), ("both",), OBJECTIVES))
MANY = list(product(PATCHES, TEXTS[1:], POOLS, FORMS, (0.3, 0.02), (False, True), ("both",), OBJECTIVES))
RAW = list(product(PATCHES, TEXTS, POOLS, FORMS, (0.3, 0.02), (False, True), ("values", "none"), OBJECTIVES))
