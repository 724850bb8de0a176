"""What every sink must do, run on every sink."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from http_receiver import Receiver
from outcomes import accepted, context, dropped, every_kind, invalid, triggered, unreadable

from inflight_edge import DependencyError, OptionError, SinkError
from inflight_edge.sinks import _MODULES, SINK_FORMS, Sink, make_sink
from inflight_edge.sinks.callback import CallbackSink

ROOT = Path(__file__).parents[2]


@dataclass
class Place:
    """Where a sink under test writes."""

    folder: Path
    receiver: Receiver
    taken: list[Any]


# Every sink with what it needs to be tested; MQTT has no broker here, so that it keeps and then loses.
MAKERS: dict[str, Callable[[Place], Sink]] = {
    "stdout": lambda place: make_sink("-"),
    "jsonl": lambda place: make_sink(f"jsonl:{place.folder / 'verdicts.jsonl'}#rotate_bytes=2000&fsync=line"),
    "mqtt": lambda place: make_sink("mqtt://127.0.0.1:1/line/verdicts#close_s=0"),
    "prometheus": lambda place: make_sink("prometheus://127.0.0.1:0"),
    "webhook": lambda place: make_sink(f"http://127.0.0.1:{place.receiver.port}/#send=all"),
    "video": lambda place: make_sink(f"video:{place.folder / 'film.mp4'}"),
    "evidence": lambda place: make_sink(f"evidence:{place.folder / 'evidence'}#only=accept,trigger,invalid,drop"),
    "web": lambda place: make_sink("web:127.0.0.1:0"),
    "callback": lambda place: CallbackSink(place.taken.append),
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    receiver = Receiver()
    yield Place(tmp_path, receiver, [])
    receiver.stop()


@pytest.fixture(params=MAKERS)
def sink(request: pytest.FixtureRequest, place: Place, capfd: pytest.CaptureFixture[str]) -> Sink:
    needs = {"mqtt": "paho.mqtt.client", "prometheus": "prometheus_client", "video": "av", "web": "aiohttp"}
    if request.param in needs:
        pytest.importorskip(needs[request.param])
    return MAKERS[request.param](place)


def closed(sink: Sink) -> None:
    """Close; what MQTT kept without a broker is lost, and said so."""
    try:
        sink.close()
    except SinkError as error:
        assert sink.name.startswith("mqtt:")
        assert "not acknowledged" in str(error)


def test_takes_every_kind_of_outcome(sink: Sink) -> None:
    sink.open(context())
    for outcome in every_kind():
        sink.write(outcome)
        sink.flush()
    closed(sink)


def test_open_flush_close_without_an_outcome(sink: Sink) -> None:
    sink.open(context())
    sink.flush()
    sink.close()


def test_close_may_be_called_twice_and_before_open(sink: Sink) -> None:
    sink.close()
    sink.open(context())
    sink.write(accepted(0))
    closed(sink)
    sink.close()


def test_may_be_opened_again(sink: Sink) -> None:
    for index in range(2):
        sink.open(context())
        sink.write(triggered(index))
        closed(sink)


def test_write_before_open_and_after_close_is_an_error(sink: Sink) -> None:
    with pytest.raises(SinkError, match="not open; call open first"):
        sink.write(accepted(0))
    sink.open(context())
    sink.close()
    with pytest.raises(SinkError, match="not open; call open first"):
        sink.write(accepted(0))
    sink.flush()


def test_invalid_unreadable_and_dropped_are_taken_alone(sink: Sink) -> None:
    sink.open(context())
    for outcome in (unreadable(0), invalid(1), dropped(2), dropped(3, pixels=None)):
        sink.write(outcome)
    sink.flush()
    closed(sink)


def test_an_outcome_is_left_as_it_is(sink: Sink) -> None:
    outcome = triggered(0)
    assert outcome.frame.pixels is not None
    outcome.frame.pixels.flags.writeable = False
    before = outcome.frame.pixels.copy()
    sink.open(context())
    sink.write(outcome)
    closed(sink)
    assert (outcome.frame.pixels == before).all()


def test_nothing_runs_after_close(sink: Sink) -> None:
    before = set(threading.enumerate())
    sink.open(context())
    sink.write(accepted(0))
    closed(sink)
    end = time.monotonic() + 5
    while set(threading.enumerate()) - before and time.monotonic() < end:
        time.sleep(0.01)  # handlers of the receiver end by themselves
    assert not {thread.name for thread in set(threading.enumerate()) - before}


def test_the_name_is_one_short_line(sink: Sink) -> None:
    assert 0 < len(sink.name) < 300
    assert sink.name.isprintable()


def test_callback_gets_every_outcome_and_its_errors_are_told() -> None:
    taken: list[Any] = []
    sink = CallbackSink(taken.append, name="mine")
    sink.open(context())
    outcomes = list(every_kind())
    for outcome in outcomes:
        sink.write(outcome)
    assert taken == outcomes
    failing = CallbackSink(lambda outcome: 1 / 0, name="mine")
    failing.open(context())
    with pytest.raises(SinkError, match="mine: the function raised ZeroDivisionError: division by zero"):
        failing.write(outcomes[0])


@pytest.mark.parametrize("text", ["", "verdicts.jsonl", "json:file", "mqqt://user:s3cret@host/topic", "/tmp/-"])
def test_an_unknown_address_lists_the_forms(text: str) -> None:
    with pytest.raises(OptionError) as raised:
        make_sink(text)
    assert str(raised.value).endswith(f"expected the address of a sink, one of {', '.join(SINK_FORMS)}")
    assert "s3cret" not in str(raised.value)


def test_every_scheme_has_a_form_and_an_example() -> None:
    assert {form.partition(":")[0] for form in SINK_FORMS} == {"-", *_MODULES}
    readme = (ROOT / "README.md").read_text()
    table = readme.partition("| address of a sink |")[2].partition("\n\n")[0]
    examples = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
    assert {example.partition(":")[0] for example in examples} == {"-", *_MODULES}
    for example in examples:
        assert make_sink(example).name


def test_every_option_is_documented() -> None:
    """The names that the modules take are those of README's table."""
    taken = {
        option
        for path in (ROOT / "inflight_edge" / "sinks").glob("*.py")
        for option in re.findall(r'address\.take\("(\w+)"', path.read_text())
    }
    readme = (ROOT / "README.md").read_text()
    table = readme.partition("| address of a sink |")[2].partition("\n\n")[0]
    named = set(re.findall(r"`(\w+)=", table))
    assert taken == named


