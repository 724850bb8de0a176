"""sdist and wheel build, hold what they should, and work in an environment that has nothing else."""

from __future__ import annotations

import email
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from bundles import CLEAN_WEST, TRIGGERED_NORTH, written

import inflight_edge

pytestmark = pytest.mark.packaging

ROOT = Path(__file__).parents[1]
SOURCES = ("setup.py", "MANIFEST.in", "pyproject.toml", "README.md", "LICENSE")
FOLDERS = ("inflight_edge", "calibration", "csrc", "examples", "tests", "benchmarks")
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}


def run(*command: str | Path, cwd: Path, expect: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command's result, outside the source tree's import path; its exit code is asserted."""
    result = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == expect, f"{command}: exit {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result


@dataclass(frozen=True)
class Built:
    sdist: Path
    wheel_from_sdist: Path
    wheel_from_tree: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The two ways to a wheel, built in a copy so that the tree stays as it is; once with the CUDA scorer is enough."""
    folder = tmp_path_factory.mktemp("build")
    tree = folder / "tree"
    for name in FOLDERS:
        shutil.copytree(
            ROOT / name,
            tree / name,
            ignore=shutil.ignore_patterns("*.so", "_cpu.c", "_cuda.c", "_preprocess.c", "build", "__pycache__"),
        )
    for name in SOURCES:
        shutil.copy(ROOT / name, tree)
    build = (sys.executable, "-m", "build", "--no-isolation")
    compiler = folder / "compiler"
    # Unoptimised it compiles in a fraction of the time; the last -O counts.
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CC", "gcc")} "$@" -O0\n')
    compiler.chmod(0o755)
    run(*build, "--outdir", folder / "one", tree, cwd=folder, CC=str(compiler))  # the sdist, and the wheel from that
    run(*build, "--wheel", "--outdir", folder / "two", tree, cwd=folder, CC=str(compiler), INFLIGHT_EDGE_CUDA="0")
    return Built(*(next(folder.glob(p)) for p in ("one/*.tar.gz", "one/*.whl", "two/*.whl")))


@dataclass(frozen=True)
class Installed:
    """A new environment that holds the wheel made from the sdist and what it declares, and a folder beside it."""

    python: Path
    command: Path
    folder: Path


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", folder / "env", cwd=folder)
    python = folder / "env" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", built.wheel_from_sdist, cwd=folder)
    written(folder / "bundle")
    np.savez(folder / "frames.npz", images=np.stack([CLEAN_WEST, TRIGGERED_NORTH]))
    return Installed(python, python.with_name("inflight-edge"), folder)


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {info.filename for info in archive.infolist()}


def test_wheel_holds_the_package_and_nothing_else(built: Built) -> None:
    found = names(built.wheel_from_sdist)
    code = {name for name in found if ".dist-info/" not in name}
    assert {name.partition("/")[0] for name in code} == {"inflight_edge"}
    extensions = [name for name in code if name.endswith(".so")]
    folders = os.environ.get("PATH", os.defpath) + os.pathsep + "/usr/local/cuda/bin"  # where setup.py looks
    with_nvcc = shutil.which("nvcc", path=folders) is not None
    assert {Path(name).name.partition(".")[0] for name in extensions} == (
        {"_cpu", "_preprocess", "_cuda"} if with_nvcc else {"_cpu", "_preprocess"}
    )
    sources = {
        f"{package}/{path.relative_to(ROOT / folder).as_posix()}"
        for package, folder in (("inflight_edge", "inflight_edge"), ("inflight_edge/calibration", "calibration"))
        for path in (ROOT / folder).rglob("*.py")
    }
    typing = {
        "inflight_edge/py.typed",
        "inflight_edge/_preprocess.pyi",
        *(f"inflight_edge/scoring/{name}.pyi" for name in ("_cpu", "_cuda")),
    }
    kernels = {f"inflight_edge/scoring/kernels/score_{kind}_sm_87.cubin" for kind in ("diagonal", "shared", "full")}
    kernels.add("inflight_edge/scoring/kernels/kernels.json")
    page = {f"inflight_edge/sinks/page/{name}" for name in ("app.css", "app.js", "index.html")}
    assert code == sources | typing | kernels | page | set(extensions)


def test_wheel_from_tree_equals_wheel_from_sdist(built: Built) -> None:
    without_cuda = {name for name in names(built.wheel_from_sdist) if not name.endswith(".so") or "_cuda" not in name}
    assert names(built.wheel_from_tree) == without_cuda
    with zipfile.ZipFile(built.wheel_from_tree) as tree, zipfile.ZipFile(built.wheel_from_sdist) as sdist:
        for name in names(built.wheel_from_sdist):
            if name.endswith((".py", ".pyi", "METADATA", "entry_points.txt")):
                assert tree.read(name) == sdist.read(name), name


def test_sdist_holds_the_sources_of_the_extension(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").iterdir() if path.is_file()}
    sources |= {
        "examples/score.c",
        "inflight_edge/_preprocess.pyx",
        "inflight_edge/scoring/_cpu.pyx",
        "inflight_edge/scoring/_cuda.pyx",
        "setup.py",
        "pyproject.toml",
        "LICENSE",
        "README.md",
    }
    assert sources <= found
    assert not any(name.startswith("benchmarks") or name.endswith(".so") for name in found)


def test_metadata(built: Built) -> None:
    with zipfile.ZipFile(built.wheel_from_sdist) as archive:
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        fields = email.message_from_bytes(archive.read(metadata))
    required = fields.get_all("Requires-Dist") or []
    always = [text for text in required if "extra ==" not in text]
    assert sorted(text.partition(">")[0] for text in always) == ["numpy", "safetensors"]
    assert {"onnxruntime", "camera", "calibration", "cuda", "dev"} <= set(fields.get_all("Provides-Extra") or [])
    assert fields["Requires-Python"] == ">=3.10"
    assert fields["Version"] == inflight_edge.__version__
    assert fields["Description-Content-Type"] == "text/markdown"
    assert (ROOT / "README.md").read_text().splitlines()[0] in str(fields.get_payload())


def test_import_comes_from_the_installed_wheel(installed: Installed) -> None:
    code = (
        "import inflight_edge, inflight_edge.calibration.attacks as attacks\n"
        "print(inflight_edge.__file__, attacks.__file__, sep='\\n')"
    )
    result = run(installed.python, "-W", "error", "-c", code, cwd=installed.folder)
    assert all(line.startswith(f"{installed.folder}{os.sep}env") for line in result.stdout.splitlines())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("yes", "INFLIGHT_EDGE_CUDA: expected auto, 0 or 1, got 'yes'"),
        ("1", "INFLIGHT_EDGE_CUDA=1: expected nvcc on the PATH or in /usr/local/cuda/bin, found none"),
    ],
)
def test_build_refuses_what_it_cannot_do_about_cuda(value: str, message: str, tmp_path: Path) -> None:
    if value == "1" and Path("/usr/local/cuda/bin/nvcc").exists():
        pytest.skip("there is an nvcc where setup.py always looks")
    environment = {**ENVIRONMENT, "INFLIGHT_EDGE_CUDA": value, "PATH": str(tmp_path)}
    command = [sys.executable, "setup.py", "--version"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == message


def test_version_and_doctor(installed: Installed) -> None:
    version = run(installed.command, "--version", cwd=installed.folder)
    assert version.stdout == f"inflight-edge {inflight_edge.__version__}\n"
    as_module = run(installed.python, "-m", "inflight_edge", "--version", cwd=installed.folder)
    assert as_module.stdout == version.stdout
    report = json.loads(run(installed.command, "doctor", "--json", cwd=installed.folder).stdout)
    present = {part["name"]: part["present"] for part in report}
    assert present["C scorer"]
    assert present["safetensors"]
    assert not present["PyTorch"]
    assert not present["ONNX Runtime"]


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (("demo",), "pip install 'inflight-edge[calibration]'"),
        (("inspect", "m.pt2", "--data", "d.npz"), "pip install 'inflight-edge[calibration]'"),
        (("score", "bundle", "frames.npz"), "pip install 'inflight-edge[onnxruntime]'"),
    ],
)
def test_a_missing_extra_is_named_in_one_line(installed: Installed, arguments: tuple[str, ...], remedy: str) -> None:
    result = run(installed.command, *arguments, cwd=installed.folder, expect=2)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("inflight-edge: error: ")
    assert line.endswith(remedy)
    assert not (installed.folder / "demo").exists()


def test_c_extension_scores_without_any_extra(installed: Installed) -> None:
    code = """
import numpy as np
from inflight_edge import Scorer, decide, read_bundle
bundle = read_bundle("bundle")
guard = bundle.guards[0]
scorer = Scorer(guard)
for features in bundle.self_test.features[:2]:
    verdict = decide(guard.target, scorer.score(features), guard.classes, guard.target_row)
    print(scorer.backend, verdict.decision.value, verdict.source)
"""
    result = run(installed.python, "-W", "error", "-c", code, cwd=installed.folder)
    assert result.stdout.splitlines() == ["cpu accept None", "cpu trigger 0"]


def test_verify_passes_every_scorer_and_says_that_an_engine_is_missing(installed: Installed) -> None:
    result = run(installed.command, "verify", "bundle", "--json", cwd=installed.folder, expect=1)
    checks = {check["name"]: check for check in json.loads(result.stdout)}
    failed = [name for name, check in checks.items() if not check["passed"]]
    assert failed == ["engine"]
    assert checks["engine"]["detail"].endswith("pip install 'inflight-edge[onnxruntime]'")
    assert {"scorer cpu: verdicts", "scorer reference: verdicts"} <= set(checks)
