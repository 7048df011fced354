import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).resolve().parent / "csrc"))  # isolated builds do not put it there

from native_build import BuildNative, extensions

setup(ext_modules=extensions(), cmdclass={"build_ext": BuildNative})
