import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).resolve().parent / "csrc"))  # an isolated build does not add this folder

from native_build import BuildNative, BuildPython, extensions

setup(ext_modules=extensions(), cmdclass={"build_ext": BuildNative, "build_py": BuildPython})
