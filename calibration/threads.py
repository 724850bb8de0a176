"""How torch uses the processor: small networks lose more by waiting on threads than they gain, and bfloat16 that the
processor does not compute in is slower than float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils.flop_counter import FlopCounterMode

from inflight_edge.calibration.model import Classifier

__all__ = ["has_bfloat16", "is_small", "one_thread_if_small", "torch_threads"]

# Below this, a batch of 64 takes a few milliseconds on one core.  On a busy two-core machine two threads made such a
# step 20 times slower (2.4 against 52 ms), on an idle one hardly faster.
SMALL_BATCH_FLOPS = 2_000_000_000


def has_bfloat16() -> bool:
    """Whether the processor computes in bfloat16.  Emulated, a step of ResNet-18 took 12 times as long as in float32."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # the last is Arm's


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Run with ``count`` torch threads (None: as they are), then restore the former number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def is_small(classifier: Classifier) -> bool:
    """Whether the classifier is so small that one thread is best.

    Decided by counting operations, not by a clock, so that results repeat bit by bit on the same machine.
    """
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        classifier(torch.zeros(classifier.fixed_batch or 1, *classifier.input_shape))
    return bool(64 * counter.get_total_flops() / (classifier.fixed_batch or 1) < SMALL_BATCH_FLOPS)


@contextmanager
def one_thread_if_small(classifier: Classifier) -> Iterator[None]:
    """One torch thread for a small classifier, all of them for a large one."""
    with torch_threads(1 if is_small(classifier) else None):
        yield
