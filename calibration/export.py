"""Classifier to ONNX with outputs logits and features, proved equal to torch before anything is written."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings

import numpy as np
import torch
from numpy.typing import NDArray

from inflight_edge.calibration.model import Classifier
from inflight_edge.engines.onnxruntime import OnnxRuntimeEngine
from inflight_edge.errors import ModelError

__all__ = ["PARITY_TOLERANCE", "check_parity", "export_onnx"]

PARITY_TOLERANCE = 1e-4


def export_onnx(classifier: Classifier) -> bytes:
    """ONNX file with input ``input`` (N, channels, H, W) and outputs ``logits`` (N, classes) and ``features`` (N, D).

    N is free unless the program was bound to a batch size that could not be lifted.  Raises ModelError.
    """
    example = torch.zeros(classifier.fixed_batch or 2, *classifier.input_shape)
    dynamic = None if classifier.fixed_batch else ({0: torch.export.Dim.DYNAMIC},)
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        # The exporter reports progress on standard output and warns about its own internals.
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                classifier.graph,
                (example,),
                dynamo=True,
                dynamic_shapes=dynamic,
                input_names=["input"],
                output_names=["logits", "features"],
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise ModelError(f"model: ONNX export failed ({str(error).strip().splitlines()[0]})") from error
    finally:
        logger.setLevel(level)
    assert program is not None
    buffer = io.BytesIO()
    program.save(buffer)
    return buffer.getvalue()


def check_parity(classifier: Classifier, model: bytes, inputs: NDArray[np.float32]) -> float:
    """Largest difference between torch and ONNX Runtime over inputs (N, channels, H, W), relative to 1 + |value|.

    Raises ModelError when it exceeds 1e-4.
    """
    engine = OnnxRuntimeEngine(model)
    with torch.inference_mode():
        expected = [output.numpy() for output in classifier(torch.from_numpy(inputs))]
    worst = 0.0
    for name, want, got in zip(("logits", "features"), expected, engine.run(inputs), strict=True):
        difference = float((np.abs(want - got) / (1.0 + np.abs(want))).max())
        if not difference <= PARITY_TOLERANCE:
            raise ModelError(
                f"model: {name} differ between torch and ONNX Runtime by {difference:.2g}, allowed {PARITY_TOLERANCE:g}; "
                "export the model in float32 and evaluation mode"
            )
        worst = max(worst, difference)
    return worst
