"""An HTTP server on loopback that answers as it is told."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Receiver:
    """Notes every POST.  ``answer``: the status, or "hang", "drop" (no answer)."""

    def __init__(self, port: int = 0) -> None:
        self.answer: int | str = 200
        self.headers: dict[str, str] = {}
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.accepted: list[int] = []
        self.times: list[float] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                receiver.times.append(time.monotonic())
                receiver.requests.append((self.path, dict(self.headers), body))
                answer = receiver.answer
                if answer == "hang":
                    receiver.released.wait(30)
                if not isinstance(answer, int):
                    self.close_connection = True
                    return
                if 200 <= answer < 300:
                    receiver.accepted.append(body["index"])
                self.send_response(answer)
                for name, value in receiver.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *arguments: Any) -> None:
                pass

        self.released = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def stop(self) -> None:
        """The port is then closed, as of a server that is gone."""
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
