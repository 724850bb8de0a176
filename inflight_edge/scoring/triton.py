"""The scorer in the Triton language: for torch users, and compiled beforehand for devices without torch and triton.

``python -m inflight_edge.scoring.triton FOLDER`` compiles the kernels that the package ships in ``scoring/kernels``.
Checked without a GPU: the kernel interpreted and compiled, the launch through a double of the driver.  It has not run
on a device.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from inflight_edge._optional import require
from inflight_edge.errors import DependencyError, OptionError, ScoreError
from inflight_edge.guard import KINDS, FloatArray, Guard, Kind
from inflight_edge.scoring.cuda import DeviceBackend
from inflight_edge.scoring.device import Device, Memory, capability
from inflight_edge.scoring.parameters import Parameters, prepare

__all__ = ["CubinScorer", "TorchScorer", "check", "compile_kernels", "compile_one", "read_kernels", "triton_backend"]

_KERNELS = Path(__file__).with_name("kernels")
_MODULE = "inflight_edge.scoring._triton_kernel"
_REMEDY = "pip install triton torch (Linux), or choose another backend"
# Features, rows of W and components that a program works on at a time.
BLOCKS = {"COLUMNS": 128, "ROWS": 16, "COMPONENTS": 4}
N_WARPS = 4
# No fusion: z's low part is the remainder of its rounded high part.
_OPTIONS = {"num_warps": N_WARPS, "enable_fp_fusion": False}
# The second axis of a grid.
_MAX_ROWS = 65535
# The kernel's array arguments between the features and the result, in its order.
_ARRAYS = ("mean", "scale", "origin", "centres", "whitener", "constants", "offsets")
# Two scratch addresses that the compiler appends and this kernel does not use.
_FORMAT = "P" * 9 + "ii" + "PP"


class TorchScorer:
    """Log-likelihoods of feature vectors that torch holds, on torch's current stream.

    device: torch device of the parameters, a CUDA one; ``cpu`` with TRITON_INTERPRET=1 in the environment (slow).
    Raises DependencyError without torch or triton.
    """

    def __init__(self, guard: Guard, device: Any = "cuda") -> None:
        _check_rows(guard)
        self._torch: Any = require("torch", _REMEDY)
        self._kernel: Any = require(_MODULE, _REMEDY).score_kernel
        self._n_features, self._n_rows = guard.n_features, int(guard.classes.shape[0])
        self._kind = KINDS.index(guard.kind)
        arrays = _arrays(prepare(guard))
        # Copies: torch refuses to share read-only arrays without a warning.
        self._arrays = [self._torch.tensor(array, device=device) for array in arrays]

    def score_batch(self, features: Any) -> Any:
        """(N, D) float32 contiguous tensor -> (N, R) float32 tensor, nats, on the same device.  Raises ScoreError."""
        expected = f"(N, {self._n_features}) float32 contiguous on {self._arrays[0].device}"
        fits = features.ndim == 2 and features.shape[1] == self._n_features and features.is_contiguous()
        if not fits or features.dtype != self._torch.float32 or features.device != self._arrays[0].device:
            got = f"{tuple(features.shape)} {features.dtype} on {features.device}"
            raise ScoreError(f"features: expected {expected}, got {got}")
        n_frames = int(features.shape[0])
        out = self._torch.empty((n_frames, self._n_rows), dtype=self._torch.float32, device=features.device)
        if n_frames:
            grid = (n_frames, self._n_rows)
            sizes = (self._n_features, self._n_rows)
            # The kernel is launched on torch's current device, which need not be the features'.
            with self._torch.cuda.device_of(features):
                self._kernel[grid](features, *self._arrays, out, *sizes, KIND=self._kind, **BLOCKS, **_OPTIONS)
        return out


class CubinScorer:
    """Log-likelihoods of frames in device memory, by the kernel compiled beforehand, through pycuda alone.

    guard, max_frames, index, memory: see CudaScorer.  Raises DependencyError without pycuda or a GPU that the shipped
    kernels were compiled for, and ScoreError when the driver or a damaged file refuses.
    """

    def __init__(self, guard: Guard, *, max_frames: int = 1, index: int = 0, memory: Memory = "auto") -> None:
        if max_frames < 1:
            raise OptionError(f"max_frames: expected at least 1, got {max_frames}")
        _check_rows(guard)
        self.max_frames = max_frames
        self._sizes = guard.n_features, int(guard.classes.shape[0])
        self._entry, cubin = read_kernels()[guard.kind]
        check(index)
        self.device = Device(index, memory)
        try:
            self._out = self.device.buffer((max_frames, self._sizes[1]), np.float32)
            self._addresses = self.device.upload(_arrays(prepare(guard)))
            with self.device.current():
                self._module: Any = self.device.driver.module_from_buffer(cubin)
                self._function: Any = self._module.get_function(self._entry["name"])
                self._function.prepare(_FORMAT)
            self.device.on_close.append(self._unload)
        except BaseException:
            self.device.close()
            raise

    def _unload(self) -> None:
        self._function = self._module = None

    def enqueue(self, features: int, logits: None, n_frames: int) -> None:
        """Enqueue the scores of N frames.  features: address of (N, D) float32.  logits: None, they are not read."""
        if not 0 <= n_frames <= self.max_frames:
            raise ScoreError(f"n_frames: expected 0 to {self.max_frames}, got {n_frames}; raise max_frames")
        if n_frames == 0:
            return
        grid, block = (n_frames, self._sizes[1]), (32 * self._entry["n_warps"], 1, 1)
        arguments = (features, *self._addresses, self._out.address, *self._sizes, 0, 0)
        with self.device.current():
            self._function.prepared_async_call(
                grid, block, self.device.pycuda_stream, *arguments, shared_size=self._entry["shared_bytes"]
            )
        self._out.to_host(n_frames)

    def results(self) -> tuple[None, FloatArray]:
        """Wait for the stream; None and the log-likelihoods (max_frames, R), a view that the next batch overwrites."""
        self.device.synchronize()
        return None, self._out.host


def check(index: int = 0) -> None:
    """Raises DependencyError when the backend ``triton`` cannot run here, ScoreError when a shipped kernel is damaged."""
    major, minor = capability(index)
    (compiled_for,) = {entry["architecture"] for entry, _ in read_kernels().values()}
    if 10 * major + minor != compiled_for:
        raise DependencyError(
            f"triton: expected a GPU of compute capability {compiled_for / 10}, got {major}.{minor}; "
            "choose the backend cuda"
        )


def triton_backend(guard: Guard, *, max_frames: int = 64, memory: Memory = "auto") -> DeviceBackend:
    """Backend ``triton`` of Scorer."""
    return DeviceBackend(CubinScorer(guard, max_frames=max_frames, memory=memory), guard)


def compile_one(kind: int, architecture: int) -> Any:
    """The kernel for an index into KINDS and a compute capability (87 for 8.7), as triton returns it.  No GPU."""
    compiler: Any = require("triton.compiler", _REMEDY)
    backend: Any = require("triton.backends.compiler", _REMEDY)
    kernel: Any = require(_MODULE, _REMEDY).score_kernel
    constants = {"KIND": kind, **BLOCKS}
    signature = {name: "constexpr" if name in constants else "*fp32" for name in kernel.arg_names}
    signature |= {"offsets": "*i32", "n_features": "i32", "n_rows": "i32"}
    source = compiler.ASTSource(kernel, signature, constexprs=constants)
    target = backend.GPUTarget("cuda", architecture, 32)
    return compiler.compile(source, target=target, options=_OPTIONS)


def compile_kernels(folder: Path, architecture: int = 87) -> None:
    """Write one cubin per kind and ``kernels.json`` with what a launch needs to know."""
    entries = {}
    for index, kind in enumerate(KINDS):
        compiled = compile_one(index, architecture)
        cubin = compiled.asm["cubin"]
        metadata = compiled.metadata
        # What CubinScorer relies on: no cluster, no scratch memory, no need to ask for shared memory.
        if metadata.global_scratch_size or metadata.profile_scratch_size or metadata.shared > 48 * 1024:
            raise DependencyError(
                f"triton: expected a kernel without scratch memory, got {metadata}; use another version"
            )
        name = f"score_{kind}_sm_{architecture}.cubin"
        folder.joinpath(name).write_bytes(cubin)
        entries[kind] = {
            "file": name,
            "sha256": hashlib.sha256(cubin).hexdigest(),
            "architecture": architecture,
            "name": metadata.name,
            "n_warps": metadata.num_warps,
            "shared_bytes": metadata.shared,
        }
    version = require("triton", _REMEDY).__version__
    text = json.dumps({"triton": version, "format": _FORMAT, "blocks": BLOCKS, "kernels": entries}, indent=2)
    folder.joinpath("kernels.json").write_text(text + "\n", encoding="utf-8")


def read_kernels(folder: Path = _KERNELS) -> Mapping[Kind, tuple[dict[str, Any], bytes]]:
    """Per kind the launch metadata and the cubin.  Raises ScoreError when a file is missing, damaged or of another form."""
    try:
        table = json.loads(folder.joinpath("kernels.json").read_text(encoding="utf-8"))
        if table["format"] != _FORMAT:
            raise ScoreError(f"kernels.json: expected the format {_FORMAT}, got {table['format']}; compile again")
        kernels = {kind: (table["kernels"][kind], table["kernels"][kind]["file"]) for kind in KINDS}
        read = {kind: (entry, folder.joinpath(name).read_bytes()) for kind, (entry, name) in kernels.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ScoreError(
            f"kernels: expected those of the package, got {error!r}; install inflight-edge again"
        ) from error
    for entry, cubin in read.values():
        if hashlib.sha256(cubin).hexdigest() != entry["sha256"]:
            raise ScoreError(f"{entry['file']}: expected the SHA-256 of kernels.json, got another; install again")
    return read


def _check_rows(guard: Guard) -> None:
    if guard.classes.shape[0] > _MAX_ROWS:
        got = guard.classes.shape[0]
        raise OptionError(f"guard: expected at most {_MAX_ROWS} density rows, got {got}; choose another backend")


def _arrays(parameters: Parameters) -> list[Any]:
    """The kernel's arrays in its order; where a kind has no origin another array stands in, which is not read."""
    arrays = {name: getattr(parameters, name) for name in _ARRAYS}
    if parameters.origin.size == 0:
        arrays["origin"] = parameters.mean
    return [arrays[name] for name in _ARRAYS]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m inflight_edge.scoring.triton FOLDER")
    # Line tables would quadruple the files and name the folders of the machine that compiled them.
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
    compile_kernels(Path(sys.argv[1]))
