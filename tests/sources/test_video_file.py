"""Video files: what was written is read, and what is damaged is said; nothing crashes, hangs or grows."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from inflight_edge import SourceError
from inflight_edge.sources import make_source
from inflight_edge.sources.video import VideoSource

av = pytest.importorskip("av", reason="PyAV is not installed: pip install 'inflight-edge[video]'")

RATE = Fraction(1, 25)
FIELDS = 16  # a frame shows its number in this many black or white fields, 4 in a row


def picture(number: int, height: int = 96, width: int = 128) -> NDArray[np.uint8]:
    bits = np.array([0xD0 if number >> i & 1 else 0x30 for i in range(FIELDS)], np.uint8).reshape(4, 4)
    # With noise, so that a file is more than headers.
    noise = np.random.default_rng(number).integers(-32, 32, (height, width))
    grey = (np.kron(bits, np.ones((height // 4, width // 4))) + noise).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)


def number_of(pixels: NDArray[np.uint8]) -> int:
    height, width = pixels.shape[0] // 4, pixels.shape[1] // 4
    pixels = pixels[: height * 4, : width * 4]  # damage may change the size
    fields = pixels[:, :, 1].reshape(4, height, 4, width)[:, height // 4 : -height // 4, :, width // 4 : -width // 4]
    return int(sum(1 << i for i, value in enumerate(fields.mean(axis=(1, 3)).ravel()) if value > 127))


def write(
    path: Path, codec: str = "mjpeg", n: int = 40, sizes: tuple[tuple[int, int], ...] = ((96, 128),), **options: str
) -> Path:
    """A video of n frames; with several sizes, packets of one encoder a size follow each other in one stream."""
    if codec == "libx264":
        options = {"g": "8", **options}
    container = {"movflags": "faststart"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=container) as file:
        stream = file.add_stream(codec, rate=25, options=options)
        stream.height, stream.width = sizes[0]
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for part, (height, width) in enumerate(sizes):
            encoder: Any = stream.codec_context
            if part:
                encoder = av.CodecContext.create(codec, "w")
                encoder.height, encoder.width, encoder.pix_fmt = height, width, stream.pix_fmt
                encoder.framerate, encoder.options = 25, options
            encoder.time_base = RATE
            numbers = range(n * part // len(sizes), n * (part + 1) // len(sizes))
            packets: list[Any] = []
            for number in numbers:
                frame = av.VideoFrame.from_ndarray(picture(number, height, width), format="rgb24")
                frame.pts, frame.time_base = number, RATE
                packets += encoder.encode(frame)
            for packet in [*packets, *encoder.encode(None)]:
                packet.stream = stream
                file.mux(packet)
    return path


def read(source: VideoSource) -> tuple[list[int | str], str]:
    """Numbers of the frames, or their problems, and how it ended: "end" or the error's text."""
    found: list[int | str] = []
    try:
        source.open()
        while (frame := source.read()) is not None:
            found.append(frame.problem if frame.pixels is None else number_of(frame.pixels))
    except SourceError as error:
        return found, str(error)
    finally:
        source.close()
    return found, "end"


@pytest.mark.parametrize("name", ["a.avi", "a.mkv", "a.mp4", "b.mkv", "b.mp4", "b.ts"])
def test_every_frame_in_order_and_then_the_end(tmp_path: Path, name: str) -> None:
    codec = "libx264" if name.startswith("b") else "mjpeg"
    source = make_source(str(write(tmp_path / name, codec)))
    assert isinstance(source, VideoSource)
    for _ in range(2):  # opened again, it begins again
        assert read(source) == (list(range(40)), "end")


