import numpy as np
from numpy.typing import NDArray

from inflight_edge.guard import FloatArray, IntArray
from inflight_edge.scoring.parameters import Parameters
from inflight_edge.verdict import Verdict

def instruction_sets() -> tuple[str, ...]: ...

class CpuBackend:
    def __init__(
        self,
        parameters: Parameters,
        classes: IntArray,
        target_row: int,
        instruction_set: str,
        verdict_type: np.dtype[np.void],
    ) -> None: ...
    def score_into(self, features: FloatArray, out: FloatArray) -> bool: ...
    def score_batch_into(self, features: FloatArray, out: FloatArray) -> bool: ...
    def verdict(self, features: FloatArray, explain: bool) -> Verdict | None: ...
    def judge_into(self, features: FloatArray, out: NDArray[np.void]) -> bool: ...
