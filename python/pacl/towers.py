"""A vision and a text tower, frozen or trained: both from open_clip, or others from timm and transformers."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import open_clip
import timm
import torch
from open_clip.factory import parse_model_name
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import TextTransformer
from PIL import Image
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from .backbones import NAFLEX_VITS, SIZED, freeze, packed_tokens, patch_sides, patch_tokens, tower_blocks
from .dense import dense_tokens
from .failures import describe
from .pretrained import check_local_model, why_not_loaded
from .readings import PLAIN, PROXY, Reader, check_reading, proxy_reader
from .resolution import fitting
from .text_models import TextModel, load_text_model

SENTENCE = "A photo of two small dogs, left of a red-brick house."
BATCH, SENTENCES = 256, 2**13  # texts per call of the text tower, and texts that are sorted by length at a time


@dataclass(eq=False)
class Towers:
    """A vision and a text tower. Trained ones are in eval mode too, so that all parts of a batch compute the same.

    Attributes:
        visual: vision tower.
        text: text tower, which takes token ids `[B, L]`.
        transform: function from a PIL image to float `[3, H, W]`; with `max_patches`, H and W depend on the image.
        tokenize: function from a list of strings to ids `[B, L]`.
        names: the arguments of `load_towers`.
        reader: the reading of the patch tokens.
    """

    visual: nn.Module
    text: nn.Module
    transform: Callable[[Image.Image], Tensor]
    tokenize: Callable[[list[str]], Tensor]
    names: dict[str, Any]
    reader: Reader = PLAIN

    def tokens(self, images: Tensor) -> Tensor:
        """Return patch tokens `[B, N, width]` of normalised images `[B, 3, H, W]`, row by row from the top left."""
        if self.reader.name == "plain":
            return patch_tokens(self.visual, images)
        return dense_tokens(self.visual, images, reader=self.reader).flatten(1, 2)

    def read(self, tokens: str, proxy: str | None = None) -> Towers:
        """Return the same towers with another reading of the tokens, a key of `pacl.readings.READINGS`.

        proxy: as in `load_towers`. Raises ValueError for a reading that the vision tower does not have, and for a proxy
        that does not load.
        """
        check_reading(tokens, self.visual)
        if proxy is not None and tokens != "proxy":
            raise ValueError(f"proxy: got {proxy!r} with {tokens} tokens, expected it with proxy tokens alone")
        names = {name: x for name, x in self.names.items() if name not in ("tokens", "proxy")}
        if tokens == "plain":
            return dataclasses.replace(self, names=names, reader=PLAIN)
        names["tokens"], reader = tokens, Reader(tokens)
        if tokens == "proxy":
            names["proxy"] = proxy or PROXY
            reader = proxy_reader(*_load_timm(names["proxy"], True, None, "proxy"), self.transform)
        return dataclasses.replace(self, names=names, reader=reader).to(next(self.visual.parameters()).device)

    @property
    def reading(self) -> str:
        """The reading of the tokens, for people: its name, and that of its second tower."""
        proxy = self.names.get("proxy")
        return self.reader.name + (f" of {Path(proxy).name}" if proxy else "")

    def packed(self, images: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Return patch tokens of a batch as the loss takes them, and their `patch_lengths`.

        images: normalised, `[B, 3, H, W]`, or a list of `[3, H, W]`. Tokens are `[B, N, width]`, with None; those of
        towers with `max_patches` are packed, `[sum of N, width]`, with int64 lengths `[B]` on the CPU.
        """
        if self.variable:
            return packed_tokens(self.visual, images)
        return self.tokens(cast(Tensor, images)), None

    @property
    def variable(self) -> bool:
        """True if images have different numbers of patches: the towers were loaded with `max_patches`."""
        return self.names.get("max_patches") is not None

    def encode_text(self, ids: Tensor) -> Tensor:
        """Return normalised text embeddings `[B, D]` of token ids `[B, L]`."""
        return encode_text(self.text, ids)

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """Return normalised float32 embeddings `[K, D]` of any number of texts, for inference.

        They equal those of `encode_text` up to rounding. Each call of the tower gets texts of similar length, without
        the padding that it cannot see.
        """
        device, parts = next(self.text.parameters()).device, []
        for start in range(0, len(texts), SENTENCES):
            ids = self.tokenize(list(texts[start : start + SENTENCES]))
            lengths = read_lengths(self.text, ids)
            order = lengths.argsort(stable=True)
            found = [self._encode_cut(ids[rows].to(device), int(lengths[rows[-1]])) for rows in order.split(BATCH)]
            parts.append(torch.cat(found).float()[order.argsort().to(device)])
        return torch.cat(parts)

    def _encode_cut(self, ids: Tensor, length: int) -> Tensor:
        if length == ids.shape[1]:
            return self.encode_text(ids)
        if isinstance(self.text, TextModel):
            return self.encode_text(ids[:, :length])
        # open_clip's towers take fewer ids but add their whole mask; this call replaces it by a smaller one.
        mask = {"attn_mask": cast(Tensor, self.text.attn_mask)[:length, :length]}
        return encode_text(partial(functional_call, self.text, mask), ids[:, :length])

    @property
    def trained(self) -> list[str]:
        """The names, "visual" and "text", of the towers with trained parameters."""
        return [name for name in ("visual", "text") if any(x.requires_grad for x in getattr(self, name).parameters())]

    @property
    def widths(self) -> tuple[int, int]:
        """The widths of patch tokens and of text embeddings."""
        image, ids = self.probe()
        with torch.no_grad():
            return self.tokens(image).shape[2], self.encode_text(ids).shape[1]

    def to(self, device: torch.device | str) -> Towers:
        """Move both towers and return this object."""
        for module in (self.visual, self.text, self.reader.proxy):
            if module is not None:
                module.to(device)
        return self

    def probe(self) -> tuple[Tensor, Tensor]:
        """Return a transformed synthetic picture [1, 3, H, W] and the ids [1, L] of a sentence."""
        y, x = np.mgrid[0:384, 0:512] / 64.0
        channels = [np.sin(x * (1 + c) + y**2 / (2 + c)) + np.cos(y * (3 - c) - x) for c in range(3)]
        picture = Image.fromarray(np.uint8(127.5 + 63 * np.stack(channels, -1)))
        weight = next(self.visual.parameters())
        image = self.transform(picture)[None].to(weight.device, weight.dtype)
        return image, self.tokenize([SENTENCE]).to(next(self.text.parameters()).device)


