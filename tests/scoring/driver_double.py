"""Doubles of pycuda.driver and of the CUDA binding that really compute, on the CPU; nothing here is a test.

Device memory is host memory that only the double may touch; what is put on a stream happens when the stream is waited
for and not before, so that a missing wait or a buffer changed too early shows.  Wrong types, addresses outside live
allocations and calls without a current context fail at once.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import shutil
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from threading import get_ident, local
from types import SimpleNamespace
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
from cuda_cases import CSRC, FMA, HOST, WARNINGS, compile_checked

from inflight_edge.preprocess_cuda import IMAGE, INPUT
from inflight_edge.scoring.cuda import GUARD, OUT, PARAMS, VERDICT

_ALIGNMENT = 256  # as cudaMalloc promises


class DriverError(Exception):
    """pycuda.driver.Error."""


@functools.cache
def compile_library() -> ctypes.CDLL:
    """The CUDA scorer on the CPU as a shared library, once in a process."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    target = folder / "score_cuda.so"
    flags = ["-std=c++20", "-O2", *WARNINGS, *FMA, "-shared", "-fPIC", f"-I{HOST}", f"-I{CSRC}"]
    compile_checked("g++", *flags, "-x", "c++", CSRC / "score_cuda.cu", CSRC / "preprocess_cuda.cu", "-o", target)
    library = ctypes.CDLL(str(target))
    pointers = [ctypes.c_void_p] * 4
    library.ife_cuda_launch.argtypes = [*pointers, ctypes.c_int32, ctypes.c_void_p]
    library.ife_cuda_preprocess.argtypes = pointers
    return library


class Allocation:
    def __init__(self, driver: Driver, n_bytes: int) -> None:
        assert type(n_bytes) is int
        assert n_bytes > 0
        if n_bytes > driver.memory_limit:
            raise DriverError("cuMemAlloc failed: out of memory")
        driver.check_current()
        self._driver = driver
        raw = np.full(n_bytes + _ALIGNMENT, 0xFF, np.uint8)
        self.bytes = raw[-raw.ctypes.data % _ALIGNMENT :][:n_bytes]
        self.address = self.bytes.ctypes.data
        driver.live[self.address] = self

    def __int__(self) -> int:
        assert self.address in self._driver.live
        return self.address

    def free(self) -> None:
        self._driver.check_current()
        del self._driver.live[self.address]


class Pinned(ctypes.Structure):
    """What a page-locked array is based on, as long as the class made by ``pinned`` says."""

    driver: Driver
    mapped: bool

    def get_device_pointer(self) -> int:
        assert self.mapped
        return ctypes.addressof(self)


def is_pinned(array: np.ndarray) -> bool:
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    return isinstance(base, Pinned)


def pinned(driver: Driver, n_bytes: int, mapped: bool) -> Pinned:
    driver.check_current()
    fields = [("bytes", ctypes.c_uint8 * n_bytes)]
    kind: type[Pinned] = type("PinnedArray", (Pinned,), {"_fields_": fields, "driver": driver, "mapped": mapped})
    raw = bytearray(n_bytes + _ALIGNMENT)
    start = ctypes.addressof(ctypes.c_char.from_buffer(raw))
    made = kind.from_buffer(raw, -start % _ALIGNMENT)
    driver.live[ctypes.addressof(made)] = made
    weakref.finalize(made, driver.check_freed, n_bytes).atexit = False
    return made


class Stream:
    def __init__(self, driver: Driver) -> None:
        driver.check_current()
        self._driver = driver
        self.handle = 0x5000 + len(driver.streams)
        driver.streams[self.handle] = self
        self.queue: list[Callable[[], None]] = []
        self.capturing: list[Callable[[], None]] | None = None

    def put(self, work: Callable[[], None]) -> None:
        self._driver.check_current()
        if self._driver.eager and self.capturing is None:
            work()
        else:
            (self.queue if self.capturing is None else self.capturing).append(work)

    def synchronize(self) -> None:
        self._driver.check_current()
        if self.capturing is not None:
            raise DriverError("cuStreamSynchronize failed: operation not permitted when stream is capturing")
        queue, self.queue = self.queue, []
        for work in queue:
            work()


class Event:
    """What is recorded is done when the stream's work before it has been run."""

    def __init__(self, driver: Driver, flags: int) -> None:
        driver.check_current()
        assert type(flags) is int
        self._driver, self.flags, self.waits = driver, flags, {"synchronize": 0, "query": 0}
        self._stream: Stream | None = None
        self._done = True

    def record(self, stream: Stream) -> None:
        self._stream, self._done = stream, False
        stream.put(self._finish)

    def _finish(self) -> None:
        self._done = True

    def synchronize(self) -> None:
        self._driver.check_current()
        self.waits["synchronize"] += 1
        while not self._done:
            assert self._stream is not None
            self._stream.queue.pop(0)()

    def query(self) -> bool:
        """One piece of work is done per look."""
        self._driver.check_current()
        self.waits["query"] += 1
        if not self._done:
            assert self._stream is not None
            self._stream.queue.pop(0)()
        return self._done


