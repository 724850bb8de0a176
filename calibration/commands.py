"""Commands of the workstation's side: inspect, calibrate, evaluate, report, demo."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from inflight_edge._arguments import check_file, check_parent, class_index
from inflight_edge._files import check_replaceable
from inflight_edge._layout import OPTIONAL, REQUIRED
from inflight_edge._text import table
from inflight_edge.bundle import read_bundle, write_bundle
from inflight_edge.calibration.calibrate import calibrate as make_bundle
from inflight_edge.calibration.calibrate import check_unlearn
from inflight_edge.calibration.datasets import ImageSet, load_images
from inflight_edge.calibration.demo import run_demo
from inflight_edge.calibration.evaluate import MEANING
from inflight_edge.calibration.evaluate import evaluate as measure_detector
from inflight_edge.calibration.export import export_onnx
from inflight_edge.calibration.finding import MAX_CLASSES, TRANSFER, not_searched
from inflight_edge.calibration.inspection import Inspection, read_inspection
from inflight_edge.calibration.inspection import inspect as run_inspection
from inflight_edge.calibration.model import (
    Classifier,
    classifier_from_program,
    input_channels,
    input_pixels,
    load_program,
)
from inflight_edge.calibration.report import render
from inflight_edge.calibration.reversal.estimates import PatchEstimate
from inflight_edge.calibration.reversal.neural_cleanse import Settings
from inflight_edge.calibration.threads import is_small
from inflight_edge.commands import load_detector, shows_progress
from inflight_edge.errors import BundleError, OptionError
from inflight_edge.preprocess import Preprocess

__all__ = ["calibrate", "demo", "evaluate", "inspect", "report"]


def inspect(options: argparse.Namespace) -> int:
    """Inspect a classifier, print the ranked table, save the patterns."""
    _check_folder("--out", options.out)
    classifier, data = _model_and_data(options, options.feature_layer)
    inspection = _inspect(options, classifier, data)
    path = inspection.save(options.out)
    if options.json:
        report = {
            "suspects": list(inspection.suspects),
            "accuracy": inspection.accuracy,
            "patterns": str(path),
            "not_searched": not_searched(_method(options), classifier.n_classes),
            "patch_reached_a_class": _reached(inspection),
            "classes": inspection.rows(),
        }
        print(json.dumps(report, indent=1))
        return 0
    _print_inspection(inspection, _method(options))
    print(f"patterns and pictures: {options.out}")
    if inspection.suspects:
        print(f"next: inflight-edge calibrate {options.model} --data {options.data} --pattern {path}")
    return 0


def calibrate(options: argparse.Namespace) -> int:
    """Calibrate guards and write the bundle."""
    if options.force and options.out.exists() and not (options.out / "bundle.json").is_file():
        raise BundleError(f"{options.out}: --force replaces bundles only, and this is none; name another folder")
    if options.out.exists() and not options.force:
        raise BundleError(f"{options.out}: exists already; name another folder with --out or replace it with --force")
    if options.out.exists():
        check_replaceable(options.out, REQUIRED | OPTIONAL)
    check_parent("--out", options.out)
    for option in ("method", "steps") if options.pattern is not None else ():
        if getattr(options, option) is not None:
            raise OptionError(
                f"--{option}: of a search, but the patterns are those of --pattern; leave one of them out"
            )
    saved = None if options.pattern is None else read_inspection(options.pattern)
    layer = options.feature_layer or (saved.feature_layer if saved else None)
    classifier, data = _model_and_data(options, layer, saved.class_names if saved else None)
    check_unlearn(options.unlearn, data.labels)
    if not is_small(classifier):
        export_onnx(classifier)  # what cannot be exported is refused before the long work
    if saved is None:
        inspection = _inspect(options, classifier, data)
        if not options.json:
            _print_inspection(inspection, _method(options))
    else:
        _refuse_other_constants(options, saved)
        inspection = replace(saved, class_names=saved.class_names or data.class_names)
        inspection = _with_targets(inspection, _targets(options, inspection.class_names, len(saved.estimates)))
    try:
        bundle = make_bundle(
            classifier,
            data,
            inspection,
            precisions=options.precision,
            unlearn=options.unlearn,
            seed=options.seed,
            progress=shows_progress(options),
        )
        write_bundle(bundle, options.out, overwrite=options.force)
    except BaseException:
        if saved is None and inspection.suspects:  # it may have taken an hour
            kept = inspection.save(options.out.with_name(f"{options.out.name}-inspection"))
            print(f"the inspection is kept: go on with --pattern {kept}", file=sys.stderr)
        raise
    guards = [
        {
            "target": guard["target"],
            "name": bundle.class_names[guard["target"]],
            "asr_estimated": guard["asr_estimated"],
            "places": len(guard["samples"]["places"]),
            "views": 1 + len(guard["samples"]["views"]),
            "density": guard["density"]["reason"],
        }
        for guard in bundle.metrics["guards"]
    ]
    if options.json:
        print(
            json.dumps(
                {
                    "bundle": str(options.out),
                    "feature_layer": bundle.feature_layer,
                    "precisions": bundle.precisions,
                    "guards": guards,
                    **({"unlearned": bundle.metrics["unlearned"]} if "unlearned" in bundle.metrics else {}),
                },
                indent=1,
            )
        )
        return 0
    metrics = bundle.metrics
    print(
        f"\nclean accuracy {metrics['accuracy']:.4f} on {metrics['n_images']} images; features: {bundle.feature_layer}"
    )
    for tried in metrics["feature_layers"] if len(metrics["feature_layers"]) > 1 else ():
        found = tried.get("error") or (
            f"held-out error of the verdict {tried['verdict_error']:.4f}, of the source {tried['source_error']:.4f}"
        )
        print(f"  {tried['feature_layer']}: {found}")
    if "unlearned" in metrics:
        _print_copy(metrics["unlearned"])
    for guard in guards:
        print(
            f"guard of class {guard['name']}: estimated pattern sends {guard['asr_estimated']:.1%} of its sources' images there; "
            f"places of the pattern: {guard['places']}, views of an image: {guard['views']}\n  {guard['density']}"
        )
        if guard["asr_estimated"] < TRANSFER:
            print(
                "  that is few: this guard will know a trigger badly; `inspect --target` searches a class at full length"
            )
    for precision, report in metrics.get("precisions", {}).items():
        print(f"{precision}: {report['top1_agreement']:.2%} of the predictions are those of fp32; guards of its own")
    print(f"bundle: {options.out}   next: inflight-edge verify {options.out}")
    return 0


def _print_copy(gain: Mapping[str, Any]) -> None:
    """What an unlearned copy is good for, and whether it was joined."""
    if "reason" in gain:
        print(f"copy that has unlearned the pattern: left out, {gain['reason']}")
        return
    without, joined = gain["without"], gain["with"]
    print(
        f"copy that has unlearned the pattern: on {gain['held_out_images']} images that neither it nor a guard was "
        f"fitted to, error of the source {joined['source_error']:.4f} (without it {without['source_error']:.4f}), "
        f"of the verdict {joined['verdict_error']:.4f} ({without['verdict_error']:.4f})"
    )
    print(
        "  joined: every frame takes two networks' time; the errors of the guards below are held out of their densities alone, "
        "not of the copy"
        if gain["joined"]
        else "  no better: left out"
    )


def evaluate(options: argparse.Namespace) -> int:
    """Measure a bundle on labelled frames."""
    if options.clean is None and options.triggered is None:
        raise OptionError("nothing to measure on; name frames with --clean, --triggered or both")
    detector = load_detector(options)
    channels = detector.bundle.preprocess.input_shape[0]
    clean, triggered = (
        None if p is None else load_images(p, channels=channels, class_names=detector.class_names)
        for p in (options.clean, options.triggered)
    )
    figures = measure_detector(detector, clean, triggered, progress=shows_progress(options)).as_dict()
    if options.json:
        print(json.dumps(figures, indent=1))
    else:
        print_figures(figures)
    return 0


def report(options: argparse.Namespace) -> int:
    """Write a bundle's report."""
    check_file("--out", options.out, bundle=options.bundle)
    evaluation = None
    if options.evaluation is not None:
        try:
            evaluation = json.loads(options.evaluation.read_text(encoding="utf-8"))
        except ValueError as error:
            raise OptionError(f"--evaluation: {options.evaluation}: expected JSON, got other text ({error})") from error
        if not isinstance(evaluation, dict):
            raise OptionError(f"--evaluation: {options.evaluation}: expected an object of figures; use evaluate --json")
    text = render(
        read_bundle(options.bundle, key=options.key), name=options.bundle.resolve().name, evaluation=evaluation
    )
    # Names of files and texts of others may hold halves of surrogate pairs.
    options.out.write_bytes(text.encode("utf-8", "xmlcharrefreplace"))
    print(json.dumps({"report": str(options.out)}) if options.json else f"report: {options.out}")
    return 0


