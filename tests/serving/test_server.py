"""The repository in the real server: the same verdicts, many clients, exchange of guards, bad requests, overload, death."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import CLEAN_WEST, TRIGGERED_NORTH, tiny_guard, tiny_self_test, written
from triton_server import Server, missing, python_path, serving

from inflight_edge import Decision, Detector, EngineError, Verdict, read_bundle
from inflight_edge.serving import Queue, RemoteDetector, export_guards, export_repository

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(bool(missing()), reason=missing() or "-"),
    # tritonclient closes itself once more when it is collected, by then in a thread that may have no gevent loop any more;
    # what the finalisers of both print has no common text.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
N_FRAMES, N_CLIENTS = 500, 16


@pytest.fixture(autouse=True)
def benchmarks_are_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle, and its repository with both forms."""
    folder = tmp_path_factory.mktemp("served")
    bundle = written(folder / "bundle")
    for form, name in (("ensemble", "inflight"), ("single", "whole")):
        export_repository(
            bundle, folder / "repository", form=form, name=name, runtime="python", python_path=python_path()
        )
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with serving(folder / "repository", "inflight", "whole") as server:
        yield server


@pytest.fixture(scope="module")
def local(folder: Path) -> Detector:
    return Detector.load(folder / "bundle")


def some_frames(n: int, seed: int = 0) -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
    """Frames of many sizes, grey; clean and triggered ones among them."""
    rng = np.random.default_rng(seed)
    sizes = [(2, 2), (2, 2, 1), (5, 7), (2, 2), (48, 64, 1)]
    frames = [rng.integers(0, 256, sizes[i % len(sizes)], dtype=np.uint8) for i in range(n)]
    return [CLEAN_WEST if i % 7 == 0 else TRIGGERED_NORTH if i % 7 == 3 else frame for i, frame in enumerate(frames)]


def same(one: Verdict, two: Verdict) -> bool:
    return (
        (one.decision, one.predicted, one.source) == (two.decision, two.predicted, two.source)
        and (one.classes.tolist() == two.classes.tolist())
        and bool(np.allclose(one.log_likelihoods, two.log_likelihoods, rtol=1e-4, atol=1e-3))
        and bool(np.isclose(one.margin, two.margin, rtol=1e-4, atol=1e-3, equal_nan=True))
    )


@pytest.mark.parametrize("model", ["inflight", "whole"])
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_verdicts_are_the_local_ones(server: Server, local: Detector, protocol: str, model: str) -> None:
    frames = some_frames(N_FRAMES)
    want = local.run(frames)
    assert len({verdict.decision for verdict in want}) == 3
    remote = RemoteDetector(getattr(server, protocol), model=model)
    assert remote.class_names == local.class_names
    got = remote.run(frames)
    assert [i for i, pair in enumerate(zip(want, got, strict=True)) if not same(*pair)] == []


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_many_clients_at_once_get_their_own_answers(server: Server, local: Detector, protocol: str) -> None:
    remote = RemoteDetector(getattr(server, protocol), timeout=20)

    def client(seed: int) -> int:
        frames = some_frames(60, seed)
        return sum(not same(*pair) for pair in zip(local.run(frames), map(remote, frames), strict=True))

    with ThreadPoolExecutor(N_CLIENTS) as pool:
        assert sum(pool.map(client, range(N_CLIENTS))) == 0


def raw(server: Server) -> Any:
    import tritonclient.http

    return tritonclient.http.InferenceServerClient(server.http[len("http://") :], network_timeout=20)


def infer(client: Any, model: str, **arrays: Any) -> dict[str, Any]:
    import tritonclient.http

    inputs = []
    for name, (kind, array) in arrays.items():
        tensor = tritonclient.http.InferInput(name, list(array.shape), kind)
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    result = client.infer(model, inputs)
    return {output["name"]: result.as_numpy(output["name"]) for output in result.get_response()["outputs"]}


