"""A TensorRT plan on one stream: buffers, engine, scorer, the way back, recorded as one CUDA graph.

Everything here runs in one thread, that of TensorRtEngine.  Checked through doubles of TensorRT and of the driver that
compute.  It has not run on a device.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from inflight_edge.engines import Wait
from inflight_edge.engines._signature import FLOAT, OUTPUTS, Declared, Signature
from inflight_edge.engines._tensorrt_library import expect, load_tensorrt
from inflight_edge.errors import DependencyError, EngineError, InflightError
from inflight_edge.guard import Guard
from inflight_edge.scoring.cuda import CudaScorer
from inflight_edge.scoring.device import Device, Memory
from inflight_edge.scoring.graph import CudaGraph, capture, load_binding
from inflight_edge.verdict import Verdict

if TYPE_CHECKING:
    import tensorrt as trt

__all__ = ["Session"]

FloatArray = NDArray[np.float32]


class Session:
    """A loaded plan; see TensorRtEngine for the arguments.

    signature  of the plan, with its fixed batch size B.    why_no_graph  "" when the work is launched as a graph.
    Raises EngineError, DependencyError, ScoreError when the driver refuses.
    """

    def __init__(
        self, plan: bytes, guards: Sequence[Guard], n_classes: int, index: int, memory: Memory, wait: Wait, graph: bool
    ) -> None:
        _, self._log = load_tensorrt()
        self._wait_kind = wait
        self._graph: CudaGraph | None = None
        self._event: Any = None
        self._scorer: CudaScorer | None = None
        self._runtime: trt.Runtime | None = None
        self._engine: trt.ICudaEngine | None = None
        self._context: trt.IExecutionContext | None = None
        self._device = Device(index, memory)
        try:
            with self._device.current():
                self._event = self._make_event()
                self._load(plan)
                self._allocate(guards, n_classes)
                self._bind()
            self._enqueue()  # once before the capture: TensorRT allocates in its first run
            self._wait()
            self.why_no_graph = self._capture() if graph else "it was switched off"
        except BaseException:
            self.close()
            raise

    def _load(self, plan: bytes) -> None:
        import tensorrt as trt

        self._runtime = trt.Runtime(self._log.logger)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise EngineError(f"plan: expected one that loads here, got: {self._log.take()}; compile again")
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise EngineError(f"plan: no execution context ({self._log.take()}); free memory of the GPU")
        for name, shape in _input_shapes(self._engine).items():
            expect(self._context.set_input_shape(name, shape), f"shape {shape} of {name}", self._log)
        if missing := self._context.infer_shapes():
            raise EngineError(f"plan: expected all shapes to follow from the input's, {', '.join(missing)} do not")
        self.signature = _signature(self._engine, self._context)

    def _allocate(self, guards: Sequence[Guard], n_classes: int) -> None:
        """Buffers of the plan's batch size, made once; the scorer works on the same stream."""
        signature = self.signature
        width = signature.n_classes, signature.n_features
        shapes = {signature.input_name: signature.input_shape, "logits": width[:1], "features": width[1:]}
        self._batch = signature.batch_size or 0
        if guards:
            if (n_classes, guards[0].n_features) != width:
                expected = f"{n_classes} classes and {guards[0].n_features} features"
                raise EngineError(f"plan: expected {expected} as the guards have, got {width}; compile this bundle")
            self._scorer = CudaScorer(guards, n_classes, max_frames=self._batch, device=self._device)
        self._buffers = {
            name: self._device.buffer((self._batch, *map(int, filter(None, shape))), np.float32)
            for name, shape in shapes.items()
        }
        self._input = self._buffers[signature.input_name]
        self._logits, self._features = (self._buffers[name] for name in OUTPUTS)

    def _bind(self) -> None:
        """Tell the context the addresses, once: none of the buffers moves."""
        assert self._context is not None
        for name, buffer in self._buffers.items():
            expect(self._context.set_tensor_address(name, buffer.address), f"address of {name}", self._log)

    def _enqueue(self) -> None:
        """Put one batch's work on the stream; returns at once.  Preprocessing on the GPU belongs in front of the
        engine, on the same stream, in the place of the copy: its output is self._input.address.
        """
        assert self._context is not None
        with self._device.current():
            self._input.to_device()
            if not self._context.execute_async_v3(self._device.stream):
                raise EngineError(f"tensorrt: the engine could not be enqueued: {self._log.take()}")
            if self._scorer is not None:
                self._scorer.enqueue(self._features.address, self._logits.address, self._input.host.shape[0])
            self._logits.to_host()
            self._features.to_host()

    def _capture(self) -> str:
        """Record the work; why it could not be, or ""."""
        try:
            self._graph = capture(self._device, load_binding(), self._enqueue)
            self._launch()
            self._wait()
        except InflightError as error:
            reason = str(error)
            self._drop_graph()
            if not isinstance(error, DependencyError):
                self._enqueue()  # raises when the stream is lost: then there is nothing to fall back to
                self._wait()
            return reason
        return ""

    def _launch(self) -> None:
        if self._graph is None:
            self._enqueue()
        else:
            self._graph.launch()

    def _make_event(self) -> Any:
        flags = self._device.driver.event_flags
        kinds: int = flags.DISABLE_TIMING | (flags.BLOCKING_SYNC if self._wait_kind == "blocking" else 0)
        return self._device.driver.Event(kinds)

    def _wait(self) -> None:
        with self._device.current():
            self._event.record(self._device.pycuda_stream)
            if self._wait_kind == "blocking":
                self._event.synchronize()
            else:
                while not self._event.query():
                    time.sleep(0)  # lets other threads of Python run

    def run(self, batch: FloatArray) -> tuple[FloatArray, FloatArray, list[Verdict]]:
        """Logits (B, C) and features (B, D) of exactly B frames, and their verdicts where there are guards."""
        # What is left of the last batch must not pass for an answer when the GPU wrote none.
        self._logits.host[...] = np.nan
        self._features.host[...] = np.nan
        if self._scorer is not None:
            self._scorer.forget()
        np.copyto(self._input.host, batch)
        self._launch()
        self._wait()
        scorer = self._scorer
        verdicts = [] if scorer is None else [scorer.verdict(i) for i in range(batch.shape[0])]
        return self._logits.host.copy(), self._features.host.copy(), verdicts

    def _drop_graph(self) -> None:
        graph, self._graph = self._graph, None
        if graph is not None:
            graph.close()

    def close(self) -> None:
        """Free everything, in the order of its making backwards; a second call does nothing."""
        try:
            self._drop_graph()
            if self._event is not None:
                with self._device.current():
                    try:
                        self._device.pycuda_stream.synchronize()
                    finally:  # they need the current context to go, whatever the stream says
                        self._event = self._context = self._engine = self._runtime = None
        finally:
            self._device.close()