class Function:
    """A kernel of the Triton language from a cubin: computes what the kernel of that kind would."""

    def __init__(self, driver: Driver, kind: int) -> None:
        self._driver, self._kind = driver, kind
        self.format = ""

    def prepare(self, argument_format: str) -> None:
        self._driver.check_current()
        self.format = argument_format

    def prepared_async_call(
        self, grid: tuple[int, ...], block: tuple[int, ...], stream: Stream, *arguments: int, shared_size: int
    ) -> None:
        assert {type(value) for value in (*grid, *block, *arguments, shared_size)} == {int}
        assert len(arguments) == len(self.format)
        assert (len(grid), len(block), block[1:], arguments[-2:]) == (2, 3, (1, 1), (0, 0))
        names = ("features", "mean", "scale", "origin", "centres", "whitener", "constants", "offsets", "out")
        values = dict(zip((*names, "n_features", "n_rows"), arguments, strict=False))
        n_frames, n_rows, n = grid[0], values["n_rows"], values["n_features"]
        assert grid == (n_frames, n_rows)
        assert self._driver.room(values["features"]) >= 4 * n_frames * n
        assert self._driver.room(values["out"]) >= 4 * n_frames * n_rows
        guard = np.zeros(1, GUARD)
        for name in names[1:8]:
            assert self._driver.room(values[name]) > 0
            guard[name] = values[name]
        n_components = np.frombuffer(ctypes.string_at(values["offsets"], 4 * (n_rows + 1)), np.int32)[-1]
        classes = np.arange(n_rows, dtype=np.int32)
        guard["kind"], guard["n_features"], guard["n_rows"] = self._kind, n, n_rows
        guard["n_components"], guard["classes"] = n_components, classes.ctypes.data
        tickets, verdicts = np.zeros(n_frames, np.uint32), np.zeros(n_frames, VERDICT)
        params, out = np.zeros(1, PARAMS), np.zeros(1, OUT)
        head = (1, n, 1, n_rows, 1, n_frames, 3, guard.ctypes.data, tickets.ctypes.data)
        params[0], out[0] = head, (verdicts.ctypes.data, values["out"])

        def work() -> None:
            assert self._driver.library is not None
            if self._driver.interpret is not None:
                shapes = {"features": (n_frames, n), "mean": n, "scale": n, "origin": n, "centres": (n_components, n)}
                triangle = n * (n + 1) // 2
                shapes["whitener"] = (n_components * n, triangle, n_components * triangle)[self._kind]
                shapes |= {"constants": n_components, "offsets": n_rows + 1}
                arrays = {}
                for name, shape in shapes.items():
                    n_bytes = 4 * int(np.prod(shape))
                    assert self._driver.room(values[name]) >= n_bytes
                    data = ctypes.string_at(values[name], n_bytes)
                    arrays[name] = np.frombuffer(data, np.int32 if name == "offsets" else np.float32).reshape(shape)
                scores = np.ascontiguousarray(self._driver.interpret(self._kind, arrays), np.float32)
                assert scores.shape == (n_frames, n_rows)
                ctypes.memmove(values["out"], scores.ctypes.data, scores.nbytes)
                return
            launched = params.ctypes.data, values["features"], None, out.ctypes.data, n_frames, None
            assert self._driver.library.ife_cuda_launch(*launched) == 0
            assert guard.size == classes[:1].size  # they live until here

        stream.put(work)


