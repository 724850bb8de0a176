"""The inspection finds the target it was not told, comes back from its file as it was, and trusts no other file."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks_for_tests import export
from numpy.typing import NDArray
from PIL import Image
from poisoned import N_CLASSES, PREPROCESS, SETTINGS, SIZE, TARGET, Poisoned
from safetensors import safe_open
from safetensors.numpy import save_file

from inflight_edge.calibration.datasets import ImageSet
from inflight_edge.calibration.finding import COARSE, COARSE_PAIR, Finding, Searcher, not_searched
from inflight_edge.calibration.inspection import Inspection, check_accuracy, inspect, read_inspection
from inflight_edge.calibration.inspection_file import encode
from inflight_edge.calibration.model import Classifier, classifier_from_program
from inflight_edge.calibration.reversal.decision import anomaly_indices, suspicious
from inflight_edge.calibration.reversal.estimates import AdditionEstimate, PatchEstimate
from inflight_edge.calibration.reversal.neural_cleanse import Settings
from inflight_edge.errors import DataError, ModelError, OptionError
from inflight_edge.preprocess import Preprocess

SHORT = Settings(steps=2)


def pair_patches(norms: NDArray[np.float64]) -> list[PatchEstimate]:
    """Patches that change nothing, of these norms (sources, targets)."""
    nothing = np.zeros((SIZE, SIZE), np.float32)
    return [
        PatchEstimate(t, nothing, nothing[None], norms[s, t], 0.0, (s,)) for s, t in permutations(range(len(norms)), 2)
    ]


def test_the_target_is_found_without_a_hint(inspection: Inspection, victim: Poisoned) -> None:
    assert inspection.suspects == (TARGET,)
    assert inspection.accuracy > 0.9
    estimate = inspection.estimates[TARGET]
    assert estimate.success > 0.95
    # The patch covers 4 pixels; whatever the search found must lie where they are.
    assert (
        estimate.mask[-2:, -2:].mean()
        > 5 * np.delete(estimate.mask.ravel(), np.flatnonzero(victim.trigger.mask)).mean()
    )
    assert [e.target for e in inspection.estimates] == list(range(N_CLASSES))
    np.testing.assert_allclose(inspection.indices, anomaly_indices(np.array([e.norm for e in inspection.estimates])))


def test_a_large_network_is_compared_coarsely_and_searched_at_length_where_named(
    classifier: Classifier, victim: Poisoned, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[tuple[list[int], int]] = []
    search = Searcher.patches

    def patches(
        self: Searcher, targets: list[int], sources: list[tuple[int, ...]], settings: Settings | None = None
    ) -> list[PatchEstimate]:
        lengths.append((targets, (settings or self.settings).steps))
        return search(self, targets, sources, settings)

    monkeypatch.setattr(Searcher, "patches", patches)
    of_pairs: list[Settings] = []
    alike = pair_patches(np.ones((N_CLASSES, N_CLASSES)))
    monkeypatch.setattr(Searcher, "pair_patches", lambda self: (of_pairs.append(self.quick), alike)[1])
    monkeypatch.setattr("inflight_edge.calibration.inspection.is_small", lambda classifier: False)
    monkeypatch.setattr("inflight_edge.calibration.inspection.has_bfloat16", lambda: False)
    found = inspect(
        classifier, victim.defence, PREPROCESS, settings=Settings(steps=220), method="neural-cleanse", progress=False
    )
    assert found.suspects == (TARGET,)
    assert lengths == [(list(range(N_CLASSES)), COARSE.steps), ([TARGET], 220)]
    assert of_pairs == [COARSE_PAIR]
    assert found.estimates[TARGET].success > 0.9

    # A search at length that gets nowhere takes no estimate's place.
    lost = np.full((SIZE, SIZE), 0.5, np.float32)
    monkeypatch.setattr(
        Searcher, "patches",
        lambda self, targets, sources, settings=None: [replace(e, mask=lost, norm=float(lost.size)) for e in found_at_length]
        if settings is None else list(found.estimates),
    )  # fmt: skip
    found_at_length = [found.estimates[TARGET]]
    again = inspect(
        classifier, victim.defence, PREPROCESS, settings=Settings(steps=220), method="neural-cleanse", progress=False
    )
    assert again.suspects == (TARGET,)
    assert again.estimates[TARGET] is found.estimates[TARGET]


def test_an_inspection_depends_on_the_seed_alone(classifier: Classifier, victim: Poisoned) -> None:
    settings = Settings(steps=12)
    one, two, other = (
        inspect(classifier, victim.defence, PREPROCESS, settings=settings, seed=seed, progress=False)
        for seed in (0, 0, 5)
    )
    for a, b, c in zip(one.estimates, two.estimates, other.estimates, strict=True):
        np.testing.assert_array_equal(a.mask, b.mask)
        np.testing.assert_array_equal(a.pattern, b.pattern)
        assert not np.array_equal(a.mask, c.mask)


def told(success: float, target: int, sources: tuple[int, ...]) -> PatchEstimate:
    mask = np.full((SIZE, SIZE), 0.01, np.float32)
    return PatchEstimate(target, mask, np.zeros(PREPROCESS.input_shape, np.float32), 0.36, success, sources)


@pytest.mark.parametrize(("success", "sources"), [(0.9, (4,)), (0.5, None)])
def test_a_told_target_that_hides_gets_the_patch_of_its_likeliest_source(
    classifier: Classifier,
    victim: Poisoned,
    monkeypatch: pytest.MonkeyPatch,
    success: float,
    sources: tuple[int, ...] | None,
) -> None:
    """The pair 4 to 1 needs a patch a tenth of the others', which no search over all sources shows."""
    norms = np.full((N_CLASSES, N_CLASSES), 20.0)
    norms[4, 1] = 2.0
    pooled = Searcher.patches

    def patches(self: Searcher, targets: list[int], by: list[tuple[int, ...]], *rest: Any) -> list[PatchEstimate]:
        if targets == [1]:
            return [told(success, 1, by[0])]
        return [replace(e, norm=20.0) for e in pooled(self, targets, by, *rest)]

    monkeypatch.setattr(Searcher, "pair_patches", lambda self: pair_patches(norms))
    monkeypatch.setattr(Searcher, "single_patches", lambda self, norms: [])
    monkeypatch.setattr(Searcher, "patches", patches)
    found = inspect(
        classifier,
        victim.defence,
        PREPROCESS,
        settings=SHORT,
        method="neural-cleanse",
        targets=[1, 2, 1],
        progress=False,
    )
    assert found.suspects == (1, 2)
    assert found.findings == ()
    everyone = tuple(c for c in range(N_CLASSES) if c != 1)
    assert found.estimates[1].sources == (sources or everyone)