def read_lengths(text: nn.Module, ids: Tensor) -> Tensor:
    """Return how many ids of each text [B, L] its embedding depends on, int64 [B].

    For an open_clip tower with a causal mask and its output at the end of the text, these are the ids up to there; for
    a TextModel its `lengths`; for any other tower (SigLIP's, CoCa's, ...) all L.
    """
    if isinstance(text, TextModel):
        return text.lengths(ids)
    if isinstance(text, TextTransformer) and text.attn_mask is not None and text.cls_emb is None:
        if text.pool_type == "argmax":
            return ids.argmax(1) + 1
        if text.pool_type == "eos":
            return (ids == text.eos_id).int().argmax(1) + 1
    return torch.full((len(ids),), ids.shape[1])


def encode_text(text: Callable[[Tensor], Any], ids: Tensor) -> Tensor:
    """Return normalised embeddings [B, D] of token ids [B, L] by a text tower."""
    out = text(ids)  # CoCa's tower returns its tokens too
    return F.normalize(out[0] if isinstance(out, tuple) else out, dim=-1)


def load_towers(
    model: str = "ViT-B-16",
    pretrained: str | None = None,
    *,
    vision_model: str | None = None,
    vision_pretrained: bool = True,
    text_model: str | None = None,
    force_image_size: int | None = None,
    max_patches: int | None = None,
    tokens: str = "plain",
    proxy: str | None = None,
    lock_image: bool = True,
    lock_image_unlocked_groups: int = 0,
    lock_text: bool = True,
    grad_checkpointing: bool = False,
    device: torch.device | str = "cpu",
) -> Towers:
    """Load the towers of an open_clip model; timm's `vision_model` and `text_model` replace one of them, or both.

    All towers are frozen by default. With both replaced, the open_clip model is not loaded.

    Args:
        model: name of an open_clip model, or `local-dir:FOLDER`.
        pretrained: an open_clip tag, or a file (safetensors, or tensors only). QuickGELU is used if the weights were
            trained with it, whatever the name of the model.
        vision_model: a timm name, with timm's tag (vit_base_patch16_224.dino). The transform uses its size, mean and
            standard deviation.
        vision_pretrained: load timm's weights.
        text_model: a folder with a text encoder of transformers or sentence-transformers, which says how it pools.
        force_image_size: side of the images in pixels; default: the vision tower's own.
        max_patches: resize each image, with its aspect ratio kept, to at most so many patches; for NaFlex ViTs of timm,
            which take any resolution. Default: images of one size.
        tokens: reading of the patch tokens, a key of `pacl.readings.READINGS`; any but "plain" needs a frozen vision
            tower.
        proxy: timm name of the second tower of the reading "proxy", by default DINO's.
        lock_image: False trains the whole vision tower. Parameters that the output does not depend on stay frozen.
        lock_image_unlocked_groups: number of last blocks (stages of a convolutional tower) of the vision tower to
            train, with the norm after them; open_clip also counts the projection, which PACL does not use.
        lock_text: False trains the text tower.
        grad_checkpointing: recompute the activations of trained towers in the backward pass.
        device: device of both towers.

    Raises:
        ValueError: one line that names the argument: an unknown name, with similar ones, or weights that do not load.
    """
    names = {
        "model": model,
        "pretrained": pretrained,
        "vision_model": vision_model,
        "vision_pretrained": vision_pretrained,
        "text_model": text_model and f"local-dir:{text_model.removeprefix('local-dir:')}",
        "force_image_size": force_image_size,
        **({} if max_patches is None else {"max_patches": max_patches}),  # absent from files of fixed resolution
    }
    if max_patches is not None and (type(max_patches) is not int or max_patches < 1):
        raise ValueError(f"max_patches: got {max_patches!r}, expected an integer above 0")
    if max_patches is not None and force_image_size is not None:
        raise ValueError(
            f"max_patches: got {max_patches} with force_image_size {force_image_size}, expected only one of them"
        )
    if not lock_image and lock_image_unlocked_groups:
        raise ValueError(
            f"lock_image_unlocked_groups: got {lock_image_unlocked_groups} with no_lock_image, which trains every "
            "block; expected only one of them"
        )
    if tokens != "plain" and (not lock_image or lock_image_unlocked_groups):
        raise ValueError(f"tokens: got {tokens!r} with a vision tower to train, expected 'plain' or a locked tower")
    visual: Any
    text: Any
    if not (vision_model and text_model):
        clip, transform, tokenize = _load_clip(model, pretrained, None if vision_model else force_image_size)
        visual, text = clip.get_submodule("visual"), clip.get_submodule("text")
    if vision_model:
        visual, transform = _load_timm(vision_model, vision_pretrained, force_image_size)
    if max_patches is not None:
        transform = _fitting(visual, transform, max_patches, vision_model or model)
    if text_model:
        text, tokenize = load_text_model(text_model)
    trainable = {x for module in (visual, text) for x in module.parameters() if x.requires_grad}
    towers = Towers(freeze(visual), freeze(text), transform, tokenize, names).to(device)
    try:
        blocks, norms = tower_blocks(visual)
    except TypeError as error:
        raise ValueError(str(error)) from error
    if lock_image_unlocked_groups > len(blocks):
        raise ValueError(
            f"lock_image_unlocked_groups: got {lock_image_unlocked_groups}, expected at most the {len(blocks)} blocks"
        )
    towers = towers.read(tokens, proxy)
    image, ids = towers.probe()
    if not lock_image:
        _unlock(trainable, [visual], lambda: towers.tokens(image))
    elif lock_image_unlocked_groups:
        _unlock(trainable, [*blocks[-lock_image_unlocked_groups:], *norms], lambda: towers.tokens(image))
    if not lock_text:
        _unlock(trainable, [towers.text], lambda: towers.encode_text(ids))
    if grad_checkpointing:
        if isinstance(visual, ModifiedResNet) and "visual" in towers.trained:
            raise ValueError(f"grad_checkpointing: got True for {model}, for which open_clip has none; expected False")
        if isinstance(text, TextModel) and "text" in towers.trained:
            raise ValueError("grad_checkpointing: got True and a text_model to train, expected False: it has none")
        for name in towers.trained:
            getattr(towers, name).set_grad_checkpointing(True)
    return towers


