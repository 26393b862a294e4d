"""The sigmoid loss in one pass: φ of a whole image, ∂L/∂φ of its pairs, and W of the `dot` form."""

import triton
import triton.language as tl

from .attention import attention_of
from .scores import load_part, patch_columns
from .shared import LOG2E, fma, log_one_plus, round_to, scalar
from .softmax import RUNNING_MAX_BELOW, add_softmax, softmax_result


@triton.jit
def pair_gradient(
    phi, image, text, live, scale, bias, share, IMAGE_IDS, TEXT_IDS, TARGETS, PAIR_BIAS, GRAD_PAIR_BIAS, stride_pair,
):  # fmt: skip
    """Return ∂L/∂φ, and B times the loss and its gradients of logit scale and bias, of pairs; 0 where not `live`.

    With z the logit and t the target, the loss of a pair is -t log σ(z) - (1 - t) log σ(-z), and its derivative
    (1 - t) σ(z) - t σ(-z); both are 0 for a pair bias of -inf. `image` and `text` are numbers in the whole batch, of a
    shape that broadcasts to that of `phi`. `share`: 1 / B. GRAD_PAIR_BIAS is written where it is not None.
    """
    at = image.to(tl.int64) * stride_pair + text
    z = phi * scale + bias
    counts = live
    if PAIR_BIAS is not None:
        pair_bias = tl.load(PAIR_BIAS + at, mask=live, other=0.0)
        z += pair_bias
        counts = live & (pair_bias != float("-inf"))
    if TARGETS is not None:
        target = tl.load(TARGETS + at, mask=live, other=0.0)
    elif IMAGE_IDS is not None:
        image_id = tl.load(IMAGE_IDS + image, mask=live, other=-1)
        target = tl.where((image_id == tl.load(TEXT_IDS + text, mask=live, other=-1)) & (image_id >= 0), 1.0, 0.0)
    else:
        target = tl.where(image == text, 1.0, 0.0)
    e = tl.exp(-tl.abs(z))
    of_larger = 1.0 / (1.0 + e)  # σ(|z|)
    of_smaller = e * of_larger
    of_z = tl.where(z < 0.0, of_smaller, of_larger)
    of_minus_z = tl.where(z < 0.0, of_larger, of_smaller)
    # Select, because 0 times an infinite logit is NaN.
    positive = tl.where(target == 0.0, 0.0, target * tl.where(z < 0.0, -z, 0.0))
    negative = tl.where(target == 1.0, 0.0, (1.0 - target) * tl.where(z > 0.0, z, 0.0))
    loss = log_one_plus(e) + positive + negative
    by_bias = tl.where(counts, (1.0 - target) * of_z - target * of_minus_z, 0.0)
    if GRAD_PAIR_BIAS is not None:
        tl.store(GRAD_PAIR_BIAS + at, by_bias * share, mask=live)
    return by_bias * share * scale, tl.where(counts, loss, 0.0), by_bias * phi, by_bias


