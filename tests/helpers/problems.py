"""Problems for tests: the inputs of one call, made from a short description."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

FORMS = ("dot", "cosine", "max")
ISAS = ("baseline", "avx2", "avx512", "avx512bf16", "amx", "emulated_amx", "neonbf16")  # emulated_amx: sanitizers
OBJECTIVES = ("compatibility", "infonce", "sigmoid")
DIFFERENTIABLE = ("patches", "texts", "logit_scale", "logit_bias", "attn_temperature")


@dataclass(frozen=True)
class Case:
    """Describe a problem. `K=None` makes it square (K = B), as the losses require."""

    B: int = 5
    N: int = 7
    D: int = 33
    K: int | None = None
    tau: float = 0.1
    scale: float = 10.0
    data: str = "related"
    mask: str | None = None
    layout: str = "contiguous"
    bias: float | None = -0.7

    def __str__(self) -> str:
        size = f"B{self.B}-N{self.N}-D{self.D}" + (f"-K{self.K}" if self.K is not None else "")
        default, other = Case(), []
        for name in ("tau", "scale", "data", "mask", "layout", "bias"):
            if (value := getattr(self, name)) != getattr(default, name):
                other.append(f"{name}={value}" if name in ("tau", "scale", "bias") else str(value))
        return "-".join([size, *other])

    @property
    def objectives(self) -> tuple[str, ...]:
        return OBJECTIVES if self.K is None else OBJECTIVES[:1]


@dataclass(frozen=True)
class Problem:
    """Hold the inputs of `compatibility` or of a loss, and the incoming gradient: a factor, or `[B, K]`."""

    patches: Tensor
    texts: Tensor
    logit_scale: float | Tensor
    logit_bias: float | Tensor | None
    attn_temperature: float | Tensor
    patch_mask: Tensor | None
    form: str
    objective: str
    upstream: float | Tensor
    pairs: dict[str, Tensor] = field(default_factory=dict)  # ids, targets and bias of the pairs

    def options(self) -> dict:
        return {"patch_mask": self.patch_mask, "attn_temperature": self.attn_temperature, "form": self.form}

    def to(self, dtype: torch.dtype) -> Problem:
        """Return the same problem in another dtype."""
        floats = (*DIFFERENTIABLE, "upstream")
        values = {name: getattr(self, name) for name in floats}
        pairs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in self.pairs.items()}
        return replace(self, pairs=pairs, **{name: x.to(dtype) for name, x in values.items() if isinstance(x, Tensor)})


def make(case: Case, form: str, objective: str, dtype=torch.float32, device="cpu", seed: int = 0) -> Problem:
    """Make the problem that `case` describes.

    The scalars are 0-D tensors in float32, or in float64 for float64 inputs.
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    b, n, d, k = case.B, case.N, case.D, case.B if case.K is None else case.K
    patches, texts = randn(b, n, d), randn(k, d)
    _DATA[case.data](patches, texts, randn, dtype)
    mask = None if case.mask is None else _masked(case.mask, patches, generator)
    patches, texts = _LAYOUTS[case.layout](patches.to(device, dtype)), texts.to(device, dtype)
    # With the texts expanded along D too, the problem would in effect have D = 1: all gradients are rounding errors.
    texts = _LAYOUTS["strided" if case.layout == "expanded_last" else case.layout](texts)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scale, bias, tau = (
        None if x is None else torch.tensor(x, dtype=wide, device=device) for x in (case.scale, case.bias, case.tau)
    )
    upstream = randn(b, k).to(device, wide) if objective == "compatibility" else 1.0
    mask = None if mask is None else mask.to(device)
    return Problem(patches, texts, scale, bias, tau, mask, form, objective, upstream)


def _related(patches, texts, randn, dtype):
    """Make each text resemble one patch of its image, as after some training, so that the softmax has a choice."""
    for i in range(min(len(patches), len(texts)) if patches.shape[1] else 0):
        texts[i] += 2 * patches[i, i % patches.shape[1]]


def _aligned(patches, texts, randn, dtype):
    """Saturate the loss: with a large logit scale every pair is certain and all gradients vanish."""
    patches.mul_(1e-2)
    for i in range(min(len(patches), len(texts))):
        patches[i] += texts[i]


def _norms(patches, texts, randn, dtype):
    """Spread norms over eighteen orders of magnitude, or six in float16, which holds no more."""
    decades = 3 if dtype == torch.float16 else 9
    for x in (patches, texts):
        x *= 10 ** (decades * torch.tanh(randn(*x.shape[:-1], 1)))


def _large(patches, texts, randn, dtype):
    patches.mul_(1e3 / patches.shape[-1] ** 0.5)
    texts.mul_(1e3 / patches.shape[-1] ** 0.5)


