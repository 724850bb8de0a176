"""The scorer in the Triton language without a GPU: interpreted, compiled, and launched through the driver's double."""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from driver_double import Driver, compile_library
from guards import random_features, random_guard

from inflight_edge.errors import DependencyError, OptionError, ScoreError
from inflight_edge.guard import KINDS, Kind
from inflight_edge.scoring import Scorer, available_backends
from inflight_edge.scoring.device import Memory
from inflight_edge.scoring.reference import log_likelihoods
from inflight_edge.scoring.triton import CubinScorer, TorchScorer, read_kernels, triton_backend

HERE = Path(__file__).resolve().parent
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or importlib.util.find_spec("torch") is None,
    reason="needs triton and torch to interpret and compile the kernel",
)
needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to run the CUDA scorer on the CPU")
kinds = pytest.mark.parametrize("kind", KINDS)


def run_apart(script: str, *arguments: str | Path, **environment: str) -> str:
    """A script's output.  In a process of its own: triton either interprets or compiles for as long as it lives."""
    variables = {**os.environ, "PYTHONPATH": str(HERE.parent), **environment}
    command = [sys.executable, HERE / script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=variables, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_triton
@kinds
def test_interpreted_kernel_scores_like_the_definition(kind: Kind) -> None:
    lines = run_apart("triton_interpreted.py", str(KINDS.index(kind)), TRITON_INTERPRET="1").splitlines()
    assert len(lines) == 4
    errors = {line: float(line.split()[-1]) for line in lines}
    assert max(errors.values()) <= 1e-5, errors


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, object]]]:
    folder = tmp_path_factory.mktemp("compiled")
    cache = {"TRITON_CACHE_DIR": str(folder / "cache"), "TRITON_DISABLE_LINE_INFO": "1"}
    return folder, [json.loads(line) for line in run_apart("triton_compiled.py", folder, **cache).splitlines()]


@needs_triton
def test_kernel_compiles_for_jetson_and_data_centre(compiled: tuple[Path, list[dict[str, object]]]) -> None:
    folder, records = compiled
    assert [(r["kind"], r["architecture"]) for r in records] == [(k, a) for a in (87, 90) for k in KINDS]
    for record in records:
        assert str(record["target"]).startswith(f".target sm_{record['architecture']}")
        # 11 of the kernel's and the compiler's two scratch addresses, as CubinScorer passes them.
        assert record["parameters"] == 13
        assert record["exact_division"]
        assert (folder / f"{record['kind']}-{record['architecture']}.cubin").read_bytes()[:4] == b"\x7fELF"


@needs_triton
def test_kernel_spills_nothing(compiled: tuple[Path, list[dict[str, object]]]) -> None:
    import triton

    cuobjdump = next(Path(triton.__file__).parent.rglob("cuobjdump"), None)
    if cuobjdump is None:
        pytest.skip("this triton wheel has no cuobjdump")
    for cubin in compiled[0].glob("*-*.cubin"):
        command = [str(cuobjdump), "--dump-resource-usage", str(cubin)]
        report = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
        used = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", report)
        assert used is not None, report
        registers, stack, _, local = map(int, used.groups())
        assert (stack, local) == (0, 0), f"{cubin.name}: {report}"
        assert registers <= 255


@needs_triton
def test_shipped_kernels_are_those_of_the_source(compiled: tuple[Path, list[dict[str, object]]]) -> None:
    """With the triton that compiled them: the same bytes.  With another one the format of a launch must be the same."""
    shipped = json.loads((HERE.parents[1] / "inflight_edge/scoring/kernels/kernels.json").read_text())
    fresh = json.loads((compiled[0] / "kernels.json").read_text())
    assert shipped["format"] == fresh["format"]
    assert shipped["blocks"] == fresh["blocks"]
    if shipped["triton"] != fresh["triton"]:
        pytest.skip(f"kernels were compiled by triton {shipped['triton']}, here is {fresh['triton']}")
    assert shipped == fresh


def test_shipped_kernels_name_no_machine() -> None:
    kernels = read_kernels()
    assert tuple(kernels) == KINDS
    assert sum(len(cubin) for _, cubin in kernels.values()) < 100_000
    for entry, cubin in kernels.values():
        assert entry["architecture"] == 87
        assert b"/root" not in cubin
        assert b"/home" not in cubin


