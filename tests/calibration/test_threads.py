"""The number of threads is what was asked for inside, and what it was outside."""

from __future__ import annotations

import pytest
import torch

from inflight_edge.calibration import threads
from inflight_edge.calibration.model import Classifier
from inflight_edge.calibration.threads import has_bfloat16, one_thread_if_small, torch_threads


@pytest.fixture(autouse=True)
def _two_threads() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("count", "inside"), [(1, 1), (3, 3), (None, 2)])
def test_threads_come_back(count: int | None, inside: int) -> None:
    with torch_threads(count):
        assert torch.get_num_threads() == inside
    assert torch.get_num_threads() == 2
    with pytest.raises(RuntimeError, match="stop"), torch_threads(count):
        raise RuntimeError("stop")
    assert torch.get_num_threads() == 2


def test_only_small_classifiers_get_one_thread(classifier: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    with one_thread_if_small(classifier):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    # 36 * 8 * 9 + 9 * 16 * 8 * 9 + 144 * 24 + 24 * 7 multiplications an image, 2 operations each.
    flops = 64 * 2 * (36 * 8 * 9 + 9 * 16 * 8 * 9 + 144 * 24 + 24 * 7)
    for limit, inside in ((flops, 2), (flops + 1, 1)):
        monkeypatch.setattr(threads, "SMALL_BATCH_FLOPS", limit)
        with one_thread_if_small(classifier):
            assert torch.get_num_threads() == inside


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"architecture": "x86_64", "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"architecture": "x86_64", "avx512_f": True, "avx512_bf16": True, "amx_bf16": False}, True),
        ({"architecture": "aarch64", "neon": True, "bf16": True}, True),
        ({"architecture": "aarch64", "neon": True}, False),
    ],
)
def test_bfloat16_is_what_the_processor_computes_in(
    capabilities: dict[str, object], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(has_bfloat16(), bool)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert has_bfloat16() is expected
