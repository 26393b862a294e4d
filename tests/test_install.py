"""Run pip, setuptools and CMake for real on a copy of this clone; its C++ is a stub, so that a build takes seconds.

Each copy is installed into a separate environment that sees the packages of this one (torch is large).
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

from pacl_kernels.native import fingerprint

ROOT = Path(__file__).resolve().parent.parent
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler to build with")
# The source of a native module that says what it was built from.
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


@pytest.fixture(scope="module")
def venv(tmp_path_factory) -> Path:
    """Make an environment with the build requirements, so that pip need not fetch them for every build."""
    folder = tmp_path_factory.mktemp("install") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    requires = re.search(r"^requires = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", *re.findall(r'"([^"]+)"', requires)], check=True)
    here = {*site.getsitepackages(), site.getusersitepackages()}
    (_packages(folder) / "shared.pth").write_text("\n".join(path for path in sys.path if path in here))
    return folder


def _packages(venv: Path) -> Path:
    return next(venv.glob("lib/python*/site-packages"))


class Clone:
    """Copy this clone without its kernels, to install it into `venv`.

    The package has only the version, so that its import does not take the seconds that torch needs; `whole` restores
    the rest.
    """

    def __init__(self, path: Path, venv: Path):
        self.path, self.venv, self.installed = path, venv, _packages(venv) / "pacl_kernels"
        path.mkdir()
        for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, path)
        for name in ("pacl_kernels", "python", "csrc"):
            shutil.copytree(ROOT / name, path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        for source in [*path.glob("csrc/**/*.cpp"), *path.glob("csrc/**/*.cu")]:
            source.write_text("")
        self.init = path / "pacl_kernels" / "__init__.py"
        self.init.write_text("from .version import __version__\n")
        self.binding = path / "csrc" / "binding.cpp"
        self.binding.write_text(STUB)

    def whole(self) -> None:
        shutil.copy(ROOT / "pacl_kernels" / "__init__.py", self.init)

    @property
    def in_tree(self) -> list[Path]:
        return list((self.path / "pacl_kernels").glob("_native*"))

    def pip(self, *options: str, isolated: bool = False, **environment: str) -> subprocess.CompletedProcess:
        """Run a verbose `pip install`, with build isolation or with the build tools of the environment."""
        how = [] if isolated else ["--no-build-isolation"]
        command = [self.venv / "bin" / "python", "-m", "pip", "install", "-v", "--no-deps", *how, *options]
        path = os.environ["PATH"] if isolated else os.pathsep.join([str(self.venv / "bin"), os.environ["PATH"]])
        return self._run(command, {"PATH": path, "PACL_CUDA": "OFF"} | environment)

    def install(self, *options: str, **more) -> str:
        done = self.pip(*options, **more)
        assert done.returncode == 0, done.stdout[-3000:]
        return done.stdout

    def python(self, *options: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
        return self._run([self.venv / "bin" / "python", *options], {}, cwd or self.venv)

    def which(self, cwd: Path | None = None) -> list[str]:
        """Return the paths of the package and of the native module that a program in `cwd` finds, and its message."""
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


@pytest.fixture
def clone(tmp_path, venv) -> Clone:
    return Clone(tmp_path / "clone", venv)


def test_installations_one_after_another(clone):
    """Each installation takes the clone's current files, whatever an earlier installation has left behind."""
    leftover = clone.path / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "pacl_kernels"
    leftover.mkdir(parents=True)  # an older version of this project or an interrupted build may leave it
    (leftover / "removed.py").write_text("")
    (leftover / f"_native{SUFFIX}").write_text("half of a module")
    turns = ((".", "OFF", True), (".", "ON", True), ("-e .", "OFF", False), (".", "OFF", False))
    for turn, (options, sanitize, isolated) in enumerate(turns):
        clone.binding.write_text(STUB.replace("first sources", f"sources {turn}"))
        clone.install(*options.split(), isolated=isolated, PACL_SANITIZE=sanitize)
        home = clone.path / "pacl_kernels" if "-e" in options else clone.installed
        if sanitize == "ON":  # the module loads only together with the sanitizers' libraries
            assert b"asan" in (home / f"_native{SUFFIX}").read_bytes()
            continue
        expected = [str(home / "__init__.py"), str(home / f"_native{SUFFIX}"), f"sources {turn}"]
        assert clone.which() == expected
        assert clone.which(cwd=clone.path) == [str(clone.init), *expected[1:]]  # the clone's package with this module
        assert not (home / "removed.py").exists()
    assert clone.in_tree, "the last installation found an older module in the clone, and passed it over"


