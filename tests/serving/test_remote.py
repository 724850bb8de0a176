"""The client against a server that answers wrongly; the real one is in test_server."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

import numpy as np
import pytest
from bundles import CLASS_NAMES, CLEAN_WEST, frame

from inflight_edge import Decision, EngineError, OptionError
from inflight_edge.serving import RemoteDetector

CONFIG = {
    "parameters": {
        "class_names": {"string_value": json.dumps(CLASS_NAMES)},
        "preprocess": {
            "string_value": json.dumps({"input_shape": [1, 2, 2], "scale": 1 / 255, "mean": [0.0], "std": [1.0]})
        },
    },
    "input": [{"name": "frame", "data_type": "TYPE_UINT8"}],
    "max_batch_size": 4,
}
GOOD = {"decision": 0, "predicted": 3, "source": -1, "margin": -2.0}


class Answers:
    """Stands for tritonclient's client: answers what it was made with, or raises it."""

    def __init__(self, *answers: Any, config: Any = CONFIG) -> None:
        self.answers, self.config, self.sizes, self.closed = list(answers), config, [], 0

    def get_model_config(self, name: str) -> Any:
        return self.config

    def infer(self, model: str, inputs: list[Any], *, outputs: list[Any], timeout: int) -> Any:
        (tensor,) = inputs
        self.sizes.append(tensor.shape()[0])
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        n = tensor.shape()[0]
        arrays = {
            name: np.full((n, 1), value, np.float32 if name == "margin" else np.int32)
            for name, value in (GOOD | answer).items()
            if not isinstance(value, np.ndarray)
        }
        arrays |= {"log_likelihoods": np.zeros((n, 4), np.float32), "reason": np.full((n, 1), b"", np.object_)}
        arrays |= {name: value for name, value in answer.items() if isinstance(value, np.ndarray)}

        class Result:
            def as_numpy(self, name: str) -> Any:
                return arrays.get(name)

        return Result()

    def close(self) -> None:
        self.closed += 1


def remote(monkeypatch: pytest.MonkeyPatch, answers: Answers, timeout: float = 1.0) -> RemoteDetector:
    monkeypatch.setattr(RemoteDetector, "_client", lambda self: answers)
    return RemoteDetector("http://127.0.0.1:8000", timeout=timeout)


def error(text: str, status: str) -> Exception:
    from tritonclient.utils import InferenceServerException

    return InferenceServerException(text, status)


def test_a_good_answer_is_a_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = remote(monkeypatch, Answers({}))(CLEAN_WEST)
    assert (verdict.decision, verdict.predicted, verdict.source, verdict.margin) == (Decision.ACCEPT, 3, None, -2.0)
    assert verdict.classes.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({"margin": 0.0}, "contradicts itself"),
        ({"margin": np.nan}, "contradicts itself"),
        ({"predicted": 4}, "contradicts itself"),
        ({"predicted": -1}, "contradicts itself"),
        ({"decision": 1, "source": -1}, "contradicts itself"),
        ({"decision": 1, "source": 9}, "contradicts itself"),
        ({"decision": 2, "predicted": 7}, "contradicts itself"),
        ({"decision": 4}, "could not judge"),
        ({"decision": -1}, "could not judge"),
        ({"decision": 3, "predicted": -1}, "could not judge"),
        ({"decision": np.zeros((1, 1), np.float32)}, r"decision: expected int32 \(1, 1\), got float32"),
        ({"decision": np.zeros((2, 1), np.int32)}, r"decision: expected int32 \(1, 1\), got int32 \(2, 1\)"),
        ({"log_likelihoods": np.zeros((1, 5), np.float32)}, r"log_likelihoods: expected float32 \(1, 4\)"),
    ],
)
def test_an_answer_that_cannot_be_right_is_invalid(
    monkeypatch: pytest.MonkeyPatch, answer: dict[str, Any], reason: str
) -> None:
    import re

    verdict = remote(monkeypatch, Answers(answer))(CLEAN_WEST)
    assert verdict.decision is Decision.INVALID
    assert not verdict.passes
    assert re.search(reason, verdict.reason)


