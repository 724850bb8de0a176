"""The report holds what the calibration found, in one file that needs nothing else."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import fields, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import poisoned
import pytest
from bundles import tiny_bundle
from command_lines import run
from PIL import Image

from inflight_edge import DataError, write_bundle
from inflight_edge._contents import dump_json
from inflight_edge.bundle import MAX_MANIFEST_BYTES, Bundle
from inflight_edge.calibration.evaluate import Evaluation
from inflight_edge.calibration.evidence import guard_evidence, trimmed
from inflight_edge.calibration.report import render
from inflight_edge.calibration.samples import Samples
from inflight_edge.calibration.selection import Choice


class Balanced(HTMLParser):
    """Fails on a tag that is not closed."""

    VOID = frozenset(["meta", "img", "path", "use", "rect"])

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


@pytest.mark.parametrize(
    ("sources", "words"), [("all", "all other classes"), ([0, 5], "0, 5"), (None, "all other classes")]
)
def test_the_report_says_whose_images_the_pattern_sends(sources: object, words: str) -> None:
    bundle = poisoned.bundle()
    rows = [{**row, "sources": sources} if row["class"] == 3 else row for row in bundle.metrics["inspection"]]
    text = render(replace(bundle, metrics={**bundle.metrics, "inspection": rows}), name="digits")
    assert f"of the images of {words} to 3" in text


def test_report_shows_guard_pictures_charts_confusion_and_versions() -> None:
    text = render(poisoned.bundle(), name="digits")
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    for part in ("Guard of 3", "Margins of held-out images", "Inferred source", "How it was made", "scikit-learn"):
        assert part in text
    assert text.count("<svg ") == 2
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    images = [np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data in pictures]
    assert [image.shape for image in images] == [(12, 12)] * 3
    clean, triggered, _ = (image.astype(int) for image in images)
    assert np.abs(triggered - clean)[-3:, -3:].max() > 100  # the trigger sits at the bottom right


def test_report_needs_nothing_from_elsewhere() -> None:
    text = render(poisoned.bundle(), name="digits")
    outside = set(re.findall(r'(?:src|href)="(?!data:|#)([^"]*)"', text)) | set(
        re.findall(r"url\((?!#)([^)]*)\)", text)
    )
    assert outside == set()
    assert "<script" not in text
    assert "@import" not in text


def test_equal_bundles_give_equal_reports() -> None:
    assert render(poisoned.bundle(), name="a") == render(poisoned.bundle(), name="a")


def test_names_are_text_and_never_markup() -> None:
    hostile = '<script>alert("1")</script>'
    bundle = replace(poisoned.bundle(), class_names=(hostile, *poisoned.bundle().class_names[1:]), feature_layer="<i>x")
    text = render(bundle, name="</title><b>")
    assert "<script" not in text
    assert "<i>" not in text
    assert "</title><b>" not in text
    assert "&lt;script&gt;" in text


def with_metrics(**metrics: Any) -> Bundle:
    bundle = poisoned.bundle()
    return replace(bundle, metrics={**bundle.metrics, **metrics})


def test_metrics_that_are_not_calibrates_are_an_error_and_never_markup() -> None:
    guard = poisoned.bundle().metrics["guards"][0]
    wrong = ({}, 7, {**guard, "target": 99}, {**guard, "samples": {**guard["samples"], "n": "<script>"}})
    for entry in wrong:
        with pytest.raises(DataError, match="metrics: expected those that `inflight-edge calibrate` writes"):
            render(with_metrics(guards=[entry]), name="a")


def test_names_are_shown_as_they_are_in_charts() -> None:
    """A dollar begins a formula elsewhere, and an underscore hides a row of the legend."""
    names = list(poisoned.bundle().class_names)
    names[:2] = r"$\x$", "_other"
    text = render(replace(poisoned.bundle(), class_names=tuple(names)), name="a")
    plain = render(poisoned.bundle(), name="a")
    assert text.count("<svg ") == 2
    assert text.count('<g id="text_') == plain.count('<g id="text_') > len(names)


def test_what_is_not_held_out_of_a_copy_is_said() -> None:
    gain = {name: {"verdict_error": 0.0, "source_error": 0.1} for name in ("without", "with")} | {"held_out_images": 9}
    warning = "trained on these very images"
    assert warning in render(with_metrics(unlearned={**gain, "joined": True}), name="a")
    for unlearned in ({**gain, "joined": False}, {"joined": False, "reason": "no"}):
        assert warning not in render(with_metrics(unlearned=unlearned), name="a")


def test_every_figure_of_an_evaluation_is_shown() -> None:
    names = [field.name for field in fields(Evaluation)]
    text = render(poisoned.bundle(), name="a", evaluation={name: 7001 + i for i, name in enumerate(names)})
    assert all(f"<td>{7001 + i}</td>" in text for i in range(len(names)))


def test_evaluation_is_told_apart_from_the_calibrations_own_figures() -> None:
    assert "No held-out frames were given" in render(poisoned.bundle(), name="a")
    text = render(poisoned.bundle(), name="a", evaluation={"tpr": 0.98765, "fpr": None, "n_clean": 40})
    assert "No held-out frames" not in text
    assert "0.9877" in text
    with pytest.raises(DataError, match="expected the output of `inflight-edge evaluate --json`"):
        render(poisoned.bundle(), name="a", evaluation={"accuracy": 1.0})
    for rows in ([1], ["x"], [{"class": 0}, 5]):
        odd = replace(tiny_bundle(), metrics={"inspection": rows})
        with pytest.raises(DataError, match=r"^bundle: metrics: expected those that `inflight-edge calibrate` writes"):
            render(odd, name="odd")


def test_bundle_of_other_tools_without_evidence_is_reported_as_far_as_it_goes() -> None:
    text = render(tiny_bundle(), name="tiny")
    assert "west, north" in text
    assert "<svg" not in text


def test_command_writes_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_bundle(poisoned.bundle(), tmp_path / "bundle")
    figures = tmp_path / "figures.json"
    figures.write_text(json.dumps({"tpr": 1.0, "n_triggered": 7}))
    out = tmp_path / "report.html"
    assert run("report", tmp_path / "bundle", "--out", out, "--evaluation", figures) == 0
    assert capsys.readouterr().out == f"report: {out}\n"
    assert out.read_text().startswith("<!doctype html>")
    figures.write_text('{"acc": "\\ud800"}')  # half of a pair: no text of UTF-8
    assert run("report", tmp_path / "bundle", "--out", out, "--evaluation", figures) == 0
    assert "&#55296;" in out.read_text(encoding="utf-8")
    assert capsys.readouterr().out == f"report: {out}\n"
    for content, message in (("{", "expected JSON"), ("[]", "expected an object of figures")):
        figures.write_text(content)
        assert run("report", tmp_path / "bundle", "--out", out, "--evaluation", figures) == 2
        assert message in capsys.readouterr().err
    assert run("report", tmp_path / "bundle", "--out", tmp_path) == 2
    assert "--out: expected a file that can be written" in capsys.readouterr().err


def test_evidence_of_many_classes_fits_into_a_manifest() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(200), 100)
    features = rng.standard_normal((len(labels), 8)).astype(np.float32)
    margins = rng.standard_normal(len(labels)).astype(np.float32)
    margins[:3] = [np.inf, -np.inf, 1e30]
    choice = Choice(None, "", (), margins[labels == 7], margins, labels)  # type: ignore[arg-type]
    samples = Samples(features, labels, np.arange(len(labels)))
    image = rng.integers(0, 256, (3, 224, 224)).astype(np.float32)
    kept = [guard_evidence(image, 255 - image, samples, 7, choice, n_guards=n, seed=0) for n in (1, 10, 200)]
    sizes = [len(json.dumps(entry, allow_nan=False)) for entry in kept]
    assert sizes[0] < MAX_MANIFEST_BYTES / 2
    assert 10 * sizes[1] < MAX_MANIFEST_BYTES
    assert 200 * sizes[2] < MAX_MANIFEST_BYTES
    assert kept[0]["confusion"] == {"classes": [], "counts": []}
    # The report counts false alarms among all of them.
    assert [len(entry["margins"]["clean"]) for entry in kept] == [100] * 3


def test_what_a_manifest_has_no_room_for_is_left_out_from_the_end() -> None:
    trials = [{"verdict_error": 0.25, "source_error": 0.5}] * 20
    density = {"reason": "alone", "trials": trials}
    guards = [{"target": t, "density": density, "evidence": {"margins": [0.5] * 500}} for t in range(6)]
    metrics = {"guards": guards, "precisions": {"fp16": {"guards": [{"target": 0, "density": density}]}}}
    metrics = json.loads(json.dumps(metrics))  # nothing is shared
    whole = len(dump_json(metrics) or b"")
    assert trimmed(metrics, whole) == metrics
    less = trimmed(metrics, whole - 1)
    assert ["evidence" in entry for entry in less["guards"]] == [True] * 5 + [False]
    least = trimmed(metrics, 4000)
    assert len(dump_json(least) or b"") <= 4000
    assert not any("evidence" in entry for entry in least["guards"])
    kept = [bool(entry["density"]["trials"]) for entry in (*least["guards"], *least["precisions"]["fp16"]["guards"])]
    assert kept == [True] * 2 + [False] * 5
    assert metrics["guards"][5]["evidence"] == {"margins": [0.5] * 500}


def test_confusion_counts_a_missed_trigger_as_missed() -> None:
    labels = np.array([0, 0, 1, 1, 2, 2])
    choice = Choice(
        None, "", (), np.zeros(2, np.float32),  # type: ignore[arg-type]
        np.array([1, -1, 1, 1, -5, -5], np.float32), np.array([0, 0, 0, 1, 0, 1]),
    )  # fmt: skip
    features = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)
    image = np.zeros((1, 4, 4), np.float32)
    samples = Samples(features, labels, np.arange(6))
    kept = guard_evidence(image, image, samples, 2, choice, n_guards=1, seed=0)
    assert kept["confusion"] == {"classes": [0, 1], "counts": [[1, 0, 1], [1, 1, 0]]}
    assert kept["margins"] == {"clean": [-5.0, -5.0], "triggered": [1.0, -1.0, 1.0, 1.0]}