def demo(options: argparse.Namespace) -> int:
    """Run the demo, print its figures and optionally write them as JSON."""
    if options.json is not None:
        check_file("--json", options.json)
    _check_folder("--out", options.out)
    figures = run_demo(options.out, seed=options.seed, progress=shows_progress(options))
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    print_figures(figures)
    if figures["target_class"] is None:
        print("no class was suspected, so there is nothing to guard; try another --seed")
        return 1
    print(
        f"picture of the true and the estimated pattern: {options.out / 'patterns.png'}   bundle: {options.out / 'bundle'}"
    )
    return 0


def _check_folder(option: str, path: Path) -> None:
    """Refuse an output folder that cannot be made or written to, before the long work and not after it."""
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise OptionError(f"{option}: expected a folder, {existing} is a file or not writable; name another one")


def print_figures(figures: Mapping[str, Any]) -> None:
    """The figures as a table."""
    rows = []
    for key, value in figures.items():
        text = "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
        rows.append((key, text, MEANING.get(key, "")))
    print(table(rows, ("figure", "value", "meaning")))


def _model_and_data(
    options: argparse.Namespace, feature_layer: str | None, class_names: tuple[str, ...] | None = None
) -> tuple[Classifier, ImageSet]:
    program = load_program(options.model)
    data = load_images(options.data, channels=input_channels(program) or 3, class_names=class_names)
    _, height, width = data.image_shape
    if input_pixels(program) == height * width and data.image_shape[0] == 3:  # a row of grey pixels
        data = load_images(options.data, channels=1, class_names=class_names)
    return classifier_from_program(program, image_shape=data.image_shape, feature_layer=feature_layer), data