def test_pixels_are_rgb(tmp_path: Path) -> None:
    image = np.zeros((48, 66, 3), np.uint8)
    image[:] = (200, 100, 50)
    for codec, matrix in (("mjpeg", 5), ("libx264", 1), ("libx264", 5)):
        path = tmp_path / f"{codec}{matrix}.mkv"
        with av.open(str(path), "w") as file:
            stream = file.add_stream(codec, rate=25)
            stream.height, stream.width = image.shape[:2]
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            stream.codec_context.colorspace = matrix
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame = frame.reformat(format=stream.pix_fmt, dst_colorspace="ITU709" if matrix == 1 else "ITU601")
            file.mux(stream.encode(frame))
            file.mux(stream.encode())
        source = VideoSource(path)
        source.open()
        got = source.read()
        source.close()
        assert got is not None
        assert got.pixels is not None
        assert (got.colour, got.pixels.dtype, got.pixels.shape) == ("rgb", np.uint8, image.shape)
        assert got.pixels.strides[1:] == (3, 1)
        np.testing.assert_allclose(got.pixels.mean(axis=(0, 1)), (200, 100, 50), atol=4)


def test_size_may_change_in_the_middle(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.ts", "libx264", 30, ((96, 128), (144, 176), (64, 64)), **{"x264-params": "repeat-headers=1"}
    )
    source = VideoSource(path)
    source.open()
    shapes, numbers = [], []
    while (frame := source.read()) is not None:
        assert frame.pixels is not None, frame.problem
        shapes.append(frame.pixels.shape[:2])
        numbers.append(number_of(frame.pixels))
    source.close()
    assert numbers == list(range(30))
    assert shapes == [(96, 128)] * 10 + [(144, 176)] * 10 + [(64, 64)] * 10


@pytest.mark.parametrize("name", ["a.avi", "a.mkv", "a.mp4", "b.mkv", "b.mp4"])
def test_truncated_file_gives_what_is_there_and_then_an_error(tmp_path: Path, name: str) -> None:
    codec = "libx264" if name.startswith("b") else "mjpeg"
    path = write(tmp_path / name, codec)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    found, end = read(VideoSource(path))
    numbers = [number for number in found if isinstance(number, int)]
    assert 5 < len(numbers) < 40
    assert numbers == list(range(len(numbers)))
    assert end.startswith(f"{path}: ended ")
    assert end.endswith("truncated or damaged")


