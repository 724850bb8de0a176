"""The command line: every command on a real classifier; what a user could mistype is in test_cli_errors.py."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import poisoned
import pytest
import torch
from bundles import written
from command_lines import NAMES, NORMALISATION, Files, output, run, write_folder
from networks_for_tests import export, saved
from poisoned import SETTINGS, TARGET

from inflight_edge import __version__, cli, read_bundle
from inflight_edge import commands as device
from inflight_edge._arguments import class_index, number, numbers
from inflight_edge._text import table
from inflight_edge.calibration import commands
from inflight_edge.cli import main
from inflight_edge.errors import DataError, OptionError


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# --- the whole path


def test_the_whole_path(files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = (files.model, "--data", files.data, "--quiet")
    steps = SETTINGS.steps
    assert run("inspect", *common, "--steps", steps, *NORMALISATION, "--scale", "1/255", "--out", "found") == 0
    text = output(capsys)
    first = text.splitlines()[2].split()
    assert first[0] == str(TARGET)
    assert first[-2] == "neural-cleanse"
    assert f"suspected target: {TARGET}" in text
    pattern = Path("found", "patterns.safetensors")
    assert f"next: inflight-edge calibrate {files.model} --data {files.data} --pattern {pattern}" in text
    assert pattern.read_bytes() == files.pattern.read_bytes()  # the same as in Python

    assert run("calibrate", *common, "--pattern", pattern, "--out", "guarded") == 0
    text = output(capsys)
    assert f"guard of class {TARGET}: estimated pattern sends" in text
    assert re.search(
        r"places of the pattern: \d, views of an image: \d\n  .*: held-out verdict error 0\.\d{4} .*, the lowest of",
        text,
    )
    assert "bundle: guarded   next: inflight-edge verify guarded" in text

    assert run("verify", "guarded") == 0
    assert "FAIL" not in output(capsys)

    assert run("score", "guarded", files.triggered, "--json") == 0
    records = [json.loads(line) for line in output(capsys).splitlines()]
    assert np.mean([record["decision"] == "trigger" for record in records]) > 0.9
    assert run("score", "guarded", files.clean) == 0
    rows = [line.split() for line in output(capsys).splitlines()[2:]]
    assert np.mean([row[1] in ("accept", "unguarded") for row in rows]) > 0.95

    evaluate = ("evaluate", "guarded", "--clean", files.clean, "--triggered", files.triggered, "--quiet")
    assert run(*evaluate, "--json") == 0
    figures = json.loads(output(capsys))
    assert figures["tpr"] > 0.95
    assert figures["fpr"] < 0.1
    assert figures["sia"] > 0.8
    assert figures["auroc"] > 0.98
    assert figures["fpr_alpha01"] is None  # too few clean images of the target for that promise
    assert figures["fpr_alpha05"] < 0.2
    assert run(*evaluate) == 0
    table_rows = {line.split()[0]: line.split()[1] for line in output(capsys).splitlines()[2:]}
    assert table_rows == {
        key: "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
        for key, value in figures.items()
    }
    assert run("evaluate", "guarded", "--triggered", files.triggered, "--quiet") == 0
    assert {line.split()[0]: line.split()[1] for line in output(capsys).splitlines()[2:]}["acc"] == "-"


def test_inspect_as_json_and_with_progress_on_a_terminal(
    files: Files, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert run("inspect", files.model, "--data", files.data, "--steps", 2, *NORMALISATION, "--json") == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["patterns"] == "inspection/patterns.safetensors"
    assert report["suspects"] == []
    assert len(report["classes"]) == 7
    assert report["patch_reached_a_class"] is False  # two steps are too few: no suspects mean nothing
    assert "patches: 100%" in captured.err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    target = ("--target", "3", "--target", "1", "--target", "3")
    assert run("inspect", files.model, "--data", files.data, "--steps", 2, *NORMALISATION, *target) == 0
    assert "suspected target: 3, 1 " in output(capsys)
    assert run("inspect", files.model, "--data", files.data, "--steps", 2, *NORMALISATION, "--quiet") == 0
    text = output(capsys)
    assert "no backdoor found" not in text
    assert "no patch reached any class: whether there is a backdoor cannot be said; leave out --steps, or" in text


def test_where_patches_reach_their_classes_and_none_stands_out_there_is_no_backdoor(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = replace(poisoned.inspected(), suspects=())
    commands._print_inspection(found, "auto")
    assert "no class stands out: no backdoor found" in capsys.readouterr().out


def test_calibrate_as_json_with_two_targets_over_an_old_bundle(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    written(Path("old"))
    targets = ("--target", "1", "--target", str(TARGET))
    command = (
        "calibrate",
        files.model,
        "--data",
        files.data,
        "--pattern",
        files.pattern,
        "--json",
        "--quiet",
        *targets,
    )
    same_again = ("--scale", "1/255", *NORMALISATION, "--feature-layer", "penultimate")
    assert run(*command, "--out", "old", "--force", *same_again) == 0
    report = json.loads(output(capsys))
    assert (report["bundle"], report["feature_layer"]) == ("old", "relu_2")
    assert [guard["target"] for guard in report["guards"]] == [1, TARGET]
    assert [guard.target for guard in read_bundle("old").guards] == [1, TARGET]
    assert read_bundle("old").feature_layer == "relu_2"


def test_classes_have_the_names_of_the_data_where_the_inspection_had_none(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(Path("pictures"), poisoned.poisoned().defence, 3)
    for i, name in enumerate(NAMES):
        (folder / name).rename(folder / f"{i}-{name}")
    seen: list[Any] = []

    def make(classifier: Any, data: Any, inspection: Any, **_: Any) -> Any:
        seen.append(inspection)
        raise DataError("seen enough")

    monkeypatch.setattr(commands, "make_bundle", make)
    command = ("calibrate", files.model, "--data", folder, "--pattern", files.pattern, "--quiet")
    assert run(*command, "--target", "3-three") == 2
    assert seen[0].suspects == (3,)
    assert seen[0].class_names[:2] == ("0-zero", "1-one")


def test_folders_of_named_classes(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    """Alphabetical classes do not fit this model: calibrated in its own order it works, otherwise it says so."""
    victim = poisoned.poisoned()
    folder = write_folder(Path("pictures"), victim.defence, 8)
    assert run("inspect", files.model, "--data", folder, *NORMALISATION, "--steps", 2) == 2
    assert "the class order" in capsys.readouterr().err
    for i, name in enumerate(NAMES):
        (folder / name).rename(folder / f"{i}-{name}")
    assert run("inspect", files.model, "--data", folder, *NORMALISATION, "--steps", 2, "--quiet", "--json") == 0
    report = json.loads(output(capsys))
    assert {row["class"]: row["name"] for row in report["classes"]}[2] == "2-two"
    command = ("calibrate", files.model, "--data", folder, "--pattern", "inspection/patterns.safetensors", "--quiet")
    assert run(*command, "--target", "3-three") == 0
    assert "guard of class 3-three" in output(capsys)
    assert read_bundle("bundle").class_names[:2] == ("0-zero", "1-one")


def test_a_folder_of_grey_images_for_a_classifier_of_rows(tmp_path: Path) -> None:
    """The program does not say that its 144 numbers are 12 x 12 grey pixels; a colour picture would have 432."""
    network = torch.nn.Linear(144, len(NAMES))
    program = saved(export(network, torch.zeros(2, 144), free={0: "batch"}), tmp_path / "rows.pt2")
    folder = write_folder(tmp_path / "pictures", poisoned.poisoned().defence, 1)
    classifier, data = commands._model_and_data(
        argparse.Namespace(model=program, data=folder), "penultimate", tuple(NAMES)
    )
    assert classifier.input_shape == data.image_shape == (1, 12, 12)


def test_calibrate_inspects_by_itself(
    files: Files, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: dict[str, Any] = {}

    def no_search(*_: Any, **options: Any) -> Any:
        seen.update(options)
        return poisoned.inspected()

    monkeypatch.setattr(commands, "run_inspection", no_search)
    command = ("calibrate", files.model, "--data", files.data, *NORMALISATION, "--steps", 77, "--seed", 5, "--quiet")
    assert run(*command) == 0
    text = output(capsys)
    assert f"suspected target: {TARGET}" in text
    assert "bundle: bundle   next: inflight-edge verify bundle" in text
    assert (seen["settings"].steps, seen["seed"], seen["progress"]) == (77, 5, False)


def test_demo_prints_and_writes_its_figures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = {"target_class": 9, "acc": 0.98765, "tpr": None, "scorer_us_p50": 1.25}
    seen: list[Any] = []

    def no_demo(folder: Path, *, seed: int, progress: bool) -> dict[str, Any]:
        seen.extend([folder, seed, progress])
        return figures

    monkeypatch.setattr(commands, "run_demo", no_demo)
    assert run("demo", "--json", "figures.json", "--seed", 4, "--quiet", "--out", "made") == 0
    assert json.loads(Path("figures.json").read_text()) == figures
    assert seen == [Path("made"), 4, False]
    figures["target_class"] = None
    assert run("demo", "--quiet", "--out", "made") == 1
    text = capsys.readouterr().out
    assert "no class was suspected" in text.splitlines()[-1]
    figures["target_class"] = 9
    assert run("demo", "--quiet", "--out", "made") == 0
    text = output(capsys)
    assert [line.split()[:2] for line in text.splitlines()[2:6]] == [
        ["target_class", "9"],
        ["acc", "0.9877"],
        ["tpr", "-"],
        ["scorer_us_p50", "1.2500"],
    ]
    assert "made/patterns.png" in text
    assert "made/bundle" in text


# --- main


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (DataError("two\nlines\n  of text"), 2, "inflight-edge: error: two lines of text\n"),
        (KeyboardInterrupt(), 130, "inflight-edge: stopped\n"),
        (PermissionError(13, "Permission denied", "/secret"), 2, "inflight-edge: error: /secret: Permission denied\n"),
        (OSError("disk on fire"), 2, "inflight-edge: error: disk on fire\n"),
    ],
)
def test_errors_become_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    status: int,
    text: str,
) -> None:
    def fail(_: Any) -> int:
        raise error

    monkeypatch.setattr(device, "doctor", fail)
    assert run("doctor") == status
    assert capsys.readouterr() == ("", text)


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any) -> int:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(device, "doctor", fail)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        run("doctor")


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in ("inspect", "score", "demo"))])
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 0
    assert output(capsys).startswith("usage: inflight-edge")


# --- helpers


@pytest.mark.parametrize(
    ("text", "value"), [("0.5", 0.5), ("1/255", 1 / 255), ("-3", -3.0), ("1e-3", 1e-3), ("255 / 2", 127.5)]
)
def test_number(text: str, value: float) -> None:
    assert number(text) == value


@pytest.mark.parametrize(
    ("text", "values"),
    [("0.5", (0.5,)), ("0.1,0.2,0.3", (0.1, 0.2, 0.3)), ("0.1 0.2", (0.1, 0.2)), (" 1/2 , 1/4,", (0.5, 0.25))],
)
def test_numbers(text: str, values: tuple[float, ...]) -> None:
    assert numbers(text) == values


def test_class_index() -> None:
    assert class_index("two", NAMES) == 2
    assert class_index("2", NAMES) == 2
    assert class_index("2", ("2", "1", "0")) == 0  # a name goes before an index
    many = [str(i) for i in range(100, 200)]
    with pytest.raises(OptionError, match=r"from 0 to 99 or one of 100, .*, 111, \.\.\.; got 'x'$"):
        class_index("x", many)
    with pytest.raises(
        OptionError, match=r"^--target: expected a class index from 0 to 6 or one of zero, .*; got '7'$"
    ):
        class_index("7", NAMES)


def test_table() -> None:
    assert table([("a", 1), ("long", "")], ("x", "size")) == "x     size\n----  ----\na     1\nlong"
    assert cli.__all__ == ["main"]


# --- as a program


def run_program(program: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*program, *arguments], capture_output=True, text=True, timeout=120, check=False)


def test_library_that_is_missing(files: Files) -> None:
    code = "import sys; sys.modules['sklearn'] = None; from inflight_edge.cli import main; sys.exit(main(sys.argv[1:]))"
    result = run_program([sys.executable, "-c", code], "evaluate", str(files.tiny), "--clean", str(files.clean))
    message = "inflight-edge: error: `evaluate` needs sklearn; pip install 'inflight-edge[calibration]'\n"
    assert (result.returncode, result.stdout, result.stderr) == (2, "", message)


@pytest.mark.parametrize("kind", ["module", "script"])
def test_as_a_program(kind: str) -> None:
    script = str(Path(sys.executable).parent / "inflight-edge")
    program = [sys.executable, "-m", "inflight_edge"] if kind == "module" else [script]
    result = run_program(program, "--version")
    assert (result.returncode, result.stdout, result.stderr) == (0, f"inflight-edge {__version__}\n", "")
    result = run_program(program, "verify")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    result = run_program(program, "verify", "nope")
    assert (result.returncode, result.stdout) == (2, "")
    assert "nope: expected a bundle folder" in result.stderr


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        (("doctor",), 141, ""),
        (("keygen", "a.pem", "b.pem"), 141, ""),
        (("score", "bundle", "bundle/bundle.json"), 2, "image(s) could not be judged"),
    ],
    ids=["long", "short", "error"],
)
def test_a_reader_that_goes_away_ends_it_quietly(command: tuple[str, ...], code: int, message: str) -> None:
    """However little was printed: Python keeps it until the end, and would fail there in words of its own."""
    written(Path("bundle"))
    program = subprocess.Popen(
        [sys.executable, "-m", "inflight_edge", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
    )
    assert program.stdout is not None
    program.stdout.close()
    assert program.stderr is not None
    error = program.stderr.read()
    program.stderr.close()
    assert program.wait(60) == code
    assert (message in error.decode()) if message else error == b""
    assert error.count(b"\n") == bool(message)


def test_output_that_a_full_disk_does_not_take_is_one_line() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "inflight_edge", "keygen", "a.pem", "b.pem"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (2, "inflight-edge: error: No space left on device\n")


def test_memory_that_does_not_suffice_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_out(*_: Any, **__: Any) -> Any:
        raise MemoryError("Unable to allocate 60.0 GiB for an array")

    monkeypatch.setattr(device, "load_detector", run_out)
    assert run("bench", "bundle") == 2
    assert capsys.readouterr().err == (
        "inflight-edge: error: Unable to allocate 60.0 GiB for an array; give it fewer or smaller images\n"
    )


def test_what_was_printed_stays_when_a_disk_is_full_later(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def work(*_: Any, **__: Any) -> Any:
        print("hours of work")
        raise OSError(28, "No space left on device", "/elsewhere")

    monkeypatch.setattr(device, "load_detector", work)
    assert run("bench", "bundle") == 2
    print("and more")
    captured = capfd.readouterr()
    assert captured.out == "hours of work\nand more\n"
    assert captured.err == "inflight-edge: error: /elsewhere: No space left on device\n"


def test_program_without_standard_output() -> None:
    command = f'exec "{sys.executable}" -m inflight_edge keygen a.pem b.pem >&-'
    done = subprocess.run(["bash", "-c", command], stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert Path("b.pem").is_file()
