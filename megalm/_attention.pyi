"""Types of the native module csrc/attention."""

from collections.abc import Sequence

class Shape:
    def __init__(
        self,
        ends: Sequence[int],
        heads: int,
        kv_heads: int,
        head_dim: int,
        window: int,
        softcap: float,
        threads: int,
    ) -> None: ...

def kernels(bfloat16: bool) -> list[str]: ...
def forward(kernels: str, shape: Shape, addresses: Sequence[int]) -> None: ...
def backward(kernels: str, shape: Shape, addresses: Sequence[int]) -> None: ...
