"""The C library as installed: its files, and an example program that scores a bundle's parameters without Python."""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from bundles import tiny_bundle
from guards import random_features, random_guard

from inflight_edge.bundle import read_bundle, write_bundle
from inflight_edge.guard import KINDS, Guard
from inflight_edge.scoring import Scorer
from inflight_edge.verdict import decide

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(
    shutil.which("gcc") is None or shutil.which("make") is None, reason="needs gcc and make to build the library"
)


def run(*command: str | Path, stdin: bytes = b"") -> str:
    done = subprocess.run([str(part) for part in command], input=stdin, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr).decode()
    return done.stdout.decode()


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("install")
    # Not optimised: what is installed is tested here, not how fast it is.
    make = ("make", "-s", "-f", ROOT / "csrc" / "Makefile", "CC=gcc", "CFLAGS=-O0", f"BUILD={folder / 'build'}")
    run(*make, f"PREFIX={folder / 'usr'}", "install")
    return folder / "usr"


@pytest.fixture(scope="module")
def program(prefix: Path) -> Path:
    strict = ("-std=c11", "-Wall", "-Wextra", "-Werror", "-pedantic")
    flags = (f"-I{prefix / 'include'}", f"-L{prefix / 'lib'}", "-linflight", f"-Wl,-rpath,{prefix / 'lib'}")
    run("gcc", *strict, ROOT / "examples" / "score.c", *flags, "-o", prefix / "score")
    return prefix / "score"


def dump(guard: Guard) -> bytes:
    """The parameters of a guard in the format of examples/score.c."""
    packed: bytes = runpy.run_path(str(ROOT / "examples" / "parameters.py"))["pack"](guard)
    return packed


def test_installed_files_are_these(prefix: Path) -> None:
    files = sorted(str(path.relative_to(prefix)) for path in prefix.rglob("*") if not path.is_dir())
    assert [name for name in files if name != "score"] == [
        "include/inflight.h",
        "lib/libinflight.a",
        "lib/libinflight.so",
        "lib/libinflight.so.0",
        "lib/pkgconfig/inflight.pc",
    ]


def test_pkg_config_file_names_the_prefix_and_the_version(prefix: Path) -> None:
    text = (prefix / "lib" / "pkgconfig" / "inflight.pc").read_text()
    assert f"prefix={prefix}\n" in text
    assert "Version: 0.1.0\n" in text
    assert "@" not in text
    if shutil.which("pkg-config"):
        flags = run("env", f"PKG_CONFIG_PATH={prefix / 'lib' / 'pkgconfig'}", "pkg-config", "--libs", "inflight")
        assert flags.split() == [f"-L{prefix / 'lib'}", "-linflight"]


def test_library_exports_the_interface_alone(prefix: Path) -> None:
    if shutil.which("nm") is None:
        pytest.skip("needs nm to list symbols")
    listing = run("nm", "-D", "--defined-only", prefix / "lib" / "libinflight.so").split()
    names = {name for name in listing if name.startswith("ife_") or "kernels" in name}
    header = (prefix / "include" / "inflight.h").read_text()
    assert "ife_score_batch" in names
    assert all(f"{name}(" in header for name in names)


@pytest.mark.parametrize("kind", KINDS)
def test_example_scores_a_guard_as_python_does(
    rng: np.random.Generator, program: Path, tmp_path: Path, kind: str
) -> None:
    guard = random_guard(rng, kind, 5, [1, 2, 1, 3, 1], 70)  # type: ignore[arg-type]
    assert_example_agrees(guard, random_features(rng, guard, 9), program, tmp_path)


def test_example_scores_the_parameters_of_a_bundle(rng: np.random.Generator, program: Path, tmp_path: Path) -> None:
    write_bundle(tiny_bundle(), tmp_path / "bundle")
    for guard in read_bundle(tmp_path / "bundle").guards:
        assert_example_agrees(guard, random_features(rng, guard, 3), program, tmp_path)


def test_parameters_of_a_bundle_are_written_by_the_other_example(
    rng: np.random.Generator, program: Path, tmp_path: Path
) -> None:
    write_bundle(tiny_bundle(), tmp_path / "bundle")
    guard = read_bundle(tmp_path / "bundle").guards[0]
    command = [sys.executable, str(ROOT / "examples" / "parameters.py"), str(tmp_path / "bundle")]
    written = subprocess.run([*command, str(guard.target)], capture_output=True, timeout=60, check=True).stdout
    (tmp_path / "parameters").write_bytes(written)
    features = random_features(rng, guard, 1)
    line = run(program, tmp_path / "parameters", stdin=features.astype("<f4").tobytes())
    np.testing.assert_array_equal(np.array(line.split()[3:], np.float32), Scorer(guard).score(features[0]))
    done = subprocess.run([*command, "99"], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("class: expected one of [")


def assert_example_agrees(guard: Guard, features: np.ndarray, program: Path, folder: Path) -> None:
    (folder / "parameters").write_bytes(dump(guard))
    lines = run(program, folder / "parameters", stdin=features.astype("<f4").tobytes()).splitlines()
    assert len(lines) == len(features)
    for line, expected in zip(lines, Scorer(guard).score_batch(features), strict=True):
        decision, source, margin, *scores = line.split()
        np.testing.assert_array_equal(np.array(scores, np.float32), expected)
        want = decide(guard.target, expected, guard.classes, guard.target_row)
        assert decision == want.decision.value
        assert int(source) == (-1 if want.source is None else want.source)
        assert float(margin) == pytest.approx(want.margin, rel=1e-4, abs=1e-2)


def test_example_refuses_a_truncated_file(rng: np.random.Generator, program: Path, tmp_path: Path) -> None:
    parameters = tmp_path / "parameters"
    parameters.write_bytes(dump(random_guard(rng, "diagonal", 2, 1, 3))[:-4])
    done = subprocess.run([program, parameters], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr == "parameters: expected 2 more values, got a shorter file; write it again\n"


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (5, 2, "expected a whitener of 6 entries, got 2; write it again"),
        (5, -1, "expected a whitener of 6 entries, got -1; write it again"),
        (3, 2**31 - 1, "expected counts within the limits of inflight.h; write it again"),
        (1, 0, "expected counts within the limits of inflight.h; write it again"),
    ],
)
def test_example_refuses_counts_that_do_not_fit(
    rng: np.random.Generator, program: Path, tmp_path: Path, place: int, value: int, message: str
) -> None:
    parameters = tmp_path / "parameters"
    numbers = np.frombuffer(dump(random_guard(rng, "diagonal", 2, 1, 3)), "<i4").copy()
    numbers[place] = value
    parameters.write_bytes(numbers.tobytes())
    done = subprocess.run([program, parameters], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (2, f"{parameters}: {message}\n")


def test_example_says_that_the_last_frame_is_short(rng: np.random.Generator, program: Path, tmp_path: Path) -> None:
    (tmp_path / "parameters").write_bytes(dump(random_guard(rng, "diagonal", 2, 1, 3)))
    frames = np.zeros(4, "<f4").tobytes()
    done = subprocess.run(
        [program, tmp_path / "parameters"], input=frames, capture_output=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (2, b"features: expected 3 in the last frame, got 1\n")
    assert done.stdout.count(b"\n") == 1
