"""Find and load the native module `pacl_kernels._native`, or say why there is none.

An installation has it next to this file, and so does a clone after `pip install -e .`. A plain `pip install .` leaves
no module in the clone, but Python started in the clone imports this package from there. The installed module is then
loaded if it was built from the same sources as the clone. Any other module would run other code than the clone
holds, so it is an error. A copy of the package under another name has the module next to this file, or none.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.machinery
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

_NAME = "pacl_kernels._native"
_PACKAGE = Path(__file__).resolve().parent


def native() -> ModuleType | None:
    """Return the native module, or None where there is none.

    Raises ImportError if all that are found belong to another version of this package or to other sources.
    """
    return _load()[0]


def why_not() -> str | None:
    """Return None if there is a native module, otherwise the reason why not."""
    return _load()[1]


def fingerprint(root: Path) -> str | None:
    """Return the SHA-256 of the sources of the native module, or None if `root` does not hold them."""
    if not (root / "csrc" / "binding.cpp").is_file() or not (root / "CMakeLists.txt").is_file():
        return None
    digest = hashlib.sha256()
    sources = [path for path in (root / "csrc").rglob("*") if path.suffix in (".cpp", ".h", ".cu", ".cuh", ".def")]
    for path in (root / "CMakeLists.txt", *sorted(sources)):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def stamp(version: str, sources: str) -> str:
    """Return the text that the build writes into the module, to identify it before it is loaded."""
    return f"pacl_kernels version {version} from {sources}"


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    refusals: list[str] = []
    errors: list[str] = []
    for folder in _folders():
        spec = importlib.machinery.PathFinder.find_spec("_native", [str(folder)])
        if spec is None or spec.origin is None:
            continue
        refusal = _refusal(Path(spec.origin))
        if refusal is not None:
            refusals.append(refusal)
            continue
        try:
            return _import(spec.origin), None
        except ImportError as error:
            errors.append(str(error))
    if errors:
        return None, errors[0]
    if refusals:
        raise ImportError(refusals[0])
    return None, f"there is no _native{importlib.machinery.EXTENSION_SUFFIXES[0]} in {_PACKAGE}"


def _folders() -> Iterator[Path]:
    """Yield the folders that may hold the module: this one and, for a clone, those of the installations."""
    yield _PACKAGE
    if __package__ != _NAME.partition(".")[0]:  # a copy under another name, which shares nothing with an installation
        return
    if any(_PACKAGE.parent.glob("pacl_kernels-*.dist-info")):
        return
    folders = []
    lent = importlib.util.find_spec(_NAME)  # finds an editable installation of another clone
    if lent is not None and lent.origin is not None:
        folders.append(Path(lent.origin).parent)
    from importlib.metadata import distributions  # slow to import and rarely needed

    folders += [Path(str(found.locate_file("pacl_kernels"))) for found in distributions(name="pacl-kernels")]
    yield from (folder for folder in map(Path.resolve, folders) if folder != _PACKAGE)


def _refusal(path: Path) -> str | None:
    """Return None if the module at `path` belongs to this package, otherwise a sentence that says why not."""
    from .version import __version__  # not at the top: setup.py runs this file without its package

    beside, sources = path.parent == _PACKAGE, fingerprint(_PACKAGE.parent)
    if beside and sources is None:
        return None  # an installation: one build wrote both
    found = re.search(stamp(r"(\S+)", "([0-9a-f]{64})").encode(), path.read_bytes())
    version, built_from = (group.decode() for group in found.groups()) if found else ("unknown", None)
    second = f"there is a second pacl_kernels at {path.parent}"
    if not beside and version != __version__:
        return (
            f"{second}, version {version}, while {_PACKAGE} has version {__version__} and no native module; run "
            f"`pip install {_PACKAGE.parent}`, or start Python in another folder"
        )
    if sources is not None and sources != built_from:
        built = f"{path} was built" if beside else f"{second}, built"
        return f"{built} from other sources than {_PACKAGE.parent} holds now; install that folder again"
    return None


def _import(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(_NAME, path)
    assert spec is not None and spec.loader is not None  # the file exists
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[_NAME] = module
    return module
