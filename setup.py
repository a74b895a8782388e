"""Knows what pyproject.toml cannot say: kernels for the processor are compiled, if they can be.

Without a compiler the installation still succeeds; `moecli doctor` then says how to get them.
"""

import runpy
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

_BUILD = Path(__file__).parent / "quant" / "kernels" / "cpu" / "build.py"


class BuildKernels(build_ext):
    """Compiles the library, which is not a module of Python, with its own script."""

    def get_ext_filename(self, fullname: str) -> str:
        script = runpy.run_path(str(_BUILD))
        return str(Path(*fullname.split(".")[:-1]) / script["LIBRARY_NAME"])

    def build_extension(self, ext: Extension) -> None:
        from setuptools.errors import CompileError

        script: dict[str, Any] = runpy.run_path(str(_BUILD))
        try:
            script["build"](Path(self.get_ext_fullpath(ext.name)))
        except script["BuildError"] as error:
            raise CompileError(str(error)) from error


setup(
    ext_modules=[Extension("quant.kernels.cpu.kernels", sources=[], optional=True)],
    cmdclass={"build_ext": BuildKernels},
)
