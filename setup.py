"""Extension modules only; everything else is in pyproject.toml."""

import platform

import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup

# Never -ffast-math: gcc then drops NaN tests, and a NaN score would pass as clean.
FLAGS = ["-O3", "-std=c11", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra"]

scorer = Extension(
    "inflight_edge.scoring._cpu",
    sources=["inflight_edge/scoring/_cpu.pyx", "csrc/score_cpu.c"],
    # The .pyx too: setuptools puts what is listed here into the sdist, and by itself only the generated .c.
    depends=["inflight_edge/scoring/_cpu.pyx", "csrc/inflight.h", "csrc/score_math.h"],
    include_dirs=["csrc", numpy.get_include()],
    define_macros=[("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION")],
    extra_compile_args=[] if platform.system() == "Windows" else FLAGS,
)

setup(ext_modules=cythonize([scorer], language_level=3))
