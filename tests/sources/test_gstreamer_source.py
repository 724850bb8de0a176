"""The GStreamer source, with GStreamer's own test pictures; the cameras' presets as text."""

from __future__ import annotations

import threading
import time
from typing import Any

import gstreamer_here
import numpy as np
import pytest

from inflight_edge import OptionError, SourceError
from inflight_edge.colour import to_rgb
from inflight_edge.events import Frame
from inflight_edge.sources import make_source
from inflight_edge.sources.gstreamer import GStreamerSource, csi_pipeline, usb_pipeline

COLOUR = "pattern=solid-color foreground-color=0xffc86432"  # (200, 100, 50)


def test_preset_of_a_jetsons_camera() -> None:
    assert csi_pipeline(0) == (
        "nvarguscamerasrc sensor-id=0 ! video/x-raw(memory:NVMM),format=NV12,width=1280,height=720,framerate=30/1 "
        "! nvvidconv ! video/x-raw,format=NV12 ! appsink drop=true max-buffers=1 sync=false"
    )
    source = make_source("csi:1#width=1920&height=1080&fps=60")
    assert isinstance(source, GStreamerSource)
    assert source._text == csi_pipeline(1, width=1920, height=1080, fps=60)
    assert "sensor-id=1 ! video/x-raw(memory:NVMM),format=NV12,width=1920,height=1080,framerate=60/1 " in source._text


def test_preset_of_a_usb_camera() -> None:
    assert usb_pipeline(2, width=800, height=600, fps=15) == (
        'v4l2src device=/dev/video2 ! capsfilter caps="video/x-raw,width=800,height=600,framerate=15/1;image/jpeg,'
        'width=800,height=600,framerate=15/1" ! decodebin ! videoconvert ! video/x-raw,format=RGB ! appsink drop=true '
        "max-buffers=1 sync=false"
    )


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(OptionError, match=r"expected a pipeline, got none"):
        GStreamerSource(" ")
    with pytest.raises(OptionError, match=r"timeout: expected seconds above 0"):
        GStreamerSource("videotestsrc", timeout_s=float("nan"))


