"""Find the best images for each text in a gallery of patch embeddings on disk, in memory that does not grow with it.

python examples/recipes/gallery.py texts.npy gallery/*.npy
python examples/recipes/gallery.py texts.safetensors gallery/*.safetensors --top 10 --form cosine

A file of the gallery holds patch embeddings [B, N, D], and the file of texts embeddings [K, D]; neither need be
normalised. A .safetensors file has them as the tensor "patches" or "texts". Files may differ in B and N. They are
mapped into memory a block of images at a time. The output is one line for each text and place:
text, rank, compatibility, file, and row in the file.
"""

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from pacl_kernels import compatibility


def rows_of(path: Path, name: str, start: int, end: int) -> torch.Tensor:
    """Return the rows from `start` to `end` of a file, and unmap the file again."""
    if path.suffix == ".npy":
        return torch.from_numpy(np.array(np.load(path, mmap_mode="r")[start:end]))
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.get_slice(name)[start:end]


def shape_of(path: Path, name: str) -> tuple[int, ...]:
    """Return the shape of the tensor `name` of a file; raises ValueError for a file that cannot be read."""
    try:
        if path.suffix == ".npy":
            return np.load(path, mmap_mode="r").shape
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            return tuple(file.get_slice(name).get_shape())
    except Exception as error:  # numpy and safetensors raise many types
        raise ValueError(f"got {path}, expected a .npy file or a .safetensors file with {name!r}") from error


def blocks(files: Iterable[Path], size: int) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Yield the number of a file, the row of a block's first image, and its patch embeddings [at most size, N, D]."""
    for number, path in enumerate(files):
        for start in range(0, shape_of(path, "patches")[0], size):
            yield number, start, rows_of(path, "patches", start, start + size)


@torch.inference_mode()
def search(
    texts: torch.Tensor, files: list[Path], top: int, size: int, device: str, form: str, attn_temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return compatibility, number of the file, and row of the best images of each text, [K, top] or fewer columns.

    Of equal images the first comes first.
    """
    texts = texts.to(device)
    best = torch.empty(len(texts), 0, device=device)
    places = torch.empty(len(texts), 0, 2, dtype=torch.int64, device=device)  # file, row
    for number, start, patches in blocks(files, size):
        patches = patches.to(device, texts.dtype)
        phi = compatibility(patches, texts, form=form, attn_temperature=attn_temperature).T
        rows = torch.arange(start, start + len(patches), device=device)
        here = torch.stack((torch.full_like(rows, number), rows), 1).expand(len(texts), -1, -1)
        best, order = torch.cat((best, phi), 1).sort(dim=1, descending=True, stable=True)
        best, order = best[:, :top], order[:, :top]
        places = torch.cat((places, here), 1).gather(1, order[..., None].expand(-1, -1, 2))
    return best, places[..., 0], places[..., 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path)
    parser.add_argument("gallery", type=Path, nargs="+")
    parser.add_argument("--top", type=int, default=5, help="Images to name for each text.")
    parser.add_argument("--block", type=int, default=256, help="Images in memory at a time.")
    parser.add_argument("--form", choices=("dot", "cosine", "max"), default="cosine", help="The form of training.")
    parser.add_argument("--attn-temperature", type=float, default=0.05, help="The temperature of training.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    for name in ("top", "block"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: got {getattr(args, name)}, expected at least 1")
    try:
        shape = shape_of(args.texts, "texts")
    except ValueError as error:
        parser.error(f"texts: {error}")
    if len(shape) != 2:
        parser.error(f"texts: got shape {list(shape)} in {args.texts}, expected [K, D]")
    for path in args.gallery:
        try:
            found = shape_of(path, "patches")
        except ValueError as error:
            parser.error(f"gallery: {error}")
        if len(found) != 3 or found[2] != shape[1]:
            parser.error(f"gallery: got shape {list(found)} in {path}, expected [B, N, {shape[1]}]")
    texts = rows_of(args.texts, "texts", 0, shape[0])
    try:
        answers = search(texts, args.gallery, args.top, args.block, args.device, args.form, args.attn_temperature)
    except (TypeError, ValueError) as error:  # the library's own, in one sentence
        parser.error(str(error))
    for k, (values, numbers, rows) in enumerate(zip(*(x.tolist() for x in answers), strict=True)):
        for rank, (value, number, row) in enumerate(zip(values, numbers, rows, strict=True), 1):
            print(f"{k}\t{rank}\t{value:.6f}\t{args.gallery[number]}\t{row}")


if __name__ == "__main__":
    main()
