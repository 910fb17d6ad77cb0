from __future__ import annotations

import json
import os
import signal
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests' shapes are too small to share

import pytest
from hypothesis import settings

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell that starts the tests beside itself ignores

# A busy machine must not fail a test, nor may luck: the examples are the same each time, and new ones come with
# `pytest --hypothesis-profile=search`.
settings.register_profile("search", deadline=None)
settings.register_profile("same", deadline=None, derandomize=True)
settings.load_profile("same")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two prepared sources, `a` and `b`: byte tokens in documents of uneven lengths."""
    from megalm.cli import main

    folder = tmp_path_factory.mktemp("data")
    for name in ("a", "b"):
        text = folder / f"{name}.jsonl"
        documents = [f"{name}: number {i} is followed by {i + 1}. " * (i % 7 + 1) for i in range(300)]
        text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
        prepare = ["data", "prepare", "--input", str(text), "--tokenizer", "byte", "--output", str(folder / name)]
        assert main(prepare) == 0
    return folder