@pytest.mark.parametrize(
    ("kind", "array", "message"),
    [
        ("UINT8", np.zeros((1, 2, 2, 2), np.uint8), "frame: expected 1 channels, got shape"),
        ("UINT8", np.zeros((1, 2, 2), np.uint8), "unexpected shape for input 'frame'"),
        ("FP32", np.zeros((1, 2, 2, 1), np.float32), "data-type is 'FP32'"),
        ("UINT8", np.zeros((1, 0, 2, 1), np.uint8), "frame"),
        ("UINT8", np.zeros((33, 2, 2, 1), np.uint8), "batch-size must be <= 32"),
    ],
    ids=["channels", "axes", "dtype", "empty", "batch"],
)
def test_a_bad_frame_gets_a_clear_error(server: Server, kind: str, array: Any, message: str) -> None:
    from tritonclient.utils import InferenceServerException

    with pytest.raises(InferenceServerException) as caught:
        infer(raw(server), "inflight", frame=(kind, array))
    assert message in str(caught.value)


def test_features_that_are_not_finite_are_invalid_with_the_reason(server: Server) -> None:
    features = np.array([[np.nan, 0, 0, 1], [0, 0, 0, 1]], np.float32)
    logits = np.array([[0, 0, 0, 1], [np.inf, 0, 0, 1]], np.float32)
    got = infer(raw(server), "inflight_scorer", logits=("FP32", logits), features=("FP32", features))
    assert got["decision"].tolist() == [[3], [3]]
    assert got["reason"][0, 0].decode().startswith("features: expected finite numbers, got 1")
    assert got["reason"][1, 0].decode().startswith("logits: expected finite numbers, got 1")
    got = infer(raw(server), "whole", image=("FP32", np.full((1, 1, 2, 2), np.nan, np.float32)))
    assert got["decision"].tolist() == [[3]]


def test_the_client_makes_bad_frames_invalid_alone(server: Server, local: Detector) -> None:
    frames: list[Any] = [CLEAN_WEST, np.zeros((2, 2, 2), np.uint8), np.zeros((2, 2), np.float32), CLEAN_WEST]
    for model in ("inflight", "whole"):
        got = RemoteDetector(server.http, model=model).run(frames)
        assert [verdict.decision.value for verdict in got] == ["accept", "invalid", "invalid", "accept"]
        assert "expected 1 channels" in got[1].reason
        assert "expected a uint8 array" in got[2].reason


