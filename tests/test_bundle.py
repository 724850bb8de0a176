"""The bundle: what is written comes back, and whatever is not exactly a bundle is refused whole."""

from __future__ import annotations

import errno
import os
import re
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import CLASS_NAMES, assert_same, tiny_bundle, tiny_guard, tiny_self_test, written
from safetensors.numpy import load

from inflight_edge import Bundle, BundleError, Preprocess, SelfTest, read_bundle, write_bundle
from inflight_edge.bundle import MAX_MANIFEST_BYTES

FILES = ("bundle.json", "detector.safetensors", "model.onnx", "selftest.safetensors")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return written(tmp_path / "bundle")


def test_bundle_comes_back_equal_and_read_only(path: Path) -> None:
    bundle = read_bundle(path)
    assert_same(bundle, tiny_bundle())
    assert [guard.target for guard in bundle.guards] == [3, 0]
    assert not bundle.self_test.logits.flags.writeable
    assert not bundle.guards[0].means.flags.writeable
    assert sorted(os.listdir(path)) == sorted(FILES)
    assert os.listdir(path.parent) == ["bundle"]


@pytest.mark.parametrize("kind", ["diagonal", "shared", "full"])
def test_every_kind_of_density_comes_back(tmp_path: Path, kind: Any) -> None:
    guards = (tiny_guard(2, kind),)
    bundle = tiny_bundle(guards=guards, self_test=tiny_self_test(guards))
    write_bundle(bundle, tmp_path / "b")
    assert_same(read_bundle(str(tmp_path / "b")), bundle)


def golden_bundle() -> Bundle:
    """Fixed numbers only: no random generator, no transcendental function, no model exporter."""
    guards = (tiny_guard(3), tiny_guard(0, "full"))
    self_test = SelfTest(
        frames=np.arange(8, dtype=np.uint8).reshape(2, 2, 2, 1),
        logits=np.array([[0, 1, 2, 3], [3, 2, 1, 0]], np.float32),
        features=np.array([[1, 2, 3, 4], [4, 3, 2, 1]], np.float32),
        log_likelihoods=(np.full((2, 4), -1.5, np.float32), np.full((2, 4), -2.25, np.float32)),
        decisions=("trigger", "accept"),
        sources=np.array([1, -1], np.int32),
    )
    return tiny_bundle(
        preprocess=Preprocess((1, 2, 2), 0.00390625, (0.5,), (0.25,)),
        class_names=("n\u00f6rd", *CLASS_NAMES[1:]),
        guards=guards,
        model=b"not a model, and the bundle need not know",
        self_test=self_test,
    )


def test_golden_bytes(tmp_path: Path) -> None:
    """A change here is a change of the format: readers in the field must still understand it."""
    write_bundle(golden_bundle(), tmp_path / "one")
    write_bundle(golden_bundle(), tmp_path / "two")
    digests = {}
    for name in FILES:
        data = (tmp_path / "one" / name).read_bytes()
        assert data == (tmp_path / "two" / name).read_bytes()
        digests[name] = sha256(data).hexdigest()
    assert digests == {
        "bundle.json": "d91b32d097bf4d5ae33b4a71d03c932b24cf2cabb9515ff9ebc01a2b2c1fbd1d",
        "detector.safetensors": "c9ed44f2bbba95c7b86e9a7117979e6389249602ef5bc8c477f53c521a08ac34",
        "model.onnx": "0e9f91b05106453f6f4247f1803b9b672f0cbd7e5eb970fb05bd3dad8f8f725b",
        "selftest.safetensors": "f2f8b75cceb40628a530d0c65b512cf956a858d8eb3eb46a38571ac9993866b1",
    }


def test_decisions_are_the_documented_codes(path: Path) -> None:
    codes = load((path / "selftest.safetensors").read_bytes())["decisions"]
    assert codes.dtype == np.uint8
    assert codes.tolist() == [0, 1, 1, 2, 0, 1]


# --- writing


def test_existing_path_is_kept_without_overwrite(path: Path) -> None:
    before = (path / "bundle.json").read_bytes()
    with pytest.raises(BundleError, match="expected no such file or folder, got one; choose another name"):
        write_bundle(tiny_bundle(feature_layer="other"), path)
    assert (path / "bundle.json").read_bytes() == before


def test_overwrite_replaces_a_bundle(path: Path) -> None:
    write_bundle(tiny_bundle(feature_layer="other"), path, overwrite=True)
    assert read_bundle(path).feature_layer == "other"
    assert os.listdir(path.parent) == ["bundle"]


