"""The run command: signals, reloads, exit codes, systemd's socket, logs and summary, in this process and as a program."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bundles import CLEAN_WEST, forge, tiny_guard, tiny_self_test, written
from pipelines import ListSink, ListSource, exactly_one_outcome_each, stub_detector, until

from inflight_edge import BundleError, Detector, OptionError, Pipeline, service
from inflight_edge.reload import load_verified
from inflight_edge.sd_notify import Notifier
from inflight_edge.service import Service, progress_line, serve, status_record, summary
from inflight_edge.settings import Settings

PROGRAM = Path(__file__).with_name("run_program.py")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return written(tmp_path / "bundle")


def endless() -> Iterator[Any]:
    while True:
        yield CLEAN_WEST


def sent(*steps: Callable[[], object] | int) -> threading.Thread:
    """From another thread: send each signal to this process, and wait for what each function waits for."""

    def work() -> None:
        try:
            for step in steps:
                if isinstance(step, int):
                    os.kill(os.getpid(), step)
                else:
                    step()
        except BaseException:  # the test fails, and does not wait for ever
            os.kill(os.getpid(), signal.SIGTERM)
            raise

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def never() -> Detector:
    raise AssertionError("no reload was asked for")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_stops_with_everything_delivered(number: signal.Signals) -> None:
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    sink = ListSink()
    pipeline = Pipeline(stub_detector(), [ListSource(endless(), live=True, pace_s=0.001, name="cam")], [sink])
    sent(lambda: until(lambda: len(sink.outcomes) > 30), number)
    status = Service(pipeline, never, Notifier({})).run()
    exactly_one_outcome_each(sink.outcomes, dict(status.captured))
    assert sink.calls[-1] == "close"
    assert not pipeline.errors
    assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]


def test_hangup_reloads_a_good_bundle_and_keeps_the_old_one_when_it_is_not(
    bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "inflight_edge")
    sink = ListSink()
    pipeline = Pipeline(load_verified(bundle, threads=1), [ListSource(endless(), pace_s=0.002)], [sink])

    def seen(text: str) -> Callable[[], None]:
        return lambda: until(lambda: text in caplog.text, text)

    def decision_is(name: str) -> Callable[[], None]:
        def wait() -> None:
            until(lambda: sink.outcomes and sink.decisions()[-1] == name, name)

        return wait

    def replace(edit: Callable[[Path], object]) -> Callable[[], None]:
        def work() -> None:
            shutil.rmtree(bundle, ignore_errors=True)
            edit(bundle)

        return work

    def wrong_answer(path: Path) -> None:
        good = written(path)
        decisions = bytearray((good / "selftest.safetensors").read_bytes())
        at = decisions.index(bytes([0, 1, 1, 2, 0, 1]))
        decisions[at] = 2  # the first frame should be unguarded, says this self-test
        forge(path, selftest=bytes(decisions))

    north = (tiny_guard(0, "shared"),)
    names = ("n", "e", "s", "w")
    sent(
        decision_is("accept"),
        replace(lambda path: written(path, guards=north, self_test=tiny_self_test(north))),
        signal.SIGHUP, seen("the new bundle judges from here on"), decision_is("unguarded"),
        replace(lambda path: (written(path) / "model.onnx").write_bytes(b"damaged")),
        signal.SIGHUP, seen("model.onnx: expected"),
        replace(lambda path: written(path, class_names=names)),
        signal.SIGHUP, seen("the bundle stays as it was: classes: expected the 4 as now"),
        replace(lambda path: None),
        signal.SIGHUP, seen("expected a bundle folder"),
        replace(wrong_answer),
        signal.SIGHUP, seen("the bundle stays as it was: self-test frame 0: expected unguarded"),
        decision_is("unguarded"),
        signal.SIGTERM,
    )  # fmt: skip
    status = Service(pipeline, lambda: load_verified(bundle, threads=1), Notifier({})).run()
    exactly_one_outcome_each(sink.outcomes, dict(status.captured))
    assert set(sink.decisions()) == {"accept", "unguarded"}
    assert caplog.text.count("the bundle stays as it was") == 4


def test_loading_verified_runs_the_self_test_first_whatever_alpha_is(bundle: Path) -> None:
    assert load_verified(bundle, threads=1, alpha=0.5)(CLEAN_WEST).passes
    test = (bundle / "selftest.safetensors").read_bytes()
    at = test.index(bytes([0, 1, 1, 2, 0, 1]))
    forge(bundle, selftest=test[:at] + bytes([2]) + test[at + 1 :])
    with pytest.raises(BundleError, match="self-test frame 0: expected unguarded, source -1, got accept"):
        load_verified(bundle, threads=1)


def test_terminal_that_goes_away_ends_the_progress_line_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

    sink = ListSink()
    pipeline = Pipeline(stub_detector(), [ListSource([CLEAN_WEST] * 3, live=True, pace_s=0.05)], [sink])
    monkeypatch.setattr(service, "_TICK_S", 0.01)
    monkeypatch.setattr(sys, "stderr", Gone())
    status = Service(pipeline, never, Notifier({}), progress=True).run()
    assert status.judged == {"list": 3}
    assert sink.calls[-1] == "close"


def test_whatever_ends_the_service_everything_is_delivered_first(monkeypatch: pytest.MonkeyPatch) -> None:
    sink = ListSink()
    pipeline = Pipeline(stub_detector(), [ListSource(endless(), live=True, pace_s=0.001)], [sink])
    one = Service(pipeline, never, Notifier({}))

    def fail() -> None:
        until(lambda: sink.outcomes)
        raise RuntimeError("bug")

    monkeypatch.setattr(one, "_serve", fail)
    with pytest.raises(RuntimeError, match="bug"):
        one.run()
    assert sink.calls[-2:] == ["flush", "close"]
    exactly_one_outcome_each(sink.outcomes, pipeline.status().captured)


@pytest.mark.parametrize("threads", [None, 3])
def test_detector_is_made_on_the_processors_of_the_inference(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, threads: int | None
) -> None:
    """An engine's own threads inherit the processors of the thread that makes it."""
    seen: list[tuple[set[int], int | None]] = []

    def load(path: str, **options: Any) -> Detector:
        seen.append((os.sched_getaffinity(0), options["threads"]))
        return load_verified(path, **options)

    monkeypatch.setattr(service, "load_verified", load)
    before = os.sched_getaffinity(0)
    cpu = max(before)
    service._load(Settings(bundle=str(bundle), source=("x",), cpus=(f"inference={cpu}",), threads=threads))
    service._load(Settings(bundle=str(bundle), source=("x",), threads=threads))
    assert seen == [({cpu}, threads or 1), (before, threads)]
    assert os.sched_getaffinity(0) == before