def _inspect(options: argparse.Namespace, classifier: Classifier, data: ImageSet) -> Inspection:
    if options.steps is not None and options.steps < 1:
        raise OptionError(f"--steps: expected at least 1, got {options.steps}")
    if options.steps is not None and _method(options) == "perturbation":
        raise OptionError("--steps: of the search for patches, but --method is perturbation; leave one of them out")
    given = {"scale": options.scale, "mean": options.mean, "std": options.std}
    preprocess = Preprocess(classifier.input_shape, **{name: v for name, v in given.items() if v is not None})
    return run_inspection(
        classifier,
        data,
        preprocess,
        settings=Settings() if options.steps is None else Settings(steps=options.steps),
        method=_method(options),
        targets=_targets(options, data.class_names, classifier.n_classes),
        feature_layer=options.feature_layer,
        seed=options.seed,
        progress=shows_progress(options),
    )


def _method(options: argparse.Namespace) -> str:
    return options.method or "auto"


def _reached(inspection: Inspection) -> bool:
    """Whether a patch sent the images of any class to another: else the searches were too short to say a thing."""
    patches = [e for e in inspection.estimates if isinstance(e, PatchEstimate)]
    return not patches or any(patch.reached for patch in patches)


def _with_targets(inspection: Inspection, targets: tuple[int, ...] | None) -> Inspection:
    """The inspection with the classes that the user names for suspects, where any are named."""
    return inspection if targets is None else replace(inspection, suspects=targets)


def _targets(options: argparse.Namespace, names: tuple[str, ...] | None, n_classes: int) -> tuple[int, ...] | None:
    if not options.target:
        return None
    known = names or tuple(str(c) for c in range(n_classes))
    return tuple(dict.fromkeys(class_index(text, known) for text in options.target))


def _refuse_other_constants(options: argparse.Namespace, saved: Inspection) -> None:
    """Constants come from the inspection; given again, they must agree."""
    constants = saved.preprocess
    for name, given, stored in (
        ("--scale", options.scale, constants.scale),
        ("--mean", options.mean, constants.mean),
        ("--std", options.std, constants.std),
    ):
        if given is not None and (
            np.shape(given) != np.shape(stored) or not np.allclose(given, stored, rtol=1e-6, atol=0)
        ):
            raise OptionError(
                f"{name}: the inspection was made with {stored}, got {given}; leave it out or inspect again"
            )


def _print_inspection(inspection: Inspection, method: str) -> None:
    header = ("class", "name", "pattern", "norm", "success", "sources", "anomaly index", "found by", "score")
    rows = [
        (
            r["class"],
            r["name"],
            r["kind"],
            f"{r['norm']:.2f}",
            f"{r['success']:.3f}",
            r["sources"] if isinstance(r["sources"], str) else ", ".join(inspection.name(c) for c in r["sources"]),
            "-" if r["anomaly_index"] is None else f"{r['anomaly_index']:.2f}",
            r["method"] or ("named by the user" if r["suspect"] else ""),
            "-" if r["score"] is None else f"{r['score']:.3g}",
        )
        for r in inspection.rows()
    ]
    print(table(rows[:20], header))
    if len(rows) > 20:
        print(f"... and {len(rows) - 20} more classes")
    left_out = not_searched(method, len(inspection.estimates))
    if left_out:
        print(f"not searched, since there are not 3 to {MAX_CLASSES} classes: {', '.join(left_out)}")
    accuracy = f"(clean accuracy {inspection.accuracy:.4f})"
    if inspection.suspects:
        print(f"suspected target: {', '.join(inspection.name(c) for c in inspection.suspects)}   {accuracy}")
    elif not _reached(inspection):
        print(
            f"no patch reached any class: whether there is a backdoor cannot be said; leave out --steps, or raise it {accuracy}"
        )
    else:
        first = inspection.rows()[0]
        print(f"no class stands out: no backdoor found {accuracy}")
        print(f"the most anomalous is {first['name']}: inspect again with --target to guard a class all the same")
