"""Which engine runs the model of a bundle here, made by name."""

from __future__ import annotations

from pathlib import Path

from inflight_edge.bundle import Bundle
from inflight_edge.engines import Engine, EngineOptions
from inflight_edge.engines.onnxruntime import OnnxRuntimeEngine
from inflight_edge.engines.openvino import OpenVinoEngine
from inflight_edge.engines.plans import identity_here, plan_path, read_plan
from inflight_edge.engines.tensorrt import TensorRtEngine
from inflight_edge.errors import BundleError, OptionError
from inflight_edge.scoring.device import Device

__all__ = ["ENGINES", "close_engine", "make_engine"]

ENGINES = ("onnxruntime", "openvino", "tensorrt")


def make_engine(
    bundle: Bundle,
    name: str,
    *,
    threads: int | None = None,
    options: EngineOptions | None = None,
    judging: bool = False,
) -> Engine:
    """Engine ``name`` for the model of a bundle; judging: with its guards, for an engine that makes verdicts itself.

    Raises OptionError for an unknown name, DependencyError, EngineError, and BundleError where the model's
    declared shapes contradict the bundle.
    """
    if name not in ENGINES:
        raise OptionError(f"engine: expected one of {', '.join(ENGINES)}, got {name!r}")
    options = options or EngineOptions()
    options.check(name)
    engine: OnnxRuntimeEngine | OpenVinoEngine | TensorRtEngine
    if name == "onnxruntime":
        engine = OnnxRuntimeEngine(
            bundle.model, threads=threads, arena=options.arena, optimisation=options.optimisation
        )
    elif name == "openvino":
        engine = OpenVinoEngine(bundle.model, threads=threads)
    else:
        if threads is not None:
            raise OptionError(f"threads: expected none for tensorrt, which runs on the GPU, got {threads!r}")
        engine = _tensorrt(bundle, options, judging)
    declared = {
        "logits": (engine.n_classes, len(bundle.class_names)),
        "features": (engine.n_features, bundle.n_features),
        **{
            f"input {axis}": sizes
            for axis, *sizes in zip(
                ("channels", "height", "width"), engine.input_shape, bundle.preprocess.input_shape, strict=True
            )
        },
    }
    for what, (got, expected) in declared.items():
        if got is not None and got != expected:
            raise BundleError(f"model.onnx: {what}: expected {expected} as in the bundle, got {got}; calibrate again")
    return engine


def close_engine(engine: Engine) -> None:
    """Free what an engine holds on a GPU; one on the CPU holds nothing."""
    if isinstance(engine, TensorRtEngine):
        engine.close()


def _tensorrt(bundle: Bundle, options: EngineOptions, judging: bool) -> TensorRtEngine:
    """The engine on the plan that was compiled here for the bundle's model."""
    device = Device()
    try:
        identity = identity_here(bundle.model, bundle.precision, device)
    finally:
        device.close()
    path = plan_path(bundle.model, bundle.precision) if options.plan is None else Path(options.plan)
    return TensorRtEngine(
        read_plan(path, identity),
        guards=bundle.guards if judging else (),
        n_classes=len(bundle.class_names),
        memory=options.memory,
        wait=options.wait,
        graph=options.graph,
    )