def test_file_that_has_lost_its_index_or_is_none_cannot_be_opened(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.mp4", "libx264").read_bytes()
    (tmp_path / "b.mp4").write_bytes(whole[:100])
    (tmp_path / "c.mkv").write_bytes(b"")
    (tmp_path / "d.mp4").write_text("#EXTM3U\n")
    (tmp_path / "e.mp4").mkdir()
    for name in "b.mp4", "c.mkv", "d.mp4", "e.mp4", "missing.mp4":
        found, end = read(VideoSource(tmp_path / name))
        assert (found, end.partition(": ")[0]) == ([], str(tmp_path / name))
        assert end.count(str(tmp_path)) == 1


def test_playlist_does_not_read_another_file(tmp_path: Path) -> None:
    write(tmp_path / "secret.ts", "libx264", 25)
    for name, text in (
        ("list.mkv", f"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/{tmp_path}/x.ts\n#EXT-X-ENDLIST\n"),
        ("concat.mkv", "ffconcat version 1.0\nfile http://127.0.0.1:9/x.ts\n"),
    ):
        (tmp_path / name).write_text(text)
        found, end = read(VideoSource(tmp_path / name))
        assert found == []
        assert end != "end"


def test_sound_alone_is_no_video(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mkv"), "w") as file:
        stream = file.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.rate = 8000
        file.mux(stream.encode(frame))
    assert read(VideoSource(tmp_path / "a.mkv"))[1].endswith("expected a video, got no video stream")


def damaged(data: bytes, seed: int) -> bytes:
    """Twenty bytes changed in the middle third, or a piece of it cut out."""
    rng = np.random.default_rng(seed)
    changed = bytearray(data)
    if seed % 4 == 3:
        at = int(rng.integers(len(data) // 3, len(data) // 2))
        del changed[at : at + int(rng.integers(1, len(data) // 6))]
        return bytes(changed)
    for at in rng.integers(len(data) // 3, len(data) * 2 // 3, 20):
        changed[at] ^= int(rng.integers(1, 256))
    return bytes(changed)


FUZZ = """
import sys
from pathlib import Path
from test_video_file import VideoSource, damaged, number_of, read
path, target = map(Path, sys.argv[1:])
data = path.read_bytes()
for seed in range(30):
    target.write_bytes(damaged(data, seed))
    found, end = read(VideoSource(target))
    print(seed, sum(isinstance(n, int) for n in found), sum(isinstance(n, str) for n in found), end, sep="|", flush=True)
# Not ru_maxrss, which begins with the size of the process that started this one.
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print("memory", int(status["VmHWM"].split()[0]) // 1024)
"""


@pytest.mark.parametrize("name", ["a.avi", "b.mkv", "b.mp4", "b.ts"])
def test_damage_in_the_middle_is_neither_crash_nor_hang_nor_growth(tmp_path: Path, name: str) -> None:
    """In a process of its own, since a crash of a decoder would end this one."""
    codec = "libx264" if name.startswith("b") else "mjpeg"
    path = write(tmp_path / name, codec)
    result = subprocess.run(
        [sys.executable, "-c", FUZZ, str(path), str(tmp_path / f"damaged{path.suffix}")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    *rows, memory = result.stdout.splitlines()
    assert len(rows) == 30
    outcomes = [row.split("|") for row in rows]
    assert all(int(good) + int(bad) <= 140 for _, good, bad, _ in outcomes)
    assert sum(int(bad) > 0 or end != "end" for _, _, bad, end in outcomes) >= 15  # most damage is noticed
    assert sum(int(good) > 0 for _, good, _, _ in outcomes) >= 25  # and what is whole is read
    assert int(memory.split()[1]) < 400


def test_frames_predicted_from_a_damaged_one_are_problems_until_the_next_key_frame(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mkv", "libx264", 40, g="20", bf="0", preset="ultrafast")
    with av.open(str(path)) as file:
        packets = [packet for packet in file.demux() if packet.size]
        hurt = bytes(packets[5])
    data = path.read_bytes()
    at = data.index(hurt)
    path.write_bytes(data[: at + 4] + b"\xff" * (len(hurt) - 4) + data[at + len(hurt) :])
    found, end = read(VideoSource(path))
    assert end == "end"
    assert found[:5] == list(range(5))
    assert found[-20:] == list(range(20, 40))
    between = found[5:-20]
    assert len(between) >= 14
    assert all(isinstance(item, str) for item in between)
    assert all("packet cannot be decoded" in str(item) or "incomplete" in str(item) for item in between)


def test_huge_frame_is_a_problem_not_memory(tmp_path: Path) -> None:
    """A header may claim any size; the decoder refuses what no frame may have."""
    jpeg = bytearray(b"")
    with av.open(str(write(tmp_path / "a.avi", n=2))) as file:
        jpeg += bytes(next(packet for packet in file.demux() if packet.size))
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = (60000).to_bytes(2, "big") + (60000).to_bytes(2, "big")
    (tmp_path / "a.mjpeg").write_bytes(bytes(jpeg) * 3)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found, _ = read(VideoSource(tmp_path / "a.mjpeg"))
    assert all(isinstance(item, str) for item in found)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


def test_memory_does_not_grow_with_the_video(tmp_path: Path) -> None:
    source = VideoSource(write(tmp_path / "a.mkv", "libx264"), loop=True)
    source.open()
    for _ in range(400):
        source.read()
    before = _resident()
    for _ in range(2000):
        assert source.read() is not None
    source.close()
    assert _resident() - before < 20 << 20


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_rate_and_loop(tmp_path: Path) -> None:
    source = make_source(f"video:{write(tmp_path / 'clip.avi', n=3)}#fps=50&loop=1")
    source.open()
    began = time.monotonic()
    numbers = [number_of(f.pixels) for _ in range(8) if (f := source.read()) and f.pixels is not None]
    assert numbers == [0, 1, 2, 0, 1, 2, 0, 1]
    assert time.monotonic() - began > 0.13
    source.close()
    assert source.read() is None
