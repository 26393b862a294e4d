"""Say in one sentence why a model of open_clip or timm, or its weights, could not be loaded."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors import safe_open

from .files import impostor
from .settings import Damaged, read_settings
from .weights import misfit

SUFFIXES = (".safetensors", ".bin", ".pth")  # of weights in a model's folder
# Errors of huggingface_hub by the names of their classes, the most specific first.
NOT_FETCHED = {
    "GatedRepoError": "its owner must grant you access first; then sign in with `hf auth login`",
    "RepositoryNotFoundError": "the Hub has no such repository, or it is private (`hf auth login` signs in)",
    "RevisionNotFoundError": "the Hub has no such revision of it",
    "LocalEntryNotFoundError": "the Hub cannot be reached, and no earlier download is on this machine",
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set, and no earlier download is on this machine",
    "EntryNotFoundError": "its repository on the Hub lacks a file of the model",
    "HfHubHTTPError": "the Hub refused the download",
}


def why_not_loaded(error: Exception, what: str, weights: Path | None = None, folder: Path | None = None) -> str:
    """Return a sentence about an error of open_clip or timm while it made a model.

    what: the beginning of the sentence, the argument and its value. weights: the file of weights that was given, if
    there is one. folder: that of a local model, to which they belong.
    """
    if (package := missing_package(error)) is not None:
        return f"{what}, which needs the package {package}: pip install {package}"
    if (reason := why_not_fetched(error)) is not None:
        return f"{what}, which could not be downloaded: {reason}"
    subject = f"{what}, which" if folder is None else f"{what}, whose {weights.name if weights else 'weights'}"
    if weights is not None and (kind := impostor(weights)) is not None:
        return f"{subject} is {kind}, expected weights"
    if clauses := _of_state_dict(str(error)):
        return f"{subject} does not fit the model: {'; '.join(clauses)}"
    held = None if weights is None else _held(weights)
    if weights is not None and held is None:
        return f"{subject} holds other objects than tensors or is damaged, expected weights"
    if folder is not None and isinstance(error, (TypeError, LookupError, AttributeError)):
        return f"{what}, whose settings describe no model that this version makes: {error}"
    if held is not None:
        return f"{subject} holds {held}, expected those of the model"
    return f"{what}, which cannot be made here: {type(error).__name__}: {error}"


def missing_package(error: BaseException) -> str | None:
    """Return the package that is not installed, if that is the error."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, ModuleNotFoundError):
            return (found.name or "").partition(".")[0]
        if match := re.search(r"pip install ([\w-]+)", str(found)):
            return match[1]
        found = found.__cause__ or found.__context__
    return None


def why_not_fetched(error: BaseException) -> str | None:
    """Return why a download from the Hub failed; None for an error that is none of the Hub's."""
    kinds: list[str] = []
    found: BaseException | None = error
    while found is not None:
        kinds += [kind.__name__ for kind in type(found).__mro__]
        found = found.__cause__ or found.__context__
    return next((reason for name, reason in NOT_FETCHED.items() if name in kinds), None)


def check_local_model(argument: str, name: str, folder: Path, config: str, key: str) -> Path:
    """Check a local model's folder before it is loaded, and return its file of weights.

    config: the name of its settings file, which must have `key`. Raises ValueError, which names the argument, for a
    folder without settings or weights: open_clip would keep random weights.
    """
    got = f"{argument}: got {name!r}"
    if not folder.is_dir():
        raise ValueError(f"{got}, but {folder} is not a folder; expected one with {config} and weights")
    path = folder / config
    if not path.is_file():
        raise ValueError(f"{got}, but {folder} has no {config}; expected a model's folder")
    try:
        values = read_settings(path)
    except Damaged as error:
        raise ValueError(f"{got}, but {error}") from error
    if key not in values:
        raise ValueError(f"{got}, but {path} has no {key!r}, expected the settings of a model")
    found = [x for x in folder.iterdir() if x.suffix in SUFFIXES]
    if not found:
        raise ValueError(f"{got}, but {folder} has no weights (*{', *'.join(SUFFIXES)})")
    # open_clip and timm prefer safetensors, and their own names.
    return min(found, key=lambda x: (x.suffix != ".safetensors", not x.name.startswith("open_clip"), x.name))


def _of_state_dict(text: str) -> list[str]:
    """Return clauses on what PyTorch says about weights that do not fit; none for another error."""
    missing, unexpected = (
        _names(rf"{kind} key\(s\) in state_dict: (.*?)\.\s", text) for kind in ("Missing", "Unexpected")
    )
    shape = r"torch\.Size\((\[.*?\])\)"
    sizes = re.findall(rf"size mismatch for (\S+): .*?{shape}.*?{shape}", text)
    shapes = [f"{name} has the shape {found}, expected {wanted}" for name, found, wanted in sizes]
    return misfit(missing, unexpected, shapes)


def _names(pattern: str, text: str) -> list[str]:
    """Return the quoted names in what `pattern` finds."""
    match = re.search(pattern, text + " ", re.DOTALL)
    return re.findall(r'"([^"]+)"', match[1]) if match else []


def _held(path: Path) -> str | None:
    """Describe the tensors in a file of weights; None for one that cannot be read or holds anything else."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                shapes = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118, no dict
        else:
            state = torch.load(path, map_location="meta", weights_only=True)
            state = state.get("state_dict", state)
            shapes = {name: list(x.shape) for name, x in state.items()}
    except Exception:  # on bytes that are no weights, anything
        return None
    first = ", ".join(f"{name} {shape}" for name, shape in list(shapes.items())[:2])
    return f"{len(shapes):,} tensors ({first}, ...)" if shapes else "no tensors"
