"""Cross-attention in φ's place, as a baseline: a caption's words and an image's patches attend to each other.

Patches attend to the words and the caption to the patches, in one layer. The score of a pair is then φ of the form
`cosine`, computed from the outputs. Training matches images with texts: the loss is that of B pairs and of two hard
negatives of each, drawn by φ of the inputs (ALBEF, arXiv 2107.07651). The layer begins as the identity, so that an
untrained head gives φ itself. Unlike φ, a head scores B × B pairs in B² passes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from pacl_kernels import compatibility

from .embedder import DEFAULT_ATTN_TEMPERATURE, VisionEmbedder
from .files import write_bytes
from .towers import Towers

HEADS = 4
THRESHOLD = 0.25  # initial φ of a pair that is as likely to match as not


class Attend(nn.Module):
    """Attention of one kind of rows to the other, and a small MLP, each with its norm first; begins as the identity."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm, self.other_norm, self.mlp_norm = (nn.LayerNorm(dim) for _ in range(3))
        self.query, self.key_value, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        last = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), last)
        for x in (self.out.weight, self.out.bias, last.weight, last.bias):
            nn.init.zeros_(x)

    def forward(self, rows: Tensor, others: Tensor, own: Tensor, other: Tensor, there: Tensor | None = None) -> Tensor:
        """Return rows [P, R, D] of P pairs: rows[own] after attention to others[other], where `there` [P, O] is True.

        Queries, keys and values are computed once for each image or text, the rest once for each pair.
        """
        query = self.query(self.norm(rows)).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        key, value = self.key_value(self.other_norm(others)).unflatten(-1, (2, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mask = None if there is None else there[:, None, None]
        found = F.scaled_dot_product_attention(query[own], key[other], value[other], attn_mask=mask)
        x = rows[own] + self.out(found.transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class CrossAttention(nn.Module):
    """Scores of pairs, and of their patches, after patches and words have attended to each other.

    Patches are [B, N, D], as the embedder gives them; words [K, W, D], as `word_tokens` gives them.

    dim: D, a multiple of 4. temperature: that of the softmax over patches.
    """

    def __init__(self, dim: int, temperature: float = DEFAULT_ATTN_TEMPERATURE):
        super().__init__()
        if dim % HEADS:
            raise ValueError(f"dim: got {dim}, expected a multiple of {HEADS}")
        self.dim, self.temperature = dim, temperature
        self.see, self.read = Attend(dim), Attend(dim)
        self.threshold = nn.Parameter(torch.tensor(THRESHOLD))

    def forward(self, patches: Tensor, words: Tensor, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Return φ [P] of the pairs of images [P] and texts [P], and the cosine of each patch with its caption [P, N].

        images, texts: int64, the rows of `patches` and `words` that make the pairs.
        """
        patches, words = (F.normalize(x, dim=-1) * self.dim**0.5 for x in (patches, words))
        seen = F.normalize(self.read(patches, words, images, texts, words.any(-1)[texts]).float(), dim=-1)
        caption = F.normalize(self.see(words[:, :1], patches, texts, images)[:, 0].float(), dim=-1)
        cosines = (seen @ caption[:, :, None])[:, :, 0]
        weights = (cosines / self.temperature).softmax(-1)
        pooled = (weights[:, None] @ seen)[:, 0]
        return (weights * cosines).sum(-1) / pooled.norm(dim=-1), cosines

    def loss(self, patches: Tensor, words: Tensor, scale: Tensor) -> Tensor:
        """Return the matching loss of B pairs, 0-D: binary cross-entropy of each pair and of two hard negatives of it.

        One has another text, one another image. The larger φ of the inputs, the likelier a negative is drawn. Equal
        texts are no negatives.
        """
        words = _trimmed(words)
        with torch.no_grad():
            options: dict[str, Any] = {"attn_temperature": self.temperature, "form": "cosine"}
            phi = compatibility(patches.detach().float(), words[:, 0].float(), **options)
            ids = torch.unique(words.flatten(1), dim=0, return_inverse=True)[1]
            same = ids[:, None] == ids
            # The same noise in every step, so that a resumed run draws the same; batches differ.
            noise = torch.rand(phi.shape, generator=torch.Generator().manual_seed(0)).clamp(1e-7, 1 - 1e-6)
            drawn = (scale * phi - (-noise.log()).log().to(phi.device)).masked_fill(same, -torch.inf)
            own = torch.arange(len(phi), device=phi.device)
            images, texts = torch.cat([own, own, drawn.argmax(0)]), torch.cat([own, drawn.argmax(1), own])
            match = torch.arange(len(images), device=phi.device) < len(phi)
            usable = match | ~same[images, texts]  # all texts of the batch may be equal
            images, texts, match = images[usable], texts[usable], match[usable]
        logits = scale * (self(patches, words, images, texts)[0] - self.threshold)
        return F.binary_cross_entropy_with_logits(logits, match.float())

    @torch.no_grad()
    def score(self, patches: Tensor, words: Tensor, block: int = 1024) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield φ [K] and the cosines [K, N] of each of B images with all K texts.

        block: number of pairs that are in memory at once; at least those of one image are.
        """
        words = _trimmed(words)
        for part in patches.split(max(1, block // len(words))):
            shape = len(part), len(words)
            images, texts = torch.ones(shape, device=part.device).nonzero(as_tuple=True)
            phi, cosines = self(part, words, images, texts)
            yield from zip(phi.unflatten(0, shape), cosines.unflatten(0, shape), strict=True)


def save_head(embedder: VisionEmbedder, head: CrossAttention, path: Path) -> None:
    """Write embedder and head to one file, atomically."""
    sizes = {name: embedder.config[name] for name in ("in_dim", "out_dim", "hidden_dim")}
    state = nn.ModuleDict({"embedder": embedder, "head": head}).state_dict()
    config = json.dumps({**sizes, "temperature": head.temperature})
    write_bytes(path, save({name: x.detach().cpu().contiguous() for name, x in state.items()}, {"config": config}))


def load_head(path: Path) -> tuple[VisionEmbedder, CrossAttention]:
    """Return the embedder and the head of a file that save_head wrote."""
    with safe_open(path, "pt") as file:
        config, state = json.loads(file.metadata()["config"]), {name: file.get_tensor(name) for name in file.keys()}
    temperature = config.pop("temperature")
    embedder, head = VisionEmbedder(**config), CrossAttention(config["out_dim"], temperature)
    nn.ModuleDict({"embedder": embedder, "head": head}).load_state_dict(state)
    return embedder.eval(), head.eval()


def _trimmed(words: Tensor) -> Tensor:
    """Return words without the columns that are padding in all texts."""
    return words[:, words.any(-1).any(0)]


@torch.no_grad()
def words_of(captions: list[str], towers: Towers, batch_size: int) -> Tensor:
    """Return the words of captions [B, W, D] by a frozen text tower, `batch_size` captions at a time."""
    ids = towers.tokenize(captions).to(next(towers.text.parameters()).device)
    return torch.cat([word_tokens(towers.text, towers.encode_text, part) for part in ids.split(batch_size)])


@torch.no_grad()
def word_tokens(text: Any, encode: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
    """Return the words of texts [B, 1 + L, D]: a text's embedding, its projected tokens, and zeros for padding.

    text: the text tower of an open_clip model that reads its embedding at the end of the text, with padding of 0.
    encode: gives normalised embeddings [B, D] of ids [B, L] by that tower. Raises ValueError for another tower.
    """
    known = all(getattr(text, name, None) is not None for name in ("ln_final", "text_projection"))
    if not known or getattr(text, "pad_id", 0) != 0:
        raise ValueError(f"align: got cross-attention with a {type(text).__name__}, expected the text tower of a CLIP")
    found: list[Tensor] = []
    hook = text.ln_final.register_forward_hook(lambda module, given, output: found.append(output))
    try:
        embedded = encode(ids)
    finally:
        hook.remove()
    project = text.text_projection
    tokens = project(found[0]) if isinstance(project, nn.Module) else found[0] @ project
    inside = torch.arange(ids.shape[1], device=ids.device) < ids.argmax(1, keepdim=True)  # the end has the largest id
    return torch.cat([embedded[:, None], tokens * inside[..., None]], 1)
