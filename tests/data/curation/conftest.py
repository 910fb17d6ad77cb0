"""Text files for the tests of curation, and what a command left of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from megalm.cli import main

WriteLines = Callable[[str, Sequence[Any]], Path]
Refused = Callable[..., str]


@pytest.fixture
def write_lines(tmp_path: Path) -> WriteLines:
    """A function that writes records as a .jsonl (a str is a record's text) and gives its path."""

    def write(name: str, records: Sequence[Any]) -> Path:
        path = tmp_path / name
        lines = [json.dumps({"text": record} if isinstance(record, str) else record) for record in records]
        path.write_text("".join(f"{line}\n" for line in lines))
        return path

    return write


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """A function that runs a command of `megalm data`, which has to fail, and gives its one line."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        assert main(["data", *map(str, arguments)]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("megalm: error: ")
        assert captured.err.count("\n") == 1
        return captured.err

    return run