@triton.jit
def _columns(
    MASK, image0, image_end, first, N, stride_pb, stride_pn, stride_mb, stride_mn,
    COLS: tl.constexpr, PAD: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Return row, offset and liveness of the patches of a part of a tile; without PAD it begins at patch `first`."""
    if PAD > 0:
        rows, offsets, live = patch_columns(
            MASK, image0, 0, image_end, N, stride_pb, stride_pn, stride_mb, stride_mn, COLS, PAD, HAS_MASK
        )
    else:
        # Compared by row, as what is the same for all images would be kept in registers, a number for each column.
        rows = image0 * N + first + tl.arange(0, COLS)
        live = rows < image0 * N + N
        n = rows - image0 * N
        offsets = image0.to(tl.int64) * stride_pb + n.to(tl.int64) * stride_pn
        if HAS_MASK:
            at = MASK + image0.to(tl.int64) * stride_mb + n.to(tl.int64) * stride_mn
            live &= tl.load(at, mask=live, other=0) != 0
    return rows, offsets, live


@triton.jit
def _cosines(
    acc, INV_P, inv_t, rows, live, TEXTS: tl.constexpr, COLS: tl.constexpr, IMAGES: tl.constexpr,
):  # fmt: skip
    """Return cosines `[TEXTS, IMAGES, patches]` of products, and `live` in this shape."""
    inv_p = tl.load(INV_P + rows, mask=live, other=0.0)
    s = acc * inv_p[None, :] * inv_t[:, None]  # rounded as in the other kernels
    return tl.reshape(s, [TEXTS, IMAGES, COLS // IMAGES]), tl.reshape(live, [1, IMAGES, COLS // IMAGES])


@triton.jit
def _add_part(
    acc, first, image0, inv_t, total, weighted, largest, MASK, INV_P, image_end, N, scale, stride_mb, stride_mn,
    TEXTS: tl.constexpr, COLS: tl.constexpr, PAD: tl.constexpr, IMAGES: tl.constexpr,
    HAS_MASK: tl.constexpr, RUNNING_MAX: tl.constexpr,
):  # fmt: skip
    """Add a part of a tile to the sums of the softmax `[TEXTS, IMAGES]`."""
    rows, _, live = _columns(MASK, image0, image_end, first, N, 0, 0, stride_mb, stride_mn, COLS, PAD, HAS_MASK)
    s, inside = _cosines(acc, INV_P, inv_t, rows, live, TEXTS, COLS, IMAGES)
    return add_softmax(s, inside, scale, total, weighted, largest, True, RUNNING_MAX, 2)


@triton.jit
def _store_half(
    acc, first, image0, inv_t, phi, entropy, g, texts, MASK, INV_P, W,
    image_begin, image_end, N, scale, inv_tau, stride_mb, stride_mn, stride_w,
    TEXTS: tl.constexpr, COLS: tl.constexpr, PAD: tl.constexpr, IMAGES: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_W: tl.constexpr, NEEDS_TAU: tl.constexpr,
):  # fmt: skip
    """Store W of a part of a tile; return Σ a g (s - φ)²."""
    rows, _, live = _columns(MASK, image0, image_end, first, N, 0, 0, stride_mb, stride_mn, COLS, PAD, HAS_MASK)
    s, live = _cosines(acc, INV_P, inv_t, rows, live, TEXTS, COLS, IMAGES)
    a, centred = attention_of(s, True, phi[:, :, None], entropy[:, :, None], scale)
    a = tl.where(live, a * g[:, :, None], 0.0)  # other columns may hold anything, NaN included
    if HAS_W:
        inv_p = tl.load(INV_P + rows, mask=tl.reshape(live, [COLS]), other=0.0)
        ds = tl.where(live, a * fma(centred, inv_tau, 1.0), 0.0)
        weights = tl.reshape(ds, [TEXTS, COLS]) * inv_t[:, None] * inv_p[None, :]
        cols = tl.arange(0, COLS)
        if PAD > 0:
            n = cols % PAD
            at = (image0 + cols // PAD - image_begin) * N + n
            exists = (n < N) & (image0 + cols // PAD < image_end)
        else:
            at = (image0 - image_begin) * N + first + cols
            exists = at < (image0 - image_begin) * N + N
        at = (texts * stride_w)[:, None] + at[None, :]  # a block of W has fewer than 2³¹ elements
        tl.store(W + at, round_to(weights, W.dtype.element_ty), mask=exists[None, :])
    if NEEDS_TAU:
        part = tl.where(live, a * centred * centred, 0.0)
        return tl.sum(tl.sum(tl.sum(part, 2), 1), 0)
    else:
        return 0.0


@triton.jit
def _store_part(
    acc, first, image0, inv_t, phi, entropy, g, texts, MASK, INV_P, W,
    image_begin, image_end, N, scale, inv_tau, stride_mb, stride_mn, stride_w,
    TEXTS: tl.constexpr, COLS: tl.constexpr, PAD: tl.constexpr, IMAGES: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_W: tl.constexpr, NEEDS_TAU: tl.constexpr,
):  # fmt: skip
    """Do the same as `_store_half`, by halves where the intermediate values of all columns would not fit."""
    if COLS == 128:
        HALF: tl.constexpr = COLS // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, [TEXTS, 2, HALF]), [0, 2, 1]))
        return _store_half(
            left, first, image0, inv_t, phi, entropy, g, texts, MASK, INV_P, W,
            image_begin, image_end, N, scale, inv_tau, stride_mb, stride_mn, stride_w,
            TEXTS, HALF, PAD, IMAGES, HAS_MASK, HAS_W, NEEDS_TAU,
        ) + _store_half(
            right, first + HALF, image0, inv_t, phi, entropy, g, texts, MASK, INV_P, W,
            image_begin, image_end, N, scale, inv_tau, stride_mb, stride_mn, stride_w,
            TEXTS, HALF, PAD, IMAGES, HAS_MASK, HAS_W, NEEDS_TAU,
        )  # fmt: skip
    else:
        return _store_half(
            acc, first, image0, inv_t, phi, entropy, g, texts, MASK, INV_P, W,
            image_begin, image_end, N, scale, inv_tau, stride_mb, stride_mn, stride_w,
            TEXTS, COLS, PAD, IMAGES, HAS_MASK, HAS_W, NEEDS_TAU,
        )  # fmt: skip


@triton.jit(do_not_specialize=("image_begin", "image_end", "text_begin", "B", "N", "K", "stride_pair"))
def sigmoid_weights_kernel(
    P0, P1, P2, T, MASK, TAU, SCALE, BIAS, INV_P, INV_T, IMAGE_IDS, TEXT_IDS, TARGETS, PAIR_BIAS, GRAD_PAIR_BIAS,
    W, SUMS, image_begin, image_end, text_begin, B, N, K, D,
    stride_pb, stride_pn, stride_pd, stride_tk, stride_td, stride_mb, stride_mn, stride_pair, stride_w,
    BLOCK_T: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, BLOCK_D: tl.constexpr,
    PAD: tl.constexpr, IMAGES: tl.constexpr, N_ALIGN: tl.constexpr, RUNNING_MAX: tl.constexpr,
    TAU_IS_TENSOR: tl.constexpr, SCALE_IS_TENSOR: tl.constexpr, BIAS_IS_TENSOR: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_W: tl.constexpr, NEEDS_TAU: tl.constexpr,
    DESCRIPTORS: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write W `[K, rows]` of the `dot` form with ∂L/∂φ of the sigmoid loss, for a block of images and texts.

    A tile holds whole images: one, in up to three parts of C0, C1 and C2 patches, or with PAD several. So φ is known
    before the products are forgotten, g of a pair follows from its φ, and W from both. P0, P1 and P2 are the patches,
    with descriptors for each width. T, INV_T and W begin at text `text_begin`, all other arrays at the first pair.
    W has room for whole tiles of texts. SUMS gets four numbers for each item: B times its loss and the gradients of
    scale and bias, and Σ a g (s - φ)², which is -τ² times its part of the temperature's gradient.

    The host does not read a temperature in device memory, see `compatibility_forward_kernel`. Compile without FMA
    contraction, see `attention_of`.
    """
    tau = scalar(TAU, TAU_IS_TENSOR)
    logit_scale, bias = scalar(SCALE, SCALE_IS_TENSOR), scalar(BIAS, BIAS_IS_TENSOR)
    scale, inv_tau, share = LOG2E / tau, 1.0 / tau, 1.0 / B
    N = N // N_ALIGN * N_ALIGN  # tells the compiler how images begin in a row of W
    text_tiles = tl.cdiv(K, BLOCK_T)
    items = text_tiles * tl.cdiv(image_end - image_begin, IMAGES)
    if TAU_IS_TENSOR:
        items = tl.where((tau < RUNNING_MAX_BELOW) == RUNNING_MAX, items, 0)
    # Texts change fastest, so that concurrent programs read the same patches.
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        text0 = item % text_tiles * BLOCK_T
        image0 = image_begin + item // text_tiles * IMAGES
        row0 = image0 * N
        texts = text0 + tl.arange(0, BLOCK_T)
        t_live = texts < K
        t_offsets = texts.to(tl.int64) * stride_tk
        inv_t = tl.load(INV_T + texts, mask=t_live, other=0.0)

        _, offsets0, live0 = _columns(
            MASK, image0, image_end, 0, N, stride_pb, stride_pn, stride_mb, stride_mn, C0, PAD, HAS_MASK
        )
        acc0 = tl.zeros([BLOCK_T, C0], tl.float32)
        if C1 > 0:
            _, offsets1, live1 = _columns(
                MASK, image0, image_end, C0, N, stride_pb, stride_pn, stride_mb, stride_mn, C1, PAD, HAS_MASK
            )
            acc1 = tl.zeros([BLOCK_T, C1], tl.float32)
        if C2 > 0:
            _, offsets2, live2 = _columns(
                MASK, image0, image_end, C0 + C1, N, stride_pb, stride_pn, stride_mb, stride_mn, C2, PAD, HAS_MASK
            )
            acc2 = tl.zeros([BLOCK_T, C2], tl.float32)
        for d in range(0, D, BLOCK_D):
            t = load_part(T, t_offsets, t_live, text0, d, D, stride_td, BLOCK_D, DESCRIPTORS, EVEN_D)
            p = load_part(P0, offsets0, live0, row0, d, D, stride_pd, BLOCK_D, DESCRIPTORS, EVEN_D)
            acc0 = tl.dot(t, p.T, acc0, input_precision=PRECISION)
            if C1 > 0:
                p = load_part(P1, offsets1, live1, row0 + C0, d, D, stride_pd, BLOCK_D, DESCRIPTORS, EVEN_D)
                acc1 = tl.dot(t, p.T, acc1, input_precision=PRECISION)
            if C2 > 0:
                p = load_part(P2, offsets2, live2, row0 + C0 + C1, d, D, stride_pd, BLOCK_D, DESCRIPTORS, EVEN_D)
                acc2 = tl.dot(t, p.T, acc2, input_precision=PRECISION)

        total = tl.zeros([BLOCK_T, IMAGES], tl.float32)
        weighted = tl.zeros([BLOCK_T, IMAGES], tl.float32)
        largest = tl.full([BLOCK_T, IMAGES], float("-inf"), tl.float32)
        total, weighted, largest = _add_part(
            acc0, 0, image0, inv_t, total, weighted, largest, MASK, INV_P, image_end, N, scale, stride_mb, stride_mn,
            BLOCK_T, C0, PAD, IMAGES, HAS_MASK, RUNNING_MAX,
        )  # fmt: skip
        if C1 > 0:
            total, weighted, largest = _add_part(
                acc1, C0, image0, inv_t, total, weighted, largest, MASK, INV_P, image_end, N, scale,
                stride_mb, stride_mn, BLOCK_T, C1, PAD, IMAGES, HAS_MASK, RUNNING_MAX,
            )  # fmt: skip
        if C2 > 0:
            total, weighted, largest = _add_part(
                acc2, C0 + C1, image0, inv_t, total, weighted, largest, MASK, INV_P, image_end, N, scale,
                stride_mb, stride_mn, BLOCK_T, C2, PAD, IMAGES, HAS_MASK, RUNNING_MAX,
            )  # fmt: skip
        phi, entropy = softmax_result(total, weighted, largest, scale, RUNNING_MAX)

        images = (image0 + tl.arange(0, IMAGES))[None, :]
        g, loss, by_scale, by_bias = pair_gradient(
            phi, images, (text_begin + texts)[:, None], t_live[:, None] & (images < image_end),
            logit_scale, bias, share, IMAGE_IDS, TEXT_IDS, TARGETS, PAIR_BIAS, GRAD_PAIR_BIAS, stride_pair,
        )  # fmt: skip
        tau_sum = 0.0
        if HAS_W or NEEDS_TAU:
            tau_sum += _store_part(
                acc0, 0, image0, inv_t, phi, entropy, g, texts, MASK, INV_P, W,
                image_begin, image_end, N, scale, inv_tau, stride_mb, stride_mn, stride_w,
                BLOCK_T, C0, PAD, IMAGES, HAS_MASK, HAS_W, NEEDS_TAU,
            )  # fmt: skip
            if C1 > 0:
                tau_sum += _store_part(
                    acc1, C0, image0, inv_t, phi, entropy, g, texts, MASK, INV_P, W,
                    image_begin, image_end, N, scale, inv_tau, stride_mb, stride_mn, stride_w,
                    BLOCK_T, C1, PAD, IMAGES, HAS_MASK, HAS_W, NEEDS_TAU,
                )  # fmt: skip
            if C2 > 0:
                tau_sum += _store_part(
                    acc2, C0 + C1, image0, inv_t, phi, entropy, g, texts, MASK, INV_P, W,
                    image_begin, image_end, N, scale, inv_tau, stride_mb, stride_mn, stride_w,
                    BLOCK_T, C2, PAD, IMAGES, HAS_MASK, HAS_W, NEEDS_TAU,
                )  # fmt: skip
        sums = SUMS + item * 4
        tl.store(sums, tl.sum(tl.sum(loss, 1), 0))
        tl.store(sums + 1, tl.sum(tl.sum(by_scale, 1), 0))
        tl.store(sums + 2, tl.sum(tl.sum(by_bias, 1), 0))
        tl.store(sums + 3, tau_sum)