class TestWithGStreamer:
    @pytest.fixture(autouse=True)
    def gst(self) -> None:
        gstreamer_here.need("videotestsrc", "videoconvert", "appsink")

    def drain(self, pipeline: str, *, live: bool | None = False, n: int = 1000) -> list[Frame]:
        source = GStreamerSource(pipeline, live=live)
        source.open()
        try:
            frames = []
            while len(frames) < n and (frame := source.read()) is not None:
                frames.append(frame)
            return frames
        finally:
            source.close()

    def test_every_frame_and_then_the_end(self) -> None:
        before = time.monotonic_ns()
        # The box of the pattern moves by 4 pixels a frame.
        frames = self.drain(
            "videotestsrc num-buffers=20 pattern=ball animation-mode=frames ! video/x-raw,format=GRAY8,width=64,height=48"
            " ! appsink"
        )
        stamps = [frame.captured_ns for frame in frames]
        assert len(frames) == 20
        assert before < stamps[0]
        assert stamps == sorted(stamps)
        pictures = [frame.pixels.tobytes() for frame in frames if frame.pixels is not None]
        assert len(set(pictures)) == 20

    @pytest.mark.parametrize(
        ("caps", "shape", "colour"),
        [
            ("format=RGB,width=322,height=242", (242, 322, 3), "rgb"),  # rows padded to 968 bytes
            ("format=BGR,width=321,height=241", (241, 321, 3), "bgr"),
            ("format=NV12,width=322,height=242", (363, 322), "nv12-bt601"),  # rows padded to 324 bytes
            ("format=NV12,width=322,height=242,colorimetry=bt709", (363, 322), "nv12-bt709"),
            ("format=NV12,width=1280,height=720", (1080, 1280), "nv12-bt709"),
        ],
    )
    def test_formats_and_padded_rows(self, caps: str, shape: tuple[int, ...], colour: str) -> None:
        (frame,) = self.drain(f"videotestsrc num-buffers=1 {COLOUR} ! video/x-raw,{caps} ! appsink")
        assert frame.pixels is not None
        assert (frame.pixels.shape, frame.colour, frame.pixels.flags.c_contiguous) == (shape, colour, True)
        rgb = to_rgb(frame.pixels, frame.colour)
        np.testing.assert_allclose(rgb.reshape(-1, 3), np.full((rgb.size // 3, 3), (200, 100, 50)), atol=2)

    def test_full_range_and_grey(self) -> None:
        for value, expected in (("0xffffffff", 255), ("0xff000000", 0)):
            pattern = f"videotestsrc num-buffers=1 pattern=solid-color foreground-color={value}"
            for caps, convert in (
                ("format=NV12,colorimetry=1:4:0:0", "nv12-bt601-full"),
                ("format=GRAY8,colorimetry=1:4:0:0", "rgb"),
            ):
                (frame,) = self.drain(
                    f"{pattern} ! video/x-raw,format=RGB,width=66,height=48 ! videoconvert ! video/x-raw,{caps} ! appsink"
                )
                assert frame.colour == convert
                assert frame.pixels is not None
                np.testing.assert_allclose(to_rgb(frame.pixels, frame.colour), expected, atol=2)
            # Grey of limited range, which the caps have to say: 16..235 is stretched.
            (frame,) = self.drain(
                f"{pattern} ! video/x-raw,format=GRAY8,width=66,height=48,colorimetry=2:4:0:0 ! appsink"
            )
            assert frame.pixels is not None
            assert int(frame.pixels[5, 5]) == expected

    def test_what_no_frame_can_hold_is_a_problem(self) -> None:
        for caps, problem in (
            ("width=321,height=241", "expected an even width and height with NV12, got 321x241"),
            ("width=320,height=240,colorimetry=bt2020", "expected BT.601 or BT.709 with NV12, got bt2020"),
        ):
            (frame,) = self.drain(f"videotestsrc num-buffers=1 ! video/x-raw,format=NV12,{caps} ! appsink")
            assert frame.pixels is None
            assert problem in frame.problem

    def test_other_formats_need_a_conversion_which_is_put_before_an_appended_appsink(self) -> None:
        source = "videotestsrc num-buffers=2 ! video/x-raw,format=YUY2,width=64,height=48"
        assert [frame.pixels is not None for frame in self.drain(source)] == [True, True]
        with pytest.raises(SourceError, match=r"not-negotiated.*; put `videoconvert` before the appsink"):
            self.drain(f"{source} ! appsink")

    def test_caps_may_change_in_the_middle(self) -> None:
        part = "videotestsrc num-buffers=3 ! video/x-raw,framerate=10/1,format={},width={},height={} ! c. "
        frames = self.drain(
            "concat name=c ! appsink "
            + part.format("RGB", 64, 48) + part.format("NV12", 128, 96) + part.format("GRAY8", 32, 32)
        )  # fmt: skip
        shapes = [(frame.pixels.shape, frame.colour) for frame in frames if frame.pixels is not None]
        assert shapes == [((48, 64, 3), "rgb")] * 3 + [((144, 128), "nv12-bt601")] * 3 + [((32, 32), "rgb")] * 3

    def test_buffer_marked_as_corrupt_or_too_small_is_a_problem(self) -> None:
        from gi.repository import Gst

        from inflight_edge.gstreamer import Layout

        caps = "video/x-raw,format=RGB,width=64,height=48,framerate=0/1"
        layout = Layout.of(Gst.Caps.from_string(caps))
        whole = Gst.Buffer.new_allocate(None, 64 * 48 * 3, None)
        assert layout.frame(whole).problem == ""
        whole.set_flags(Gst.BufferFlags.CORRUPTED)
        assert layout.frame(whole).problem == "buffer is marked as corrupt or as a gap"
        small = Gst.Buffer.new_allocate(None, 64 * 48 * 3 - 1, None)
        assert layout.frame(small).problem == "buffer holds no 64x48 image: expected 9216 bytes, got 9215"
        assert layout.frame(small).pixels is None

    def test_live_pipeline_keeps_the_newest_frame_and_another_none_back(self) -> None:
        source = GStreamerSource("videotestsrc is-live=true ! video/x-raw,framerate=50/1,width=64,height=48 ! appsink")
        source.open()
        assert source.read() is not None
        sink = source._sink
        assert (sink.get_property("max-buffers"), sink.get_property("drop")) == (1, True)
        time.sleep(0.5)  # 25 frames pass
        began = time.monotonic()
        for _ in range(6):
            assert source.read() is not None
        assert time.monotonic() - began > 0.06  # the missed ones do not come in a burst
        source.close()
        source = GStreamerSource("videotestsrc num-buffers=50 ! video/x-raw,width=64,height=48 ! appsink", live=False)
        source.open()
        time.sleep(0.3)
        n = 0
        while source.read() is not None:
            n += 1
        source.close()
        assert n == 50

    def test_properties_of_the_users_appsink_are_kept(self) -> None:
        source = GStreamerSource("videotestsrc is-live=true ! appsink max-buffers=7 drop=false sync=true")
        source.open()
        values = [source._sink.get_property(name) for name in ("max-buffers", "drop", "sync")]
        source.close()
        assert values == [7, False, True]

    def test_pipeline_that_is_not_live_must_be_declared(self) -> None:
        with pytest.raises(OptionError, match=r"not live.*#live=0 to judge every frame, or #live=1"):
            self.drain("videotestsrc num-buffers=1", live=None)
        assert len(self.drain("videotestsrc is-live=true", live=None, n=2)) == 2

    def test_end_of_a_live_pipeline_is_an_error_since_a_camera_has_none(self) -> None:
        with pytest.raises(SourceError, match=r"^gst: the pipeline ended its stream$"):
            self.drain("videotestsrc is-live=true num-buffers=2", live=None)

    @pytest.mark.parametrize(
        ("pipeline", "error", "message"),
        [
            ("nosuchelement ! appsink", OptionError, 'not a pipeline: no element "nosuchelement"'),
            ("videotestsrc ! ! appsink", OptionError, "not a pipeline: "),
            ("appsink", OptionError, "expected a source of video before the appsink"),
            (
                "videotestsrc ! appsink videotestsrc ! appsink",
                OptionError,
                "expected one appsink in the pipeline, got 2",
            ),
            ("filesrc location=/nowhere ! decodebin ! appsink", SourceError, "Resource not found"),
            ("rtspsrc location=rtsp://u:secret@127.0.0.1:9/x ! decodebin ! appsink", SourceError, "Could not open"),
            ("v4l2src device=/dev/video63 ! appsink", SourceError, "Cannot identify device '/dev/video63'"),
        ],
    )
    def test_what_is_wrong_is_said_in_one_line(self, pipeline: str, error: type[Exception], message: str) -> None:
        with pytest.raises(error) as raised:
            self.drain(pipeline)
        assert message in str(raised.value)
        assert "\n" not in str(raised.value)
        assert "secret" not in str(raised.value)

    def test_error_in_the_middle_is_a_source_error_after_the_frames_before_it(self) -> None:
        source = GStreamerSource("videotestsrc num-buffers=9 ! identity error-after=4 ! appsink", live=False)
        for _ in range(2):  # and it may be opened again
            source.open()
            frames: list[Frame] = []
            with pytest.raises(SourceError, match=r"^gst: identity\d+: Failed after iterations as requested\.$"):
                frames.extend(iter(source.read, None))
            assert len(frames) == 3
            assert all(frame.pixels is not None for frame in frames)
            source.close()

    def test_silence_is_an_error_in_time(self) -> None:
        source = GStreamerSource("videotestsrc is-live=true ! valve drop=true ! appsink", timeout_s=0.3)
        source.open()
        began = time.monotonic()
        with pytest.raises(SourceError, match=r"no frame within 0.3 s"):
            source.read()
        assert time.monotonic() - began < 1.0
        source.close()
        with pytest.raises(SourceError, match=r"did not start within 0.3 s"):
            GStreamerSource("videotestsrc ! valve drop=true ! appsink", live=False, timeout_s=0.3).open()

    def test_close_ends_a_read_that_waits_and_an_open_that_waits(self) -> None:
        source = GStreamerSource("videotestsrc is-live=true ! valve drop=true ! appsink")
        source.open()
        threading.Timer(0.2, source.close).start()
        began = time.monotonic()
        assert source.read() is None
        assert time.monotonic() - began < 1.0
        assert source.read() is None
        source.close()
        waiting = GStreamerSource("videotestsrc ! valve drop=true ! appsink", live=False)
        threading.Timer(0.2, waiting.close).start()
        with pytest.raises(SourceError, match=r"closed while it was opened"):
            waiting.open()
        assert time.monotonic() - began < 2.0

    def test_messages_on_the_bus_do_not_pile_up(self) -> None:
        from gi.repository import Gst

        source = GStreamerSource("videotestsrc is-live=true ! video/x-raw,framerate=100/1 ! appsink")
        source.open()
        for _ in range(20):
            source._pipeline.post_message(Gst.Message.new_application(None, Gst.Structure.new_empty("chatter")))
        assert source.read() is not None
        # GStreamer may have posted messages of its own since; those of before the frame are gone.
        assert source._pipeline.get_bus().pop_filtered(Gst.MessageType.APPLICATION) is None
        source.close()

    def test_opening_a_hundred_times_leaves_nothing_behind(self) -> None:
        import os

        def opened(n: int) -> tuple[int, int]:
            for _ in range(n):
                self.drain("videotestsrc num-buffers=2 ! video/x-raw,width=64,height=48", n=1)
            return len(os.listdir("/proc/self/fd")), threading.active_count()

        first: Any = opened(5)
        assert opened(100) <= (first[0] + 2, first[1] + 1)
