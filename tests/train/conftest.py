from __future__ import annotations

import json
from pathlib import Path

import pytest

from megalm.cli import main


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two prepared sources, `a` and `b`: byte tokens in documents of uneven lengths."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("a", "b"):
        text = folder / f"{name}.jsonl"
        documents = [f"{name}: number {i} is followed by {i + 1}. " * (i % 7 + 1) for i in range(300)]
        text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
        prepare = ["data", "prepare", "--input", str(text), "--tokenizer", "byte", "--output", str(folder / name)]
        assert main(prepare) == 0
    return folder
