"""The vision embedder that PACL trains, its files, and its model card."""

from __future__ import annotations

import inspect
import json
import os
from pathlib import Path
from typing import Any, Final, Literal, TypedDict

import yaml
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from safetensors.torch import save
from torch import Tensor, nn

from .annotations import checked
from .files import file_digest, write_bytes
from .settings import Damaged, read_settings
from .weights import load_weights

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"  # the names that the Hugging Face Hub expects
HEAD = "cross_attention.safetensors"  # what a run with --align cross-attention writes instead
# Defaults of `pacl train`, and of embedders whose config has no value.
DEFAULT_FORM: Final = "cosine"
DEFAULT_ATTN_TEMPERATURE = 0.05
SOURCE = "https://arxiv.org/abs/2212.04994"
MOST_WIDTH = 2**20


class Fingerprint(TypedDict):
    visual: list[float]
    text: list[float]


class Activations(TypedDict):
    visual: str
    text: str


class DescribedTowers(TypedDict, total=False):
    """Towers, as describe_towers in `sharing` returns them. Embedders without some of it load, but not their towers."""

    model: str
    pretrained: str | None
    vision_model: str | None
    text_model: str | None
    vision_pretrained: bool
    force_image_size: int | None
    max_patches: int | None  # of variable resolution; absent for images of one size
    tokens: str  # the reading of the patch tokens, if it is not "plain"
    proxy: str  # the second tower of the reading "proxy"
    trained: list[Literal["visual", "text"]]
    random: list[Literal["visual", "text"]]  # frozen, without published weights
    activation: Activations
    image_size: list[int]
    base_model: list[str]
    fingerprint: Fingerprint


class _Sizes(TypedDict):
    in_dim: int
    out_dim: int


class EmbedderConfig(_Sizes, total=False):
    """Contents of an embedder's config.json. sha256: digests by file name, absent in earlier versions."""

    hidden_dim: int | None
    form: Literal["dot", "cosine", "max"]
    attn_temperature: float
    towers: DescribedTowers
    training: dict[str, Any]
    sha256: dict[str, str]


class VisionEmbedder(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="pacl-kernels",
    license="mit",
    tags=["zero-shot-image-segmentation", "pacl"],
):
    """The paper's residual block, from patch tokens to the space of the text embeddings: `main(x) + skip(x)`.

    Takes tokens `[..., in_dim]` and returns patch embeddings `[..., out_dim]`, not normalised. The default sizes make
    1,050,112 parameters, the paper's "about 1.1M".

    `save_pretrained(folder)` writes weights (safetensors), config and model card. `from_pretrained` reads a folder or
    the Hub. `pacl.load_pacl` also loads the towers and checks them.

    Source: Mukhoti et al., CVPR 2023, appendix A.1: two linear layers with a ReLU between them, and a linear skip.

    Args:
        in_dim: width of the tokens, 768 for ViT-B-16.
        out_dim: width of the text embeddings.
        hidden_dim: width between the two layers, by default `out_dim`.
        towers: plain values that describe the embedder's towers, as `pacl.sharing.describe_towers` returns them; kept
            as the attribute `towers`.
        training: plain values, notes on the run; kept as the attribute `notes`.
        form: form of the compatibility φ in training, which also scores whole images; by default `"cosine"`.
        attn_temperature: temperature of the attention in training, by default 0.05.

    Raises:
        ValueError: for a size that is not a positive integer.
    """

    def __init__(
        self,
        in_dim: int = 768,
        out_dim: int = 512,
        hidden_dim: int | None = None,
        towers: dict[str, Any] | None = None,
        training: dict[str, Any] | None = None,
        form: str = DEFAULT_FORM,
        attn_temperature: float = DEFAULT_ATTN_TEMPERATURE,
    ):
        super().__init__()
        sizes = {"in_dim": in_dim, "out_dim": out_dim, "hidden_dim": hidden_dim or out_dim}
        for name, value in sizes.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: got {value!r}, expected a positive integer")
        self.config: dict[str, Any] = {**sizes, "form": form, "attn_temperature": attn_temperature}
        self.towers, self.notes = towers or {}, training or {}
        hidden = sizes["hidden_dim"]
        self.main = nn.Sequential(nn.Linear(in_dim, hidden), nn.ReLU(), nn.Linear(hidden, out_dim))
        self.skip = nn.Linear(in_dim, out_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.main(tokens) + self.skip(tokens)

    def _save_pretrained(self, save_directory: Path) -> None:
        save_embedder(self, save_directory)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> VisionEmbedder:
        """Load a folder, of a run too, or a name on the Hub. options: see PyTorchModelHubMixin, whose method this is.

        Raises ValueError, naming file and key or tensor, for damaged files. A SHA-256 in config.json is compared.
        """
        if Path(pretrained_model_name_or_path).is_dir():
            pretrained_model_name_or_path = embedder_folder(pretrained_model_name_or_path)
            # Here, because the mixin believes what it reads.
            read_embedder_config(pretrained_model_name_or_path / CONFIG)
        return super().from_pretrained(pretrained_model_name_or_path, **options)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, map_location: str = "cpu", **options: Any) -> VisionEmbedder:
        """Load safetensors only, and strictly; the mixin's own method accepts a pickle and may leave weights random."""
        names = inspect.signature(cls).parameters
        given = {name: options.pop(name) for name in names if name in options}  # of config.json, or the caller's
        options.pop("strict", None)

        def find(name: str) -> Path:
            return (
                Path(model_id) / name if Path(model_id).is_dir() else Path(hf_hub_download(model_id, name, **options))
            )

        config = read_embedder_config(find(CONFIG))
        values: dict[str, Any] = {**config, **given, "training": config.get("training")}
        embedder = cls(**{name: x for name, x in values.items() if name in names})
        load_weights(embedder, find(WEIGHTS), config.get("sha256", {}))
        return embedder.to(map_location).eval()


