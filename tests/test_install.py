"""pip, setuptools and CMake, run for real on a copy of this clone that takes seconds to build: its C++ is a stub.

Installations go into an environment of their own, which sees the packages of this one (torch is large).
"""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler to build with")
# A native module that says what it was built from.
STUB = """
#include <Python.h>
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", nullptr, -1, nullptr};
PyMODINIT_FUNC PyInit__native() {
  PyObject* module = PyModule_Create(&definition);
  PyModule_AddStringConstant(module, "built_from", "first sources");
#ifdef BY
  PyModule_AddStringConstant(module, "built_by", BY);
#endif
  return module;
}
"""
WHICH = """
import pacl_kernels
from pacl_kernels.native import native, why_not
print(pacl_kernels.__file__, native() and native().__file__, getattr(native(), "built_from", why_not()), sep="|")
"""


class Clone:
    """A copy of this clone without its kernels, and an environment to install it into."""

    def __init__(self, folder: Path):
        self.path, self.venv = folder / "clone", folder / "venv"
        self.path.mkdir()
        for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, self.path)
        ignore = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
        for name in ("pacl_kernels", "python", "csrc", "benchmarks"):
            shutil.copytree(ROOT / name, self.path / name, ignore=ignore)
        for source in [*self.path.glob("csrc/**/*.cpp"), *self.path.glob("csrc/**/*.cu")]:
            source.write_text("")
        self.binding = self.path / "csrc" / "binding.cpp"
        self.binding.write_text(STUB)
        subprocess.run([sys.executable, "-m", "venv", self.venv], check=True)
        packages = next(self.venv.glob("lib/python*/site-packages"))
        self.installed = packages / "pacl_kernels"
        (packages / "shared.pth").write_text("\n".join(map(str, _site_packages())))

    @property
    def in_tree(self) -> list[Path]:
        return list((self.path / "pacl_kernels").glob("_native*"))

    def pip(self, *options: str, **environment: str) -> subprocess.CompletedProcess:
        command = [self.venv / "bin" / "python", "-m", "pip", "install", "-v", "--no-deps", *options]
        return self._run(command, {"PACL_CUDA": "OFF"} | environment)

    def install(self, *options: str, **environment: str) -> str:
        done = self.pip(*options, **environment)
        assert done.returncode == 0, done.stdout[-3000:]
        return done.stdout

    def python(self, *options: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
        return self._run([self.venv / "bin" / "python", *options], {}, cwd or self.venv)

    def which(self, cwd: Path | None = None) -> list[str]:
        """Where a program started in `cwd` takes the package and the native module from, and what that says."""
        done = self.python("-c", WHICH, cwd=cwd)
        assert done.returncode == 0, done.stdout
        return done.stdout.strip().splitlines()[-1].split("|")

    def _run(self, command, more: dict, cwd: Path | None = None):
        environment = {name: os.environ[name] for name in os.environ if not name.startswith(("PACL_", "PYTHON", "CXX"))}
        return subprocess.run(
            list(map(str, command)),
            cwd=cwd or self.path,
            env=environment | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )


def _site_packages() -> list[str]:
    return [
        path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")
    ] or site.getsitepackages()


@pytest.fixture
def clone(tmp_path) -> Clone:
    return Clone(tmp_path)


def test_installations_one_after_another(clone):
    """Each takes what the clone holds at that time, whatever the one before was and left behind."""
    leftover = clone.path / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "pacl_kernels"
    leftover.mkdir(parents=True)  # of an older version of this project, or of one that was interrupted
    (leftover / "removed.py").write_text("")
    (leftover / f"_native{SUFFIX}").write_text("half of a module")
    for turn, (options, sanitize) in enumerate(((".", "OFF"), (".", "ON"), ("-e .", "OFF"), (".", "OFF"))):
        clone.binding.write_text(STUB.replace("first sources", f"sources {turn}"))
        clone.install(*options.split(), PACL_SANITIZE=sanitize)
        home = clone.path / "pacl_kernels" if "-e" in options else clone.installed
        if sanitize == "ON":  # it can only be loaded beside the sanitizers' own libraries
            assert b"__ubsan" in (home / f"_native{SUFFIX}").read_bytes()
            continue
        expected = [str(home / "__init__.py"), str(home / f"_native{SUFFIX}"), f"sources {turn}"]
        assert clone.which() == expected
        assert clone.which(cwd=clone.path)[1:] == expected[1:]  # the tree's package, with the same module
        assert not (home / "removed.py").exists()
    assert clone.in_tree, "the last installation found an older module in the clone, and passed it over"


def test_python_in_the_clone_says_whose_module_it_will_not_run(clone):
    clone.install(".")
    done = clone.python("-m", "pacl_kernels", cwd=clone.path)
    assert done.returncode == 0 and re.search(r"cpu +available", done.stdout), done.stdout
    tree, module, _ = clone.which(cwd=clone.path)
    assert tree == str(clone.path / "pacl_kernels" / "__init__.py") and Path(module).parent == clone.installed

    package = clone.path / "pacl_kernels" / "__init__.py"
    text = package.read_text()
    package.write_text(re.sub(r'(__version__ = )"[^"]+"', r'\1"9.9"', text))
    done = clone.python("-m", "pacl_kernels", cwd=clone.path)
    assert done.returncode == 1
    assert f"ImportError: there is a second pacl_kernels at {clone.installed}, version 0." in done.stdout
    assert f"while {clone.path / 'pacl_kernels'} has version 9.9" in done.stdout and "compiler" not in done.stdout

    package.write_text(text)
    clone.binding.write_text(STUB.replace("first", "second"))
    done = clone.python("-m", "pacl_kernels", cwd=clone.path)
    assert done.returncode == 1
    assert f"ImportError: there is a second pacl_kernels at {clone.installed}, built from other sources" in done.stdout
    assert clone.which()[2] == "first sources"  # elsewhere the installed one is alone, and runs


def test_the_compiler_is_looked_up_each_time(clone):
    """Another one, one that is not there, and none at all."""
    wrapper = clone.venv / "bin" / "another-compiler"
    wrapper.write_text(f'#!/bin/sh\nexec {COMPILER} -DBY=\\"another\\" "$@"\n')
    wrapper.chmod(0o755)
    built_by = ("-c", "from pacl_kernels.native import native; print(getattr(native(), 'built_by', 'the usual'))")
    for variables, name in (({}, "the usual"), ({"CXX": str(wrapper)}, "another"), ({}, "the usual")):
        clone.install(".", **variables)
        assert clone.python(*built_by).stdout.strip() == name

    for variable in ("CXX", "CUDACXX"):
        done = clone.pip(".", **{variable: "no-such-compiler", "PACL_CUDA": "AUTO"})
        assert done.returncode != 0
        assert f"error: {variable} is 'no-such-compiler', expected the name or path of a compiler" in done.stdout
    assert clone.which()[2] == "first sources", "a build that failed left the installation as it was"

    with tempfile.TemporaryDirectory() as empty:
        done = clone.pip(".", PATH=empty, PACL_CUDA="ON")
        assert done.returncode != 0 and "PACL_CUDA is 'ON', but no C++ compiler" in done.stdout
        clone.install("-e", ".")
        for options in ((".",), ("-e", ".")):
            printed = clone.install(*options, PATH=empty)
            assert "no C++ compiler (GCC or Clang) found, installing without the 'cpu' backend" in printed
            package, module, reason = clone.which()
            assert module == "None" and reason.startswith(f"there is no _native{SUFFIX} in {Path(package).parent}")
    assert not clone.in_tree, "the module of the editable installation before"