def _input_shapes(engine: trt.ICudaEngine) -> dict[str, tuple[int, ...]]:
    """Shape of each input; the profile's largest where the plan leaves an axis open."""
    import tensorrt as trt

    shapes = {}
    for name in map(engine.get_tensor_name, range(engine.num_io_tensors)):
        if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
            shape = _axes(engine.get_tensor_shape(name))
            shapes[name] = _axes(engine.get_tensor_profile_shape(name, 0)[2]) if -1 in shape else shape
    return shapes


def _signature(engine: trt.ICudaEngine, context: trt.IExecutionContext) -> Signature:
    """What a plan declares, every axis fixed."""
    import tensorrt as trt

    found: dict[trt.TensorIOMode, list[Declared]] = {trt.TensorIOMode.INPUT: [], trt.TensorIOMode.OUTPUT: []}
    for name in map(engine.get_tensor_name, range(engine.num_io_tensors)):
        kind = engine.get_tensor_dtype(name)
        text = FLOAT if kind == trt.DataType.FLOAT else str(kind)
        found[engine.get_tensor_mode(name)].append(Declared(name, text, list(_axes(context.get_tensor_shape(name)))))
    signature = Signature.of(found[trt.TensorIOMode.INPUT], found[trt.TensorIOMode.OUTPUT])
    if None in (signature.batch_size, *signature.input_shape, signature.n_classes, signature.n_features):
        raise EngineError(f"plan: expected fixed shapes, got {signature}; compile it with inflight-edge")
    return signature


def _axes(shape: trt.Dims) -> tuple[int, ...]:
    return tuple(shape[axis] for axis in range(len(shape)))