def random_towers(
    model: str,
    pretrained: str | None = None,
    vision_model: str | None = None,
    vision_pretrained: bool = True,
    text_model: str | None = None,
    **others: Any,
) -> list[str]:
    """Return the names, "visual" and "text", of the towers that load_towers gives random weights.

    Its other arguments make no difference.
    """
    clip = parse_model_name(model)[0] is None and not pretrained
    visual, text = not vision_pretrained if vision_model else clip, clip and not text_model
    return [name for name, random in (("visual", visual), ("text", text)) if random]


def frozen_random_towers(names: dict[str, Any], locked: Sequence[str], allowed: bool) -> list[str]:
    """Return the names of the towers of `locked` that have random weights in blocks that are not trained.

    names: arguments of load_towers. Raises ValueError, which names the flags, for any such tower unless `allowed`.
    """
    found = [name for name in random_towers(**names) if name in locked]
    if not found or allowed:
        return found
    if "text" in found or not names["vision_model"]:
        got, wanted = f"pretrained: got none for {names['model']}", "a tag or a file of weights"
    else:
        got, wanted = f"vision_pretrained: got False for {names['vision_model']}", "True"
    which = " and ".join({"visual": "vision", "text": "text"}[name] for name in found)
    raise ValueError(
        f"{got}, so the {which} tower{'s' * (len(found) > 1)} would be random and stay so; expected {wanted}, or "
        "--random-towers to use and keep them"
    )