def _small(patches, texts, randn, dtype):
    patches.mul_(1e-3 / patches.shape[-1] ** 0.5)
    texts.mul_(1e-3 / patches.shape[-1] ** 0.5)


def _zero_patches(patches, texts, randn, dtype):
    patches[:, ::2] = 0
    patches[0] = 0


def _zero_texts(patches, texts, randn, dtype):
    texts[::2] = 0


def _duplicated(patches, texts, randn, dtype):
    patches[:, 1:] = patches[:, :1]
    texts[1:] = texts[:1]


def _equal_images(patches, texts, randn, dtype):
    """Collapse the images: the contributions of a text to the patches' gradients cancel over the images."""
    patches[1:] = patches[:1]


def _equal_texts(patches, texts, randn, dtype):
    """Collapse the texts: the contributions of a patch to the texts' gradients cancel over the texts."""
    texts[1:] = texts[:1]


def _equal_patches(patches, texts, randn, dtype):
    patches[:, 1:] = patches[:, :1]


def _copies(patches, texts, randn, dtype):
    """Repeat the first half of the batch in its second half, and likewise the patches within every image."""
    for x in (patches, texts, patches.transpose(0, 1)):
        half = len(x) // 2
        x[half : 2 * half] = x[:half].clone()


def _near(distance):
    """Return a maker of patches and texts that share a direction up to `distance`, as CLIP's do."""

    def near(patches, texts, randn, dtype):
        direction = randn(patches.shape[-1])
        for x in (patches, texts):
            x.mul_(distance).add_(direction)

    return near


def _huge(patches, texts, randn, dtype):
    """Draw norms up to the largest that the dtype can hold."""
    largest, decades = torch.finfo(dtype).max, 3 if dtype == torch.float16 else 25
    for x in (patches, texts):
        x /= x.abs().amax(-1, keepdim=True)
        x *= 0.99 * largest * 10 ** (-decades * torch.sigmoid(2 * randn(*x.shape[:-1], 1)))


def _tiny(patches, texts, randn, dtype):
    """Draw norms down to 1e-14.

    Some lie below the threshold under which a row has no direction, none so near to it that rounding decides.
    """
    decades = 4 if dtype == torch.float16 else 14
    for x in (patches, texts):
        norm = 10 ** (-decades * torch.sigmoid(2 * randn(*x.shape[:-1], 1)))
        norm[(norm > 0.5e-12) & (norm < 2e-12)] = 2e-12
        x *= norm / x.norm(dim=-1, keepdim=True)


def _opposite(patches, texts, randn, dtype):
    """Pair each patch p with -p, so that the pooled patch of the cosine form is a small difference."""
    half = patches.shape[1] // 2
    patches[:, half : 2 * half] = -patches[:, :half]


def _cancelled(patches, texts, randn, dtype):
    """Pair each patch p with -p, orthogonal to every text: the pooled patch is exactly 0 and its norm is at the floor.

    With a single pair, the gradient of the texts, 1e6 (p - p), is exactly 0 in any order of summation.
    """
    patches.zero_(), texts.zero_()
    texts[:, 1::2] = randn(*texts[:, 1::2].shape)
    half = patches.shape[1] // 2
    patches[:, :half, ::2] = randn(*patches[:, :half, ::2].shape)
    patches[:, half : 2 * half] = -patches[:, :half]


def _nan(patches, texts, randn, dtype):
    patches[0, 0, 0] = float("nan")
    patches[-1, -1, -1] = float("inf")


def _spoilt(patches, texts, randn, dtype):
    """Put a NaN or an infinity into one patch or one text."""
    value, place = torch.tensor([float("nan"), float("inf"), -float("inf")]), randn(3)
    x = patches if place[0] > 0 else texts
    if x.numel():
        x.view(-1)[int(place[1].abs() * 1e6) % x.numel()] = value[int(place[2].abs() * 1e6) % 3]


_DATA = {
    "related": _related,
    "random": lambda *_: None,
    "aligned": _aligned,
    "norms": _norms,
    "large": _large,
    "small": _small,
    "zero_patches": _zero_patches,
    "zero_texts": _zero_texts,
    "duplicated": _duplicated,
    "opposite": _opposite,
    "cancelled": _cancelled,
    "nan": _nan,
    "equal_images": _equal_images,
    "equal_texts": _equal_texts,
    "equal_patches": _equal_patches,
    "copies": _copies,
    "near_1e-1": _near(1e-1),
    "near_1e-2": _near(1e-2),
    "near_1e-3": _near(1e-3),
    "near_1e-4": _near(1e-4),
    "huge": _huge,
    "tiny": _tiny,
    "spoilt": _spoilt,
}


