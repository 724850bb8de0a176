import numpy as np
from numpy.typing import NDArray

FORMATS: dict[str, int]

def preprocess(
    frame: NDArray[np.uint8],
    pixels: str,
    bt709: bool,
    full_range: bool,
    shape: tuple[int, int, int],
    scale: float,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> NDArray[np.float32]: ...