def test_load_test_measures_and_compares_the_answers(
    server: Server, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks.serving import main

    file = tmp_path / "serving.json"
    arguments = [str(folder / "bundle"), "--url", server.http, "--batches", "1", "8", "--requests", "40"]
    assert main([*arguments, "--json", str(file)]) == 0
    one, eight = json.loads(file.read_text())["records"]
    assert (one["batch"], one["requests"], eight["batch"], eight["requests"]) == (1, 40, 8, 40)
    assert 0 < one["p50_ns"] <= one["p99_ns"] <= one["max_ns"]
    assert "frames/s" in capsys.readouterr().out
    assert main([str(folder / "bundle"), "--url", server.http, "--model", "other"]) == 2
    assert "unknown model" in capsys.readouterr().err


def test_unknown_model_is_one_error(server: Server) -> None:
    with pytest.raises(EngineError, match="unknown model"):
        RemoteDetector(server.grpc, model="other", timeout=1)
    with pytest.raises(EngineError, match="unknown model"):
        RemoteDetector(server.http, model="other", timeout=1)


def exchanged(path: Path) -> Path:
    """A bundle of the same classifier whose guard of west accepts what the other flags, and the reverse."""
    guard = tiny_guard(3)
    means = guard.means.copy()
    means[3], means[0] = [0.5, 0, 0, 1], [0, 0, 0, 1]
    guards = (replace(guard, means=means), tiny_guard(0, "shared"))
    return written(path, guards=guards, self_test=tiny_self_test(guards))


def test_guards_are_exchanged_under_load_without_a_lost_or_mixed_answer(tmp_path: Path) -> None:
    first = written(tmp_path / "first")
    second = exchanged(tmp_path / "second")
    export_repository(first, tmp_path / "repository", runtime="python", python_path=python_path())
    want = {"first": "accept", "second": "trigger"}
    digests = {}
    for name, path in (("first", first), ("second", second)):
        assert Detector(read_bundle(path))(CLEAN_WEST).decision.value == want[name]
        manifest = read_manifest(path)
        digests[manifest["files"]["detector.safetensors"]["sha256"]] = want[name]
    codes = {0: "accept", 1: "trigger"}
    stop, answers, wrong = threading.Event(), Counter[str](), []

    with serving(tmp_path / "repository", "inflight") as server:

        def client() -> None:
            connection = raw(server)
            while not stop.is_set():
                got = infer(connection, "inflight", frame=("UINT8", CLEAN_WEST[None]))
                guard, decision = got["guard"][0, 0].decode(), codes[int(got["decision"][0, 0])]
                answers[decision] += 1
                if digests[guard] != decision:
                    wrong.append((guard, decision))

        with ThreadPoolExecutor(8) as pool:
            clients = [pool.submit(client) for _ in range(8)]
            time.sleep(1)
            export_guards(second, tmp_path / "repository")
            server.post("/v2/repository/models/inflight_scorer/load")
            time.sleep(1)
            stop.set()
            for done in clients:
                done.result(60)
        assert wrong == []
        assert answers["accept"] > 20
        assert answers["trigger"] > 20
        assert RemoteDetector(server.http)(CLEAN_WEST).decision is Decision.TRIGGER


def read_manifest(path: Path) -> Any:
    return json.loads((path / "bundle.json").read_text())


def test_guards_that_do_not_verify_never_take_over(tmp_path: Path) -> None:
    bundle = written(tmp_path / "bundle")
    export_repository(bundle, tmp_path / "repository", runtime="python", python_path=python_path())
    with serving(tmp_path / "repository", "inflight") as server:
        version = export_guards(bundle, tmp_path / "repository")
        data = bytearray((version / "bundle/detector.safetensors").read_bytes())
        data[-1] ^= 1
        (version / "bundle/detector.safetensors").write_bytes(data)
        with pytest.raises(AssertionError, match="expected SHA-256"):
            server.post("/v2/repository/models/inflight_scorer/load")
        assert RemoteDetector(server.http)(CLEAN_WEST).decision is Decision.ACCEPT


def test_overload_is_rejected_and_never_accepted(tmp_path: Path) -> None:
    bundle = written(tmp_path / "bundle")
    queue = Queue(max_batch=1, size=1, timeout_us=20_000)
    export_repository(bundle, tmp_path / "repository", queue=queue, runtime="python", python_path=python_path())
    with serving(tmp_path / "repository", "inflight") as server:
        from tritonclient.utils import InferenceServerException

        def client(_: int) -> str:
            try:
                return str(infer(raw(server), "inflight", frame=("UINT8", np.zeros((1, 480, 640, 1), np.uint8))))
            except InferenceServerException as error:
                return f"{error.status()}: {error}"

        with ThreadPoolExecutor(32) as pool:
            answers = list(pool.map(client, range(200)))
        rejected = [answer for answer in answers if "queue" in answer.lower() or "timeout" in answer.lower()]
        assert rejected, answers[:3]
        assert len(rejected) + sum("decision" in answer for answer in answers) == 200
        remote = RemoteDetector(server.http, timeout=10)
        assert remote(TRIGGERED_NORTH).decision is Decision.TRIGGER  # it has recovered


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_server_killed_under_load_comes_back_for_its_clients(folder: Path, local: Detector, protocol: str) -> None:
    server = Server(folder / "repository", load=("inflight",))
    server.start()
    try:
        patient = RemoteDetector(getattr(server, protocol), timeout=40)
        hasty = RemoteDetector(getattr(server, protocol), timeout=0.3)
        want, stop = local(TRIGGERED_NORTH), threading.Event()
        counts = Counter[str]()

        def client(remote: RemoteDetector, name: str) -> None:
            while not stop.is_set():
                verdict = remote(TRIGGERED_NORTH)
                right = same(verdict, want)
                counts[f"{name} {'right' if right else verdict.decision.value}"] += 1

        with ThreadPoolExecutor(8) as pool:
            clients = [pool.submit(client, patient, "patient") for _ in range(4)]
            clients += [pool.submit(client, hasty, "hasty") for _ in range(4)]
            time.sleep(0.5)
            server.kill()
            time.sleep(0.7)
            server.start()
            before = counts["patient right"], counts["hasty right"]
            time.sleep(1.5)
            stop.set()
            for done in clients:
                done.result(60)
        assert set(counts) <= {"patient right", "hasty right", "hasty invalid"}
        assert counts["hasty invalid"] > 0
        assert counts["patient right"] > before[0] > 0
        assert counts["hasty right"] > before[1]
    finally:
        server.stop()
