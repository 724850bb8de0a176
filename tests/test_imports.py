"""Imports go one way, and the device side starts with NumPy alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import inflight_edge

PACKAGE = Path(inflight_edge.__file__).parent
MODULES = sorted(
    path
    for path in PACKAGE.rglob("*.py")
    if path.name != "cli.py" and "calibration" not in path.relative_to(PACKAGE).parts
)

BLOCKED = """
import sys

class Block:
    allowed = {"inflight_edge", "numpy"} | set(sys.stdlib_module_names)

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in self.allowed:
            raise ImportError("blocked by the test: " + name)
        return None

sys.meta_path.insert(0, Block())
"""


def run(code: str) -> str:
    """Output of a fresh interpreter, warnings as errors."""
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_numpy_alone_is_enough_to_import_and_to_judge() -> None:
    code = """
import numpy as np
import inflight_edge, inflight_edge.bundle, inflight_edge.detector, inflight_edge.images
import inflight_edge.verify, inflight_edge.doctor, inflight_edge.engines.onnxruntime
guard = inflight_edge.Guard(
    0, "diagonal", np.array([0, 1], np.int32), np.array([0, 1, 2], np.int32), np.zeros(1, np.float32),
    np.ones(1, np.float32), np.array([[0.0], [4.0]], np.float32), np.zeros(2, np.float32),
    np.ones((2, 1), np.float32), np.empty(0, np.float32),
)
scores = inflight_edge.Scorer(guard).score(np.array([1.0], np.float32))
print(inflight_edge.decide(0, scores, guard.classes, guard.target_row).decision.value, inflight_edge.__version__)
"""
    assert run(BLOCKED + code).split() == ["accept", inflight_edge.__version__]


def test_what_is_missing_is_named_when_it_is_needed() -> None:
    code = """
from inflight_edge import DependencyError
from inflight_edge._optional import require
from inflight_edge.engines.onnxruntime import OnnxRuntimeEngine
from inflight_edge.images import read_image
from inflight_edge._strict import dump_tensors
for call in (lambda: OnnxRuntimeEngine(b""), lambda: read_image("a.png", 3), lambda: dump_tensors({})):
    try:
        call()
    except DependencyError as error:
        print(error)
"""
    lines = run(BLOCKED + code).splitlines()
    assert [line.rpartition("; ")[2] for line in lines] == [
        "pip install 'inflight-edge[onnxruntime]'",
        "pip install 'inflight-edge[camera]'",
        "pip install safetensors",
    ]


def test_import_pulls_nothing_heavy() -> None:
    heavy = {"torch", "sklearn", "scipy", "safetensors", "onnxruntime", "onnx", "PIL", "matplotlib", "tqdm"}
    loaded = set(run("import sys, inflight_edge; print(*sys.modules)").split())
    assert not heavy & {name.partition(".")[0] for name in loaded}
    assert not any(name.startswith("inflight_edge.calibration") for name in loaded)


def test_public_names_exist_and_are_sorted() -> None:
    assert inflight_edge.__all__ == sorted(inflight_edge.__all__)
    assert all(hasattr(inflight_edge, name) for name in inflight_edge.__all__)


def imports_at_module_level(path: Path) -> set[str]:
    """Full names of modules that importing ``path`` imports: everything outside functions."""
    found: set[str] = set()
    pending: list[ast.AST] = [ast.parse(path.read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write the full name of {node.module}"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            pending.extend(ast.iter_child_nodes(node))
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_device_side_never_imports_calibration(path: Path) -> None:
    names = imports_at_module_level(path)
    assert not any(name.startswith("inflight_edge.calibration") for name in names)


# What each module of the core may import from the package: arrows point down only.
LAYERS = (
    {"errors"},
    {"colour", "uri", "affinity", "logs", "sd_notify"},
    {"guard", "preprocess", "verdict", "_optional"},
    {"_layout"},
    {
        "_strict",
        "_files",
        "_contents",
        "signing",
        "engines",
        "scoring",
        "preprocess_cuda",
        "images",
        "doctor",
        "latency",
        "region",
        "actions",
    },
    {"_decode"},
    {"bundle"},
    {"runtime"},
    {"detector", "environment", "events"},
    {"bench", "verify", "sources", "sinks", "serving", "gstreamer", "frame_queue", "judging", "counters"},
    {"capture", "delivery", "inference", "reload"},
    {"pipeline"},
    {"settings"},
    {"compile"},
    {"report"},
)


@pytest.mark.parametrize("layer", range(len(LAYERS)))
def test_layers_import_downwards_only(layer: int) -> None:
    above = set().union(*LAYERS[layer + 1 :]) if layer + 1 < len(LAYERS) else set()
    for module in LAYERS[layer]:
        paths = [PACKAGE / f"{module}.py"] if (PACKAGE / f"{module}.py").exists() else (PACKAGE / module).glob("*.py")
        for path in paths:
            parts = {name.split(".")[1] for name in imports_at_module_level(path) if name.startswith("inflight_edge.")}
            assert not parts & above, f"{path.name} imports {parts & above}"
