"""Train with the token-level scores of FILIP, ColBERT or GLoRIA: every word looks for its own patches.

python examples/recipes/late_interaction.py --score filip

The three losses are functions of patches, tokens and a mask of real tokens, to copy into a training loop. The features
are made up: each of an image's words describes one object, which covers 2 of 12 patches.
"""

import argparse

import torch
from torch import Tensor
from torch.nn import functional as F

from pacl_kernels import compatibility, fused_pacl_loss

PATCHES, WORDS, WIDTH, DIM = 12, 5, 64, 32


def filip_loss(patches: Tensor, tokens: Tensor, real: Tensor, scale: float | Tensor = 14.3) -> Tensor:
    """Return FILIP's loss of patches [B, N, D] and tokens [B, L, D]; `real` [B, L] is True at real tokens.

    The text side is the mean over tokens of the best patch. The image side is the same with the roles exchanged.
    """
    of_texts = compatibility(patches, tokens, form="max", text_mask=real, text_pool="mean")  # [images, texts]
    of_images = compatibility(tokens, patches, form="max", patch_mask=real, text_pool="mean")  # [texts, images]
    own = torch.arange(len(patches), device=patches.device)
    return (F.cross_entropy(scale * of_images.T, own) + F.cross_entropy(scale * of_texts.T, own)) / 2


def colbert_loss(
    pages: Tensor, queries: Tensor, real: Tensor, real_pages: Tensor | None = None, temperature: float = 0.1
) -> Tensor:
    """Return ColBERT's loss of pages [P, N, D] and queries [Q, L, D]; page i belongs to query i, and P may exceed Q.

    The score, MaxSim, is the sum over the query's tokens of the best token of the page.
    """
    scores = compatibility(pages, queries, form="max", patch_mask=real_pages, text_mask=real, text_pool="sum")
    return F.cross_entropy(scores.T / temperature, torch.arange(len(queries), device=queries.device))


def gloria_loss(
    regions: Tensor, words: Tensor, real: Tensor, temp1: float = 4.0, temp2: float = 5.0, temp3: float = 10.0
) -> Tensor:
    """Return a loss like GLoRIA's local one of regions [B, N, D] and words [B, L, D], the mean of both directions.

    The score is log Σ exp(temp2 c) over words, where c is the cosine of a word with the regions that it attends to.
    """
    attention = {"form": "cosine", "normalize": "none", "attn_temperature": 1 / temp1}
    words_to_text = {"text_mask": real, "text_pool": "logsumexp", "text_pool_scale": temp2}
    return fused_pacl_loss(regions, words, temp2 * temp3, **attention, **words_to_text)


def draw(images: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return features of patches [images, 12, WIDTH], of words [images, 5, WIDTH], and which words are real."""
    objects, patches = torch.randn(images, WORDS, WIDTH), torch.randn(images, PATCHES, WIDTH)
    patches[:, : 2 * WORDS] += 2 * objects.repeat_interleave(2, 1)
    real = torch.arange(WORDS) < torch.randint(2, WORDS + 1, (images, 1))
    return patches, objects + 0.3 * torch.randn(objects.shape), real


def main() -> None:
    losses = {"filip": filip_loss, "colbert": colbert_loss, "gloria": gloria_loss}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--score", choices=losses, default="filip")
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    torch.manual_seed(0)
    image, text = torch.nn.Linear(WIDTH, DIM), torch.nn.Linear(WIDTH, DIM)
    optimizer = torch.optim.Adam([*image.parameters(), *text.parameters()], lr=3e-3)
    for step in range(1, args.steps + 1):
        patches, words, real = draw(32)
        loss = losses[args.score](image(patches), text(words), real)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 1 or step % 20 == 0:
            print(f"step {step}: loss {loss.item():.6f}", flush=True)
    patches, words, real = draw(200)
    with torch.no_grad():
        scores = compatibility(image(patches), text(words), form="max", text_mask=real, text_pool="sum")
    print(f"R@1 among 200 unseen images: {100 * (scores.argmax(0) == torch.arange(200)).float().mean():.1f} %")


if __name__ == "__main__":
    main()
