"""Prepared directories for tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prepared import write_prepared

WriteSource = Callable[..., Path]


@pytest.fixture
def write_source(tmp_path: Path) -> WriteSource:
    """`write_prepared` in the test's own directory, under a name."""

    def write(shards: Any, name: str = "source", **settings: Any) -> Path:
        return write_prepared(tmp_path / name, shards, **settings)

    return write
