"""The vision embedder: the only part that PACL trains."""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors.torch import load_file, save
from torch import Tensor, nn

from .files import write_bytes

CONFIG, WEIGHTS = "config.json", "model.safetensors"  # the names that the Hugging Face Hub expects


class VisionEmbedder(nn.Module):
    """The paper's residual block, from patch tokens to the text embedding's space: `main(x) + skip(x)`.

    in_dim: width of the tokens, 768 for ViT-B-16; out_dim: width of the text embeddings; hidden_dim: out_dim unless
    given. The defaults make 1,050,112 parameters, the paper's "about 1.1M". Takes tokens [..., in_dim], returns patch
    embeddings [..., out_dim], not normalised. Source: Mukhoti et al., CVPR 2023, appendix A.1: two linear layers with
    a ReLU between them, and a linear skip.
    """

    def __init__(self, in_dim: int = 768, out_dim: int = 512, hidden_dim: int | None = None):
        super().__init__()
        self.config = {"in_dim": in_dim, "out_dim": out_dim, "hidden_dim": hidden_dim or out_dim}
        for name, value in self.config.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: got {value!r}, expected a positive integer")
        hidden = self.config["hidden_dim"]
        self.main = nn.Sequential(nn.Linear(in_dim, hidden), nn.ReLU(), nn.Linear(hidden, out_dim))
        self.skip = nn.Linear(in_dim, out_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.main(tokens) + self.skip(tokens)


def save_embedder(embedder: VisionEmbedder, folder: str | os.PathLike, **notes) -> None:
    """Write `folder`/model.safetensors and config.json: the sizes, and `notes` on how it was trained (JSON values)."""
    folder = Path(folder)
    write_bytes(folder / WEIGHTS, save(embedder.state_dict()))
    write_bytes(folder / CONFIG, (json.dumps({**embedder.config, "training": notes}, indent=2) + "\n").encode())


def load_embedder(folder: str | os.PathLike) -> VisionEmbedder:
    """Read what save_embedder wrote; weights that do not match the config are a RuntimeError that names them."""
    folder = Path(folder)
    config = json.loads((folder / CONFIG).read_text())
    embedder = VisionEmbedder(config["in_dim"], config["out_dim"], config["hidden_dim"])
    embedder.load_state_dict(load_file(folder / WEIGHTS))
    return embedder
