"""Modules of the two packages import each other in one direction, and `pacl_kernels` imports nothing of `pacl`.

Imports inside functions and under `TYPE_CHECKING` count, because they tie the modules together just as well.
"""

import ast
import sys
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"pacl_kernels": ROOT, "pacl": ROOT / "python"}
Graph = dict[str, dict[str, str]]  # graph[a][b]: file:line of an import by which a needs b


def import_graph(packages: dict[str, Path]) -> Graph:
    """Return the imports among the modules of some packages, given the folder that holds each package."""
    files: dict[str, Path] = {}
    for package, folder in packages.items():
        for path in sorted((folder / package).rglob("*.py")):
            *parents, name = path.relative_to(folder).with_suffix("").parts
            files[".".join(parents if name == "__init__" else [*parents, name])] = path
    graph: Graph = {}
    for module, path in files.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        graph[module] = {}
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), path)):
            for target in _needed(node, package, files):
                if target in files and target != module:
                    graph[module].setdefault(target, f"{path}:{node.lineno}")
    return graph


def _needed(node: ast.AST, package: str, files: dict[str, Path]) -> Iterator[str]:
    """Yield the modules that a piece of code in `package` imports, also those that are not in `files`."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = resolve_name("." * node.level + (node.module or ""), package)
        for alias in node.names:
            # If the name is a submodule, that is needed; otherwise the module or the package's __init__ is.
            submodule = f"{base}.{alias.name}"
            yield submodule if submodule in files else base
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "." in node.value:
        yield node.value  # for importlib.import_module


def by_folder(graph: Graph) -> Graph:
    """Merge the modules of each subpackage into one node; modules outside subpackages stay as they are."""
    merged: Graph = {}
    for module, targets in graph.items():
        name = _folder(module)
        merged.setdefault(name, {})
        for target, place in targets.items():
            if _folder(target) != name:
                merged[name].setdefault(_folder(target), place)
    return merged


def _folder(module: str) -> str:
    return ".".join(module.split(".")[:2])


def cycles(graph: Graph) -> list[str]:
    """Return one shortest cycle per group of mutually dependent modules: `a → b → a`, then the place of each import."""
    reached = {module: _reached(graph, module) for module in graph}
    found, seen = [], set()
    for module in graph:
        if module in reached[module] and module not in seen:
            seen |= {other for other in reached[module] if module in reached[other]}
            found.append(_describe(graph, _shortest_cycle(graph, module)))
    return found


def _reached(graph: Graph, start: str) -> set[str]:
    found, waiting = set(), [start]
    while waiting:
        new = graph[waiting.pop()].keys() - found
        found |= new
        waiting += new
    return found


def _shortest_cycle(graph: Graph, start: str) -> list[str]:
    ways, seen = [[start]], set()
    for way in ways:  # the list grows during the loop, shorter ways first
        for module in graph[way[-1]]:
            if module == start:
                return [*way, start]
            if module not in seen:
                seen.add(module)
                ways.append([*way, module])
    raise AssertionError(f"no cycle through {start}")


def _describe(graph: Graph, way: list[str]) -> str:
    imports = zip(way, way[1:], strict=False)
    return "\n".join([" → ".join(way), *(f"    {graph[a][b]} imports {b}" for a, b in imports)])


@pytest.fixture(scope="module")
def graph() -> Graph:
    return import_graph(PACKAGES)


@pytest.mark.parametrize("level", [lambda graph: graph, by_folder], ids=["modules", "folders"])
def test_no_import_cycles(level, graph):
    found = cycles(level(graph))
    assert not found, "\n" + "\n".join(found)


def test_kernels_import_nothing_of_pacl(graph):
    kernels = {module for module in graph if module.split(".")[0] == "pacl_kernels"}
    found = [_describe(graph, [a, b]) for a in kernels for b in graph[a] if b not in kernels]
    assert not found, "\n" + "\n".join(found)


def test_importing_the_kernels_takes_torch_alone():
    """All modules import only torch and the standard library, except the Triton kernels, imported on first use."""
    allowed = {*sys.stdlib_module_names, "torch", "pacl_kernels"}
    for path in sorted((ROOT / "pacl_kernels").rglob("*.py")):
        if path.parent.name == "kernels":
            continue
        for node in ast.parse(path.read_text(encoding="utf-8"), path).body:
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            else:
                continue
            assert {name.split(".")[0] for name in names} <= allowed, f"{path}:{node.lineno}"


@pytest.mark.parametrize(
    ("changes", "cycle"),
    [
        ({}, None),
        ({"one.py": "def f():\n    from . import two\n"}, "p.one → p.two → p.one"),
        ({"one.py": "if TYPE_CHECKING:\n    from .two import x\n"}, "p.one → p.two → p.one"),
        ({"one.py": "import p.two as two\n"}, "p.one → p.two → p.one"),
        ({"one.py": "importlib.import_module('p.two')\n"}, "p.one → p.two → p.one"),
        ({"one.py": "from . import x\n"}, "p → p.one → p"),
        (
            {"sub/three.py": "from ..two import x\n", "one.py": "from .sub import three\n"},
            "p.one → p.sub.three → p.two",
        ),
        ({"sub/__init__.py": "from ..two import x\n", "one.py": "from .sub import x\n"}, "p.one → p.sub → p.two"),
    ],
    ids="none function type_checking absolute by_name init nested nested_init".split(),
)
def test_what_counts_as_an_import(changes, cycle, tmp_path):
    """A package whose `__init__` imports modules that import a sibling has no cycle until `changes` are applied."""
    files = {"__init__.py": "from . import one\nx = 1\n", "one.py": "", "two.py": "from . import one\nx = 1\n"}
    files |= {"sub/__init__.py": "", "sub/three.py": ""} | changes
    for name, text in files.items():
        path = tmp_path / "p" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    found = cycles(import_graph({"p": tmp_path}))
    assert len(found) == (cycle is not None)
    assert all(text.startswith(cycle) and str(tmp_path / "p") in text for text in found)


def test_no_folder_of_tests_stands_for_a_package():
    """In an editable installation, a folder of the tests would be found before the package that has its name."""
    packages = {path.parent.name for path in (ROOT / "python" / "pacl").glob("*/__init__.py")} | set(PACKAGES)
    folders = {path.name for path in (ROOT / "tests").rglob("*") if path.is_dir()}
    assert len(packages) > 2 and not packages & folders
