"""Metrics for Prometheus, served over HTTP with prometheus-client."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from inflight_edge._optional import require
from inflight_edge.errors import OptionError, SinkError
from inflight_edge.events import Context, Outcome
from inflight_edge.uri import Uri, whole_number

__all__ = ["PrometheusSink", "from_address"]

_REMEDY = "pip install 'inflight-edge[prometheus]'"
_PREFIX = "inflight_edge"
_IDLE_S = 10.0
# Seconds.
_BUCKETS = (.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1.0, 2.5)  # fmt: skip


# Values of a metric by its labels.
_Values = Mapping[tuple[str, ...], float]


class PrometheusSink:
    """Counts come from the pipeline's own status at each scrape, so that nothing is lost with an outcome; only the
    latency histogram is fed by the outcomes.  A drop is counted by its reason.

    host        what to listen on; other machines can read it only on an address of the network.
    max_labels  distinct classes, and distinct reasons of drops, that get a time series; further ones are ``other``.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 9108, *, max_labels: int = 100) -> None:
        self.name = f"prometheus:{host}:{port}"
        self.port = port  # the real one once open, if 0 was asked for
        self._host, self._max_labels = host, max_labels
        self._latency: Any = None
        self._server: Any = None

    def open(self, context: Context) -> None:
        """Listen.  Raises SinkError when the address is not to be had, DependencyError."""
        client = require("prometheus_client", _REMEDY)
        registry = client.CollectorRegistry()
        latency = client.Histogram(
            f"{_PREFIX}_stage_seconds", "Time of a frame in a stage", ["stage"], buckets=_BUCKETS, registry=registry
        )
        registry.register(_Counts(context, self._max_labels))
        try:
            self._server, self._thread = client.start_http_server(self.port, self._host, registry)
        except OSError as error:
            raise SinkError(f"{self.name}: cannot listen: {error.strerror or error}; choose another port") from error
        # Its server waits for a request for ever: idle connections would use up this process's files.
        self._server.RequestHandlerClass = _impatient(self._server.RequestHandlerClass)
        self._latency = latency
        self.port = self._server.server_port

    def write(self, outcome: Outcome) -> None:
        """Count the latencies."""
        if self._latency is None:
            raise SinkError(f"{self.name}: not open; call open first")
        for stage, nanoseconds in outcome.stages.items():
            self._latency.labels(stage).observe(nanoseconds * 1e-9)

    def flush(self) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Stop listening."""
        if self._server is None:
            return
        server, self._server, self._latency = self._server, None, None
        server.shutdown()
        server.server_close()
        self._thread.join()


def _impatient(handler: Any) -> Any:
    """The server's handler of requests, with a limit to waiting for one."""

    class Impatient(handler):  # type: ignore[misc]
        timeout = _IDLE_S

        def handle(self) -> None:
            with contextlib.suppress(TimeoutError):
                super().handle()

    return Impatient


class _Counts:
    """A collector of prometheus-client: the status at the moment of the scrape."""

    def __init__(self, context: Context, max_labels: int) -> None:
        self._context = context
        self._metrics = require("prometheus_client.core", _REMEDY)
        self._class, self._reason = _Limited(max_labels), _Limited(max_labels)

    def describe(self) -> list[Any]:
        """None, so that registering asks for no status."""
        return []

    def collect(self) -> Iterator[Any]:
        status = self._context.status()
        yield self._counter("frames_captured", "Frames that a camera gave", ("camera",), _keyed(status.captured))
        yield self._counter("frames_judged", "Frames with a verdict", ("camera",), _keyed(status.judged))
        dropped = _summed(((camera, self._reason(reason)), count) for (camera, reason), count in status.dropped.items())
        yield self._counter("frames_dropped", "Frames that were never judged", ("camera", "reason"), dropped)
        verdicts = _summed(
            ((camera, decision, self._class(name)), count)
            for (camera, decision, name), count in status.decisions.items()
        )
        yield self._counter("verdicts", "Verdicts by predicted class", ("camera", "decision", "class"), verdicts)
        yield self._counter(
            "reconnects", "Connections to a camera after the first", ("camera",), _keyed(status.reconnects)
        )
        yield self._counter("outcomes_lost", "Outcomes that a sink did not take", ("sink",), _keyed(status.lost))
        yield self._gauge("queue_depth", "What waits in a queue", ("queue",), _keyed(status.queues))
        cameras = {*self._context.cameras, *status.alarms}
        alarms: _Values = {(camera,): int(camera in status.alarms) for camera in sorted(cameras)}
        yield self._gauge("alarm", "1 while the camera's alarm is on", ("camera",), alarms)
        yield self._gauge("uptime_seconds", "Since the start of the pipeline", (), {(): status.uptime_ns * 1e-9})
        quantiles: dict[tuple[str, ...], float] = {}
        for stage, summary in status.stages.items():
            figures = {"0.5": summary.p50_ns, "0.99": summary.p99_ns, "0.999": summary.p999_ns, "1": summary.max_ns}
            quantiles |= {(stage, quantile): ns * 1e-9 for quantile, ns in figures.items()}
        help_text = "Quantiles of the time of a frame in a stage, since the start"
        yield self._gauge("stage_quantile_seconds", help_text, ("stage", "quantile"), quantiles)

    def _counter(self, name: str, text: str, labels: tuple[str, ...], values: _Values) -> Any:
        return _filled(self._metrics.CounterMetricFamily(f"{_PREFIX}_{name}", text, labels=labels), values)

    def _gauge(self, name: str, text: str, labels: tuple[str, ...], values: _Values) -> Any:
        return _filled(self._metrics.GaugeMetricFamily(f"{_PREFIX}_{name}", text, labels=labels), values)


class _Limited:
    """The first values stay themselves for ever, so that a counter never goes back; later ones are ``other``."""

    def __init__(self, limit: int) -> None:
        self._limit, self._known = limit, {""}

    def __call__(self, value: str) -> str:
        if value not in self._known:
            if len(self._known) > self._limit:
                return "other"
            self._known.add(value)
        return value


def _summed(counts: Iterable[tuple[tuple[str, ...], int]]) -> _Values:
    total: dict[tuple[str, ...], int] = {}
    for labels, count in counts:
        total[labels] = total.get(labels, 0) + count
    return total


def _keyed(values: Mapping[str, int]) -> _Values:
    return {(name,): value for name, value in values.items()}


def _filled(family: Any, values: _Values) -> Any:
    for labels, value in values.items():
        family.add_metric(labels, value)
    return family


def from_address(address: Uri) -> PrometheusSink:
    """prometheus://HOST:PORT, 127.0.0.1:9108 unless told.  Raises OptionError."""
    expected = f"{address.text}: expected prometheus://HOST:PORT"
    try:
        parts = urlsplit(f"prometheus:{address.rest}")
        port = parts.port
    except ValueError as error:
        raise OptionError(f"{expected}: {error}") from None
    if not address.rest.startswith("//") or parts.path not in ("", "/") or parts.query or parts.username is not None:
        raise OptionError(f"{expected} and no more")
    max_labels = address.take("max_labels", whole_number(1, 100_000), 100)
    address.finish()
    return PrometheusSink(parts.hostname or "127.0.0.1", 9108 if port is None else port, max_labels=max_labels)
