"""Flagged outcomes as HTTP POST to a URL, by a thread of its own that tries again."""

from __future__ import annotations

import base64
import http.client
import logging
import os
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from email.message import Message
from typing import Any, Literal, get_args
from urllib.parse import unquote, urlsplit

from inflight_edge.errors import OptionError, SinkError
from inflight_edge.events import Context, Outcome
from inflight_edge.sinks.record import encode, flagged
from inflight_edge.uri import Uri, one_of, real_number, whole_number

__all__ = ["Send", "WebhookSink", "from_address"]

Send = Literal["flagged", "alarm", "all"]
_SENDS: tuple[Send, ...] = get_args(Send)

_log = logging.getLogger(__name__)
_FIRST_DELAY_S = 0.5
_MAX_DELAY_S = 30.0
# Answers that ask for another try: timeout, too early, too many requests, and the server's own failures.
_AGAIN = frozenset({408, 425, 429, *range(500, 600)})


class WebhookSink:
    """Posts records as JSON, one at a time and in order.

    A server that fails or does not answer is asked again, after .5 s and then longer, up to 30 s.  An answer that says
    that the request itself is wrong (404, 401, a redirection) loses that outcome, which the next flush tells.  An
    outcome may arrive twice when an answer was lost; camera, index and captured_ns tell.

    send       "flagged": triggers and invalid frames; "alarm": outcomes with which a camera's alarm goes on or off;
               "all": every one, drops too.
    timeout_s  of connecting and of each wait for bytes; also how long close goes on delivering.
    buffer     outcomes kept; one beyond is lost.
    token      sent as ``Authorization: Bearer``; user and password of the URL are sent as ``Basic``.
    """

    def __init__(
        self, url: str, *, send: Send = "flagged", timeout_s: float = 5.0, buffer: int = 1000, token: str | None = None
    ) -> None:
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise OptionError(f"webhook: expected https://HOST/PATH: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise OptionError(f"webhook: expected https://HOST/PATH, got the scheme {parts.scheme!r} and no host")
        if any(ord(character) <= 32 or ord(character) > 126 for character in url):
            raise OptionError("webhook: expected a URL of visible ASCII characters; write others as %XX")
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        # No path: those of chat services are secrets.
        self.name = f"webhook:{host}" + (f":{port}" if port else "")
        self._url = parts._replace(netloc=host + (f":{port}" if port else ""), fragment="").geturl()
        self._headers = {"Content-Type": "application/json", "User-Agent": "inflight-edge"}
        if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
            raise OptionError(
                "webhook: token: expected printable ASCII without spaces, got others; is there a line end?"
            )
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        elif parts.username is not None:
            login = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
            self._headers["Authorization"] = f"Basic {base64.b64encode(login).decode('ascii')}"
        self._send, self._timeout_s, self._size = send, timeout_s, buffer
        self._context: Context | None = None
        self._alarms: dict[str, bool] = {}
        self._changed = threading.Condition()
        self._waiting: deque[bytes] = deque()  # the first one is being delivered
        self._deadline: float | None = None  # set by close: time.monotonic() after which the worker ends
        self._refused, self._refusal = 0, ""

    def open(self, context: Context) -> None:
        """Start the thread; the server is not asked.  Raises no error."""
        self._waiting.clear()
        self._alarms.clear()
        self._deadline, self._refused = None, 0
        self._context = context
        self._worker = threading.Thread(target=self._run, name=self.name, daemon=True)
        self._worker.start()

    def write(self, outcome: Outcome) -> None:
        """Keep the outcome if it is of those to send; returns at once.  Raises SinkError when the buffer is full."""
        if self._context is None:
            raise SinkError(f"{self.name}: not open; call open first")
        if not self._wanted(outcome):
            return
        body = encode(outcome, self._context)
        with self._changed:
            if len(self._waiting) >= self._size:
                raise SinkError(f"{self.name}: outcome lost: {self._size} are waiting for the server")
            self._waiting.append(body)
            self._changed.notify_all()

    def _wanted(self, outcome: Outcome) -> bool:
        if self._send == "flagged":
            return flagged(outcome)
        if self._send == "all":
            return True
        if outcome.verdict is None:
            return False  # a drop tells of the alarm as another thread saw it: no news, and maybe old
        before = self._alarms.get(outcome.frame.camera, False)
        self._alarms[outcome.frame.camera] = outcome.alarm
        return outcome.alarm != before

    def flush(self) -> None:
        """Raises SinkError when the server refused outcomes since the last call."""
        with self._changed:
            refused, self._refused = self._refused, 0
        if refused:
            message = f"{self.name}: {refused} outcome(s) lost: refused with {self._refusal}; check the URL"
            raise SinkError(message, lost=refused)

    def close(self) -> None:
        """Go on delivering for up to timeout_s.  Raises SinkError when some outcomes could not be delivered."""
        if self._context is None:
            return
        self._context = None
        with self._changed:
            self._deadline = time.monotonic() + self._timeout_s
            self._changed.notify_all()
        # A server that sends a byte now and then can hold the thread longer; it is a daemon and left behind.
        self._worker.join(self._timeout_s + 1.0)
        with self._changed:
            lost, refused = len(self._waiting), self._refused
            self._waiting.clear()
        if lost:
            also = f", and {refused} refused with {self._refusal}" if refused else ""
            message = f"{self.name}: {lost} outcome(s) lost: not delivered before the end{also}"
            raise SinkError(message, lost=lost + refused)
        self.flush()

    def _run(self) -> None:
        """The worker.  The first outcome stays in the buffer until it is delivered or refused."""
        opener = urllib.request.build_opener(_NoRedirection)
        delay, failing = 0.0, False
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._over() or self._waiting)
                if not self._waiting or self._over():
                    return
                body, last = self._waiting[0], self._closing()
            problem, refused, wait_s = self._post(opener, body)
            with self._changed:
                if not problem or refused:
                    if not self._waiting:
                        return  # close gave up on them
                    self._waiting.popleft()
                    self._refused += refused
                    self._refusal = problem
                    delay = 0.0
                    if failing and not problem:
                        _log.info("%s: delivers again", self.name)
                    failing = False
                    continue
            if not failing:
                _log.warning("%s: %s; trying again", self.name, problem)
            failing = True
            delay = min(max(2 * delay, _FIRST_DELAY_S, wait_s), _MAX_DELAY_S)
            with self._changed:
                if last:
                    return
                self._changed.wait_for(self._closing, timeout=delay)  # closing: one more try

    def _over(self) -> bool:
        return self._deadline is not None and (not self._waiting or time.monotonic() >= self._deadline)

    def _closing(self) -> bool:
        return self._deadline is not None

    def _post(self, opener: urllib.request.OpenerDirector, body: bytes) -> tuple[str, bool, float]:
        """One try: the problem or "", whether another try is useless, seconds that the server asks to wait."""
        request = urllib.request.Request(self._url, body, self._headers, method="POST")
        try:
            with opener.open(request, timeout=self._timeout_s) as answer:
                answer.read(1 << 16)
            return "", False, 0.0
        except urllib.error.HTTPError as error:
            with error:
                return f"HTTP {error.code}", error.code not in _AGAIN, _seconds(error.headers)
        except urllib.error.URLError as error:
            return f"no answer: {error.reason}", False, 0.0
        except (OSError, http.client.HTTPException) as error:  # TimeoutError is an OSError
            return f"no answer: {str(error) or type(error).__name__}", False, 0.0
        except Exception as error:  # noqa: BLE001 - the worker must go on; the text may hold a header, so the token
            return f"no answer: {type(error).__name__}", False, 0.0


class _NoRedirection(urllib.request.HTTPRedirectHandler):
    """urllib would follow with a GET that carries nothing, and the outcome would seem delivered."""

    def redirect_request(self, *arguments: Any, **names: Any) -> None:
        return None


def _seconds(headers: Message | None) -> float:
    """Retry-After in seconds; 0 without one, or with a date."""
    text = "" if headers is None else headers.get("Retry-After", "")
    return float(text) if text.isascii() and text.isdigit() else 0.0


def from_address(address: Uri) -> WebhookSink:
    """http://... or https://...; a token from the environment.  Raises OptionError."""
    sink = WebhookSink(
        f"{address.scheme}:{address.rest}",
        send=address.take("send", one_of(_SENDS), "flagged"),
        timeout_s=address.take("timeout_s", real_number(0.01, 600), 5.0),
        buffer=address.take("buffer", whole_number(1, 1_000_000), 1000),
        token=os.environ.get("INFLIGHT_EDGE_WEBHOOK_TOKEN"),
    )
    address.finish()
    return sink