def test_a_told_target_is_a_class(classifier: Classifier, victim: Poisoned) -> None:
    with pytest.raises(
        OptionError, match=f"targets: expected class indices from 0 to {N_CLASSES - 1}, got {N_CLASSES}"
    ):
        inspect(classifier, victim.defence, PREPROCESS, settings=SHORT, targets=[N_CLASSES], progress=False)


@pytest.mark.parametrize(
    ("norms", "expected"),
    [
        ([10.0, 10.5, 9.5, 10.2, 2.0], [0, 0, 0, 0, 1]),
        ([10.0, 10.5, 9.5, 10.2, 90.0], [0, 0, 0, 0, 0]),  # large is not suspicious
        ([10.0, 10.1, 9.9, 10.0, 8.0], [0, 0, 0, 0, 0]),  # an outlier, but not small
        ([5.0, 5.0, 5.0, 5.0], [0, 0, 0, 0]),
        ([5.0, 5.0, 5.0, 1.0], [0, 0, 0, 1]),
        ([20.0, 21.0, 19.0, 20.0, 3.0, 22.0, 2.5, 18.0], [0, 0, 0, 0, 1, 0, 1, 0]),  # two targets
        ([36.6, 62.2, 151.7], [1, 0, 0]),  # of three classes no index is ever high
        ([44.4, 68.0, 282.5], [0, 0, 0]),
        ([700.0, 100.0], [0, 1]),
        ([35.0, 20.0], [0, 0]),
    ],
)
def test_small_masks_are_suspicious(norms: list[float], expected: list[int]) -> None:
    assert suspicious(np.array(norms)).tolist() == [bool(e) for e in expected]


def test_rows_are_ranked(inspection: Inspection) -> None:
    rows = inspection.rows()
    assert rows[0]["class"] == TARGET
    assert rows[0]["suspect"] is True
    assert sum(row["suspect"] for row in rows) == 1
    assert sorted(row["class"] for row in rows) == list(range(N_CLASSES))
    indices = [row["anomaly_index"] for row in rows]
    assert indices == sorted(indices, reverse=True)
    names = tuple("abcdefg")
    assert replace(inspection, class_names=names).rows()[0]["name"] == names[TARGET]
    infinite = replace(inspection, indices=np.array([0, 0, 0, np.inf, 0, 0, 0]))
    json.dumps(infinite.rows(), allow_nan=False)
    assert infinite.rows()[0]["anomaly_index"] is None