def quick_gelu(model: str, pretrained: str | None) -> bool:
    """Return True if the weights of `pretrained`, a tag of an open_clip model, were trained with QuickGELU.

    open_clip builds ViT-B-16 with GELU even for OpenAI's weights, and only warns. Raises ValueError for unknown names.
    """
    known = open_clip.list_models()
    if model not in known:
        raise ValueError(f"model: got {model!r}, expected a model of open_clip, such as {_close(model, known)}")
    config = open_clip.get_pretrained_cfg(model, pretrained) if pretrained else {}
    if pretrained and not config and not Path(pretrained).is_file():
        close = _close(pretrained, open_clip.list_pretrained_tags_by_model(model))
        raise ValueError(f"pretrained: got {pretrained!r}, expected a file or a tag of {model}, such as {close}")
    return bool(config.get("quick_gelu", False))


def _load_clip(model: str, pretrained: str | None, size: int | None) -> tuple[nn.Module, Callable, Callable]:
    schema, identifier = parse_model_name(model)
    what, weights, folder = f"model: got {model!r}", None, None
    if schema is None:
        quick = quick_gelu(model, pretrained)
        if pretrained:
            what = f"pretrained: got {pretrained!r} for {model}"
            weights = Path(pretrained) if Path(pretrained).is_file() else None
    elif pretrained:
        raise ValueError(f"pretrained: got {pretrained!r} for {model}, which has its own weights; expected none")
    else:
        quick = False  # the folder's config decides
        if schema == "local-dir":
            folder = Path(identifier)
            weights = check_local_model("model", model, folder, "open_clip_config.json", "model_cfg")
    try:
        # force_custom_text gives every model a text tower as a module of its own.
        clip, _, transform = open_clip.create_model_and_transforms(
            model,
            pretrained=pretrained,
            force_quick_gelu=quick,
            force_custom_text=True,
            force_image_size=size,
            weights_only=True,
        )
        return clip, transform, open_clip.get_tokenizer(model)
    except Exception as error:  # the download, the unpickler and the state dict raise many types
        if describe(error) is not None:  # no memory, say
            raise
        raise ValueError(why_not_loaded(error, what, weights, folder)) from error


