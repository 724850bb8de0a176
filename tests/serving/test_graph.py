from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
from bundles import CLASS_NAMES, tiny_bundle, tiny_guard, tiny_model
from guards import random_guard
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from inflight_edge import Bundle, Detector, Guard, ModelError
from inflight_edge.bundle import SelfTest
from inflight_edge.guard import FloatArray, Kind
from inflight_edge.serving.graph import OUTPUTS, with_verdict
from inflight_edge.verdict import Decision

DECISIONS = ("accept", "trigger", "unguarded", "invalid")


def run(model: bytes, inputs: FloatArray) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [name for name, _, _ in OUTPUTS]
    assert [output.name for output in session.get_outputs()] == names
    return dict(zip(names, session.run(names, {session.get_inputs()[0].name: inputs}), strict=True))


def compare(bundle: Bundle, inputs: FloatArray, model: bytes | None = None) -> None:
    """The graph says what the local detector says of the same logits and features."""
    got = run(model or with_verdict(bundle), inputs)
    detector = Detector(bundle, scorer="reference")
    logits, features = detector.engine.run(inputs)
    for i in range(len(inputs)):
        want = detector.score(features[i], logits[i])
        scale = 1e-4 * (1 + np.abs(want.log_likelihoods[np.isfinite(want.log_likelihoods)]).max(initial=0))
        if abs(want.margin) > scale or want.margin != want.margin:
            assert DECISIONS[got["decision"][i, 0]] == want.decision.value
            assert got["source"][i, 0] == (-1 if want.source is None else want.source)
        np.testing.assert_allclose(got["margin"][i, 0], want.margin, atol=scale, rtol=1e-4, equal_nan=True)
        rows = np.full(len(bundle.class_names), np.nan, np.float32)
        rows[want.classes] = want.log_likelihoods
        np.testing.assert_allclose(got["log_likelihoods"][i], rows, atol=scale, rtol=1e-4)
        if want.decision is not Decision.INVALID:
            assert got["predicted"][i, 0] == want.predicted


def frames(n: int, seed: int = 0) -> FloatArray:
    return np.random.default_rng(seed).random((n, 1, 2, 2), np.float32)


@pytest.mark.parametrize("kind", ["diagonal", "shared", "full"])
def test_verdicts_are_the_local_ones(kind: Kind) -> None:
    compare(tiny_bundle(guards=(tiny_guard(3, kind), tiny_guard(0, kind))), frames(200))


def mixture(target: int, kind: Kind, seed: int, classes: tuple[int, ...] = (0, 1, 2, 3)) -> Guard:
    """Random guard over the tiny network's four features; rows of 1 to 3 components."""
    counts = np.random.default_rng(seed).integers(1, 4, len(classes))
    rng = np.random.default_rng(seed)
    guard = random_guard(rng, kind, len(classes), counts.tolist(), 4)
    return replace(guard, classes=np.array(classes, np.int32), target=target)


def with_guards(*guards: Guard) -> Bundle:
    """A bundle with these guards; its self-test is not looked at here."""
    tiny = tiny_bundle()
    test = tiny.self_test
    rows = tuple(np.zeros((len(test.frames), len(guard.classes)), np.float32) for guard in guards)
    return tiny_bundle(
        guards=guards,
        self_test=SelfTest(test.frames, test.logits, test.features, rows, test.decisions, test.sources),
    )


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(["diagonal", "shared", "full"]),
    reach=st.sampled_from([1, 30, 1e4]),
)
def test_random_mixtures_score_as_the_reference(seed: int, kind: Kind, reach: float) -> None:
    bundle = with_guards(mixture(3, kind, seed), mixture(1, "diagonal", seed + 1, classes=(0, 1, 3)))
    rng = np.random.default_rng(seed)
    compare(bundle, (rng.standard_normal((32, 1, 2, 2)) * reach).astype(np.float32))


def test_far_components_do_not_underflow() -> None:
    """exp of every component is 0 in float32: without the maximum taken out, every row would be -inf."""
    bundle = with_guards(mixture(3, "diagonal", 5), mixture(0, "full", 6))
    inputs = np.full((2, 1, 2, 2), 400.0, np.float32)
    inputs[0, 0, 1, 1], inputs[1, 0, 0, 0] = 500.0, 500.0
    got = run(with_verdict(bundle), inputs)
    assert np.isfinite(got["log_likelihoods"]).all()
    assert got["log_likelihoods"].max() < -200
    compare(bundle, inputs)


def test_what_is_not_finite_is_invalid() -> None:
    bundle = tiny_bundle()
    inputs = frames(4)
    inputs[0, 0, 0, 0], inputs[1, 0, 1, 1], inputs[2, 0, 1, 0] = np.nan, np.inf, -np.inf
    got = run(with_verdict(bundle), inputs)
    assert got["decision"][:3, 0].tolist() == [3, 3, 3]
    assert got["predicted"][:3, 0].tolist() == [-1, -1, -1]
    assert np.isnan(got["margin"][:3]).all()
    assert np.isnan(got["log_likelihoods"][:3]).all()
    assert got["decision"][3, 0] != 3


def test_too_far_for_float32_is_invalid_not_accepted() -> None:
    bundle = tiny_bundle()
    inputs = np.zeros((1, 1, 2, 2), np.float32)
    inputs[0, 0, 1, 1] = 1e30
    assert run(with_verdict(bundle), inputs)["decision"][0, 0] == 3
    compare(bundle, inputs)


def test_a_tie_is_a_trigger() -> None:
    guard = tiny_guard(3)
    inputs = np.zeros((1, 1, 2, 2), np.float32)
    inputs[0, 0] = [[0.0, 0.0], [0.5, 0.75]]  # as far from west's mean (0, 0, 0, 1) as from south's
    means = guard.means.copy()
    means[2], means[3] = [0, 0, 0.5, 1.0], [0, 0, 0.5, 0.5]
    changed = replace(guard, means=means)
    got = run(with_verdict(tiny_bundle(guards=(changed, tiny_guard(0)))), inputs)
    assert (got["margin"][0, 0], got["decision"][0, 0], got["source"][0, 0]) == (0.0, 1, 2)


def test_fixed_batch_stays_fixed() -> None:
    bundle = tiny_bundle(model=tiny_model(batch=2))
    session = onnxruntime.InferenceSession(with_verdict(bundle), providers=["CPUExecutionProvider"])
    assert [output.shape[0] for output in session.get_outputs()] == [2] * len(OUTPUTS)


def test_old_operator_set_is_refused() -> None:
    bundle = tiny_bundle()
    from onnx import load_model_from_string

    model = load_model_from_string(bundle.model)
    del model.opset_import[:]
    model.opset_import.append(helper.make_opsetid("", 11))
    with pytest.raises(ModelError, match="expected operator set 13 or later, got 11"):
        with_verdict(tiny_bundle(model=model.SerializeToString()))


def test_outputs_declare_their_widths() -> None:
    session = onnxruntime.InferenceSession(with_verdict(tiny_bundle()), providers=["CPUExecutionProvider"])
    widths = {output.name: output.shape[1] for output in session.get_outputs()}
    assert widths == {name: width or len(CLASS_NAMES) for name, _, width in OUTPUTS}
    assert TensorProto.FLOAT == 1  # what Cast in the graph relies on is ONNX's own number