def same(one: Inspection, two: Inspection) -> None:
    for name in ("suspects", "accuracy", "preprocess", "feature_layer", "class_names"):
        assert getattr(one, name) == getattr(two, name)
    np.testing.assert_allclose(one.indices, two.indices, rtol=1e-5)
    for a, b in zip(one.estimates, two.estimates, strict=True):
        assert isinstance(a, PatchEstimate)
        assert isinstance(b, PatchEstimate)
        np.testing.assert_array_equal(a.mask, b.mask)
        np.testing.assert_array_equal(a.pattern, b.pattern)
        assert (a.target, a.kind, a.norm, a.success, a.sources) == (b.target, b.kind, b.norm, b.success, b.sources)
    assert [(f.target, f.method) for f in one.findings] == [(f.target, f.method) for f in two.findings]


def test_a_saved_inspection_comes_back(inspection: Inspection, tmp_path: Path) -> None:
    path = inspection.save(tmp_path / "new" / "folder")
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode  # whoever may read this, may read that
    assert path == tmp_path / "new" / "folder" / "patterns.safetensors"
    same(read_inspection(path), inspection)
    named = replace(
        inspection,
        class_names=tuple("abcdefg"),
        feature_layer="hidden",
        suspects=(2, 4),
        preprocess=Preprocess((1, 12, 12), 1.0),
    )
    same(read_inspection(str(named.save(tmp_path / "new" / "folder"))), named)  # saved over the first


def test_pictures_and_report(inspection: Inspection, tmp_path: Path) -> None:
    replace(inspection, suspects=(TARGET - 1,)).save(tmp_path)  # an earlier one, whose pictures go
    (tmp_path / "class-dog-mask.png").write_bytes(b"of somebody else")
    inspection.save(tmp_path)
    (tmp_path / "class-dog-mask.png").unlink()
    report = json.loads((tmp_path / "inspection.json").read_text())
    assert report == {"suspects": [TARGET], "accuracy": inspection.accuracy, "classes": inspection.rows()}
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"class-{TARGET}-mask.png", f"class-{TARGET}-pattern.png", "inspection.json", "patterns.safetensors",
    ]  # fmt: skip
    factor = -(-256 // SIZE)
    with Image.open(tmp_path / f"class-{TARGET}-mask.png") as image:
        pixels = np.asarray(image)
    mask = np.rint(inspection.estimates[TARGET].mask * 255)
    np.testing.assert_array_equal(pixels, np.kron(mask, np.ones((factor, factor))))
    with Image.open(tmp_path / f"class-{TARGET}-pattern.png") as image:
        assert image.size == (SIZE * factor, SIZE * factor)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "L"), (3, "RGB"), (4, "RGB")])
def test_pictures_of_any_number_of_channels(inspection: Inspection, tmp_path: Path, channels: int, mode: str) -> None:
    wide = [replace(e, pattern=np.repeat(e.pattern, channels, axis=0)) for e in inspection.estimates]
    preprocess = Preprocess((channels, SIZE, SIZE))
    # Without a suspect the pictures show the class that is ranked first.
    replace(inspection, estimates=tuple(wide), suspects=(), preprocess=preprocess).save(tmp_path)
    with Image.open(tmp_path / f"class-{TARGET}-pattern.png") as image:
        assert image.mode == mode
    same(read_inspection(tmp_path / "patterns.safetensors"), read_inspection(tmp_path / "patterns.safetensors"))
    assert read_inspection(tmp_path / "patterns.safetensors").suspects == ()


# --- data that cannot be right


def test_accuracy_near_chance_is_refused(classifier: Classifier, victim: Poisoned) -> None:
    wrong = Preprocess((1, SIZE, SIZE), 1 / 255 / 1000, (0.5,), (0.5,))
    with pytest.raises(
        DataError, match=r"^here: the model gets only \d+\.\d% of these images right \(chance: 14\.3%\); "
    ) as e:
        inspect(classifier, replace(victim.defence, origin="here"), wrong, settings=SHORT, progress=False)
    for hint in ("--scale", "--mean", "--std", "3.92157e-06", "(0.5,)", "the class order"):
        assert hint in str(e.value)
    shuffled = ImageSet(victim.defence.images, (victim.defence.labels + 1) % N_CLASSES, None, "here")
    with pytest.raises(DataError, match=r"^here: the model gets only .* the class order$"):
        inspect(classifier, shuffled, PREPROCESS, settings=SHORT, progress=False)


def test_accuracy_near_chance_tells_the_class_order(classifier: Classifier, victim: Poisoned) -> None:
    """Folders are classes in alphabetical order, which is not everyone's."""
    rng = np.random.default_rng(0)
    mixed = ImageSet(victim.defence.images, rng.permutation(victim.defence.labels), tuple("abcdefg"), "here")
    with pytest.raises(DataError, match=r"and the class order \(0 = a, 1 = b, 2 = c, 3 = d, \.\.\.\)$"):
        inspect(classifier, mixed, PREPROCESS, settings=SHORT, progress=False)