def _load_timm(
    name: str, pretrained: bool, size: int | None, argument: str = "vision_model"
) -> tuple[nn.Module, Callable]:
    base = name.split(".")[0]
    if ":" not in name:
        if not timm.is_model(base):
            close = _close(base, timm.list_models())
            raise ValueError(f"{argument}: got {name!r}, expected a model of timm, such as {close}")
        tagged = timm.list_models(f"{base}.*", pretrained=True)
        if pretrained and (not tagged or "." in name and name not in tagged):
            have = f"a name such as {_close(name, tagged)}" if tagged else "--no-vision-pretrained, random weights"
            raise ValueError(f"{argument}: got {name!r}, for which timm has no weights; expected {have}")
    schema, identifier = parse_model_name(name)
    folder = Path(identifier) if schema == "local-dir" and pretrained else None
    weights = folder and check_local_model(argument, name, folder, "config.json", "architecture")

    def create(**options: Any) -> nn.Module:
        try:
            return timm.create_model(name, num_classes=0, **options)
        except Exception as error:  # as above
            if describe(error) is not None:
                raise
            raise ValueError(why_not_loaded(error, f"{argument}: got {name!r}", weights, folder)) from error

    options: dict[str, Any] = {}
    if size is not None and isinstance(shape := create(), (*SIZED, *NAFLEX_VITS)):  # other models take any size
        patch = patch_sides(shape)
        if any(size % x for x in patch):
            raise ValueError(f"force_image_size: got {size}, expected a multiple of {patch[0]}")
        if isinstance(shape, SIZED):
            options["img_size"] = (size, size)
    visual = create(pretrained=pretrained, **options)
    data = timm.data.resolve_model_data_config(visual, {} if size is None else {"img_size": size})
    return visual, timm.data.create_transform(**data, is_training=False)


def _fitting(visual: nn.Module, transform: Callable, most: int, name: str) -> Callable:
    trunk: Any = visual.trunk if isinstance(visual, TimmModel) else visual
    if not isinstance(trunk, NAFLEX_VITS):
        raise ValueError(
            f"max_patches: got {most} for {name}, whose images have one size; expected a NaFlex ViT of timm "
            "(--vision-model naflexvit_...), which takes any"
        )
    return fitting(transform, tuple(trunk.embeds.patch_size), most)


def _unlock(trainable: set[nn.Parameter], modules: list[nn.Module], output: Callable[[], Tensor]) -> None:
    """Turn on the gradients of the modules' parameters that `output` depends on; DDP would wait for any other."""
    parameters = [x for module in modules for x in module.parameters() if x in trainable]
    for x in parameters:
        x.requires_grad_(True)
    grads = torch.autograd.grad(output().sum(), parameters, allow_unused=True)
    for x, grad in zip(parameters, grads, strict=True):
        x.requires_grad_(grad is not None)


def _close(name: str, known: list[str]) -> str:
    """Return the known names that are most similar, else the first ones."""
    return ", ".join([*(difflib.get_close_matches(name, known, 3, cutoff=0.3) or known[:3]), "..."])
