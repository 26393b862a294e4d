"""Load an embedder with its towers, and check that the towers compute what they did in training."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.utils import HFValidationError, validate_repo_id
from open_clip.factory import parse_model_name
from open_clip.transformer import QuickGELU
from safetensors.torch import save
from torch import Tensor, nn

from .backbones import freeze
from .embedder import CONFIG, DescribedTowers, VisionEmbedder, embedder_folder, read_embedder_config
from .files import write_bytes
from .pretrained import why_not_fetched
from .remote import Location, RemotePath
from .towers import Towers, encode_text, load_towers, random_towers
from .weights import load_weights

HUB_FILES = {"allow_patterns": ["*.json", "*.safetensors"]}
LOADED = ("model", "pretrained", "vision_model", "text_model")  # names that may be local paths
# Parts of a description that some towers lack.
OPTIONAL = {"base_model", "random", "text_model", "max_patches", "tokens", "proxy"}
# Largest relative error of a fingerprint. With random weights and 3 to 12 layers, bfloat16 caused errors of 0.005 to
# 0.01, and a wrong activation 0.003 to 0.016; therefore the activation's name is compared too.
TOLERANCE = {torch.float32: 0.001, torch.bfloat16: 0.05, torch.float16: 0.05}


def load_pacl(
    folder: str | os.PathLike, device: torch.device | str = "cpu", **download: Any
) -> tuple[Towers, VisionEmbedder]:
    """Load the towers and the embedder of a run or of the demo, frozen and in eval mode.

    Args:
        folder: the embedder's folder, that of its run or of the demo, or its name on the Hub.
        device: device of towers and embedder.
        **download: arguments of huggingface_hub's `snapshot_download`, such as `revision`.

    Returns:
        The towers and the embedder.

    Raises:
        ValueError: if the towers do not compute what they did in training, or if the folder does not describe them.
    """
    local = Path(folder).is_dir()
    if Path(folder).is_file():
        raise ValueError(
            f"folder: got {str(folder)!r}, which is a file; expected the folder of an embedder or of a run"
        )
    if not local and not _may_be_on_the_hub(str(folder)):
        raise ValueError(
            f"folder: got {str(folder)!r}, which does not exist; expected a folder, or a name on the Hub "
            "(owner/name, where owner is not a local folder)"
        )
    folder = embedder_folder(folder if local else _download(str(folder), download))
    embedder = VisionEmbedder.from_pretrained(folder)
    freeze(embedder).to(device)
    described = embedder.towers
    check_described(described, folder / CONFIG)
    digests = read_embedder_config(folder / CONFIG).get("sha256", {})
    names: dict[str, Any] = {name: _absolute(described.get(name), folder, local) for name in LOADED}
    trained, vision_pretrained = described["trained"], described["vision_pretrained"]
    names |= {"vision_pretrained": vision_pretrained and "visual" not in trained}
    names |= {"force_image_size": described["force_image_size"], "max_patches": described.get("max_patches")}
    names |= {"tokens": described.get("tokens", "plain"), "proxy": _absolute(described.get("proxy"), folder, local)}
    towers = load_towers(**names)
    towers.names["vision_pretrained"] = vision_pretrained
    for name in (*trained, *described.get("random", [])):
        load_tower(towers, name, folder, digests)
    check_towers(described, towers.to(device))
    return towers, embedder


def _download(name: str, options: Mapping[str, Any]) -> str:
    """Return the local copy of an embedder on the Hub; raise ValueError, with the cause, if there is none."""
    try:
        return snapshot_download(name, **HUB_FILES | dict(options))
    except Exception as error:  # of the network or the Hub
        if (reason := why_not_fetched(error)) is None:
            raise
        raise ValueError(f"folder: got {name!r}, which could not be downloaded: {reason}") from error


def load_model(
    checkpoint: str | None,
    model: str,
    pretrained: str | None,
    device: torch.device | str = "cpu",
    tokens: str | None = None,
    proxy: str | None = None,
    *,
    text_model: str | Path | None = None,
) -> tuple[Towers, VisionEmbedder | None]:
    """Load a checkpoint as load_pacl does, or without one the towers of an open_clip model, and None as the embedder.

    tokens, proxy: the reading of the patch tokens and its second tower. None: those that the embedder was trained on,
    "plain" without one. text_model: as in load_towers, without a checkpoint. Raises ValueError for another reading than
    the embedder's, for a model without weights, because its numbers would look like any other's, and for a text_model
    of another width than the model's image embeddings.
    """
    if checkpoint and text_model:
        raise ValueError(f"text_model: got {str(text_model)!r} with a checkpoint, which has its own; expected none")
    if checkpoint:
        towers, embedder = load_pacl(checkpoint, device)
        trained = {"tokens": towers.reader.name, "proxy": towers.names.get("proxy")}
        for name, value in (("tokens", tokens), ("proxy", proxy)):
            if value not in (None, trained[name]):
                raise ValueError(
                    f"{name}: got {value!r}, but the embedder of {checkpoint} was trained on {trained[name]!r}; "
                    f"expected the same, or no --{name}"
                )
        return towers, embedder
    if random_towers(model, pretrained):
        raise ValueError(
            f"pretrained: got none for {model}, whose weights would be random; expected a tag or a file of weights, "
            "or --checkpoint"
        )
    folder = str(text_model) if text_model else None
    towers = load_towers(model, pretrained, text_model=folder, tokens=tokens or "plain", proxy=proxy, device=device)
    if text_model:
        image, ids = towers.probe()
        with torch.no_grad():
            widths = [encode_text(tower, x).shape[-1] for tower, x in ((towers.visual, image), (towers.text, ids))]
        if widths[0] != widths[1]:
            raise ValueError(
                f"text_model: got {str(text_model)!r}, whose embeddings have {widths[1]} numbers, expected "
                f"{widths[0]}, as the image embeddings of {model}"
            )
    return towers, None


def save_tower(towers: Towers, name: str, folder: Location) -> None:
    """Write the weights of the tower `name`, "visual" or "text", to `folder`, atomically."""
    # safetensors refuses tied weights, such as T5's; a copy of each is its own.
    state = {key: x.detach().cpu().clone().contiguous() for key, x in getattr(towers, name).state_dict().items()}
    write_bytes(folder / f"{name}.safetensors", save(state))


def load_tower(towers: Towers, name: str, folder: Location, digests: Mapping[str, str]) -> None:
    """Load the weights that save_tower wrote, and compare them with their SHA-256 if `digests` has it."""
    load_weights(getattr(towers, name), folder / f"{name}.safetensors", digests)


def check_described(described: Mapping[str, Any], path: Location) -> None:
    """Raise ValueError unless `described`, of the settings file at `path`, says all that check_towers compares."""
    missing = sorted(DescribedTowers.__annotations__.keys() - OPTIONAL - described.keys())
    if missing:
        raise ValueError(f"{path} does not describe the towers of the embedder: towers.{missing[0]} is missing")


def check_towers(described: Mapping[str, Any], towers: Towers) -> None:
    """Raise ValueError, naming the differences, unless `towers` are those that an embedder's `described` describes."""
    wrong = tower_differences(described, towers)
    if wrong:
        have, expected = _tag({name: _relative(towers.names[name], Path()) for name in LOADED}), _tag(described)
        wrong += [f"they are {have}, not {expected}"] if have != expected else []
        raise ValueError(f"towers: expected those that the embedder was trained on, but {'; '.join(wrong)}")