def test_limit_of_the_accuracy() -> None:
    """A fifth of the way from chance to perfect: .2 + .16 for five classes."""

    class Fixed:
        n_classes, n_features = 5, 1

        def __init__(self, n_right: int) -> None:
            self.n_right = n_right

        def __call__(self, images: Any) -> Any:
            right = torch.arange(100) < self.n_right
            classes = torch.where(right, torch.zeros(100).long(), torch.ones(100).long())
            return 2.0 * torch.nn.functional.one_hot(classes, 5), torch.zeros(100, 1)

    data = ImageSet(np.zeros((100, 2, 2), np.uint8), np.zeros(100, np.int64), None, "here")
    pixels, preprocess = np.zeros((100, 1, 2, 2), np.float32), Preprocess((1, 2, 2))
    assert check_accuracy(Fixed(37), pixels, data, preprocess) == 0.37  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"the model gets only 35.0% of these images right \(chance: 20.0%\)"):
        check_accuracy(Fixed(35), pixels, data, preprocess)  # type: ignore[arg-type]


def test_classes_that_have_changed_places(classifier: Classifier, victim: Poisoned) -> None:
    places = np.arange(N_CLASSES)
    places[[0, 2]] = 2, 0
    changed = ImageSet(victim.defence.images, places[victim.defence.labels], tuple("abcdefg"), "here")
    message = r"^here: expected labels .* takes most images of class 0 \(a\) for 2 \(c\), 2 \(c\) for 0 \(a\); correct"
    with pytest.raises(DataError, match=message):
        inspect(classifier, changed, PREPROCESS, settings=SHORT, progress=False)


def test_a_class_that_the_model_does_not_know_is_no_change_of_places() -> None:
    class Fixed:
        n_classes, n_features = 4, 1

        def __call__(self, images: Any) -> Any:
            return 2.0 * torch.nn.functional.one_hot(torch.tensor([0, 0, 2, 2, 2, 2, 3, 3]), 4), torch.zeros(8, 1)

    data = ImageSet(np.zeros((8, 2, 2), np.uint8), np.repeat(np.arange(4), 2), None, "here")
    pixels, preprocess = np.zeros((8, 1, 2, 2), np.float32), Preprocess((1, 2, 2))
    assert check_accuracy(Fixed(), pixels, data, preprocess) == 0.75  # type: ignore[arg-type]


