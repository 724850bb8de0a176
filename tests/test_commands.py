"""The device's commands on a bundle small enough to follow by hand: what they print, and their exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import (
    CLEAN_EAST,
    CLEAN_NORTH,
    CLEAN_WEST,
    TRIGGERED_NORTH,
    TRIGGERED_SOUTH,
    TRIGGERED_TO_NORTH,
    forge,
    tiny_bundle,
    tiny_self_test,
    written,
)
from PIL import Image

from inflight_edge import write_bundle
from inflight_edge.cli import main
from inflight_edge.doctor import examine

FRAMES = [CLEAN_WEST, TRIGGERED_NORTH, TRIGGERED_SOUTH, CLEAN_EAST, CLEAN_NORTH, TRIGGERED_TO_NORTH]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return written(tmp_path / "bundle")


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    np.savez(tmp_path / "frames.npz", images=np.stack(FRAMES))
    return tmp_path / "frames.npz"


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_score_prints_a_table(bundle: Path, frames: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("score", bundle, frames) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    header, rule, *rows = captured.out.splitlines()
    assert header.split() == ["image", "decision", "predicted", "source", "margin", "reason"]
    assert set(rule) == {"-", " "}
    # A trigger at 127 of 255 lies .498 from the target's mean and .002 from its source's, at a deviation of .1.
    assert [row.split() for row in rows] == [
        [f"{frames}[0]", "accept", "west", "-", "-12.50"],
        [f"{frames}[1]", "trigger", "west", "north", "12.40"],
        [f"{frames}[2]", "trigger", "west", "south", "12.40"],
        [f"{frames}[3]", "unguarded", "east", "-", "-"],
        [f"{frames}[4]", "accept", "north", "-", "-12.50"],
        [f"{frames}[5]", "trigger", "north", "south", "12.40"],
    ]


@pytest.mark.parametrize("scorer", ["auto", "cpu", "reference"])
def test_score_prints_json_lines(bundle: Path, frames: Path, scorer: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("score", bundle, frames, "--json", "--scorer", scorer, "--threads", 1, "--engine", "onnxruntime") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    records = [json.loads(line) for line in captured.out.splitlines()]
    assert [record["decision"] for record in records] == [
        "accept",
        "trigger",
        "trigger",
        "unguarded",
        "accept",
        "trigger",
    ]
    assert [record["image"] for record in records] == [f"{frames}[{i}]" for i in range(6)]
    assert (records[1]["predicted"], records[1]["predicted_name"]) == (3, "west")
    assert (records[1]["source"], records[1]["source_name"]) == (0, "north")
    assert records[1]["margin"] == pytest.approx(12.402, abs=0.001)
    assert sorted(records[1]["log_likelihoods"]) == ["0", "1", "2", "3"]
    assert (records[3]["source"], records[3]["source_name"], records[3]["margin"]) == (None, None, None)
    assert records[3]["log_likelihoods"] == {}
    assert {record["reason"] for record in records} == {""}


def test_score_takes_images_and_folders(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    for path, frame in (
        (tmp_path / "one.png", TRIGGERED_SOUTH),
        (tmp_path / "folder" / "b.png", CLEAN_EAST),
        (tmp_path / "folder" / "deep" / "a.png", CLEAN_WEST),
    ):
        Image.fromarray(frame[..., 0]).save(path)
    assert run("score", bundle, tmp_path / "one.png", tmp_path / "folder", "--json") == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(Path(record["image"]).name, record["decision"]) for record in records] == [
        ("one.png", "trigger"),
        ("b.png", "unguarded"),
        ("a.png", "accept"),
    ]


@pytest.mark.parametrize("as_json", [False, True])
def test_unreadable_images_are_invalid_and_the_others_are_judged(
    bundle: Path, frames: Path, tmp_path: Path, as_json: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    assert run("score", bundle, bad, frames, *(["--json"] if as_json else [])) == 2
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    if as_json:
        records = [json.loads(line) for line in lines]
        assert [record["decision"] for record in records[:2]] == ["invalid", "accept"]
        assert records[0]["reason"].startswith(f"{bad}: expected an image")
        assert len(records) == 7
    else:
        assert [line.split()[:2] for line in lines[2:4]] == [[str(bad), "invalid"], [f"{frames}[0]", "accept"]]
        assert len(lines) == 2 + 7
    assert captured.err.startswith(
        f"inflight-edge: error: 1 image(s) could not be judged and are invalid; the first: {bad}: expected an image"
    )
    assert captured.err.count("\n") == 1


def test_a_frame_that_does_not_fit_is_invalid(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "wide.npz", images=np.zeros((1, 2, 2, 2), np.uint8))
    run("score", bundle, tmp_path / "wide.npz", "--json")
    (record,) = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert record["decision"] == "invalid"
    assert record["predicted"] is None
    assert record["reason"].startswith("frame: expected 1 channels, got shape (2, 2, 2)")


def test_verify_prints_every_check(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", bundle) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    header, _, *rows = captured.out.splitlines()
    assert header.split() == ["check", "result", "detail"]
    assert len(rows) > 6
    assert all(" pass " in row for row in rows)
    assert run("verify", bundle, "--json") == 0
    records = json.loads(capsys.readouterr().out)
    assert len(records) == len(rows)
    assert all(record["passed"] is True for record in records)
    assert set(records[0]) == {"name", "passed", "detail"}


def test_verify_fails_on_a_bundle_that_computes_something_else(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = tiny_bundle()
    test = tiny_self_test(good.guards)
    features = test.features.copy()
    features[0, 0] += 0.5
    changed = type(test)(test.frames, test.logits, features, test.log_likelihoods, test.decisions, test.sources)
    write_bundle(tiny_bundle(self_test=changed), bundle, overwrite=True)
    assert run("verify", bundle) == 1
    captured = capsys.readouterr()
    assert " FAIL " in captured.out
    failed = captured.out.count(" FAIL ")
    total = len(captured.out.splitlines()) - 2
    assert captured.err == f"inflight-edge: {failed} of {total} checks failed: do not use this bundle here\n"
    assert run("verify", bundle, "--json") == 1
    assert sum(not record["passed"] for record in json.loads(capsys.readouterr().out)) == failed


@pytest.mark.parametrize("harm", ["missing", "file"])
def test_verify_refuses_what_is_no_folder(tmp_path: Path, harm: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / harm
    if harm == "file":
        path.write_text("x")
    assert run("verify", path) == 2
    assert capsys.readouterr().err.startswith(f"inflight-edge: error: {path}: expected a bundle folder, got none; name")


def test_verify_fails_on_a_forged_bundle(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = bundle
    forge(bundle, lambda manifest: manifest.update(format_version=99))
    assert run("verify", path) == 1
    captured = capsys.readouterr()
    assert [line.split()[:2] for line in captured.out.splitlines()[2:]] == [["bundle", "FAIL"]]
    assert str(path) in captured.out
    assert captured.err.startswith("inflight-edge: 1 of 1 checks failed")


def test_doctor_prints_what_is_here_and_how_to_get_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    here, _, rest = captured.out.partition("\nhow to get the rest:\n")
    components = examine()
    assert len(here.splitlines()) == 2 + len(components)
    for component in components:
        assert component.name in here
        if not component.present and component.how_to_get:
            assert f"  {component.name}: {component.how_to_get}" in rest
    assert run("doctor", "--json") == 0
    records: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    assert [record["name"] for record in records] == [component.name for component in components]


def test_export_triton_says_what_it_made_and_what_is_next(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repository = tmp_path / "repository"
    assert run("export-triton", bundle, repository, "--name", "gate", "--runtime", "python") == 0
    *made, following = capsys.readouterr().out.splitlines()
    assert made == [str(repository / f"gate{part}") for part in ("_classifier", "_preprocess", "_scorer", "")]
    assert following == f"next: tritonserver --model-repository={repository}"
    assert run("export-triton", bundle, repository, "--name", "gate", "--guards-only", "--json") == 0
    assert json.loads(capsys.readouterr().out) == [str(repository / "gate_scorer" / "2")]
    assert run("export-triton", bundle, repository, "--name", "gate") == 2
    assert "exists already" in capsys.readouterr().err