def tower_differences(described: Mapping[str, Any], towers: Towers) -> list[str]:
    """Return a phrase for each difference between the results of `towers` and those that describe_towers described."""
    reading = described.get("tokens", "plain")
    if towers.reader.name != reading:  # the vision tower's output then differs for that reason
        return [f"the tokens are {towers.reader.name}, not {reading}"]
    found = describe_towers(towers, Path())
    wrong = []
    for name, label in (("visual", "vision"), ("text", "text")):
        have, expected = found["activation"][name], described["activation"][name]
        if have != expected:
            wrong.append(f"the {label} tower's activation is {have}, not {expected}")
        dtype = next(getattr(towers, name).parameters()).dtype
        have, expected = (torch.tensor(x["fingerprint"][name], dtype=torch.float64) for x in (found, described))
        error = (have - expected).norm() / expected.norm() if have.shape == expected.shape else math.inf
        if not error <= TOLERANCE.get(dtype, 0.001):
            wrong.append(f"the {label} tower's output is off by {error:.1%} (other weights?)")
    most = [x.get("max_patches") for x in (found, described)]
    if most[0] != most[1]:
        wrong.append(f"images have {_most(most[0])}, not {_most(most[1])}")
    elif found["image_size"] != described["image_size"]:
        wrong.append(f"images have {found['image_size']} pixels, not {described['image_size']}")
    return wrong