def test_logits_that_are_not_finite(classifier: Classifier, victim: Poisoned) -> None:
    huge = Preprocess((1, SIZE, SIZE), 1e36, (0.5,), (0.5,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DataError, match="the model's logits are not finite; check --scale, --mean and --std"):
            inspect(classifier, victim.defence, huge, settings=SHORT, progress=False)


@pytest.mark.parametrize("squash", [torch.sigmoid, lambda z: z.softmax(1), lambda z: (8 * z).softmax(1)])
def test_probabilities_are_no_logits(
    classifier: Classifier, victim: Poisoned, squash: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """A softmax that closes the model is taken off; what lies behind other steps is seen in the numbers alone."""

    class Squashed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = classifier.graph

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return squash(self.inner(images)[0]).clamp(0, 1)

    program = export(Squashed(), torch.zeros(2, 1, SIZE, SIZE), free={0: "batch"})
    with pytest.raises(
        ModelError, match=r"^model: expected logits, got nothing but numbers from 0 to 1, which are prob"
    ):
        inspect(
            classifier_from_program(program, image_shape=(1, SIZE, SIZE)),
            victim.defence,
            PREPROCESS,
            settings=SHORT,
            progress=False,
        )


def test_every_class_must_be_there(classifier: Classifier, victim: Poisoned) -> None:
    few = victim.defence.subset(victim.defence.labels != 4)
    with pytest.raises(DataError, match="class 4 has 0 images, expected at least 3 of each of the model's 7 classes"):
        inspect(classifier, few, PREPROCESS, settings=SHORT, progress=False)


# --- files that are no inspection


@pytest.fixture
def forge(inspection: Inspection, tmp_path: Path) -> Callable[..., Path]:
    """A saved inspection with parts of its header and tensors replaced; None removes a tensor."""
    source = inspection.save(tmp_path / "source")
    with safe_open(source, framework="numpy") as file:
        header = json.loads(file.metadata()["inspection"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def make(header_text: str | None = None, changes: dict[str, Any] | None = None, **arrays: Any) -> Path:
        path = tmp_path / "patterns.safetensors"
        changed = {name: np.ascontiguousarray(a) for name, a in {**tensors, **arrays}.items() if a is not None}
        text = json.dumps({**header, **(changes or {})}) if header_text is None else header_text
        save_file(changed, path, metadata={"inspection": text} if text else None)
        return path

    return make


def test_forging_nothing_is_read(forge: Callable[..., Path], inspection: Inspection) -> None:
    same(read_inspection(forge()), inspection)


HEADERS: dict[str, tuple[str | dict[str, Any], str]] = {
    "none": ("", "not an inspection of version 3; run `inflight-edge inspect` again"),
    "list": ("[]", "not an inspection of version 3"),
    "no JSON": ("{", r"not a readable inspection \(.*\); run `inflight-edge inspect` again"),
    "version": ({"version": 2}, "not an inspection of version 3"),
    "format": ({"format": "another"}, "not an inspection of version 3"),
    "unknown suspect": ({"suspects": [N_CLASSES]}, "suspects or class names do not fit 7 classes"),
    "negative suspect": ({"suspects": [-1]}, "suspects or class names do not fit 7 classes"),
    "suspect by name": ({"suspects": ["three"]}, "not a readable inspection"),
    "no suspects": ({"suspects": None}, "not a readable inspection"),
    "endless suspect": ({"suspects": [float("inf")]}, r"not a readable inspection \(cannot convert float infinity"),
    "broken size": ({"input_shape": [1.0, 12, 12]}, r"not a readable inspection \(input_shape: expected whole numbers"),
    "name that no bundle takes": (
        {"class_names": [*"abcdef", "g\u200b"]},
        "expected class names of printable characters",
    ),
    "too few names": ({"class_names": ["a", "b"]}, "suspects or class names do not fit 7 classes"),
    "names": ({"class_names": 5}, "not a readable inspection"),
    "two sizes": ({"input_shape": [12, 12]}, r"not a readable inspection \(input shape: expected"),
    "other size": ({"input_shape": [1, 12, 13]}, r"mask.0: expected finite numbers of shape \(12, 13\), got shape"),
    "more channels": ({"input_shape": [3, 12, 12]}, r"pattern.0: expected finite numbers of shape \(3, 12, 12\)"),
    "scale": ({"scale": 0}, r"not a readable inspection \(scale: expected a number > 0"),
    "text as scale": ({"scale": "1/255"}, "not a readable inspection"),
    "std": ({"std": [0.0]}, r"not a readable inspection \(std: expected numbers > 0"),
    "mean": (
        {"mean": [0.1, 0.2]},
        r"not a readable inspection \(mean: expected one number, or one for each of 1 channels",
    ),
    "accuracy": ({"accuracy": "high"}, "not a readable inspection"),
    "layer": ({"feature_layer": 5}, r"not a readable inspection \(class names and feature layer: expected text\)"),
    "numbers as names": ({"class_names": [1] * 7}, r"not a readable inspection \(class names and feature layer: "),
}


@pytest.mark.parametrize("case", HEADERS)
def test_hostile_header(forge: Callable[..., Path], case: str) -> None:
    change, message = HEADERS[case]
    path = forge(change) if isinstance(change, str) else forge(changes=change)
    with pytest.raises(DataError, match=f"^{path}: {message}"):
        read_inspection(path)


def test_missing_key_in_the_header(forge: Callable[..., Path]) -> None:
    path = forge(json.dumps({"format": "inflight-edge-inspection", "version": 3}))
    with pytest.raises(DataError, match=rf"^{path}: not a readable inspection \('input_shape'\)"):
        read_inspection(path)


@pytest.mark.parametrize("name", ["mask.3", "pattern.3"])
@pytest.mark.parametrize("harm", ["missing", "NaN", "infinite", "flat"])
def test_hostile_tensors(forge: Callable[..., Path], name: str, harm: str) -> None:
    bad = np.full((12, 12) if name == "mask.3" else (1, 12, 12), 0.5, np.float32)
    bad.flat[3] = np.nan if harm == "NaN" else np.inf
    array = {"missing": None, "NaN": bad, "infinite": bad, "flat": bad[..., :1] * 0}[harm]
    path = forge(**{name: array})
    with pytest.raises(DataError, match=rf"^{path}: (not a readable inspection|{name}: expected finite numbers of)"):
        read_inspection(path)


def test_a_tensor_that_no_class_calls_for(forge: Callable[..., Path]) -> None:
    path = forge(**{"perturbation.3": np.zeros((1, 12, 12), np.float32)})
    with pytest.raises(DataError, match=r"missing or unknown tensors: perturbation\.3"):
        read_inspection(path)


VALUES: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "mask above 1": ("mask.2", lambda a: a * 50 + 2, "expected float32 from 0 to 1, got float32 from"),
    "pattern below 0": ("pattern.2", lambda a: a - 2, "expected float32 from 0 to 1, got float32 from -"),
    "double masks": ("mask.2", lambda a: a.astype(np.float64), "expected float32 from 0 to 1, got float64 from"),
}


@pytest.mark.parametrize("case", VALUES)
def test_values_that_no_inspection_writes(forge: Callable[..., Path], tmp_path: Path, case: str) -> None:
    name, change, message = VALUES[case]
    with safe_open(tmp_path / "source" / "patterns.safetensors", framework="numpy") as file:
        array = file.get_tensor(name)
    path = forge(**{name: change(array)})
    with pytest.raises(DataError, match=rf"^{path}: {name}: {message}.*; run `inflight-edge inspect` again"):
        read_inspection(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "blend"}, "kind: expected patch or addition, got 'blend'"),
        ({"norm": -1.0}, "expected norm > 0 and success in 0..1"),
        ({"success": 1.5}, "expected norm > 0 and success in 0..1"),
        ({"sources": [0]}, "sources: expected other classes"),
        ({"sources": [7]}, "sources: expected other classes"),
        ({"sources": []}, "sources: expected other classes"),
        ({"more": 1}, "missing or unknown keys"),
    ],
)
def test_hostile_class_records(
    forge: Callable[..., Path], inspection: Inspection, change: dict[str, Any], message: str
) -> None:
    records = [
        {"kind": e.kind, "norm": e.norm, "success": e.success, "sources": list(e.sources), "anomaly_index": None}
        for e in inspection.estimates
    ]
    records[0] |= change
    with pytest.raises(DataError, match=rf"not a readable inspection \(class 0: {message}"):
        read_inspection(forge(changes={"classes": records}))


