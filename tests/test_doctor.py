"""Doctor: what is there works, what is not there is reported with its reason, and nothing is raised."""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inflight_edge import doctor
from inflight_edge.doctor import Component, examine, instruction_sets


def by_name(components: list[Component]) -> dict[str, Component]:
    return {component.name: component for component in components}


def test_this_machine() -> None:
    found = by_name(examine())
    assert list(found) == [
        "CPU",
        "Python",
        "NumPy",
        "C scorer",
        "C preprocessing",
        "CUDA scorer",
        "safetensors",
        "ONNX Runtime",
        "OpenVINO",
        "cryptography",
        "Pillow",
        "PyAV",
        "paho-mqtt",
        "prometheus-client",
        "aiohttp",
        "tritonclient",
        "TensorRT",
        "pycuda",
        "Triton language",
        "GStreamer for Python",
        "PyTorch",
        "scikit-learn",
        "onnx",
        "CUDA driver",
        "nvcc",
        "Triton Inference Server",
        "GStreamer",
        "GStreamer's Python plugins",
    ]
    assert found["NumPy"] == Component("NumPy", True, np.__version__, "everything", "pip install numpy")
    assert found["Python"].detail == ".".join(map(str, sys.version_info[:3]))
    assert found["C scorer"].present
    for component in found.values():
        assert component.detail
        assert component.needed_for
        assert "\n" not in component.detail
        assert component.present or component.how_to_get or component.name == "CPU"
        assert "://" not in component.how_to_get


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "processor\t: 0\nflags\t\t: fpu sse2 fma avx avx2 avx512f\n\nflags : none\n",
            ("sse2", "avx", "avx2", "fma", "avx512f"),
        ),
        ("flags\t\t: fpu sse2 avx512fp16\n", ("sse2",)),
        ("Features\t: fp asimd sve\n", ("asimd", "sve")),
        ("Features : half thumb neon\n", ("neon",)),
        ("model name : flags\n", ()),
        ("", ()),
    ],
)
def test_instruction_sets(text: str, expected: tuple[str, ...]) -> None:
    assert instruction_sets(text) == expected


def test_cpu_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> str:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(Path, "read_text", missing)
    cpu = by_name(examine())["CPU"]
    assert not cpu.present
    assert "instruction sets unknown: [Errno 2] No such file or directory" in cpu.detail


@pytest.mark.parametrize(
    "error",
    [
        ImportError("no such module"),
        OSError("libnvinfer.so.10: cannot open shared object file\nsecond line"),
        AttributeError("_ARRAY_API not found"),
        RuntimeError("cuInit failed"),
    ],
)
def test_broken_library_is_reported_with_its_text(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    load = importlib.import_module

    def broken(name: str, package: str | None = None) -> types.ModuleType:
        if name == "tensorrt":
            raise error
        return load(name, package)

    monkeypatch.setattr(importlib, "import_module", broken)
    found = by_name(examine())["TensorRT"]
    assert not found.present
    assert found.detail == f"{type(error).__name__}: {str(error).splitlines()[0]}"
    assert "pip install tensorrt" in found.how_to_get


class Driver:
    """libcuda.so.1 whose calls return ``status``: by name, else 0."""

    def __init__(self, count: int = 1, **status: int) -> None:
        self.count, self.status = count, status

    def cuInit(self, flags: ctypes.c_uint) -> int:  # noqa: N802
        return self.status.get("cuInit", 0)

    def cuDriverGetVersion(self, version: Any) -> int:  # noqa: N802
        version._obj.value = 12060
        return self.status.get("cuDriverGetVersion", 0)

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = self.count
        return self.status.get("cuDeviceGetCount", 0)


@pytest.mark.parametrize(
    ("driver", "present", "detail"),
    [
        (Driver(2), True, "CUDA 12.6, GPUs: 2"),
        (Driver(0), False, "CUDA 12.6, GPUs: 0"),
        (Driver(cuInit=100), False, "cuInit failed with error 100"),
        (Driver(cuDeviceGetCount=3), False, "cuDeviceGetCount failed with error 3"),
    ],
)
def test_cuda_driver(driver: Driver, present: bool, detail: str) -> None:
    found = doctor._cuda_driver(lambda name: driver)  # type: ignore[arg-type,return-value]
    assert (found.name, found.present, found.detail) == ("CUDA driver", present, detail)


def test_missing_cuda_driver() -> None:
    def missing(name: str) -> ctypes.CDLL:
        raise OSError(f"{name}: cannot open shared object file: No such file or directory")

    found = doctor._cuda_driver(missing)
    assert (found.present, found.detail) == (
        False,
        "libcuda.so.1: cannot open shared object file: No such file or directory",
    )


@pytest.mark.parametrize(
    ("script", "present", "detail"),
    [
        ("echo copyright; echo 'Cuda compilation tools, release 12.6, V12.6.68'", True, "release 12.6, V12.6.68"),
        ("echo nothing to read", True, "nvcc"),
        ("exit 3", False, "returned non-zero exit status 3"),
    ],
)
def test_program_on_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, present: bool, detail: str
) -> None:
    (tmp_path / "nvcc").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "nvcc").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found = by_name(examine())["nvcc"]
    assert found.present is present
    assert detail in found.detail


def test_program_that_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = by_name(examine())["GStreamer"]
    assert (found.present, found.detail) == (False, "gst-launch-1.0 is not on the PATH")
    assert "apt install gstreamer1.0-tools" in found.how_to_get