@torch.no_grad()
def describe_towers(
    towers: Towers, folder: Location, trained: Iterable[str] = (), random: Sequence[str] = ()
) -> dict[str, Any]:
    """Describe towers for an embedder's config.json in `folder`: plain values, with local paths relative to it.

    trained, random: "visual", "text" or both: the towers whose weights are in `folder` because they were trained, or
    because they are random. The fingerprint is computed on the CPU, so that it does not depend on TF32 and other
    settings of a device.
    """
    reader = towers.reader
    if reader.proxy is not None:
        reader = dataclasses.replace(reader, proxy=_on_cpu(reader.proxy))
    towers = dataclasses.replace(towers, visual=_on_cpu(towers.visual), text=_on_cpu(towers.text), reader=reader)
    image, ids = towers.probe()
    with torch.autocast("cpu", enabled=False):
        tokens, text = towers.tokens(image)[0], towers.encode_text(ids)[0]
    rows, columns, places = map(_spread, (*tokens.shape, len(text)), (8, 6, 24))
    return {
        **{name: _relative(x, folder) if name in (*LOADED, "proxy") else x for name, x in towers.names.items()},
        "trained": list(trained),
        **({"random": list(random)} if random else {}),
        "activation": {name: activation(getattr(towers, name)) for name in ("visual", "text")},
        "image_size": list(image.shape[2:]),
        "base_model": _base_models(towers),
        "fingerprint": {
            "visual": _floats(tokens[rows][:, columns]),
            "text": _floats(text[places]),
        },
    }


def activation(module: nn.Module) -> str:
    """Return the class names of a tower's activations: GELU, QuickGELU, ..."""
    kinds = {type(m) for m in module.modules() if not any(True for _ in m.children())}
    found = (k.__name__ for k in kinds if "activation" in k.__module__ or k is QuickGELU)
    return ", ".join(sorted(found)) or "functional"


def _on_cpu(module: nn.Module) -> nn.Module:
    """Return the module if it is on the CPU, else a copy that is."""
    held = [*module.parameters(), *module.buffers()]
    if all(x.device.type == "cpu" for x in held):
        return module
    there = {id(x): nn.Parameter(x.cpu(), False) if isinstance(x, nn.Parameter) else x.cpu() for x in held}
    return copy.deepcopy(module, there)  # takes the tensors of `there` instead of copying on the device


def is_local(name: str) -> bool:
    """Return True if the name of a model or of weights is a local folder or an existing file."""
    schema, path = parse_model_name(name)
    return schema == "local-dir" or schema is None and os.path.isfile(path)


def _relative(name: str | None, folder: Location) -> str | None:
    """Make a local folder or file relative to `folder`, so that both can move; return any other name unchanged.

    For a folder in a store the path is absolute.
    """
    if name and is_local(name):
        schema, path = parse_model_name(name)
        place = os.path.abspath(path) if isinstance(folder, RemotePath) else os.path.relpath(path, folder)
        return ("local-dir:" if schema else "") + Path(place).as_posix()
    return name


def _absolute(name: str | None, folder: Path, trusted: bool) -> str | None:
    """Invert _relative; raise ValueError if a folder from the Hub (not `trusted`) names something outside itself."""
    schema, path = parse_model_name(name or "")
    if schema == "local-dir" or schema is None and path and (folder / path).is_file():
        found = folder / path
        if not trusted and not found.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"folder: {folder / CONFIG} names {name!r}, which is outside of it")
        return ("local-dir:" if schema else "") + str(found)
    return name


def _may_be_on_the_hub(name: str) -> bool:
    """Return False for what looks like a mistyped local path, so that the error is about the path, not the Hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    owner, slash, _ = name.partition("/")
    return bool(slash) and not Path(owner).is_dir()


def _base_models(towers: Towers) -> list[str]:
    """Return the Hub names of the weights that the towers were initialised from."""
    model, pretrained, vision = (towers.names[name] for name in ("model", "pretrained", "vision_model"))
    schema, identifier = parse_model_name(model)
    hub = identifier if schema == "hf-hub" else open_clip.get_pretrained_cfg(model, pretrained or "").get("hf_hub")
    found = ["/".join(hub.split("/")[:2])] if hub and not (vision and towers.names.get("text_model")) else []
    if vision and towers.names["vision_pretrained"]:
        config: Any = towers.visual.pretrained_cfg  # a dict of timm models
        found += [config.get("hf_hub_id") or vision]
    if towers.reader.proxy is not None:
        config = towers.reader.proxy.pretrained_cfg
        found += [config.get("hf_hub_id") or towers.names["proxy"]]
    return found


def _tag(names: Mapping[str, Any]) -> str:
    others = [f" with {names[name]}" for name in ("vision_model", "text_model") if names.get(name)]
    return f"{names['model']} ({names['pretrained'] or 'no tag'}){''.join(others)}"


def _most(patches: int | None) -> str:
    return "one size" if patches is None else f"at most {patches} patches (--max-patches)"


def _spread(size: int, count: int) -> Tensor:
    return torch.linspace(0, size - 1, count).long()


def _floats(x: Tensor) -> list[float]:
    return [float(f"{value:.6g}") for value in x.flatten().tolist()]
