"""ONNX to plan, on the device: strongly typed, so that the precision is what the ONNX file says and nothing else.

Checked through doubles of TensorRT and of the driver that compute.  It has not run on a device.
"""

from __future__ import annotations

from dataclasses import dataclass

from inflight_edge.engines._tensorrt_library import Log, expect, load_tensorrt
from inflight_edge.errors import EngineError, OptionError
from inflight_edge.scoring.device import Device

__all__ = ["MAX_BATCH", "BuildOptions", "build_plan"]

MAX_BATCH = 1024
_MAX_LEVEL = 5


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """batch: frames at once, fixed.  workspace: bytes that a layer may use, None for TensorRT's own limit.
    level: 0 to 5, how long TensorRT looks for fast kernels.
    """

    batch: int = 1
    workspace: int | None = None
    level: int = 3

    def __post_init__(self) -> None:
        limits = {"batch": (1, MAX_BATCH), "level": (0, _MAX_LEVEL), "workspace": (1 << 20, 1 << 40)}
        for name, (lowest, highest) in limits.items():
            value = getattr(self, name)
            if value is None and name == "workspace":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
                raise OptionError(f"{name}: expected an integer from {lowest} to {highest}, got {value!r}")


def build_plan(model: bytes, device: Device, options: BuildOptions, timing_cache: bytes) -> tuple[bytes, bytes]:
    """Plan and the timing cache as the build leaves it; an empty or foreign cache is replaced.

    Takes seconds to minutes.  Raises EngineError with TensorRT's reason, DependencyError without TensorRT.
    """
    _, log = load_tensorrt()
    with device.current():
        return _build(model, options, timing_cache, log)


def _build(model: bytes, options: BuildOptions, timing_cache: bytes, log: Log) -> tuple[bytes, bytes]:
    import tensorrt as trt

    log.take()
    builder = trt.Builder(log.logger)
    # Its place among the flags moved between versions; from 11 on all networks are strongly typed.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log.logger)
    if not parser.parse(model):
        reasons = [" ".join(parser.get_error(i).desc().split())[:300] for i in range(parser.num_errors)]
        raise EngineError(f"model: TensorRT cannot read it: {'; '.join(reasons) or log.take()}; choose another engine")
    config = builder.create_builder_config()
    # TF32 has 10 bits of mantissa: float32 in the bundle means float32 here.
    config.clear_flag(trt.BuilderFlag.TF32)
    config.builder_optimization_level = options.level
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    cache = config.create_timing_cache(timing_cache)
    if cache is None or not config.set_timing_cache(cache, False):  # damaged, or of another GPU or version
        cache = config.create_timing_cache(b"")
        expect(config.set_timing_cache(cache, False), "an empty timing cache", log)
    image = network.get_input(0)
    shape = [image.shape[axis] for axis in range(len(image.shape))]
    if -1 in shape[1:] or (shape[0] != options.batch and shape[0] != -1):
        raise EngineError(
            f"model: expected a batch of {options.batch} and fixed sizes, got {shape}; "
            f"{'compile with --batch ' + str(shape[0]) if -1 not in shape else 'export it with fixed sizes'}"
        )
    if shape[0] == -1:
        profile = builder.create_optimization_profile()
        # The smallest is one frame: an Inference Server fills batches as frames come; the engine here always sends all.
        least, fixed = [1, *shape[1:]], [options.batch, *shape[1:]]
        profile.set_shape(image.name, least, fixed, fixed)
        if config.add_optimization_profile(profile) < 0:
            raise EngineError(f"model: TensorRT refuses the input shape {fixed}: {log.take()}")
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(
            f"model: TensorRT cannot build it: {log.take()}; out of memory: give less with --workspace or end other "
            "programs; an int8 or fp16 layer that this GPU lacks: compile another --precision"
        )
    return bytes(plan), bytes(config.get_timing_cache().serialize())