def embedder_folder(folder: str | os.PathLike) -> Path:
    """Return the folder of an embedder: `folder` itself, or its `embedder` if it is that of a run or of the demo.

    Raises ValueError for a folder that is neither.
    """
    folder = Path(folder)
    for place in (folder, folder / "embedder"):
        if (place / CONFIG).is_file():
            return place
    why = ", whose run has saved no embedder yet" if (folder / "config.yaml").is_file() else ""
    why = ", whose run trained cross-attention, which no command reads" if (folder / HEAD).is_file() else why
    raise ValueError(
        f"folder: got {str(folder)!r}{why}, expected the folder of an embedder, with {CONFIG}, or that of a run, with "
        f"embedder/{CONFIG}"
    )


def read_embedder_config(path: Path) -> EmbedderConfig:
    """Read an embedder's config.json; raises ValueError for a damaged one."""
    values = read_settings(path)
    notes = values.get("training")
    if isinstance(notes, dict):
        for name in ("form", "attn_temperature"):  # earlier versions wrote both into the notes
            if name in notes:
                values.setdefault(name, notes.pop(name))
    config: EmbedderConfig = checked(values, EmbedderConfig, path)
    sizes = {"in_dim": config["in_dim"], "out_dim": config["out_dim"], "hidden_dim": config.get("hidden_dim")}
    for name, value in sizes.items():
        if value is not None and not 1 <= value <= MOST_WIDTH:
            raise Damaged(path, f"{name} is {value}, expected 1 to {MOST_WIDTH:,}")
    if not config.get("attn_temperature", 1.0) > 0:
        raise Damaged(path, f"attn_temperature is {config['attn_temperature']}, expected a number above 0")
    return config


def save_embedder(
    embedder: VisionEmbedder,
    folder: str | os.PathLike,
    towers: dict[str, Any] | None = None,
    *,
    form: str | None = None,
    attn_temperature: float | None = None,
    **notes: Any,
) -> None:
    """Write `embedder` to `folder` as `embedder.save_pretrained` does, but every file atomically.

    Arguments that are given replace the embedder's own values. config.json holds the sizes, form and temperature,
    "towers" (see describe_towers), "training" (notes on the training, JSON values) and "sha256" (digests of the files
    of weights, those of trained and of random towers in `folder` included). It is written last.
    """
    folder = Path(folder)
    given = {"form": form, "attn_temperature": attn_temperature}
    config = embedder.config | {name: value for name, value in given.items() if value is not None}
    towers = towers or embedder.towers
    config |= {"towers": towers, "training": notes or embedder.notes}
    write_bytes(folder / WEIGHTS, save(embedder.state_dict()))
    written = [*towers.get("trained", []), *towers.get("random", [])]
    files = [folder / name for name in (WEIGHTS, *(f"{name}.safetensors" for name in written))]
    config["sha256"] = {path.name: file_digest(path) for path in files if path.is_file()}
    write_bytes(folder / CARD, model_card(config).encode())
    write_bytes(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def model_card(config: dict[str, Any]) -> str:
    """Return the README.md for the Hub, made from the contents of config.json.

    The notes "command" and "metrics" get sections of their own.
    """
    info = VisionEmbedder._hub_mixin_info.model_card_data
    towers, notes = config["towers"], dict(config["training"])
    command, metrics = notes.pop("command", None), notes.pop("metrics", {})
    head = {"library_name": info.library_name, "license": info.license, "tags": info.tags}
    if towers.get("base_model"):
        head["base_model"] = towers["base_model"]
    tower = towers.get("vision_model") or towers.get("model", "towers that are not recorded")
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# PACL on {tower}",
        f"The vision embedder of [Patch Aligned Contrastive Learning]({SOURCE}). It maps patch tokens of a vision "
        f"tower, {config['in_dim']} wide, to the space of the text embeddings, {config['out_dim']} wide, where cosines "
        "segment images by words. Trained with `pacl-kernels`. The towers keep their own licences.",
        "```python\nimport torch.nn.functional as F\nfrom pacl import load_pacl\n\n"
        'towers, embedder = load_pacl("FOLDER OR NAME ON THE HUB")\n'
        "patches = embedder(towers.tokens(towers.transform(image)[None]))  # [1, N, D], row by row\n"
        'texts = towers.encode_text(towers.tokenize(["a dog", "grass"]))  # [2, D]\n'
        "cosines = F.normalize(patches, dim=-1) @ texts.T  # [1, N, 2]\n```",
    ]
    if metrics:
        parts += ["## Results", _table(metrics)]
    trained_as = {name: config[name] for name in ("form", "attn_temperature")}
    values = {name: x for name, x in towers.items() if name != "fingerprint"} | trained_as | notes
    parts += ["## Training", _table(values)]
    if command:
        parts.append(f"```\n{command}\n```")
    return "\n\n".join(parts) + "\n"


def _table(values: dict[str, Any]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {_cell(x)} |" for name, x in values.items())])


def _cell(x: Any) -> str:
    return f"{x:.6g}" if isinstance(x, float) else json.dumps(x) if isinstance(x, dict | list) else str(x)
