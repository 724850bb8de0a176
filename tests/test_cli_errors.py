"""The command line says one line for everything that a user could mistype, and before the long work."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import poisoned
import pytest
from bundles import written
from command_lines import NAMES, NORMALISATION, Files, one_line, output, run, write_folder

from inflight_edge.bundle import write_bundle
from inflight_edge.calibration import commands
from inflight_edge.calibration.inspection import read_inspection
from inflight_edge.cli import main
from inflight_edge.errors import DataError


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


USAGE: dict[str, tuple[tuple[str, ...], str]] = {
    "nothing": ((), "inflight-edge: error: the following arguments are required: COMMAND; see `inflight-edge --help`"),
    "command": (("inspct",), "invalid choice: 'inspct' (choose from "),
    "option": (("doctor", "--jsn"), "unrecognized arguments: --jsn; see `inflight-edge --help`"),
    "no model": (("inspect",), "required: MODEL, --data; see `inflight-edge inspect --help`"),
    "no data": (("calibrate", "m.pt2"), "required: --data; see `inflight-edge calibrate --help`"),
    "no image": (("score", "bundle"), "required: IMAGE; see `inflight-edge score --help`"),
    "no bundle": (("verify",), "required: BUNDLE; see `inflight-edge verify --help`"),
    "scale": (("inspect", "m", "--data", "d", "--scale", "1/0"), "expected a number such as 0.5 or 1/255, got '1/0'"),
    "text as scale": (("inspect", "m", "--data", "d", "--scale", "half"), "such as 0.5 or 1/255, got 'half'"),
    "mean": (("inspect", "m", "--data", "d", "--mean", "0.5;0.5"), "such as 0.5 or 1/255, got '0.5;0.5'"),
    "empty mean": (
        ("inspect", "m", "--data", "d", "--mean", ""),
        "expected one number, or one per channel separated by",
    ),
    "std": (("calibrate", "m", "--data", "d", "--std", "a,b"), "such as 0.5 or 1/255, got 'a'"),
    "steps": (("inspect", "m", "--data", "d", "--steps", "many"), "invalid int value: 'many'"),
    "seed": (("demo", "--seed", "1.5"), "expected an integer from 0 to 2147483647, got '1.5'"),
    "negative seed": (("demo", "--seed", "-1"), "expected an integer from 0 to 2147483647, got '-1'"),
    "negative seed of calibrate": (
        ("calibrate", "m", "--data", "d", "--seed", "-1"),
        "argument --seed: expected an integer from 0 to 2147483647, got '-1'",
    ),
    "long seed": (
        ("inspect", "m", "--data", "d", "--seed", "999999999999999999"),
        "expected an integer from 0 to 2147483647, got '999999999999999999'",
    ),
    "seed beyond 64 bits": (
        ("inspect", "m", "--data", "d", "--seed", "9999999999999999999999"),
        "expected an integer from 0 to 2147483647, got '9999999999999999999999'",
    ),
    "threads": (("score", "b", "i", "--threads", "x"), "invalid int value: 'x'"),
    "engine": (("score", "b", "i", "--engine", "abacus"), "invalid choice: 'abacus' (choose from "),
    "scorer": (("evaluate", "b", "--scorer", "gpu"), "invalid choice: 'gpu' (choose from "),
    "value": (("demo", "--out"), "argument --out: expected one argument; see `inflight-edge demo --help`"),
}


@pytest.mark.parametrize("case", USAGE)
def test_wrong_usage(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = USAGE[case]
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in one_line(capsys)


# {name} stands for a file of ``Files``; each case is a command line and what its error must say.
MODEL = "inspect {model} --data {data} --mean 0.5 --std 0.5"
GUARD = "calibrate {model} --data {data} --pattern {pattern} --quiet"
WRONG: dict[str, tuple[str, str]] = {
    "no model": ("inspect nope.pt2 --data {data}", "nope.pt2: no such file; expected a torch.export program (.pt2)"),
    "folder as model": ("inspect {root} --data {data}", "expected a torch.export program (.pt2)"),
    "text as model": (
        "inspect {text} --data {data}",
        "export the model with torch.export.export(model.eval(), (images,))",
    ),
    "data as model": ("calibrate {pattern} --data {data}", "not a torch.export program, which is a zip archive"),
    "no data": ("inspect {model} --data nope", "nope: no such file or folder; expected an .npz or a folder"),
    "model as data": (
        "inspect {model} --data {model}",
        "expected an .npz (images, labels) or a folder with one sub-folder",
    ),
    "text as data": (
        "inspect {model} --data {text}",
        "expected an .npz (images, labels) or a folder with one sub-folder",
    ),
    "no labels": ("inspect {model} --data {frames}", "expected the array `labels`, got images"),
    "empty folder": ("inspect {model} --data .", "expected one sub-folder per class, found none"),
    "zero scale": (f"{MODEL} --scale 0", "scale: expected a number > 0 such as 1/255, got 0.0"),
    "negative scale": (f"{MODEL} --scale -1", "scale: expected a number > 0 such as 1/255, got -1.0"),
    "scale not a number": (f"{MODEL} --scale nan", "scale: expected a number > 0 such as 1/255, got nan"),
    "scale of floats": (f"{MODEL} --scale 1", "check --scale, --mean, --std (now scale 1, mean (0.5,), std (0.5,))"),
    "three means": (f"{MODEL} --mean .1,.2,.3", "mean: expected one number, or one for each of 1 channels, got 3"),
    "infinite mean": (f"{MODEL} --mean inf", "mean: expected finite numbers, got (inf,)"),
    "no std": (f"{MODEL} --std 0", "std: expected numbers > 0, got (0.0,)"),
    "no steps": (f"{MODEL} --steps 0", "--steps: expected at least 1, got 0"),
    "unknown target": (
        f"{MODEL} --target 7",
        "--target: expected a class index from 0 to 6 or one of 0, 1, 2, 3, 4, 5, 6;",
    ),
    "named target": (f"{MODEL} --target seven", "or one of 0, 1, 2, 3, 4, 5, 6; got 'seven'"),
    "negative target": (f"{MODEL} --target -1", "got '-1'"),
    "superscript as target": (f"{MODEL} --target ²", "or one of 0, 1, 2, 3, 4, 5, 6; got '²'"),
    "scale beyond float32": (f"{MODEL} --scale 1e308", "scale: expected a number > 0 such as 1/255, got 1e+308"),
    "unknown layer": (f"{MODEL} --feature-layer hiden", "no layer 'hiden' before the logits; nearest: hidden"),
    "file as folder": (
        f"{MODEL} --steps 1 --quiet --out {{text}}",
        "notes.txt is a file or not writable; name another one",
    ),
    "bundle there": (
        f"{GUARD} --out {{tiny}}",
        "exists already; name another folder with --out or replace it with --force",
    ),
    "folder there": (f"{GUARD} --force --out {{root}}", "--force replaces bundles only, and this is none"),
    "no pattern": (
        f"{GUARD} --pattern nope",
        "nope: no such file; expected the patterns.safetensors that `inflight-edge",
    ),
    "model as pattern": (f"{GUARD} --pattern {{model}}", "not a readable inspection"),
    "text as pattern": (f"{GUARD} --pattern {{text}}", "not a readable inspection"),
    "other scale": (f"{GUARD} --scale 1", "--scale: the inspection was made with 0.0039"),
    "other mean": (
        f"{GUARD} --mean 0",
        "--mean: the inspection was made with (0.5,), got (0.0,); leave it out or inspect",
    ),
    "two means": (f"{GUARD} --mean .5,.5", "--mean: the inspection was made with (0.5,), got (0.5, 0.5); leave it out"),
    "other std": (
        f"{GUARD} --std 1",
        "--std: the inspection was made with (0.5,), got (1.0,); leave it out or inspect",
    ),
    "other target": (f"{GUARD} --target 12", "--target: expected a class index from 0 to 6"),
    "other layer": (f"{GUARD} --feature-layer nope", "no layer 'nope' before the logits"),
    "score no bundle": ("score nope {frames}", "nope: expected a bundle folder, got No such file or directory"),
    "score a file": ("score {data} {frames}", "expected a bundle folder, got Not a directory"),
    "score a folder": ("score . {frames}", "expected the file bundle.json, got none; copy the whole bundle again"),
    "score no image": ("score {tiny} nope.png", "nope.png: expected an image, a folder or an .npz, got no such file"),
    "score no images": ("score {tiny} .", "expected images (.bmp .gif"),
    "score an empty archive": ("score {tiny} {empty}", "empty.npz: expected images, got none"),
    "bench to nowhere": (
        "bench {tiny} --frames 1 --json nope/figures.json",
        "nope is no folder that can be written to",
    ),
    "bench into a folder": (
        "bench {tiny} --frames 1 --json .",
        "--json: expected a file that can be written, . is none",
    ),
    "bench into the bundle": ("bench {tiny} --frames 1 --json {tiny}/figures.json", "figures.json lies in the bundle"),
    "report into the bundle": (
        "report {tiny} --out {tiny}/report.html",
        "report.html lies in the bundle, which no reader",
    ),
    "report of an unsigned one": ("report {tiny} --key {text}", "notes.txt: expected a public key (PEM, Ed25519)"),
    "doctor into the bundle": ("doctor --run {tiny} --report {tiny}/r.json", "--report: "),
    "doctor of an unsigned one": (
        "doctor --run {tiny} --key {text}",
        "notes.txt: expected a public key (PEM, Ed25519)",
    ),
    "method of a saved pattern": (
        f"{GUARD} --method perturbation",
        "--method: of a search, but the patterns are those",
    ),
    "steps of a saved pattern": (f"{GUARD} --steps 9", "--steps: of a search, but the patterns are those of --pattern"),
    "steps of additions": (
        f"{MODEL} --steps 9 --method perturbation --quiet",
        "--steps: of the search for patches, but --method is perturbation",
    ),
    "report of no run": ("doctor --report r.json", "--report: of --run BUNDLE, which is not there; add it"),
    "key of no run": ("doctor --key {text}", "--key: of --run BUNDLE, which is not there; add it"),
    "form of served guards": (
        "export-triton {tiny} made --guards-only --form single",
        "--form: with --guards-only that of the repository stays; leave it out",
    ),
    "queue of served guards": (
        "export-triton {tiny} made --guards-only --max-batch 2",
        "--max-batch: with --guards-only",
    ),
    "two plans of a GPU": (
        "export-triton {tiny} made --runtime tensorrt --plan 8.7=a --plan 8.7=b",
        "--plan: expected one file for each compute capability, got two for one",
    ),
    "compile into the bundle": ("compile {tiny} --out {tiny}/x.plan", "x.plan lies in the bundle, which no reader"),
    "score a text": ("score {tiny} {text}", "1 image(s) could not be judged and are invalid; the first:"),
    "no threads": ("score {tiny} {frames} --threads 0", "threads: expected an integer of at least 1 or None, got 0"),
    "nothing to evaluate": ("evaluate {tiny}", "nothing to measure on; name frames with --clean, --triggered or both"),
    "evaluate no bundle": ("evaluate nope --clean {clean}", "nope: expected a bundle folder"),
    "evaluate no data": ("evaluate {tiny} --clean nope", "nope: no such file or folder"),
    "evaluate unsigned": (
        "evaluate {tiny} --clean {frames} --key {text}",
        "notes.txt: expected a public key (PEM, Ed25519), got something else",
    ),
    "evaluate no labels": ("evaluate {tiny} --triggered {frames}", "expected the array `labels`"),
    "evaluate other classes": (
        "evaluate {tiny} --clean {clean}",
        "label 6 found, but the model has 4 classes (0 to 3)",
    ),
    "demo into a file": ("demo --quiet --out {text}", "notes.txt is a file or not writable; name another one"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(case: str, files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    command, message = WRONG[case]
    arguments = command.format(**{name: str(value) for name, value in vars(files).items()}).split()
    assert main(arguments) == 2
    error = one_line(capsys)
    assert error.startswith("inflight-edge: error: ")
    assert message in error
    assert not Path("bundle").exists()
    assert not Path("inspection").exists()


def test_no_suspect_is_an_error_that_names_the_option(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("calibrate", files.model, "--data", files.data, *NORMALISATION, "--steps", 2, "--quiet")
    assert run(*command) == 2
    captured = capsys.readouterr()
    assert (
        "no patch reached any class: whether there is a backdoor cannot be said; leave out --steps, or" in captured.out
    )
    assert captured.err == (
        "inflight-edge: error: no class looks like a backdoor's target, so there is nothing to guard; "
        "name one with --target to guard it anyway (the most anomalous is class 0)\n"
    )
    assert not Path("bundle").exists()


def test_an_inspection_is_not_lost_with_the_calibration(
    files: Files, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may have taken an hour."""

    def fails(*_: Any, **options: Any) -> Any:
        raise DataError("no room")

    monkeypatch.setattr(commands, "run_inspection", lambda *_, **options: poisoned.inspected())
    monkeypatch.setattr(commands, "make_bundle", fails)
    command = ("calibrate", files.model, "--data", files.data, *NORMALISATION, "--quiet", "--out", "made")
    assert run(*command) == 2
    kept = "made-inspection/patterns.safetensors"
    assert capsys.readouterr().err == (
        f"the inspection is kept: go on with --pattern {kept}\ninflight-edge: error: no room\n"
    )
    assert read_inspection(kept).suspects == poisoned.inspected().suspects
    assert run(*command, "--pattern", kept) == 2  # which is there
    assert capsys.readouterr().err == "inflight-edge: error: no room\n"


