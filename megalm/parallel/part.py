"""Which part of a parameter a rank holds before ZeRO shards it: plain numbers, known before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """A box of a parameter. The local tensor may be larger than `size` in the first dim: what is more is padding."""

    shape: tuple[int, ...]
    """Of the whole parameter, which no layout changes."""
    offset: tuple[int, ...]
    """Where this rank's box begins."""
    size: tuple[int, ...]
    """Of this rank's box."""
    copies: int = 1
    """How many neighbours on the tensor axis hold the same box; all of them if it is not cut."""
    partial: bool = False
    """Whether each copy's gradient is of its own rank's tokens or heads only, and has to be summed over the copies."""
    primary: bool = True
    """Whether this copy is the one that is counted and saved."""

    @classmethod
    def whole(cls, *shape: int) -> Part:
        """A parameter that one rank holds alone."""
        return cls(shape, (0,) * len(shape), shape)