def test_overwrite_through_a_link_keeps_the_link(path: Path) -> None:
    link = path.parent / "link"
    link.symlink_to(path)
    write_bundle(tiny_bundle(feature_layer="other"), link, overwrite=True)
    assert link.is_symlink()
    assert read_bundle(path).feature_layer == read_bundle(link).feature_layer == "other"


@pytest.mark.parametrize("at", ["file", "folder"])
def test_overwrite_never_destroys_what_is_no_bundle(path: Path, at: str) -> None:
    target, message = path.parent / "photo.jpg", "got a file; choose another name or remove it yourself"
    target.write_bytes(b"precious")
    if at == "folder":
        (path / "notes.txt").write_bytes(b"precious")
        target, message = path, "got one with 'notes.txt'; choose another name"
    with pytest.raises(BundleError, match=message):
        write_bundle(tiny_bundle(), target, overwrite=True)
    assert (target if at == "file" else path / "notes.txt").read_bytes() == b"precious"


def test_failed_swap_keeps_the_old_bundle(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, rename = [], os.rename

    def failing(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(BundleError, match=r"bundle: cannot be written: Input/output error$"):
        write_bundle(tiny_bundle(feature_layer="other"), path, overwrite=True)
    assert len(calls) == 3
    assert read_bundle(path).feature_layer == "flat"
    assert os.listdir(path.parent) == ["bundle"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def failing(_: int) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises((BundleError, KeyboardInterrupt), match=r"No space left on device|^$"):
        write_bundle(tiny_bundle(), tmp_path / "bundle")
    assert os.listdir(tmp_path) == []


def test_missing_parent_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="nowhere/bundle: cannot be written: No such file or directory"):
        write_bundle(tiny_bundle(), tmp_path / "nowhere" / "bundle")


def test_too_large_a_report_is_refused_before_it_is_written(tmp_path: Path) -> None:
    bundle = tiny_bundle(metrics={"report": "x" * MAX_MANIFEST_BYTES})
    with pytest.raises(BundleError, match=r"expected at most .* 1048576 for bundle.json, got .*; guard fewer"):
        write_bundle(bundle, tmp_path / "b")
    assert os.listdir(tmp_path) == []


# --- the parts, made in memory


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guards": ()}, r"guards: expected at least one and one per target, got targets \[\]"),
        ({"guards": (tiny_guard(3), tiny_guard(3))}, r"got targets \[3, 3\]"),
        ({"model": b""}, "model: expected an ONNX file, got no bytes"),
        ({"class_names": ("a", "b", "c")}, r"logits: expected shape \(6, 3\), got \(6, 4\)"),
        ({"class_names": ("a", "b", "c", "d\n")}, r"expected printable text, got 'd\\n'; rename it"),
        ({"feature_layer": None}, "expected printable text, got None"),
        ({"metrics": {"tpr": float("nan")}}, "metrics: expected an object of JSON values"),
        ({"metrics": {"tpr": np.float32(1)}}, "metrics: expected an object of JSON values"),
        ({"metrics": {9: 1}}, "metrics: expected an object of JSON values"),
        ({"metrics": {"shape": (1, 2)}}, "metrics: expected an object of JSON values"),
        ({"metrics": {"name": "\ud800"}}, "metrics: expected an object of JSON values"),
        ({"versions": {"torch": 2}}, "versions: expected names and versions as strings, got"),
    ],
)
def test_bundle_that_does_not_fit_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        tiny_bundle(**changes)


def test_preprocessing_with_numpy_numbers_is_refused_at_write(tmp_path: Path) -> None:
    bundle = tiny_bundle(preprocess=Preprocess((1, 2, 2), np.float32(0.5)))  # type: ignore[arg-type]
    with pytest.raises(BundleError, match=r"expected plain numbers in the preprocessing, got Preprocess.*; use int"):
        write_bundle(bundle, tmp_path / "b")


def test_error_of_the_self_test_names_what_it_got() -> None:
    test = tiny_bundle().self_test
    with pytest.raises(
        BundleError, match=re.escape("logits: expected a C-contiguous float32 array of 2 axes, got list")
    ):
        SelfTest(test.frames, [], test.features, test.log_likelihoods, test.decisions, test.sources)  # type: ignore[arg-type]
    with pytest.raises(BundleError, match="decisions: expected 6 of"):
        SelfTest(test.frames, test.logits, test.features, test.log_likelihoods, ("maybe",) * 6, test.sources)
