"""Bundles of several precisions: each is a bundle of its own, one precision stays format 1, mixtures are refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bundles import assert_same, forge, tiny_bundle, tiny_guard, tiny_model, tiny_self_test

from inflight_edge import Bundle, BundleError, Detector, OptionError, read_bundle, write_bundle
from inflight_edge.bundle import Variant

FP16_FILES = ("detector.fp16.safetensors", "model.fp16.onnx", "selftest.fp16.safetensors")


def variant(*, batch: int | str = "N") -> Variant:
    guards = (tiny_guard(3, "full"), tiny_guard(0, "diagonal"))
    return Variant(tiny_model(batch=batch), guards, tiny_self_test(guards))


def two_precisions(**variants: Variant) -> Bundle:
    return replace(tiny_bundle(), variants=variants or {"fp16": variant(batch=2)})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_bundle(two_precisions(), tmp_path / "bundle")
    return tmp_path / "bundle"


def test_each_precision_comes_back_as_a_bundle_of_its_own(path: Path) -> None:
    bundle = read_bundle(path)
    assert bundle.precisions == ("fp32", "fp16")
    assert_same(bundle, tiny_bundle())
    half = bundle.at("fp16")
    assert (half.precision, half.precisions) == ("fp16", ("fp16",))
    expected = variant(batch=2)
    assert_same(half, tiny_bundle(guards=expected.guards, model=expected.model, self_test=expected.self_test))
    assert bundle.at("fp32").variants == {}
    assert set(FP16_FILES) < set(os.listdir(path))


def test_one_precision_is_still_format_1(tmp_path: Path) -> None:
    write_bundle(tiny_bundle(), tmp_path / "one")
    assert json.loads((tmp_path / "one" / "bundle.json").read_text())["format_version"] == 1
    assert json.loads((tmp_path / "one" / "bundle.json").read_text()).keys().isdisjoint({"precisions"})


def test_manifest_names_and_hashes_every_file(path: Path) -> None:
    manifest = json.loads((path / "bundle.json").read_text())
    assert manifest["format_version"] == 2
    assert {"bundle.json", *manifest["files"]} == set(os.listdir(path))
    assert manifest["precisions"] == {
        "fp16": {"guards": [{"kind": "full", "target": 3}, {"kind": "diagonal", "target": 0}]}
    }


def test_detector_takes_the_precision_that_is_asked_for(path: Path) -> None:
    detector = Detector.load(path, precision="fp16")
    assert detector.bundle.precision == "fp16"
    assert [guard.guard.kind for guard in detector.guards.values()] == ["full", "diagonal"]
    with pytest.raises(OptionError, match="precision: this bundle has fp32, fp16, got 'int8'; choose one of them or"):
        Detector.load(path, precision="int8")


@pytest.mark.parametrize("name", FP16_FILES)
def test_damaged_or_missing_file_of_a_precision_refuses_the_whole_bundle(path: Path, name: str) -> None:
    data = (path / name).read_bytes()
    (path / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(BundleError, match=f"{name}: expected SHA-256"):
        read_bundle(path)
    (path / name).unlink()
    with pytest.raises(BundleError, match=f"{name}: expected a regular file, no link, got No such file"):
        read_bundle(path)


def test_file_of_a_precision_that_the_manifest_does_not_name_is_refused(tmp_path: Path, path: Path) -> None:
    one = tmp_path / "one"
    write_bundle(tiny_bundle(), one)
    (one / "model.fp16.onnx").write_bytes(b"")
    with pytest.raises(BundleError, match=r"expected only files that bundle.json names, got 'model.fp16.onnx' too"):
        read_bundle(one)
    (path / "model.int8.onnx").write_bytes(b"")
    with pytest.raises(BundleError, match=r"expected only files that bundle.json names, got 'model.int8.onnx' too"):
        read_bundle(path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.update(precisions={}), "precisions: expected any of fp16, int8, got str 'none'"),
        (
            lambda m: m.update(precisions={"fp8": {"guards": []}}),
            "precisions: expected any of fp16, int8, got str 'fp8'",
        ),
        (lambda m: m.update(precisions=[]), "precisions: expected"),
        (lambda m: m["precisions"].update(int8={"guards": []}), "files: expected"),
        (lambda m: m["precisions"]["fp16"].update(model="x"), "precisions: fp16: expected"),
        (lambda m: m.update(format_version=1), "precisions"),
        (lambda m: m.pop("precisions"), "precisions"),
        (lambda m: m["precisions"]["fp16"]["guards"].pop(), "expected"),
    ],
)
def test_manifest_that_contradicts_itself(path: Path, edit: Callable[[dict[str, Any]], object], message: str) -> None:
    forge(path, edit)
    with pytest.raises(BundleError, match=message) as caught:
        read_bundle(path)
    assert str(caught.value).startswith(str(path))


def test_precisions_guard_the_same_targets() -> None:
    guards = (tiny_guard(3),)
    with pytest.raises(BundleError, match=r"guards of int8: expected targets \[3, 0\], got \[3\]; calibrate again"):
        two_precisions(int8=Variant(tiny_model(), guards, tiny_self_test(guards)))


def test_unknown_precision_and_one_without_fp32_are_refused() -> None:
    with pytest.raises(BundleError, match=r"precision: expected fp32 and any of fp16, int8, got fp32 and fp8"):
        two_precisions(fp8=variant())
    with pytest.raises(BundleError, match=r"precision: expected fp32 and any of fp16, int8, got fp16 and int8"):
        replace(tiny_bundle(), precision="fp16", variants={"int8": variant()})


def test_one_precision_alone_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="expected a bundle with fp32, got fp16 alone"):
        write_bundle(two_precisions().at("fp16"), tmp_path / "half")
    assert list(tmp_path.iterdir()) == []


def test_bundle_of_fewer_precisions_replaces_one_of_more(path: Path) -> None:
    write_bundle(tiny_bundle(), path, overwrite=True)
    assert read_bundle(path).precisions == ("fp32",)
