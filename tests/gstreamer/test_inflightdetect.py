"""The element inflightdetect: the verdict on the buffer and on the bus is the detector's, and nothing fails open."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gstreamer_here
import numpy as np
import pytest
from bundles import CLASS_NAMES, CLEAN_WEST, TRIGGERED_NORTH, TRIGGERED_SOUTH, written

from inflight_edge import Detector
from inflight_edge.gstreamer import MESSAGE, register, verdict_of

gstreamer_here.need("videotestsrc", "videoconvert", "appsrc", "appsink")

from gi.repository import Gst  # noqa: E402


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("element") / "bundle")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """With a registry of its own: GStreamer notes there what it could not load."""
    return gstreamer_here.environment(GST_REGISTRY=str(tmp_path_factory.mktemp("registry") / "registry.bin"))


def launch(environment: dict[str, str], pipeline: str) -> tuple[int, list[dict[str, str]], str]:
    """Exit code of gst-launch-1.0, the fields of the verdict messages, and its errors."""
    result = subprocess.run(
        ["gst-launch-1.0", "-m", *pipeline.split()], env=environment, capture_output=True, text=True, timeout=60
    )
    found = re.findall(rf"\(element\): {MESSAGE}, (.*);$", result.stdout, re.MULTILINE)
    messages = [dict(re.findall(r'([\w-]+)=\(\w+\)("(?:[^"\\]|\\.)*"|[^,;]*)', line)) for line in found]
    return result.returncode, messages, result.stderr


@pytest.fixture(autouse=True, scope="module")
def _registered() -> None:
    register()


class TestFromTheCommandLine:
    @pytest.fixture(autouse=True)
    def loader(self, environment: dict[str, str]) -> None:
        result = subprocess.run(["gst-inspect-1.0", "inflightdetect"], env=environment, capture_output=True, text=True)
        if "No such element" in result.stderr + result.stdout and "Traceback" not in result.stderr:
            pytest.skip("gstreamer1.0-python3-plugin-loader is not installed, or of another Python version")
        assert result.returncode == 0, result.stderr

    @pytest.mark.parametrize("form", ["RGB", "BGR", "GRAY8", "NV12"])
    def test_a_message_per_frame(self, environment: dict[str, str], bundle: Path, form: str) -> None:
        code, messages, errors = launch(
            environment,
            "videotestsrc num-buffers=3 pattern=solid-color foreground-color=0xffffffff "
            f"! video/x-raw,format={form},width=32,height=32,framerate=10/1 ! inflightdetect bundle={bundle} ! fakesink",
        )
        assert code == 0, errors
        assert [message["frame"] for message in messages] == ["0", "1", "2"]
        assert [message["pts"] for message in messages] == ["0", "100000000", "200000000"]
        for message in messages:
            assert (message["decision"], message["passes"]) == ("trigger", "false")
            assert (message["predicted"], message["predicted-name"], message["source-name"]) == ("0", "north", "east")
            assert 30.0 < float(message["margin"]) < 40.0

    def test_bundle_that_is_none_ends_the_pipeline_before_the_first_frame(
        self, environment: dict[str, str], tmp_path: Path
    ) -> None:
        code, messages, errors = launch(environment, f"videotestsrc ! inflightdetect bundle={tmp_path}/none ! fakesink")
        assert code != 0
        assert messages == []
        assert "none: expected a bundle folder, got No such file or directory" in errors

    def test_no_bundle_is_not_the_working_folder(self, environment: dict[str, str]) -> None:
        code, messages, errors = launch(environment, "videotestsrc ! inflightdetect ! fakesink")
        assert code != 0
        assert messages == []
        assert "bundle: expected the folder of a bundle, got none; write bundle=FOLDER" in errors

    def test_properties_are_documented(self, environment: dict[str, str]) -> None:
        text = subprocess.run(
            ["gst-inspect-1.0", "inflightdetect"], env=environment, capture_output=True, text=True, check=True
        ).stdout
        for name in ("alpha", "bundle", "drop-refused", "engine", "key", "precision", "scorer", "threads"):
            assert re.search(rf"^  {name} ", text, re.MULTILINE), name


def test_environment_is_printed_for_the_shell() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "inflight_edge.gstreamer"], capture_output=True, text=True, check=True
    )
    lines = [line for line in result.stdout.splitlines() if not line.startswith("#")]
    values = dict(line.removeprefix("export ").split("=", 1) for line in lines)
    assert list(values) == ["GST_PLUGIN_PATH", "PYTHONPATH"]
    assert (Path(values["GST_PLUGIN_PATH"].split(os.pathsep)[0]) / "python" / "inflightdetect.py").exists()
    assert (Path(values["PYTHONPATH"].split(os.pathsep)[0]) / "inflight_edge").is_dir()


class Pipeline:
    """appsrc ! inflightdetect ! ... ! appsink: frames in, buffers and messages out."""

    def __init__(self, bundle: Path, *, caps: str, properties: str = "", behind: str = "") -> None:
        self.pipeline: Any = Gst.parse_launch(
            f"appsrc name=in format=time caps={caps} ! inflightdetect name=detect bundle={bundle} {properties} {behind} "
            "! appsink name=out sync=false"
        )
        self.source, self.sink = self.pipeline.get_by_name("in"), self.pipeline.get_by_name("out")
        self.detect = self.pipeline.get_by_name("detect")
        self.pipeline.set_state(Gst.State.PLAYING)

    def push(self, data: bytes, pts: int = 0) -> None:
        buffer = Gst.Buffer.new_wrapped(data)
        buffer.pts = pts
        assert self.source.emit("push-buffer", buffer) == Gst.FlowReturn.OK

    def pull(self) -> Any:
        """The next buffer, or None when none came within a second, or at the end."""
        sample = self.sink.try_pull_sample(Gst.SECOND)
        return sample and sample.get_buffer()

    def verdict(self) -> dict[str, Any]:
        verdict = verdict_of(self.pull())
        assert verdict is not None
        return verdict

    def messages(self, kind: Any) -> list[Any]:
        bus, found = self.pipeline.get_bus(), []
        while (message := bus.timed_pop_filtered(Gst.SECOND // 10, kind)) is not None:
            found.append(message)
        return found

    def stop(self) -> None:
        self.pipeline.set_state(Gst.State.NULL)


TINY = "video/x-raw,format=GRAY8,width=2,height=2,framerate=30/1"


def rows(frame: np.ndarray[Any, Any]) -> bytes:
    """A 2x2 frame as GStreamer lays it out: rows of 4 bytes."""
    padded = np.zeros((2, 4), np.uint8)
    padded[:, :2] = frame[:, :, 0]
    return padded.tobytes()


@pytest.fixture
def tiny(bundle: Path) -> Iterator[Pipeline]:
    pipeline = Pipeline(bundle, caps=TINY)
    yield pipeline
    pipeline.stop()


def test_verdict_on_the_buffer_is_the_detectors_and_pixels_pass_unchanged(tiny: Pipeline, bundle: Path) -> None:
    detector = Detector.load(bundle)
    for i, frame in enumerate((CLEAN_WEST, TRIGGERED_NORTH, TRIGGERED_SOUTH)):
        tiny.push(rows(frame), pts=i * 7)
        expected = detector(frame)
        buffer = tiny.pull()
        assert buffer.extract_dup(0, buffer.get_size()) == rows(frame)
        got = verdict_of(buffer)
        assert got is not None
        assert (got["frame"], got["pts"], got["passes"]) == (i, i * 7, expected.passes)
        assert got["decision"] == expected.decision.value
        assert (got["predicted"], got["predicted-name"]) == (3, "west")
        assert got.get("source") == expected.source
        if expected.source is not None:
            assert got["source-name"] == CLASS_NAMES[expected.source]
        assert got["margin"] == pytest.approx(expected.margin)
    messages = tiny.messages(Gst.MessageType.ELEMENT)
    assert [message.get_structure().get_value("decision") for message in messages] == ["accept", "trigger", "trigger"]


def test_buffer_without_a_verdict_has_none() -> None:
    assert verdict_of(Gst.Buffer.new_allocate(None, 4, None)) is None


def test_verdict_survives_queue_tee_scaling_conversion_and_cropping(bundle: Path) -> None:
    pipeline = Pipeline(
        bundle,
        caps="video/x-raw,format=RGB,width=32,height=32,framerate=30/1",
        behind="! queue ! tee ! videoscale ! videoconvert ! videocrop left=4 ! video/x-raw,format=I420,width=64,height=64 ",
    )
    pipeline.push(bytes(32 * 32 * 3))
    assert pipeline.verdict()["decision"] in ("accept", "trigger")
    pipeline.stop()


@pytest.mark.parametrize("properties", ["", "drop-refused=true"])
def test_refused_frames_are_dropped_where_asked(bundle: Path, properties: str) -> None:
    pipeline = Pipeline(bundle, caps=TINY, properties=properties)
    for frame in (CLEAN_WEST, TRIGGERED_NORTH, CLEAN_WEST):
        pipeline.push(rows(frame))
    pipeline.source.emit("end-of-stream")
    passed = []
    while (buffer := pipeline.pull()) is not None:
        verdict = verdict_of(buffer)
        assert verdict is not None
        passed.append(verdict["frame"])
    assert passed == ([0, 2] if properties else [0, 1, 2])
    assert len(pipeline.messages(Gst.MessageType.ELEMENT)) == 3
    pipeline.stop()


def test_buffer_that_is_too_small_or_corrupt_is_invalid(tiny: Pipeline) -> None:
    tiny.push(b"\0" * 5)
    verdict = tiny.verdict()
    assert (verdict["decision"], verdict["passes"]) == ("invalid", False)
    assert "expected 6 bytes, got 5" in verdict["reason"]
    buffer = Gst.Buffer.new_wrapped(rows(CLEAN_WEST))
    buffer.set_flags(Gst.BufferFlags.CORRUPTED)
    tiny.source.emit("push-buffer", buffer)
    verdict = tiny.verdict()
    assert (verdict["decision"], verdict["reason"]) == ("invalid", "buffer is marked as corrupt or as a gap")
    tiny.push(rows(CLEAN_WEST))
    assert tiny.verdict()["decision"] == "accept"


def test_caps_that_no_frame_has_are_invalid_not_unjudged(bundle: Path) -> None:
    pipeline = Pipeline(bundle, caps="video/x-raw,format=NV12,width=3,height=2,framerate=30/1")
    pipeline.push(bytes(64))
    verdict = pipeline.verdict()
    assert verdict["decision"] == "invalid"
    assert "expected an even width and height with NV12, got 3x2" in verdict["reason"]
    pipeline.stop()


class Broken:
    """An engine that fails in different ways."""

    name = "broken"

    def __init__(self, result: Any) -> None:
        self.result = result

    def run(self, frames: Any) -> Any:
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


NAN = np.full((1, 4), np.nan, np.float32)


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (RuntimeError("device lost"), "RuntimeError: device lost"),
        (MemoryError(), "MemoryError: "),
        ((NAN, NAN), "logits: expected finite numbers, got 4 NaN"),
        ((np.empty((0, 4), np.float32), NAN), "IndexError: "),
        (None, "TypeError: "),
    ],
    ids=["raises", "memory", "nan", "empty", "none"],
)
def test_engine_that_fails_makes_the_frame_invalid_and_the_next_one_is_judged(
    tiny: Pipeline, result: Any, reason: str
) -> None:
    tiny.push(rows(CLEAN_WEST))
    assert tiny.verdict()["decision"] == "accept"
    detector = tiny.detect._detector
    engine, detector.engine = detector.engine, Broken(result)
    tiny.push(rows(CLEAN_WEST))
    verdict = tiny.verdict()
    assert (verdict["decision"], verdict["passes"]) == ("invalid", False)
    assert reason in verdict["reason"]
    detector.engine = engine
    tiny.push(rows(CLEAN_WEST))
    assert tiny.verdict()["decision"] == "accept"


@pytest.mark.parametrize("method", ["_judge", "_deliver"])
def test_fault_in_the_element_itself_never_lets_a_frame_pass_unjudged(
    tiny: Pipeline, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def fault(*_: object) -> None:
        raise ValueError("a fault")

    monkeypatch.setattr(type(tiny.detect), method, fault)
    tiny.push(rows(CLEAN_WEST))
    buffer = tiny.pull()
    if method == "_judge":
        verdict = verdict_of(buffer)
        assert verdict is not None
        assert (verdict["decision"], verdict["reason"]) == ("invalid", "ValueError: a fault")
    else:
        assert buffer is None  # the pipeline stops
        (error, *_) = tiny.messages(Gst.MessageType.ERROR)
        assert "the verdict cannot be attached: ValueError: a fault" in error.parse_error()[0].message


def test_two_elements_in_a_row_are_an_error_not_one_verdict_hiding_the_other(bundle: Path) -> None:
    pipeline = Pipeline(bundle, caps=TINY, behind=f"! inflightdetect bundle={bundle}")
    pipeline.push(rows(CLEAN_WEST))
    assert pipeline.pull() is None
    assert "carries one already" in pipeline.messages(Gst.MessageType.ERROR)[0].parse_error()[0].message
    pipeline.stop()


def test_wrong_property_is_an_error_on_the_bus(bundle: Path) -> None:
    for properties, message in (
        ("engine=abacus", "engine: expected one of onnxruntime"),
        ("scorer=fast", "fast"),
        ("alpha=0.001", "alpha"),
        ("precision=int8", "int8"),
        ("key=none.pem", "none.pem"),
    ):
        pipeline = Pipeline(bundle, caps=TINY, properties=properties)
        assert message in pipeline.messages(Gst.MessageType.ERROR)[0].parse_error()[0].message
        pipeline.stop()


def test_a_thousand_frames_leave_no_memory_behind(tiny: Pipeline) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def run(n: int) -> None:
        for _ in range(n):
            tiny.push(rows(CLEAN_WEST))
            assert tiny.pull() is not None
        tiny.messages(Gst.MessageType.ELEMENT)

    run(300)
    before = resident()
    run(2000)
    assert resident() - before < 8 << 20
