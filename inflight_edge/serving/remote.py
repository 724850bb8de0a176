"""A detector on a server, with the local Detector's interface; whatever the network does, no frame passes by it."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterable, Sequence
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from inflight_edge._contents import DECISIONS
from inflight_edge._optional import require
from inflight_edge.colour import check_frame
from inflight_edge.errors import EngineError, InflightError, OptionError
from inflight_edge.preprocess import Preprocess
from inflight_edge.verdict import Decision, Verdict

__all__ = ["RemoteDetector"]

_REMEDY = "pip install 'inflight-edge[serving]'"
_NUMBERS = {"decision": "INT32", "predicted": "INT32", "source": "INT32", "margin": "FP32"}
_SCHEMES = {"http": "http", "https": "http", "grpc": "grpc", "grpcs": "grpc"}
# What a client may try again: nobody listens, the server starts, stops, loads the model or is full.
_TRANSIENT = ("UNAVAILABLE", "503", "DEADLINE_EXCEEDED", "CANCELLED", "499")
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 1.0


class RemoteDetector:
    """Judges frames by an Inference Server that serves what export_repository wrote; fails closed.

    url      http://HOST:PORT, grpc://HOST:PORT, or https:// and grpcs:// with TLS.
    model    name of the ensemble, or of the single network.
    timeout  seconds that a request and all its repetitions may take, INVALID then; up to twice that over HTTP when a
             server takes the last one and says nothing.

    class_names: of the served bundle.  Any number of threads may call one object; each has its own connection.
    Raises OptionError, DependencyError without tritonclient, and EngineError when the server does not answer within
    ``timeout`` or serves something else.
    """

    def __init__(self, url: str, *, model: str = "inflight", timeout: float = 5.0) -> None:
        try:
            parts = urlsplit(url)
            known = parts.scheme in _SCHEMES and bool(parts.hostname) and parts.port is not None
        except ValueError:
            known = False
        if not known or parts.path not in ("", "/") or parts.query or parts.username is not None:
            raise OptionError(f"url: expected http://HOST:PORT, grpc://HOST:PORT, https:// or grpcs://, got {url!r}")
        if not 0.0 < timeout < 1e6:
            raise OptionError(f"timeout: expected seconds > 0, got {timeout}")
        self._address, self._secure = parts.netloc, parts.scheme in ("https", "grpcs")
        self._kind, self._model, self._timeout = _SCHEMES[parts.scheme], model, timeout
        self._library = require(f"tritonclient.{self._kind}", _REMEDY)
        server_error = require("tritonclient.utils", _REMEDY).InferenceServerException
        self._failures: tuple[type[Exception], ...] = (OSError, HTTPException, server_error)
        self._local = threading.local()
        config = self._retry(lambda client, seconds: self._config(client, seconds), time.monotonic() + timeout)
        try:
            values = {key: value["string_value"] for key, value in config["parameters"].items()}
            self.class_names = tuple(json.loads(values["class_names"]))
            constants = json.loads(values["preprocess"])
            self._preprocess = Preprocess(
                tuple(constants["input_shape"]), constants["scale"], tuple(constants["mean"]), tuple(constants["std"])
            )
            self._input, self._max_batch = config["input"][0]["name"], int(config["max_batch_size"])
            self._whole = config["input"][0]["data_type"] == "TYPE_UINT8"
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise EngineError(
                f"{url}: model {model}: expected one of `inflight-edge export-triton`, got another"
            ) from error

    def __call__(self, frame: NDArray[np.uint8]) -> Verdict:
        """Verdict on one frame, as Detector gives it.  INVALID instead of an exception."""
        return self.run([frame])[0]

    def run(self, frames: Iterable[NDArray[np.uint8]], *, batch_size: int = 32) -> list[Verdict]:
        """Verdicts on frames; those of one size in a row travel together, up to ``batch_size`` of them.

        Raises OptionError for a batch size below 1.
        """
        if batch_size < 1:
            raise OptionError(f"batch size: expected at least 1, got {batch_size}")
        prepared = [self._prepare(frame) for frame in frames]
        verdicts: list[Verdict] = []
        start = 0
        while start < len(prepared):
            first = prepared[start]
            if isinstance(first, Verdict):
                verdicts.append(first)
                start += 1
                continue
            group = [first]
            for item in prepared[start + 1 : start + min(batch_size, max(self._max_batch, 1))]:
                if isinstance(item, Verdict) or item.shape != first.shape:
                    break
                group.append(item)
            verdicts += self._judge(np.stack(group))
            start += len(group)
        return verdicts

    def _prepare(self, frame: NDArray[np.uint8]) -> NDArray[Any] | Verdict:
        """What travels of a frame: the frame itself, or the network's input where the server has the network alone."""
        try:
            if not self._whole:
                return self._preprocess(frame)
            checked = check_frame(frame, "rgb")
            return checked[:, :, None] if checked.ndim == 2 else checked
        except (InflightError, MemoryError) as error:
            return Verdict(Decision.INVALID, reason=f"{error}")

    def _judge(self, batch: NDArray[Any]) -> list[Verdict]:
        """Verdicts on a batch; all INVALID when the server gives none."""
        try:
            outputs = self._retry(
                lambda client, seconds: self._infer(client, batch, seconds), time.monotonic() + self._timeout
            )
            return self._read(outputs, len(batch))
        except InflightError as error:
            return [Verdict(Decision.INVALID, reason=str(error))] * len(batch)

    def _infer(self, client: Any, batch: NDArray[Any], seconds: float) -> dict[str, NDArray[Any]]:
        library = self._library
        tensor = library.InferInput(self._input, list(batch.shape), "UINT8" if self._whole else "FP32")
        tensor.set_data_from_numpy(np.ascontiguousarray(batch))
        names = [*_NUMBERS, "log_likelihoods", *(["reason"] if self._whole else [])]
        wanted = [library.InferRequestedOutput(name) for name in names]
        if self._kind == "grpc":
            result = client.infer(self._model, [tensor], outputs=wanted, client_timeout=seconds)
        else:  # the server's queue gives it up when the client would; the connection has its own limit, see _client
            result = client.infer(self._model, [tensor], outputs=wanted, timeout=int(seconds * 1e6))
        return {name: result.as_numpy(name) for name in names}

    def _config(self, client: Any, seconds: float) -> dict[str, Any]:
        if self._kind == "grpc":
            config: dict[str, Any] = client.get_model_config(self._model, as_json=True, client_timeout=seconds)[
                "config"
            ]
            return config
        answer: dict[str, Any] = client.get_model_config(self._model)
        return answer

    def _client(self) -> Any:
        client = getattr(self._local, "client", None)
        if client is None:
            options: dict[str, Any] = {"ssl": self._secure}
            if self._kind == "http":
                options |= {"connection_timeout": self._timeout, "network_timeout": self._timeout}
            client = self._local.client = self._library.InferenceServerClient(self._address, **options)
        return client

    def _forget(self) -> None:
        """Drop this thread's connection: it may hold half an answer."""
        client = getattr(self._local, "client", None)
        self._local.client = None
        if client is not None:
            client.close()

    def _retry(self, call: Any, deadline: float) -> Any:
        """``call(client, seconds left)`` until it succeeds, fails for good, or the deadline passes.  EngineError then."""
        pause = _FIRST_PAUSE_S
        while True:
            try:
                return call(self._client(), max(deadline - time.monotonic(), 0.001))
            except (AttributeError, KeyError, TypeError, ValueError) as error:  # an answer that is none
                self._forget()
                raise EngineError(f"{self._address}: expected an answer of the served model, got another") from error
            except self._failures as error:
                text = " ".join(str(error).split())[:300] or type(error).__name__
                status = error.status() if hasattr(error, "status") else "UNAVAILABLE"
                self._forget()
                wait = pause * (0.5 + random.random())
                late = time.monotonic() + wait > deadline
                if late or not any(word in str(status) for word in _TRANSIENT):
                    tried = f" (tried for {self._timeout:g} s)" if late else ""
                    raise EngineError(f"{self._address}: {text}{tried}") from error
                time.sleep(wait)
                pause = min(2 * pause, _LONGEST_PAUSE_S)

    def _read(self, outputs: dict[str, NDArray[Any]], n_frames: int) -> list[Verdict]:
        """Verdicts from a server's answer, once it is one."""
        for name, kind in _NUMBERS.items():
            wanted = np.float32 if kind == "FP32" else np.int32
            _expect(name, outputs[name], (n_frames, 1), wanted)
        _expect("log_likelihoods", outputs["log_likelihoods"], (n_frames, len(self.class_names)), np.float32)
        columns = [outputs[name][:, 0].tolist() for name in _NUMBERS]
        reasons = [""] * n_frames
        if "reason" in outputs:
            _expect("reason", outputs["reason"], (n_frames, 1), np.object_)
            reasons = [bytes(text).decode("utf-8", "replace") for text in outputs["reason"][:, 0]]
        rows: Sequence[NDArray[np.float32]] = list(outputs["log_likelihoods"])
        return [self._verdict(*values) for values in zip(*columns, rows, reasons, strict=True)]

    def _verdict(
        self, code: int, predicted: int, source: int, margin: float, row: NDArray[np.float32], reason: str
    ) -> Verdict:
        n_classes = len(self.class_names)
        decision = DECISIONS[code] if 0 <= code < len(DECISIONS) else Decision.INVALID
        classes = np.flatnonzero(~np.isnan(row)).astype(np.int32)
        known = 0 <= predicted < n_classes
        consistent = {
            Decision.ACCEPT: known and margin < 0.0,
            Decision.TRIGGER: known and 0 <= source < n_classes,
            Decision.UNGUARDED: known,
            Decision.INVALID: True,
        }[decision]
        label = predicted if known else None
        if decision is Decision.INVALID or not consistent:
            reason = reason or (
                "the server could not judge the frame" if consistent else "the server's answer contradicts itself"
            )
            return Verdict(Decision.INVALID, label, reason=reason)
        return Verdict(decision, label, None if source < 0 else source, margin, row[classes], classes)


def _expect(name: str, array: object, shape: tuple[int, ...], dtype: type[np.generic]) -> None:
    if not isinstance(array, np.ndarray) or array.shape != shape or array.dtype != dtype:
        got = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "nothing"
        raise EngineError(f"server: {name}: expected {np.dtype(dtype)} {shape}, got {got}")
