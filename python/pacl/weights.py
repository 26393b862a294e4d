"""Read weights from safetensors files that may be damaged, and check their SHA-256, names, shapes, types and values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from safetensors import SafetensorError
from torch import Tensor, nn

from .files import file_digest, impostor
from .remote import Location
from .settings import Damaged
from .tensors import open_tensors


def check_digest(path: Location, digests: Mapping[str, str]) -> None:
    """Raise Damaged if `digests` has the file's name with another SHA-256 than the file's; other files pass."""
    expected = digests.get(path.name)
    if expected is not None and file_digest(path) != expected:
        raise Damaged(path, "it does not have the SHA-256 in the JSON file beside it; copy or write the folder again")


def load_weights(module: nn.Module, path: Location, digests: Mapping[str, str]) -> None:
    """Load the weights of `module` from a safetensors file.

    digests: SHA-256 by file name; a file without one, such as of an earlier version, loads without this check. Raises
    Damaged, naming file and tensor, unless the file has the names and shapes of the module's weights, floating-point
    numbers where they are such, and finite values; OSError if it cannot be read.
    """
    if kind := impostor(path):
        raise Damaged(path, f"it is {kind}")
    check_digest(path, digests)
    expected = module.state_dict()
    try:
        with open_tensors(path) as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
    except SafetensorError as error:
        raise Damaged(path, "it is not a whole safetensors file") from error
    both = sorted(expected.keys() & found.keys())
    shapes = [(name, list(found[name].shape), list(expected[name].shape)) for name in both]
    wrong = [f"{name} has the shape {have}, expected {wanted}" for name, have, wanted in shapes if have != wanted]
    clauses = misfit(sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys()), wrong)
    if clauses:
        raise Damaged(path, f"{'; '.join(clauses)}; the settings beside it are of another model")
    for name in both:
        _check_tensor(path, name, found[name], expected[name])
    module.load_state_dict(found)


def misfit(missing: Sequence[str], unexpected: Sequence[str], shapes: Sequence[str]) -> list[str]:
    """Return clauses on weights that do not fit a model, with the first names and the numbers; none if all fit.

    missing, unexpected: names of tensors. shapes: a clause on each that has another shape than the model's.
    """
    kinds = (("it lacks {}", missing), ("it has {}, which the model does not have", unexpected), ("{}", shapes))
    return [clause.format(few(names)) for clause, names in kinds if names]


def few(names: Sequence[str]) -> str:
    """Return the first names and, if there are more, the number of all."""
    more = f", ... ({len(names):,} in all)" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _check_tensor(path: Location, name: str, found: Tensor, expected: Tensor) -> None:
    if found.dtype != expected.dtype and not (found.is_floating_point() and expected.is_floating_point()):
        raise Damaged(path, f"{name} has the type {found.dtype}, expected {expected.dtype}")
    if found.is_floating_point() and not found.isfinite().all():
        raise Damaged(path, f"{name} has values that are not finite")
