"""Extension modules only; everything else is in pyproject.toml."""

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

# Never -ffast-math: gcc then drops NaN tests, and a NaN score would pass as clean.
FLAGS = ["-O3", "-std=c11", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra"]
# What GCC 14 refuses, every GCC does.
FLAGS += [
    f"-Werror={name}" for name in ("incompatible-pointer-types", "int-conversion", "implicit-function-declaration")
]
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
    sources=[
        "inflight_edge/scoring/_cpu.pyx",
        *(f"csrc/{name}.c" for name in ("predict", "score", "load", "score_portable")),
    ],
    # The .pyx too: setuptools puts what is listed here into the sdist, and by itself only the generated .c.
    depends=["inflight_edge/scoring/_cpu.pyx", *sorted(str(path) for path in Path("csrc").glob("*.[ch]"))],
    include_dirs=["csrc", numpy.get_include()],
    define_macros=[("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION")],
    extra_compile_args=FLAGS,
)

preprocess = Extension(
    "inflight_edge._preprocess",
    sources=["inflight_edge/_preprocess.pyx", "csrc/preprocess.c"],
    depends=["inflight_edge/_preprocess.pyx", "csrc/inflight.h", "csrc/preprocess_math.h", "csrc/host_device.h"],
    include_dirs=["csrc", numpy.get_include()],
    define_macros=[("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION")],
    extra_compile_args=FLAGS,
)

# ---- CUDA: only where nvcc is, and never in the way of the rest ----
# INFLIGHT_EDGE_CUDA: 0 leaves the CUDA scorer out; 1 makes it an error when it cannot be built.
CUDA = os.environ.get("INFLIGHT_EDGE_CUDA", "auto")
if CUDA not in ("auto", "0", "1"):
    raise SystemExit(f"INFLIGHT_EDGE_CUDA: expected auto, 0 or 1, got {CUDA!r}")
NVCC = shutil.which("nvcc", path=os.environ.get("PATH", os.defpath) + os.pathsep + "/usr/local/cuda/bin")
# Machine code for Jetson Orin and Thor, as far as this nvcc knows them; PTX for every other GPU since 2020.
CUBINS, PTX = ("87", "110"), "80"
CUDA_SOURCES = ["csrc/score_cuda.cu", "csrc/preprocess_cuda.cu", "csrc/graph_cuda.c"]


def ask_nvcc(*arguments):
    """What nvcc says on both streams.  Raises CompileError with the same when it fails."""
    try:
        done = subprocess.run([NVCC, *arguments], capture_output=True, text=True, check=False)
    except OSError as error:
        raise CompileError(f"{NVCC}: {error}") from error
    if done.returncode:
        raise CompileError(f"nvcc {' '.join(arguments)}: {done.stdout}{done.stderr}")
    return done.stdout + done.stderr


class BuildCuda(BuildExtensions):
    """BuildExtensions with nvcc for what the C compiler cannot compile."""

    def build_extension(self, extension):
        """Objects of nvcc first, for the one extension that has them."""
        if extension is cuda:
            known = ask_nvcc("--list-gpu-code")
            codes = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in CUBINS if f"sm_{n}" in known]
            codes.append(f"-gencode=arch=compute_{PTX},code=compute_{PTX}")
            folder = Path(self.build_temp)
            folder.mkdir(parents=True, exist_ok=True)
            for source in CUDA_SOURCES:
                target = str(folder / f"{Path(source).name}.o")
                flags = ["-std=c++17", *codes] if source.endswith(".cu") else []
                ask_nvcc("-O3", "-Icsrc", *flags, "-Xcompiler=-fPIC", "-c", source, "-o", target)
                extension.extra_objects.append(target)
            # nvcc may be a wrapper far from its libraries: it knows where they are.
            extension.library_dirs += re.findall(r'"-L([^"]+)"', ask_nvcc("--dryrun", "-o", "x", "x.o"))
        super().build_extension(extension)


cuda = Extension(
    "inflight_edge.scoring._cuda",
    sources=["inflight_edge/scoring/_cuda.pyx"],
    depends=[*CUDA_SOURCES, *sorted(str(path) for path in Path("csrc").glob("*.h"))],
    include_dirs=["csrc"],
    libraries=["cudart_static", "dl", "rt", "pthread", "stdc++"],
    extra_compile_args=FLAGS,
)
with_cuda = CUDA == "1" or (CUDA != "0" and NVCC is not None and platform.system() == "Linux")
if CUDA == "1" and NVCC is None:
    raise SystemExit("INFLIGHT_EDGE_CUDA=1: expected nvcc on the PATH or in /usr/local/cuda/bin, found none")
# ---- end of CUDA ----

extensions = [scorer, preprocess, cuda] if with_cuda else [scorer, preprocess]
extensions = cythonize(extensions, language_level=3)
# cythonize makes new objects, which forget that they are optional.
cuda = next((extension for extension in extensions if extension.name == cuda.name), None)
if cuda is not None:
    cuda.optional = CUDA != "1"
setup(ext_modules=extensions, cmdclass={"build_ext": BuildCuda})