@pytest.mark.parametrize("value", ["high", True, [1.0]])
def test_an_anomaly_index_that_is_no_number(forge: Callable[..., Path], inspection: Inspection, value: object) -> None:
    records = encode(inspection)[0]["classes"]
    records[2]["anomaly_index"] = value
    with pytest.raises(DataError, match=r"not a readable inspection \(anomaly_index: expected a number or null, got "):
        read_inspection(forge(changes={"classes": records}))


@pytest.mark.parametrize("target", [-1, N_CLASSES])
def test_a_finding_of_an_unknown_class(forge: Callable[..., Path], target: int) -> None:
    findings = [{"target": target, "method": "neural-cleanse", "score": 3.0}]
    with pytest.raises(DataError, match=r"not a readable inspection \(findings"):
        read_inspection(forge(changes={"findings": findings}))


def test_a_finding_by_an_unknown_method(forge: Callable[..., Path]) -> None:
    findings = [{"target": TARGET, "method": "guess", "score": 1.0}]
    with pytest.raises(DataError, match=r"not a readable inspection \(findings"):
        read_inspection(forge(changes={"findings": findings}))


def test_an_addition_comes_back(inspection: Inspection, tmp_path: Path) -> None:
    values = np.linspace(-1, 1, 144, dtype=np.float32).reshape(1, 12, 12)
    addition = AdditionEstimate(TARGET, values, 2.5, 0.75, (0, 2))
    estimates = tuple(addition if e.target == TARGET else e for e in inspection.estimates)
    path = replace(inspection, estimates=estimates).save(tmp_path)
    got = read_inspection(path).estimates[TARGET]
    assert isinstance(got, AdditionEstimate)
    np.testing.assert_array_equal(got.perturbation, values)
    assert (got.norm, got.success, got.sources) == (2.5, 0.75, (0, 2))


def test_damaged_and_missing_files(inspection: Inspection, tmp_path: Path) -> None:
    missing = tmp_path / "nope.safetensors"
    with pytest.raises(
        DataError, match=rf"^{missing}: no such file; expected the patterns.safetensors that `inflight-"
    ):
        read_inspection(missing)
    with pytest.raises(DataError, match=rf"^{tmp_path}: no such file"):
        read_inspection(tmp_path)
    whole = inspection.save(tmp_path).read_bytes()
    path = tmp_path / "cut.safetensors"
    for data in (b"", b"text", whole[:7], whole[:200], whole[:-1], whole + b"x", b"\xff" * 8 + whole[8:]):
        path.write_bytes(data)
        with pytest.raises(DataError, match=rf"^{path}: not a readable inspection \(.*\); run `inflight-edge inspect`"):
            read_inspection(path)


def test_settings_reach_the_search(classifier: Classifier, victim: Poisoned) -> None:
    one = inspect(classifier, victim.defence, PREPROCESS, settings=SHORT, feature_layer="hidden", progress=False)
    assert one.feature_layer == "hidden"
    assert max(e.success for e in one.estimates) < min(0.9, SETTINGS.success)
    assert one.suspects == ()


