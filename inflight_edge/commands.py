"""Commands of the device's side: score, run, verify, bench, doctor, export-triton; and signing."""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict, fields
from getpass import getpass
from pathlib import Path
from typing import Any

from inflight_edge._arguments import check_file
from inflight_edge._text import table
from inflight_edge.bench import bench as bench_detector
from inflight_edge.bundle import sign_bundle
from inflight_edge.compile import compile_bundle
from inflight_edge.detector import Detector
from inflight_edge.doctor import examine
from inflight_edge.engines import EngineOptions
from inflight_edge.engines._tensorrt_build import BuildOptions
from inflight_edge.errors import BundleError, DataError, OptionError
from inflight_edge.images import iter_images
from inflight_edge.report import make_report
from inflight_edge.signing import write_keys
from inflight_edge.verdict import Decision, Verdict
from inflight_edge.verify import verify as verify_bundle

__all__ = [
    "bench",
    "compile_",
    "doctor",
    "export_triton",
    "keygen",
    "load_detector",
    "run",
    "score",
    "shows_progress",
    "sign",
    "verify",
]

_WHOLE = ("p50_ns", "p99_ns", "max_ns")
_HEADER = ("image", "decision", "predicted", "source", "margin", "reason")


def load_detector(options: argparse.Namespace) -> Detector:
    """The detector that a command's arguments name."""
    engine_options = EngineOptions(
        arena=not options.no_arena,
        optimisation=options.optimisation,
        memory=options.memory,
        wait=options.wait,
        graph=not options.no_graph,
        plan=options.plan,
    )
    return Detector.load(
        options.bundle,
        engine=options.engine,
        scorer=options.scorer,
        threads=options.threads,
        options=engine_options,
        precision=options.precision,
        key=options.key,
    )


def compile_(options: argparse.Namespace) -> int:
    """Build a TensorRT plan, check it with the bundle's self-test, keep it if it passes."""
    if options.out is not None:  # first: the build takes minutes
        options.out.absolute().parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_file("--out", options.out, bundle=options.bundle)
    build = BuildOptions(batch=options.batch, workspace=options.workspace)
    compiled = compile_bundle(
        options.bundle, precision=options.precision, options=build, out=options.out, key=options.key
    )
    if options.json:
        print(json.dumps(compiled.as_dict(), indent=1))
        return 0
    identity = compiled.identity
    print(f"TensorRT {identity.tensorrt}, {identity.gpu} (compute capability {identity.compute_capability})")
    print(f"self-test passed: {compiled.report}")
    print(f"plan: {compiled.path} ({compiled.n_bytes} bytes, {compiled.seconds:.1f} s)")
    return 0


def shows_progress(options: argparse.Namespace) -> bool:
    """Whether progress bars are wanted and there is a terminal to draw them on."""
    return not options.quiet and sys.stderr.isatty()


def score(options: argparse.Namespace) -> int:
    """Print a verdict per image; an image that cannot be judged is INVALID and makes the exit code 2."""
    detector = load_detector(options)
    channels = detector.bundle.preprocess.input_shape[0]
    rows, invalid, count = [], [], 0
    for name, frame in iter_images(options.images, channels):
        count += 1
        verdict = Verdict(Decision.INVALID, reason=str(frame)) if isinstance(frame, DataError) else detector(frame)
        if verdict.decision is Decision.INVALID:
            invalid.append(verdict.reason if name in verdict.reason else f"{name}: {verdict.reason}")
        if options.json:
            print(json.dumps(_record(name, verdict, detector)), flush=True)
        else:
            rows.append(_row(name, verdict, detector))
    if rows:
        print(table(rows, _HEADER))
    if invalid:
        raise DataError(f"{len(invalid)} image(s) could not be judged and are invalid; the first: {invalid[0]}")
    if not count:
        raise DataError(f"{', '.join(map(str, options.images))}: expected images, got none")
    return 0


def run(options: argparse.Namespace) -> int:
    """Judge the frames of cameras or files until they end."""
    from inflight_edge.service import serve
    from inflight_edge.settings import Settings, read_settings

    given = {field.name: getattr(options, field.name) for field in fields(Settings)}
    given |= {name: None if given[name] is None else str(given[name]) for name in ("key", "plan")}
    settings = read_settings(options.config, given)
    return serve(settings, json_path=options.json, quiet=options.quiet)


def verify(options: argparse.Namespace) -> int:
    """Print every check of a bundle; exit code 1 when one failed."""
    if not options.bundle.is_dir():
        raise BundleError(f"{options.bundle}: expected a bundle folder, got none; name the folder that calibrate wrote")
    checks = verify_bundle(options.bundle, key=options.key)
    if options.json:
        print(json.dumps([asdict(check) for check in checks], indent=1))
    else:
        print(
            table([(c.name, "pass" if c.passed else "FAIL", c.detail) for c in checks], ("check", "result", "detail"))
        )
    failed = sum(not check.passed for check in checks)
    if failed:
        print(f"inflight-edge: {failed} of {len(checks)} checks failed: do not use this bundle here", file=sys.stderr)
    return 1 if failed else 0


def keygen(options: argparse.Namespace) -> int:
    """Write a new pair of keys."""
    write_keys(options.private, options.public)
    print(f"{options.private}: keep it off the device, and secret; it signs: inflight-edge sign BUNDLE --key ...")
    print(f"{options.public}: goes to the device; it checks: inflight-edge verify BUNDLE --key ...")
    return 0


