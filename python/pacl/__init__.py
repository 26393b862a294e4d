"""Patch Aligned Contrastive Learning on top of open_clip: patch tokens, vision embedder, data, and the `pacl` command.

The loss itself is in `pacl_kernels`. The names in `__all__` are loaded when they are first used, because torch and
open_clip take seconds to import and `pacl doctor` must run without them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backbones import packed_tokens, patch_tokens
    from .embedder import VisionEmbedder
    from .segment.draw import overlay, word_colours
    from .segment.predict import Segmenter
    from .sharing import load_pacl
    from .towers import load_towers

__all__ = [
    "Segmenter",
    "VisionEmbedder",
    "load_pacl",
    "load_towers",
    "overlay",
    "packed_tokens",
    "patch_tokens",
    "word_colours",
]
_MODULES = {
    "Segmenter": "segment.predict",
    "VisionEmbedder": "embedder",
    "load_pacl": "sharing",
    "load_towers": "towers",
    "overlay": "segment.draw",
    "packed_tokens": "backbones",
    "patch_tokens": "backbones",
    "word_colours": "segment.draw",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"pacl.{name} needs {error.name}: pip install 'pacl-kernels[train]'", name=error.name
        ) from error
    globals()[name] = value  # so that the next use does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
