"""What `megalm data dedup` and `filter` left in a directory."""

from __future__ import annotations

from pathlib import Path


def kept_lines(directory: Path) -> list[bytes]:
    """The lines of all parts, in order."""
    return [line for path in sorted(directory.glob("part-*.jsonl")) for line in path.read_bytes().splitlines()]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}