def sign(options: argparse.Namespace) -> int:
    """Sign a bundle; a key with a passphrase asks for it on the terminal."""

    def ask() -> str:
        try:
            return getpass(f"passphrase of {options.key}: ")
        except EOFError:
            raise OptionError(f"{options.key}: expected its passphrase, got none") from None

    terminal = sys.stdin is not None and sys.stdin.isatty()
    sign_bundle(options.bundle, options.key, passphrase=ask if terminal else None)
    print(f"{options.bundle}: signed")
    return 0


def bench(options: argparse.Namespace) -> int:
    """Print the latency of each stage; --json writes a file with what was measured and on what."""
    if options.json is not None:
        check_file("--json", options.json, bundle=options.bundle)
    figures = bench_detector(load_detector(options), options.frames)
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    keys = ("p50_ns", "p99_ns", "p999_ns", "max_ns")
    rows = [
        (name, stage["count"], *(f"{stage[k] / 1000:.1f}" for k in keys)) for name, stage in figures["stages"].items()
    ]
    print(table(rows, ("stage", "frames", "p50 us", "p99 us", "p99.9 us", "max us")))
    machine = figures["environment"]
    print(
        f"\n{machine['cpu']}, governor {machine['governor'] or 'unknown'}, scorer {figures['scorer']}, "
        f"engine {figures['engine']}, warm-up {figures['warm_up']} frames"
    )
    return 0


def export_triton(options: argparse.Namespace) -> int:
    """Write a model repository, or a new version of its guards, and print what was made."""
    from inflight_edge.serving.repository import Queue, export_guards, export_repository

    names = ("form", "runtime", "precision", "max_batch", "instances", "queue", "plan", "python_path")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.guards_only:
        for name in given:
            raise OptionError(
                f"--{name.replace('_', '-')}: with --guards-only that of the repository stays; leave it out"
            )
        made = [export_guards(options.bundle, options.repository, name=options.name, key=options.key)]
    else:
        plans, sizes = given.pop("plan", []), {"max_batch": "max_batch", "instances": "instances", "queue": "size"}
        if len(dict(plans)) < len(plans):
            raise OptionError("--plan: expected one file for each compute capability, got two for one")
        made = export_repository(
            options.bundle,
            options.repository,
            name=options.name,
            queue=Queue(**{sizes[name]: given.pop(name) for name in sizes.keys() & given.keys()}),
            plans=dict(plans),
            python_path=tuple(given.pop("python_path", ())),
            key=options.key,
            **given,
        )
    if options.json:
        print(json.dumps([str(path) for path in made]))
        return 0
    print("\n".join(map(str, made)))
    if options.guards_only:
        print(f"next: tell the server to load {options.name}_scorer again, unless it polls the repository")
    else:
        print(f"next: tritonserver --model-repository={options.repository}")
    return 0


def doctor(options: argparse.Namespace) -> int:
    """Print what this machine has; with --run also write the report of a bundle on it, exit code 1 when it fails."""
    if options.run_bundle is not None:
        return _run_report(options)
    for option in ("report", "frames", "key"):
        if getattr(options, option) is not None:
            raise OptionError(f"--{option}: of --run BUNDLE, which is not there; add it")
    components = examine()
    if options.json:
        print(json.dumps([asdict(component) for component in components], indent=1))
        return 0
    print(
        table(
            [(c.name, "yes" if c.present else "no", c.detail, c.needed_for) for c in components],
            ("part", "here", "detail", "needed for"),
        )
    )
    missing = [c for c in components if not c.present and c.how_to_get]
    if missing:
        print("\nhow to get the rest:")
        print("\n".join(f"  {c.name}: {c.how_to_get}" for c in missing))
    return 0


def _run_report(options: argparse.Namespace) -> int:
    path = options.report or Path("inflight-edge-report.json")
    check_file("--report", path, bundle=options.run_bundle)  # first: the measurement takes a while
    n_frames = 500 if options.frames is None else options.frames
    report = make_report(options.run_bundle, n_frames=n_frames, key=options.key)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if options.json:
        print(json.dumps(report, indent=1))
    else:
        print(
            table(
                [(row["step"], "pass" if row["passed"] else "FAIL", row["detail"]) for row in report["ladder"]],
                ("step", "result", "detail"),
            )
        )
        print()
        whole = [
            (row["path"], *(f"{row['stages']['whole'][k] / 1000:.1f}" for k in _WHOLE)) for row in report["latency"]
        ]
        print(table(whole, ("precision, engine, scorer", "p50 us", "p99 us", "max us")))
        for name, reason in report["left_out"].items():
            print(f"left out: {name}: {reason}")
        print(f"\nreport: {path}")
    return 0 if all(row["passed"] for row in report["ladder"]) else 1


def _name(detector: Detector, label: int | None) -> str:
    return "-" if label is None else detector.class_names[label]


def _row(name: str, verdict: Verdict, detector: Detector) -> tuple[str, ...]:
    margin = f"{verdict.margin:.2f}" if math.isfinite(verdict.margin) else "-"
    labels = (_name(detector, verdict.predicted), _name(detector, verdict.source))
    return (name, verdict.decision.value, *labels, margin, verdict.reason)


def _record(name: str, verdict: Verdict, detector: Detector) -> dict[str, Any]:
    labels = {"predicted_name": verdict.predicted, "source_name": verdict.source}
    names = {key: None if label is None else detector.class_names[label] for key, label in labels.items()}
    return {"image": name, **verdict.as_dict(), **names}