class Driver:
    """pycuda.driver, as far as inflight_edge uses it."""

    Error = DriverError
    host_alloc_flags = SimpleNamespace(DEVICEMAP=2)
    device_attribute = SimpleNamespace(INTEGRATED="integrated")
    event_flags = SimpleNamespace(BLOCKING_SYNC=1, DISABLE_TIMING=2)

    def __init__(self, *, integrated: bool = False, devices: int = 1, capability: tuple[int, int] = (8, 7)) -> None:
        self.capability = capability
        self.library: ctypes.CDLL | None = None
        self.cubins: dict[bytes, int] = {}
        # (kind, arrays) -> scores in the place of the CUDA kernel, for kernels of the Triton language.
        self.interpret: Callable[[int, dict[str, np.ndarray]], np.ndarray] | None = None
        self.integrated, self.devices = integrated, devices
        self.name = "Double of a GPU"
        self.eager = False  # work is done as soon as it is put on a stream, not when somebody waits: both happen
        self.memory_limit = 1 << 30
        # Weak: as with pycuda, what nobody holds any more is freed, in a thread that may: else it has leaked.
        self.live: WeakValueDictionary[int, Allocation | Pinned] = WeakValueDictionary()
        self.streams: dict[int, Stream] = {}
        self.retained, self.retained_by = 0, 0
        self.leaked: list[int] = []  # bytes
        self._local = local()
        self.Context = SimpleNamespace(pop=self._pop)

    def stack(self) -> list[object]:
        if not hasattr(self._local, "stack"):
            self._local.stack = []
        stack: list[object] = self._local.stack
        return stack

    def check_current(self) -> None:
        assert self.stack(), "no context is current in this thread"

    def check_freed(self, n_bytes: int) -> None:
        """Note what dies in a thread where the context is neither current nor was retained: pycuda leaves it, in silence."""
        if not self.stack() and get_ident() != self.retained_by:
            self.leaked.append(n_bytes)

    def _pop(self) -> None:
        self.stack().pop()

    def init(self) -> None:
        if self.devices == 0:
            raise DriverError("cuInit failed: no CUDA-capable device is detected")

    def Device(self, index: int) -> Any:  # noqa: N802  pycuda's name
        if index >= self.devices:
            raise DriverError("cuDeviceGet failed: invalid device ordinal")
        return SimpleNamespace(
            retain_primary_context=self._retain,
            get_attribute={"integrated": int(self.integrated)}.__getitem__,
            name=lambda: self.name,
            compute_capability=lambda: self.capability,
        )

    def _retain(self) -> Any:
        self.retained, self.retained_by = self.retained + 1, get_ident()
        return SimpleNamespace(push=lambda: self.stack().append(1), detach=self._detach)

    def _detach(self) -> None:
        self.check_current()
        self.retained -= 1

    def Stream(self, flags: int = 0) -> Stream:  # noqa: N802  pycuda's name
        assert flags == 1, "CU_STREAM_NON_BLOCKING: no implicit order with the default stream"
        return Stream(self)

    def Event(self, flags: int) -> Event:  # noqa: N802  pycuda's name
        return Event(self, flags)

    def mem_alloc(self, n_bytes: int) -> Allocation:
        return Allocation(self, n_bytes)

    def module_from_buffer(self, cubin: bytes) -> Any:
        self.check_current()
        if cubin not in self.cubins:
            raise DriverError("cuModuleLoadDataEx failed: device kernel image is invalid")

        def get_function(name: str) -> Function:
            assert name.encode() in cubin
            return Function(self, self.cubins[cubin])

        return SimpleNamespace(get_function=get_function)

    def pagelocked_empty(self, shape: tuple[int, ...], dtype: Any, *, mem_flags: int) -> np.ndarray:
        n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        base = pinned(self, n_bytes, mem_flags == self.host_alloc_flags.DEVICEMAP)
        array: np.ndarray = np.ndarray(shape, dtype, buffer=base)  # type: ignore[call-overload]
        array.view(np.uint8)[...] = 0xFF
        return array

    def room(self, address: object) -> int:
        """Bytes from an address to the end of the live allocation that holds it."""
        value = int(address)  # type: ignore[call-overload]
        for start, allocation in self.live.items():
            if start <= value < start + len(allocation.bytes):
                return start + len(allocation.bytes) - value
        raise AssertionError(f"{value:#x} is in no live allocation")

    def _copy(self, target: object, source: np.ndarray) -> None:
        self.check_current()
        assert source.nbytes <= self.room(target)
        ctypes.memmove(int(target), source.ctypes.data, source.nbytes)  # type: ignore[call-overload]

    def memcpy_htod_async(self, target: object, source: np.ndarray, stream: Stream) -> None:
        assert source.flags.c_contiguous
        assert source.nbytes <= self.room(target)
        # Pageable memory is staged before the call returns; page-locked memory is read when the copy happens.
        data = source if is_pinned(source) else source.copy()
        stream.put(lambda: self._copy(target, data))

    def memcpy_dtoh_async(self, target: np.ndarray, source: Allocation, stream: Stream) -> None:
        assert is_pinned(target)
        assert target.nbytes <= self.room(source)
        stream.put(lambda: ctypes.memmove(target.ctypes.data, int(source), target.nbytes))