@pytest.mark.parametrize("reason", [None, np.zeros((1, 1), np.int32), np.zeros((2, 1), np.object_)])
def test_reasons_that_are_none_are_invalid(monkeypatch: pytest.MonkeyPatch, reason: Any) -> None:
    answers = Answers({"reason": reason} if reason is not None else {})
    if reason is None:
        monkeypatch.setattr(Answers, "infer", lambda *_, **__: object())
    assert remote(monkeypatch, answers)(CLEAN_WEST).decision is Decision.INVALID


@pytest.mark.parametrize(
    "failure",
    [
        ConnectionRefusedError("refused"),
        TimeoutError("timed out"),
        error("server is starting", "503"),
        error("unavailable", "StatusCode.UNAVAILABLE"),
    ],
    ids=["refused", "timeout", "503", "unavailable"],
)
def test_a_passing_failure_is_tried_again_on_a_new_connection(
    monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    answers = Answers(failure, failure, {})
    assert remote(monkeypatch, answers)(CLEAN_WEST).decision is Decision.ACCEPT
    assert len(answers.sizes) == 3


def test_a_lasting_failure_ends_in_time_as_invalid(monkeypatch: pytest.MonkeyPatch) -> None:
    detector = remote(monkeypatch, Answers(ConnectionRefusedError("nobody listens")), timeout=0.3)
    started = time.monotonic()
    verdicts = detector.run([CLEAN_WEST, frame(1, 2, 3, 4)])
    assert time.monotonic() - started < 1.0
    assert [verdict.decision for verdict in verdicts] == [Decision.INVALID] * 2
    assert verdicts[0].reason == "127.0.0.1:8000: nobody listens (tried for 0.3 s)"


def test_a_refusal_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = Answers(error("frame: expected 1 channels", "400"))
    verdict = remote(monkeypatch, answers)(CLEAN_WEST)
    assert verdict.decision is Decision.INVALID
    assert "frame: expected 1 channels" in verdict.reason
    assert len(answers.sizes) == 1


def test_frames_of_one_size_travel_together_within_the_servers_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = Answers({})
    wide = np.zeros((2, 4), np.uint8)
    verdicts = remote(monkeypatch, answers).run([CLEAN_WEST] * 6 + [wide] * 2 + [CLEAN_WEST])
    assert answers.sizes == [4, 2, 2, 1]
    assert len(verdicts) == 9


def test_a_server_of_something_else_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for config in ({}, {"parameters": {}}, {**CONFIG, "input": []}, {**CONFIG, "parameters": {"class_names": 3}}):
        with pytest.raises(EngineError, match="model inflight: expected one of `inflight-edge export-triton`"):
            remote(monkeypatch, Answers({}, config=config))


def test_no_server_is_one_error_in_time() -> None:
    started = time.monotonic()
    for scheme in ("http", "grpc"):
        with pytest.raises(EngineError, match=r"127\.0\.0\.1:9: .*tried for 0.3 s"):
            RemoteDetector(f"{scheme}://127.0.0.1:9", timeout=0.3)
    assert time.monotonic() - started < 6


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_a_server_that_says_nothing_is_given_up(scheme: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        with pytest.raises(EngineError, match=r"tried for 0\.5 s"):
            RemoteDetector(f"{scheme}://127.0.0.1:{silent.getsockname()[1]}", timeout=0.5)
        assert time.monotonic() - started < 4


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "http://127.0.0.1", "ftp://a:1", "http://a:x", "http://u:p@a:1", "http://a:1/path", ""]
)
def test_bad_url_is_refused(url: str) -> None:
    with pytest.raises(OptionError, match="url: expected http://HOST:PORT"):
        RemoteDetector(url)


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_timeout_is_refused(timeout: float) -> None:
    with pytest.raises(OptionError, match="timeout: expected seconds > 0"):
        RemoteDetector("http://a:1", timeout=timeout)
