"""The fused multiply-add that the compiled kernel has, for Triton's interpreter: some versions round the product first."""

from __future__ import annotations

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def fuse() -> None:
    """For the rest of this process."""

    def create_fma(self: InterpreterBuilder, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        assert x.data.dtype == np.float32
        exact = x.data.astype(np.float64) * y.data + z.data  # a product of two floats fits a double
        return TensorHandle(exact.astype(np.float32), z.dtype.scalar)

    InterpreterBuilder.create_fma = create_fma