def _masked(kind: str, patches: Tensor, generator: torch.Generator) -> Tensor:
    """Return a mask, and poison the masked patches: infinity in those of odd index, NaN in the others."""
    b, n = patches.shape[:2]
    mask = {
        "random": torch.rand(b, n, generator=generator) < 0.6,
        "all": torch.ones(b, n, dtype=torch.bool),
        "none": torch.zeros(b, n, dtype=torch.bool),
        "one": torch.arange(n) == torch.randint(n, (b, 1), generator=generator),
        "first": torch.arange(n) < torch.randint(1, n + 1, (b, 1), generator=generator),
        "last": (torch.arange(n) == n - 1).expand(b, n).clone(),
    }[kind]
    if kind == "random":
        mask[0] = False  # one image without a patch among others that have some
    patches[~mask] = float("nan")
    patches[~mask & (torch.arange(n) % 2 == 1)] = float("inf")
    return mask


def _offset(x: Tensor) -> Tensor:
    """Copy to contiguous memory at an address that is not aligned for vector loads."""
    return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)


_LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "offset": _offset,
    "strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],  # last dimension strided
    "spaced": lambda x: x.repeat_interleave(3, -2)[..., ::3, :],  # gaps between rows
    "transposed": lambda x: x.mT.contiguous().mT,
    "permuted": lambda x: x.permute(*reversed(range(x.ndim))).contiguous().permute(*reversed(range(x.ndim))),
    "expanded": lambda x: x[:1].expand_as(x),
    "expanded_rows": lambda x: x[..., :1, :].expand_as(x),
    "expanded_last": lambda x: x[..., :1].expand_as(x),
}


# Every backend is tested on these sizes, contents and strides.
SHAPES = [
    Case(1, 1, 1),
    Case(1, 1, 1, K=3),
    Case(2, 1, 1),
    Case(4, 9, 1),
    Case(3, 5, 2),
    Case(1, 7, 33),
    Case(1, 1369, 5),
    Case(7, 1, 129),
    Case(2, 2, 1023),
    Case(3, 1369, 17),
    Case(2, 1369, 520, K=3),  # without a loss, which sees φ alone: the formula takes a second
    Case(17, 13, 31),
    Case(9, 196, 67),
    Case(5, 49, 511),
    Case(33, 50, 65),
    Case(49, 15, 64),
    Case(65, 8, 96),
    Case(97, 3, 7),
    Case(3, 577, 40),
    Case(1, 3, 5, K=100),
    Case(100, 3, 5, K=1),
    Case(3, 21, 19, K=47),
    Case(5, 197, 77, K=49),
    Case(2, 255, 257, K=131),
    Case(0, 3, 4, K=5),
    Case(5, 3, 4, K=0),
    Case(0, 3, 4, K=0),
]
CONTENTS = [
    *(Case(tau=tau) for tau in (0.01, 0.02, 0.049, 0.05, 0.3, 1.0, 10.0)),
    *(Case(9, 100, 20, tau=tau, scale=100.0) for tau in (0.01, 0.07, 10.0)),
    Case(scale=100.0),
    Case(scale=100.0, data="aligned"),
    Case(12, 20, 40, scale=100.0, data="aligned", tau=1.0),
    Case(data="random"),
    Case(data="random", tau=0.01),
    Case(6, 30, 70, data="norms"),
    Case(6, 30, 70, data="norms", tau=0.01, scale=100.0),
    Case(data="large"),
    Case(data="small"),
    Case(data="small", tau=0.01, scale=100.0),
    Case(data="zero_patches"),
    Case(N=1, data="zero_patches"),
    Case(data="zero_texts"),
    Case(B=1, data="zero_texts"),
    Case(data="duplicated"),
    Case(data="duplicated", tau=0.01),
    Case(data="opposite"),
    Case(N=8, data="opposite"),
    Case(N=8, data="opposite", tau=1.0),
    Case(N=8, data="opposite", tau=10.0),
    Case(N=2, D=1, data="opposite"),
    Case(7, 29, 69, tau=0.01, scale=100.0, data="zero_patches"),
    Case(4, 24, 5, K=51, tau=0.01, data="duplicated"),
    Case(3, 348, 132, tau=0.01, data="duplicated"),
    Case(9, 10, 16, K=14, tau=0.2, layout="expanded_last"),
    Case(70, 5, 66, tau=1.0),
    Case(70, 5, 66, tau=1.0, mask="random"),
    Case(4, 600, 64, K=1060, tau=2.0),
]
LONG_OPPOSITE = [Case(N=8, D=D, tau=tau, data="opposite") for D in (65, 96) for tau in (0.1, 1.0, 10.0)]
LAYOUTS = [
    Case(layout=layout)
    for layout in (
        "offset",
        "strided",
        "spaced",
        "transposed",
        "permuted",
        "expanded",
        "expanded_rows",
        "expanded_last",
    )
] + [
    Case(3, 50, 64, layout="strided"),
    Case(3, 50, 64, layout="permuted", mask="random"),
    Case(3, 21, 19, K=47, layout="transposed"),
]
