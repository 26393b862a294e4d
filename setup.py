"""Builds the native module with CMake. Imports no torch: any torch works with the result, under build isolation too."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def compiler() -> str | None:
    """The C++ compiler that CMake will take: CXX if that is set, otherwise the first that is found."""
    named = os.environ.get("CXX", "").split()
    names = named[:1] or ["c++", "g++", "clang++"]
    return next((found for name in names if (found := shutil.which(name))), None)


class CMakeBuild(build_ext):
    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        if compiler() is None:
            target.unlink(missing_ok=True)  # an earlier build's, which the wheel would pick up
            print(
                "pacl-kernels: no C++ compiler (GCC or Clang) found, installing without the 'cpu' backend",
                file=sys.stderr,
            )
            return
        import pybind11

        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        options = [
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            "-DPYBIND11_FINDPYTHON=ON",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DPACL_CUDA={os.environ.get('PACL_CUDA', 'AUTO')}",
            f"-DPACL_SANITIZE={os.environ.get('PACL_SANITIZE', 'OFF')}",
        ]
        subprocess.run(["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *options], check=True)
        subprocess.run(["cmake", "--build", build], check=True)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]  # without a compiler there is none

    def copy_extensions_to_source(self) -> None:
        if compiler() is not None:
            super().copy_extensions_to_source()


setup(ext_modules=[Extension("pacl_kernels._native", sources=[])], cmdclass={"build_ext": CMakeBuild})
