"""RTSP servers for tests, and what their frames say; nothing here is a test."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import gstreamer_here
import numpy as np
import rtsp_server
from numpy.typing import NDArray


@contextmanager
def server(
    codec: str = "mjpeg", *more: str, port: int = 0, fps: int = 50
) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The server's process and its port."""
    command = [sys.executable, rtsp_server.__file__, str(port), codec, str(fps), *more]
    environment = gstreamer_here.environment()
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, int(process.stdout.readline().split()[1])
        finally:
            process.send_signal(signal.SIGCONT)
            process.kill()


def number_of(pixels: NDArray[np.uint8]) -> int:
    fields = pixels[8:24, :, 1].reshape(16, rtsp_server.BITS, -1)[:, :, 5:-5].mean(axis=(0, 2))
    return int(sum(1 << i for i, value in enumerate(fields) if value > 127))