def test_damaged_kernels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ScoreError, match="kernels: expected those of the package, got FileNotFoundError"):
        read_kernels(tmp_path)
    folder = tmp_path / "kernels"
    shutil.copytree(HERE.parents[1] / "inflight_edge/scoring/kernels", folder)
    assert tuple(read_kernels(folder)) == KINDS
    target = folder / "score_full_sm_87.cubin"
    target.write_bytes(target.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ScoreError, match=r"score_full_sm_87.cubin: expected the SHA-256 of kernels.json, got another"):
        read_kernels(folder)
    table = json.loads((folder / "kernels.json").read_text())
    (folder / "kernels.json").write_text(json.dumps({**table, "format": "PP"}))
    with pytest.raises(ScoreError, match=r"kernels.json: expected the format P+iiPP, got PP; compile again"):
        read_kernels(folder)


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return compile_library()


def install(monkeypatch: pytest.MonkeyPatch, driver: Driver, library: ctypes.CDLL) -> Driver:
    """A double of the driver that knows the shipped kernels.  Neither torch nor triton can be imported."""
    driver.library = library
    driver.cubins = {cubin: KINDS.index(kind) for kind, (_, cubin) in read_kernels().items()}
    monkeypatch.setitem(sys.modules, "pycuda", SimpleNamespace(driver=driver))
    monkeypatch.setitem(sys.modules, "pycuda.driver", driver)
    for name in ("torch", "triton", "inflight_edge.scoring._triton_kernel"):
        monkeypatch.setitem(sys.modules, name, None)
    return driver


@needs_gxx
@kinds
@pytest.mark.parametrize("memory", ["mapped", "copied"])
def test_cubin_is_launched_with_what_the_kernel_takes(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, library: ctypes.CDLL, kind: Kind, memory: Memory
) -> None:
    driver = install(monkeypatch, Driver(), library)
    guard = random_guard(rng, kind, 4, [1, 3, 2, 1], 19)
    frames = random_features(rng, guard, 5)
    backend = triton_backend(guard, max_frames=2, memory=memory)
    out = np.zeros((5, 4), np.float32)
    assert backend.score_batch_into(frames, out)
    np.testing.assert_allclose(out, log_likelihoods(guard, frames), rtol=1e-5)
    held, backend = [backend], None
    worker = threading.Thread(target=held.clear)  # which frees everything, the module too, though it has no context
    worker.start()
    worker.join()
    gc.collect()
    assert (list(driver.live.values()), driver.leaked) == ([], [])
    assert driver.stack() == []


@needs_gxx
def test_backend_is_selectable_and_says_what_it_needs(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, library: ctypes.CDLL
) -> None:
    guard = random_guard(rng, "shared", 3, 2, 5)
    driver = install(monkeypatch, Driver(), library)
    scorer = Scorer(guard, backend="triton")
    frames = random_features(rng, guard, 3)
    np.testing.assert_allclose(scorer.score_batch(frames), log_likelihoods(guard, frames), rtol=1e-5)
    assert scorer.score_batch(frames[:0]).shape == (0, 3)
    driver.cubins = {}
    with pytest.raises(ScoreError, match="driver: expected success, got: cuModuleLoadDataEx failed"):
        CubinScorer(guard)
    assert driver.stack() == []
    with pytest.raises(OptionError, match="max_frames: expected at least 1, got 0"):
        CubinScorer(guard, max_frames=0)
    assert "triton" in available_backends()
    install(monkeypatch, Driver(capability=(9, 0)), library)
    assert "triton" not in available_backends()
    with pytest.raises(DependencyError, match=r"expected a GPU of compute capability 8.7, got 9.0; choose the backend"):
        CubinScorer(guard)
    with pytest.raises(DependencyError, match=r"torch: needed here .* pip install triton torch"):
        TorchScorer(guard)


@needs_triton
def test_torch_features_that_do_not_fit_are_refused(rng: np.random.Generator) -> None:
    import torch

    scorer = TorchScorer(random_guard(rng, "diagonal", 3, 2, 5), "cpu")
    for wrong in (torch.zeros(2, 4), torch.zeros(5), torch.zeros(2, 5, dtype=torch.float64), torch.zeros(5, 2).T):
        with pytest.raises(ScoreError, match=r"features: expected \(N, 5\) float32 contiguous on cpu, got"):
            scorer.score_batch(wrong)
