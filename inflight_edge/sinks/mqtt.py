"""Outcomes to an MQTT broker with paho-mqtt: acknowledged, in order, kept while the broker is away."""

from __future__ import annotations

import logging
import os
import threading
import uuid
from collections import deque
from typing import Any
from urllib.parse import unquote, urlsplit

from inflight_edge._optional import require
from inflight_edge.errors import OptionError, SinkError
from inflight_edge.events import Context, Outcome
from inflight_edge.sinks.record import encode
from inflight_edge.uri import Uri, one_of, real_number, whole_number

__all__ = ["MqttSink", "from_address"]

_log = logging.getLogger(__name__)
# Outcomes that the broker has not yet acknowledged: enough for 30 frames/s over 600 ms there and back, and few
# enough that a socket's buffer takes them all, so that paho's thread never waits for a broker that hangs.
_WINDOW = 20
_MAX_DELAY_S = 10


class MqttSink:
    """Publishes every outcome, drops too, as its record; ``TOPIC/status`` says online or offline, retained.

    Order is kept, over reconnections too.  paho alone would not: what is published between the connection and the
    broker's answer overtakes what it kept.  So outcomes wait here and reach paho one window at a time.

    buffer    outcomes kept while the broker is away or slow; one beyond is lost, and counted by the pipeline.
    qos       1: at least once, so a reconnection may repeat some; 2: exactly once while the connection holds.
    tls       with ``ca``, a file of certificates to trust instead of the system's.
    close_s   how long close waits for acknowledgements.
    """

    def __init__(
        self, host: str, port: int, topic: str, *, qos: int = 1, client_id: str = "", buffer: int = 10_000,
        user: str | None = None, password: str | None = None, tls: bool = False, ca: str | None = None,
        close_s: float = 5.0,
    ) -> None:  # fmt: skip
        if not host:
            raise OptionError("mqtt: expected a host, got none; write mqtt://HOST/TOPIC")
        if not topic or any(character in topic for character in "+#\0") or len(topic.encode()) > 65_000:
            raise OptionError(f"mqtt: topic: expected a name without + and #, got {topic!r}; write mqtt://HOST/TOPIC")
        self.name = f"mqtt:{host}:{port}/{topic}"
        self._address, self._topic, self._qos = (host, port), topic, qos
        self._client_id = client_id or f"inflight-edge-{uuid.uuid4().hex[:12]}"
        self._size, self._close_s = buffer, close_s
        self._login, self._tls, self._ca = (user, password), tls, ca
        self._context: Context | None = None
        self._client: Any = None
        self._worker: threading.Thread | None = None
        # Order of the locks: _publishing, then paho's own, then _changed.
        self._publishing = threading.RLock()
        self._changed = threading.Condition()
        self._reset()

    def _reset(self) -> None:
        self._waiting: deque[bytes] = deque()
        self._sent = self._acknowledged = self._resent_below = 0
        self._status: set[int] = set()  # paho's numbers of online messages, which are not counted
        self._connected = self._stop = False

    def open(self, context: Context) -> None:
        """Start connecting; a broker that is away is no error.  Raises SinkError, DependencyError."""
        paho = require("paho.mqtt.client", "pip install 'inflight-edge[mqtt]'")
        self._reset()
        client = paho.Client(paho.CallbackAPIVersion.VERSION2, client_id=self._client_id)
        client.max_inflight_messages_set(_WINDOW)
        client.reconnect_delay_set(1, _MAX_DELAY_S)
        client.will_set(f"{self._topic}/status", "offline", qos=1, retain=True)
        user, password = self._login
        if user is not None or password is not None:
            client.username_pw_set(user or "", password)
        if self._tls:
            try:
                client.tls_set(ca_certs=self._ca)
            except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
                raise SinkError(f"{self.name}: ca: cannot be used: {error}") from error
        client.on_connect, client.on_disconnect = self._on_connect, self._on_disconnect
        client.on_connect_fail, client.on_publish = self._on_connect_fail, self._on_publish
        self._client, self._context = client, context
        client.connect_async(*self._address, keepalive=20)
        client.loop_start()
        self._worker = threading.Thread(target=self._run, name=self.name, daemon=True)
        self._worker.start()

    def write(self, outcome: Outcome) -> None:
        """Keep the outcome for the broker; returns at once.  Raises SinkError when the buffer is full."""
        if self._context is None:
            raise SinkError(f"{self.name}: not open; call open first")
        payload = encode(outcome, self._context)
        with self._changed:
            if len(self._waiting) >= self._size:
                why = "the broker is slow" if self._connected else "the broker is away"
                raise SinkError(f"{self.name}: outcome lost: {self._size} are waiting and {why}")
            self._waiting.append(payload)
            self._changed.notify_all()

    def flush(self) -> None:
        """Nothing to do: what waits is on its way already."""

    def close(self) -> None:
        """Wait for the acknowledgements, say offline, disconnect.  Raises SinkError when some are missing."""
        if self._context is None:
            return
        self._context = None
        with self._changed:
            self._changed.wait_for(lambda: not self._missing(), timeout=self._close_s)
            self._stop = True
            missing, connected = self._missing(), self._connected
            self._changed.notify_all()
        if self._worker is not None:
            self._worker.join()
        if connected:
            # A clean disconnection makes the broker forget the last will.
            info = self._client.publish(f"{self._topic}/status", "offline", qos=1, retain=True)
            if info.rc == 0:
                info.wait_for_publish(timeout=1.0)
        self._client.disconnect()
        self._client.loop_stop()
        self._client = None
        if missing:
            message = f"{self.name}: {missing} outcome(s) lost: not acknowledged within {self._close_s:g} s"
            raise SinkError(message, lost=missing)

    def _missing(self) -> int:
        return len(self._waiting) + self._sent - self._acknowledged

    def _sendable(self) -> bool:
        """What paho sends again after a reconnection goes first."""
        return (
            self._connected
            and len(self._waiting) > 0
            and self._acknowledged >= self._resent_below
            and self._sent - self._acknowledged < _WINDOW
        )

    def _run(self) -> None:
        """The worker: hands what waits to paho while the connection holds."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stop or self._sendable())
                if self._stop:
                    return
            with self._publishing:  # the connection cannot change in between
                with self._changed:
                    if not self._sendable():
                        continue
                    payload = self._waiting.popleft()
                    self._sent += 1
                self._client.publish(self._topic, payload, qos=self._qos)

    # Called by paho's thread.

    def _on_connect(self, client: Any, userdata: object, flags: Any, reason: Any, properties: object) -> None:
        if reason.is_failure:
            _log.warning("%s: refused by the broker: %s", self.name, reason)
            return
        _log.info("%s: connected", self.name)
        with self._publishing:
            number = client.publish(f"{self._topic}/status", "online", qos=1, retain=True).mid
            with self._changed:
                self._status.add(number)
                self._connected, self._resent_below = True, self._sent
                self._changed.notify_all()

    def _on_disconnect(self, client: Any, userdata: object, flags: Any, reason: Any, properties: object) -> None:
        with self._publishing, self._changed:
            if self._connected and not self._stop:
                _log.warning("%s: connection lost: %s; %d waiting", self.name, reason, self._missing())
            self._connected = False

    def _on_connect_fail(self, client: Any, userdata: object) -> None:
        _log.warning("%s: no connection, trying again", self.name)

    def _on_publish(self, client: Any, userdata: object, mid: int, reason: object, properties: object) -> None:
        with self._changed:
            if mid in self._status:
                self._status.remove(mid)
                return
            self._acknowledged += 1
            self._changed.notify_all()


def from_address(address: Uri) -> MqttSink:
    """mqtt://[USER[:PASSWORD]@]HOST[:PORT]/TOPIC; the login else from the environment.  Raises OptionError."""
    try:
        parts = urlsplit(f"mqtt:{address.rest}")
        port = parts.port
    except ValueError as error:
        raise OptionError(f"{address.text}: expected mqtt://HOST:PORT/TOPIC: {error}") from None
    tls = address.scheme == "mqtts"
    sink = MqttSink(
        parts.hostname or "",
        port or (8883 if tls else 1883),
        parts.path[1:],
        qos=int(address.take("qos", one_of(("1", "2")), "1")),
        client_id=address.take("client_id", str, ""),
        buffer=address.take("buffer", whole_number(1, 1_000_000), 10_000),
        user=os.environ.get("INFLIGHT_EDGE_MQTT_USER") if parts.username is None else unquote(parts.username),
        password=os.environ.get("INFLIGHT_EDGE_MQTT_PASSWORD") if parts.password is None else unquote(parts.password),
        tls=tls,
        ca=address.take("ca", str, None) if tls else None,
        close_s=address.take("close_s", real_number(0, 3600), 5.0),
    )
    address.finish()
    return sink
