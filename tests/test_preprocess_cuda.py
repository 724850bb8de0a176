"""Preprocessing in CUDA without a GPU: the kernel on the CPU against the definition, the Python side on doubles."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from cuda_cases import CSRC, barriers, compile_checked, compile_fibers, compile_threads, run_raw
from driver_double import Binding, Driver, compile_library
from guards import random_guard

from inflight_edge import DataError, OptionError, Preprocess
from inflight_edge.colour import COLOURS, Colour, nv12_matrix
from inflight_edge.errors import DependencyError, ScoreError
from inflight_edge.preprocess_cuda import IMAGE, INPUT, CudaPreprocess
from inflight_edge.scoring.cuda import CudaScorer
from inflight_edge.scoring.device import Device, Memory

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to run the CUDA source on the CPU")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# (frame, input): the same, single pixels, sizes beside a tile's, up and down, thin and flat.
SIZES = [
    ((8, 32), (8, 32)),
    ((2, 2), (1, 1)),
    ((2, 2), (33, 9)),
    ((30, 66), (7, 31)),
    ((48, 64), (17, 33)),
    ((2, 130), (40, 1)),
    ((90, 2), (3, 65)),
]


@dataclass(frozen=True)
class Case:
    """frame: as Preprocess takes it.  padding: bytes after each row but the last."""

    frame: np.ndarray
    colour: Colour
    preprocess: Preprocess
    padding: int = 0

    def encode(self) -> bytes:
        form = "grey" if self.frame.ndim == 2 and not self.colour.startswith("nv12") else self.colour.partition("-")[0]
        height, width = self.frame.shape[0] // 3 * 2 if form == "nv12" else self.frame.shape[0], self.frame.shape[1]
        rows = self.frame.reshape(self.frame.shape[0], -1)
        channels, *size = self.preprocess.input_shape
        image, wanted = np.zeros((), IMAGE), np.zeros((), INPUT)
        stride = rows.shape[1] + self.padding
        image[()] = (("grey", "rgb", "bgr", "nv12").index(form), height, width, *nv12_matrix(self.colour), stride, 0, 0)
        wanted[()] = (channels, *size, self.preprocess.scale, np.zeros(3), np.ones(3))
        wanted["mean"][:channels], wanted["deviation"][:channels] = self.preprocess.mean, self.preprocess.std
        padded = np.pad(rows, [(0, 0), (0, self.padding)], constant_values=99)
        planes = [plane.tobytes() for plane in (padded[:height], padded[height:]) if plane.size]
        return b"".join([image.tobytes(), wanted.tobytes(), *(p[: len(p) - self.padding] for p in planes)])

    def expected(self) -> np.ndarray:
        return self.preprocess.normalise(self.preprocess.pixels(self.frame, self.colour))


def random_frame(rng: np.random.Generator, colour: Colour, size: tuple[int, int], grey: bool = False) -> np.ndarray:
    if colour.startswith("nv12"):
        return rng.integers(0, 256, (size[0] * 3 // 2, size[1]), dtype=np.uint8)
    return rng.integers(0, 256, size if grey else (*size, 3), dtype=np.uint8)


def check(program: Path, cases: list[Case]) -> None:
    done = run_raw(program, cases)
    assert done.returncode == 0, done.stderr.decode()
    at = 0
    for case in cases:
        expected = case.expected()
        got = np.frombuffer(done.stdout, np.float32, expected.size, at).reshape(expected.shape)
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
        at += expected.nbytes
    assert at == len(done.stdout)


@pytest.fixture(scope="module")
def fibers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_fibers(tmp_path_factory.mktemp("fibers"), "preprocess")


@pytest.mark.parametrize("colour", COLOURS)
def test_kernel_is_equal_to_the_definition(rng: np.random.Generator, fibers: Path, colour: Colour) -> None:
    """Sizes, strides, grey and colour, one channel and three, one mean and one a channel."""
    cases = []
    for index, (size, wanted) in enumerate(SIZES):
        for channels in (1, 3):
            n = channels if index % 2 else 1
            preprocess = Preprocess((channels, *wanted), mean=MEAN[:n], std=STD[:n])
            cases.append(Case(random_frame(rng, colour, size), colour, preprocess, padding=index % 3))
            if not colour.startswith("nv12"):
                cases.append(Case(random_frame(rng, colour, size, grey=True), colour, preprocess))
    check(fibers, cases)


def test_extreme_chroma_is_clamped_before_the_resize(fibers: Path) -> None:
    frame = np.full((6, 8), 16, np.uint8)
    frame[:4, ::2], frame[4:] = 235, np.tile([[0, 255, 255, 0, 255, 255, 0, 0]], (2, 1))
    check(fibers, [Case(frame, colour, Preprocess((3, 5, 7))) for colour in COLOURS if colour.startswith("nv12")])


def test_no_data_race_and_the_barrier_is_needed(
    rng: np.random.Generator, tmp_path_factory: pytest.TempPathFactory
) -> None:
    program = compile_threads(tmp_path_factory.mktemp("threads"), "preprocess")
    if program is None:
        pytest.skip("ThreadSanitizer is missing or cannot run here")
    cases = [
        Case(random_frame(rng, colour, (6, 8)), colour, Preprocess((3, 3, 35), mean=MEAN, std=STD))
        for colour in ("rgb", "nv12-bt709")
    ]
    check(program, cases)
    (place,) = barriers("preprocess_cuda.cu")
    done = run_raw(program, cases, CUDA_HOST_SKIP=place, TSAN_OPTIONS="halt_on_error=1")
    assert done.returncode != 0
    assert b"ThreadSanitizer" in done.stderr  # the race, or the wild read that follows from it


def test_structs_are_the_same_in_c_and_python(tmp_path: Path) -> None:
    checks = ""
    for name, dtype in {"ife_image": IMAGE, "ife_input": INPUT}.items():
        checks += f"static_assert(sizeof({name}) == {dtype.itemsize});\n"
        for field, (kind, offset, *_) in (dtype.fields or {}).items():
            checks += f"static_assert(offsetof({name}, {field}) == {offset});\n"
            checks += f"static_assert(sizeof({name}::{field}) == {kind.itemsize});\n"
    source = tmp_path / "layout.cpp"
    source.write_text(f'#include "inflight.h"\n#include <cstddef>\n{checks}')
    compile_checked("g++", "-std=c++20", f"-I{CSRC}", "-fsyntax-only", source)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[Driver], Binding]:
    """Puts a double driver, and a binding on it, in the place of the real ones."""
    library = compile_library()

    def put(driver: Driver) -> Binding:
        binding = Binding(driver, library)
        monkeypatch.setitem(sys.modules, "pycuda", SimpleNamespace(driver=driver))
        monkeypatch.setitem(sys.modules, "pycuda.driver", driver)
        monkeypatch.setitem(sys.modules, "inflight_edge.scoring._cuda", binding)
        return binding

    return put


@pytest.mark.parametrize("memory", ["mapped", "copied"])
def test_graph_of_preprocessing_and_scorer(
    rng: np.random.Generator, install: Callable[[Driver], Binding], memory: Memory
) -> None:
    """Frame to verdict in one graph: new frames in the same memory give new tensors and verdicts."""
    install(Driver())
    preprocess = Preprocess((3, 4, 5), mean=MEAN, std=STD)
    guard = random_guard(rng, "diagonal", 3, 2, 60)
    with CudaScorer([guard], 10, memory=memory) as scorer:
        device = scorer.device
        frame, tensor = device.buffer((18, 16), np.uint8), device.buffer((3, 4, 5), np.float32)
        prepare = CudaPreprocess(preprocess, frame.host.shape, "nv12-bt601", device=device)

        def enqueue() -> None:
            frame.to_device()
            prepare.enqueue(frame.address, tensor.address)
            scorer.enqueue(tensor.address, None, 1)
            tensor.to_host()

        enqueue()
        device.synchronize()
        graph = scorer.capture(enqueue)
        for _ in range(2):
            frame.host[...] = random_frame(rng, "nv12-bt601", (12, 16))
            graph.launch()
            scores = scorer.results()[1][0]
            expected = preprocess(frame.host, "nv12-bt601")
            np.testing.assert_allclose(tensor.host, expected, rtol=0, atol=1e-5)
            assert np.isfinite(scores[:3]).all()
        graph.close()


def test_padded_rows_and_planes_apart(rng: np.random.Generator, install: Callable[[Driver], Binding]) -> None:
    """As a video decoder lays NV12 out: rows of 64 bytes, and chroma in memory of its own."""
    install(Driver())
    frame = random_frame(rng, "nv12-bt709", (6, 40))
    device = Device(memory="mapped")
    luma, chroma = device.buffer((6, 64), np.uint8), device.buffer((3, 64), np.uint8)
    luma.host[:, :40], chroma.host[:, :40] = frame[:6], frame[6:]
    tensor = device.buffer((1, 3, 9), np.float32)
    preprocess = Preprocess((1, 3, 9))
    prepare = CudaPreprocess(preprocess, (9, 40), "nv12-bt709", device=device, stride=64)
    prepare.enqueue(luma.address, tensor.address, chroma.address)
    device.synchronize()
    np.testing.assert_allclose(tensor.host, preprocess(frame, "nv12-bt709"), rtol=0, atol=1e-5)
    device.close()


def test_what_does_not_fit_is_refused(install: Callable[[Driver], Binding], monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    binding = install(driver)
    device = Device()
    preprocess = Preprocess((3, 4, 4))
    with pytest.raises(DataError, match=r"frame: expected NV12 of shape \(H \* 3 / 2, W\), H and W even, got \(4, 4\)"):
        CudaPreprocess(preprocess, (4, 4), "nv12-bt601", device=device)
    with pytest.raises(DataError, match=r"frame: expected 1 or 3 channels, got shape \(4, 4, 2\)"):
        CudaPreprocess(preprocess, (4, 4, 2), device=device)
    with pytest.raises(OptionError, match=r"colour: expected one of rgb, .*, got 'yuyv'"):
        CudaPreprocess(preprocess, (4, 4), "yuyv", device=device)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="input shape: expected 1 or 3 channels on a GPU, got 4"):
        CudaPreprocess(Preprocess((4, 4, 4)), (4, 4), device=device)
    with pytest.raises(OptionError, match="stride: expected at least the 12 bytes of a row, got 11"):
        CudaPreprocess(preprocess, (4, 4, 3), device=device, stride=11)
    binding.status = 1
    frame = device.buffer((4, 4), np.uint8)
    with pytest.raises(ScoreError, match="preprocess: expected success, got CUDA error 1: text of 1"):
        CudaPreprocess(preprocess, (4, 4, 1), device=device).enqueue(frame.address, frame.address)
    assert driver.stack() == []
    device.close()
    monkeypatch.setitem(sys.modules, "inflight_edge.scoring._cuda", None)
    with pytest.raises(DependencyError, match=r"_cuda: needed here .* or preprocess on the CPU"):
        CudaPreprocess(preprocess, (4, 4), device=device)
