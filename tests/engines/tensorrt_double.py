"""A double of the ``tensorrt`` module that really computes, by ONNX Runtime on host memory; nothing here is a test.

It stands on the double of pycuda (driver_double): device memory is host memory that the stream's work alone touches, and
that work happens when somebody waits for it.  What the real library refuses or forgives silently is refused here:
a network that is not strongly typed, axes without profile, an engine that is run before shapes and addresses are set,
addresses outside live allocations or not aligned, the default stream, a foreign stream, a capture before the first run,
objects that are used after what they need is gone.
"""

from __future__ import annotations

import ctypes
import enum
import json
import weakref
from importlib.machinery import ModuleSpec
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
from driver_double import Driver

_MAGIC = b"plan of the double\n"
_ALIGNMENT = 256


class Severity(enum.Enum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class ILogger:
    Severity = Severity

    def __init__(self) -> None:
        self.is_made = True

    def log(self, severity: Severity, msg: str) -> None:
        raise NotImplementedError


class TensorIOMode(enum.Enum):
    NONE = 0
    INPUT = 1
    OUTPUT = 2


class DataType(enum.Enum):
    FLOAT = 0
    HALF = 1


class HostMemory(bytes):
    """IHostMemory: a buffer."""

    @property
    def nbytes(self) -> int:
        return len(self)


class Flag(enum.IntEnum):
    STRONGLY_TYPED = 1


class BuilderFlag(enum.IntEnum):
    TF32 = 7


class MemoryPoolType(enum.Enum):
    WORKSPACE = 0


class TimingCache:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def serialize(self) -> HostMemory:
        return HostMemory(self.data)


class Config:
    def __init__(self, library: TensorRt) -> None:
        self._library = library
        self.flags = {BuilderFlag.TF32}  # on unless cleared
        self.builder_optimization_level = 3
        self.workspace: int | None = None
        self.cache: TimingCache | None = None
        self.profiles: list[Profile] = []

    def clear_flag(self, flag: BuilderFlag) -> None:
        self.flags.discard(flag)

    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
        assert pool is MemoryPoolType.WORKSPACE
        self.workspace = pool_size

    def create_timing_cache(self, serialized_timing_cache: bytes) -> TimingCache | None:
        assert type(serialized_timing_cache) is bytes
        return None if serialized_timing_cache == b"damaged" else TimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        assert ignore_mismatch is False
        mine = f"cache {self._library.__version__} {self._library.driver.name}".encode()
        if cache.data not in (b"", mine):
            self._library.error("timing cache of another device")
            return False
        self._library.timing_hits += cache.data == mine
        self.cache = TimingCache(mine)
        return True

    def get_timing_cache(self) -> TimingCache:
        assert self.cache is not None
        return self.cache

    def add_optimization_profile(self, profile: Profile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, list[list[int]]] = {}

    def set_shape(self, name: str, *shapes: list[int]) -> None:
        assert len(shapes) == 3
        self.shapes[name] = [list(map(int, shape)) for shape in shapes]


class Network:
    def __init__(self, flags: int) -> None:
        self.flags = flags
        self.model: onnx.ModelProto | None = None

    def get_input(self, index: int) -> Any:
        assert self.model is not None
        value = self.model.graph.input[index]
        return SimpleNamespace(name=value.name, shape=axes(value), dtype=DataType.FLOAT)


class Parser:
    """Reads ONNX, and holds it to what TensorRT takes beyond the standard."""

    def __init__(self, library: TensorRt, network: Network, logger: ILogger) -> None:
        library.check_logger(logger)
        self._network, self._errors = network, list[str]()

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> Any:
        return SimpleNamespace(desc=lambda: self._errors[index])

    def parse(self, model: bytes) -> bool:
        assert type(model) is bytes
        try:
            proto = onnx.load_from_string(model)
            onnx.checker.check_model(proto, full_check=True)
        except Exception as error:  # noqa: BLE001  whatever the reader of ONNX raises
            self._errors.append(f"Failed to parse\n{str(error)[:50]}")
            return False
        self._errors += unsupported(proto)
        self._network.model = proto
        return not self._errors


def unsupported(model: onnx.ModelProto) -> list[str]:
    """What TensorRT refuses of quantised networks: zero points, and int32 behind DequantizeLinear."""
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    problems = []
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero = tensors.get(node.input[2], np.ones(1)) if len(node.input) > 2 else np.zeros(1, np.int8)
            if zero.dtype != np.int8 or zero.any():
                problems.append(f"{node.name}: zero point of {node.op_type} must be 0 in int8")
            if node.input[0] in tensors and tensors[node.input[0]].dtype == np.int32:
                problems.append(f"{node.name}: int32 is not supported")
    return problems


class Builder:
    def __init__(self, library: TensorRt, logger: ILogger) -> None:
        library.check_logger(logger)
        library.driver.check_current()
        self._library = library

    def create_network(self, flags: int = 0) -> Network:
        assert type(flags) is int
        return Network(flags)

    def create_builder_config(self) -> Config:
        return Config(self._library)

    def create_optimization_profile(self) -> Profile:
        return Profile()

    def build_serialized_network(self, network: Network, config: Config) -> HostMemory | None:
        library = self._library
        library.driver.check_current()
        assert network.model is not None, "nothing was parsed"
        assert network.flags == 1 << int(Flag.STRONGLY_TYPED), "a network that is not strongly typed"
        assert config.cache is not None
        library.configs.append(config)
        if config.workspace is not None and config.workspace < library.needed_workspace:
            library.error(f"Could not find any implementation: workspace of {config.workspace} bytes")
            return None
        image = network.model.graph.input[0]
        if -1 in axes(image) and not any(image.name in profile.shapes for profile in config.profiles):
            library.error(f"Network has dynamic inputs, but no optimization profile: {image.name}")
            return None
        profile = config.profiles[0].shapes if config.profiles else {}
        head = {"version": library.__version__, "capability": library.driver.capability, "profile": profile}
        head["tf32"] = BuilderFlag.TF32 in config.flags
        model = network.model if library.change is None else library.change(network.model)
        return HostMemory(_MAGIC + json.dumps(head).encode() + b"\n" + model.SerializeToString())


class Runtime:
    def __init__(self, library: TensorRt, logger: ILogger) -> None:
        library.check_logger(logger)
        library.driver.check_current()
        self._library = library

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> Engine | None:
        library = self._library
        library.driver.check_current()
        if not bytes(serialized_engine).startswith(_MAGIC):
            library.error("Serialization assertion magicTagRead == kMAGIC_TAG failed")
            return None
        head, _, model = bytes(serialized_engine)[len(_MAGIC) :].partition(b"\n")
        described = json.loads(head)
        if (described["version"], tuple(described["capability"])) != (library.__version__, library.driver.capability):
            library.error("The engine plan file was generated on an incompatible device or version")
            return None
        return Engine(library, self, model, described["profile"])


class Engine:
    def __init__(self, library: TensorRt, runtime: Runtime, model: bytes, profile: dict[str, Any]) -> None:
        import onnxruntime

        self.library, self.profile = library, profile
        self.runtime = weakref.ref(runtime)  # the caller keeps it: the real one may be gone too
        proto = onnx.load_from_string(model)
        self.session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        self.shapes = {value.name: axes(value) for value in (*proto.graph.input, *proto.graph.output)}
        self.inputs = [value.name for value in proto.graph.input]

    @property
    def num_io_tensors(self) -> int:
        return len(self.shapes)

    def get_tensor_name(self, index: int) -> str:
        return list(self.shapes)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def get_tensor_dtype(self, name: str) -> DataType:
        assert name in self.shapes
        return self.library.output_type

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        assert profile_index == 0
        return [tuple(shape) for shape in self.profile[name]]

    def create_execution_context(self) -> Context | None:
        self.library.driver.check_current()
        assert self.runtime() is not None, "the runtime is gone"
        if self.library.needed_memory > self.library.driver.memory_limit:
            self.library.error("Requested amount of GPU memory could not be allocated: OutOfMemory")
            return None
        return Context(self)


class Context:
    def __init__(self, engine: Engine) -> None:
        self._engine = weakref.ref(engine)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._ran = False
        engine.library.contexts.append(self)

    def _alive(self) -> Engine:
        engine = self._engine()
        assert engine is not None, "the engine is gone"
        engine.library.driver.check_current()
        return engine

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        engine = self._alive()
        declared = engine.shapes[name]
        fits = len(shape) == len(declared) and all(d in (-1, s) for d, s in zip(declared, shape, strict=True))
        if name in engine.profile:
            lowest, _, highest = engine.profile[name]
            fits = fits and all(a <= s <= b for a, s, b in zip(lowest, shape, highest, strict=True))
        if not fits:
            engine.library.error(f"{name}: shape {shape} is outside the profile")
            return False
        self._shapes[name] = tuple(shape)
        return True

    def infer_shapes(self) -> list[str]:
        engine = self._alive()
        return [name for name in engine.inputs if name not in self._shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        engine = self._alive()
        batch = self._shapes[engine.inputs[0]][0] if engine.inputs[0] in self._shapes else -1
        return self._shapes.get(name) or tuple(batch if axis == -1 else axis for axis in engine.shapes[name])

    def set_tensor_address(self, name: str, memory: int) -> bool:
        engine = self._alive()
        assert type(memory) is int
        if name not in engine.shapes or memory % _ALIGNMENT:
            engine.library.error(f"{name}: address {memory:#x} is refused")
            return False
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        engine = self._alive()
        library, driver = engine.library, engine.library.driver
        assert type(stream_handle) is int
        assert stream_handle != 0, "the default stream"
        stream = driver.streams[stream_handle]
        if library.fail_enqueue(stream.capturing is not None):
            library.error("enqueueV3: Cask error")
            return False
        if self.infer_shapes() or set(self._addresses) != set(engine.shapes):
            library.error("enqueueV3: shapes or addresses are not set")
            return False
        if stream.capturing is not None and not self._ran:
            library.error("enqueueV3: operation not permitted when stream is capturing")
            return False
        self._ran = True
        addresses = dict(self._addresses)
        sizes = {name: 4 * int(np.prod(self.get_tensor_shape(name))) for name in engine.shapes}
        for name, address in addresses.items():
            assert driver.room(address) >= sizes[name], f"{name}: its memory is gone or too small"

        del engine  # a recorded run does not keep it either

        def work() -> None:
            engine = self._alive()
            for name, address in addresses.items():
                assert driver.room(address) >= sizes[name], f"{name}: its memory is gone or too small"
            inputs = {}
            for name in engine.inputs:
                data = ctypes.string_at(addresses[name], sizes[name])
                inputs[name] = np.frombuffer(data, np.float32).reshape(self._shapes[name])
            names = [name for name in engine.shapes if name not in engine.inputs]
            for name, array in zip(names, engine.session.run(names, inputs), strict=True):
                ctypes.memmove(addresses[name], np.ascontiguousarray(array).ctypes.data, sizes[name])
            library.runs += 1

        stream.put(work)
        return True


class TensorRt:
    """The module.  needed_workspace, needed_memory: bytes below which building or running fails."""

    ILogger = ILogger
    TensorIOMode = TensorIOMode
    DataType = DataType
    NetworkDefinitionCreationFlag = Flag
    BuilderFlag = BuilderFlag
    MemoryPoolType = MemoryPoolType

    def __init__(self, driver: Driver, version: str = "10.3.0") -> None:
        self.__version__, self.driver = version, driver
        self.__spec__ = ModuleSpec("tensorrt", None)  # libraries ask whether there is such a module
        self.needed_workspace = self.needed_memory = 0
        self.timing_hits = self.runs = 0
        self.configs: list[Config] = []
        self.contexts: list[Context] = []
        self.change: Any = None  # of the model, in a build
        self.output_type = DataType.FLOAT
        self.failing = {"run": False, "capture": False}
        self._logger: ILogger | None = None

    def fail_enqueue(self, capturing: bool) -> bool:
        return self.failing["capture" if capturing else "run"]

    def check_logger(self, logger: ILogger) -> None:
        assert isinstance(logger, ILogger)
        assert logger.is_made, "ILogger.__init__ was not called"
        self._logger = self._logger or logger
        assert self._logger is logger, "another logger than the first"

    def error(self, text: str) -> None:
        assert self._logger is not None
        self._logger.log(Severity.ERROR, text)

    def Builder(self, logger: ILogger) -> Builder:  # noqa: N802  TensorRT's name
        return Builder(self, logger)

    def Runtime(self, logger: ILogger) -> Runtime:  # noqa: N802
        return Runtime(self, logger)

    def OnnxParser(self, network: Network, logger: ILogger) -> Parser:  # noqa: N802
        return Parser(self, network, logger)


def axes(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    """Axes of an input or output, -1 where free."""
    return tuple(axis.dim_value if axis.HasField("dim_value") else -1 for axis in value.type.tensor_type.shape.dim)
