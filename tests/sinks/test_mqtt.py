"""MQTT with a real broker on loopback: acknowledged, in order, over the broker's death and return."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from outcomes import accepted, context, dropped, invalid, triggered
from waiting import wait_for

from inflight_edge import OptionError, SinkError
from inflight_edge.sinks import make_sink
from inflight_edge.sinks.record import record

mqtt = pytest.importorskip("paho.mqtt.client", reason="paho-mqtt is not installed")
MOSQUITTO = shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
pytestmark = pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed (apt install mosquitto)")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class Broker:
    """mosquitto on a port of its own; what it keeps for subscribers survives its death."""

    def __init__(self, folder: Path, *lines: str) -> None:
        self.port = free_port()
        self.configuration = folder / "mosquitto.conf"
        self.configuration.write_text(
            "\n".join((f"listener {self.port} 127.0.0.1", "max_queued_messages 0", *lines, "")) + "\n"
        )
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        assert MOSQUITTO is not None
        self.process = subprocess.Popen(
            [MOSQUITTO, "-c", str(self.configuration)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_for(self.listens)

    def listens(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
            return True
        return False

    def stop(self) -> None:
        """End at once, without a word to the clients; it saves first, so that what it acknowledged is kept."""
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            self.process.wait()
            self.process = None


class Subscriber:
    """Notes what arrives, with whether it was retained; connects again by itself."""

    def __init__(self, port: int, **login: Any) -> None:
        self.messages: list[tuple[str, bytes]] = []
        self.client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id="watcher", clean_session=False)
        self.client.on_message = lambda client, userdata, message: self.messages.append(
            (message.topic, message.payload)
        )
        self.client.on_connect = lambda client, *_: client.subscribe("line/#", qos=1)
        self.subscribed = threading.Event()
        self.client.on_subscribe = lambda *_: self.subscribed.set()
        self.client.reconnect_delay_set(1, 1)
        if login:
            self.client.username_pw_set(**login)
        self.client.connect("127.0.0.1", port)
        self.client.loop_start()
        assert self.subscribed.wait(10)

    def indices(self) -> list[int]:
        return [json.loads(payload)["index"] for topic, payload in list(self.messages) if topic == "line/verdicts"]

    def states(self) -> list[str]:
        return [payload.decode() for topic, payload in list(self.messages) if topic == "line/verdicts/status"]

    def stop(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


def write_many(sink: Any, count: int) -> None:
    for index in range(count):
        sink.write(accepted(index))


def without_repetitions(indices: list[int]) -> list[int]:
    return list(dict.fromkeys(indices))


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    folder = tmp_path / "kept"
    folder.mkdir(mode=0o777)
    broker = Broker(
        tmp_path, "allow_anonymous true", "persistence true", f"persistence_location {folder}/", "user root",
        "autosave_interval 1", "autosave_on_changes true",
    )  # fmt: skip
    broker.start()
    yield broker
    broker.stop()


@pytest.fixture
def subscriber(broker: Broker) -> Iterator[Subscriber]:
    subscriber = Subscriber(broker.port)
    yield subscriber
    subscriber.stop()


@contextlib.contextmanager
def opened(address: str) -> Iterator[Any]:
    sink = make_sink(address)
    sink.open(context())
    try:
        yield sink
    finally:
        sink.close()


@pytest.mark.parametrize("qos", [1, 2])
def test_every_outcome_arrives_as_its_record(broker: Broker, subscriber: Subscriber, qos: int) -> None:
    outcomes = [accepted(0), triggered(1), invalid(2), dropped(3), *(accepted(index) for index in range(4, 300))]
    with opened(f"mqtt://127.0.0.1:{broker.port}/line/verdicts#qos={qos}&client_id=camera-7") as sink:
        assert sink.name == f"mqtt:127.0.0.1:{broker.port}/line/verdicts"
        for outcome in outcomes:
            sink.write(outcome)
    # Closed: all acknowledged, so the subscriber gets them soon.
    wait_for(lambda: len(subscriber.indices()) >= 300)
    got = [json.loads(payload) for topic, payload in subscriber.messages if topic == "line/verdicts"]
    assert got == [record(outcome, context()) for outcome in outcomes]
    assert subscriber.states() == ["online", "offline"]


def test_nothing_within_the_buffer_is_lost_while_the_broker_is_away(broker: Broker, subscriber: Subscriber) -> None:
    with opened(f"mqtt://127.0.0.1:{broker.port}/line/verdicts#close_s=20") as sink:
        for index in range(1500):
            sink.write(accepted(index))
            if index == 400:
                wait_for(lambda: len(subscriber.indices()) > 100)
                broker.stop()
            if index == 900:
                broker.start()
            time.sleep(0.004)
    wait_for(lambda: len(set(subscriber.indices())) == 1500)
    got = subscriber.indices()
    assert without_repetitions(got) == list(range(1500))  # order kept
    assert len(got) - 1500 <= 20  # repeated: at most what was not yet acknowledged
    wait_for(lambda: subscriber.states()[-1] == "offline")


def test_a_broker_that_comes_late_gets_everything(tmp_path: Path) -> None:
    broker = Broker(tmp_path, "allow_anonymous true", "user root")
    with opened(f"mqtt://127.0.0.1:{broker.port}/line/verdicts#close_s=20") as sink:
        for index in range(50):
            sink.write(accepted(index))
        sink.flush()
        broker.start()
        subscriber = Subscriber(broker.port)
    wait_for(lambda: subscriber.states()[-1:] == ["offline"])
    got = subscriber.indices()
    assert got == list(range(50))[-len(got) :]  # those before the subscription are the broker's to drop
    subscriber.stop()
    broker.stop()


def test_beyond_the_buffer_each_loss_is_an_error(tmp_path: Path) -> None:
    sink = make_sink(f"mqtt://127.0.0.1:{free_port()}/line/verdicts#buffer=10&close_s=0.1")
    sink.open(context())
    for index in range(10):
        sink.write(accepted(index))
    for index in range(10, 13):
        with pytest.raises(SinkError, match="outcome lost: 10 are waiting and the broker is away"):
            sink.write(accepted(index))
    with pytest.raises(SinkError, match=r"10 outcome\(s\) lost: not acknowledged within 0.1 s") as raised:
        sink.close()
    assert raised.value.lost == 10
    sink.close()


def test_a_broker_that_hangs_does_not_hold_the_pipeline(broker: Broker) -> None:
    sink = make_sink(f"mqtt://127.0.0.1:{broker.port}/line/verdicts#buffer=100&close_s=0.5")
    sink.open(context())
    wait_for(lambda: sink._connected)
    assert broker.process is not None
    broker.process.send_signal(signal.SIGSTOP)
    begin = time.monotonic()
    for index in range(100):
        sink.write(accepted(index))  # 20 are on their way before it is noticed, and 100 wait
    with pytest.raises(SinkError, match="the broker is slow"):
        write_many(sink, 100)
    sink.flush()
    assert time.monotonic() - begin < 3.0
    with pytest.raises(SinkError, match="not acknowledged"):
        sink.close()
    assert time.monotonic() - begin < 15.0


KILLED = """
import sys, time
sys.path.insert(0, sys.argv[1])
from outcomes import accepted, context
from inflight_edge.sinks import make_sink
sink = make_sink(sys.argv[2])
sink.open(context())
sink.write(accepted(0))
time.sleep(60)
"""


def test_the_last_will_says_offline_when_the_process_is_killed(broker: Broker, subscriber: Subscriber) -> None:
    address = f"mqtt://127.0.0.1:{broker.port}/line/verdicts"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(Path(__file__).parents[1]), address])
    wait_for(lambda: subscriber.indices() == [0])
    assert subscriber.states() == ["online"]
    process.kill()
    process.wait()
    wait_for(lambda: subscriber.states() == ["online", "offline"])
    late = Subscriber(broker.port)  # takes over the client id; the state is retained
    wait_for(lambda: late.states() == ["offline"])
    late.stop()


def test_login_and_no_trace_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    (tmp_path / "passwords").touch(mode=0o600)
    tool = shutil.which("mosquitto_passwd")
    assert tool is not None
    subprocess.run([tool, "-b", str(tmp_path / "passwords"), "cam@1", "s3cret/pass"], check=True, capture_output=True)
    broker = Broker(tmp_path, "allow_anonymous false", f"password_file {tmp_path / 'passwords'}", "user root")
    broker.start()
    subscriber = Subscriber(broker.port, username="cam@1", password="s3cret/pass")
    plain = f"127.0.0.1:{broker.port}/line/verdicts"
    with opened(f"mqtt://cam%401:s3cret%2Fpass@{plain}") as sink:
        sink.write(accepted(0))
        assert "s3cret" not in sink.name
    monkeypatch.setenv("INFLIGHT_EDGE_MQTT_USER", "cam@1")
    monkeypatch.setenv("INFLIGHT_EDGE_MQTT_PASSWORD", "s3cret/pass")
    with opened(f"mqtt://{plain}") as sink:
        sink.write(accepted(1))
    wait_for(lambda: subscriber.indices() == [0, 1])
    monkeypatch.setenv("INFLIGHT_EDGE_MQTT_PASSWORD", "another s3cret")
    sink = make_sink(f"mqtt://{plain}#close_s=0.2")
    sink.open(context())
    sink.write(accepted(2))
    wait_for(lambda: "refused by the broker: Not authorized" in caplog.text)
    with pytest.raises(SinkError, match="1 outcome"):
        sink.close()
    assert "s3cret" not in caplog.text
    with pytest.raises(OptionError) as raised:
        make_sink(f"mqtt://cam:s3cret@{plain}#qos=5&password=s3cret")
    assert "s3cret" not in str(raised.value)
    subscriber.stop()
    broker.stop()


# paho leaves a socket to the garbage collector when the broker's certificate is refused.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_tls_checks_the_broker(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed")
    made = [
        openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(tmp_path / "key.pem"), "-out",
        str(tmp_path / "cert.pem"), "-days", "2", "-subj", "/CN=localhost", "-addext",
        "subjectAltName=DNS:localhost,IP:127.0.0.1",
    ]  # fmt: skip
    subprocess.run(made, check=True, capture_output=True)
    broker = Broker(
        tmp_path, f"certfile {tmp_path / 'cert.pem'}", f"keyfile {tmp_path / 'key.pem'}", "allow_anonymous true",
        "user root",
    )  # fmt: skip
    broker.start()
    with opened(f"mqtts://127.0.0.1:{broker.port}/line/verdicts#ca={tmp_path / 'cert.pem'}") as sink:
        sink.write(accepted(0))
    assert "connected" in caplog.text  # and closing raised nothing: acknowledged
    caplog.clear()
    sink = make_sink(f"mqtts://127.0.0.1:{broker.port}/line/verdicts#close_s=1")  # not of an authority we trust
    sink.open(context())
    sink.write(accepted(1))
    wait_for(lambda: "no connection" in caplog.text)
    with pytest.raises(SinkError, match=r"1 outcome\(s\) lost"):
        sink.close()
    with pytest.raises(SinkError, match="ca: cannot be used"):
        make_sink(f"mqtts://127.0.0.1:{broker.port}/line/verdicts#ca={tmp_path / 'none.pem'}").open(context())
    broker.stop()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("mqtt:///topic", "expected a host, got none"),
        ("mqtt://host", "topic: expected a name without"),
        ("mqtt://host/a/+/b", "topic: expected a name without"),
        ("mqtt://host:port/topic", "expected mqtt://HOST:PORT/TOPIC"),
        ("mqtt://host/topic#qos=0", "option qos: expected one of 1, 2, got '0'"),
        ("mqtt://host/topic#buffer=0", "option buffer: expected an integer from 1 to 1000000, got '0'"),
        ("mqtt://host/topic#ca=file", "unknown option ca"),
        ("mqtt://host/topic#color=red", "unknown option color"),
    ],
)
def test_addresses_that_are_refused(address: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make_sink(address)