@pytest.mark.parametrize(
    ("address", "blocked", "remedy"),
    [
        ("mqtt://host/topic", "paho", "pip install 'inflight-edge[mqtt]'"),
        ("prometheus://127.0.0.1:0", "prometheus_client", "pip install 'inflight-edge[prometheus]'"),
        ("video:film.mp4", "av", "pip install 'inflight-edge[video]'"),
        ("evidence:folder", "PIL", "pip install 'inflight-edge[camera]'"),
    ],
)
def test_a_library_that_is_missing_is_named_at_open(
    address: str, blocked: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == blocked]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, blocked, None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DependencyError) as raised:
        make_sink(address).open(context())
    assert str(raised.value).endswith(remedy)


def test_an_address_imports_no_library() -> None:
    addresses = [form.replace("PORT", "9108") for form in SINK_FORMS]
    code = f"""
import sys
from inflight_edge.sinks import make_sink
for address in {addresses}:
    make_sink(address)
print(*sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in result.stdout.split()}
    assert not loaded & {"paho", "prometheus_client", "av", "PIL"}


def test_mosquitto_is_named_for_the_tests() -> None:
    """CI installs what tests/system-packages.txt lists."""
    lines = (ROOT / "tests" / "system-packages.txt").read_text().splitlines()
    assert "mosquitto" in [line.partition("#")[0].strip() for line in lines]