def test_the_anomaly_index_is_that_of_the_masks_whatever_pattern_is_kept(
    classifier: Classifier, victim: Poisoned, monkeypatch: pytest.MonkeyPatch
) -> None:
    addition = AdditionEstimate(1, np.full(PREPROCESS.input_shape, 0.1, np.float32), 1.2, 0.9, (0,))
    found_by_additions = [(Finding(1, "perturbation", 0.01), addition)]
    pooled = [told(0.1, t, tuple(c for c in range(N_CLASSES) if c != t)) for t in range(N_CLASSES)]
    pooled = [replace(e, norm=20.0 + e.target) for e in pooled]
    monkeypatch.setattr(Searcher, "patches", lambda self, targets, *rest: [pooled[t] for t in targets])
    monkeypatch.setattr(Searcher, "pair_patches", lambda self: pair_patches(np.full((N_CLASSES, N_CLASSES), 20.0)))
    monkeypatch.setattr(Searcher, "addition_norms", lambda self: np.ones((N_CLASSES, N_CLASSES)))
    monkeypatch.setattr(Searcher, "perturbations", lambda self, norms: found_by_additions)
    found = inspect(classifier, victim.defence, PREPROCESS, settings=SHORT, progress=False)
    assert found.suspects == (1,)
    assert found.estimates[1] is addition
    np.testing.assert_allclose(found.indices, anomaly_indices(np.array([e.norm for e in pooled])))
    row = found.rows()[0]
    assert (row["class"], row["kind"], row["sources"]) == (1, "addition", [0])
    assert {r["sources"] for r in found.rows()[1:]} == {"all"}


def test_without_masks_there_is_no_anomaly_index(
    classifier: Classifier, victim: Poisoned, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Searcher, "addition_norms", lambda self: np.ones((N_CLASSES, N_CLASSES)))
    monkeypatch.setattr(Searcher, "perturbations", lambda self, norms: [])
    found = inspect(classifier, victim.defence, PREPROCESS, settings=SHORT, method="perturbation", progress=False)
    assert {row["anomaly_index"] for row in found.rows()} == {None}
    assert np.isnan(read_inspection(found.save(tmp_path)).indices).all()


def test_all_searches_use_one_tensor_of_images(classifier: Classifier, victim: Poisoned) -> None:
    """A copy for each would take as much memory as there are classes, or pairs of them."""
    labels = victim.defence.labels
    pixels = victim.defence.pixels(PREPROCESS)

    def logits(images: torch.Tensor) -> torch.Tensor:
        return classifier(images)[0]

    case = Searcher(logits, logits, pixels, labels, N_CLASSES, SHORT, 0, False)
    one, two = case.search(0, case.others(0)), case.search(1, (0,))
    assert one.images is two.images is case.images
    assert set(labels[one.used]) == set(case.others(0))
    assert set(labels[two.used]) == {0}
    assert not case.held_out[torch.cat([one.used, two.used])].any()


@pytest.mark.parametrize("n_classes", [2, 21])
def test_what_is_not_searched_is_said(n_classes: int) -> None:
    assert not_searched("auto", n_classes) == ("patches of single-class and all-to-all attacks", "additions")
    assert not_searched("neural-cleanse", n_classes) == ("patches of single-class and all-to-all attacks",)
    assert not_searched("auto", 3) == not_searched("auto", 20) == ()
    classifier = two_level(n_classes)
    data = ImageSet(np.zeros((3 * n_classes, 4, 4), np.uint8), np.repeat(np.arange(n_classes), 3), None, "here")
    message = (
        rf"^method: perturbation names a class among 3 to 20, the model has {n_classes}; use neural-cleanse, or name"
    )
    with pytest.raises(OptionError, match=message):
        inspect(classifier, data, Preprocess((1, 4, 4)), method="perturbation", progress=False)


