"""RTSP: a real server in a process of its own, on loopback; killed, stopped, started again."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Iterator

import gstreamer_here
import pytest
from rtsp_streams import number_of, server

from inflight_edge import OptionError, SourceError
from inflight_edge.events import Frame
from inflight_edge.sources import Source, make_source
from inflight_edge.sources.video import RtspSource

pytest.importorskip("av", reason="PyAV is not installed: pip install 'inflight-edge[video]'")
gstreamer_here.need("x264enc", "rtpjpegpay", typelibs=["GstRtspServer"])


def numbers(source: Source, n: int) -> list[int]:
    found = []
    for _ in range(n):
        frame = source.read()
        assert frame is not None
        assert frame.pixels is not None, frame.problem
        found.append(number_of(frame.pixels))
    return found


@pytest.mark.parametrize("codec", ["mjpeg", "h264", "h264b"])
def test_every_frame_in_order_and_then_the_end_of_the_stream(codec: str) -> None:
    with server(codec, "90") as (_, port):
        source = make_source(f"rtsp://127.0.0.1:{port}/stream")
        assert source.live
        source.open()
        frames: list[Frame] = []
        with pytest.raises(SourceError, match=f"^rtsp://127.0.0.1:{port}/stream: the server ended the stream$"):
            frames.extend(iter(source.read, None))  # those before the error too
        source.close()
    found = [number_of(frame.pixels) for frame in frames if frame.pixels is not None]
    stamps = [frame.captured_ns for frame in frames]
    assert [frame.problem for frame in frames if frame.problem] == []
    assert len(found) > 20  # those before it was connected nobody gets
    assert found == list(range(found[0], found[0] + len(found)))
    assert found[-1] == 89
    assert stamps == sorted(stamps)


def test_udp() -> None:
    with server("mjpeg", "75") as (_, port):
        source = RtspSource(f"rtsp://127.0.0.1:{port}/stream", transport="udp")
        source.open()
        found = numbers(source, 10)
        source.close()
    assert found == sorted(set(found))


def test_server_killed_and_back() -> None:
    with server() as (process, port):
        source = RtspSource(f"rtsp://127.0.0.1:{port}/stream", timeout_s=2)
        source.open()
        first = numbers(source, 10)
        process.kill()
        began = time.monotonic()
        with pytest.raises(SourceError):
            list(iter(source.read, None))
        assert time.monotonic() - began < 3.5
        process.wait(10)
        with pytest.raises(SourceError, match=r"cannot be opened: Connection refused"):
            source.open()
    with server(port=port):
        source.open()
        second = numbers(source, 10)
        source.close()
    for found in first, second:
        assert found == list(range(found[0], found[0] + 10))


def test_server_that_falls_silent_is_an_error_in_time_and_may_be_opened_again() -> None:
    with server() as (process, port):
        source = RtspSource(f"rtsp://127.0.0.1:{port}/stream", timeout_s=1)
        source.open()
        numbers(source, 5)
        process.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(SourceError, match=r"no frame within 1 s|broke off"):
            list(iter(source.read, None))
        assert 0.8 < time.monotonic() - began < 2.5
        source.close()
        process.send_signal(signal.SIGCONT)
        source.open()
        numbers(source, 5)
        source.close()
        assert source.read() is None


def test_close_ends_a_read_that_waits() -> None:
    with server(fps=50) as (process, port):
        source = RtspSource(f"rtsp://127.0.0.1:{port}/stream", timeout_s=30)
        source.open()
        numbers(source, 5)
        process.send_signal(signal.SIGSTOP)
        closed = threading.Timer(0.5, source.close)
        closed.start()
        began = time.monotonic()
        while source.read() is not None:
            pass
        assert time.monotonic() - began < 2.0
        closed.join(5)
        assert not closed.is_alive()


@pytest.fixture
def mute() -> Iterator[int]:
    """Port of a server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_server_that_never_answers_is_an_error_in_time(mute: int) -> None:
    source = RtspSource(f"rtsp://127.0.0.1:{mute}/stream", timeout_s=0.5)
    began = time.monotonic()
    with pytest.raises(SourceError, match=r"cannot be opened: no answer within 0.5 s"):
        source.open()
    assert time.monotonic() - began < 2.0


def test_close_ends_an_open_that_waits(mute: int) -> None:
    source = RtspSource(f"rtsp://127.0.0.1:{mute}/stream", timeout_s=3)
    threading.Timer(0.2, source.close).start()
    began = time.monotonic()
    with pytest.raises(SourceError, match=r"closed while it was opened"):
        source.open()
    assert time.monotonic() - began < 2.0


def test_password_is_used_and_never_shown(capfd: pytest.CaptureFixture[str]) -> None:
    with server("mjpeg", "500", "viewer", "hunter2") as (_, port):
        source = RtspSource(f"rtsp://viewer:hunter2@127.0.0.1:{port}/stream")
        assert source.name == f"rtsp://127.0.0.1:{port}/stream"
        source.open()
        numbers(source, 3)
        source.close()
        for text, message in (
            (f"rtsp://viewer:wrong-hunter2@127.0.0.1:{port}/stream", "the server refuses: "),
            (f"rtsp://viewer:hunter2@127.0.0.1:{port}/elsewhere", "the server refuses: "),
            ("rtsp://viewer:hunter2@127.0.0.1:9/stream", "Connection refused"),
        ):
            with pytest.raises(SourceError) as raised:
                RtspSource(text, timeout_s=2).open()
            assert message in str(raised.value)
            shown = f"{raised.getrepr(style='native', chain=True)}"
            assert "hunter2" not in "".join(line for line in shown.splitlines() if "RtspSource(text" not in line)
    output = capfd.readouterr()
    assert "hunter2" not in output.out + output.err


def test_what_is_no_rtsp_address_is_refused() -> None:
    with pytest.raises(OptionError, match=r"expected rtsp://"):
        RtspSource("http://host/")
    with pytest.raises(OptionError, match=r"transport: expected tcp or udp"):
        RtspSource("rtsp://host/", transport="sctp")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"timeout: expected seconds above 0"):
        RtspSource("rtsp://host/", timeout_s=0)
