"""What this machine has, what each part is needed for, and how to get it."""

from __future__ import annotations

import ctypes
import importlib
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Component", "examine", "instruction_sets"]

# Flags of /proc/cpuinfo that matter to the native scorer, x86 then Arm.
_INSTRUCTION_SETS = ("sse2", "avx", "avx2", "fma", "avx512f", "neon", "asimd", "sve")


@dataclass(frozen=True, slots=True)
class Component:
    """A part of the machine: what it is, whether it works, its version or the reason, and what for."""

    name: str
    present: bool
    detail: str
    needed_for: str
    how_to_get: str


def examine() -> list[Component]:
    """Look at this machine.  Loads each library to see that it really works; changes nothing.  Never raises."""
    components = [_cpu(), Component("Python", True, platform.python_version(), "everything", "")]
    components += [_library(*row) for row in _LIBRARIES]
    components += [_cuda_driver()]
    components += [_program(*row) for row in _PROGRAMS]
    return components


# name, module, needed for, how to get it
_LIBRARIES = (
    ("NumPy", "numpy", "everything", "pip install numpy"),
    (
        "C scorer",
        "inflight_edge.scoring._cpu",
        "scoring in microseconds",
        "install gcc and Python's headers (apt install build-essential python3-dev), then install inflight-edge again",
    ),
    (
        "C preprocessing",
        "inflight_edge._preprocess",
        "preprocessing in one pass",
        "install gcc and Python's headers, then install inflight-edge again",
    ),
    (
        "CUDA scorer",
        "inflight_edge.scoring._cuda",
        "scoring on an NVIDIA GPU",
        "install inflight-edge again where nvcc is on the PATH",
    ),
    ("safetensors", "safetensors", "reading and writing bundles", "pip install safetensors"),
    ("ONNX Runtime", "onnxruntime", "the classifier on the CPU", "pip install 'inflight-edge[onnxruntime]'"),
    ("OpenVINO", "openvino", "the classifier on the CPU", "pip install 'inflight-edge[openvino]'"),
    ("cryptography", "cryptography", "signed bundles", "pip install 'inflight-edge[signing]'"),
    ("Pillow", "PIL.Image", "image files, evidence and annotated video", "pip install 'inflight-edge[camera]'"),
    ("PyAV", "av", "video files, RTSP and USB cameras", "pip install 'inflight-edge[video]'"),
    ("paho-mqtt", "paho.mqtt.client", "verdicts to an MQTT broker", "pip install 'inflight-edge[mqtt]'"),
    ("prometheus-client", "prometheus_client", "metrics", "pip install 'inflight-edge[prometheus]'"),
    ("aiohttp", "aiohttp.web", "the live page", "pip install 'inflight-edge[web]'"),
    ("tritonclient", "tritonclient.grpc", "verdicts of an Inference Server", "pip install 'inflight-edge[serving]'"),
    (
        "TensorRT",
        "tensorrt",
        "the classifier on an NVIDIA GPU",
        "part of JetPack (apt install python3-libnvinfer); on a PC: pip install tensorrt",
    ),
    ("pycuda", "pycuda.driver", "the classifier and the scorer on an NVIDIA GPU", "pip install pycuda (needs nvcc)"),
    ("Triton language", "triton", "the scorer's kernel in the Triton language", "pip install triton"),
    (
        "GStreamer for Python",
        "gi.overrides._gi_gst",
        "CSI cameras and any GStreamer pipeline",
        "apt install python3-gi python3-gst-1.0 gir1.2-gst-plugins-base-1.0, and a virtual environment made with "
        "--system-site-packages",
    ),
    ("PyTorch", "torch", "inspect and calibrate (workstation)", "pip install 'inflight-edge[calibration]'"),
    ("scikit-learn", "sklearn", "calibrate (workstation)", "pip install 'inflight-edge[calibration]'"),
    ("onnx", "onnx", "calibrate (workstation)", "pip install 'inflight-edge[calibration]'"),
)

