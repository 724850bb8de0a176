"""Every name of TensorRT in the code exists in versions 10.3, 10.13, 10.16 and 11.4, and in their real Python bindings.

tests/contracts/tensorrt_names.json holds the names of all classes of the four, read from their bindings.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import inflight_edge
from inflight_edge.engines import _tensorrt_library

PACKAGE = Path(inflight_edge.__file__).parent
ROOT = Path(__file__).parents[2]
SOURCES = sorted((PACKAGE / "engines").glob("_tensorrt_*.py"))
NAMES = json.loads((ROOT / "tests" / "contracts" / "tensorrt_names.json").read_text())
STUB = ast.parse((ROOT / "typings" / "tensorrt" / "__init__.pyi").read_text())
WHEELS = {"10.3": "10.3.0", "10.13": "10.13.3.9", "10.16": "10.16.1.11", "11.4": "11.4.0.106"}
versions = pytest.mark.parametrize("version", NAMES)
SYMBOLS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)
# What the code takes for an answer of yes or no.
ANSWERS = {
    "IExecutionContext": ("set_input_shape", "set_tensor_address", "execute_async_v3"),
    "OnnxParser": ("parse",),
    "IBuilderConfig": ("set_timing_cache",),
}


def chain(node: ast.expr) -> list[str]:
    """["trt", "A", "B"] of the expression trt.A.B; [] of anything else."""
    if isinstance(node, ast.Name):
        return [node.id]
    inner = chain(node.value) if isinstance(node, ast.Attribute) else []
    return [*inner, node.attr] if inner and isinstance(node, ast.Attribute) else []


def paths() -> set[tuple[str, ...]]:
    """Attribute paths that begin at the module, without it."""
    found = set()
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Attribute) and (names := chain(node))[:1] == ["trt"]:
                found.add(tuple(names[1:]))
    return found


def stub_members() -> dict[str, set[str]]:
    """Members of each class of the stub."""
    members: dict[str, set[str]] = {}
    for node in STUB.body:
        if isinstance(node, ast.ClassDef):
            names = {n.name for n in node.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
            names |= {n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
            assigned = [n.targets[0] for n in node.body if isinstance(n, ast.Assign)]
            members[node.name] = names | {target.id for target in assigned if isinstance(target, ast.Name)}
    return members


def used_members() -> dict[str, set[str]]:
    """Members of the stub's classes that the code may mean: every attribute of any object with such a name."""
    used = {
        node.attr
        for source in SOURCES
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.Attribute)
    }
    return {name: members & used for name, members in stub_members().items() if members & used}


def exists(version: str, names: tuple[str, ...]) -> bool:
    classes, functions = NAMES[version]["classes"], NAMES[version]["functions"]
    if len(names) == 1:
        return names[0] in classes or names[0] in functions
    members = classes.get(names[0], ())
    return names[1] in members and (len(names) == 2 or names[2] in members)  # ILogger.Severity.ERROR: all in ILogger


def test_code_names_what_it_should() -> None:
    assert {("Builder",), ("Runtime",), ("OnnxParser",), ("BuilderFlag", "TF32")} <= paths()
    assert {"execute_async_v3", "set_tensor_address", "infer_shapes"} <= used_members()["IExecutionContext"]
    assert "build_serialized_network" in used_members()["Builder"]


@versions
def test_every_name_in_the_code_exists(version: str) -> None:
    missing = [".".join(names) for names in sorted(paths()) if not exists(version, names)]
    missing += [f"{c}.{m}" for c, members in used_members().items() for m in members if not exists(version, (c, m))]
    assert missing == []


@versions
def test_stub_holds_only_what_exists(version: str) -> None:
    """mypy --strict holds the code to the stub; the stub holds to every version."""
    inherited = {"__init__", "__len__", "__getitem__"}
    missing = [
        f"{name}.{member}"
        for name, members in stub_members().items()
        for member in members - inherited
        if not exists(version, (name, member))
    ]
    assert missing == []


@pytest.mark.parametrize("gone", ["BuilderFlag.FP16", "IInt8EntropyCalibrator2", "IExecutionContext.execute_async_v2"])
def test_names_that_some_version_lacks_are_found_out(gone: str) -> None:
    assert not all(exists(version, tuple(gone.split("."))) for version in NAMES)


LOOK = """
import sys
import tensorrt_bindings as trt
from inflight_edge.engines import _tensorrt_library
sys.modules["tensorrt"] = trt
for path in {paths!r}:
    value = trt
    for name in path:
        value = getattr(value, name)
for name, members in {members!r}.items():
    for member in members:
        getattr(getattr(trt, name), member)
for name, members in {answers!r}.items():
    for member in members:
        assert "-> bool" in getattr(getattr(trt, name), member).__doc__, member
assert 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) in (1, 2)
version, log = _tensorrt_library.load_tensorrt()
log.logger.log(trt.ILogger.Severity.WARNING, "not kept")
log.logger.log(trt.ILogger.Severity.ERROR, "kept")
assert isinstance(log.logger, trt.ILogger) and log.take() == "kept"
print(version)
"""


@pytest.mark.slow
@versions
def test_real_bindings_have_every_name(version: str, tmp_path: Path) -> None:
    """The bindings' wheel without the library: empty functions stand in for the nine that it is linked to."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc to make empty libraries for TensorRT's")
    wheel = wheel_of(WHEELS[version], tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    source = tmp_path / "empty.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in SYMBOLS))
    major = version.partition(".")[0]
    for library in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
        name = f"lib{library}.so.{major}"
        subprocess.run(["gcc", "-shared", "-fPIC", f"-Wl,-soname,{name}", source, "-o", tmp_path / name], check=True)
    code = LOOK.format(paths=sorted(paths()), members=used_members(), answers=ANSWERS)
    environment = os.environ | {"LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": str(tmp_path / "site")}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().startswith(version)


def wheel_of(version: str, folder: Path) -> Path:
    """The wheel from INFLIGHT_EDGE_TENSORRT_WHEELS, a folder, or from pip's index."""
    name = f"tensorrt_cu12_bindings-{version}-*.whl"
    given = os.environ.get("INFLIGHT_EDGE_TENSORRT_WHEELS")
    if given is None:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
        result = subprocess.run(
            [*command, f"tensorrt-cu12-bindings=={version}"], capture_output=True, text=True, timeout=300
        )
        if result.returncode:
            pytest.skip(f"pip has no bindings of TensorRT {version} here: {result.stderr.strip()[-200:]}")
    found = sorted(Path(given or folder).glob(name))
    if not found:
        pytest.skip(f"no {name} in {given}")
    return found[0]


def test_library_module_is_among_the_sources() -> None:
    assert Path(_tensorrt_library.__file__) in SOURCES