def two_level(n_classes: int, change: Callable[[torch.Tensor], torch.Tensor] = lambda x: x) -> Classifier:
    """The mean of the image, through ``change``, decides the class."""

    class Level(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(1, n_classes)
            with torch.no_grad():
                centres = torch.linspace(0, 1, n_classes)
                self.head.weight.copy_(2 * centres[:, None])
                self.head.bias.copy_(-(centres**2))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.head(change(images.mean((2, 3))))

    return classifier_from_program(
        export(Level(), torch.zeros(2, 1, 4, 4), free={0: "batch"}), image_shape=(1, 4, 4), feature_layer="penultimate"
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [(torch.round, "is zero"), (lambda x: x.detach(), "cannot be had: "), (lambda x: x.clamp(-1, 1), "")],
)
def test_a_classifier_without_a_gradient_is_refused(
    change: Callable[[torch.Tensor], torch.Tensor], reason: str
) -> None:
    """Nothing would be found in it, whatever is there."""
    images = np.repeat(np.uint8([10, 245]), 3)[:, None, None] * np.ones((1, 4, 4), np.uint8)
    data = ImageSet(images, np.repeat([0, 1], 3), None, "here")
    classifier = two_level(2, change)
    if not reason:
        assert inspect(classifier, data, Preprocess((1, 4, 4)), settings=SHORT, progress=False).accuracy == 1.0
        return
    with pytest.raises(
        ModelError, match=rf"^model: the gradient of its logits by the image {reason}.*; export it without"
    ):
        inspect(classifier, data, Preprocess((1, 4, 4)), settings=SHORT, progress=False)


def test_an_unknown_method_is_refused(classifier: Classifier, victim: Poisoned) -> None:
    with pytest.raises(OptionError, match=r"^method: expected one of auto, neural-cleanse, perturbation, got 'guess'"):
        inspect(classifier, victim.defence, PREPROCESS, method="guess", progress=False)


def test_the_perturbation_search_alone_gives_additions(classifier: Classifier, victim: Poisoned) -> None:
    found = inspect(classifier, victim.defence, PREPROCESS, method="perturbation", progress=False)
    assert {estimate.kind for estimate in found.estimates} == {"addition"}
    assert found.estimates[TARGET].norm == min(estimate.norm for estimate in found.estimates)
    assert found.estimates[TARGET].success > 0.6


@pytest.mark.parametrize(("success", "suspects"), [(0.6, (TARGET,)), (0.4, ())])
def test_an_addition_that_fails_on_held_out_images_names_nothing(
    classifier: Classifier, victim: Poisoned, monkeypatch: pytest.MonkeyPatch, success: float, suspects: tuple[int, ...]
) -> None:
    """The p-value alone is small here: of few images an addition may fit these alone."""
    norms = np.random.default_rng(0).uniform(9.0, 11.0, (N_CLASSES, N_CLASSES))
    norms[0, TARGET] = 0.5
    values = np.zeros(PREPROCESS.input_shape, np.float32)

    def addition_to(self: Searcher, target: int, norms: object) -> AdditionEstimate:
        return AdditionEstimate(target, values, 0.5, success, (0,))

    monkeypatch.setattr(Searcher, "addition_norms", lambda self: norms.copy())
    monkeypatch.setattr(Searcher, "addition_to", addition_to)
    found = inspect(classifier, victim.defence, PREPROCESS, method="perturbation", progress=False)
    assert found.suspects == suspects
    assert [finding.method for finding in found.findings] == ["perturbation"] * len(suspects)


@pytest.mark.parametrize(
    ("size", "kind", "method"), [(0.01, "addition", "one-way perturbation"), (1.0, "patch", "neural-cleanse")]
)
def test_of_a_class_that_two_searches_name_the_smaller_kind_is_kept(
    classifier: Classifier, victim: Poisoned, monkeypatch: pytest.MonkeyPatch, size: float, kind: str, method: str
) -> None:
    """The mask of the target is a tenth of the median one, the addition to it ``size`` of the median one."""
    nothing = np.zeros((SIZE, SIZE), np.float32)

    def patches(
        self: Searcher, targets: list[int], sources: list[tuple[int, ...]], settings: Settings | None = None
    ) -> list[PatchEstimate]:
        return [
            PatchEstimate(t, nothing, nothing[None], 1.0 if t == TARGET else 10.0, 0.9, s)
            for t, s in zip(targets, sources, strict=True)
        ]

    addition = AdditionEstimate(TARGET, np.zeros(PREPROCESS.input_shape, np.float32), 0.5, 0.9, (0,))
    norms = np.ones((N_CLASSES, N_CLASSES))
    norms[:, TARGET] = size
    monkeypatch.setattr(Searcher, "patches", patches)
    monkeypatch.setattr(Searcher, "addition_norms", lambda self: norms.copy())
    monkeypatch.setattr(
        Searcher, "perturbations", lambda self, norms: [(Finding(TARGET, "one-way perturbation", 0.2), addition)]
    )
    monkeypatch.setattr(Searcher, "pair_patches", lambda self: pair_patches(np.ones((N_CLASSES, N_CLASSES))))
    everyone = tuple(c for c in range(N_CLASSES) if c != TARGET)
    pooled = [replace(addition, sources=everyone)]
    monkeypatch.setattr(Searcher, "additions", lambda self, targets, sources, settings: pooled)
    found = inspect(classifier, victim.defence, PREPROCESS, settings=SETTINGS, progress=False)
    assert found.suspects == (TARGET,)
    assert (found.estimates[TARGET].kind, found.findings[0].method) == (kind, method)
    assert found.estimates[TARGET].sources == everyone  # as the mask's, not the one that the addition came from
    pooled[0] = replace(addition, sources=everyone, success=0.7)
    again = inspect(classifier, victim.defence, PREPROCESS, settings=SETTINGS, progress=False)
    assert again.estimates[TARGET].sources == ((0,) if kind == "addition" else everyone)
