"""Prometheus: a real scrape, parsed as a server parses it."""

from __future__ import annotations

import contextlib
import socket
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from outcomes import accepted, context, dropped, status, triggered

from inflight_edge import OptionError, SinkError
from inflight_edge.events import Context
from inflight_edge.sinks import make_sink, prometheus

parser = pytest.importorskip("prometheus_client.parser", reason="prometheus-client is not installed")


@contextlib.contextmanager
def opened(address: str = "prometheus://127.0.0.1:0", using: Context | None = None) -> Iterator[Any]:
    sink = make_sink(address)
    sink.open(using or context())
    try:
        yield sink
    finally:
        sink.close()


def scrape(sink: Any) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample by name and labels."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://127.0.0.1:{sink.port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in parser.text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(samples: dict[Any, float], name: str, **labels: str) -> float:
    renamed = {"class" if key == "class_" else key: text for key, text in labels.items()}
    return samples[f"inflight_edge_{name}", tuple(sorted(renamed.items()))]


def test_a_scrape_has_the_counts_of_the_pipeline() -> None:
    with opened() as sink:
        samples = scrape(sink)
    assert value(samples, "frames_captured_total", camera="front") == 12
    assert value(samples, "frames_judged_total", camera="rear") == 3
    assert value(samples, "frames_dropped_total", camera="front", reason="newer frame") == 2
    assert value(samples, "verdicts_total", camera="front", decision="accept", class_="north") == 7
    assert value(samples, "verdicts_total", camera="rear", decision="invalid", class_="") == 3
    assert value(samples, "reconnects_total", camera="rear") == 4
    assert value(samples, "outcomes_lost_total", sink="stdout") == 6
    assert value(samples, "queue_depth", queue="sink stdout") == 5
    assert value(samples, "alarm", camera="front") == 1
    assert value(samples, "alarm", camera="rear") == 0
    assert value(samples, "uptime_seconds") == 4.5
    assert value(samples, "stage_quantile_seconds", stage="engine", quantile="0.99") == pytest.approx(3e-3)
    assert value(samples, "stage_quantile_seconds", stage="whole", quantile="1") == pytest.approx(6e-3)


def test_the_histogram_is_of_the_outcomes() -> None:
    with opened() as sink:
        for index in range(3):
            sink.write(accepted(index))
        sink.write(dropped(3))
        sink.write(triggered(4))
        samples = scrape(sink)
    assert value(samples, "stage_seconds_count", stage="engine") == 4
    assert value(samples, "stage_seconds_sum", stage="engine") == pytest.approx(4 * 2e-3)
    assert value(samples, "stage_seconds_bucket", stage="engine", le="0.001") == 0
    assert value(samples, "stage_seconds_bucket", stage="engine", le="0.0025") == 4
    assert value(samples, "stage_seconds_bucket", stage="engine", le="+Inf") == 4


def test_every_scrape_is_of_its_moment() -> None:
    captured = {"front": 1}
    with opened(using=context(status=lambda: status(captured=dict(captured)))) as sink:
        assert value(scrape(sink), "frames_captured_total", camera="front") == 1
        captured["front"] = 5
        assert value(scrape(sink), "frames_captured_total", camera="front") == 5


def test_many_classes_and_reasons_are_bounded_and_never_go_back() -> None:
    classes = {("front", "accept", f"class {i}"): 1 for i in range(5)}
    reasons = {("front", f"reason {i}"): 1 for i in range(5)}
    counts = status(decisions=classes, dropped=reasons)
    with opened("prometheus://127.0.0.1:0#max_labels=4", context(status=lambda: counts)) as sink:
        before = scrape(sink)
        classes.update({("front", "accept", f"class {i}"): 10 * i for i in range(3, 500)})
        reasons.update({("front", f"reason {i}"): 1 for i in range(1000)})
        after = scrape(sink)
    for samples in (before, after):
        assert sum(name == "inflight_edge_verdicts_total" for name, _ in samples) == 5
        assert sum(name == "inflight_edge_frames_dropped_total" for name, _ in samples) == 5
    assert value(after, "verdicts_total", camera="front", decision="accept", class_="class 3") == 30
    everything = sum(v for (name, _), v in after.items() if name == "inflight_edge_verdicts_total")
    assert everything == sum(classes.values())
    assert all(after[key] >= count for key, count in before.items() if "_total" in key[0])


def test_it_listens_on_loopback_unless_told() -> None:
    with opened("prometheus://:0") as sink:
        assert sink._server.server_address[0] == "127.0.0.1"
    with opened("prometheus://0.0.0.0:0") as sink:
        assert sink._server.server_address[0] == "0.0.0.0"
    assert make_sink("prometheus://").name == "prometheus:127.0.0.1:9108"


def test_idle_connection_is_closed_without_a_word(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prometheus, "_IDLE_S", 0.3)
    with opened() as sink:
        with socket.create_connection(("127.0.0.1", sink.port), 10) as idle:
            assert idle.recv(1) == b""
        assert scrape(sink)
    assert capfd.readouterr().err == ""


def test_a_port_in_use_is_an_error_and_free_after_close() -> None:
    with opened() as sink:
        address = f"prometheus://127.0.0.1:{sink.port}"
        with pytest.raises(SinkError, match="cannot listen: Address already in use; choose another port"):
            make_sink(address).open(context())
    with socket.socket() as client:
        assert client.connect_ex(("127.0.0.1", sink.port)) != 0
    with opened(address):
        pass


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("prometheus:9108", "expected prometheus://HOST:PORT and no more"),
        ("prometheus://127.0.0.1:9108/metrics", "and no more"),
        ("prometheus://127.0.0.1:99999", "expected prometheus://HOST:PORT: Port out of range"),
        ("prometheus://127.0.0.1:9108#max_labels=0", "option max_labels: expected an integer from 1"),
        ("prometheus://127.0.0.1:9108#colour=1", "unknown option colour"),
    ],
)
def test_addresses_that_are_refused(address: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make_sink(address)
