"""Builds the native module with CMake. Imports no torch: any torch works with the result, under build isolation too.

Every build starts in an empty temporary folder. What an earlier one left behind (a CMake cache that names programs
which pip has deleted since, an old module, half-written files) can neither break it nor end up in the wheel.
"""

import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import OptionError

ROOT = Path(__file__).parent.resolve()
NAME = "pacl_kernels._native"


def named_program(variable: str) -> str | None:
    """The program that an environment variable names, perhaps with arguments; an error if there is no such program."""
    value = os.environ.get(variable, "").strip()
    if not value:
        return None
    found = shutil.which(value) or shutil.which(value.split()[0])
    if found is None:
        raise OptionError(f"{variable} is {value!r}, expected the name or path of a compiler: there is no such program")
    return found


def compiler() -> str | None:
    """The C++ compiler that CMake will take: CXX if that is set, otherwise the first that is found."""
    return named_program("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


class CMakeBuild(build_ext):
    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        cuda = os.environ.get("PACL_CUDA", "AUTO")
        if compiler() is None:
            message = "no C++ compiler (GCC or Clang) found"
            if cuda == "ON":
                raise OptionError(f"PACL_CUDA is 'ON', but {message}")
            print(f"pacl-kernels: {message}, installing without the 'cpu' backend", file=sys.stderr)
            return
        if cuda != "OFF":
            named_program("CUDACXX")
        import pybind11

        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        native = runpy.run_path(str(ROOT / "pacl_kernels" / "native.py"))
        options = [
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            "-DPYBIND11_FINDPYTHON=ON",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DPACL_CUDA={cuda}",
            f"-DPACL_SANITIZE={os.environ.get('PACL_SANITIZE', 'OFF')}",
            f"-DPACL_STAMP={native['stamp'](self.distribution.get_version(), native['fingerprint'](ROOT))}",
        ]
        subprocess.run(["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *options], check=True)
        subprocess.run(["cmake", "--build", build], check=True)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]  # without a compiler there is none

    def copy_extensions_to_source(self) -> None:
        built = Path(self.get_finalized_command("build").build_platlib, self.get_ext_filename(NAME))
        (ROOT / "pacl_kernels" / built.name).unlink(missing_ok=True)  # an earlier build's
        if built.exists():
            super().copy_extensions_to_source()


with tempfile.TemporaryDirectory(prefix="pacl-kernels-") as folder:
    setup(
        ext_modules=[Extension(NAME, sources=[])],
        cmdclass={"build_ext": CMakeBuild},
        options={"build": {"build_base": folder}},
    )