# name, program, folder beside the PATH, arguments for its version, needed for, how to get it
_PROGRAMS = (
    (
        "nvcc",
        "nvcc",
        "/usr/local/cuda/bin",
        ("--version",),
        "compiling the CUDA scorer",
        "part of JetPack; on a PC: install NVIDIA's CUDA toolkit",
    ),
    (
        "Triton Inference Server",
        "tritonserver",
        "/opt/tritonserver/bin",
        (),
        "serving the detector to other machines",
        "NVIDIA's container image tritonserver",
    ),
    (
        "GStreamer",
        "gst-launch-1.0",
        "",
        ("--version",),
        "cameras and video streams",
        "apt install gstreamer1.0-tools gstreamer1.0-plugins-good",
    ),
    (
        "GStreamer's Python plugins",
        "gst-inspect-1.0",
        "",
        ("python",),
        "the element inflightdetect",
        "apt install gstreamer1.0-tools gstreamer1.0-python3-plugin-loader",
    ),
)


def _cpu() -> Component:
    machine = platform.machine()
    try:
        found = instruction_sets(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"))
    except OSError as error:
        return Component("CPU", False, f"{machine}, instruction sets unknown: {error}", "everything", "")
    detail = f"{machine}: {' '.join(found) or 'no known vector instructions'}"
    return Component("CPU", bool(found), detail, "everything; vector instructions make the scorer fast", "")


def instruction_sets(cpuinfo: str) -> tuple[str, ...]:
    """Vector instruction sets in the text of /proc/cpuinfo: its first ``flags`` (x86) or ``Features`` (Arm) line."""
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            flags = value.split()
            return tuple(name for name in _INSTRUCTION_SETS if name in flags)
    return ()


def _library(name: str, module: str, needed_for: str, how_to_get: str) -> Component:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = importlib.import_module(module)
    except Exception as error:  # noqa: BLE001  a broken library raises anything; the report says what
        return Component(name, False, _first_line(f"{type(error).__name__}: {error}"), needed_for, how_to_get)
    top = sys.modules[module.partition(".")[0]]
    version = getattr(loaded, "__version__", None) or getattr(top, "__version__", None)
    if hasattr(loaded, "instruction_sets"):
        version = f"{version}, runs {loaded.instruction_sets()[0]}"
    return Component(name, True, str(version or "present"), needed_for, how_to_get)


def _cuda_driver(load: Callable[[str], ctypes.CDLL] = ctypes.CDLL) -> Component:
    """The driver library, and whether it sees a GPU: CUDA Driver API, cuInit, cuDriverGetVersion, cuDeviceGetCount."""
    name, needed_for = "CUDA driver", "everything on an NVIDIA GPU"
    how_to_get = "part of JetPack; on a PC: install NVIDIA's driver, in a container start it with the GPU"
    try:
        driver = load("libcuda.so.1")
    except OSError as error:
        return Component(name, False, _first_line(str(error)), needed_for, how_to_get)
    version, count = ctypes.c_int(0), ctypes.c_int(0)
    calls = (
        ("cuInit", ctypes.c_uint(0)),
        ("cuDriverGetVersion", ctypes.byref(version)),
        ("cuDeviceGetCount", ctypes.byref(count)),
    )
    for function, argument in calls:
        if status := int(getattr(driver, function)(argument)):
            return Component(name, False, f"{function} failed with error {status}", needed_for, how_to_get)
    detail = f"CUDA {version.value // 1000}.{version.value % 1000 // 10}, GPUs: {count.value}"
    return Component(name, count.value > 0, detail, needed_for, how_to_get)


def _program(
    name: str, program: str, folder: str, arguments: tuple[str, ...], needed_for: str, how_to_get: str
) -> Component:
    path = shutil.which(program) or (shutil.which(program, path=folder) if folder else None)
    if path is None:
        return Component(name, False, f"{program} is not on the PATH", needed_for, how_to_get)
    if not arguments:
        return Component(name, True, path, needed_for, how_to_get)
    try:
        result = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return Component(name, False, _first_line(str(error)), needed_for, how_to_get)
    lines = [line for line in result.stdout.splitlines() if "release" in line or "version" in line.lower()]
    return Component(name, True, _first_line(lines[0]) if lines else path, needed_for, how_to_get)


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or ["unknown error"])[0][:200]