# --- systemd


class Manager:
    """The service manager's socket; its queue is short, so that somebody must read."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.messages: list[str] = []
        self._channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._channel.bind(self.path)
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        while (message := self._channel.recv(4096).decode()) != "end":
            self.messages.append(message)

    def close(self) -> None:
        if not self._thread.is_alive():
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.sendto(b"end", self.path)
        self._thread.join(10)
        self._channel.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    one = Manager(tmp_path / "notify")
    yield one
    one.close()


def test_service_manager_is_told_ready_alive_reloading_and_stopping(manager: Manager) -> None:
    sink = ListSink()
    notifier = Notifier({"NOTIFY_SOCKET": manager.path, "WATCHDOG_USEC": "40000"})
    assert notifier.interval_ns == 20_000_000
    pipeline = Pipeline(stub_detector(), [ListSource(endless(), live=True, pace_s=0.001)], [sink])
    loads = []

    def load() -> Detector:
        loads.append(time.monotonic())
        return stub_detector()

    sent(
        lambda: time.sleep(0.3),
        signal.SIGHUP,
        lambda: until(lambda: manager.messages.count("READY=1") == 2),
        signal.SIGTERM,
    )
    Service(pipeline, load, notifier).run()
    manager.close()
    got = manager.messages
    assert got[0] == "READY=1"
    assert got.count("READY=1") == 2
    assert got.count("WATCHDOG=1") >= 3
    assert re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=\d+", next(m for m in got if m.startswith("RELOADING")))
    assert got[-1] == "STOPPING=1"


def test_watchdog_is_not_fed_while_the_engine_hangs(manager: Manager) -> None:
    stuck = threading.Event()
    notifier = Notifier({"NOTIFY_SOCKET": manager.path, "WATCHDOG_USEC": "60000"})
    pipeline = Pipeline(stub_detector(lambda batch: stuck.wait(20)), [ListSource([CLEAN_WEST])], [])
    fed: list[list[str]] = []

    def watch() -> None:
        until(lambda: pipeline.stalled_ns() > 200_000_000)
        before = len(manager.messages)
        time.sleep(0.3)
        fed.append(manager.messages[before:])
        stuck.set()

    sent(watch)
    Service(pipeline, never, notifier).run()
    assert fed == [[]]


def test_outside_of_systemd_nothing_is_sent_and_a_dead_socket_harms_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Notifier({}).ready()
    assert not caplog.records
    Notifier({"NOTIFY_SOCKET": str(tmp_path / "nobody")}).ready()
    assert "systemd was not told READY=1" in caplog.text
    assert Notifier({"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "10", "WATCHDOG_PID": "1"}).interval_ns == 0


def test_watchdog_is_fed_where_no_file_is_left(manager: Manager) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": manager.path})
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1, limits[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            socket.socket(socket.AF_UNIX)
        notifier.alive()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    until(lambda: manager.messages == ["WATCHDOG=1"])


def test_abstract_socket_names() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(f"\0inflight-{os.getpid()}")
        Notifier({"NOTIFY_SOCKET": f"@inflight-{os.getpid()}"}).alive()
        channel.settimeout(5)
        assert channel.recv(100) == b"WATCHDOG=1"


# --- as a program


def program(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), "run", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment},
    )  # fmt: skip


def test_end_of_stream_is_exit_0_with_summary_and_json(bundle: Path, tmp_path: Path) -> None:
    out, figures = tmp_path / "out", tmp_path / "figures.json"
    process = program(
        bundle, "--source", "count:300", "--sink", f"lines:{out}", "--json", figures, "--threads", 1, "--repair"
    )
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (0, ""), stderr
    expected = ["accept", "trigger", "unguarded"] * 100
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["index"], line["decision"]) for line in lines] == list(enumerate(expected))
    assert re.search(
        r"^camera +captured +judged +accept +trigger +unguarded +invalid +dropped +reconnects$", stderr, re.M
    )
    assert re.search(r"^count:300 +300 +300 +100 +100 +100 +0 +0 +0$", stderr, re.M)
    assert re.search(r"^whole +300 +[\d.]+ +", stderr, re.M)
    record = json.loads(figures.read_text())
    assert record["decisions"]["count:300"]["trigger"] == {"west": 100}
    assert record["stages"]["whole"]["count"] == 300


def test_json_that_cannot_be_written_is_an_error_before_or_beside_that_of_the_source(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Settings(bundle=str(bundle), source=(f"{tmp_path}/none\x1b.mp4",), threads=1)
    with pytest.raises(OptionError, match="--json: expected a file that can be written"):
        serve(settings, json_path=tmp_path, quiet=True)
    assert serve(settings, json_path=Path("/dev/full"), quiet=True) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("inflight-edge: error: ")]
    assert len(errors) == 2
    assert errors[0].endswith(r"none\x1b.mp4: cannot be opened: No such file or directory")
    assert errors[1] == "inflight-edge: error: --json: /dev/full: cannot be written: No space left on device"


def test_signals_of_a_program(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = program(
        bundle, "--source", "live:0.002", "--sink", f"lines:{out}", "--threads", 1, "--log-format", "json"
    )
    until(lambda: out.exists() and out.stat().st_size > 1000)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    lines = out.read_text().splitlines()
    assert sorted(json.loads(line)["index"] for line in lines) == list(range(len(lines)))
    logs = [json.loads(line) for line in stderr.splitlines() if line.startswith("{")]
    assert [record.get("event") for record in logs if record["logger"].endswith("service")] == ["ready", "stopping"]
    assert all({"time", "level", "logger", "message"} <= set(record) for record in logs)


def test_second_signal_ends_it_at_once(bundle: Path) -> None:
    process = program(bundle, "--source", "live:0.002", "--sink", "slow:30", "--threads", 1)
    assert process.stderr is not None
    for line in process.stderr:
        if "running" in line:
            break
    process.send_signal(signal.SIGTERM)
    for line in process.stderr:
        if "SIGTERM: stopping" in line:
            break
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(5) == -signal.SIGINT
    assert time.monotonic() - started < 2
    process.stderr.close()
    assert process.stdout is not None
    process.stdout.close()


def test_error_is_exit_2_and_loss_is_exit_3(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import run_program

    from inflight_edge import OptionError, SinkError, SourceError, cli

    def source(text: str) -> ListSource:
        if text == "typo":
            raise OptionError("typo: unknown source")
        return ListSource([CLEAN_WEST, SourceError("half a file")] if text == "broken" else [CLEAN_WEST])

    def fail(outcome: object) -> None:
        raise SinkError("disk full")

    monkeypatch.setattr("inflight_edge.sources.make_source", source, raising=False)
    monkeypatch.setattr("inflight_edge.sinks.make_sink", lambda text: ListSink(before=fail), raising=False)
    monkeypatch.setattr(logging.getLogger("inflight_edge"), "handlers", [])
    monkeypatch.setattr(logging.getLogger("inflight_edge"), "propagate", True)
    run = ["run", str(bundle), "--threads", "1", "--quiet"]
    assert run_program.FRAMES
    assert cli.main([*run, "--source", "good"]) == 0
    assert cli.main([*run, "--source", "typo"]) == 2
    assert cli.main([*run, "--source", "broken"]) == 2
    assert cli.main([*run, "--source", "good", "--sink", "full"]) == 3
    assert cli.main(["run", str(tmp_path / "absent"), "--source", "good"]) == 2
    assert cli.main(["run", str(bundle)]) == 2


def test_progress_and_summary_name_what_matters() -> None:
    sink = ListSink()
    source = ListSource([CLEAN_WEST, CLEAN_WEST.astype(float), CLEAN_WEST.astype(float)], name="cam")
    status = Pipeline(stub_detector(), [source], [sink]).run()
    assert re.fullmatch(r"3 judged \([\d.]+/s\), 2 flagged, 0 dropped, alarm: cam", progress_line(status))
    assert re.search(r"^cam +3 +3 +1 +0 +0 +2 +0 +0$", summary(status), re.M)
    record = json.loads(json.dumps(status_record(status)))
    assert record["decisions"] == {"cam": {"accept": {"west": 1}, "invalid": {"": 2}}}
    assert record["alarms"] == ["cam"]