class Binding:
    """inflight_edge.scoring._cuda on top of the double driver and the CPU build of the kernel."""

    def __init__(self, driver: Driver, library: ctypes.CDLL) -> None:
        self._driver, self._library = driver, library
        self.launches: list[np.ndarray] = []
        self.status = 0
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.captured = 0

    def groups(self, kind: int, n_rows: int, n_components: int) -> int:
        assert {type(kind), type(n_rows), type(n_components)} == {int}
        return int(self._library.ife_cuda_groups(kind, n_rows, n_components))

    def launch(self, params: int, features: int, logits: int, out: int, n_frames: int, stream: int) -> int:
        assert {type(value) for value in (params, features, logits, out, n_frames, stream)} == {int}
        if self.status:
            return self.status
        # The structs are passed by value at the launch.
        copy = np.frombuffer(ctypes.string_at(params, PARAMS.itemsize), PARAMS).copy()
        where = np.frombuffer(ctypes.string_at(out, OUT.itemsize), OUT).copy()
        self._check_addresses(copy[0], where[0], features, logits, n_frames)
        self.launches.append(copy[0])
        arguments = copy.ctypes.data, features, logits or None, where.ctypes.data, n_frames, None

        def work() -> None:
            status = self._library.ife_cuda_launch(*arguments)
            assert (status, copy.size, where.size) == (0, 1, 1)

        self._driver.streams[stream].put(work)
        return 0

    def _check_addresses(self, params: Any, out: Any, features: int, logits: int, n_frames: int) -> None:
        room, n_bytes = self._driver.room, GUARD.itemsize * int(params["n_guards"])
        assert n_frames == 0 or room(features) >= 4 * n_frames * int(params["n_features"])
        assert logits == 0 or room(logits) >= 4 * n_frames * int(params["n_classes"])
        assert room(out["verdicts"]) >= VERDICT.itemsize * n_frames
        assert room(out["log_likelihoods"]) >= 4 * n_frames * int(params["max_rows"])
        assert room(params["tickets"]) >= 4 * int(params["max_frames"])
        assert room(params["guards"]) >= n_bytes
        for guard in np.frombuffer(ctypes.string_at(int(params["guards"]), n_bytes), GUARD):
            n, m, r = (int(guard[name]) for name in ("n_features", "n_components", "n_rows"))
            triangle = n * (n + 1) // 2
            counts = {"offsets": r + 1, "classes": r, "mean": n, "scale": n, "centres": m * n, "constants": m}
            counts["whitener"] = (m * n, triangle, m * triangle)[guard["kind"]]
            counts["origin"] = n if guard["kind"] == 1 else 0
            for name, count in counts.items():
                address = int(guard[name])
                assert address % 16 == 0
                assert room(address) >= 4 * count if count else address == 0

    def preprocess(self, image: int, wanted: int, tensor: int, stream: int) -> int:
        assert {type(value) for value in (image, wanted, tensor, stream)} == {int}
        if self.status:
            return self.status
        frame = np.frombuffer(ctypes.string_at(image, IMAGE.itemsize), IMAGE).copy()
        size = np.frombuffer(ctypes.string_at(wanted, INPUT.itemsize), INPUT).copy()
        height, width, stride = (int(frame[name][0]) for name in ("height", "width", "stride"))
        row = width * (3 if frame["pixels"][0] in (1, 2) else 1)
        assert self._driver.room(frame["samples"][0]) >= (height - 1) * stride + row
        if frame["pixels"][0] == 3:
            assert self._driver.room(frame["chroma"][0]) >= (height // 2 - 1) * stride + row
        else:
            assert frame["chroma"][0] == 0
        n_numbers = int(size["channels"][0]) * int(size["height"][0]) * int(size["width"][0])
        assert self._driver.room(tensor) >= 4 * n_numbers
        arguments = frame.ctypes.data, size.ctypes.data, tensor, None

        def work() -> None:
            status = self._library.ife_cuda_preprocess(*arguments)
            assert (status, frame.size, size.size) == (0, 1, 1)

        self._driver.streams[stream].put(work)
        return 0

    def error_text(self, status: int) -> str:
        return f"text of {status}"

    def graph_capture(self, enqueue: Callable[[], None], stream: int) -> tuple[int, int, BaseException | None]:
        assert type(stream) is int
        target = self._driver.streams[stream]
        target.capturing = []
        try:
            enqueue()
        except Exception as error:  # noqa: BLE001  as the binding does: it comes back as a value
            target.capturing = None
            return 0, 999, error
        recorded, target.capturing = target.capturing, None
        self.captured += 1
        handle = 0x6000 + self.captured
        self.graphs[handle] = recorded
        return handle, 0, None

    def graph_launch(self, graph: int, stream: int) -> int:
        for work in self.graphs[graph]:
            self._driver.streams[stream].put(work)
        return 0

    def graph_destroy(self, graph: int) -> int:
        del self.graphs[graph]
        return 0
