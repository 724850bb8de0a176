"""ARCHITECTURE.md is enough to write another reader of a bundle: here is one, and it reaches the same verdicts."""

from __future__ import annotations

import json
import re
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import tiny_bundle, tiny_guard, tiny_self_test, written
from guards import random_features, random_guard

from inflight_edge import Preprocess, SelfTest
from inflight_edge.guard import Kind
from inflight_edge.scoring import Scorer

ARCHITECTURE = (Path(__file__).parents[1] / "ARCHITECTURE.md").read_text()


def tensors(data: bytes) -> dict[str, np.ndarray[Any, Any]]:
    """A safetensors file, read as ARCHITECTURE.md describes it and with nothing else."""
    size = int.from_bytes(data[:8], "little")
    dtypes = {"F32": "<f4", "I32": "<i4", "U8": "u1"}
    result = {}
    for name, entry in json.loads(data[8 : 8 + size]).items():
        assert set(entry) == {"dtype", "shape", "data_offsets"}
        start, end = (8 + size + offset for offset in entry["data_offsets"])
        result[name] = np.frombuffer(data[start:end], dtypes[entry["dtype"]]).reshape(entry["shape"])
    return result


def scores(part: dict[str, np.ndarray[Any, Any]], kind: str, features: np.ndarray[Any, Any]) -> list[float]:
    """Log-likelihoods of one frame, from the formulas under "The score"."""
    z = (features.astype(np.float64) - part["mean"]) / part["scale"]
    n = len(z)
    terms = []
    for m, centre in enumerate(part["means"].astype(np.float64)):
        if kind == "diagonal":
            whitener = np.diag(part["whitener"][m].astype(np.float64))
        else:
            packed = part["whitener"] if kind == "shared" else part["whitener"][m]
            whitener = np.array([[packed[r * (r + 1) // 2 + c] if c <= r else 0.0 for c in range(n)] for r in range(n)])
        y = whitener @ (z - centre)
        constant = part["log_weights"][m] - n / 2 * np.log(2 * np.pi) + np.log(np.diag(whitener)).sum()
        terms.append(constant - 0.5 * (y @ y))
    rows = zip(part["offsets"][:-1], part["offsets"][1:], strict=True)
    return [float(np.log(np.sum(np.exp(np.array(terms[a:b]) - max(terms[a:b])))) + max(terms[a:b])) for a, b in rows]


def read_by_specification(path: Path) -> None:
    """Read a bundle as another program would, and reach the verdicts of its self-test."""
    manifest = json.loads((path / "bundle.json").read_bytes())
    for name, entry in manifest["files"].items():
        data = (path / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": sha256(data).hexdigest()}
    detector = tensors((path / "detector.safetensors").read_bytes())
    test = tensors((path / "selftest.safetensors").read_bytes())
    for i, (logits, features) in enumerate(zip(test["logits"], test["features"], strict=True)):
        expected = (2, -1)
        for g, described in enumerate(manifest["guards"]):
            part = {name.split(".")[2]: array for name, array in detector.items() if name.startswith(f"guards.{g}.")}
            rows = scores(part, described["kind"], features)
            np.testing.assert_allclose(rows, test[f"log_likelihoods.{g}"][i], rtol=1e-5, atol=1e-5)
            if described["target"] == np.argmax(logits):
                row = part["classes"].tolist().index(described["target"])
                others = [-np.inf if r == row else value for r, value in enumerate(rows)]
                best = int(np.argmax(others))
                expected = (0, -1) if others[best] - rows[row] < 0 else (1, int(part["classes"][best]))
        assert (int(test["decisions"][i]), int(test["sources"][i])) == expected


@pytest.mark.parametrize("kind", ["diagonal", "shared", "full"])
def test_a_reader_written_from_the_specification_reaches_the_same_verdicts(tmp_path: Path, kind: Kind) -> None:
    guards = (tiny_guard(3, kind), tiny_guard(1))
    read_by_specification(written(tmp_path / "tiny", guards=guards, self_test=tiny_self_test(guards)))
    rng = np.random.default_rng(7)
    random = random_guard(rng, kind, 4, [1, 3, 2, 1], 5)
    features = random_features(rng, random, 12)
    n_classes = int(random.classes[-1]) + 1
    log_likelihoods = Scorer(random, backend="reference").score_batch(features)
    best = log_likelihoods.argmax(axis=1)
    triggers = best != random.target_row
    self_test = SelfTest(
        frames=np.zeros((12, 2, 2, 1), np.uint8),
        logits=np.tile(np.eye(n_classes, dtype=np.float32)[random.target], (12, 1)),
        features=features,
        log_likelihoods=(log_likelihoods,),
        decisions=tuple("trigger" if trigger else "accept" for trigger in triggers),
        sources=np.where(triggers, random.classes[best], -1).astype(np.int32),
    )
    changes = {"guards": (random,), "self_test": self_test, "preprocess": Preprocess((1, 2, 2))}
    names = tuple(f"class {c}" for c in range(n_classes))
    read_by_specification(written(tmp_path / "random", class_names=names, **changes))


def test_specification_names_every_key_and_tensor(tmp_path: Path) -> None:
    path = written(tmp_path / "bundle", guards=tiny_bundle().guards)
    keys = json.loads((path / "bundle.json").read_text())
    specification = ARCHITECTURE.partition("## The bundle")[2].partition("\n## ")[0]
    named = set(re.findall(r"^\| `([\w.]+)` \|", specification, re.MULTILINE))
    stored = {re.sub(r"(guards|log_likelihoods)\.\d", r"\1.i", name) for file in ("detector", "selftest")
              for name in tensors((path / f"{file}.safetensors").read_bytes())}  # fmt: skip
    assert named == set(keys) | stored | {"precisions"}  # the key of bundles with more than one
