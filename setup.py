"""Extension modules only; everything else is in pyproject.toml."""

import platform
from pathlib import Path

import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# Never -ffast-math: gcc then drops NaN tests, and a NaN score would pass as clean.
FLAGS = ["-O3", "-std=c11", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra"]
# One file per instruction set, each with its own flags; the processor chooses at run time.
X86 = {"score_avx2.c": ["-mavx2", "-mfma"], "score_avx512.c": ["-mavx512f", "-mfma"]}
ARM = {"score_neon.c": []}


class BuildExtensions(build_ext):
    """build_ext with further flags for some files, and the files that fit the processor being built for."""

    def build_extensions(self):
        """Add the files of the processor, and give each its flags."""
        machine = (self.plat_name or platform.machine()).lower().replace("-", "_")
        files = X86 if machine.endswith(("x86_64", "amd64")) else ARM if machine.endswith(("aarch64", "arm64")) else {}
        for extension in self.extensions:
            if extension.name.endswith("._cpu"):
                extension.sources += [f"csrc/{name}" for name in files]
                extension.define_macros += [("IFE_X86", "1")] if files is X86 else []
        compile_one = self.compiler._compile

        def compile_with_flags(obj, source, extension, cc_args, extra, pp_opts):
            compile_one(obj, source, extension, cc_args, [*extra, *files.get(Path(source).name, [])], pp_opts)

        self.compiler._compile = compile_with_flags
        super().build_extensions()


scorer = Extension(
    "inflight_edge.scoring._cpu",
    sources=["inflight_edge/scoring/_cpu.pyx", "csrc/score.c", "csrc/score_portable.c"],
    # The .pyx too: setuptools puts what is listed here into the sdist, and by itself only the generated .c.
    depends=["inflight_edge/scoring/_cpu.pyx", *sorted(str(path) for path in Path("csrc").glob("*.[ch]"))],
    include_dirs=["csrc", numpy.get_include()],
    define_macros=[("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION")],
    extra_compile_args=FLAGS,
)

preprocess = Extension(
    "inflight_edge._preprocess",
    sources=["inflight_edge/_preprocess.pyx", "csrc/preprocess.c"],
    depends=["inflight_edge/_preprocess.pyx", "csrc/inflight.h"],
    include_dirs=["csrc", numpy.get_include()],
    define_macros=[("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION")],
    extra_compile_args=FLAGS,
)

setup(ext_modules=cythonize([scorer, preprocess], language_level=3), cmdclass={"build_ext": BuildExtensions})
