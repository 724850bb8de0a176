"""An RTSP server on loopback that streams numbered frames: ``python rtsp_server.py PORT CODEC FPS [FRAMES] [USER PASS]``.

Every client gets frames 0, 1, 2, ... of its own, and after FRAMES of them the end.  Prints ``ready PORT``.
With RTSP_NUMBERS=clock in the environment a number is the milliseconds of the monotonic clock instead.
A frame shows its number in 16 fields of black or white along the top, and below three pictures in turn, which
the classifier of bundles.py takes for west, and the last two for triggers: of north, of south.
"""

from __future__ import annotations

import os
import sys
import time

WIDTH, HEIGHT, STRIP, BITS = 320, 240, 32, 16
# Grey of the four quadrants: top left, top right, bottom left, bottom right.
PICTURES = ((0, 0, 0, 255), (127, 0, 0, 255), (0, 0, 127, 255))

ENCODERS = {
    "mjpeg": "jpegenc quality=95 ! rtpjpegpay name=pay0",
    "h264": "x264enc tune=zerolatency speed-preset=ultrafast key-int-max=10 bitrate=2000 ! rtph264pay name=pay0",
    "h264b": "x264enc bframes=2 b-adapt=false speed-preset=ultrafast key-int-max=12 bitrate=2000 ! rtph264pay name=pay0",
}


def picture(number: int) -> bytes:
    """Grey pixels of a frame, row by row; bit i of the number is field i from the left."""
    strip = b"".join((b"\xe0" if number >> i & 1 else b"\x20") * (WIDTH // BITS) for i in range(BITS))
    grey = [bytes([value]) * (WIDTH // 2) for value in PICTURES[number % len(PICTURES)]]
    half = HEIGHT // 2
    return strip * STRIP + (grey[0] + grey[1]) * (half - STRIP) + (grey[2] + grey[3]) * half


def main() -> None:
    import gi

    gi.require_version("Gst", "1.0")
    gi.require_version("GstRtspServer", "1.0")
    from gi.repository import GLib, Gst, GstRtspServer

    port, codec, fps = sys.argv[1], sys.argv[2], int(sys.argv[3])
    clock = os.environ.get("RTSP_NUMBERS") == "clock"
    limit = int(sys.argv[4]) if len(sys.argv) > 4 else 1 << BITS
    Gst.init(None)

    def configure(factory: object, media: GstRtspServer.RTSPMedia) -> None:
        source = media.get_element().get_by_name("source")
        number = 0

        def push() -> bool:
            nonlocal number
            if number >= limit:
                source.emit("end-of-stream")
                return False
            shown = time.monotonic_ns() // 1_000_000 % (1 << BITS) if clock else number
            buffer = Gst.Buffer.new_wrapped(picture(shown))
            buffer.duration = Gst.SECOND // fps
            number += 1
            return bool(source.emit("push-buffer", buffer) == Gst.FlowReturn.OK)

        GLib.timeout_add(1000 // fps, push)

    factory = GstRtspServer.RTSPMediaFactory()
    factory.set_launch(
        "( appsrc name=source is-live=true do-timestamp=true format=time "
        f"caps=video/x-raw,format=GRAY8,width={WIDTH},height={HEIGHT},framerate={fps}/1 "
        f"! videoconvert ! video/x-raw,format=I420 ! {ENCODERS[codec]} )"
    )
    factory.connect("media-configure", configure)
    server = GstRtspServer.RTSPServer()
    server.set_address("127.0.0.1")
    server.set_service(port)
    if len(sys.argv) > 6:
        auth = GstRtspServer.RTSPAuth()
        token = GstRtspServer.RTSPToken()
        token.set_string("media.factory.role", "viewer")
        auth.add_basic(GstRtspServer.RTSPAuth.make_basic(sys.argv[5], sys.argv[6]), token)
        server.set_auth(auth)
        factory.add_role_from_structure(
            Gst.Structure.new_from_string("viewer, media.factory.access=true, media.factory.construct=true")
        )
    server.get_mount_points().add_factory("/stream", factory)
    server.attach(None)
    print("ready", server.get_bound_port(), flush=True)
    GLib.MainLoop().run()


if __name__ == "__main__":
    main()
