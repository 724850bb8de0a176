"""What a timing was measured on: processor, clocks, versions, commit.  What cannot be known is None, never guessed."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from inflight_edge.scoring import available_backends, instruction_set

__all__ = ["describe_environment"]

_PACKAGES = (
    "inflight-edge",
    "numpy",
    "onnxruntime",
    "openvino",
    "tensorrt",
    "pycuda",
    "scikit-learn",
    "scipy",
    "torch",
    "skl2onnx",
)


def describe_environment() -> dict[str, Any]:
    """Plain values for JSON.  Looks at files and runs short programs; changes nothing."""
    return {
        "cpu": _cpu(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "governor": _line("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "caches": _caches(),
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "instruction_set": instruction_set() if "cpu" in available_backends() else None,
        "device": _line("/proc/device-tree/model"),
        "nvpmodel": _program("nvpmodel", "-q"),
        "jetson_clocks": _program("jetson_clocks", "--show"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "blas": np.show_config(mode="dicts")["Build Dependencies"]["blas"]["name"],
        "commit": _commit(),
    }


def _cpu() -> str | None:
    """Model name of /proc/cpuinfo (x86), else what Python knows."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model"):
            return value.strip()
    return platform.processor() or None


def _caches() -> dict[str, str]:
    """Size by level and type of the caches of processor 0, such as {"1 Data": "48K"}."""
    found = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_line(folder / name) for name in ("level", "type", "size"))
        if level and kind and size:
            found[f"{level} {kind}"] = size
    return found


def _line(path: str | Path) -> str | None:
    """First line of a small file, None when there is none."""
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return text.strip("\0\n ").partition("\n")[0] or None


def _program(name: str, *arguments: str) -> str | None:
    """What a program prints, or why it did not; None when it is not installed."""
    path = shutil.which(name)
    if path is None:
        return None
    try:
        done = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return f"failed: {error}"
    return done.stdout.strip() or f"failed: {done.stderr.strip()[:200]}"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the checkout that this package runs from, ``+`` when files were changed; None outside of one."""
    git, root = shutil.which("git"), Path(__file__).resolve().parents[1]
    if git is None or not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            [git, "-C", str(root), "describe", "--always", "--abbrev=40", "--match=", "--dirty=+"],
            capture_output=True, text=True, timeout=20, check=False,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
