"""Types of the native module csrc/order."""

import numpy as np
from numpy.typing import NDArray

def pack(
    lengths: NDArray[np.int64], bins: int, slots: int, open_end: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]: ...
def interleave(counts: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int32]]: ...
def blend(weights: NDArray[np.float64], size: int) -> tuple[NDArray[np.int16], NDArray[np.int64]]: ...
