from __future__ import annotations

import ctypes
import shutil
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from driver_double import Binding, Driver, compile_library
from tensorrt_double import TensorRt

Install = Callable[..., TensorRt]


@pytest.fixture(scope="session")
def library() -> ctypes.CDLL:
    if shutil.which("g++") is None:
        pytest.skip("needs g++ to run the CUDA scorer on the CPU")
    return compile_library()


@pytest.fixture
def gpu(
    library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., TensorRt]:
    """Puts doubles of pycuda, of the CUDA binding and of TensorRT in the place of the real ones, and plans in a folder."""
    monkeypatch.setenv("INFLIGHT_EDGE_PLANS", str(tmp_path_factory.mktemp("plans") / "here"))

    def put(driver: Driver | None = None, *, version: str = "10.3.0", binding: bool = True) -> TensorRt:
        driver = driver or Driver(integrated=True, capability=(11, 0))
        double = TensorRt(driver, version)
        monkeypatch.setitem(sys.modules, "pycuda", SimpleNamespace(driver=driver))
        monkeypatch.setitem(sys.modules, "pycuda.driver", driver)
        made = Binding(driver, library) if binding else None
        monkeypatch.setitem(sys.modules, "inflight_edge.scoring._cuda", made)
        monkeypatch.setitem(sys.modules, "tensorrt", double)
        return double

    return put