def test_python_in_the_clone_says_whose_module_it_will_not_run(clone):
    clone.whole()
    clone.install(".")
    done = clone.python("-m", "pacl_kernels", cwd=clone.path)
    assert done.returncode == 0 and re.search(r"cpu +available", done.stdout), done.stdout

    version = clone.path / "pacl_kernels" / "version.py"
    text = version.read_text()
    version.write_text(re.sub(r'(__version__ = )"[^"]+"', r'\1"9.9"', text))
    done = clone.python("-m", "pacl_kernels", cwd=clone.path)
    assert done.returncode == 1
    last = done.stdout.splitlines()[-1]
    assert last.startswith(f"ImportError: there is a second pacl_kernels at {clone.installed}, version 0.")
    assert f"while {clone.path / 'pacl_kernels'} has version 9.9" in last and "compiler" not in last

    version.write_text(text)
    clone.binding.write_text(STUB.replace("first", "second"))
    done = clone.python("-m", "pacl_kernels", cwd=clone.path)
    assert done.returncode == 1
    assert f"ImportError: there is a second pacl_kernels at {clone.installed}, built from other sources" in done.stdout
    assert clone.which()[2] == "first sources"  # outside the clone only the installed package is found, and it runs


@pytest.mark.long
def test_the_compiler_is_looked_up_each_time(clone):
    """Each build looks up its compiler: the usual one, another, one that does not exist, or none at all."""
    wrapper = clone.venv / "bin" / "another-compiler"
    wrapper.write_text(f'#!/bin/sh\nexec {COMPILER} -DBY=\\"another\\" "$@"\n')
    wrapper.chmod(0o755)
    built_by = ("-c", "from pacl_kernels.native import native; print(getattr(native(), 'built_by', 'the usual'))")
    for variables, name in (({}, "the usual"), ({"CXX": str(wrapper)}, "another")):
        clone.install(".", **variables)
        assert clone.python(*built_by).stdout.strip() == name

    for variable in ("CXX", "CUDACXX"):
        done = clone.pip(".", **{variable: "no-such-compiler", "PACL_CUDA": "AUTO"})
        assert done.returncode != 0
        assert f"error: {variable} is 'no-such-compiler', expected the name or path of a compiler" in done.stdout
    assert clone.which()[2] == "first sources", "a build that failed left the installation as it was"

    with tempfile.TemporaryDirectory() as empty, tempfile.TemporaryDirectory() as bare:
        printed = clone.install("--target", bare, ".", PATH=empty)
        without = "no C++ compiler (GCC or Clang) found, installing without the 'cpu' backend"
        assert without in printed
        package, module, reason = clone.which(cwd=Path(bare))
        assert Path(package).parent.parent == Path(bare) and module == "None", "an installation borrows from no other"

        done = clone.pip(".", PATH=empty, PACL_CUDA="ON")
        assert done.returncode != 0 and "PACL_CUDA is 'ON', but no C++ compiler" in done.stdout
        clone.install("-e", ".")
        for options in ((".",), ("-e", ".")):
            printed = clone.install(*options, PATH=empty)
            assert without in printed
            package, module, reason = clone.which()
            assert module == "None" and reason.startswith(f"there is no _native{SUFFIX} in {Path(package).parent}")
    assert not clone.in_tree, "the module of the editable installation before"


def test_the_source_distribution_has_what_an_installation_needs(clone, tmp_path):
    """It has every source that the native module is identified by, and installs every file of both packages."""
    done = clone.python("setup.py", "-q", "sdist", cwd=clone.path)
    assert done.returncode == 0, done.stdout
    (archive,) = clone.path.glob("dist/*.tar.gz")
    shutil.unpack_archive(archive, tmp_path)
    assert fingerprint(tmp_path / archive.name.removesuffix(".tar.gz")) == fingerprint(clone.path)
    clone.install(str(archive))
    assert clone.which()[2] == "first sources"
    for package in (clone.path / "pacl_kernels", clone.path / "python" / "pacl"):
        files = {path.relative_to(package) for path in package.rglob("*") if path.is_file()}
        missing = {path for path in files if not (_packages(clone.venv) / package.name / path).exists()}
        assert len(files) > 20 and not missing


@pytest.mark.long
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc, so none can appear")
def test_nvcc_is_looked_up_each_time(clone, tmp_path):
    broken = tmp_path / "nvcc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    printed = clone.install(".", CUDACXX=str(broken), PACL_CUDA="AUTO")
    assert "without the 'cuda' backend: no nvcc that works" in printed
    clone.binding.write_text("#error here: nvcc would need a minute for what follows\n")
    printed = clone.pip(".", PACL_CUDA="ON").stdout
    assert "with the 'cuda' backend" in printed and "no nvcc that works" not in printed
