"""Say in one sentence why weights could not be loaded into a model of open_clip."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

from safetensors import SafetensorError

from .formats import one_line

# The first bytes of files that are downloaded in place of weights.
IMPOSTORS = (
    (b"version https://git-lfs", "a pointer of Git LFS, expected the weights themselves (git lfs pull)"),
    (b"<!doctype html", "a page of HTML, expected a file of weights"),
    (b"<html", "a page of HTML, expected a file of weights"),
)


def why_not_loaded(error: Exception, model: str, pretrained: str | None) -> str:
    """Return a sentence about an error of open_clip while it loaded `pretrained` into `model`."""
    if isinstance(error, ModuleNotFoundError):
        return f"model: {model} needs the package {error.name}: pip install {error.name}"
    what = f"pretrained: got {pretrained!r} for {model}, "
    if pretrained and Path(pretrained).is_file():
        with open(pretrained, "rb") as file:
            start = file.read(64).lstrip().lower()
        if not start:
            return what + "which is an empty file, expected a file of weights"
        for first, kind in IMPOSTORS:
            if start.startswith(first):
                return f"{what}which is {kind}"
    text = str(error)
    found = [_names(rf"{kind} key\(s\) in state_dict: (.*?)\.\s", text) for kind in ("Missing", "Unexpected")]
    sizes = re.findall(r"size mismatch for (\S+):", text)
    if any(found) or sizes:
        lacks, has = (f"{len(names)} ({', '.join(names[:2])}, ...)" if names else "none" for names in found)
        other = f" and {len(sizes)} of another shape ({', '.join(sizes[:2])}, ...)" if sizes else ""
        return f"{what}whose weights do not fit: {lacks} are missing, {has} are not the model's{other}"
    # The unpickler raises any of these on bytes that are no pickle.
    if isinstance(error, (pickle.UnpicklingError, SafetensorError, LookupError, EOFError, TypeError, AttributeError)):
        return what + "which holds other objects than tensors or is damaged, expected a file of weights"
    return f"{what}which open_clip cannot load: {one_line(error)[:200] or type(error).__name__}"


def _names(pattern: str, text: str) -> list[str]:
    """Return the quoted names in what `pattern` finds."""
    match = re.search(pattern, text + " ", re.DOTALL)
    return re.findall(r'"([^"]+)"', match[1]) if match else []