def test_damaged_bundle(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = written(Path("bundle"))
    (bundle / "model.onnx").write_bytes(b"x")
    for command in (("score", bundle, files.frames), ("evaluate", bundle, "--clean", files.clean)):
        assert run(*command) == 2
        assert "bundle/model.onnx: expected " in one_line(capsys)


def test_folder_that_lacks_a_class_keeps_the_labels_of_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    """No frame of the target's class is triggered, so its folder is missing."""
    write_bundle(replace(poisoned.bundle(), class_names=NAMES), Path("named"))
    folder = write_folder(Path("triggered"), poisoned.poisoned().triggered, 1000)
    assert sorted(path.name for path in folder.iterdir()) == sorted(set(NAMES) - {NAMES[poisoned.TARGET]})
    assert run("evaluate", "named", "--triggered", folder, "--json", "--quiet") == 0
    assert json.loads(output(capsys))["sia"] > 0.9


# --- where nothing can be written


@pytest.fixture
def _no_long_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*_: Any, **__: Any) -> Any:
        raise AssertionError("the long work has begun")

    for name in ("make_bundle", "run_inspection", "run_demo"):
        monkeypatch.setattr(commands, name, work)


@pytest.mark.usefixtures("_no_long_work")
@pytest.mark.parametrize(
    "command", ["inspect {model} --data {data} --mean 0.5 --std 0.5 --quiet --out", "demo --quiet --out"]
)
def test_folder_below_a_file_is_refused_before_the_long_work(
    command: str, files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    words = command.format(**{name: str(value) for name, value in vars(files).items()}).split()
    assert run(*words, files.text / "made") == 2
    assert one_line(capsys).endswith(f"{files.text} is a file or not writable; name another one\n")


UNWRITABLE = {
    "calibrate": "calibrate {model} --data {data} --pattern {pattern} --quiet --out",
    "calibrate by itself": "calibrate {model} --data {data} --mean 0.5 --std 0.5 --quiet --out",
    "demo": "demo --quiet --json",
}


@pytest.mark.usefixtures("_no_long_work")
def test_bundle_with_other_files_is_not_replaced_and_that_is_said_before_the_long_work(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    (written(Path("old")) / "notes.txt").write_text("mine")
    command = ("calibrate", files.model, "--data", files.data, "--pattern", files.pattern, "--quiet", "--force")
    assert run(*command, "--out", "old") == 2
    assert "old: expected a bundle folder to overwrite, got one with 'notes.txt'" in one_line(capsys)


@pytest.mark.usefixtures("_no_long_work")
def test_copy_of_few_images_is_refused_before_the_long_work(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    few = write_folder(Path("few"), poisoned.poisoned().defence, 1)
    for i, name in enumerate(NAMES):
        (few / name).rename(few / f"{i}-{name}")
    assert run("calibrate", files.model, "--data", few, *NORMALISATION, "--quiet", "--unlearn", "auto") == 2
    assert "unlearn: expected at least 20 images of each class" in one_line(capsys)


@pytest.mark.usefixtures("_no_long_work")
@pytest.mark.parametrize("parent", ["missing", "file", "read-only"])
@pytest.mark.parametrize("case", UNWRITABLE)
def test_output_that_cannot_be_written_is_refused_before_the_long_work(
    case: str, parent: str, files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / parent
    if parent == "file":
        folder.write_text("x")
    if parent == "read-only":
        if os.geteuid() == 0:
            pytest.skip("root may write to any folder")
        folder.mkdir(mode=0o500)
    command = UNWRITABLE[case].format(**{name: str(value) for name, value in vars(files).items()}).split()
    assert run(*command, folder / "made") == 2
    option = command[-1]
    assert one_line(capsys) == (
        f"inflight-edge: error: {option}: {folder} is no folder that can be written to; make it or name another\n"
    )


@pytest.mark.parametrize("trick", ["\x1b[2J", "\u202e", "\x9b31m", "\x07", "\u2028"])
def test_names_of_files_cannot_drive_the_terminal(
    trick: str, files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Escape sequences, bells and reversed text come out as their codes, in tables and in errors."""
    bad = tmp_path / f"a{trick}b.png"
    bad.write_bytes(b"no image")
    assert run("score", files.tiny, bad, files.frames) == 2
    captured = capsys.readouterr()
    assert trick not in captured.out + captured.err
    assert "image(s) could not be judged" in captured.err
    assert run("score", tmp_path / f"no{trick}bundle", files.frames) == 2
    assert trick not in capsys.readouterr().err
